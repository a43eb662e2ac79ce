"""Compressed COCO RLE strings, many at a time, and never as a plane: what they cover, column by column.

A string is runs of pixels down the columns, off and on in turn: little-endian groups of 5 bits and a continuation bit,
a sign in each last one, from the fourth run on as differences to the run before last (COCO's `rleToString`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from cluster.errors import InvalidInput
from serve_app.model.preprocess import Size

MAX_RUN_CHARACTERS = 7  # 35 bits: more than any run of a 32-bit mask
AT_ONCE = 1 << 20  # characters that are taken apart together, some 100 bytes of memory each; one string at least
PIXELS_AT_ONCE = 1 << 22  # that are painted together


@dataclass(frozen=True, slots=True)
class Texts:
    """N strings, one after the other: `data` [B] uint8, and `starts` [N + 1] int64, where each begins."""

    data: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str]) -> Texts:
        coded = [text.encode() for text in texts]
        lengths = np.fromiter(map(len, coded), np.int64, len(coded))
        return cls(np.frombuffer(b"".join(coded), np.uint8), np.concatenate([[0], np.cumsum(lengths)]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def take(self, indices: np.ndarray) -> Texts:
        """Those at `indices` [K]."""
        lengths = self.starts[indices + 1] - self.starts[indices]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        moved = np.repeat(self.starts[indices] - starts[:-1], lengths)
        return Texts(self.data[np.arange(starts[-1]) + moved], starts)

    def __getitem__(self, index: int) -> str:
        return self.data[self.starts[index] : self.starts[index + 1]].tobytes().decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Columns:
    """Pieces of columns that masks cover, mask by mask, [P] int64 each: of which mask, which column, and its rows from
    `top` to before `bottom`."""

    mask: np.ndarray
    column: np.ndarray
    top: np.ndarray
    bottom: np.ndarray


def runs(texts: Texts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The runs of all, one after the other [R] int64, the place [N + 1] where each string's begin, and [N] bool,
    whether a string is of that form; the runs of one that is not mean nothing."""
    codes = texts.data.astype(np.int64) - 48
    final = codes & 32 == 0  # of a number
    starts, stops = texts.starts[:-1], texts.starts[1:]
    whole = stops > starts
    whole[whole] = final[stops[whole] - 1]
    final[stops[stops > starts] - 1] = True  # so that one string's damage is not its neighbour's
    ends = np.flatnonzero(final)
    begins = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
    lengths = ends - begins + 1
    firsts = np.searchsorted(ends, texts.starts)
    counts = np.diff(firsts)
    owner = np.repeat(np.arange(len(texts)), counts)
    for wrong in (owner[lengths > MAX_RUN_CHARACTERS], _owners(texts, (codes < 0) | (codes > 63))):
        whole[wrong] = False
    if not len(ends):
        return np.zeros(0, np.int64), firsts, whole
    place = np.minimum(np.arange(len(codes)) - np.repeat(begins, lengths), MAX_RUN_CHARACTERS - 1)
    found = np.add.reduceat((codes & 31) << 5 * place, begins)
    found -= np.where(codes[ends] & 16, 1 << 5 * np.minimum(lengths, MAX_RUN_CHARACTERS), 0)
    turn = np.arange(len(found)) - firsts[owner]
    for parity in (1, 0):
        own = (turn % 2 == parity) & (turn > 0)
        sums = np.cumsum(np.where(own, found, 0))
        found[own] = (sums - sums[firsts[owner]])[own]  # the first run of each is in neither sum
    return found, firsts, whole


def _owners(texts: Texts, where: np.ndarray) -> np.ndarray:
    return np.searchsorted(texts.starts, np.flatnonzero(where), side="right") - 1


def covered(texts: Texts, size: Size) -> np.ndarray:
    """[N] bool: whether each is a compressed RLE of exactly (height, width) pixels."""
    found, firsts, whole = runs(texts)
    return _sound(found, firsts, whole, size)


def _sound(found: np.ndarray, firsts: np.ndarray, whole: np.ndarray, size: Size) -> np.ndarray:
    pixels, first, last = size[0] * size[1], firsts[:-1], firsts[1:]
    sums = np.concatenate([[0], np.cumsum(found)])
    beyond = np.concatenate([[0], np.cumsum((found < 0) | (found > pixels))])
    return np.asarray(whole & (sums[last] - sums[first] == pixels) & (beyond[last] == beyond[first]))


