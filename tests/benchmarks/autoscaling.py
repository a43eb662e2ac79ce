"""deploy/serve.gpu.yaml's own autoscaling, on fake nodes with fake GPUs: a job's load and HTTP load together.

    python -m tests.benchmarks.autoscaling [--to autoscaling.png] [--faster 6] [--images 1600]

The app is the real one, with packaged models in place of the YAML's, whose encoders sleep ENCODE_S an image. All
numbers of the YAML's deployments count; what is a delay there, in Serve or in the node autoscaler is divided by
--faster.
Nodes: a head without CPUs, and as many nodes of one GPU and four CPUs as are wanted, up to eight.

Phases: a quiet one; jobs.embed on the first model beside HTTP clients, then the first clients of the second model,
which has no replica until they ask; all but one client end; again clients of the second model; and all end.
A row is lost if jobs.verify or a count misses it, a request if its caller, the product's client, saw an error.
"""

from __future__ import annotations

import os

os.environ["RAY_AUTH_MODE"] = (
    "disabled"  # before anything imports Ray: other than `ray.init`, `ray start` makes no token
)

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from cluster import serve_config
from jobs.verify import verify
from serve_app import contract, dataset
from tests.benchmarks import fake_nodes, sleeping
from tests.benchmarks.nano import report
from tests.benchmarks.plot import Panel, Points, draw
from tests.benchmarks.traffic import Traffic, write_images
from tests.conftest import free_port
from tests.s3 import ROOT

YAML = ROOT / "deploy" / "serve.gpu.yaml"
ENCODE_S, DECODE_S = 0.2, 0.1
NODES = {
    "gpu": {"resources": {"CPU": 4, "GPU": 1}, "min_workers": 0, "max_workers": 8},
}
NODE_IDLE_S = 300.0  # until a node that nothing uses ends; Ray's and KubeRay's usual five minutes or one
LOOK_BACK_S, PUSH_S = 30.0, 10.0  # Serve's defaults
HALVES = contract.encoder_deployment, contract.decoder_deployment
DELAYS = ("upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s")
PARALLEL, SHARD_IMAGES = 5, 64
CLIENTS, CLIENTS_RARE = 6, 3
QUIET_S, SETTLE_S, START_S, JOB_S = 15.0, 240.0, 180.0, 400.0
EVERY_S = 0.5
WANTED = {"http_lost": 0.0, "rows_lost": 0.0, "rows_twice": 0.0}
say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731


def app(faster: float, settings: Path, port: int) -> dict[str, Any]:
    """The YAML, checked as it is, with its delays shortened and sleeping replicas; of its models the first, and the
    first that has none until somebody asks."""
    config = serve_config.read(YAML)
    (one,) = config["applications"]
    named = {deployment["name"]: deployment for deployment in one["deployments"]}
    encoders = {model: named[contract.encoder_deployment(model)] for model in one["args"]["models"]}
    rare = next(name for name, found in encoders.items() if not found["autoscaling_config"]["min_replicas"])
    models = [next(iter(encoders)), rare]
    one |= {"import_path": "tests.benchmarks.sleeping:build", "args": {"models": models, "config": str(settings)}}
    kept = [contract.INGRESS, *(name(model) for model in models for name in HALVES)]
    one["deployments"] = [named[name] for name in kept]
    for deployment in one["deployments"]:
        scaling = deployment["autoscaling_config"]
        scaling |= {name: scaling[name] / faster for name in DELAYS if name in scaling}
        scaling["metrics_interval_s"] = PUSH_S / faster
        scaling["look_back_period_s"] = scaling.get("look_back_period_s", LOOK_BACK_S) / faster
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    config["proxy_location"] = "HeadOnly"  # all nodes share this machine's ports
    config.pop("grpc_options", None)
    return config


