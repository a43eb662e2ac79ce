"""`python -m jobs.finetune EMBEDDINGS MASKS OUT --model NAME`: train a model's decoder from stored embeddings.

OUT/model.safetensors is the best checkpoint so far, and a model's `source` in the settings as it stands; its encoder is
the one that made the embeddings. OUT/curves.jsonl has a line an epoch, OUT/curves.png draws them, OUT/_checkpoint.pt is
what the same command goes on from.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn, cast

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from safetensors.torch import save
from tqdm import tqdm

from cluster import memory, session
from cluster.errors import CellrayError, Diverged, Internal, InvalidInput, NotFound, Unavailable
from cluster.settings import Settings
from cluster.storage import Storage, absolute, join
from jobs import curves, driver, images, labels
from jobs.driver import Job
from jobs.labels import Labels
from jobs.plan import Plan
from jobs.training_data import SYNTHETIC, Clock, Embeddings, Files, Generated, Images, Labelled, Source, held_out
from serve_app import contract, dataset, models
from serve_app.model import checkpoint, encoder, preprocess, training
from serve_app.model.checkpoint import ModelCard
from serve_app.model.training import Sample, Trainer

NAME = "finetune"
DESCRIPTION = """Train a model's prompt encoder and mask decoder on labelled objects, from the embeddings that
jobs.embed stored: the encoder is never run, and the embeddings stay valid for the result. MASKS is an output of
jobs.segment, a COCO file (.json), or a folder of label images (PNG or TIFF, a number an object) named like the images.

With --full IMAGES the encoder is trained too, from the images themselves: for small models. IMAGES is a folder, or
`synthetic` for generated fields of cells, which need no MASKS. A model of random weights starts afresh.

Killed or interrupted, the same command goes on from OUT's last checkpoint; another one on the same OUT is refused."""
EPILOG = """examples:
  python -m jobs.finetune ~/plates-out ~/labels ~/tuned --model sam_vit_b --minutes 30
  python -m jobs.finetune ~/labels ~/tuned --full ~/images --model nano --epochs 40
  python -m jobs.finetune ~/nano --full synthetic --model nano --minutes 60
"""
AHEAD = 3  # batches that are made while one is trained on
VALIDATED_AT_ONCE = 8
SAVE_EVERY_S = 60.0
STOP_TIMEOUT_S = 120.0
MAX_CHECKPOINT_BYTES = 16 << 30
READERS = 4
DECODER_LR, FULL_LR = 1e-4, 8e-4
DEFAULT_EPOCHS = 20


class _Parser(argparse.ArgumentParser):
    """Tells EMBEDDINGS MASKS OUT, MASKS OUT --full and OUT --full synthetic apart."""

    def parse_args(self, *arguments: Any) -> argparse.Namespace:  # type: ignore[override]
        found = super().parse_args(*arguments)
        wanted = (
            ["OUT"] if found.full == SYNTHETIC else ["MASKS", "OUT"] if found.full else ["EMBEDDINGS", "MASKS", "OUT"]
        )
        if len(found.paths) != len(wanted):
            self.error(f"expected {' '.join(wanted)}, found {' '.join(found.paths)}")
        found.output = found.paths[-1]
        found.input = found.full or found.paths[0]
        found.masks = found.paths[-2] if len(wanted) > 1 else None
        if found.epochs is None and found.minutes is None:
            found.epochs = DEFAULT_EPOCHS
        return found


