"""A whole slide: read by windows, its tiles' cells joined, its label images written; and a smaller one through the job.

    python -m tests.benchmarks.slides [--side 40000] [--cells 500000] [--job-side 8000]

The slide is a tiled, deflated RGB TIFF of synthetic fields of cells. It is read as CellSAM's tiles are, squares of
512 px that overlap by 112, row by row. The data set has rows as jobs.segment writes them, of discs with 17 to 43 px
across, whose RLE is of the whole slide; `cellray export` makes a tiled TIFF, OME-Zarr and COCO of it, and the TIFF is
compared with the discs. For `join` the tiles see such discs, apart from each other, as if a model had found them; each
is to come out once and whole. Each part runs in a process of its own: `_mb` is the most memory that it held alone.

`job` is `jobs.segment` with a small CellSAM of random weights behind the app, which reads the TIFF by windows; its
`job_mb` is that of the task.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

WANTED = {
    "read_mb": 2000.0,
    "join_mb": 2000.0,
    "job_mb": 2000.0,
    "labels_mb": 2000.0,
    "zarr_mb": 2000.0,
    "coco_mb": 2000.0,
}
FIELD, TILE = 2048, 512  # px
SEEN, STEP = 512, 400  # px: a model's tile, and from one to the next
RADII = range(8, 22)  # px, of discs
ROWS = 4096  # of a batch
CHECKED = 8  # windows of FIELD px
PITCH = 56  # px, from disc to disc where they are apart
PARTS = ("read", "join", "labels", "zarr", "coco", "job")
MODEL = "cells"


def slide(path: Path, side: int) -> None:
    """RGB fields side by side, turned; each of their tiles is compressed once."""
    import tifffile

    from jobs import synthetic

    field = synthetic.field(0, (FIELD, FIELD)).image
    field = np.repeat(field[..., None], 3, axis=2) if field.ndim == 2 else field
    fields = [np.ascontiguousarray(np.rot90(field, turn)) for turn in range(4)]
    per = FIELD // TILE
    packed = {
        (turn, row, column): zlib.compress(
            one[row * TILE : row * TILE + TILE, column * TILE : column * TILE + TILE].tobytes(), 1
        )
        for turn, one in enumerate(fields)
        for row in range(per)
        for column in range(per)
    }
    count = -(-side // TILE)
    tiles = (
        packed[(row // per + column // per) % 4, row % per, column % per]
        for row in range(count)
        for column in range(count)
    )
    tifffile.imwrite(
        path,
        tiles,  # type: ignore[arg-type]
        shape=(side, side, 3),
        dtype=np.uint8,
        tile=(TILE, TILE),
        compression="zlib",
        photometric="rgb",
        bigtiff=True,
        metadata=None,
    )


def discs(side: int, count: int) -> Iterator[tuple[int, int, int]]:
    """(x, y, radius) of each, centres by rows of tiles."""
    random = np.random.default_rng(0)
    spots = random.integers(max(RADII), side - max(RADII), (count, 2))
    radii = random.choice(RADII, count)
    for index in np.lexsort((spots[:, 0] // TILE, spots[:, 1] // TILE)):
        yield int(spots[index, 0]), int(spots[index, 1]), int(radii[index])


def disc(radius: int) -> np.ndarray:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return np.asarray(x * x + y * y <= radius * radius)


class Stamp:
    """A disc's RLE in a square slide: but for the first and the last run it is the same everywhere."""

    def __init__(self, radius: int, side: int) -> None:
        from serve_app.model import masks, rle

        (found,) = masks.encode(disc(radius)[None])
        moved = masks._placed(found, 2 * radius + 1, 0, 0, (side, side))
        self.side, self.runs = side, rle.runs(rle.Texts.of([moved]))[0].tolist()
        first, last = (coded(value) for value in (self.runs[0], self.runs[-1] - self.runs[-3]))
        assert moved.startswith(first)
        assert moved.endswith(last)
        self.middle = moved[len(first) : len(moved) - len(last)]

    def at(self, x: int, y: int) -> str:
        before = x * self.side + y
        return coded(self.runs[0] + before) + self.middle + coded(self.runs[-1] - before - self.runs[-3])


def coded(value: int) -> str:
    """A number as COCO's `rleToString` writes it."""
    text, more = "", True
    while more:
        digit, value = value & 31, value >> 5
        more = value != (-1 if digit & 16 else 0)
        text += chr(48 + digit + 32 * more)
    return text


