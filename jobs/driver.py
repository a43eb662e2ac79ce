"""What every job's command shares: arguments, the cluster, progress, the report, exit codes."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from cluster import settings as settings_module
from cluster.errors import CellrayError, Conflict, InvalidInput
from cluster.memory import private_mb
from cluster.settings import Settings
from cluster.storage import Storage, absolute, join
from cluster.telemetry import configure_logging
from jobs import estimate, images, plan
from jobs.plan import DEFAULT_SHARD_IMAGES, Listing, Plan
from jobs.shards import Progress, run
from jobs.views import View
from serve_app import dataset
from serve_app.contract import ModelInfo
from serve_app.dataset import Dataset

EXIT_OK, EXIT_ERRORS, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
DEFAULT_MAX_ERROR_RATE = 0.1
JUDGED_FROM = 1000  # images
LINE_EVERY_S = 10.0
DEFAULT_PARALLEL = 2
DEFAULT_BATCH = 8
DEFAULT_OVERLAP = 128
RETRY, UPDATE = "retry-errors", "update"  # why a plan has another generation

log = logging.getLogger(__name__)


def parser(name: str, description: str, epilog: str, update: bool = False) -> argparse.ArgumentParser:
    """Arguments that all jobs have, and --update if the job has that."""
    made = argparse.ArgumentParser(
        prog=f"python -m jobs.{name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("input", metavar="INPUT", help=images.INPUT)
    made.add_argument("output", metavar="OUTPUT", help="the data set to write: a folder or s3://BUCKET/PREFIX")
    made.add_argument("--model", required=True, help="a model that the Serve app serves, e.g. nano or sam_vit_b")
    made.add_argument("--config", help="settings YAML, a path or s3://… (default: CELLRAY_CONFIG)")
    made.add_argument("--limit", type=_positive, metavar="N", help="only the first N images")
    made.add_argument(
        "--max-error-rate",
        type=_share,
        default=DEFAULT_MAX_ERROR_RATE,
        metavar="SHARE",
        help=f"stop, and exit with 1, once a greater share of the images failed, of {JUDGED_FROM:,} at least or of all "
        "(default: %(default)s)",
    )
    again, made_of = made.add_mutually_exclusive_group(), {RETRY: "run again what failed"}
    if update:
        made_of[UPDATE] = "read all images again, and embed the new and the changed"
    for mode, what in made_of.items():
        again.add_argument(
            f"--{mode}", dest="mode", action="store_const", const=mode, help=f"of an OUTPUT that is done: {what}"
        )
    made.add_argument("--dry-run", action="store_true", help="only say what it would read, write, take and cost")
    made.add_argument("--price-per-gpu-hour", type=float, metavar="DOLLARS", help="of a replica, for --dry-run")
    looked = made.add_argument_group(
        "planes and tiles", "rows of their own; their column part says what of the file they are"
    )
    looked.add_argument(
        "--channels",
        default="",
        metavar="COLOUR=CHANNEL,…",
        help="which channel, by index from 0 or name, is which colour: red, green, blue, nuclear (as green), membrane "
        "(as blue), or grey alone; each stretched by its own percentiles (default: the first three as RGB, together)",
    )
    for axis, what in (("z", "focal plane"), ("t", "time point")):
        looked.add_argument(
            f"--{axis}", default="", metavar="N", help=f"{what} of a TIFF, from 0 on, or each (default: 0)"
        )
    looked.add_argument("--tile", type=_positive, metavar="PX", help="cut larger images into squares, side in pixels")
    looked.add_argument(
        "--overlap",
        type=int,
        metavar="PX",
        help=f"of tiles; objects up to this size are whole in one of them (default: {DEFAULT_OVERLAP})",
    )
    tuning = made.add_argument_group("tuning")
    tuning.add_argument(
        "--parallel",
        type=_positive,
        default=DEFAULT_PARALLEL,
        metavar="N",
        help="shards at a time, a CPU core each (default: %(default)s); a few for each GPU replica",
    )
    tuning.add_argument(
        "--shard-images",
        type=_positive,
        default=DEFAULT_SHARD_IMAGES,
        metavar="N",
        help=f"images a shard, at most {dataset.MAX_ROWS_A_FILE} (default: %(default)s); what a kill can cost",
    )
    tuning.add_argument(
        "--batch", type=_positive, default=DEFAULT_BATCH, metavar="N", help="images a call (default: %(default)s)"
    )
    tuning.add_argument(
        "--progress-every",
        type=float,
        default=LINE_EVERY_S,
        metavar="SECONDS",
        help="between lines where there is no terminal for a bar (default: %(default)s)",
    )
    return made


def view(arguments: argparse.Namespace) -> str:
    """What of each image is asked for. Raises InvalidInput."""
    overlap = DEFAULT_OVERLAP if arguments.overlap is None else arguments.overlap
    tile = f"{arguments.tile},{overlap}" if arguments.tile else ""
    return str(View(channels=arguments.channels, t=arguments.t, z=arguments.z, tile=tile))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return value


@dataclass(frozen=True)
class Job:
    """A job about to run: what its arguments and settings came to."""

    name: str
    arguments: argparse.Namespace
    settings: Settings
    storage: Storage
    input: str
    output: str


def main(name: str, made: argparse.ArgumentParser, work: Callable[[Job], int], argv: Sequence[str] | None) -> int:
    """Parse, run `work`, and turn every expected error into one line and an exit code."""
    arguments = made.parse_args(argv)
    configure_logging(logging.WARNING)
    _interrupted.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        settings = settings_module.load(arguments.config)
        job = Job(
            name, arguments, settings, Storage(settings.storage), absolute(arguments.input), absolute(arguments.output)
        )
        return work(job)
    except CellrayError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, InvalidInput) else EXIT_ERRORS
    except KeyboardInterrupt:
        print(f"{name}: interrupted. What was committed is kept; the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED


_interrupted = threading.Event()


def _interrupt(*_: object) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def raise_if_interrupted() -> None:
    """To be called now and then: an interrupt that falls into a destructor, as Ray has many, is lost there."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


