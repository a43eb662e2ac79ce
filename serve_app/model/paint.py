"""CellSAM's boxes become masks, and these one label image: cells do not overlap.

Steps and thresholds are CellSAM's, see `cellsam`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy import ndimage, sparse
from torch.nn import functional

from serve_app.model.cell_masks import Boxes, Cells
from serve_app.model.decoder import Decoder
from serve_app.model.preprocess import Size
from serve_app.model.prompts import DecodeRequest, Prompts

IOU_THRESHOLD = 0.5  # of the predicted IoU: masks below are dropped
CUT = float(np.log(0.4 / 0.6))  # logits: a probability of 0.4
LEAST_AREA = 25  # pixels; smaller cells are dropped
AT_ONCE = 64  # boxes whose masks are held together, 16 MB for B


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
