"""`python -m jobs.finetune EMBEDDINGS MASKS OUT --model NAME`: train a model's decoder from stored embeddings.

OUT/model.safetensors is the best checkpoint so far, and a model's `source` in the settings as it stands; its encoder is
the one that made the embeddings. OUT/curves.jsonl has a line an epoch, OUT/curves.png draws them, OUT/_checkpoint.pt is
what the same command goes on from.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import ray
import torch
from tqdm import tqdm

from cluster import memory, session
from cluster.errors import InvalidInput, Unavailable
from cluster.storage import absolute, join
from jobs import curves, driver
from jobs.driver import Job
from jobs.plan import Plan
from jobs.training_data import SYNTHETIC
from jobs.training_loop import Made, Request, Told, Training
from jobs.training_ranks import Ranks, plain_errors
from jobs.training_source import source
from serve_app import models
from serve_app.model import encoder, training
from serve_app.model.checkpoint import ModelCard
from serve_app.model.losses import LOSSES

NAME = "finetune"
DESCRIPTION = """Train a model's prompt encoder and mask decoder on labelled objects, from the embeddings that
jobs.embed stored: the encoder is never run, and the embeddings stay valid for the result. MASKS is an output of
jobs.segment, a COCO file (.json), or a folder of label images (PNG or TIFF, a number an object) named like the images.

With --full IMAGES the encoder is trained too, from the images themselves: for small models. IMAGES is a folder, or
`synthetic` for generated fields of cells, which need no MASKS. A model of random weights starts afresh.

With --gpus N as many processes share each batch and come to the same weights as one; with another N the same command
goes on as well. Several GPUs were not tried yet, only several processes on CPUs.

Killed or interrupted, the same command goes on from OUT's last checkpoint; another one on the same OUT is refused."""
EPILOG = """examples:
  python -m jobs.finetune ~/plates-out ~/labels ~/tuned --model sam_vit_b --minutes 30
  python -m jobs.finetune ~/labels ~/tuned --full ~/images --model nano --epochs 40
  python -m jobs.finetune ~/nano --full synthetic --model nano --minutes 60
"""
STOP_TIMEOUT_S = 120.0
DECODER_LR, FULL_LR = 1e-4, 5e-4
DEFAULT_EPOCHS = 20


class _Parser(argparse.ArgumentParser):
    """Tells EMBEDDINGS MASKS OUT, MASKS OUT --full and OUT --full synthetic apart."""

    def parse_args(self, *arguments: Any) -> argparse.Namespace:  # type: ignore[override]
        found = super().parse_args(*arguments)
        wanted = "OUT" if found.full == SYNTHETIC else "MASKS OUT" if found.full else "EMBEDDINGS MASKS OUT"
        if len(found.paths) != len(wanted.split()):
            self.error(f"expected {wanted}, found {' '.join(found.paths)}")
        *given, found.output = found.paths
        found.input = found.full or given[0]
        found.masks = given[-1] if given else None
        if found.epochs is None and found.minutes is None:
            found.epochs = DEFAULT_EPOCHS
        return found


