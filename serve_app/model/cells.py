"""CellSAM: an image in, every cell out. The detector's boxes, a mask for each, and one label image of all of them.

    model = cells.load(folder)                       # of a split CellSAM checkpoint
    found = model.segment(pixels)                    # [h, w] or [h, w, 1 to 3], of any number type
    found.labels                                     # [h, w] int32: 0, or the cell a pixel belongs to

Steps and thresholds are CellSAM's, see `cellsam`. What is different, on purpose:
- Large images are cut into tiles that end where the image does; CellSAM's see the opposite edge beyond it. An image
  that fits a tile is done as a whole.
- Grey images, images without light and images without cells are answered; CellSAM's pipeline fails on them.
- gauge_cell_size prepares pixels as usual; CellSAM leaves its normalisation out there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage, sparse
from torch.nn import functional

from serve_app.model import cellfinder, cellsam, checkpoint, decoder, encoder, masks
from serve_app.model.cellfinder import Detector
from serve_app.model.cellsam import Options
from serve_app.model.decoder import Decoder
from serve_app.model.encoder import Encoder
from serve_app.model.masks import MaskSet
from serve_app.model.preprocess import Size
from serve_app.model.prompts import DecodeRequest, Prompts

IOU_THRESHOLD = 0.5  # of the predicted IoU: masks below are dropped
CUT = float(np.log(0.4 / 0.6))  # logits: a probability of 0.4
LEAST_AREA = 25  # pixels; smaller cells are dropped
SMALL = 0.002  # of the image: cells of less are best seen in tiles (gauge_cell_size)
AT_ONCE = 64  # boxes whose masks are held together, 16 MB for B


@dataclass(frozen=True)
class Boxes:
    """Where an image's cells may be, the best first: boxes [N, 4] float32 (x0, y0, x1, y1) in pixels of the square
    input, and scores [N] float32 in 0–1."""

    boxes: np.ndarray
    scores: np.ndarray

    def above(self, bbox_threshold: float) -> Boxes:
        """Those that CellSAM keeps."""
        kept = self.scores > cellsam.threshold(self.scores, bbox_threshold)
        return Boxes(self.boxes[kept], self.scores[kept])


@dataclass(frozen=True)
class Cells:
    """The N cells of an image.

    labels: [h, w] int32, 0 or 1 + the cell that a pixel belongs to.
    boxes: [N, 4] float32 (x0, y0, x1, y1) in pixels of the image, the detector's; box_scores: [N] float32 in 0–1.
    predicted_iou: [N] float32. object_embeddings: [N, C] float32, the mean embedding under each cell.
    """

    labels: np.ndarray
    boxes: np.ndarray
    box_scores: np.ndarray
    predicted_iou: np.ndarray
    object_embeddings: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)

    def masks(self) -> MaskSet:
        """The cells as RLE, in their order; `prompt_index` counts the boxes above."""
        count, size = len(self), (self.labels.shape[0], self.labels.shape[1])
        counts = [text for index in range(count) for text in masks.encode(self.labels[None] == index + 1)]
        areas, around = masks.areas_and_boxes(counts, size)
        stability, order = np.zeros(count, np.float32), np.arange(count, dtype=np.int32)
        return MaskSet(size, counts, around, areas, self.predicted_iou, stability, order, self.object_embeddings)


def find(detector: Detector, images: Sequence[np.ndarray], device: str = "cpu") -> list[Boxes]:
    """Images [h, w, 3] float32 of `cellsam.normalise` → all the boxes that the detector has for each."""
    size, advanced = detector.card.architecture.image_size, detector.card.advanced
    inputs = [cellsam.detector_input(cellsam.square(one, size, device), advanced) for one in images]
    logits, places = detector.forward(torch.stack(inputs))
    scores, boxes = cellfinder.boxes(logits, places, size)
    return [Boxes(*pair) for pair in zip(boxes.cpu().numpy(), scores.cpu().numpy(), strict=True)]


def embed(model: Encoder, images: Sequence[np.ndarray], device: str = "cpu") -> list[np.ndarray]:
    """Images [h, w, 3] float32 of `cellsam.normalise` → [C, g, g] float32 each, over the whole square."""
    size, advanced = model.card.architecture.image_size, model.card.advanced
    inputs = [cellsam.encoder_input(cellsam.square(one, size, device), advanced) for one in images]
    return list(model.forward(torch.stack(inputs)).cpu().numpy())


def paint(model: Decoder, embedding: np.ndarray, found: Boxes, size: Size) -> Cells:
    """An image of `size` (height, width), its embedding [C, g, g] and boxes → its cells. Where masks overlap, that of
    the lower score stays; holes are filled; cells of fewer than LEAST_AREA pixels are left out."""
    labels, image_size = np.zeros(size, np.int32), model.card.architecture.image_size
    owners, ious = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    painted = 0
    for start in range(0, len(found.boxes), AT_ONCE):
        asked = Prompts(boxes=found.boxes[start : start + AT_ONCE])
        request = DecodeRequest(embedding, (image_size, image_size), asked)
        logits, scores, kept = model.accepted(request, IOU_THRESHOLD)
        for one in logits.float().cpu().numpy():
            painted += 1
            _draw(labels, one, painted, image_size)
        owners.append(start + kept.cpu().numpy())
        ious.append(scores.float().cpu().numpy())
    order = _tidy(labels) - 1
    owner, scale = np.concatenate(owners)[order], np.array(size[::-1] * 2, np.float32) / image_size
    seen = _under(labels, embedding, len(order))
    return Cells(labels, found.boxes[owner] * scale, found.scores[owner], np.concatenate(ious)[order], seen)


def _draw(labels: np.ndarray, logits: np.ndarray, value: int, image_size: int) -> None:
    """Write `value` where a mask is, of logits [4g, 4g] of the square input: resized to that, then to the image, both
    bilinear. That is a product with a matrix on either side, of which only the part around the mask is computed."""
    above = logits > CUT
    places, matrices = [], []
    for axis, side in ((1, labels.shape[0]), (0, labels.shape[1])):
        there = np.flatnonzero(above.any(axis))
        if not len(there):
            return
        matrix, first, last = _resizing(len(logits), image_size, side)
        place = slice(int(np.searchsorted(last, there[0])), int(np.searchsorted(first, there[-1], "right")))
        places.append(place)
        matrices.append(matrix[place])
    rows, columns = matrices
    labels[tuple(places)][(columns @ (rows @ logits).T).T > CUT] = value


@lru_cache(64)
def _resizing(count: int, middle: int, side: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """[side, count] float32, sparse, which resizes `count` values to `middle` and those to `side`; and the first and
    the last value that each result is made of."""
    values = torch.eye(count)[None]
    for length in (middle, side):
        if values.shape[-1] != length:
            values = functional.interpolate(values, length, mode="linear", align_corners=False)
    matrix = values[0].T.contiguous().numpy()
    used = matrix != 0
    return sparse.csr_array(matrix), used.argmax(1), count - 1 - used[:, ::-1].argmax(1)


def _tidy(labels: np.ndarray) -> np.ndarray:
    """Fill holes, drop small cells, number the others from 1 on, in place; → [N] the numbers that they had."""
    kept: list[int] = []
    for index, place in enumerate(ndimage.find_objects(labels)):
        if place is None:
            continue
        mask = labels[place] == index + 1
        if mask.sum() < LEAST_AREA:
            labels[place][mask] = 0
        else:
            kept.append(index + 1)
            labels[place][_filled(mask)] = len(kept)
    return np.array(kept, np.int64)


def _filled(mask: np.ndarray) -> np.ndarray:
    """As scipy.ndimage.binary_fill_holes, several times as fast: what is not connected with the edge is a hole."""
    regions, count = ndimage.label(~mask)
    outside = np.zeros(count + 1, bool)
    for edge in (regions[0], regions[-1], regions[:, 0], regions[:, -1]):
        outside[edge] = True
    outside[0] = False  # the mask itself
    return ~outside[regions]


def _under(labels: np.ndarray, embedding: np.ndarray, count: int) -> np.ndarray:
    """[count, C] float32: the mean of the tokens under each label's pixels."""
    height, width = labels.shape
    grid = embedding.shape[1]
    y, x = (np.arange(side) * grid // side for side in (height, width))
    there = labels > 0
    token = np.broadcast_to(y[:, None] * grid + x, labels.shape)[there]
    ones = np.ones(len(token), np.float32)
    pixels = sparse.csr_matrix((ones, (labels[there] - 1, token)), shape=(count, grid * grid))
    sums = pixels @ embedding.reshape(len(embedding), -1).T.astype(np.float32)
    return np.asarray(sums / np.maximum(pixels.sum(1), 1), np.float32)


@dataclass(frozen=True)
class Tile:
    """A part of an image: `core` is its own, `seen` is that and what it is segmented with; (rows, columns) each."""

    core: tuple[slice, slice]
    seen: tuple[slice, slice]

    def inner(self, place: tuple[slice, slice]) -> tuple[slice, slice]:
        """A place of the image, in what the tile sees."""
        y, x = (
            slice(own.start - seen.start, own.stop - seen.start) for own, seen in zip(place, self.seen, strict=True)
        )
        return y, x


def tiles(size: Size, options: Options) -> list[Tile]:
    """Row by row; one of the whole where that is no larger than a block, or tiles are not wanted."""
    if not options.use_wsi or max(size) <= options.block_size:
        whole = slice(0, size[0]), slice(0, size[1])
        return [Tile(whole, whole)]
    rows, columns = (list(_cut(side, options.block_size, options.overlap)) for side in size)
    return [Tile((y, x), (own_y, own_x)) for y, own_y in rows for x, own_x in columns]


def _cut(side: int, block: int, overlap: int) -> Iterator[tuple[slice, slice]]:
    for start in range(0, side, block):
        stop = min(start + block, side)
        yield slice(start, stop), slice(max(0, start - overlap), min(side, stop + overlap))


def joined(parts: Sequence[Cells], places: Sequence[Tile], size: Size, iou_threshold: float) -> Cells:
    """Tiles' cells → those of the image: cells of neighbours that share `iou_threshold` or more, by IoU within what
    both see, are one; each tile draws its own part. One of several has its boxes' hull and its best part's scores."""
    firsts = np.cumsum([0, *(len(part) for part in parts)])
    pairs = [
        (firsts[a] + mine, firsts[b] + theirs)
        for a, b in neighbours(places)
        for mine, theirs in _same(parts[a].labels, parts[b].labels, places[a], places[b], iou_threshold)
    ]
    left, right = np.array(pairs, np.int64).reshape(-1, 2).T
    links = sparse.csr_matrix((np.ones(len(left)), (left, right)), shape=(firsts[-1], firsts[-1]))
    _, group = sparse.csgraph.connected_components(links, directed=False)
    labels = np.zeros(size, np.int32)
    for part, place, first in zip(parts, places, firsts, strict=False):
        own = part.labels[place.inner(place.core)]
        numbers = np.concatenate([[0], 1 + group[first : first + len(part)]]).astype(np.int32)
        labels[place.core] = numbers[own]
    return _gathered(labels, parts, places, group)


def neighbours(places: Sequence[Tile]) -> list[tuple[int, int]]:
    """Pairs of tiles that share an edge, by their cores."""
    starts = {(place.core[0].start, place.core[1].start): index for index, place in enumerate(places)}
    found = []
    for index, place in enumerate(places):
        (y, x) = place.core
        found += [(index, starts[key]) for key in ((y.start, x.stop), (y.stop, x.start)) if key in starts]
    return found


def _same(mine: np.ndarray, theirs: np.ndarray, a: Tile, b: Tile, least: float) -> Iterator[tuple[int, int]]:
    """Cells of two tiles, counted from 0, whose IoU where both see is at least `least`."""
    y, x = (
        slice(max(one.start, other.start), min(one.stop, other.stop)) for one, other in zip(a.seen, b.seen, strict=True)
    )
    first, second = mine[a.inner((y, x))].ravel().astype(np.int64), theirs[b.inner((y, x))].ravel()
    columns = int(second.max(initial=0)) + 1
    both = np.bincount(first * columns + second, minlength=columns * (int(first.max(initial=0)) + 1))
    shared = both.reshape(-1, columns)
    union = shared.sum(1)[:, None] + shared.sum(0) - shared
    for one, other in np.argwhere((shared > 0) & (shared >= least * union)):
        if one and other:
            yield int(one) - 1, int(other) - 1


def _gathered(labels: np.ndarray, parts: Sequence[Cells], places: Sequence[Tile], group: np.ndarray) -> Cells:
    """The groups' columns, in order of the label image; groups of which no pixel is left are gone."""
    there, numbers = np.unique(labels, return_inverse=True)
    kept = there[there > 0] - 1
    labels = (numbers.reshape(labels.shape) + (there[0] > 0)).astype(np.int32)
    corners = [np.array([place.seen[1].start, place.seen[0].start] * 2, np.float32) for place in places]
    boxes = np.concatenate([part.boxes + corner for part, corner in zip(parts, corners, strict=True)])
    scores, ious, seen = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("box_scores", "predicted_iou", "object_embeddings")
    )
    hulls = np.concatenate([np.full((len(kept), 2), np.inf), np.full((len(kept), 2), -np.inf)], 1).astype(np.float32)
    place = np.full(int(group.max(initial=-1)) + 1, -1)
    place[kept] = np.arange(len(kept))
    own = place[group]
    inside = own >= 0
    np.minimum.at(hulls[:, :2], own[inside], boxes[inside, :2])
    np.maximum.at(hulls[:, 2:], own[inside], boxes[inside, 2:])
    best = np.zeros(len(kept), np.int64)
    order = np.flatnonzero(inside)[np.argsort(scores[inside], kind="stable")]
    best[own[order]] = order  # the last written is the best
    return Cells(labels, hulls, scores[best], ious[best], seen[best])


