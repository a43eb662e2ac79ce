"""The loop of `jobs.finetune`: steps, an epoch's validation, checkpoints, the best model."""

from __future__ import annotations

import io
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import ray
import torch
from safetensors.torch import save

from cluster.errors import Diverged, InvalidInput
from cluster.settings import Settings
from cluster.storage import Storage, join
from jobs import curves
from jobs.training_data import Clock, Source
from jobs.training_ranks import Ranks, plain_errors
from serve_app.model import checkpoint
from serve_app.model.checkpoint import ModelCard
from serve_app.model.training import Plan, Trainer
from serve_app.model.training_samples import Sample

AHEAD = 3  # batches that are made while one is trained on
VALIDATED_AT_ONCE = 8
SAVE_EVERY_S = 60.0
MAX_CHECKPOINT_BYTES = 16 << 30


@dataclass(frozen=True)
class Request:
    """What the training task is told; URIs are absolute."""

    settings: Settings
    model: str
    input: str
    masks: str | None
    out: str
    plan: Plan
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


class Maker:
    """Makes batches in a process of its own, so that training need not wait for them."""

    def __init__(self, data: Source) -> None:
        self.data = data

    def batch(self, step: int, size: int, progress: float) -> list[Sample]:
        return self.data.batch(step, size, progress)

    def held(self, first: int, count: int) -> list[Sample]:
        return self.data.held(first, count)


class Made:
    """A `Source`'s batches by way of a `Maker`, a few ahead."""

    def __init__(self, data: Source) -> None:
        self.maker: Any = ray.remote(num_cpus=0, max_restarts=3, max_task_retries=3)(Maker).remote(data)

    def batches(self, first: int, size: int, progress: Callable[[int], float]) -> Iterator[list[Sample]]:
        waiting: deque[Any] = deque()
        step = first
        while True:
            while len(waiting) < AHEAD:
                waiting.append(self.maker.batch.remote(step, size, progress(step)))
                step += 1
            yield self._got(waiting.popleft())

    def held(self) -> Iterator[Sample]:
        first = 0
        while found := self._got(self.maker.held.remote(first, VALIDATED_AT_ONCE)):
            yield from found
            first += VALIDATED_AT_ONCE

    @staticmethod
    @plain_errors()
    def _got(reference: Any) -> list[Sample]:
        return cast(list[Sample], ray.get(reference))


class Training:
    """The loop: steps, an epoch's validation, checkpoints, the best model."""

    def __init__(
        self, request: Request, trainer: Trainer | Ranks, images: int, made: Any, stopping: Callable[[], bool]
    ) -> None:
        """images: an epoch. made: `batches` and `held` as `Made` has them."""
        self.request, self.trainer, self.images, self.made, self.stopping = request, trainer, images, made, stopping
        self.storage = Storage(request.settings.storage)
        self.steps_an_epoch = math.ceil(images / request.batch)
        self.lines: list[dict[str, float]] = []
        self.best = (0, -1.0)  # epoch, score
        self.seen, self.spent, self.done = 0, 0.0, False
        self.sums: list[float] = [0.0] * 4  # of the epoch so far: loss, IoU loss, IoU, steps

    def run(self, folder: Path) -> Iterator[Told]:
        """Raises Diverged where the loss is no number: the last checkpoint is from before that."""
        self._resume()
        if self.done:
            yield Told(1.0, self.seen, 0.0, math.nan, note="the training is done: nothing is left to do")
            return
        card = ModelCard.read(folder)
        rest = {} if self.request.plan.encoder else checkpoint.load_half(folder, checkpoint.ENCODER, card)
        clock = Clock(self.steps_an_epoch * (self.request.epochs or math.inf), self.request.seconds, self.spent)
        saved = started = time.monotonic()
        at_start = self.seen
        for batch in self.made.batches(self.trainer.step_count, self.request.batch, clock.progress):
            loss = self._step(batch, clock.progress(self.trainer.step_count))
            self.spent, progress, stopped = clock.spent, clock.progress(self.trainer.step_count), self.stopping()
            told = Told(progress, self.seen, (self.seen - at_start) / (time.monotonic() - started), loss)
            ended = progress >= 1 or self.trainer.step_count % self.steps_an_epoch == 0
            if ended:
                told = replace(told, line=self._epoch(card, rest, progress))
                late = len(self.lines) - self.best[0]
                self.done = progress >= 1 or late >= (self.request.patience or math.inf)
            if ended or stopped or time.monotonic() - saved > SAVE_EVERY_S:
                self._save()
                saved = time.monotonic()
            yield told
            if self.done or stopped:
                return

    def _step(self, batch: list[Sample], progress: float) -> float:
        outcome = self.trainer.step(batch, progress)
        if batch and not math.isfinite(outcome.loss):
            named = ", ".join(one.image_id[:12] for one in batch)
            raise Diverged(
                f"the loss is no number at step {self.trainer.step_count}, for the images {named}; the last checkpoint "
                "is kept. A lower --lr, or --dtype float32, may help, and other labels if these are wrong"
            )
        if not batch:
            return math.nan
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
