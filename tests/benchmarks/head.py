"""The head goes away in the middle of a job and under HTTP load; a new one takes its tables from Redis, at its address.

    python -m tests.benchmarks.head [--images 1500] [--away 20]

Redis is Debian's redis-server. Nodes, app and load are those of tests.benchmarks.nodes, but the head has no replicas,
all nodes have a proxy, at one port, and the job is submitted, its driver on a node that stays: the head has an address
of its own, and JOIN names the others', since Ray takes a driver to its machine's head. Nodes wait WAIT_S for a head.

What is lost: rows that jobs.verify or a count miss, requests whose caller, the product's client, saw an error, and
replicas that are not those of before. well_s: from the new head's first answer until Serve says that all run.
images_without: what the job committed while there was no head. If the job does not end, the same command is run again,
and job_ended is 0.
"""

from __future__ import annotations

import os

os.environ["RAY_AUTH_MODE"] = "disabled"  # before anything imports Ray: other than `ray.init`, Cluster makes no token

import argparse
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.benchmarks import nodes, sleeping
from tests.benchmarks.nano import report
from tests.benchmarks.nodes import BACK_S, CLIENTS, MODEL, NODES, PARALLEL, POLL_S, SHARD_IMAGES, START_S, Replicas, say
from tests.benchmarks.traffic import Traffic, write_images
from tests.conftest import free_port
from tests.deploy_pods import KEEPALIVE
from tests.s3 import ROOT

WAIT_S, AFTER, JOB_S = 600, 0.2, 420.0
DRIVERS, HEAD = "drivers", "127.0.0.2"  # a resource of every node but the head; and the head's address
JOIN = """import ray, sys; from jobs import embed
ray.init(_node_ip_address=ray.util.get_node_ip_address(), log_to_driver=False); sys.exit(embed.main(sys.argv[1:]))"""
EACH = {"object_store_memory": nodes.OBJECT_STORE_BYTES, "dashboard_agent_listen_port": 0}
WANTED = dict.fromkeys(("rows_lost", "rows_twice", "verify_faults", "http_lost", "replicas_lost"), 0.0)


@contextmanager
def redis() -> Iterator[str]:
    """Its address, host:port; it keeps nothing on a disk."""
    port = str(free_port())
    words = ["redis-server", "--bind", "127.0.0.1", "--port", port, "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextmanager
def cluster(head: dict[str, Any]) -> Iterator[Any]:
    """No driver of this process: it would go with its head."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_TMPDIR"] = head["temp_dir"]
    Path(head["temp_dir"], "ray").mkdir()
    found = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(NODES):
            found.add_node(num_cpus=4, num_gpus=1, resources={DRIVERS: 1}, **EACH)
        yield found
    finally:
        found.shutdown()
        shutil.rmtree(head["temp_dir"], ignore_errors=True)


def until_answered(dashboard: str) -> None:
    """Until the new head says what Serve runs. Raises what it says last."""
    deadline = time.monotonic() + BACK_S
    while True:
        try:
            Replicas(dashboard).running()
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def committed(out: Path) -> int:
    return SHARD_IMAGES * len(list((out / "_records").glob("*.json")))


def until(out: Path, images: int, most_s: float) -> None:
    """Until so many are committed, or the time is over."""
    end = time.monotonic() + most_s
    while committed(out) < images and time.monotonic() < end:
        time.sleep(POLL_S)


def lose(folder: Path, images: int, away_s: float) -> dict[str, float]:
    port, settings, out = free_port(), folder / "cellray.yaml", folder / "out"
    settings.write_text(yaml.safe_dump({"models": sleeping.models([MODEL])}))
    app = nodes.app(settings, port) | {"proxy_location": "EveryNode"}
    words = [sys.executable, "-c", JOIN, str(folder / "images"), str(out), "--model", MODEL]
    words += ["--config", str(settings), "--parallel", str(PARALLEL), "--shard-images", str(SHARD_IMAGES)]
    dashboard_port = free_port()
    dashboard = f"http://127.0.0.1:{dashboard_port}"
    with redis() as address:
        head = {
            **EACH,
            "node_ip_address": HEAD,
            "num_cpus": 0,
            "redis_address": None,
            "external_addresses": [address],
            "gcs_server_port": free_port(),
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": dashboard_port,
            "temp_dir": tempfile.mkdtemp(prefix="cr-", dir="/tmp"),
        }
        with cluster(head) as found, Traffic(f"http://127.0.0.1:{port}") as traffic:
            replicas = Replicas(dashboard)
            replicas.client.deploy_applications(app)
            replicas.until_all(START_S)
            before = set(replicas.running("replica_id"))
            traffic.want(MODEL, CLIENTS)
            job = JobSubmissionClient(dashboard).submit_job(
                entrypoint=shlex.join(words), entrypoint_resources={DRIVERS: 1}
            )
            begun = time.monotonic()
            until(out, int(images * AFTER), START_S)
            held = committed(out)
            say(f"after {held} images the head goes")
            lost = time.monotonic()
            nodes.send(nodes.processes(found.head_node), signal.SIGKILL)
            until(out, images, away_s)
            without = committed(out) - held
            found.head_node = None
            found.add_node(**head)
            until_answered(dashboard)
            head_s = time.monotonic() - lost
            say(f"a new head after {head_s:.0f} s; the job committed {without} images without one")
            well_s = replicas.until_all(BACK_S)
            same = before & set(replicas.running("replica_id"))
            say(f"Serve runs all replicas after {well_s:.0f} s, {len(same)} of {len(before)} are those of before")
            until(out, images, JOB_S)
            done = time.monotonic()
            deadline, client = time.monotonic() + 60, JobSubmissionClient(dashboard)
            while not (status := client.get_job_status(job)).is_terminal() and time.monotonic() < deadline:
                time.sleep(1)
            say(f"the job: {status.value}, {committed(out)} images")
            if status is not JobStatus.SUCCEEDED:
                say(client.get_job_logs(job)[-2000:])
                again = {**os.environ, "RAY_ADDRESS": found.address}
                subprocess.run(words, env=again, check=True, timeout=JOB_S, stdout=sys.stderr)
            ended = time.monotonic()
            traffic.want(MODEL, 0)
    answers = [call.start + call.seconds for call in traffic.calls if not call.error]
    return {
        **nodes.outcome(out, images, traffic),
        "replicas_lost": len(before) - len(same),
        "head_s": head_s,
        "well_s": well_s,
        "images_without": without,
        "job_ended": float(status is JobStatus.SUCCEEDED),
        "job_s_after": done - lost,
        "http_gap_s_before": nodes.gap(answers, begun, lost),
        "http_gap_s": nodes.gap(answers, lost, ended),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1500, help="of the job (default: %(default)s)")
    parser.add_argument("--away", type=float, default=20.0, help="seconds without a head (default: %(default)s)")
    arguments = parser.parse_args()
    os.environ |= {**sleeping.environment(str(ROOT), nodes.ENCODE_S, nodes.DECODE_S), **KEEPALIVE}
    os.environ |= {"RAY_gcs_rpc_server_reconnect_timeout_s": str(WAIT_S), "RAY_prestart_worker_first_driver": "0"}
    with tempfile.TemporaryDirectory(prefix="cellray-bench-") as temporary:
        write_images(Path(temporary) / "images", arguments.images)
        figures = lose(Path(temporary), arguments.images, arguments.away)
    report("head", figures, WANTED)
    if any(figures[name] for name in WANTED):
        sys.exit(1)


if __name__ == "__main__":
    main()
