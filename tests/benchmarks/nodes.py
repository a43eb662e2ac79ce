"""A node goes away without a word, in the middle of a job and under HTTP load.

    python -m tests.benchmarks.nodes [--only killed silent] [--images 600] [--slow]

A head without CPUs and three nodes of a GPU each (all raylets of this machine, by ray.cluster_utils.Cluster), two
encoders, two decoders and two ingresses; encoders sleep ENCODE_S an image. The node that goes has an encoder and as
many of the others as any. The GPU that is free takes the encoder that is lost.

killed: SIGKILL to the raylet and all its workers at once. silent: SIGSTOP, as where a machine loses its network: nobody
closes a connection; what is stopped is killed in the end. All of Ray runs with deploy/'s KEEPALIVE; without it
(--slow) a silent node's tasks are given up only after seven minutes: Ray asks after five whether a connection lives.
What is lost: rows that jobs.verify or a count miss, and requests whose caller, the product's client, saw an error.
…_replicas_back_s: until all replicas run, none of them there. …_http_gap_s, …_job_gap_s: the longest that no request
was answered, and that the job did not get on, after it; beside them the same …_before.
"""

from __future__ import annotations

import os

os.environ["RAY_AUTH_MODE"] = "disabled"  # before anything imports Ray: other than `ray.init`, Cluster makes no token

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from cluster import serve_config
from jobs.verify import verify
from serve_app import contract, dataset
from tests.benchmarks import sleeping
from tests.benchmarks.nano import report
from tests.benchmarks.traffic import Traffic, write_images
from tests.conftest import free_port
from tests.deploy_pods import KEEPALIVE
from tests.s3 import ROOT

WAYS = {"killed": signal.SIGKILL, "silent": signal.SIGSTOP}
ENCODE_S, DECODE_S = 0.05, 0.01
MODEL, REPLICAS, NODES = "nano", 2, 3
CLIENTS, PARALLEL, SHARD_IMAGES = 4, 4, 32
AFTER = 0.3  # of the job's images: when the node goes
START_S, JOB_S, BACK_S, POLL_S = 180.0, 400.0, 180.0, 0.2
OBJECT_STORE_BYTES = 200_000_000
say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731


@contextmanager
def cluster() -> Iterator[tuple[Any, str]]:
    """(the Cluster, its dashboard's URL)"""
    from ray.cluster_utils import Cluster

    folder, port = tempfile.mkdtemp(prefix="cr-", dir="/tmp"), free_port()
    os.environ["RAY_TMPDIR"] = folder  # where Cluster writes its address for others of this machine to find
    Path(folder, "ray").mkdir()
    each = {"object_store_memory": OBJECT_STORE_BYTES, "dashboard_agent_listen_port": 0}
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    found = Cluster(initialize_head=True, head_node_args={**each, **head, "temp_dir": folder})
    try:
        for _ in range(NODES):
            found.add_node(num_cpus=4, num_gpus=1, **each)
        ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
        yield found, f"http://127.0.0.1:{port}"
    finally:
        ray.shutdown()
        found.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def app(settings: Path, port: int) -> dict[str, Any]:
    config = serve_config.read(ROOT / "deploy" / "serve.local.yaml")
    (one,) = config["applications"]
    one |= {"import_path": "tests.benchmarks.sleeping:build", "args": {"models": [MODEL], "config": str(settings)}}
    for deployment in one["deployments"]:
        del deployment["autoscaling_config"]
        gpus = 1 if deployment["name"] == contract.encoder_deployment(MODEL) else 0
        deployment |= {"num_replicas": REPLICAS, "ray_actor_options": {"num_cpus": 1, "num_gpus": gpus}}
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    serve_config.check(config, "the benchmark's app")
    return config


class Replicas:
    def __init__(self, dashboard: str) -> None:
        self.client = ServeSubmissionClient(dashboard)

    def running(self, what: str = "node_id") -> list[tuple[str, str]]:
        """(deployment, node id) of each; or in place of the latter, `what` Serve's details have."""
        details = self.client.get_serve_details()["applications"].get(contract.APP_NAME, {})
        return [
            (name, replica[what])
            for name, deployment in details.get("deployments", {}).items()
            for replica in deployment["replicas"]
            if replica["state"] == "RUNNING"
        ]

    def until_all(self, most_s: float, without: str = "") -> float:
        """Seconds until all run, none of them on that node. Raises RuntimeError."""
        begun = time.monotonic()
        while time.monotonic() < begun + most_s:
            running = self.running()
            if len(running) == 3 * REPLICAS and without not in [node for _, node in running]:
                return time.monotonic() - begun
            time.sleep(POLL_S)
        raise RuntimeError(f"not all replicas after {most_s:.0f} s: {self.running()}")

    def victim(self) -> str:
        running = self.running()
        with_encoder = {node for name, node in running if name == contract.encoder_deployment(MODEL)}
        return max(with_encoder, key=Counter(node for _, node in running).__getitem__)