def generation(job: Job) -> tuple[int, Dataset]:
    """Which generation a job is, which after the first goes on from an output that is done; and what was before it.

    Raises:
        NotFound, InvalidInput: there is no such output. Conflict: it is not done, and not by such a job.
    """
    mode = job.arguments.mode
    if mode is None:
        return 0, Dataset(job.storage, job.output, ())
    found = dataset.open(job.output, job.storage)
    plans = plan.generations(job.storage, job.output, job.name)
    if not plans:
        raise InvalidInput(f"{job.output} holds no {job.name}: run it without --{mode} first")
    records = [record for record in found.records if record.job == job.name]
    last = len(plans) - 1
    done, wanted = sum(record.generation == last for record in records), plan.shards(plans[last])
    if done < wanted and plans[last].get("mode") != mode:
        if plans[last].get("mode") == plan.COMPACT:
            raise Conflict(f"{job.output} is being compacted: end `cellray compact {job.output}`, then --{mode} can")
        raise Conflict(
            f"{job.output} is not done, {done} of {wanted} shards of generation {last} are committed: the command that "
            f"began it goes on, then --{mode} can"
        )
    number = last if done < wanted else last + 1
    before = tuple(record for record in records if record.generation < number)
    return number, Dataset(job.storage, job.output, before)


@dataclass(frozen=True)
class Work:
    """What a job is to do: its `task` is called with the settings, OUTPUT, `context`, the footers' metadata, a shard's
    index and what `sources` gives for it."""

    plan: Plan
    listing: Listing
    sources: Callable[[int], Sequence[Any]]
    task: Any
    context: tuple[Any, ...]


def execute(job: Job, work: Work, model: ModelInfo, replicas: dict[str, int]) -> int:
    """Freeze the plan, run the shards that are not committed yet, report. Returns the exit code."""
    started = time.perf_counter()
    frozen, listing, images = work.plan, work.listing, work.listing.images
    if frozen.generation and not images:
        print(f"{job.name}: nothing to do in {job.output}", flush=True)
        return EXIT_OK
    metadata: dict[str, str] = {
        "fingerprint": frozen.fingerprint,
        "encoder_sha256": model.encoder_sha256,
        "model": model.name,
        "licence": model.licence,
        "trained": str(model.trained).lower(),
        "preprocess": model.preprocess,
        "compute_dtype": model.dtype,
        "generation": str(frozen.generation),
        **{key: str(frozen.facts[key]) for key in ("dtype", "compression") if key in frozen.facts},
    }
    if job.arguments.dry_run:
        _estimate(job, work, (job.settings, "", *work.context, metadata), replicas)
        return EXIT_OK
    committed: dict[int, int] = {}  # shard: errors
    merged = 0  # errors
    if frozen.freeze(job.storage, job.output):
        records = dataset.records(job.output, job.storage)
        ours = (record for record in records if (record.job, record.generation) == (job.name, frozen.generation))
        committed = {record.shard: record.rows(dataset.ERRORS) for record in ours}
        if job.storage.exists(dataset.plan_uri(job.output, job.name, frozen.generation + 1)):
            # it was done when that began, and `cellray compact` may have merged what it wrote, errors too
            committed = dict.fromkeys(range(len(listing)), 0)
            found = dataset.open(job.output, job.storage)
            own = Dataset(job.storage, job.output, tuple(one for one in found.records if one.job == job.name))
            merged = len(own.table(dataset.ERRORS, ["image_uri"]))
    if listing.repeated:
        print(
            f"{job.name}: {listing.repeated} images are named again: the first of each counts, with its key", flush=True
        )
    left = [index for index in range(len(listing)) if index not in committed]
    before = sum(map(listing.size, committed))
    if before:
        print(f"{job.name}: resuming, {before} of {images} images are committed", flush=True)
    if not model.trained:
        print(f"{job.name}: model {model.name} is untrained: random weights, its numbers mean nothing", flush=True)
    whole = images
    if frozen.generation:
        whole = max(images, plan.read(job.storage, dataset.plan_uri(job.output, job.name))["images"])
    reporter = _Reporter(job, images, before, merged + sum(committed.values()), whole)
    try:
        arguments = (job.settings, job.output, *work.context, metadata)
        latest = run(work.task, arguments, left, work.sources, job.arguments.parallel, reporter)
    finally:
        reporter.close()
    seconds = time.perf_counter() - started
    report = _report(job, reporter, seconds, latest, replicas, model)
    job.storage.overwrite(join(job.output, f"_report-{job.name}.json"), json.dumps(report, indent=2).encode())
    rate = f", {(reporter.done - before) / seconds:.2f} img/s" if reporter.done > before else ""
    print(f"{job.name}: {images} images, {reporter.errors} errors in {seconds:.1f} s{rate}; {job.output}", flush=True)
    if reporter.fine:
        return EXIT_OK
    stopped = f"stopped after {reporter.done} of them, since " if reporter.done < images else ""
    print(
        f"{job.name}: {stopped}more than the allowed share of {job.arguments.max_error_rate:g} failed; the rows of "
        f"{join(job.output, dataset.ERRORS)} say why, and the same command with a higher --max-error-rate goes on",
        flush=True,
    )
    return EXIT_ERRORS