def main(argv: Sequence[str] | None = None) -> int:
    made = _Parser(f"python -m jobs.{NAME}", description=DESCRIPTION, epilog=EPILOG,
                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument("paths", metavar="EMBEDDINGS MASKS OUT", nargs="+")
    made.add_argument("--full", metavar="IMAGES", help=f"train the encoder too, on a folder of images or `{SYNTHETIC}`")
    made.add_argument("--model", required=True, help="a model of the settings, whose weights are the start")
    made.add_argument("--config", help="settings YAML, a path or s3://… (default: CELLRAY_CONFIG)")
    made.add_argument(
        "--epochs", type=driver._positive, help=f"(default: {DEFAULT_EPOCHS}, or as many as --minutes allow)"
    )
    made.add_argument("--minutes", type=float, help="end after this time, the learning rate with it")
    made.add_argument("--batch", type=driver._positive, default=6, help="images a step (default: %(default)s)")
    made.add_argument("--lr", type=float, help=f"learning rate (default: {DECODER_LR:g}, {FULL_LR:g} with --full)")
    made.add_argument("--loss", choices=training.LOSSES, help="(default: focal; bce with --full)")
    made.add_argument("--rounds", type=driver._positive, default=3, help="of prompts, at most (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument(
        "--validation", type=driver._share, default=0.1, help="share of the images (default: %(default)s)"
    )
    made.add_argument("--patience", type=driver._positive, help="stop after so many epochs without a better validation")
    made.add_argument("--dtype", choices=("auto", *encoder.DTYPES), default="auto", help="of products")
    made.add_argument("--progress-every", type=float, default=driver.LINE_EVERY_S, metavar="SECONDS",
                      help="between lines where there is no terminal for a bar (default: %(default)s)")  # fmt: skip
    return driver.main(NAME, made, _run, argv)


@dataclass(frozen=True)
class Request:
    """What the training task is told; URIs are absolute."""

    settings: Settings
    model: str
    input: str
    masks: str | None
    out: str
    plan: training.Plan
    epochs: int | None
    seconds: float
    batch: int
    validation: float
    patience: int | None
    dtype: str


@dataclass(frozen=True)
class Told:
    """How far the training is. `line` is an epoch's, at its end; `note` is for people."""

    progress: float
    images: int
    images_per_second: float
    loss: float
    line: dict[str, float] | None = None
    note: str = ""


def _run(job: Job) -> int:
    asked = job.arguments
    plan = training.Plan(
        lr=asked.lr or (FULL_LR if asked.full else DECODER_LR),
        loss=asked.loss or ("bce" if asked.full else "focal"),
        rounds=asked.rounds,
        seed=asked.seed,
        encoder=bool(asked.full),
    )
    plan.check()
    request = Request(
        settings=job.settings,
        model=asked.model,
        input=SYNTHETIC if asked.full == SYNTHETIC else job.input,
        masks=absolute(asked.masks) if asked.masks else None,
        out=job.output,
        plan=plan,
        epochs=asked.epochs,
        seconds=60 * asked.minutes if asked.minutes else math.inf,
        batch=asked.batch,
        validation=asked.validation,
        patience=asked.patience,
        dtype=asked.dtype,
    )
    card = ModelCard.read(models.prepare(job.settings, asked.model))
    facts = {name: value for name, value in asdict(request).items() if name not in ("settings", "out")}
    facts |= {"encoder_sha256": card.encoder_sha256, "decoder_sha256": card.decoder_sha256}
    facts["seconds"] = None if math.isinf(request.seconds) else request.seconds
    if Plan(NAME, facts).freeze(job.storage, job.output):
        print(f"{NAME}: going on from the last checkpoint in {job.output}", flush=True)
    _join()
    gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0))
    stream = _train.options(num_gpus=gpus, num_returns="streaming").remote(request)
    reporter = _Reporter(asked.progress_every)
    try:
        for told in _told(stream):
            reporter(told)
    except KeyboardInterrupt:
        ray.cancel(stream)
        _wait(stream)
        raise
    finally:
        reporter.close()
    print(f"{NAME}: {join(job.output, 'model.safetensors')} is the model: its `source` in the settings", flush=True)
    return driver.EXIT_OK


def _join() -> None:
    """The cluster that runs, else one of our own: no replica is needed."""
    try:
        session.connect()
    except Unavailable:
        with session.keeping_sigterm():
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def _told(stream: Any) -> Iterator[Told]:
    try:
        for reference in stream:
            yield cast(Told, ray.get(reference))
    except RayTaskError as error:
        _raise(error)
    except RayError as error:
        raise Unavailable(f"the training's worker died: {error}; the same command goes on") from error


def _raise(error: RayTaskError) -> NoReturn:
    cause = error.cause
    if isinstance(cause, CellrayError):
        raise cause from None
    raise Internal(f"the training failed with {type(cause).__name__}: {cause}") from error


def _wait(stream: Any) -> None:
    """Until the cancelled task has written its checkpoint."""
    print(f"{NAME}: interrupted, writing a checkpoint", file=sys.stderr, flush=True)
    with suppress(RayError):
        ray.wait([stream.completed()], timeout=STOP_TIMEOUT_S)


