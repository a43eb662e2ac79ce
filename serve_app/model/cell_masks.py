"""Cells as they travel: the detector's boxes, an image's cells, and these one by one. Plain numpy: jobs use it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from serve_app.model import cellsam, masks
from serve_app.model.masks import MaskSet
from serve_app.model.preprocess import Size


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


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of an image. mask: [h, w] bool, whose upper left pixel is `corner` (y, x) of the image; None where it
    has no pixel. The other columns as in `Cells`."""

    corner: tuple[int, int]
    mask: np.ndarray | None
    box: np.ndarray
    box_score: float
    predicted_iou: float
    object_embedding: np.ndarray


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

    def areas(self) -> np.ndarray:
        """[N] int64 pixels."""
        return np.bincount(self.labels.ravel(), minlength=len(self) + 1)[1:]

    def within(self, place: tuple[slice, slice]) -> list[Cell]:
        """The cells one by one, what of them is at `place`; corners count from there."""
        places = ndimage.find_objects(self.labels[place], max_label=len(self))
        found = []
        for index, inside in enumerate(places):
            mask = None if inside is None else self.labels[place][inside] == index + 1
            corner = (0, 0) if inside is None else (inside[0].start, inside[1].start)
            scores = float(self.box_scores[index]), float(self.predicted_iou[index])
            found.append(Cell(corner, mask, self.boxes[index], *scores, self.object_embeddings[index]))
        return found

    def masks(self) -> MaskSet:
        """As `outlined`."""
        height, width = self.labels.shape
        return outlined(self.within((slice(0, height), slice(0, width))), (height, width))


def outlined(cells: Sequence[Cell], size: Size) -> MaskSet:
    """Cells of an image of `size` as RLE, in their order; `prompt_index` counts them; they have no stability (NaN)."""
    there = [(cell, cell.mask) for cell in cells if cell.mask is not None]
    counts = [masks.encode_at(mask, cell.corner, size) for cell, mask in there]
    boxes = [[cell.corner[1], cell.corner[0], mask.shape[1], mask.shape[0]] for cell, mask in there]
    areas = np.array([mask.sum() for _, mask in there], np.int64)
    ious = np.array([cell.predicted_iou for cell, _ in there], np.float32)
    seen = np.array([cell.object_embedding for cell, _ in there], np.float32).reshape(len(there), -1 if there else 0)
    around, order = np.array(boxes, np.float32).reshape(-1, 4), np.arange(len(there), dtype=np.int32)
    return MaskSet(size, counts, around, areas, ious, np.full_like(ious, np.nan), order, seen)


@dataclass(frozen=True, slots=True)
class CellsRequest:
    """What `paint` takes: an embedding [C, g, g], boxes of its square input, and the image's (height, width)."""

    embedding: np.ndarray
    found: Boxes
    size: Size
