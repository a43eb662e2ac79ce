"""What starts Ray keeps its own way of ending, and its jobs find it beside others."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE

from tests.conftest import free_port
from tests.s3 import ROOT

PROGRAM = """
import os, signal, sys, time
import ray
from cluster import session
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    with session.keeping_sigterm():
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
except KeyboardInterrupt:
    ray.shutdown()
    print("stopped in good order")
"""


def test_sigterm_is_ours_after_ray_has_started(tmp_path: Path) -> None:
    short = tempfile.mkdtemp(prefix="cellray-")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, short]  # Ray's sockets want short paths
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    shutil.rmtree(short, ignore_errors=True)
    assert (done.returncode, done.stdout.strip()) == (0, "stopped in good order"), done.stderr[-2000:]


OTHER = """
import sys
import ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
ray.shutdown()
"""
SUBMITTED = "import ray; print('joined', ray.init(log_to_driver=False).address_info['gcs_address'])"
OURS = f"""
import subprocess, sys
import ray
from cluster import session
with session.local({{"applications": []}}, lambda text: None, int(sys.argv[1])) as started:
    print("ready", flush=True)
    sys.stdin.read()
    words = ["ray", "job", "submit", "--address", started.dashboard, "--", "python", "-c", {SUBMITTED!r}]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    print("ours", ray.get_runtime_context().gcs_address)
    print(done.stdout)
"""


@contextmanager
def started(program: str, home: Path, word: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has said that it is ready. It goes on once its input ends, at the latest with the `with`."""
    home.mkdir()
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", program, word]
    with subprocess.Popen(words, env=environment, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            if process.poll() is None:
                process.communicate(timeout=120)


def test_submitted_jobs_join_their_own_cluster_beside_others(tmp_path: Path) -> None:
    """One that had the port of Ray's agents first, and one that started last. Each has a token of its own."""
    with ExitStack() as stack:
        folders = [stack.enter_context(tempfile.TemporaryDirectory(prefix="cellray-")) for _ in range(2)]
        stack.enter_context(started(OTHER, tmp_path / "first", folders[0]))
        ours = stack.enter_context(started(OURS, tmp_path / "ours", str(free_port())))
        stack.enter_context(started(OTHER, tmp_path / "last", folders[1]))
        said, _ = ours.communicate(timeout=180)
    address = next(line.split()[1] for line in said.splitlines() if line.startswith("ours "))
    assert f"joined {address}" in said
