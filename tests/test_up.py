"""`cellray up|serve|status|down` as users type them, each with a real Ray; and requests under way when it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import tritonclient.grpc as triton
import yaml
from PIL import Image

from tests.conftest import DEPLOY, GRPC, free_port
from tests.loaded_app import FOLDER
from tests.s3 import ROOT

PATIENCE_S = 240.0  # each step, also on a busy machine
pytestmark = pytest.mark.timeout(600)


class Shell:
    """Where commands run: with a home, a folder for temporary files and ports of their own."""

    def __init__(self, folder: Path, short: str) -> None:
        self.folder, self.tmp, self.port, self.grpc = folder, Path(short), free_port(), free_port()
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CELLRAY_", "AWS_"))}
        places = {"HOME": str(folder), "TMPDIR": short, "PYTHONPATH": str(ROOT), FOLDER: str(folder)}
        self.environment = keep | places
        self.kept: list[subprocess.Popen[str]] = []

    def elsewhere(self) -> Shell:
        """Another one, with the same home and another folder for temporary files."""
        (self.folder / "elsewhere").mkdir()
        return Shell(self.folder, str(self.folder / "elsewhere"))

    def begin(self, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *words],
            env=self.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.kept.append(process)
        return process

    def __call__(self, *words: str) -> tuple[int, str]:
        """Exit code and output."""
        process = self.begin(*words)
        said, _ = process.communicate(timeout=PATIENCE_S)
        return process.returncode, said

    def config(self, name: str, **options: Any) -> str:
        """A Serve config of the app with a hold; `options` are for each replica."""
        config = yaml.safe_load((DEPLOY / "serve.local.yaml").read_text())
        (app,) = config["applications"]
        app |= {"import_path": "tests.loaded_app:build", "args": {"config": None}}
        for one in app["deployments"]:
            one["ray_actor_options"] |= options
        config["http_options"]["port"] = self.port
        config["grpc_options"] = {"port": self.grpc, "grpc_servicer_functions": [GRPC], "enable_reflection": False}
        path = self.folder / name
        path.write_text(yaml.safe_dump(config))
        return str(path)

    def record(self) -> dict[str, Any]:
        return json.loads((self.tmp / f"cellray-up-{os.getuid()}.json").read_text() or "{}")

    def processes(self) -> list[int]:
        """All that have this shell's environment: what was started from here, Ray's too."""
        marks, found = [f"{name}={self.environment[name]}".encode() for name in ("HOME", "TMPDIR")], []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                values = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if all(mark in values for mark in marks):
                found.append(int(path.parent.name))
        return found


@pytest.fixture(name="shell")
def shell_fixture(tmp_path: Path) -> Iterator[Shell]:
    with tempfile.TemporaryDirectory(prefix="up-", dir="/tmp") as short:
        shell = Shell(tmp_path, short)
        try:
            yield shell
        finally:
            shell("down")
            for process in shell.kept:
                if process.poll() is None:
                    process.kill()
                process.wait()
                if process.stdout:
                    process.stdout.close()


def heard(process: subprocess.Popen[str], words: str) -> list[str]:
    """What it has said up to these words."""
    said: list[str] = []
    for line in process.stdout or ():
        said.append(line)
        if words in line:
            return said
    pytest.fail("".join(said))


def until(done: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := done()):
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s: {what}"
        time.sleep(0.1)
    return found


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return file.getvalue()


def test_up_says_what_it_waits_for_and_down_leaves_nothing(shell: Shell) -> None:
    """Replicas that ask for what no node has. Ctrl-C, or too long a wait, ends `up` and not what it started."""
    config = shell.config("gpu.yaml", num_gpus=1)
    first = shell.begin("up", "--dashboard-port", str(free_port()), "--serve-config", config)
    heard(first, "waiting for nano-encoder: 0 of 1 replica, no node with 1 GPU: none has any")
    first.send_signal(signal.SIGINT)
    assert first.wait(PATIENCE_S) == 130
    code, said = shell("up", "--timeout", "1", "--serve-config", config)
    assert code == 1, said
    assert "starting Ray" not in said
    assert "not ready after 1 s, still waiting for" in said
    assert "`cellray down` ends it" in said
    record = shell.record()
    assert Path(record["folder"]).is_dir()

    code, said = shell("status")
    assert code == 1
    assert "gpus         0" in said
    assert "no node with 1 GPU" in said
    code, said = shell("status", "--json")
    found = json.loads(said)
    assert (code, found["healthy"], found["address"]) == (1, False, record["dashboard"])
    assert {one["name"] for app in found["apps"] for one in app["deployments"]} == {
        "ingress",
        "nano-encoder",
        "nano-decoder",
    }

    code, said = shell("serve", "--serve-config", config)
    assert (code, "it is up already" in said) == (2, True), said
    code, said = shell("up", "--address", f"http://127.0.0.1:{free_port()}", "--serve-config", config)
    assert (code, "no Ray dashboard answers" in said) == (1, True), said
    assert shell.record() == record

    stranger = shell.elsewhere()  # to whom this is another's Ray
    other = Path(config).with_name("other.yaml")
    other.write_text(Path(config).read_text().replace("name: cellray", "name: another"))
    code, said = stranger("down", "--address", record["dashboard"], "--serve-config", str(other))
    assert (code, "has other applications, too: cellray" in said) == (1, True), said
    code, said = stranger("down", "--address", record["dashboard"], "--serve-config", config)
    assert (code, "its Ray goes on" in said) == (0, True), said
    code, said = shell("status")
    assert (code, "app          none" in said) == (1, True), said

    code, said = shell("down")
    assert (code, "Ray and the app are down" in said) == (0, True), said
    assert not Path(record["folder"]).exists()
    assert until(lambda: not shell.processes(), "nothing runs on")
    code, said = shell("down")
    assert (code, "nothing that `cellray up` started runs here" in said) == (0, True)
    assert shell("status")[0] == 1


@contextmanager
def held(shell: Shell) -> Iterator[None]:
    """No batch of the encoder ends within."""
    hold = shell.folder / "encoder.hold"
    hold.touch()
    try:
        yield
    finally:
        hold.unlink()


def test_sigterm_ends_what_is_under_way_takes_nothing_new_and_then_stops(shell: Shell) -> None:
    serve = shell.begin("serve", "--dashboard-port", str(free_port()), "--serve-config", shell.config("serve.yaml"))
    shown = heard(serve, "Ctrl-C stops it")
    url = next(line.split()[1] for line in shown if line.startswith("page "))
    record = shell.record()
    code, said = shell("up", "--serve-config", shell.config("serve.yaml"))  # what runs already is deployed on
    assert (code, url in said, "starting Ray" in said) == (0, True, False), said
    code, said = shell("status")
    assert code == 0, said
    assert "app          cellray  RUNNING" in said

    with ThreadPoolExecutor() as pool, triton.InferenceServerClient(f"127.0.0.1:{shell.grpc}") as grpc:
        assert grpc.is_server_live()
        with held(shell):
            before = len((shell.folder / "encoder.log").read_text().splitlines())
            embedding = pool.submit(httpx.post, f"{url}/v1/embed", content=png(), timeout=PATIENCE_S)
            until(lambda: len((shell.folder / "encoder.log").read_text().splitlines()) > before, "it is at work")
            down = pool.submit(shell, "down")  # SIGTERM
            refused = until(lambda: (one := httpx.get(f"{url}/healthz")).status_code == 503 and one, "it is refused")
            assert refused.headers["retry-after"]
            assert refused.json()["error_type"] == "Unavailable"
            assert httpx.post(f"{url}/v1/embed", content=png()).status_code == 503
            with pytest.raises(triton.InferenceServerException, match="about to stop") as caught:
                grpc.get_server_metadata()
            assert caught.value.status() == "StatusCode.UNAVAILABLE"
            assert not embedding.done()
            assert serve.poll() is None
        assert embedding.result().status_code == 200, embedding.result().text
        assert len(embedding.result().content) > 0
        assert down.result()[0] == 0, down.result()[1]
    said, _ = serve.communicate(timeout=PATIENCE_S)
    assert serve.returncode == 0, said
    assert "waiting for 1 request under way to end" in said
    assert not Path(record["folder"]).exists()
    assert until(lambda: not shell.processes(), "nothing runs on")