def main(argv: Sequence[str] | None = None) -> int:
    made = _Parser(f"python -m jobs.{NAME}", description=DESCRIPTION, epilog=EPILOG,
                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = made.add_argument
    add("paths", metavar="EMBEDDINGS MASKS OUT", nargs="+")
    add("--full", metavar="IMAGES", help=f"train the encoder too, on a folder of images or `{SYNTHETIC}`")
    add("--model", required=True, help="a model of the settings, whose weights are the start")
    add("--config", help="settings YAML, a path or s3://… (default: CELLRAY_CONFIG)")
    add("--epochs", type=driver._positive, help=f"(default: {DEFAULT_EPOCHS}, or as many as --minutes allow)")
    add("--minutes", type=float, help="end after this time, the learning rate with it")
    add("--batch", type=driver._positive, default=6, help="images a step (default: %(default)s)")
    add("--lr", type=float, help=f"learning rate (default: {DECODER_LR:g}, {FULL_LR:g} with --full)")
    add("--loss", choices=LOSSES, help="(default: focal; bce with --full)")
    add("--rounds", type=driver._positive, default=3, help="of prompts, at most (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--validation", type=driver._share, default=0.1, help="share of the images (default: %(default)s)")
    add("--patience", type=driver._positive, help="stop after so many epochs without a better validation")
    add("--dtype", choices=("auto", *encoder.DTYPES), default="auto", help="of products")
    add("--gpus", type=int, metavar="N", help="GPUs that share a batch (default: 1 if the cluster has one, else 0)")
    add("--progress-every", type=float, default=driver.LINE_EVERY_S, metavar="SECONDS",
        help="between lines where there is no terminal for a bar (default: %(default)s)")  # fmt: skip
    return driver.main(NAME, made, _run, argv)


def _run(job: Job) -> int:
    asked = job.arguments
    lr, loss = (FULL_LR, "bce") if asked.full else (DECODER_LR, "focal")
    plan = training.Plan(asked.lr or lr, asked.loss or loss, asked.rounds, asked.seed, bool(asked.full))
    plan.check()
    request = Request(
        settings=job.settings,
        input=SYNTHETIC if asked.full == SYNTHETIC else job.input,
        masks=absolute(asked.masks) if asked.masks else None,
        out=job.output,
        plan=plan,
        seconds=60 * asked.minutes if asked.minutes else math.inf,
        **{name: getattr(asked, name) for name in ("model", "epochs", "batch", "validation", "patience", "dtype")},
    )
    card = ModelCard.read(models.prepare(job.settings, asked.model))
    facts = {name: value for name, value in asdict(request).items() if name not in ("settings", "out")}
    facts |= {"encoder_sha256": card.encoder_sha256, "decoder_sha256": card.decoder_sha256}
    facts["seconds"] = None if math.isinf(request.seconds) else request.seconds
    if Plan(NAME, facts).freeze(job.storage, job.output):
        print(f"{NAME}: going on from the last checkpoint in {job.output}", flush=True)
    _join()
    there = int(ray.cluster_resources().get("GPU", 0))
    gpus = min(1, there) if asked.gpus is None else asked.gpus
    if not 0 <= gpus <= there:
        raise InvalidInput(f"--gpus {gpus}: the cluster has {there}")
    actor: Any = ray.remote(_Task)
    task = actor.options(num_cpus=1, num_gpus=gpus if gpus < 2 else 0, max_concurrency=2).remote()
    stream = task.train.options(num_returns="streaming").remote(request, gpus)
    reporter, told = _Reporter(asked.progress_every), None
    try:
        with plain_errors():
            for reference in stream:
                reporter(told := ray.get(reference))
                driver.raise_if_interrupted()
    except KeyboardInterrupt:
        if told is not None:
            task.stop.remote()
            print(f"{NAME}: interrupted, writing a checkpoint", file=sys.stderr, flush=True)
            ray.wait([stream.completed()], timeout=STOP_TIMEOUT_S)
        raise
    finally:
        ray.kill(task)
        reporter.bar.close()
    print(f"{NAME}: {join(job.output, 'model.safetensors')} is the model: its `source` in the settings", flush=True)
    return driver.EXIT_OK


def _join() -> None:
    """The cluster that runs, else one of our own: no replica is needed."""
    try:
        session.connect()
    except Unavailable:
        with session.keeping_sigterm():
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


class _Reporter:
    """A bar on a terminal; elsewhere a line now and then. An epoch's end is a line in both."""

    def __init__(self, every: float) -> None:
        self.every, self.printed = every, time.monotonic()
        shape = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=100, desc=NAME, bar_format=shape, disable=not sys.stderr.isatty())

    def __call__(self, told: Told) -> None:
        now = f"{told.images} images, {told.images_per_second:.1f} img/s, loss {told.loss:.3f}"
        if told.note:
            tqdm.write(f"{NAME}: {told.note}")
        if told.line:
            shown = ", ".join(f"{name} {told.line[name]:.3f}" for name in curves.IOUS if name in told.line)
            tqdm.write(f"{NAME}: epoch {told.line['epoch']:.0f}, {now}, {shown or 'no validation'}")
        if not self.bar.disable:
            self.bar.set_postfix_str(now, refresh=False)
            self.bar.update(100 * told.progress - self.bar.n)
        elif time.monotonic() - self.printed >= self.every:
            self.printed = time.monotonic()
            print(f"{NAME}: {told.progress:.0%}, {now}")
        sys.stdout.flush()


class _Task:
    """The training in a process of its own. It is told to stop, as a cancelled task of Ray could call no other one."""

    def __init__(self) -> None:
        self.stopping = threading.Event()

    def stop(self) -> None:
        self.stopping.set()

    def train(self, request: Request, gpus: int) -> Iterator[Told]:
        trainer = Ranks(partial(prepared, request), gpus) if gpus > 1 else prepared(request)
        folder = models.prepare(request.settings, request.model)
        data, note = source(request, ModelCard.read(folder))
        yield Told(0.0, 0, 0.0, math.nan, note=note)
        yield from Training(request, trainer, data.images, Made(data), self.stopping.is_set).run(folder)


def prepared(request: Request, group: Any = None, processes: int = 1) -> training.Trainer:
    """The request's trainer on this process's device; one of several `processes` on their cores, in their `group`."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    memory.keep()
    device, dtype = encoder.check_device("auto"), request.dtype
    if dtype == "auto":  # bfloat16 where the device multiplies in it
        dtype = "bfloat16" if device != "cpu" or torch.cpu._is_avx512_bf16_supported() else "float32"
    folder = models.prepare(request.settings, request.model)
    return training.Trainer(folder, request.plan, device, dtype, group)


if __name__ == "__main__":
    sys.exit(main())
