"""Synthetic microscopy: fields of cells with their instance labels, drawn from a seed. To train and to test on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from cluster.errors import InvalidInput
from cluster.storage import mapped
from jobs.synthetic.camera import DEPTH, develop, expose
from jobs.synthetic.layout import Layout, Size
from jobs.synthetic.scenes import KINDS

EMPTY = "empty"
EMPTY_SHARE = 0.02  # of fields whose kind is not asked for
SIDES = 16, 4096  # px
NAMES = (*KINDS, EMPTY)


@dataclass(frozen=True)
class Field:
    """`image` [h, w, 3] uint8, or [h, w, C] uint16 (C = 1, 2 or 3); `labels` [h, w] int32, 0 and 1..N."""

    image: npt.NDArray[Any]
    labels: npt.NDArray[np.int32]
    kind: str


def field(seed: int, size: Size = (256, 256), kind: str | None = None, dtype: str = "uint8") -> Field:
    """A field of `size` (height, width) px; the same arguments give the same bytes on every machine.

    Args:
        kind: one of NAMES, drawn from the seed where it is None. `empty` has dirt and no objects.
        dtype: `uint8` as a display shows it, RGB; `uint16` as the camera counts, a channel a dye, 0..65535.

    Every label is one 4-connected piece of at least 9 px. Raises InvalidInput.
    """
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise InvalidInput(f"seed {seed!r}: expected a whole number from 0")
    if len(size) != 2 or any(side not in range(SIDES[0], SIDES[1] + 1) or isinstance(side, float) for side in size):
        raise InvalidInput(f"size {size}: expected height and width from {SIDES[0]} to {SIDES[1]} px")
    if kind not in (None, *NAMES):
        raise InvalidInput(f"kind {kind!r}: expected one of {', '.join(NAMES)}")
    if dtype not in ("uint8", "uint16"):
        raise InvalidInput(f"dtype {dtype!r}: expected uint8 or uint16")
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = EMPTY if rng.random() < EMPTY_SHARE else list(KINDS)[rng.integers(len(KINDS))]
    kind = kind or drawn
    lays, lights = KINDS[list(KINDS)[rng.integers(len(KINDS))] if kind == EMPTY else kind]
    light = lights[rng.integers(len(lights))]
    layout = lays[rng.integers(len(lays))](rng, size)
    while not layout.items:
        layout = lays[rng.integers(len(lays))](rng, size)
    if kind == EMPTY:
        layout = Layout(size, layout.radius)
    scene = light(rng, layout)
    counts = expose(rng, scene.light, layout.radius, scene.bright)
    if dtype == "uint16":
        image: npt.NDArray[Any] = np.moveaxis(counts, 0, -1) * np.uint16(65535 // DEPTH)
    else:
        image = develop(rng, counts, scene.colours, scene.bright)
    return Field(np.ascontiguousarray(image), layout.labels, kind)


def write(out: Path, images: int, seed: int, size: Size, kind: str | None, dtype: str, done: Callable[[], Any]) -> int:
    """Write `images` fields of the seeds from `seed` on: out/images/KIND_SEED.png (.tif for uint16), channels first,
    and out/labels/KIND_SEED.png, uint16. → how many instances. `done()` is called after each.

    Both folders appear whole or not at all. Raises InvalidInput where `out` is no empty folder.
    """
    if images < 1:
        raise InvalidInput(f"--images {images}: expected at least 1")
    with mapped(str(out)):
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise InvalidInput(f"{out} is not an empty folder: name a new one")
        part, instances = out / ".part", 0
        try:
            for name in ("images", "labels"):
                (part / name).mkdir(parents=True)
            for each in range(seed, seed + images):
                made = field(each, size, kind, dtype)
                name = f"{made.kind}_{each:06d}"
                if dtype == "uint8":
                    Image.fromarray(made.image).save(part / "images" / f"{name}.png")
                else:
                    planes = np.moveaxis(made.image, -1, 0)
                    tifffile.imwrite(
                        part / "images" / f"{name}.tif", planes, photometric="minisblack", metadata=None, software=False
                    )
                Image.fromarray(made.labels.astype(np.uint16)).save(part / "labels" / f"{name}.png")
                instances += int(made.labels.max())
                done()
            for name in ("images", "labels"):
                (part / name).rename(out / name)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return instances