def data_set(out: Path, side: int, count: int) -> None:
    from cluster.storage import Storage
    from serve_app import dataset
    from serve_app.commit import ShardWriter
    from serve_app.contract import Embedding
    from serve_app.model.masks import MaskSet

    names = {"fingerprint": "f" * 64, "encoder_sha256": "e" * 64, "model": "none", "trained": "false"}
    made = Embedding("id", "image", "none", "e" * 64, (side, side), (1024, 1024), np.zeros((256, 1, 1), np.float16))
    small = {radius: Stamp(radius, side) for radius in RADII}
    spots = list(discs(side, count))
    with ShardWriter(Storage(), str(out), "segment", 0, names) as writer:
        for start in range(0, count, ROWS):
            some = spots[start : start + ROWS]
            number, boxes = len(some), np.array([[x - r, y - r, 2 * r + 1, 2 * r + 1] for x, y, r in some], np.float32)
            areas = np.array([disc(radius).sum() for _, _, radius in some])
            ones, seen = np.ones(number, np.float32), np.zeros((number, 256), np.float32)
            texts = [small[radius].at(x - radius, y - radius) for x, y, radius in some]
            found = MaskSet((side, side), texts, boxes, areas, ones, ones, np.arange(number, dtype=np.int32), seen)
            table = dataset.mask_rows(found, [made] * number, "/in/slide.tif", "", "d" * 64, "cells", ["{}"] * number)
            place = table.column_names.index("mask_index")
            index = np.arange(start, start + number, dtype=np.int32)
            writer.add(dataset.MASKS, table.set_column(place, table.schema.field(place), [index]))
        writer.commit()


def inside(part: str, words: list[str]) -> dict[str, float]:
    """A part in this process."""
    from cluster import memory

    done, most = threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], memory.private_mb())

    watching = threading.Thread(target=watch)
    watching.start()
    begun, figures = time.perf_counter(), dict[str, float]()
    try:
        if part == "read":
            figures["pixels"] = read(Path(words[0]))
        elif part == "join":
            figures["whole"] = join(int(words[0]))
        else:
            from jobs import cli

            assert cli.main(words) == 0
    finally:
        done.set()
        watching.join()
    return figures | {"s": time.perf_counter() - begun, "mb": most[0]}


def read(path: Path) -> float:
    from serve_app.model.slides import Slide

    pixels = 0
    with Slide(path, 1 << 32) as found:
        for row in range(0, found.size[0], STEP):
            for column in range(0, found.size[1], STEP):
                pixels += found.read(slice(row, row + SEEN), slice(column, column + SEEN))[..., 0].size
    return pixels


