"""What the jobs do with very many images, and the decoder with bombs.

    python -m tests.benchmarks.scale [--only tiny listing bombs index cluster] [--images 100000] [--keys 10000000]

tiny: PNGs of 16 px, files in a folder, through jobs.embed with a null encoder that answers [256, 4, 4], then `cellray
verify`; the driver's memory is the most that it held alone. It takes a quarter of an hour, and has to be asked for.
listing: a job's listing of so many keys, from a storage that makes them up; the most that its process ever held.
index: the service's index of a data set with as many embeddings as keys: what its process holds more than before, an
embedding, and the time in which one is found by its id, and by its image.
cluster: tests/benchmarks/scale_cluster.py; it has to be asked for, too.
bombs: the CPU time in which the slowest of tests/bad_images.py is refused, and the most memory that one took.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster.storage import File
from tests.bad_images import peak_mb

PARTS = ("tiny", "listing", "bombs", "index", "cluster")
WANTED = {
    "tiny_driver_mb": 500.0,
    "tiny_verify_mb": 500.0,
    "listing_10m_mb": 1000.0,
    "bomb_ms": 100.0,
    "index_bytes_image": 24.0,
}
SIDE, INPUT = 16, 64  # px: of the images, and of the null model, whose embeddings are then [256, 4, 4]
A_FOLDER = 1000
A_KEY_BYTES = 1_500_000
TIMEOUT_S = 7200


class Lister:
    """As much of a Storage as a listing needs: a bucket of `count` keys that nobody has to hold."""

    def __init__(self, count: int) -> None:
        self.count = count

    def list(self, uri: str) -> Iterator[File]:
        for index in range(self.count):
            plate, well = divmod(index, 384)
            yield File(f"{uri}/2026-11/plate-{plate:06d}/well-{well:03d}_site-1_channel-2.tif", A_KEY_BYTES + index)


def own(part: str, *arguments: object) -> dict[str, Any]:
    """A part in a process of its own, for its memory."""
    words = [sys.executable, "-m", __spec__.name, "--inside", part, *map(str, arguments)]
    done = subprocess.run(words, check=True, timeout=TIMEOUT_S, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def inside(part: str, argument: str) -> dict[str, Any]:
    """Imports no more than the job's own process does."""
    if part == "index":
        return index(int(argument))
    from jobs import cli, images
    from jobs.plan import DEFAULT_SHARD_IMAGES, Listing

    before, start = peak_mb(), time.perf_counter()
    if part == "verify":
        code = cli.main(["verify", argument])
        return {"code": code, "mb": peak_mb(), "seconds": time.perf_counter() - start}
    listing = Listing(images.find(Lister(int(argument)), "s3://plates"), DEFAULT_SHARD_IMAGES)  # type: ignore[arg-type]
    last = listing.shard(len(listing) - 1)[-1]
    assert last.size == A_KEY_BYTES + int(argument) - 1, last
    return {"mb": peak_mb(), "before_mb": before, "seconds": time.perf_counter() - start}


def index(rows: int) -> dict[str, Any]:
    from cluster.memory import private_mb
    from cluster.storage import Storage
    from serve_app.dataset import EMBEDDINGS, MAX_ROWS_A_FILE, Record, ShardFile
    from serve_app.index import Index

    def records() -> Iterator[Record]:
        for first in range(0, rows, MAX_ROWS_A_FILE):
            shard, numbers = first // MAX_ROWS_A_FILE, range(first, min(rows, first + MAX_ROWS_A_FILE))
            file = ShardFile(EMBEDDINGS, f"embeddings/embed-000-{shard:06d}.parquet", len(numbers), 1, "")
            digests = tuple(f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}" for number in numbers)
            yield Record("embed", 0, shard, "", "", (file,), tuple(map(str, numbers)), digests)

    made, before, start = Index("s3://plates/out", Storage()), private_mb(), time.perf_counter()
    made.add(records())
    seconds, held = time.perf_counter() - start, private_mb() - before
    asked = np.random.default_rng(0).integers(0, rows, 10_000).tolist()
    start = time.perf_counter()
    found = [made.by_id(str(number)) for number in asked]
    spent = time.perf_counter() - start
    for number, places in zip(asked, found, strict=True):
        assert any(divmod(number, MAX_ROWS_A_FILE) == (int(one.uri[-14:-8]), one.row) for one in places), number
    return {"bytes": held * 2**20 / rows, "us": 1e6 * spent / len(asked), "rows_s": rows / seconds, "mb": peak_mb()}


