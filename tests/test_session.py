"""What starts Ray keeps its own way of ending."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

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
