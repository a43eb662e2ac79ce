"""`cellray doctor` on set-ups that are broken for real, each named rightly.

Faked, at the smallest seam: other versions of Ray and Python, which a small HTTP server says that it is of, in place of
a cluster's dashboard.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
import s3fs
import yaml

from cluster import checks_here, doctor, settings, status
from cluster.dashboard import Dashboard
from cluster.doctor import OK, PROBLEM, WARNING, Finding, Setup
from jobs import cli, cli_cluster
from serve_app import models
from tests.conftest import DEPLOY, App, free_port
from tests.s3 import EVERYTHING, ROOT, S3, client, make_user, s3_fixture, server  # noqa: F401

LOCAL, GPU = DEPLOY / "serve.local.yaml", DEPLOY / "serve.gpu.yaml"
CANARY = "canary-5b8e1f0c7a"  # a secret, wherever one may be


@pytest.fixture(name="setup")
def setup_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """One with which nothing is wrong: this machine's fixed ports are replaced."""
    for name in ("RAY_ADDRESS", "CELLRAY_CONFIG", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("cluster.session.DASHBOARD_PORT", free_port())
    monkeypatch.setattr("cluster.session.AGENT_PORT", free_port())
    s3fs.S3FileSystem.clear_instance_cache()  # a command starts without what others have asked for, and as whom
    empty = tmp_path / "empty"
    empty.mkdir()
    config = serve_file(tmp_path, lambda config: None)
    return Setup(config, None, None, None, None, empty, cli_cluster._kept_weights)


def serve_file(folder: Path, change: Callable[[dict[str, Any]], None], source: Path = LOCAL) -> Path:
    config = yaml.safe_load(source.read_text())
    config["http_options"]["port"] = free_port()
    change(config)
    path = folder / f"{free_port()}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def settings_file(folder: Path, **values: Any) -> str:
    path = folder / f"settings-{free_port()}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def look(setup: Setup, *checks: str) -> dict[str, list[Finding]]:
    """Findings by check; all others have to be fine."""
    found: dict[str, list[Finding]] = {}
    for one in doctor.run(setup):
        found.setdefault(one.check, []).append(one)
        if one.check not in checks:
            assert one.verdict == OK, one
        if one.verdict != OK:
            assert one.expected, one
            assert one.mend, one
        assert CANARY not in str(one)
    return found


def only(setup: Setup, check: str, verdict: str = PROBLEM) -> Finding:
    """That of this one check, which has this verdict; all others are fine."""
    (found,) = look(setup, check)[check]
    assert found.verdict == verdict, found
    return found


def test_a_sound_set_up(setup: Setup, tmp_path: Path, sample_images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "deeper"
    words = ["doctor", "--serve-config", str(setup.serve_config), str(sample_images / "*.png"), str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(setup.folder)
        assert cli.main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == "no problems, no warnings"
        assert all(line.startswith("ok ") for line in lines[:-2])
        assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["check"] for one in found} >= {"GPUs", "memory", "ports", "weights", "input", "output", "packages"}
    assert not out.parent.exists()
    assert not list(tmp_path.glob("**/_cellray-doctor*"))


def test_problems_come_last_with_what_to_do(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with packages of the same names, which `python -m jobs.embed` would take."""
    (setup.folder / "jobs").mkdir()
    (setup.folder / "jobs" / "__init__.py").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(setup.folder)
        assert cli.main(["doctor", "--serve-config", str(setup.serve_config)]) == 1
        taken = subprocess.run(
            [sys.executable, "-c", "import sys; sys.path.insert(0, '.'); import jobs; print(jobs.__file__)"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    assert str(setup.folder) in str(Path(taken.stdout.strip()).resolve())
    *_, problem, expected, mend, _, summary = capsys.readouterr().out.splitlines()
    assert problem.startswith("problem  packages ")
    assert f"{setup.folder}/jobs would be imported as `jobs`" in problem
    assert f"Cellray's own, {ROOT}/jobs" in expected
    assert "submit from another folder" in mend
    assert summary == "1 problem, no warnings"
    shutil.rmtree(setup.folder / "jobs")
    (setup.folder / "serve_app.py").touch()
    assert "serve_app.py would be imported as `serve_app`" in only(setup, "packages").found
    (setup.folder / "serve_app.py").unlink()
    (setup.folder / "jobs").mkdir()  # a namespace package comes after ours
    look(setup)


def test_a_serve_config_that_is_wrong_hides_no_other_check(setup: Setup, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["applications"][0]["deployments"][1]["max_ongoing_request"] = 3

    broken = replace(setup, serve_config=serve_file(tmp_path, change))
    found = look(broken, "Serve config", "weights", "GPUs", "CPUs", "memory", "ports", "settings", "places")
    assert "max_ongoing_request is no key" in found["Serve config"][0].found
    assert {one.verdict for ones in found.values() for one in ones} == {OK, WARNING, PROBLEM}
    assert "not looked at: the Serve config cannot be used" in found["ports"][0].found
    missing = replace(setup, serve_config=tmp_path / "nothing.yaml")
    assert doctor.run(missing)[0].verdict == PROBLEM


def test_no_gpu(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # none is seen on any machine

    def change(config: dict[str, Any]) -> None:
        config["applications"][0]["args"] = {}
        config["applications"][0]["deployments"] = [
            one | {"ray_actor_options": {"num_cpus": 0, "num_gpus": one["ray_actor_options"].get("num_gpus", 0)}}
            for one in config["applications"][0]["deployments"]
        ]
        del config["grpc_options"]

    found = only(replace(setup, serve_config=serve_file(tmp_path, change, GPU)), "GPUs")
    assert found.found == "0 seen"
    assert "1.25 for sam_vit_b-encoder" in found.expected
    assert "NVIDIA's driver" in found.mend


def test_too_little_memory_and_too_few_cores(setup: Setup, tmp_path: Path) -> None:
    """For replicas that are too many on any machine, and for one that says itself how much it takes."""

    def many(config: dict[str, Any]) -> None:
        one = config["applications"][0]["deployments"][1]
        del one["autoscaling_config"], one["ray_actor_options"]  # Ray's default: a core each
        one["num_replicas"] = 100_000

    found = look(replace(setup, serve_config=serve_file(tmp_path, many)), "memory", "CPUs")
    assert "100002 replicas" in found["memory"][0].expected
    assert "free" in found["memory"][0].found
    assert (found["CPUs"][0].verdict, found["CPUs"][0].expected[:7]) == (PROBLEM, "100000,")

    def large(config: dict[str, Any]) -> None:
        config["applications"][0]["deployments"][2]["ray_actor_options"]["memory"] = 1 << 50

    assert "about 1048580" in only(replace(setup, serve_config=serve_file(tmp_path, large)), "memory").expected


def test_ports_that_are_taken(setup: Setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def change(config: dict[str, Any]) -> None:
            config["http_options"]["port"] = port

        found = only(replace(setup, serve_config=serve_file(tmp_path, change)), "ports")
        assert found.found == f"{port}, Serve's HTTP, is taken"
        assert "http_options.port" in found.mend
        monkeypatch.setattr("cluster.session.DASHBOARD_PORT", port)
        found = only(setup, "ports", WARNING)  # `up` takes another one
        assert found.found == f"{port}, Ray's dashboard, is taken"


def test_a_temporary_folder_too_long_for_rays_sockets(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / ("long" * 20)
    base.mkdir()
    monkeypatch.setenv("TMPDIR", str(base))
    found = only(setup, "Ray's folder")
    assert str(base) in found.found
    assert "107" in found.expected
    assert "it follows TMPDIR" in found.mend
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(OSError, match="too long"):
        probe.bind(str(base / "ray" / checks_here.SESSION))
    monkeypatch.setenv("RAY_TMPDIR", f"/tmp/none-{free_port()}")
    assert "does not exist" in only(setup, "Ray's folder").found
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    look(setup)


def test_shared_memory_that_is_too_small(setup: Setup) -> None:
    """As in a container of Docker's, which has 64 MB: a /dev/shm of that size, for the command alone."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs unshare, and leave for it")
    doctor = f"{sys.executable} -m jobs.cli doctor --json --serve-config {setup.serve_config}"
    words = [*alone, "sh", "-c", f"mount -t tmpfs -o size=64m tmpfs /dev/shm && exec {doctor}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    (found,) = [one for one in json.loads(done.stdout) if one["check"] == "shared memory"]
    assert (found["verdict"], found["found"]) == (PROBLEM, "64 MiB free in /dev/shm")
    assert "--shm-size=1g" in found["mend"]


def weights(setup: Setup, folder: Path, **model: str) -> Finding:
    """Of a model that is served under the name `mine`."""

    def change(config: dict[str, Any]) -> None:
        config["applications"][0]["args"]["models"] = ["mine"]

    config = settings_file(folder, weights_dir=str(folder / "weights"), models={"mine": model})
    changed = replace(setup, serve_config=serve_file(folder, change), config=config)
    (found,) = look(changed, "weights")["weights"]
    return found


def test_weights_that_are_missing_or_others(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "mine.pth"
    found = weights(setup, tmp_path, source=str(path))
    assert (found.verdict, f"there is no checkpoint at {path}" in found.found) == (PROBLEM, True)
    path.write_bytes(b"some weights")
    found = weights(setup, tmp_path, source=str(path), sha256="0123456789abcdef")
    assert found.verdict == PROBLEM
    assert "has sha256 " in found.found
    assert "the settings expect 0123456789ab…" in found.found
    assert "correct sha256 in the settings" in found.mend
    found = weights(setup, tmp_path, source=f"https://127.0.0.1:{free_port()}/mine.pth?signature={CANARY}")
    assert (found.verdict, "does not answer" in found.found) == (PROBLEM, True)
    (missing,) = look(replace(setup, config=settings_file(tmp_path, models={"a": {"source": "a.pth"}})), "weights")[
        "weights"
    ]
    assert missing.verdict == OK  # it is not served


def test_weights_that_are_damaged_on_this_node(setup: Setup, tmp_path: Path) -> None:
    config = settings_file(tmp_path, weights_dir=str(tmp_path / "weights"))
    folder = models.prepare(settings.load(config), "nano")
    setup = replace(setup, config=config)
    assert "here, as they were written" in look(setup)["weights"][0].found
    with (folder / "decoder.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x00\x01")
    found = only(setup, "weights")
    assert f"{folder}/decoder.safetensors has sha256 " in found.found
    assert f"delete {folder}" in found.mend


def test_s3_that_nobody_serves(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    port = free_port()
    config = settings_file(tmp_path, storage={"endpoint_url": f"http://user:{CANARY}@127.0.0.1:{port}", "attempts": 9})
    found = look(replace(setup, config=config, input="s3://in/plates", output="s3://out/x"), "input", "output")
    for name in ("input", "output"):
        (one,) = found[name]
        assert one.verdict == PROBLEM
        assert "could not be reached" in one.found
        assert f"127.0.0.1:{port}" in one.mend


@pytest.fixture(scope="module", name="guarded")
def guarded_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server that checks who asks, with the bucket `plates` and an object in it."""
    with server(tmp_path_factory.mktemp("guarded"), check_keys=True) as url:
        owner = make_user(url, "owner", EVERYTHING)
        keys = {name.lower(): value for name, value in owner.items()}
        client(url, "s3", **keys).create_bucket(Bucket="plates")
        client(url, "s3", **keys).put_object(Bucket="plates", Key="in/a.png", Body=b"image")
        yield url


@pytest.mark.parametrize(
    ("actions", "verdict", "says"),
    [
        (["s3:*"], OK, "is written create-only, and deleted from"),
        (["s3:Get*", "s3:List*"], PROBLEM, "not writable: no permission for s3://plates/out"),
        (["s3:Get*", "s3:List*", "s3:Put*"], WARNING, "nothing can be deleted: s3://plates/out/_cellray-doctor-"),
    ],
)
def test_a_bucket_that_may_not_be_written_to(
    setup: Setup,
    guarded: str,
    actions: list[str],
    verdict: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed: Any = {"Effect": "Allow", "Action": actions, "Resource": "*"}
    for name, value in make_user(guarded, f"user-{len(actions)}-{verdict}", allowed).items():
        monkeypatch.setenv(name, value)
    config = settings_file(tmp_path, storage={"endpoint_url": guarded})
    setup = replace(setup, config=config, input="s3://plates/in/*.png", output="s3://plates/out")
    found = look(setup, "output")
    assert "the first is s3://plates/in/a.png, 5 bytes" in found["input"][0].found
    (one,) = found["output"]
    assert (one.verdict, says in one.found) == (verdict, True), one


def test_buckets_and_keys_that_are_not_there(setup: Setup, guarded: str, tmp_path: Path) -> None:
    config = settings_file(tmp_path, storage={"endpoint_url": guarded})
    found = look(replace(setup, config=config, input="s3://plates/in", output="s3://plates/out"), "input", "output")
    assert "no permission" in found["input"][0].found
    assert "credentials" in found["input"][0].mend


def test_a_storage_that_overwrites(setup: Setup, s3: S3, tmp_path: Path) -> None:
    """One that does not know If-None-Match: a proxy before the server takes it out."""
    upstream = s3.settings.endpoint_url or ""
    with answering(lambda method, path, headers, body: forward(upstream, method, path, headers, body)) as url:
        config = settings_file(tmp_path, storage={"endpoint_url": url})
        found = only(replace(setup, config=config, output=s3.make_bucket("doctor-overwrites")), "output")
    assert "took the first one's place" in found.found


def forward(upstream: str, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes, dict]:
    import httpx

    kept = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
    answer = httpx.request(method, upstream + path, headers=kept, content=body)
    return answer.status_code, answer.content, {"ETag": answer.headers.get("ETag", '""')}


@contextmanager
def answering(answer: Callable[[str, str, dict[str, str], bytes], tuple[int, bytes, dict[str, str]]]) -> Iterator[str]:
    """A server that answers so; its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # which says "100 Continue"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, content, headers = answer(self.command, self.path, dict(self.headers), body)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_DELETE = do_HEAD = handle_one

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()


@pytest.mark.parametrize(
    ("there", "python", "ray_verdict", "python_verdict"),
    [("2.0.1", "2.7.18", PROBLEM, PROBLEM), (ray.__version__, "3.{minor}.99", OK, WARNING)],
)
def test_a_cluster_of_other_versions(
    setup: Setup, there: str, python: str, ray_verdict: str, python_verdict: str
) -> None:
    python = python.format(minor=sys.version_info.minor)
    node = {"state": "ALIVE", "node_ip": "10.0.0.1", "is_head_node": True, "resources_total": {"CPU": 64.0}}
    answers: dict[str, Any] = {
        "/api/version": {"ray_version": there},
        "/api/v0/cluster_metadata": {"data": {"rayVersion": there, "pythonVersion": python}},
        "/api/v0/nodes": {"data": {"result": {"result": [node]}}},
        "/api/serve/applications/": {"applications": {}},
    }

    def answer(_: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        return 200, json.dumps(answers[path.split("?")[0]]).encode(), {}

    with answering(answer) as url:
        found = look(replace(setup, address=url), "Ray version", "Python version", "app")
    (rays,), (pythons,), (app,) = found["Ray version"], found["Python version"], found["app"]
    assert (rays.verdict, there in rays.found) == (ray_verdict, True)
    assert (pythons.verdict, f"{python} on the cluster" in pythons.found) == (python_verdict, True)
    assert (app.verdict, app.found) == (WARNING, "cellray is not deployed")


def test_a_busy_dashboard_is_waited_for(setup: Setup) -> None:
    """By `up`: it answers late once, then that the app is deployed, then that it runs."""
    states = iter(["", "DEPLOYING", "RUNNING"])

    def answer(_: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if path.startswith("/api/v0/nodes"):
            return 200, b'{"data": {"result": {"result": []}}}', {}
        state = next(states)
        app = {"status": state, "message": "", "deployments": {}}
        return (200, json.dumps({"applications": {"cellray": app}}).encode(), {}) if state else (500, b"late", {})

    said: list[str] = []
    with answering(answer) as url:
        status.wait(Dashboard(url), ["cellray"], said.append, 60)
    assert next(states, None) is None
    assert "waiting for the dashboard: " in said[0]


def test_no_cluster_at_the_address(setup: Setup) -> None:
    address = f"http://user:{CANARY}@127.0.0.1:{free_port()}"
    found = look(replace(setup, address=address), "cluster", "Ray token", "versions", "resources", "app")
    assert found["cluster"][0].verdict == PROBLEM
    assert "no Ray dashboard answers on http://127.0.0.1:" in found["cluster"][0].found
    assert {found[name][0].verdict for name in ("Ray token", "versions", "resources", "app")} == {WARNING}


def test_a_clusters_token(setup: Setup, app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real Ray with a token: one that is right, none, a wrong one, and one in a file that is not there."""
    setup = replace(setup, address=app.dashboard)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    look(setup)
    assert Dashboard(ray.get_runtime_context().gcs_address).url == app.dashboard
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert "`ray job submit` would send none" in only(setup, "Ray token", WARNING).found
    others = ("Ray token", "versions", "resources", "app")
    monkeypatch.setenv("HOME", str(tmp_path))
    (found,) = look(setup, *others)["Ray token"]
    assert (found.verdict, "asks for one, and there is none here" in found.found) == (PROBLEM, True)
    assert "export RAY_AUTH_MODE=token" in found.mend
    monkeypatch.setenv("RAY_AUTH_TOKEN", CANARY)
    (found,) = look(setup, *others)["Ray token"]
    assert (found.verdict, "refuses the one of RAY_AUTH_TOKEN" in found.found) == (PROBLEM, True)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nothing"))
    for where in (setup, replace(setup, address=None)):  # of a cluster, and for one that is started here
        (found,) = look(where, *others)["Ray token"]
        assert (found.verdict, "nothing cannot be read" in found.found) == (PROBLEM, True)


def test_what_never_answers_is_waited_for_no_longer(setup: Setup) -> None:
    """A dashboard that takes the connection, and then says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = doctor.run(replace(setup, address=f"http://127.0.0.1:{silent.getsockname()[1]}"), timeout_s=0.5)
    late = [one for one in found if "did not end within" in one.found]
    assert {one.check for one in late} == {"cluster", "Ray token", "versions", "resources", "app"}
    assert {one.verdict for one in late} == {PROBLEM}
    assert [one.verdict for one in found if one.check == "packages"] == [OK]
