"""Logging, set up once a process, and the metrics: their names, and how they are counted.

Ray gathers them on each node and puts `ray_` before their names. Labels are models, routes and states: what a user
sends is none.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
ITEMS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

REQUEST_SECONDS = "cellray_request_seconds"
QUEUE_SECONDS = "cellray_queue_seconds"
ENCODER_SECONDS = "cellray_encoder_seconds"
DECODER_SECONDS = "cellray_decoder_seconds"
AUTOMASK_SECONDS = "cellray_automask_seconds"
CELLFINDER_SECONDS = "cellray_cellfinder_seconds"
CELLS_SECONDS = "cellray_cells_seconds"
STORAGE_READ_SECONDS = "cellray_storage_read_seconds"
BATCH_ITEMS = "cellray_batch_items"
BYTES_IN = "cellray_received_bytes"
BYTES_OUT = "cellray_sent_bytes"
CACHE = "cellray_cache_lookups"
REJECTED = "cellray_rejected"

# By name: what it says, its labels, and the buckets of a histogram; a counter has none.
METRICS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    REQUEST_SECONDS: ("HTTP requests, until the answer's last byte is sent", ("route", "status"), SECONDS),
    QUEUE_SECONDS: ("a request's wait for a replica and its batch, with the way there and back", ("model",), SECONDS),
    ENCODER_SECONDS: ("the encoder, a batch", ("model",), SECONDS),
    DECODER_SECONDS: ("the decoder, a batch of prompts", ("model",), SECONDS),
    AUTOMASK_SECONDS: ("all masks of an image", ("model",), SECONDS),
    CELLFINDER_SECONDS: ("the detector of cells, a batch", ("model",), SECONDS),
    CELLS_SECONDS: ("the masks of all cells of an image", ("model",), SECONDS),
    STORAGE_READ_SECONDS: ("an embedding's read from a data set", (), SECONDS),
    BATCH_ITEMS: ("images, or requests for masks, in a batch", ("model", "part"), ITEMS),
    BYTES_IN: ("bytes of bodies that came in", ("route",), ()),
    BYTES_OUT: ("bytes of bodies that went out", ("route",), ()),
    CACHE: ("embeddings found in memory (hit), or read or made (miss), by result", ("result",), ()),
    REJECTED: ("requests that were refused: no key, over the rate, too large, busy", ("reason",), ()),
}


@dataclass
class Spent:
    """What a request's time went to, as its parts add it up; in seconds."""

    queued_s: float = 0.0
    ran_s: float = 0.0


spent: ContextVar[Spent | None] = ContextVar("spent", default=None)  # of the request that this task works for


def observe(name: str, value: float, **labels: str) -> None:
    _metric(name).observe(value, labels)


def count(name: str, value: float = 1, **labels: str) -> None:
    if value > 0:
        _metric(name).inc(value, labels)


def called(model: str, seconds: float, ran_s: float) -> None:
    """A replica has answered after `seconds`, in which its model ran for `ran_s`: the rest was a wait."""
    queued_s = max(0.0, seconds - ran_s)
    observe(QUEUE_SECONDS, queued_s, model=model)
    if request := spent.get():
        request.queued_s += queued_s
        request.ran_s += ran_s


@contextmanager
def timing(name: str, **labels: str) -> Iterator[None]:
    """Observes the seconds of what is inside, also where it fails."""
    start = time.perf_counter()
    try:
        yield
    finally:
        observe(name, time.perf_counter() - start, **labels)


@cache
def _metric(name: str) -> Any:
    from ray.util.metrics import Counter, Histogram

    about, labels, buckets = METRICS[name]
    if buckets:
        return Histogram(name, about, list(buckets), labels)
    return Counter(name, about, labels)


def configure_logging(level: int = logging.INFO) -> None:
    """Times, level and name on stderr. For commands; replicas log through Serve."""
    logging.getLogger("ray.serve").setLevel(level)  # it has a handler of its own
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
