"""`--dry-run`: what a job would read, write, take and cost, from its listing and a sample that is run and not kept."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from cluster.errors import CellrayError
from cluster.settings import Limits
from cluster.storage import Storage
from jobs import images
from jobs.images import Entry
from jobs.plan import Listing
from jobs.shards import run

SAMPLE, HEADERS = 32, 16  # images: run for each task at a time, and looked at
UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True)
class Rate:
    """What running a sample showed."""

    images: int
    errors: int
    masks: int
    bytes_written: int
    images_per_second: float


def spread(count: int, whole: int) -> list[int]:
    """`count` numbers below `whole`, or all of them, evenly."""
    chosen = min(count, whole)
    return [index * whole // chosen for index in range(chosen)]


def measure(task: Any, arguments: tuple[Any, ...], shards: Sequence[Sequence[Any]]) -> Rate:
    """Run the job's task on some sources, all at a time; twice, the first time to warm up. Nothing is kept."""
    for _ in range(2):
        started = time.perf_counter()
        done = run(task, arguments, range(len(shards)), shards.__getitem__, len(shards), lambda _: True)
        seconds = time.perf_counter() - started

    def total(name: str) -> int:
        return sum(getattr(progress, name) for progress in done)

    count = total("images")
    return Rate(count, total("errors"), total("masks"), total("bytes_written"), count / seconds)


def sizes(storage: Storage, entries: Sequence[Entry], limits: Limits) -> list[tuple[int, int]]:
    """(width, height) of those whose header says so; of a file, no more than that is read."""
    found = []
    for entry in entries:
        try:
            source = (
                io.BytesIO(images.content(storage, entry, limits.image_bytes))
                if entry.container
                else storage.open(entry.uri)
            )
            with source, Image.open(source) as header:
                found.append(header.size)
        except (CellrayError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    return found


def lines(
    listing: Listing,
    shapes: Sequence[tuple[int, int]],
    rate: Rate,
    replicas: dict[str, int],
    price: float | None,
) -> list[str]:
    """For people, a fact each."""
    good = max(rate.images, 1)
    seconds, written = listing.images / rate.images_per_second, rate.bytes_written / good * listing.images
    said = [f"images     {listing.images:,} in {len(listing):,} shards of at most {listing.shard_images}"]
    said.append(f"input      {amount(listing.bytes)}" if listing.bytes else "input      of unknown size")
    if shapes:
        shapes = sorted(shapes, key=lambda shape: shape[0] * shape[1])
        least, middle, most = (f"{w} × {h}" for w, h in (shapes[0], shapes[len(shapes) // 2], shapes[-1]))
        said.append(f"sizes      {least} to {most} px, median {middle}, by {len(shapes)} headers")
    masks = f" and {rate.masks / good:.1f} masks" if rate.masks else ""
    said.append(f"output     about {amount(written)}: {amount(rate.bytes_written / good)}{masks} an image")
    said.append(
        f"rate       {rate.images_per_second:.2f} img/s on {rate.images} images, {rate.errors} of them errors, with "
        + (", ".join(f"{name} × {count}" for name, count in replicas.items()) or "no replicas")
    )
    said.append(f"time       about {duration(seconds)} at that rate; more replicas take less")
    if price is not None:
        cost = price * sum(replicas.values()) * seconds / 3600
        each = 1000 * cost / listing.images
        said.append(f"cost       ${cost:,.2f}, ${each:,.3f} per 1,000 images, at ${price:g} an hour for each replica")
    return said


def amount(size: float) -> str:
    """Bytes, in the unit that gives a number under 1000."""
    for unit in UNITS[:-1]:
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} {UNITS[-1]}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