def columns(texts: Texts, size: Size) -> Columns:
    """What masks of an image of `size` (height, width) cover. Raises InvalidInput: one is no RLE of that size."""
    found, firsts, whole = runs(texts)
    sound = _sound(found, firsts, whole, size)
    if not sound.all():
        raise InvalidInput(f"not a COCO RLE of {size[0]} × {size[1]} pixels: {texts[int(sound.argmin())][:20]!r}")
    ends = np.cumsum(found)
    counts = np.diff(firsts)
    ends -= np.repeat(np.concatenate([[0], ends])[firsts[:-1]], counts)
    turn = np.arange(len(found)) - np.repeat(firsts[:-1], counts)
    on = (turn % 2 == 1) & (found > 0)
    mask, last, height = np.repeat(np.arange(len(texts)), counts)[on], ends[on], size[0]
    first = last - found[on]
    pieces = (last - 1) // height - first // height + 1
    column = np.repeat(first // height - np.cumsum(pieces) + pieces, pieces) + np.arange(pieces.sum())
    top = np.maximum(np.repeat(first, pieces) - column * height, 0)
    bottom = np.minimum(np.repeat(last, pieces) - column * height, height)
    return Columns(np.repeat(mask, pieces), column, top, bottom)


def extents(texts: Texts, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Masks of an image of `size` → their areas [N] and the boxes around them [N, 4], x, y, width and height in pixels,
    int64; zeros for an empty one. Raises as `columns`."""
    areas, boxes = np.zeros(len(texts), np.int64), np.zeros((len(texts), 4), np.int64)
    for some in _groups(texts, np.arange(len(texts))):
        found = columns(texts.take(some), size)
        there, first = np.unique(found.mask, return_index=True)
        if not len(there):
            continue
        own = some[there]
        areas[own] = np.add.reduceat(found.bottom - found.top, first)
        corner = [np.minimum.reduceat(values, first) for values in (found.column, found.top)]
        beyond = [np.maximum.reduceat(values, first) for values in (found.column + 1, found.bottom)]
        boxes[own] = np.stack([*corner, beyond[0] - corner[0], beyond[1] - corner[1]], axis=1)
    return areas, boxes


def bands(
    texts: Texts, areas: np.ndarray, labels: np.ndarray, size: Size, dtype: DTypeLike, tall: int = 0
) -> Iterator[np.ndarray]:
    """The image of `size` (height, width) from above, [≤ tall, width] of `dtype` at a time, or all of it: at each pixel
    the label of the smallest of the masks there by `areas`, of equal ones the last, and 0 where there is none. Raises
    as `columns`."""
    tall = tall or size[0]
    order = np.argsort(-areas, kind="stable")
    _, boxes = extents(texts, size)
    top, bottom = boxes[:, 1], boxes[:, 1] + boxes[:, 3]
    for start in range(0, size[0], tall):
        plane = np.zeros((min(tall, size[0] - start), size[1]), dtype)
        there = order[(top[order] < start + len(plane)) & (bottom[order] > start)]
        for some in _groups(texts, there):
            _paint(plane, start, columns(texts.take(some), size), labels[some])
        yield plane


def _groups(texts: Texts, indices: np.ndarray) -> Iterator[np.ndarray]:
    """`indices` in their order, a few at a time."""
    group = np.cumsum(texts.starts[indices + 1] - texts.starts[indices]) // AT_ONCE
    if len(indices):
        yield from np.split(indices, np.flatnonzero(np.diff(group)) + 1)


def _paint(plane: np.ndarray, start: int, found: Columns, labels: np.ndarray) -> None:
    """What rows from `start` on have of columns, mask over mask."""
    top, bottom = np.maximum(found.top - start, 0), np.minimum(found.bottom - start, len(plane))
    there = np.flatnonzero(top < bottom)
    lengths = (bottom - top)[there]
    group = np.cumsum(lengths) // PIXELS_AT_ONCE
    flat = plane.reshape(-1)
    for some in np.split(np.arange(len(there)), np.flatnonzero(np.diff(group)) + 1):
        pieces, own = there[some], lengths[some]
        down = np.arange(own.sum()) - np.repeat(np.cumsum(own) - own, own)
        rows = np.repeat(top[pieces], own) + down
        flat[rows * plane.shape[1] + np.repeat(found.column[pieces], own)] = np.repeat(labels[found.mask[pieces]], own)
