"""Noise, optics and the sensor of a synthetic field.

What is computed for each pixel is +, -, *, / and square roots in float32 or exp in float64, never a float32
transcendental or a matrix product: those differ in their last bit between processors, and these bytes must not.
"""

from __future__ import annotations

import io
import math
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from jobs.synthetic.layout import Plane, Size

Planes = npt.NDArray[np.float32]  # [C, h, w], light, 1 = the sensor's full well
TILE = 512  # px, a power of two: coordinates wrap by a mask
LEVELS = 7  # grain of 1, 2, 4, … 64 px
DEPTH = 4095  # a 12-bit converter


@cache
def _tiles() -> npt.NDArray[np.float32]:
    """[LEVELS, TILE, TILE] noise that wraps around, mean 0, deviation 1, each level of twice the grain."""
    white = np.random.Generator(np.random.PCG64(0)).standard_normal((LEVELS, TILE, TILE), np.float32)
    for level, tile in enumerate(white):
        smooth = blur(tile, 0.6 * 2**level, mode="wrap")
        tile[:] = (smooth - smooth.mean()) / smooth.std()
    return white


def noise(rng: np.random.Generator, size: Size, grain: float, stretch: float = 1.0) -> Plane:
    """[h, w] of mean about 0 and deviation about 1, with blobs of `grain` px, drawn out by `stretch` at some angle."""
    level = min(max(round(math.log2(max(grain * math.sqrt(stretch), 1))), 0), LEVELS - 1)
    step, turn = 2.0**level / grain, rng.uniform(0, 2 * math.pi)
    y, x = np.arange(size[0])[:, None], np.arange(size[1])[None]
    c, s = step * math.cos(turn), step * math.sin(turn)
    rows = (c * y - s * x) / stretch + (8 * TILE * TILE + rng.uniform(0, TILE))
    columns = s * y + c * x + (8 * TILE * TILE + rng.uniform(0, TILE))
    tile: Plane = _tiles()[level]
    return tile[rows.astype(np.int32) & (TILE - 1), columns.astype(np.int32) & (TILE - 1)]


def blur(plane: Plane, sigma: float, mode: str = "nearest") -> Plane:
    """A Gaussian, or where it is wide three boxes of its variance, whose cost does not grow with their width."""
    if sigma < 2:
        return np.asarray(ndimage.gaussian_filter(plane, sigma, mode=mode, truncate=3))
    width = round(math.sqrt(4 * sigma * sigma + 1))
    for _ in range(3):
        plane = ndimage.uniform_filter(plane, width, mode=mode)
    return plane


def expose(rng: np.random.Generator, light: Planes, detail: float, bright: bool) -> npt.NDArray[np.uint16]:
    """[C, h, w] light → [C, h, w] counts, 0..DEPTH: focus, illumination, exposure, shot and read noise, saturation.

    `detail` px is the smallest thing that the blur must leave visible; `bright` fields keep their level.
    """
    height, width = size = light.shape[1:]
    focus = min(rng.choice([0.5, 0.8, 1.2, 2.5], p=[0.35, 0.3, 0.2, 0.15]) * rng.uniform(0.8, 1.3), 0.2 * detail)
    seen: npt.NDArray[np.floating] = np.stack([blur(plane, max(focus, 0.35)) for plane in light])
    if rng.random() < 0.08:  # a tilted specimen: one side out of focus
        soft, tilt = np.stack([blur(plane, 0.2 * detail + 1) for plane in light]), noise(rng, size, width / 4)
        seen += np.clip(tilt + np.float32(0.3), 0, 1) * (soft - seen)
    if not bright and rng.random() < 0.4:  # light scattered in the glass and by other planes
        seen += rng.uniform(0.05, 0.3) * np.stack([blur(plane, rng.uniform(1, 3) * detail + 4) for plane in light])
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)[None]
    (a, b), falloff = rng.normal(0, rng.choice([0.02, 0.2]), 2).tolist(), rng.choice([0.0, 0.1, 0.4]) * rng.random()
    seen *= np.clip(1 + a * y + b * x - falloff * (y * y + x * x), np.float32(0.3), 2)
    if bright:
        seen /= max(1.0, float(np.percentile(seen, 99)) * rng.choice([0.9, 1.0]))
    else:  # exposed for its own brightest structures; some too long, some far too short
        most = np.maximum(np.percentile(seen, 99.5, axis=(1, 2)), 0.5 * seen.max(axis=(1, 2))).astype(np.float32)
        seen /= most[:, None, None] + np.float32(0.02)
        seen *= rng.choice([0.3, 0.7, 0.95, 1.4], p=[0.12, 0.33, 0.4, 0.15]) * rng.uniform(0.8, 1.1)
        seen += np.float32(rng.choice([0.01, 0.05, 0.15]) * rng.random())
    well = np.float32(math.exp(rng.uniform(math.log(100), math.log(8000))))  # electrons at full scale
    grain = rng.standard_normal(seen.shape, np.float32)
    if rng.random() < 0.25:  # resampled or compressed on the way: noise of neighbours is alike
        grain = ndimage.uniform_filter(grain, (0, 2, 2)) * np.float32(1.6)
    root = np.sqrt(np.maximum(seen, 0) * well) + grain / 2  # the square of this is close to Poisson
    root = np.maximum(root, 0)
    seen = root * root / well
    seen += np.float32(rng.choice([0.003, 0.01, 0.03], p=[0.5, 0.4, 0.1])) * rng.standard_normal(seen.shape, np.float32)
    if rng.random() < 0.1:
        for _ in range(rng.integers(1, 20)):  # hot pixels
            seen[:, rng.integers(height), rng.integers(width)] = rng.uniform(0.6, 1)
    return np.rint(np.clip(seen, 0, 1) * DEPTH).astype(np.uint16)


def develop(
    rng: np.random.Generator, counts: npt.NDArray[np.uint16], colours: npt.ArrayLike, bright: bool
) -> npt.NDArray[np.uint8]:
    """[C, h, w] counts and [C, 3] colours 0..1 → [h, w, 3] uint8: black point, gamma, composite, inversion, JPEG."""
    curve = np.linspace(0, 1, DEPTH + 1)
    if not bright and rng.random() < 0.6:  # displays start at the background
        floor = float(np.percentile(counts, rng.uniform(0.1, 20))) / DEPTH
        curve = np.clip((curve - floor) / max(1 - floor, 0.1), 0, 1)
    curve = curve ** rng.choice([1.0, rng.uniform(0.45, 1.3)])
    shades = (255 * curve).astype(np.float32)[counts]
    tints = np.asarray(colours, np.float32)
    if len(shades) == 1 and np.ptp(tints) == 0:
        grey = np.rint(shades[0]).astype(np.uint8)
        image = np.stack([grey] * 3, -1)
    else:
        mixed = sum(shade[..., None] * tint for shade, tint in zip(shades, tints, strict=True))
        image = np.rint(np.clip(mixed, 0, 255)).astype(np.uint8)
    if rng.random() < 0.12 and not (bright and len(shades) == 3):
        image = 255 - image
    if rng.random() < 0.03:  # a scale bar
        height, width = image.shape[:2]
        image[height - height // 12 :, -width // 3 : -width // 20][: max(2, height // 60)] = rng.choice([0, 255])
    if rng.random() < 0.15:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(rng.integers(25, 90)))
        image = np.array(Image.open(buffer))
    return image
