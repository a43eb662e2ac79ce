"""Pixels as CellSAM wants them, step by step, and the thresholds that it was tuned with.

An image goes through `Pixels`, tile by tile, in its own size. What the image encoder and the detector are given is made
of that in `cellsam_inputs`.

Source of all steps and numbers: CellSAM (vanvalenlab/cellSAM, 2025-11), as read and as run beside this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np

from cluster.errors import InvalidImage, InvalidInput, InvalidSettings
from serve_app.model.preprocess import Size

PREPROCESS = "cellsam-1"
CHANNELS = 3  # red, green, blue; or nothing, nuclei, whole cells
BRIGHTEST = 99.9  # percentile of a channel's pixels above 0; what is brighter is cut off
KERNEL = 128  # pixels: contrast is equalised over squares of this
BLOCK_SIZES = 64, 4096  # pixels


@dataclass(frozen=True)
class Options:
    """Named as in `cellsam_pipeline`.

    bbox_threshold: boxes need a score above a threshold that moves with this one, 0–1; lower finds more cells.
    low_contrast_enhancement: brighten images of little contrast first.
    use_wsi: cut images that are larger than `block_size` into tiles of that many pixels a side, each seen with
        `overlap` more on all sides; parts of a cell join where they overlap by an IoU of `iou_threshold` or more.
    gauge_cell_size: after the tiles, images whose median cell is not small are done again as a whole.
    compat: as `cellsam_pipeline` does it where we do better: tiles at the border see the opposite edge beyond it, of
        images that fit a block too; without tiles bbox_threshold is 0.4 whatever is given.
    """

    bbox_threshold: float = 0.4
    low_contrast_enhancement: bool = False
    use_wsi: bool = True
    gauge_cell_size: bool = False
    block_size: int = 400
    overlap: int = 56
    iou_threshold: float = 0.5
    compat: bool = False

    def check(self) -> None:
        """Raises InvalidInput: names the first that is out of its range."""
        if not 0 <= self.bbox_threshold <= 1:
            raise InvalidInput(f"bbox_threshold is {self.bbox_threshold:g}; expected 0 to 1")
        if not 0 < self.iou_threshold <= 1:
            raise InvalidInput(f"iou_threshold is {self.iou_threshold:g}; expected above 0, at most 1")
        least, most = BLOCK_SIZES
        if not least <= self.block_size <= most:
            raise InvalidInput(f"block_size is {self.block_size}; expected {least} to {most} pixels")
        if not 0 <= self.overlap <= self.block_size // 2:
            raise InvalidInput(f"overlap is {self.overlap}; expected 0 to half of block_size, {self.block_size // 2}")


class Windows(Protocol):
    """An image that is read part by part."""

    @property
    def size(self) -> Size:
        """(height, width)."""
        ...

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """[h, w] or [h, w, 1 to 3] of any number type."""
        ...


class Pixels:
    """An image's pixels as `normalise` gives them, tile by tile. `size` is (height, width); `bbox_threshold` that of
    the options, or what `enhance` takes in its place."""

    def __init__(self, image: np.ndarray | Windows, options: Options) -> None:
        """image: as `channels` has it; or one to be read in windows, of which few are held.

        Raises:
            InvalidImage: of another shape, or not finite. InvalidInput: an option is out of its range, or it needs an
                image in windows as a whole.
        """
        options.check()
        self.image, self.bbox_threshold = image, options.bbox_threshold
        if options.compat and not options.use_wsi:
            self.bbox_threshold = Options.bbox_threshold
        if isinstance(image, np.ndarray):
            self.size: Size = image.shape[:2] if image.ndim >= 2 else (0, 0)
            self.extremes = extremes(image)
            if options.low_contrast_enhancement:
                self.image, threshold = enhance(channels(image, self.extremes))
                self.extremes = np.array([[0, 1]] * CHANNELS, np.float32)
                self.bbox_threshold = options.bbox_threshold if threshold is None else threshold
            return
        if options.low_contrast_enhancement:
            raise InvalidInput("low_contrast_enhancement looks at a whole image, and this one is too large for it")
        if options.compat:
            raise InvalidInput("compat needs a whole image, and this one is too large for it")
        self.size = image.size
        found = np.array(list(_extremes(image, options.block_size)))
        self.extremes = np.stack([found[..., 0].min(0), found[..., 1].max(0)], 1)

    @property
    def whole(self) -> tuple[slice, slice]:
        return slice(0, self.size[0]), slice(0, self.size[1])

    def tile(self, place: tuple[slice, slice]) -> np.ndarray:
        """[h, w, 3] float32 in 0–1. What lies beyond an edge is read from the opposite one."""
        if not isinstance(self.image, np.ndarray):
            seen = self.image.read(*place)
        elif any(one.start < 0 or one.stop > side for one, side in zip(place, self.size, strict=True)):
            y, x = (np.arange(one.start, one.stop) % side for one, side in zip(place, self.size, strict=True))
            seen = self.image[np.ix_(y, x)]
        else:
            seen = self.image[place]
        return normalise(channels(seen, self.extremes))


def _extremes(image: Windows, side: int) -> Iterator[np.ndarray]:
    """`extremes` of windows of `side` pixels; damaged ones are left out, unless all are: their tiles will say so."""
    (height, width), problem, sound = image.size, None, False
    for top, left in product(range(0, height, side), range(0, width, side)):
        try:
            yield extremes(image.read(slice(top, min(top + side, height)), slice(left, min(left + side, width))))
            sound = True
        except InvalidImage as error:
            problem = error
    if problem and not sound:
        raise problem


def extremes(image: np.ndarray) -> np.ndarray:
    """An image as `channels` has it → [3, 2] float32, the least and greatest value of each channel. Raises as that."""
    planes = image[..., None] if image.ndim == 2 else image
    if planes.ndim != 3 or not 1 <= planes.shape[2] <= CHANNELS or 0 in planes.shape or planes.dtype.kind not in "buif":
        raise InvalidImage(f"expected [h, w] or [h, w, 1 to 3] numbers, found {list(image.shape)} {image.dtype}")
    found = np.zeros((CHANNELS, 2), np.float32)
    found[CHANNELS - planes.shape[2] :] = np.stack([planes.min((0, 1)), planes.max((0, 1))], 1)
    if not np.isfinite(found).all():
        raise InvalidImage("the image has values that are not finite (NaN or infinite)")
    return found


def channels(image: np.ndarray, between: np.ndarray | None = None) -> np.ndarray:
    """[h, w] grey, or [h, w, C] with C from 1 to 3, of any number type → [h, w, 3] float32, each channel from 0 to 1
    `between` its own minimum and maximum, or those that are given, as `extremes` has them for what this is a part of.
    Grey is the last channel; of two, the first are nuclei and the second whole cells.

    Raises:
        InvalidImage: of another shape, or with values that are not finite.
    """
    between = extremes(image) if between is None else between
    planes = image[..., None] if image.ndim == 2 else image
    placed = np.zeros((*planes.shape[:2], CHANNELS), np.float32)
    placed[..., CHANNELS - planes.shape[2] :] = planes
    for index, (low, high) in enumerate(between):
        if high > low:
            placed[..., index] = (placed[..., index] - low) / (high - low)
    return placed


def normalise(image: np.ndarray) -> np.ndarray:
    """[h, w, 3] float, from 0 → [h, w, 3] float32 in 0–1: per channel the brightest pixels are cut off, then contrast
    is equalised (CLAHE); a channel of one value becomes 0."""
    exposure = _exposure()
    equalised = np.zeros(image.shape, np.float32)
    for index in range(CHANNELS):
        plane = image[..., index].astype(np.float64)
        above = plane[plane != 0]
        if not above.size:
            continue
        plane = np.minimum(plane, np.percentile(above, BRIGHTEST))
        if (plane == plane.flat[0]).all():
            continue
        plane = exposure.rescale_intensity(plane, out_range=(0.0, 1.0))
        equalised[..., index] = exposure.equalize_adapthist(plane, kernel_size=KERNEL)
    return equalised


def enhance(image: np.ndarray) -> tuple[np.ndarray, float | None]:
    """[h, w, 3] float32 in 0–1 → the same, brighter where its contrast is low, and then the bbox_threshold that CellSAM
    takes for such an image in place of what was asked for.

    How low is measured by what CLAHE changes: the median, and the standard deviation, of the changed values.
    """
    exposure = _exposure()
    changed = np.abs(image - exposure.equalize_adapthist(image, kernel_size=256))
    changed = changed[changed > 0]
    if not changed.size:
        return image, None
    middle, spread = np.median(changed), np.std(changed)
    low = 0.05 < middle < 0.1
    if middle < 0.05:
        low = low and image[..., 1].max() == 0
    if not low:
        return image, None
    limit, kernel, gamma, threshold = 0.01, 256, 2.0, None
    if middle > 0.05 and spread < 0.05:
        limit, kernel, gamma, threshold = 0.02, 384, 1.2, 0.15
    if middle > 0.065 and spread < 0.05:
        limit, threshold = 0.05, 0.15
    if middle > 0.065 and 0.035 < spread < 0.04:
        limit = 0.01
    brighter = exposure.equalize_adapthist(image, kernel_size=kernel, clip_limit=limit)
    return exposure.adjust_gamma(brighter, gamma=gamma).astype(np.float32), threshold


def _exposure() -> Any:
    try:
        from skimage import exposure
    except ImportError as error:
        raise InvalidSettings("CellSAM's pixels need scikit-image: pip install 'cellray[cellsam]'") from error
    return exposure


def threshold(scores: np.ndarray, bbox_threshold: float) -> float:
    """Above which score boxes [N] are cells: 0.66 · bbox_threshold + 0.33 · the mean of the scores' two centres."""
    if len(scores) < 2:
        return bbox_threshold
    return 0.66 * bbox_threshold + 0.33 * float(np.mean(_two_means(scores)))


def _two_means(values: np.ndarray) -> tuple[float, float]:
    """The centres of the best split in two: k-means in one dimension, exact. Of equal values, twice that value."""
    ordered = np.sort(values.astype(np.float64))
    sums, counts = np.cumsum(ordered), np.arange(1, len(ordered) + 1)
    lower, upper = sums[:-1] / counts[:-1], (sums[-1] - sums[:-1]) / (len(ordered) - counts[:-1])
    between = counts[:-1] * (len(ordered) - counts[:-1]) * (upper - lower) ** 2
    best = int(between.argmax())
    return float(lower[best]), float(upper[best])