class _Reporter:
    """A bar on a terminal; elsewhere a line now and then. An epoch's end is a line in both."""

    def __init__(self, every: float) -> None:
        self.every, self.printed = every, time.monotonic()
        self.bar = (
            tqdm(total=100, unit="%", desc=NAME, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
            if sys.stderr.isatty()
            else None
        )

    def __call__(self, told: Told) -> None:
        now = f"{told.images} images, {told.images_per_second:.1f} img/s, loss {told.loss:.3f}"
        if told.note:
            tqdm.write(f"{NAME}: {told.note}")
        if told.line:
            shown = ", ".join(f"{name} {told.line[name]:.3f}" for name in curves.IOUS if name in told.line)
            tqdm.write(f"{NAME}: epoch {told.line['epoch']:.0f}, {now}, {shown or 'no validation'}")
        if self.bar is not None:
            self.bar.set_postfix_str(now, refresh=False)
            self.bar.update(100 * told.progress - self.bar.n)
        elif time.monotonic() - self.printed >= self.every:
            self.printed = time.monotonic()
            print(f"{NAME}: {told.progress:.0%}, {now}", flush=True)
        sys.stdout.flush()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@ray.remote(num_cpus=1, max_retries=0)
def _train(request: Request) -> Iterator[Told]:
    stopping = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stopping.set())  # a cancelled task gets one
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    memory.keep()
    try:
        device = encoder.check_device("auto")
        folder = models.prepare(request.settings, request.model)
        trainer = Trainer(folder, request.plan, device, _dtype(request.dtype, device))
        data, note = source(request, ModelCard.read(folder))
        yield Told(0.0, 0, 0.0, math.nan, note=note)
        maker = ray.remote(num_cpus=0, max_restarts=3, max_task_retries=3)(_Maker).remote(data)
        yield from Training(request, trainer, data.images, _Made(maker), stopping.is_set).run(folder)
    finally:
        signal.signal(signal.SIGINT, before)


def _dtype(asked: str, device: str) -> str:
    """bfloat16 where the device multiplies in it."""
    fast = device != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return asked if asked != "auto" else "bfloat16" if fast else "float32"


class _Maker:
    """Makes batches in a process of its own, so that training need not wait for them."""

    def __init__(self, data: Source) -> None:
        self.data = data

    def batch(self, step: int, size: int, progress: float) -> list[Sample]:
        return self.data.batch(step, size, progress)

    def held(self, first: int, count: int) -> list[Sample]:
        return self.data.held(first, count)


class _Made:
    """A `Source`'s batches by way of a `_Maker`, a few ahead."""

    def __init__(self, maker: Any) -> None:
        self.maker = maker

    def batches(self, first: int, size: int, progress: Callable[[int], float]) -> Iterator[list[Sample]]:
        waiting: deque[Any] = deque()
        step = first
        while True:
            while len(waiting) < AHEAD:
                waiting.append(self.maker.batch.remote(step, size, progress(step)))
                step += 1
            yield _got(waiting.popleft())

    def held(self) -> Iterator[Sample]:
        first = 0
        while found := _got(self.maker.held.remote(first, VALIDATED_AT_ONCE)):
            yield from found
            first += VALIDATED_AT_ONCE


def _got(reference: Any) -> list[Sample]:
    try:
        return cast(list[Sample], ray.get(reference))
    except RayTaskError as error:
        _raise(error)


