"""Large images in tiles: where they lie, and their masks as masks of the whole, without seams."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from pycocotools import mask as coco

from serve_app.model import masks
from serve_app.model.masks import MaskSet
from serve_app.model.preprocess import Size

EDGE = 2  # pixels: a mask that ends so near an inner edge of its tile is cut off by it
SAME = 0.5  # of the smaller one's area, shared: one object, seen in two tiles
Box = tuple[int, int, int, int]  # x, y, width, height in pixels


def boxes(size: Size, tile: int, overlap: int) -> list[Box]:
    """Squares of `tile` px, row by row, that cover an image of `size`; neighbours share at least `overlap` px. They end
    where the image does, and are smaller only where it is."""
    rows, columns = (_starts(side, tile, overlap) for side in size)
    height, width = (min(side, tile) for side in size)
    return [(x, y, width, height) for y in rows for x in columns]


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    count = max(1, -(-(side - overlap) // (tile - overlap)))
    return [min(index * (tile - overlap), max(0, side - tile)) for index in range(count)]


def merged(parts: Sequence[tuple[MaskSet, Box]], size: Size) -> tuple[MaskSet, np.ndarray]:
    """Tiles' masks → those of the image of `size`, each object once, and [N] int64, which part each is from.

    Of masks from two tiles that share more than SAME of the smaller, one stays: a whole one rather than one that an
    edge of its tile cuts off, of whole ones the better by predicted IoU. Two that are cut off, and share as much of
    what both tiles see, are pieces of an object: they become one, in the place of the largest.
    """
    placed = [masks.place(one, box[:2], size) for one, box in parts]
    found = MaskSet.join(size, placed, parts[0][0].object_embeddings.shape[1])
    owner = np.repeat(np.arange(len(parts)), [len(one) for one, _ in parts])
    cut = np.concatenate([_cut(one, box, size) for one, box in parts])
    rles = [{"size": list(size), "counts": text.encode()} for text in found.counts]
    same, pieces = _pairs(found, rles, owner, cut, [box for _, box in parts])
    gone = np.zeros(len(found), bool)
    for index in np.lexsort((-found.predicted_iou, cut)):
        if not gone[index]:
            gone[same.get(int(index), [])] = True
    return _joined(found, rles, owner, gone, [pair for pair in pieces if not gone[list(pair)].any()])


def _cut(found: MaskSet, box: Box, size: Size) -> np.ndarray:
    """[N] bool: whether a mask ends at an edge of its tile that is none of the image."""
    x, y, width, height = box
    first, last = found.boxes[:, :2], found.boxes[:, :2] + found.boxes[:, 2:]
    before = (first <= EDGE) & (np.array([x, y]) > 0)
    after = (last >= np.array([width, height]) - EDGE) & (np.array([x + width, y + height]) < size[::-1])
    return np.asarray((before | after).any(axis=1))


def _pairs(
    found: MaskSet, rles: list[Any], owner: np.ndarray, cut: np.ndarray, tiles: list[Box]
) -> tuple[dict[int, list[int]], list[tuple[int, int]]]:
    """(each mask's duplicates, pairs of pieces of one object), of tiles that overlap."""
    same: dict[int, list[int]] = {}
    pieces = []
    corners = found.boxes.copy()
    corners[:, 2:] += corners[:, :2]
    for one, other in combinations(range(len(tiles)), 2):
        x, y = (max(tiles[one][axis], tiles[other][axis]) for axis in (0, 1))
        right, bottom = (min(box[axis] + box[2 + axis] for box in (tiles[one], tiles[other])) for axis in (0, 1))
        if x >= right or y >= bottom:
            continue
        within = (corners[:, 0] < right) & (corners[:, 2] > x) & (corners[:, 1] < bottom) & (corners[:, 3] > y)
        first, second = (np.flatnonzero(within & (owner == part)) for part in (one, other))
        if not len(first) or not len(second):
            continue
        shared = _shared(rles, first, rles, second, found.areas)
        both = np.logical_and.outer(cut[first], cut[second])
        duplicate = (shared > SAME * np.minimum.outer(found.areas[first], found.areas[second])) & ~both
        for a, b in np.argwhere(duplicate):
            same.setdefault(int(first[a]), []).append(int(second[b]))
            same.setdefault(int(second[b]), []).append(int(first[a]))
        band = coco.frPyObjects(np.array([[x, y, right - x, bottom - y]], np.float64), *found.size)
        seen = [_shared(rles, part, band, np.zeros(1, int), found.areas)[:, 0] for part in (first, second)]
        agree = (shared > SAME * np.minimum.outer(*seen)) & both
        pieces += [(int(first[a]), int(second[b])) for a, b in np.argwhere(agree)]
    return same, pieces


def _shared(rles: list[Any], rows: np.ndarray, others: list[Any], columns: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """[rows, columns] pixels in both; `areas` are those of `rles`."""
    share = coco.iou([rles[row] for row in rows], [others[column] for column in columns], [1] * len(columns))
    return np.asarray(share * areas[rows, None])  # of a crowd, COCO's IoU is the share of the first


def _joined(
    found: MaskSet, rles: list[Any], owner: np.ndarray, gone: np.ndarray, pieces: list[tuple[int, int]]
) -> tuple[MaskSet, np.ndarray]:
    """Those that are not gone, with pieces put together."""
    group = np.arange(len(found))
    for first, second in pieces:
        group[group == group[second]] = group[first]
    whole = found.take(np.arange(len(found)))
    for name in {int(group[first]) for first, _ in pieces}:
        own = np.flatnonzero(group == name)
        place = own[np.argmax(found.areas[own])]
        gone[own[own != place]] = True
        whole.counts[place] = coco.merge([rles[one] for one in own])["counts"].decode()
        (whole.areas[place],), (whole.boxes[place],) = masks.areas_and_boxes([whole.counts[place]], found.size)
        for column in (whole.predicted_iou, whole.stability, whole.object_embeddings):
            column[place] = np.average(column[own], axis=0, weights=found.areas[own])
    kept = np.flatnonzero(~gone)
    return whole.take(kept), owner[kept]