def on_tiny(temporary: Path, count: int) -> dict[str, float]:
    from cluster import session
    from serve_app import dataset
    from tests.benchmarks import pipeline

    rng = np.random.default_rng(0)
    for index in range(count):
        folder = temporary / "images" / f"{index // A_FOLDER:04d}"
        if index % A_FOLDER == 0:
            folder.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)).save(folder / f"{index:06d}.png")
    pipeline.say(f"{count} images are written")
    config, out = temporary / "plain.yaml", str(temporary / "out")
    config.write_text("{}")
    with session.local(pipeline.app(pipeline.NULL, side=INPUT), pipeline.say):
        source = str(temporary / "images")
        rows = dataset.MAX_ROWS_A_FILE
        found, spent = pipeline.job(source, out, pipeline.NULL, count, str(config), rows, TIMEOUT_S)
    assert dataset.open(out).rows(dataset.EMBEDDINGS) == count
    checked = own("verify", out)
    assert checked["code"] == 0
    return {
        "tiny_driver_mb": found["driver_memory_mb"],
        "tiny_task_mb": found["task_memory_mb"],
        "tiny_verify_mb": checked["mb"],
        "tiny_img_s": found["images_per_second"],
        "tiny_cpu_ms_image": 1000 * spent / count,
        "tiny_job_seconds": found["seconds"],
        "tiny_verify_seconds": checked["seconds"],
    }


def on_listing(_: Path, keys: int) -> dict[str, float]:
    found = own("listing", keys)
    return {
        "listing_10m_mb": found["mb"],
        "listing_before_mb": found["before_mb"],
        "listing_seconds": found["seconds"],
        "listing_keys_s": keys / found["seconds"],
    }


def on_index(_: Path, rows: int) -> dict[str, float]:
    found = own("index", rows)
    return {
        "index_bytes_image": found["bytes"],
        "index_lookup_us": found["us"],
        "index_rows_s": found["rows_s"],
        "index_peak_mb": found["mb"],
    }


def on_bombs(*_: object) -> dict[str, float]:
    words = [sys.executable, "-m", "tests.bad_images", "bombs"]
    text = subprocess.run(
        words, check=True, timeout=TIMEOUT_S, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ).stdout
    found = json.loads(text)
    return {
        "bomb_ms": max(ms for _, ms, _ in found.values()),
        "bomb_mb": max(mb for *_, mb in found.values()),
        "bombs": len(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS[1:4], help="(default: %(default)s)")
    parser.add_argument("--images", type=int, default=100_000, help="(default: %(default)s)")
    parser.add_argument("--keys", type=int, default=10_000_000, help="(default: %(default)s)")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(inside(*arguments.inside)))
        return
    from tests.benchmarks import scale_cluster

    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="cellray-bench-") as temporary:
        parts = (on_tiny, on_listing, on_bombs, on_index, scale_cluster.on_cluster)
        sizes = (arguments.images, arguments.keys, 0, arguments.keys, 0)
        for name, part, size in zip(PARTS, parts, sizes, strict=True):
            if name in arguments.only:
                figures |= part(Path(temporary), size)
    from tests.benchmarks.nano import report

    report("scale", figures, WANTED | scale_cluster.WANTED)


if __name__ == "__main__":
    main()
