"""A cluster of many GPU replicas: what two cores can carry is measured, the rest is a model that is held against it.

Measured here: real Serve replicas whose encoder sleeps the time of a batch, called by tasks through the job's own
Pipeline, handles and routers; what a shard costs its task; and what the job's one driver needs for a shard and for a
word of a task. Measured elsewhere: CPU_MS, a core's for reading and writing an image (tests.benchmarks.pipeline), and
BATCH_S, of ViT-B on an RTX 5000, as micro-sam published it. All else about GPUs is arithmetic (RATES), and prices are
assumptions.

The model (scale_model) is fitted on FIT replicas and predicts CHECK; then clusters of GPUS, for each of RATES.
"""

from __future__ import annotations

import asyncio
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
from jobs.embed import Source
from jobs.images import Entry
from jobs.plan import DEFAULT_SHARD_IMAGES
from jobs.shards import Pipeline, Progress
from serve_app import contract
from serve_app.batches import Batches
from serve_app.dataset import MAX_ROWS_A_FILE
from tests.benchmarks.scale_model import Cluster, batches_a_second
from tests.conftest import free_port
from tests.s3 import ROOT

FIT, CHECK, GPUS = (1, 2, 3, 4), (8, 16), (1, 10, 100, 1000)
BATCH = 8
SHARD_IMAGES = MAX_ROWS_A_FILE  # --shard-images of a large job: half as much for the driver as by default
BATCH_S = BATCH * 0.20  # ViT-B, RTX 5000: 0.20 s an image; slow enough for two cores to carry 16 of them
MODEL, SIDE = "sleeping", 64  # px: of the arrays that are passed; what their bytes cost is measured elsewhere
WARM_S, WINDOW_S, READY_S = 10.0, 40.0, 300.0
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
DRIVER = "the driver"
CALLS_ALONE, SHARDS, WORDS, OPEN, LOOKS = 20, 300, 8, 2000, 20  # in what is measured of a task, and of the driver
PUTS_A_SHARD, MOST_BATCHES, NODE_GPUS = 4, 2e5, 8
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
        await asyncio.sleep(self.seconds * sum(map(len, calls)) / BATCH)
        return calls


def build(arguments: dict[str, Any]) -> Application:
    name = contract.encoder_deployment(MODEL)
    options = {"max_ongoing_requests": 16, "max_queued_requests": 256, "ray_actor_options": {"num_cpus": 0}}
    return serve.deployment(name=name, **options)(Sleeper).bind(arguments["seconds"])


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


def measure(counts: tuple[int, ...]) -> tuple[dict[int, tuple[float, float]], float, Driver]:
    """Replicas → (batches a second, CPU milliseconds a call of tasks and replicas), with as many tasks as replicas;
    what a shard costs its task; and its driver."""
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
            tasks += [Task.remote() for _ in range(count - len(tasks))]  # type: ignore[attr-defined]
            ray.get([task.warm.remote() for task in tasks])
            start = time.monotonic() + WARM_S
            before = worker_seconds()
            end = start + WINDOW_S
            answered = np.concatenate(ray.get([task.run.remote(end) for task in tasks]))
            spent = worker_seconds() - before
            found[count] = calls_a_second(answered, start), 1000 * spent / (len(answered) / BATCH)
            say(f"{count} replicas: {found[count][0]:.2f} calls a second, {found[count][1]:.1f} ms of CPU each")
        for task in tasks:
            ray.kill(task)
        return found, shard_seconds(), Driver.measure(SHARD_IMAGES)


def calls_a_second(answered: np.ndarray, start: float) -> float:
    """In the window from `start` on: the slope of the answers' count, which sees no edges."""
    inside = np.sort(answered[(answered >= start) & (answered < start + WINDOW_S)])
    return float(np.polyfit(inside - start, np.arange(len(inside)), 1)[0]) / BATCH


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


def fit(measured: dict[int, float], cpu_s: float) -> Cluster:
    """The one replica's rate gives what it loses between batches; wire and routers are those that fit the others."""
    best, error = None, np.inf
    lost = max(0.0, 1 / measured[1] - BATCH_S)
    alone = Cluster(1, 1, BATCH_S, replica_s=lost, cores=len(os.sched_getaffinity(0)), cpu_s=cpu_s)
    for wire, blind in itertools.product(np.arange(0.0, 0.3, 0.03), np.arange(0.0, 1.01, 0.25)):
        tried = replace(alone, wire_s=float(wire), blind=float(blind))
        off = sum((predicted(tried, count) / measured[count] - 1) ** 2 for count in FIT)
        if off < error:
            best, error = tried, off
    assert best is not None
    return best


