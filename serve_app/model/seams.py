"""Large images in tiles for CellSAM: where they lie, and their cells joined across the seams, row by row as they come,
so that no more than two rows of tiles are held of an image of any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from serve_app.model.cell_masks import Cell, Cells
from serve_app.model.cellsam import Options
from serve_app.model.preprocess import Size

SMALL = 0.002  # of the image: cells of less are best seen in tiles (gauge_cell_size)


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
    if not options.use_wsi or (max(size) <= options.block_size and not options.compat):
        whole = slice(0, size[0]), slice(0, size[1])
        return [Tile(whole, whole)]
    rows, columns = (list(_cut(side, options)) for side in size)
    return [Tile((y, x), (own_y, own_x)) for y, own_y in rows for x, own_x in columns]


def _cut(side: int, options: Options) -> Iterator[tuple[slice, slice]]:
    for start in range(0, side, options.block_size):
        stop = min(start + options.block_size, side)
        first, last = start - options.overlap, stop + options.overlap
        yield slice(start, stop), slice(first, last) if options.compat else slice(max(0, first), min(side, last))


@dataclass
class _Group:
    """Parts of one cell, by number, and the last row of tiles that has one."""

    row: int
    parts: dict[int, Cell]


class Seams:
    """Tiles' cells → the image's, each as soon as no further tile can have a part of it.

    Cells of tiles that share an edge are one where they share `iou_threshold` or more, by IoU within what both see;
    each tile gives what lies in its core. One of several parts has their boxes' hull and its best part's scores. At a
    tile that failed, its neighbours' cells end.
    """

    def __init__(self, places: Sequence[Tile], options: Options) -> None:
        """places: as `tiles` gives them by these options."""
        self.places, self.options = places, options
        self.columns = sum(place.core[0] == places[0].core[0] for place in places)
        self.done = self.numbered = 0
        self.groups: dict[int, _Group] = {}  # by the number of each part
        self.before: dict[int, tuple[Tile, np.ndarray, int]] = {}  # what later tiles can see, and the first number

    def add(self, found: Cells | None) -> list[Cell]:
        """The next tile's cells, None where it failed → cells that are complete, in pixels of the image."""
        index, self.done = self.done, self.done + 1
        place, first, row = self.places[index], self.numbered, index // self.columns
        above = self.before.pop(index - self.columns, None)
        if found is not None:
            self.numbered += len(found)
            self._number(found, place, first, row)
            aside = self.before.get(index - 1) if index % self.columns else None
            for other in (above, aside):
                if other is not None:
                    for theirs, own in _same(other[1], found.labels, other[0], place, self.options.iou_threshold):
                        self._join(other[2] + theirs, first + own)
            self.before[index] = place, found.labels, first
        if index % self.columns and index - 1 in self.before:
            self._keep_bottom(index - 1)
        if self.done % self.columns:
            return []
        if index in self.before:
            self._keep_bottom(index)
        return self._complete(len(self.places) if self.done == len(self.places) else row)

    def _number(self, found: Cells, place: Tile, first: int, row: int) -> None:
        (y, x), (top, left) = place.seen, (side.start for side in place.core)
        shift = np.array([x.start, y.start] * 2, np.float32)
        for number, cell in enumerate(found.within(place.inner(place.core)), first):
            corner = cell.corner[0] + top, cell.corner[1] + left
            self.groups[number] = _Group(row, {number: replace(cell, corner=corner, box=cell.box + shift)})

    def _join(self, one: int, other: int) -> None:
        first, second = self.groups[one], self.groups[other]
        if first is second:
            return
        first.parts |= second.parts
        first.row = max(first.row, second.row)
        self.groups |= dict.fromkeys(second.parts, first)

    def _keep_bottom(self, index: int) -> None:
        """Of a tile whose neighbour aside is done, what the one below sees."""
        place, labels, first = self.before[index]
        y, x = place.seen
        bottom = slice(max(y.start, place.core[0].stop - self.options.overlap), y.stop)
        kept = labels[bottom.start - y.start :].copy()
        self.before[index] = replace(place, seen=(bottom, x)), kept, first

    def _complete(self, row: int) -> list[Cell]:
        """Cells without a part in `row` or later."""
        closed = {id(group): group for group in self.groups.values() if group.row < row}
        for group in closed.values():
            for number in group.parts:
                del self.groups[number]
        merged = (_merged(list(group.parts.values())) for group in closed.values())
        return [cell for cell in merged if cell is not None]


def _merged(parts: Sequence[Cell]) -> Cell | None:
    """None where no pixel is left of it."""
    there = [(part.corner, part.mask) for part in parts if part.mask is not None]
    if not there:
        return None
    best = max(parts, key=lambda part: part.box_score)
    if len(parts) == 1:
        return best
    boxes = np.array([part.box for part in parts])
    hull = np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])
    top, left = (min(corner[axis] for corner, _ in there) for axis in (0, 1))
    bottom, right = (max(corner[axis] + mask.shape[axis] for corner, mask in there) for axis in (0, 1))
    whole = np.zeros((bottom - top, right - left), bool)
    for (y, x), mask in there:
        whole[y - top : y - top + mask.shape[0], x - left : x - left + mask.shape[1]] |= mask
    return replace(best, corner=(top, left), mask=whole, box=hull)


def joined(parts: Iterable[Cells | None], places: Sequence[Tile], size: Size, options: Options) -> Cells:
    """All tiles' cells → those of the image of `size`, as `Seams` joins them."""
    seams = Seams(places, options)
    return labelled([cell for part in parts for cell in seams.add(part)], size)


def too_large(areas: np.ndarray, size: Size, options: Options) -> bool:
    """Whether an image of `size` is to be done again as a whole, by the areas [N] of the cells that its tiles had."""
    return options.gauge_cell_size and len(areas) > 0 and bool(np.median(areas) >= SMALL * size[0] * size[1])


def labelled(cells: Sequence[Cell], size: Size) -> Cells:
    """Cells that do not overlap → one label image, numbered in their order."""
    labels = np.zeros(size, np.int32)
    there = [cell for cell in cells if cell.mask is not None]
    for number, cell in enumerate(there, 1):
        assert cell.mask is not None
        (y, x), (height, width) = cell.corner, cell.mask.shape
        labels[y : y + height, x : x + width][cell.mask] = number
    boxes, scores, ious, seen = (
        np.array([getattr(cell, name) for cell in there], np.float32)
        for name in ("box", "box_score", "predicted_iou", "object_embedding")
    )
    return Cells(labels, boxes.reshape(-1, 4), scores, ious, seen.reshape(len(there), -1 if there else 0))


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