class Watch:
    """Replicas, nodes and load, looked at every EVERY_S in a thread; times since the start."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic, self.start = traffic, time.monotonic()
        self.rows: list[tuple[float, dict[str, int], int]] = []  # time, running replicas, nodes
        self.loads: dict[str, Points] = {"images a second, job": [], "open requests, HTTP": []}
        self.marks: list[tuple[float, str]] = []
        self.job_done: Points = [(0.0, 0.0)]
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watch")
        self.thread.start()

    def now(self) -> float:
        return time.monotonic() - self.start

    def mark(self, words: str) -> None:
        say(f"{self.now():6.1f} s  {words}")
        self.marks.append((self.now(), words))

    def _run(self) -> None:
        while not self.ended.wait(EVERY_S):
            with suppress(Exception):  # a look that fails is a gap in a curve
                deployments = serve.status().applications[contract.APP_NAME].deployments
                running = {name: one.replica_states.get("RUNNING", 0) for name, one in deployments.items()}
                nodes = sum(node["Alive"] and "GPU" in node["Resources"] for node in ray.nodes())
                at = self.now()
                self.rows.append((at, running, nodes))
                self.loads["open requests, HTTP"].append((at, sum(self.traffic.open.values())))
                before = [one for one in self.job_done if one[0] <= at - 5] or self.job_done[:1]
                rate = (self.job_done[-1][1] - before[-1][1]) / 5 if self.job_done[-1][0] > at - 5 else 0.0
                self.loads["images a second, job"].append((at, rate))

    def latest(self) -> tuple[dict[str, int], int]:
        return self.rows[-1][1:] if self.rows else ({}, 0)

    def until(self, what: str, holds: Callable[[dict[str, int], int], bool], most_s: float) -> float:
        """Seconds until it does. Raises RuntimeError if it does not in time."""
        begun = time.monotonic()
        while time.monotonic() < begun + most_s:
            if self.rows and holds(*self.latest()):
                return time.monotonic() - begun
            time.sleep(EVERY_S / 2)
        raise RuntimeError(f"not within {most_s:.0f} s: {what}; replicas and nodes are {self.latest()}")


def job(folder: Path, out: Path, model: str, settings: Path, address: str, watch: Watch) -> None:
    words = [sys.executable, "-m", "jobs.embed", str(folder), str(out), "--model", model, "--config", str(settings)]
    words += ["--parallel", str(PARALLEL), "--shard-images", str(SHARD_IMAGES), "--progress-every", "0.5"]
    environment = {**os.environ, "RAY_ADDRESS": address}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        timer = threading.Timer(JOB_S, process.kill)
        timer.start()
        for line in process.stdout:
            if found := re.match(r"embed: (\d+)[/ ]", line):
                watch.job_done.append((watch.now(), float(found[1])))
        timer.cancel()
    if process.returncode:
        raise RuntimeError(f"the job ended with {process.returncode}")


def checked(out: Path, images: int) -> dict[str, float]:
    """A job's rows, counted."""
    found = dataset.open(str(out))
    faults = list(verify(found, lambda _: None))
    for fault in faults:
        say(fault)
    uris = found.table(dataset.EMBEDDINGS, ["image_uri"])["image_uri"].to_pylist()
    return {
        "rows": len(uris),
        "rows_lost": images - len(set(uris)),
        "rows_twice": len(uris) - len(set(uris)),
        "verify_faults": len(faults),
    }