@dataclass(frozen=True)
class CellSAM:
    """A split CellSAM's three parts, loaded."""

    encoder: Encoder
    detector: Detector
    decoder: Decoder
    device: str

    def segment(self, image: np.ndarray, options: Options | None = None) -> Cells:
        """[h, w] or [h, w, 1 to 3] of any number type, as `cellsam.channels` has it → its cells.

        Raises:
            InvalidImage: of another shape, or not finite. InvalidInput: an option is out of its range.
        """
        options = options or Options()
        options.check()
        pixels = cellsam.channels(image)
        if options.low_contrast_enhancement:
            pixels, threshold = cellsam.enhance(pixels)
            options = options if threshold is None else replace(options, bbox_threshold=threshold)
        size = pixels.shape[0], pixels.shape[1]
        places = tiles(size, options)
        parts = [self.segment_tile(pixels[place.seen], options) for place in places]
        found = joined(parts, places, size, options.iou_threshold)
        if options.gauge_cell_size and len(places) > 1 and len(found):
            share = np.median(np.bincount(found.labels.ravel())[1:]) / found.labels.size
            return found if share < SMALL else self.segment_tile(pixels, options)
        return found

    def segment_tile(self, pixels: np.ndarray, options: Options) -> Cells:
        """[h, w, 3] float32 in 0–1 → its cells, without tiles."""
        ready = cellsam.normalise(pixels)
        (found,) = find(self.detector, [ready], self.device)
        (embedding,) = embed(self.encoder, [ready], self.device)
        return paint(self.decoder, embedding, found.above(options.bbox_threshold), (ready.shape[0], ready.shape[1]))


def load(folder: Path, device: str = "auto", dtype: str = "float32") -> CellSAM:
    """The three parts of a split CellSAM by the fastest runtimes at hand; products are computed in `dtype`.

    Raises:
        InvalidCheckpoint: the folder holds no CellSAM, or other weights than its card says.
        InvalidSettings: a dtype or device that is not there.
    """
    device = encoder.check_device(device)
    if checkpoint.ModelCard.read(folder).detector is None:
        raise checkpoint.no_detector(folder)
    parts = (
        encoder.load(folder, "auto", device, dtype),
        cellfinder.load(folder, "auto", device, dtype),
        decoder.load(folder, "auto", device, dtype),
    )
    return CellSAM(*parts, device)
