"""A cluster of many GPU replicas: what two cores can carry is measured, the rest is a model that is held against it.

Measured here: real Serve replicas whose encoder sleeps the time of a batch, called by tasks through the job's own
Pipeline, handles and routers; and how many words of its tasks the job's one driver takes in a second.
Measured elsewhere: CPU_MS, what reading and writing an image takes a core (tests.benchmarks.pipeline); BATCH_S, a batch
of ViT-H on an A100 as segment-anything-fast published it. Everything about GPUs beyond it is arithmetic: RATES.

The model (scale_model) is fitted on FIT replicas and predicts CHECK; then clusters of GPUS, for each of RATES.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray import serve
from ray.serve import Application

from cluster import session
from cluster.settings import MIB, Settings
from jobs import replicas, shards
from jobs.plan import DEFAULT_SHARD_IMAGES
from jobs.shards import Pipeline, Progress
from serve_app import contract
from serve_app.batches import Batches
from tests.benchmarks.scale_model import Cluster, batches_a_second
from tests.conftest import free_port
from tests.s3 import ROOT

FIT, CHECK, GPUS = (1, 2, 3, 4), (8, 16), (1, 10, 100, 1000)
BATCH = 8
BATCH_S = BATCH / 24.9  # ViT-H, A100, batches of 8: 24.9 img/s
MODEL, SIDE = "sleeping", 64  # px: of the arrays that are passed; what their bytes cost is measured elsewhere
WARM_S, WINDOW_S, READY_S = 3.0, 12.0, 180.0
CPU_MS = 60.0  # of a core, an image: S3 to S3 (78 of both cores, 18 of them the test's own S3 server's)
# img/s of an H100 in bf16, arithmetic: 2 GFLOP a GMAC, 990 TFLOP/s, of which 0.49 (reference: sam.md's "realistic")
RATES = {"sam_vit_b": 500.0, "sam_vit_l": 160.0, "sam_vit_h": 82.0}
GMAC_B, GMAC_DETECTOR, GMAC_DECODER, CELLS = 486.0, 137.0, 1.41, 100  # CELLS: an image of a megapixel, assumed
DECODER_SHARE = 0.5  # of the encoder's utilisation, assumed: small products
RATES["cellsam"] = RATES["sam_vit_b"] * GMAC_B / (2 * GMAC_B + GMAC_DETECTOR + GMAC_DECODER * CELLS / DECODER_SHARE)
# Dollars, assumed: to be replaced by what one pays
GPU_HOUR, CORE_HOUR, GET_MILLION, PUT_MILLION = 4.0, 0.09, 0.4, 5.0
IN_BYTES, PIXEL_BYTES, OUT_BYTES = 0.4e6, 3 * 1024**2, 2 * MIB  # a JPEG of a megapixel, its pixels, its embedding
PART_BYTES = 50 * MIB  # of an upload
PREFIX_GETS, PREFIX_PUTS = 5500.0, 3500.0  # a second and prefix, as AWS states
DRIVER_TASKS, DRIVER_WORDS, DRIVER_OPEN = 4, 1500, (8, 200)
KIOSK_HOURS, KIOSK_DOLLARS, MILLION = 5.5, 250.0, 1e6
WANTED = {"predicted_error_8": 0.1, "predicted_error_16": 0.1, "efficiency_100": 0.9}
say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731


class Sleeper:
    """An encoder that computes nothing, as slowly as a GPU."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.batches = Batches(self._encode, BATCH)

    async def encode(self, images: list[np.ndarray], dtype: str) -> list[np.ndarray]:
        return await self.batches(images)

    async def _encode(self, calls: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
        import asyncio

        await asyncio.sleep(self.seconds * sum(map(len, calls)) / BATCH)
        return [call for call in calls]


def build(arguments: dict[str, Any]) -> Application:
    name = contract.encoder_deployment(MODEL)
    options = {"max_ongoing_requests": 16, "max_queued_requests": 256, "ray_actor_options": {"num_cpus": 0}}
    return serve.deployment(Sleeper, name=name, **options).bind(arguments["seconds"])


@ray.remote(num_cpus=0, max_restarts=0)
class Task:
    """A job's task as far as calls go: its Pipeline over a handle of its own."""

    def warm(self) -> None:
        replicas.encoder(MODEL, READY_S)([np.zeros((SIDE, SIDE, 3), np.uint8)])

    def run(self, end: float) -> list[float]:
        """When each image was answered, on the machine's clock."""
        image = np.zeros((SIDE, SIDE, 3), np.uint8)
        sources = itertools.takewhile(lambda _: time.monotonic() < end, itertools.repeat(image))
        pipeline = Pipeline[np.ndarray, np.ndarray, np.ndarray](
            read=lambda one: one,
            call=replicas.encoder(MODEL, READY_S),
            cost=lambda _: PIXEL_BYTES + MIB,
            batch=BATCH,
            progress=Progress(0),
        )
        return [time.monotonic() for _ in pipeline.run(sources)]


def app(count: int) -> dict[str, Any]:
    return {
        "applications": [
            {
                "name": contract.APP_NAME,
                "import_path": "tests.benchmarks.scale_cluster:build",
                "args": {"seconds": BATCH_S},
                "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
                "deployments": [{"name": contract.encoder_deployment(MODEL), "num_replicas": count}],
            }
        ],
        "proxy_location": "Disabled",
    }


def measure(counts: tuple[int, ...]) -> dict[int, tuple[float, float]]:
    """Replicas → (batches a second, CPU milliseconds a call of tasks and replicas), with as many tasks as replicas."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    found: dict[int, tuple[float, float]] = {}
    with session.local(app(counts[0]), say, free_port()) as started:
        tasks: list[Any] = []
        for count in counts:
            ServeSubmissionClient(started.dashboard).deploy_applications(app(count))
            deadline = time.monotonic() + READY_S
            while session.replicas(contract.APP_NAME) != {contract.encoder_deployment(MODEL): count}:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no {count} replicas in {READY_S:.0f} s")
                time.sleep(0.5)
            tasks += [Task.remote() for _ in range(count - len(tasks))]
            ray.get([task.warm.remote() for task in tasks])
            start = time.monotonic() + WARM_S
            before = worker_seconds()
            times = [task.run.remote(start + WINDOW_S) for task in tasks]
            answered = np.concatenate(ray.get(times))
            spent = worker_seconds() - before
            inside = np.count_nonzero((answered >= start) & (answered < start + WINDOW_S))
            found[count] = inside / BATCH / WINDOW_S, 1000 * spent / (len(answered) / BATCH)
            say(f"{count} replicas: {found[count][0]:.2f} calls a second, {found[count][1]:.1f} ms of CPU each")
    return found


def worker_seconds() -> float:
    """CPU of all processes below this one that are Ray's workers."""
    total = 0.0
    for one in psutil.Process().children(recursive=True):
        try:
            if one.name().startswith("ray::") or "ray::" in " ".join(one.cmdline()):
                times = one.cpu_times()
                total += times.user + times.system
        except psutil.Error:
            continue
    return total


def fit(measured: dict[int, float]) -> Cluster:
    """The one replica's rate gives what it loses between batches; wire and routers are those that fit the others."""
    best, error = None, np.inf
    alone = Cluster(1, 1, BATCH_S, replica_s=max(0.0, 1 / measured[1] - BATCH_S))
    for wire, blind in itertools.product(np.arange(0.0, 0.3, 0.02), np.arange(0.0, 1.01, 0.25)):
        tried = replace(alone, wire_s=float(wire), blind=float(blind))
        off = sum((predicted(tried, count) / measured[count] - 1) ** 2 for count in FIT)
        if off < error:
            best, error = tried, off
    assert best is not None
    return best


def predicted(fitted: Cluster, count: int) -> float:
    runs = [batches_a_second(replace(fitted, replicas=count, tasks=count), 100 * BATCH_S, seed) for seed in range(3)]
    return float(np.mean(runs))


@ray.remote(num_cpus=1, max_retries=0)
def talk(settings: Settings, words: int, index: int, sources: Any, poisoned: Any) -> Iterator[Progress]:
    for images in range(words):
        yield Progress(index, images * BATCH)
    yield Progress(index, words * BATCH, written=True)


def driver_words(open_tasks: int) -> float:
    """Words a second that jobs.shards.run takes in, from DRIVER_TASKS tasks that talk all the time, while it has
    `open_tasks` open; those past them wait for a core."""
    # a second run with fewer words is taken off: starting, and ending what waits
    seconds = []
    for words in (DRIVER_WORDS // 3, DRIVER_WORDS):
        start, heard = time.perf_counter(), 0

        def report(latest: list[Progress]) -> bool:
            return True

        shards.run(talk, (Settings(), words), range(open_tasks), lambda _: [], open_tasks, report)
        seconds.append(time.perf_counter() - start)
        heard = open_tasks * words
    return (heard - open_tasks * (DRIVER_WORDS // 3)) / (seconds[1] - seconds[0])