def run(
    folder: Path, fake: fake_nodes.FakeCluster, faster: float, images: int
) -> tuple[Watch, Traffic, dict[str, float]]:
    port, settings, out = free_port(), folder / "cellray.yaml", folder / "out"
    config = app(faster, settings, port)
    (one,) = config["applications"]
    main, rare = one["args"]["models"]
    settings.write_text(yaml.safe_dump({"models": sleeping.models([main, rare])}))
    scaling = {deployment["name"]: deployment["autoscaling_config"] for deployment in one["deployments"]}
    least = {name: found["min_replicas"] for name, found in scaling.items()}
    figures: dict[str, float] = {}
    write_images(folder / "images", images)
    ray.init(address=fake.address, log_to_driver=False, logging_level="ERROR")
    ServeSubmissionClient(fake.dashboard).deploy_applications(config)
    traffic = Traffic(f"http://127.0.0.1:{port}")
    watch = Watch(traffic)
    try:
        ready = lambda replicas, _: replicas == least  # noqa: E731
        figures["deploy_s"] = watch.until("the least replicas", ready, START_S)
        watch.until("a quiet cluster", lambda replicas, nodes: replicas == least and nodes == 2, SETTLE_S)
        base = watch.latest()[1]
        with traffic:
            watch.mark("quiet")
            traffic.want(main, 1)
            time.sleep(QUIET_S)
            watch.mark("job and HTTP")
            traffic.want(main, CLIENTS)
            second = threading.Timer(20.0, lambda: (watch.mark("second model"), traffic.want(rare, CLIENTS_RARE)))
            second.start()
            job(folder / "images", out, main, settings, fake.address, watch)
            second.join()
            watch.mark("load ends")
            traffic.want(main, 1)
            traffic.want(rare, 0)
            settled: Callable[..., bool] = lambda replicas, nodes: replicas == least and nodes <= base  # noqa: E731
            figures["down_s"] = watch.until("replicas and nodes as before", settled, SETTLE_S)
            watch.mark("second model again")
            traffic.want(rare, CLIENTS_RARE)
            back = contract.encoder_deployment(rare)
            figures["back_from_zero_s"] = watch.until("the second model", lambda found, _: found[back] > 0, START_S)
            time.sleep(QUIET_S)
            watch.mark("load ends")
            traffic.want(main, 0)
            traffic.want(rare, 0)
            watch.until("replicas and nodes as before", settled, SETTLE_S)
            watch.mark("as before")
            time.sleep(2)
    finally:
        watch.ended.set()
        watch.thread.join()
    figures |= checked(out, images) | traffic.figures()
    for name in scaling:
        figures[f"most_{name}"] = max(replicas.get(name, 0) for _, replicas, _ in watch.rows)
        figures[f"last_{name}"] = watch.rows[-1][1][name]
    figures |= {"most_nodes": max(nodes for *_, nodes in watch.rows), "last_nodes": watch.rows[-1][2]}
    figures["first_of_second_model_s"] = max(call.seconds for call in traffic.calls if call.model == rare)
    return watch, traffic, figures


def picture(path: Path, watch: Watch, traffic: Traffic, faster: float) -> None:
    replicas: dict[str, Points] = {}
    latency: dict[str, Points] = {}
    for at, running, _ in watch.rows:
        for name, count in running.items():
            replicas.setdefault(name, []).append((at, count))
    for call in sorted(traffic.calls, key=lambda call: call.start):
        latency.setdefault(call.model, []).append((call.start - watch.start, call.seconds))
    panels = [
        Panel("load", watch.loads),
        Panel("running replicas", replicas),
        Panel("fake nodes, beside the head", {"nodes of one GPU": [(at, nodes) for at, _, nodes in watch.rows]}),
        Panel("HTTP: seconds until the answer, by when it was asked", latency, "dots", True, 0.1),
    ]
    title = f"deploy/serve.gpu.yaml's autoscaling on fake nodes, its delays divided by {faster:g}"
    draw(path, title, panels, watch.marks, "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("autoscaling.png"), help="the plot (default: %(default)s)")
    parser.add_argument("--faster", type=float, default=6.0, help="what delays are divided by (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1600, help="of the job (default: %(default)s)")
    arguments = parser.parse_args()
    faster = arguments.faster
    say(f"all delays are divided by {faster:g}; an encoder sleeps {ENCODE_S:g} s an image")
    environment = {
        **sleeping.environment(str(ROOT), ENCODE_S, DECODE_S),
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": str(PUSH_S / faster),
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": str(PUSH_S / faster),
    }
    os.environ |= environment
    with tempfile.TemporaryDirectory(prefix="cellray-bench-") as temporary:
        try:
            with fake_nodes.cluster(NODES, NODE_IDLE_S / faster, environment) as fake:
                watch, traffic, figures = run(Path(temporary), fake, faster, arguments.images)
                picture(arguments.to, watch, traffic, faster)
        finally:
            ray.shutdown()
    figures["faster"] = faster
    for call in traffic.calls:
        if call.error:
            say(call.error)
    say(f"the plot is {arguments.to}")
    report("autoscaling", figures, WANTED)
    if figures["http_lost"] or figures["rows_lost"] or figures["rows_twice"] or figures["verify_faults"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