def _estimate(job: Job, work: Work, arguments: tuple[Any, ...], replicas: dict[str, int]) -> None:
    listing = work.listing
    chosen = estimate.spread(job.arguments.parallel, len(listing))
    rate = estimate.measure(work.task, arguments, [work.sources(index)[: estimate.SAMPLE] for index in chosen])
    some = [listing.entry(index) for index in estimate.spread(estimate.HEADERS, listing.images)]
    shapes = estimate.sizes(job.storage, some, job.settings.limits)
    price = job.arguments.price_per_gpu_hour
    print("\n".join(estimate.lines(listing, shapes, rate, replicas, price)), flush=True)


def _report(
    job: Job,
    reporter: _Reporter,
    seconds: float,
    latest: list[Progress],
    replicas: dict[str, int],
    model: ModelInfo,
) -> dict[str, Any]:
    def total(name: str) -> int:
        return sum(getattr(progress, name) for progress in latest)

    stages: dict[str, float] = {}
    for progress in latest:
        for stage, spent in progress.seconds.items():
            stages[stage] = round(stages.get(stage, 0) + spent, 3)
    return {
        "job": job.name,
        "images": reporter.images,
        "already_committed": reporter.before,
        "done": reporter.done,
        "errors": reporter.errors,
        "unchanged": total("unchanged"),
        "masks": total("masks"),
        "seconds": round(seconds, 2),
        "images_per_second": round((reporter.done - reporter.before) / seconds, 3),
        "bytes_read": total("bytes_read"),
        "bytes_written": total("bytes_written"),
        "encoder_calls": total("encoder_calls"),
        "retries": total("retries"),
        "replicas": replicas,
        "stage_seconds": stages,
        "driver_memory_mb": round(reporter.memory_mb),
        "task_memory_mb": round(max((progress.memory_mb for progress in latest), default=0)),
        "model": asdict(model),
    }


class _Reporter:
    """A bar on a terminal, elsewhere a line now and then; and whether so many failed that it is better to stop."""

    def __init__(self, job: Job, images: int, before: int, errors: int, whole: int) -> None:
        """before, errors: of `images`, those that are done and those that failed already. whole: images of the data
        set; those that are not of this run did not fail."""
        self.name, self.images, self.before, self.failed, self.whole = job.name, images, before, errors, whole
        self.every, self.allowed = job.arguments.progress_every, job.arguments.max_error_rate
        self.done, self.errors = before, errors
        self.started = self.printed = time.monotonic()
        self.memory_mb = private_mb()
        self.bar = tqdm(total=images, initial=before, unit="img", desc=job.name) if sys.stderr.isatty() else None

    @property
    def fine(self) -> bool:
        seen = self.done + self.whole - self.images
        return self.errors <= self.allowed * max(seen, min(self.whole, JUDGED_FROM))

    def __call__(self, latest: list[Progress]) -> bool:
        self.done = done = self.before + sum(progress.images for progress in latest)
        self.errors = self.failed + sum(progress.errors for progress in latest)
        self.memory_mb = max(self.memory_mb, private_mb())
        raise_if_interrupted()
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix(errors=self.errors, refresh=False)
            self.bar.update(done - self.bar.n)
        elif now - self.printed >= self.every and done > self.before:
            self.printed = now
            rate = (done - self.before) / (now - self.started)
            eta = (self.images - done) / rate
            print(
                f"{self.name}: {done}/{self.images} images, {self.errors} errors, {rate:.2f} img/s, {eta:.0f} s left",
                flush=True,
            )
        return self.fine

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