class Job:
    """One jobs.embed in a process of its own; `done` are (time.monotonic(), images) as it tells them."""

    def __init__(self, words: list[str], address: str) -> None:
        self.done: list[tuple[float, int]] = [(time.monotonic(), 0)]
        command = [sys.executable, "-m", "jobs.embed", *words, "--progress-every", "0.2"]
        environment = {**os.environ, "RAY_ADDRESS": address}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if (found := re.match(r"embed: (\d+)/", line)) and int(found[1]) > self.done[-1][1]:
                self.done.append((time.monotonic(), int(found[1])))

    def until(self, images: int) -> None:
        while self.done[-1][1] < images and self.process.poll() is None:
            time.sleep(POLL_S / 4)

    def wait(self) -> None:
        try:
            code = self.process.wait(JOB_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self.thread.join()
        if code:
            raise RuntimeError(f"the job ended with {code}")


def processes(node: Any) -> list[psutil.Process]:
    """Of a node: its raylet with all its workers, and what else it started."""
    found: dict[int, psutil.Process] = {}
    for started in node.all_processes.values():
        for info in started:
            with suppress(psutil.NoSuchProcess):
                one = psutil.Process(info.process.pid)
                found |= {each.pid: each for each in (one, *one.children(recursive=True))}
    return list(found.values())


def send(to: list[psutil.Process], number: int) -> None:
    for one in to:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(number)


def gap(moments: list[float], start: float, end: float) -> float:
    """The longest time between two of them, from `start` on until `end`."""
    inside = [start, *sorted(one for one in moments if start < one < end), end]
    return max(later - one for one, later in pairwise(inside))


def outcome(out: Path, images: int, traffic: Traffic) -> dict[str, float]:
    """What became of the job's rows and of the requests; what went wrong is said."""
    found = dataset.open(str(out))
    faults = list(verify(found, lambda _: None))
    for problem in [*faults, *(call.error for call in traffic.calls if call.error)]:
        say(problem)
    uris = found.table(dataset.EMBEDDINGS, ["image_uri"])["image_uri"].to_pylist()
    return {
        "rows": len(uris),
        "rows_lost": images - len(set(uris)),
        "rows_twice": len(uris) - len(set(uris)),
        "verify_faults": sum("in no record" not in fault for fault in faults),
        **traffic.figures(),
    }


def lose(folder: Path, way: str, images: int) -> dict[str, float]:
    port, settings, out = free_port(), folder / "cellray.yaml", folder / f"out-{way}"
    settings.write_text(yaml.safe_dump({"models": sleeping.models([MODEL])}))
    stopped: list[psutil.Process] = []
    with cluster() as (nodes, dashboard):
        try:
            replicas, traffic = Replicas(dashboard), Traffic(f"http://127.0.0.1:{port}")
            replicas.client.deploy_applications(app(settings, port))
            replicas.until_all(START_S)
            with traffic:
                traffic.want(MODEL, CLIENTS)
                words = [str(folder / "images"), str(out), "--model", MODEL, "--config", str(settings)]
                words += ["--parallel", str(PARALLEL), "--shard-images", str(SHARD_IMAGES)]
                job = Job(words, nodes.address)
                begun = time.monotonic()
                job.until(int(images * AFTER))
                victim = replicas.victim()
                (node,) = [one for one in nodes.worker_nodes if one.node_id == victim]
                stopped = processes(node)
                held = Counter(name for name, where in replicas.running() if where == victim)
                say(f"{way}: after {job.done[-1][1]} images a node goes, with {dict(held)}, {len(stopped)} processes")
                lost, already = time.monotonic(), job.done[-1][1]
                send(stopped, WAYS[way])
                back = replicas.until_all(BACK_S, without=victim)
                say(f"{way}: all replicas run again after {back:.1f} s")
                job.wait()
                ended = time.monotonic()
                traffic.want(MODEL, 0)
        finally:
            send(stopped, signal.SIGKILL)
    answers = [call.start + call.seconds for call in traffic.calls if not call.error]
    steps = [at for at, _ in job.done]
    figures = {
        **outcome(out, images, traffic),
        "job_seconds": ended - begun,
        "images_after": images - already,
        "replicas_back_s": back,
        "http_gap_s_before": gap(answers, begun, lost),
        "http_gap_s": gap(answers, lost, ended),
        "job_gap_s_before": gap(steps, job.done[1][0], lost),
        "job_gap_s": gap(steps, lost, ended),
    }
    return {f"{way}_{name}": value for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS), help="(default: both)")
    parser.add_argument("--images", type=int, default=600, help="of the job (default: %(default)s)")
    parser.add_argument("--slow", action="store_true", help="without KEEPALIVE")
    arguments = parser.parse_args()
    os.environ |= {} if arguments.slow else KEEPALIVE
    os.environ |= {**sleeping.environment(str(ROOT), ENCODE_S, DECODE_S), "RAY_prestart_worker_first_driver": "0"}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="cellray-bench-") as temporary:
        write_images(Path(temporary) / "images", arguments.images)
        for way in arguments.only:
            figures |= lose(Path(temporary), way, arguments.images)
    losses = ("rows_lost", "rows_twice", "http_lost", "verify_faults")
    bad = [f"{way}_{what}" for way in arguments.only for what in losses]
    report("nodes", figures, dict.fromkeys(bad, 0.0))
    if any(figures[name] for name in bad):
        sys.exit(1)


if __name__ == "__main__":
    main()