class Training:
    """The loop: steps, an epoch's validation, checkpoints, the best model."""

    def __init__(
        self, request: Request, trainer: Trainer, images: int, made: Any, stopping: Callable[[], bool]
    ) -> None:
        """images: an epoch. made: `batches` and `held` as `_Made` has them."""
        self.request, self.trainer, self.images, self.made, self.stopping = request, trainer, images, made, stopping
        self.storage = Storage(request.settings.storage)
        self.steps_an_epoch = math.ceil(images / request.batch)
        self.lines: list[dict[str, float]] = []
        self.best = (0, -1.0)  # epoch, score
        self.seen, self.spent, self.done = 0, 0.0, False
        self.sums: list[float] = [0.0] * 4  # of the epoch so far: loss, IoU loss, IoU, steps

    def run(self, folder: Any) -> Iterator[Told]:
        """Raises Diverged where the loss is no number: the last checkpoint is from before that."""
        self._resume()
        card = ModelCard.read(folder)
        rest = {} if self.request.plan.encoder else checkpoint.load_half(folder, checkpoint.ENCODER, card)
        if self.done:
            yield Told(1.0, self.seen, 0.0, math.nan, note="the training is done: nothing is left to do")
            return
        steps = self.steps_an_epoch * (self.request.epochs or math.inf)
        clock = Clock(steps, self.request.seconds, self.spent)
        saved, at_start, started = time.monotonic(), self.seen, time.monotonic()
        for batch in self.made.batches(self.trainer.step_count, self.request.batch, clock.progress):
            progress = clock.progress(self.trainer.step_count)
            loss = self._step(batch, progress)
            self.spent = clock.spent
            told = Told(progress, self.seen, (self.seen - at_start) / (time.monotonic() - started), loss)
            progress = clock.progress(self.trainer.step_count)
            if self.trainer.step_count % self.steps_an_epoch == 0 or progress >= 1:
                told = replace(told, line=self._epoch(card, rest, progress))
                self.done = progress >= 1 or self._patient_no_more()
                self._save()
                saved = time.monotonic()
            elif time.monotonic() - saved > SAVE_EVERY_S or self.stopping():
                self._save()
                saved = time.monotonic()
            yield told
            if self.done or self.stopping():
                return

    def _step(self, batch: list[Sample], progress: float) -> float:
        if not batch:
            self.trainer.step_count += 1
            return math.nan
        outcome = self.trainer.step(batch, progress)
        if not math.isfinite(outcome.loss):
            named = ", ".join(one.image_id[:12] for one in batch)
            raise Diverged(
                f"the loss is no number at step {self.trainer.step_count}, for the images {named}; the last checkpoint "
                "is kept. A lower --lr, or --dtype float32, may help, and other labels if these are wrong"
            )
        self.seen += len(batch)
        found = (outcome.loss, outcome.iou_loss, outcome.iou, 1.0)
        self.sums = [total + own for total, own in zip(self.sums, found, strict=True)]
        return outcome.loss

    def _epoch(self, card: ModelCard, rest: checkpoint.State, progress: float) -> dict[str, float]:
        """Validate, keep the best model, draw the curves; → the epoch's line."""
        steps = max(1.0, self.sums[3])
        line = {
            "epoch": len(self.lines) + 1,
            "step": self.trainer.step_count,
            "images": self.seen,
            "seconds": round(self.spent, 1),
            "lr": self.request.plan.rate(progress),
            "loss": self.sums[0] / steps,
            "iou_loss": self.sums[1] / steps,
            "iou": self.sums[2] / steps,
            **self.trainer.evaluate(self.made.held()),
        }
        self.sums = [0.0] * 4
        self.lines.append(line)
        score = line["iou_box"] + line["iou_click"] if "iou_box" in line else float(line["epoch"])
        if score > self.best[1]:
            self.best = len(self.lines), score
            self._write("model.safetensors", save(whole(self.trainer.weights() | rest, card)))
        self._write("curves.jsonl", "".join(json.dumps(one) + "\n" for one in self.lines).encode())
        self._write("curves.png", curves.draw(self.lines))
        return line

    def _patient_no_more(self) -> bool:
        return self.request.patience is not None and len(self.lines) - self.best[0] >= self.request.patience

    def _save(self) -> None:
        content = io.BytesIO()
        own = {name: getattr(self, name) for name in ("lines", "best", "seen", "spent", "done", "sums")}
        torch.save({"trainer": self.trainer.snapshot(), "own": own}, content)
        self._write("_checkpoint.pt", content.getvalue())

    def _resume(self) -> None:
        uri = join(self.request.out, "_checkpoint.pt")
        if self.storage.exists(uri):
            content = self.storage.read(uri, MAX_CHECKPOINT_BYTES)
            try:
                found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged pickle can raise anything
                raise InvalidInput(f"{uri} is damaged: remove it to start again") from error
            self.trainer.restore(found["trainer"])
            for name, value in found["own"].items():
                setattr(self, name, value)

    def _write(self, name: str, content: bytes) -> None:
        self.storage.overwrite(join(self.request.out, name), content)