def predicted(fitted: Cluster, count: int) -> float:
    runs = [batches_a_second(replace(fitted, replicas=count, tasks=count), 100 * BATCH_S, seed) for seed in range(3)]
    return float(np.mean(runs))


@ray.remote(num_cpus=0, max_retries=0)
def one_call(settings: Settings, index: int, sources: Any, poisoned: Any) -> Iterator[Progress]:
    replicas.encoder(MODEL, READY_S)([np.zeros((SIDE, SIDE, 3), np.uint8)])
    yield Progress(index, written=True)


def shard_seconds() -> float:
    """What a shard costs its task beside its images: of CALLS_ALONE one after the other, a call each."""
    start = time.perf_counter()
    shards.run(one_call, (Settings(),), range(CALLS_ALONE), lambda _: [], 1, lambda _: True)
    return max(0.0, (time.perf_counter() - start) / CALLS_ALONE - BATCH_S / BATCH)


@ray.remote(num_cpus=1, max_retries=0)
def talk(settings: Settings, words: int, index: int, sources: Any, poisoned: Any) -> Iterator[Progress]:
    for _ in range(words):
        yield Progress(index)
    yield Progress(index, written=True)


@dataclass(frozen=True)
class Driver:
    """Seconds of CPU that the job's one driver needs: for a shard of `images` beside its words, for a word, and to look
    at one open task."""

    shard_s: float
    word_s: float
    look_s: float

    @classmethod
    def measure(cls, images: int) -> Driver:
        source, spent = Source(Entry("s3://plates/2026-11/plate-000000/well-000_site-1_channel-2.tif", 1), {}), []
        for words in (0, WORDS):
            before = time.process_time()
            shards.run(talk, (Settings(), words), range(SHARDS), lambda _: [source] * images, 8, lambda _: True)
            spent.append((time.process_time() - before) / SHARDS)
        never = talk.options(num_returns="streaming", num_gpus=1)  # waits for what is not there
        streams = [never.remote(Settings(), 0, index, [], None) for index in range(OPEN)]
        before = time.process_time()
        for _ in range(LOOKS):
            ray.wait(list(streams), num_returns=OPEN, timeout=0)
        looked = (time.process_time() - before) / LOOKS
        for stream in streams:
            ray.cancel(stream)
        return cls(spent[0], (spent[1] - spent[0]) / WORDS, 2 * looked / OPEN)  # it looks twice a time


def words_a_shard(seconds: float) -> int:
    """Of a task, as jobs.shards.written speaks, before it is done."""
    count, due = 0, shards.FIRST_WORD_S
    while due < seconds:
        count, due = count + 1, due + min(due, shards.WORDS_S)
    return count


@dataclass(frozen=True)
class Load:
    """What a model's images a second on so many GPUs ask of everything else."""

    model: str
    gpus: int
    tasks: int
    images_s: float
    busy: float  # share of the GPUs' time
    shares: dict[str, float]  # of what there is of it, by name
    cores: float
    puts_s: float
    dollars: float  # a million images

    def line(self, one: float) -> str:
        """`one`: images a second of a single GPU."""
        wall = max(self.shares, key=self.shares.__getitem__)
        bytes_s = [self.images_s * size / 1e9 for size in (PIXEL_BYTES + OUT_BYTES, IN_BYTES + OUT_BYTES)]
        efficiency, calls_s = self.images_s / one / self.gpus, self.images_s / BATCH
        return (
            f"{self.model:10} {self.gpus:5} {self.images_s:9,.0f} {efficiency:6.2f} {self.busy:5.2f} {self.tasks:7,} "
            f"{self.cores:7,.0f} {calls_s:8,.0f} {self.shares[DRIVER]:7.2f} {self.images_s:9,.0f} {self.puts_s:7,.0f} "
            f"{bytes_s[0]:9.1f} {bytes_s[1]:7.1f} {self.dollars:9.2f}  {wall}"
        )


HEADING = (
    "model       GPUs     img/s effic.  busy   tasks   cores  calls/s  driver    GETs/s  PUTs/s  obj GB/s S3 GB/s "
    "$/million  fullest"
)


