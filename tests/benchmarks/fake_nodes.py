"""A Ray cluster on this machine whose autoscaler starts and ends nodes: fake ones, each a raylet of its own.

Ray's own AutoscalingCluster does not run from a wheel, and its stop ends every Ray on the machine. This one ends what
it started, which it knows by its folder and its address.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import free_port

HEAD = "f" * 51 + "00000"
START_TIMEOUT_S, END_TIMEOUT_S = 90.0, 8.0
OBJECT_STORE_BYTES = 200_000_000
LISTS = [f"{who}_commands" for who in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray")]
LISTS += ["worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"]


@dataclass(frozen=True)
class FakeCluster:
    address: str
    dashboard: str


@contextmanager
def cluster(
    node_types: Mapping[str, Mapping[str, Any]], idle_s: float, environment: Mapping[str, str]
) -> Iterator[FakeCluster]:
    """A head without CPUs, and workers of `node_types`: name → {resources, min_workers, max_workers}. One that was idle
    for `idle_s` is ended. `environment` is that of all of Ray's processes."""
    from ray._private.services import get_node_ip_address

    folder = tempfile.mkdtemp(prefix="cr-", dir="/tmp")
    port, dashboard = free_port(), free_port()
    address = f"{get_node_ip_address()}:{port}"
    types = {name: {"node_config": {}, **one} for name, one in node_types.items()}
    types["ray.head.default"] = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    config = {
        "cluster_name": "fake",
        "max_workers": sum(one["max_workers"] for one in types.values()),
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": address,
            "launch_multiple": True,
            "head_node_id": HEAD,
        },
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in LISTS},
        "file_mounts_sync_continuously": False,
    }
    Path(folder, "autoscaling.json").write_text(json.dumps(config))
    words = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=0", "--num-gpus=0"),
        *(f"--port={port}", f"--autoscaling-config={folder}/autoscaling.json", f"--temp-dir={folder}"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *("--dashboard-agent-listen-port=0", f"--ray-client-server-port={free_port()}"),
        *(f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"),
    ]
    own = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "RAY_prestart_worker_first_driver": "0",
    }
    log = Path(folder, "start.log")
    with log.open("wb") as written:
        process = subprocess.Popen(
            words,
            env={**os.environ, **own, **environment},
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(process, log, dashboard)
        yield FakeCluster(address, f"http://127.0.0.1:{dashboard}")
    finally:
        _end(process.pid, f"{folder}/", address)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(process: subprocess.Popen[bytes], log: Path, dashboard: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if "Ray runtime started" in log.read_text():
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", dashboard), 1).close()
                return
        time.sleep(0.2)
    raise RuntimeError(f"the head did not start: {log.read_text()[-2000:]}")


def _end(starter: int, *marks: str) -> None:
    """The starter, all below it, and who has a mark in its command: nodes outlive the autoscaler that began them."""
    found: dict[int, psutil.Process] = {}
    with suppress(psutil.NoSuchProcess):
        own = psutil.Process(starter)
        found = {one.pid: one for one in (own, *own.children(recursive=True))}
    for one in psutil.process_iter():
        with suppress(psutil.Error):
            if any(mark in word for word in one.cmdline() for mark in marks):
                found[one.pid] = one
    found.pop(os.getpid(), None)
    for one in found.values():
        with suppress(psutil.NoSuchProcess):
            one.terminate()
    _, alive = psutil.wait_procs(list(found.values()), timeout=END_TIMEOUT_S)
    for one in alive:
        with suppress(psutil.NoSuchProcess):
            one.kill()