def whole(weights: checkpoint.State, card: ModelCard) -> checkpoint.State:
    """A whole checkpoint that `checkpoint.extract` splits into halves of the card's kind."""
    beside = {"pixel_mean": card.pixel_mean, "pixel_std": card.pixel_std}
    beside[checkpoint.NORM_EPS] = (card.architecture.decoder_norm_eps,)
    numbers = {name: torch.tensor(values, dtype=torch.float64) for name, values in beside.items()}
    return {name: tensor.contiguous() for name, tensor in (weights | numbers).items()}


def source(request: Request, card: ModelCard) -> tuple[Source, str]:
    """What to train on, and a word on it.

    Raises:
        InvalidInput: embeddings of another encoder, a label of another size than its image, nothing left to train on.
        NotFound: the images and the labels have nothing in common.
    """
    sizes, seed = card.architecture, request.plan.seed
    unit = sizes.patch * max(1, sizes.window)
    if request.input == SYNTHETIC:
        made = Generated(seed)
        return Images(
            made, sizes.image_size, sizes.patch, unit, seed
        ), f"{SYNTHETIC} fields, {made.kept} for validation"
    storage = Storage(request.settings.storage)
    assert request.masks is not None
    found = labels.read(storage, request.masks, request.settings.limits)
    there = _images(request, storage) if request.plan.encoder else _embeddings(request, storage, card)
    chosen = _matched(found, there, request)
    kept = [one for one in chosen if held_out(one.image_id, request.validation)]
    trained = [one for one in chosen if not held_out(one.image_id, request.validation)]
    if not trained:
        raise InvalidInput(f"all {len(chosen)} labelled images are held out: lower --validation, or label more")
    skipped = sum(one.objects.skipped for one in chosen)
    note = (
        f"{sum(len(one.objects.counts) for one in chosen)} objects in {len(chosen)} of {len(there)} images, "
        f"{len(kept)} of them for validation; {skipped} empty or one-pixel objects skipped"
    )
    if not request.plan.encoder:
        return Embeddings(storage, sizes, trained, kept, seed), note
    files = Files(storage, request.settings.limits, trained, kept)
    return Images(files, sizes.image_size, sizes.patch, unit, seed), note


Found = tuple[str, str, preprocess.Size, str, int]  # image id, image URI, (height, width), file, row


def _embeddings(request: Request, storage: Storage, card: ModelCard) -> list[Found]:
    data = dataset.open(request.input, storage)
    rows: list[Found] = []
    for uri, record in data.files(dataset.EMBEDDINGS):
        if record.encoder_sha256 != card.encoder_sha256:
            raise InvalidInput(
                f"{data.uri} was made by another encoder ({record.encoder_sha256[:12]}…) than that of {request.model} "
                f"({card.encoder_sha256[:12]}…): embed the images with {request.model} first"
            )
        table = data.read(uri, ["image_id", "image_uri", "height", "width"]).to_pylist()
        rows += [
            (one["image_id"], one["image_uri"], (one["height"], one["width"]), uri, row)
            for row, one in enumerate(table)
        ]
    return rows


def _images(request: Request, storage: Storage) -> list[Found]:
    limits = request.settings.limits

    def one(file: images.File) -> Found:
        data = storage.read(file.uri, limits.image_bytes)
        pixels = preprocess.decode(data, limits.image_pixels)
        return contract.image_id(data), file.uri, (pixels.shape[0], pixels.shape[1]), file.uri, 0

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(one, images.find(storage, request.input)))


def _matched(found: Labels, there: list[Found], request: Request) -> list[Labelled]:
    chosen = {}
    empty = 0
    for image_id, image_uri, size, uri, row in there:
        objects = found.find(image_id, image_uri)
        if objects is None:
            continue
        if objects.size != size:
            raise InvalidInput(
                f"{image_uri} has {size[1]} × {size[0]} pixels, its labels in {found.uri} "
                f"{objects.size[1]} × {objects.size[0]}: label the image itself, not a resized one"
            )
        empty += not objects.counts
        if objects.counts:
            chosen[image_id] = Labelled(uri, row, image_id, objects)
    if not chosen and not empty:
        example = there[0][1] if there else "nothing"
        raise NotFound(
            f"none of the {len(there)} images of {request.input} (like {example}) is labelled in {found.uri} "
            f"(like {found.example()})"
        )
    if not chosen:
        raise InvalidInput(f"the labels in {found.uri} hold no object of two pixels or more")
    return list(chosen.values())


if __name__ == "__main__":
    sys.exit(main())