def project(fitted: Cluster, model: str, gpus: int, driver: Driver, shard_s: float, images: int = SHARD_IMAGES) -> Load:
    """`images` a shard. Tasks are as many as read what the GPUs take, with a core each, and a tenth more."""
    rate = RATES[model]
    tasks = int(np.ceil(1.1 * gpus * rate * CPU_MS / 1000))
    words = words_a_shard(images * tasks / (rate * gpus))
    setup = replace(
        fitted,
        cores=0,
        replicas=gpus,
        tasks=tasks,
        batch_s=BATCH / rate,
        read_s=BATCH * CPU_MS / 1000,
        shard_batches=images // BATCH,
        shard_s=shard_s + tasks * driver.look_s,
        message_s=driver.word_s,
        messages_a_batch=words / (images // BATCH),
        end_s=driver.shard_s,
    )
    found = BATCH * batches_a_second(setup, min(60.0, max(5.0, MOST_BATCHES / (gpus * rate / BATCH))))
    found = min(found, images / (driver.shard_s + words * driver.word_s))  # a run may be shorter than a shard
    puts = found / images * (np.ceil(images * OUT_BYTES / PART_BYTES) + PUTS_A_SHARD)
    hour = GPU_HOUR * gpus + CORE_HOUR * found * CPU_MS / 1000
    shares = {
        "the GPUs": found / (rate * gpus),
        DRIVER: found / images * (driver.shard_s + words * driver.word_s),
        "S3 reads of one prefix": found / PREFIX_GETS,
        "S3 writes of one prefix": puts / PREFIX_PUTS,
    }
    dollars = MILLION * hour / 3600 / found + GET_MILLION + PUT_MILLION * puts / found
    return Load(model, gpus, tasks, found, found / (rate * gpus), shares, found * CPU_MS / 1000, puts, dollars)


def on_cluster(_: Path, __: int) -> dict[str, float]:
    os.environ |= {"RAY_worker_niceness": "0"}  # not 15: whatever else runs on the cores would come first
    found, shard_s, driver = measure((*FIT, *CHECK))
    measured = {count: rate for count, (rate, _) in found.items()}
    fitted = fit(measured, float(np.median([found[count][1] for count in FIT])) / 1000)
    figures: dict[str, float] = {f"measured_calls_s_{count}": rate for count, rate in measured.items()}
    figures |= {"fitted_replica_ms": 1000 * fitted.replica_s, "fitted_wire_ms": 1000 * fitted.wire_s}
    figures["fitted_blind"] = fitted.blind
    for count in CHECK:
        model = predicted(fitted, count)
        figures[f"predicted_calls_s_{count}"] = model
        figures[f"predicted_error_{count}"] = abs(model / measured[count] - 1)
        figures[f"proportional_error_{count}"] = abs(count * measured[1] / measured[count] - 1)
        figures[f"router_cpu_ms_call_{count}"] = found[count][1]
    figures["shard_ms"] = 1000 * shard_s
    figures |= {"driver_ms_shard": 1000 * driver.shard_s, "driver_ms_word": 1000 * driver.word_s}
    figures |= {"driver_us_look_task": 1e6 * driver.look_s}
    print(HEADING)
    loads = {}
    for model, gpus in itertools.product(RATES, GPUS):
        loads[model, gpus] = project(fitted, model, gpus, driver, shard_s)
        print(loads[model, gpus].line(loads[model, 1].images_s))
        figures |= {f"{model}_{gpus}_img_s": loads[model, gpus].images_s}
        figures |= {f"{model}_{gpus}_dollars_million": loads[model, gpus].dollars}
    one = loads["sam_vit_b", 1].images_s
    for gpus in GPUS[1:]:
        figures[f"efficiency_{gpus}"] = loads["sam_vit_b", gpus].images_s / gpus / one
    default = project(fitted, "sam_vit_b", 100, driver, shard_s, DEFAULT_SHARD_IMAGES)
    figures["efficiency_100_default_shards"] = default.images_s / 100 / one
    for model, gpus in (("sam_vit_b", NODE_GPUS), ("cellsam", NODE_GPUS)):
        load = project(fitted, model, gpus, driver, shard_s)
        figures |= {f"million_{model}_hours": MILLION / load.images_s / 3600, f"million_{model}_dollars": load.dollars}
    figures |= {"million_kiosk_hours": KIOSK_HOURS, "million_kiosk_dollars": KIOSK_DOLLARS}
    return figures