def join(side: int) -> float:
    """The share of discs that come out of the tiles once, and whole."""
    from serve_app.model import cell_masks, seams
    from serve_app.model.cellsam import Options

    options, count = Options(), side // PITCH
    random = np.random.default_rng(0)
    radii = random.choice(RADII, (count, count))
    spots = PITCH * np.stack(np.mgrid[:count, :count], -1) + PITCH // 2 + random.integers(-5, 6, (count, count, 2))
    places = seams.tiles((side, side), options)
    running, seen = seams.Seams(places, options), np.zeros((count, count), np.int64)
    for place in places:
        for cell in running.add(_seen(place, spots, radii)):
            assert cell.mask is not None
            row, column = ((cell.corner[axis] + cell.mask.shape[axis] // 2) // PITCH for axis in (0, 1))
            whole = (
                cell.mask.shape == (2 * radii[row, column] + 1,) * 2
                and cell.mask.sum() == disc(radii[row, column]).sum()
            )
            seen[row, column] += 1 if whole else 2
            assert cell_masks.outlined([cell], (side, side)).areas[0] == cell.mask.sum()
    return float((seen == 1).mean())


def _seen(place: Any, spots: np.ndarray, radii: np.ndarray) -> Any:
    """What a model would answer that finds all that there is in a tile."""
    from serve_app.model.cell_masks import Cells

    rows, columns = place.seen
    margin = 64
    labels = np.zeros((rows.stop - rows.start + 2 * margin, columns.stop - columns.start + 2 * margin), np.int32)
    first, last = ([max(0, getattr(one, end) // PITCH - 1) for one in place.seen] for end in ("start", "stop"))
    near = slice(first[0], last[0] + 3), slice(first[1], last[1] + 3)
    boxes: list[list[float]] = []
    for (y, x), radius in zip(spots[near].reshape(-1, 2), radii[near].ravel(), strict=True):
        top, left = y - radius - rows.start + margin, x - radius - columns.start + margin
        width = 2 * radius + 1
        if min(top, left) < 0 or top + width > labels.shape[0] or left + width > labels.shape[1]:
            continue
        labels[top : top + width, left : left + width][disc(radius)] = len(boxes) + 1
        boxes.append([left - margin, top - margin, left - margin + width, top - margin + width])
    labels = labels[margin:-margin, margin:-margin]
    there = np.unique(labels[labels > 0])
    numbers = np.zeros(len(boxes) + 1, np.int32)
    numbers[there] = np.arange(1, len(there) + 1)
    ones = np.ones(len(there), np.float32)
    found = np.array(boxes, np.float32).reshape(-1, 4)[there - 1]
    return Cells(numbers[labels], found, ones, ones, np.zeros((len(there), 256), np.float32))


def job(folder: Path, side: int) -> dict[str, float]:
    """jobs.segment on a slide of `side` px with random weights."""
    import yaml
    from safetensors.torch import save_file

    from cluster import session
    from jobs import segment
    from tests import cellsam_oracle

    slide(folder / "slide.tif", side)
    config, out = folder / "cellray.yaml", folder / "cells"
    save_file(cellsam_oracle.weights(cellsam_oracle.NANO), folder / "model.safetensors")
    model = {"source": str(folder / "model.safetensors"), "cells": True}
    config.write_text(yaml.safe_dump({"models": {MODEL: model}, "limits": {"image_pixels": 1 << 22}}))
    made = yaml.safe_load(Path("deploy/serve.local.yaml").read_text())
    (application,) = made["applications"]
    application["args"] = {"models": [MODEL], "config": str(config)}
    names = ["ingress", *(f"{MODEL}-{part}" for part in ("encoder", "decoder", "cellfinder"))]
    application["deployments"] = [{"name": name, "ray_actor_options": {"num_cpus": 0}} for name in names]
    with session.local(made, print):
        arguments = ["--model", MODEL, "--config", str(config), "--bbox-threshold", "0.82", "--parallel", "1"]
        assert segment.main([str(folder / "slide.tif"), str(out), *arguments]) == 0
    said = json.loads((out / "_report-segment.json").read_text())
    tiles, seconds = said["encoder_calls"], said["seconds"]
    figures = {"job_tiles": tiles, "job_cells": said["masks"], "job_errors": said["errors"], "job_s": seconds}
    return figures | {"job_mb": said["task_memory_mb"], "job_driver_mb": said["driver_memory_mb"]}


def check(path: Path, side: int, count: int) -> float:
    """The share of pixels, of some windows of a label image, that are as the discs are: of those that overlap, the
    smallest shows, of equal ones the last."""
    from serve_app.model.slides import Slide

    spots, random, same = np.array(list(discs(side, count))), np.random.default_rng(1), []
    with Slide(path, 1 << 32) as found:
        for _ in range(CHECKED):
            x, y = random.integers(0, max(1, side - FIELD), 2)
            window = found.read(slice(y, y + FIELD), slice(x, x + FIELD))[..., 0]
            expected = np.pad(np.zeros_like(window), 64)
            near = np.flatnonzero((np.abs(spots[:, :2] - [x, y] - FIELD // 2) < FIELD // 2 + 42).all(axis=1))
            for index in near[np.argsort(-spots[near, 2], kind="stable")]:
                left, top, radius = spots[index] - [x - 64, y - 64, 0]
                shape = disc(radius)
                there = expected[top - radius : top + radius + 1, left - radius : left + radius + 1]
                there[shape[: len(there), : there.shape[1]]] = index + 1
            same.append(float((expected[64:-64, 64:-64] == window).mean()))
    return float(np.mean(same))


def own(part: str, *words: object) -> dict[str, float]:
    """A part in a process of its own, for its memory."""
    command = [sys.executable, "-m", __spec__.name, "--inside", part, *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        print(json.dumps(inside(sys.argv[2], sys.argv[3:])))
        return
    from tests.benchmarks.nano import report  # imports torch, which is no part of the memory above

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=40_000, help="of the slide, px (default: %(default)s)")
    parser.add_argument("--cells", type=int, default=500_000, help="of the data set (default: %(default)s)")
    parser.add_argument("--job-side", type=int, default=8000, help="of the job's slide, px (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="(default: all of them)")
    arguments = parser.parse_args()
    side, cells, figures = arguments.side, arguments.cells, dict[str, float]()
    with tempfile.TemporaryDirectory(prefix="cellray-slides-") as name:
        folder = Path(name)
        if "read" in arguments.only:
            slide(folder / "slide.tif", side)
            size = (folder / "slide.tif").stat().st_size
            found = own("read", folder / "slide.tif")
            print(f"{side} × {side} × 3, {size / 1e6:.0f} MB: read in {found['s']:.0f} s", flush=True)
            figures |= {"read_mb": found["mb"], "read_s": found["s"], "read_mpx_s": found["pixels"] / found["s"] / 1e6}
            (folder / "slide.tif").unlink()
        if "join" in arguments.only:
            found = own("join", side)
            figures |= {"join_whole": found["whole"], "join_mb": found["mb"], "join_s": found["s"]}
            print(f"tiles of {side} × {side} joined in {found['s']:.0f} s", flush=True)
        exports = [part for part in ("labels", "zarr", "coco") if part in arguments.only]
        if exports:
            data_set(folder / "out", side, cells)
            print(f"a data set of {cells:,} masks", flush=True)
        for part in exports:
            to = folder / ("coco.json" if part == "coco" else part)
            kind = "zarr-labels" if part == "zarr" else part
            found = own(part, "export", folder / "out", "--to", kind, to)
            figures |= {f"{part}_mb": found["mb"], f"{part}_s": found["s"]}
            print(f"{part}: {found['s']:.0f} s", flush=True)
            if part == "labels":
                figures["labels_file_mb"] = (to / "slide.tif").stat().st_size / 1e6
                figures["labels_as_drawn"] = check(to / "slide.tif", side, cells)
        if "job" in arguments.only:
            figures |= job(folder, arguments.job_side)
    report("slides", figures, WANTED | {"labels_as_drawn": 1.0, "join_whole": 1.0})


if __name__ == "__main__":
    main()
