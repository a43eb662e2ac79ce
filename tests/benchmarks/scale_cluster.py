"""A cluster of many GPU replicas: what two cores can carry is measured, the rest is a model that is held against it.

Measured here: real Serve replicas whose encoder sleeps the time of a batch, called by tasks through the job's own
Pipeline, handles and routers; and how many words of its tasks the job's one driver takes in a second.
Measured elsewhere: CPU_MS, what reading and writing an image takes a core (tests.benchmarks.pipeline); BATCH_S, a batch
of ViT-H on an A100 as segment-anything-fast published it. Everything about GPUs beyond it is arithmetic: RATES.

The model (scale_model) is fitted on FIT replicas and predicts CHECK; then clusters of GPUS, for each of RATES.
"""

from __future__ import annotations

import asyncio
import itertools
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
DRIVER, DRIVER_OPEN = "the driver", (8, 1000)
SHARDS, SHARDS_OPEN, WORDS = 20, 1000, 4  # in what is measured of it
PUTS_A_SHARD, MOST_BATCHES, NODE_GPUS = 4, 4e5, 8
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


def measure(counts: tuple[int, ...]) -> tuple[dict[int, tuple[float, float]], float, list[Driver]]:
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
        for task in tasks:
            ray.kill(task)
        return found, shard_seconds(), [Driver.measure(open_tasks) for open_tasks in DRIVER_OPEN]


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


@ray.remote(num_cpus=0, max_retries=0)
def one_call(settings: Settings, index: int, sources: Any, poisoned: Any) -> Iterator[Progress]:
    replicas.encoder(MODEL, READY_S)([np.zeros((SIDE, SIDE, 3), np.uint8)])
    yield Progress(index, written=True)


def shard_seconds() -> float:
    """What a shard costs its task beside its images: of SHARDS one after the other, a call each."""
    start = time.perf_counter()
    shards.run(one_call, (Settings(),), range(SHARDS), lambda _: [], 1, lambda _: True)
    return max(0.0, (time.perf_counter() - start) / SHARDS - BATCH_S / BATCH)


@ray.remote(num_cpus=1, max_retries=0)
def talk(settings: Settings, words: int, index: int, sources: Any, poisoned: Any) -> Iterator[Progress]:
    for _ in range(words):
        yield Progress(index)
    yield Progress(index, written=True)


@dataclass(frozen=True)
class Driver:
    """Seconds of CPU that the job's one driver needs, with so many tasks open."""

    open: int
    shard_s: float  # beside a shard's words
    word_s: float

    @classmethod
    def measure(cls, open_tasks: int) -> Driver:
        spent = []
        for words in (0, WORDS):
            before = time.process_time()
            shards.run(talk, (Settings(), words), range(SHARDS_OPEN), lambda _: [], open_tasks, _report)
            spent.append((time.process_time() - before) / SHARDS_OPEN)
        return cls(open_tasks, spent[0], (spent[1] - spent[0]) / WORDS)

    def towards(self, other: Driver, tasks: int) -> Driver:
        """With that many: on the line through this and `other`."""
        share = (tasks - self.open) / (other.open - self.open)
        shard_s = self.shard_s + share * (other.shard_s - self.shard_s)
        return Driver(tasks, shard_s, max(0.0, self.word_s + share * (other.word_s - self.word_s)))


def _report(latest: list[Progress]) -> bool:
    """As jobs.driver's, which adds up all shards."""
    return sum(progress.images for progress in latest) + sum(progress.errors for progress in latest) >= 0


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
    efficiency: float
    shares: dict[str, float]  # of what there is of it, by name
    cores: float
    puts_s: float
    dollars: float  # a million images

    def line(self) -> str:
        wall = max(self.shares, key=self.shares.__getitem__)
        bytes_s = [self.images_s * size / 1e9 for size in (PIXEL_BYTES + OUT_BYTES, IN_BYTES + OUT_BYTES)]
        return (
            f"{self.model:10} {self.gpus:5} {self.images_s:9,.0f} {self.efficiency:6.2f} {self.tasks:7,} "
            f"{self.cores:7,.0f} {self.images_s / BATCH:8,.0f} {self.shares[DRIVER]:7.2f} {self.images_s:9,.0f} "
            f"{self.puts_s:7,.0f} {bytes_s[0]:7.1f} {bytes_s[1]:6.1f} {self.dollars:6.2f}  {wall}"
        )


HEADING = (
    "model       GPUs     img/s effic.   tasks   cores  calls/s  driver    GETs/s  PUTs/s  obj GB/s S3 GB/s $/million"
    "  fullest"
)


def project(fitted: Cluster, model: str, gpus: int, few: Driver, many: Driver, shard_s: float, images: int) -> Load:
    """`images` a shard. Tasks are as many as read what the GPUs take, with a core each, and a tenth more."""
    rate = RATES[model]
    tasks = int(np.ceil(1.1 * gpus * rate * CPU_MS / 1000))
    driver = few.towards(many, tasks)
    words = words_a_shard(images * tasks / (rate * gpus))
    setup = replace(
        fitted,
        replicas=gpus,
        tasks=tasks,
        batch_s=BATCH / rate,
        read_s=BATCH * CPU_MS / 1000,
        shard_batches=images // BATCH,
        shard_s=shard_s,
        message_s=driver.word_s,
        messages_a_batch=words / (images // BATCH),
        end_s=driver.shard_s,
    )
    found = BATCH * batches_a_second(setup, min(60.0, max(20.0, MOST_BATCHES / (gpus * rate / BATCH))))
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
    found, shard_s, (few, many) = measure((*FIT, *CHECK))
    measured = {count: rate for count, (rate, _) in found.items()}
    fitted = fit(measured)
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
    for driver in (few, many):
        figures |= {f"driver_ms_shard_{driver.open}": 1000 * driver.shard_s}
        figures |= {f"driver_ms_word_{driver.open}": 1000 * driver.word_s}
    print(HEADING)
    loads = {}
    for model, gpus in itertools.product(RATES, GPUS):
        loads[model, gpus] = project(fitted, model, gpus, few, many, shard_s, DEFAULT_SHARD_IMAGES)
        print(loads[model, gpus].line())
        figures |= {f"{model}_{gpus}_img_s": loads[model, gpus].images_s}
        figures |= {f"{model}_{gpus}_dollars_million": loads[model, gpus].dollars}
    first = loads["sam_vit_b", 100]
    figures["efficiency_100"] = first.efficiency
    figures["efficiency_1000"] = loads["sam_vit_b", 1000].efficiency
    for model, gpus in (("sam_vit_b", NODE_GPUS), ("cellsam", NODE_GPUS)):
        load = project(fitted, model, gpus, few, many, shard_s, DEFAULT_SHARD_IMAGES)
        figures |= {f"million_{model}_hours": MILLION / load.images_s / 3600, f"million_{model}_dollars": load.dollars}
    figures |= {"million_kiosk_hours": KIOSK_HOURS, "million_kiosk_dollars": KIOSK_DOLLARS}
    return figures
