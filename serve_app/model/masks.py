"""Masks as data: COCO RLE, boxes, areas, stability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from pycocotools import mask as coco

from cluster.errors import InvalidInput
from serve_app.model import rle
from serve_app.model.preprocess import Size
from serve_app.model.rle import Texts

ENDLESS = 1 << 60  # pixels


@dataclass(frozen=True, slots=True)
class MaskSet:
    """N masks of one image of `size` (height, width), as columns of equal length.

    counts: compressed COCO RLE strings, column-major.
    boxes: [N, 4] float32 xywh in pixels, around the mask; zeros for an empty one.
    areas: [N] int64 pixels.
    predicted_iou, stability: [N] float32.
    prompt_index: [N] int32, which prompt each mask answers.
    object_embeddings: [N, C] float32, the mean image embedding under each mask; zeros for an empty one.
    logits: [N, 4g, 4g] float16 of the padded input, where they were asked for.
    """

    size: Size
    counts: list[str]
    boxes: np.ndarray
    areas: np.ndarray
    predicted_iou: np.ndarray
    stability: np.ndarray
    prompt_index: np.ndarray
    object_embeddings: np.ndarray
    logits: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.counts)

    def take(self, indices: np.ndarray) -> MaskSet:
        columns: dict[str, Any] = {}
        for field in fields(self)[2:]:
            column = getattr(self, field.name)
            columns[field.name] = None if column is None else column[indices]
        return MaskSet(self.size, [self.counts[i] for i in indices], **columns)

    def decode(self) -> np.ndarray:
        """[N, height, width] bool."""
        return decode(self.counts, self.size)

    @classmethod
    def join(cls, size: Size, parts: list[MaskSet], channels: int) -> MaskSet:
        """Parts of one image, one after the other; no parts give an empty set."""
        if not parts:
            flat = np.zeros(0, np.float32)
            empty = np.zeros((0, channels), np.float32)
            return cls(size, [], np.zeros((0, 4), np.float32), np.zeros(0, np.int64), flat, flat,
                       np.zeros(0, np.int32), empty)  # fmt: skip
        names = [f.name for f in fields(cls)[2:] if getattr(parts[0], f.name) is not None]
        columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return cls(size, [counts for part in parts for counts in part.counts], **columns)


def encode(masks: np.ndarray) -> list[str]:
    """[N, height, width] bool → compressed COCO RLE strings."""
    if not len(masks):
        return []
    encoded = coco.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    return [rle["counts"].decode() for rle in encoded]


def encode_at(mask: np.ndarray, corner: tuple[int, int], size: Size) -> str:
    """[h, w] bool, whose upper left pixel is `corner` (y, x) of an image of `size` → its RLE in that image."""
    return _placed(encode(mask[None])[0], mask.shape[0], corner[1], corner[0], size)


def decode(counts: list[str], size: Size) -> np.ndarray:
    """Compressed COCO RLE strings → [N, height, width] bool.

    Raises:
        InvalidInput: a string is no RLE of that size.
    """
    if not counts:
        return np.zeros((0, *size), bool)
    return coco.decode(_checked(counts, size)).transpose(2, 0, 1).astype(bool)


def label_map(counts: list[str], areas: Sequence[int], labels: Sequence[int], size: Size) -> np.ndarray:
    """[height, width] uint16, or uint32 from label 65,536 on: the label of the smallest mask at each pixel, and 0."""
    dtype = np.uint16 if max(labels, default=0) < 1 << 16 else np.uint32
    (plane,) = rle.bands(Texts.of(counts), np.asarray(areas, np.int64), np.asarray(labels, np.int64), size, dtype)
    return plane


def areas_and_boxes(counts: list[str], size: Size) -> tuple[np.ndarray, np.ndarray]:
    """RLE strings → ([N] int64 areas, [N, 4] float32 xywh boxes). Raises as `decode`."""
    areas, boxes = rle.extents(Texts.of(counts), size)
    return areas, boxes.astype(np.float32)


def _checked(counts: list[str], size: Size) -> list[dict[str, Any]]:
    """As pycocotools takes them. It trusts what it gets, and reads and writes past the end of an RLE that is cut."""
    sound = rle.covered(Texts.of(counts), size)
    if not sound.all():
        raise InvalidInput(f"not a COCO RLE of {size[0]} × {size[1]} pixels: {counts[int(sound.argmin())][:20]!r}")
    return [{"size": list(size), "counts": text.encode()} for text in counts]


def place(found: MaskSet, corner: tuple[int, int], size: Size) -> MaskSet:
    """Masks of a crop, whose upper left pixel is `corner` (x, y) of an image of `size`, as masks of that image."""
    if found.size == size:
        return found
    x, y = corner
    counts = [_placed(text, found.size[0], x, y, size) for text in found.counts]
    return replace(found, size=size, counts=counts, boxes=found.boxes + np.array([x, y, 0, 0], np.float32))


def _placed(text: str, height: int, x: int, y: int, size: Size) -> str:
    """An RLE of columns of `height` pixels as one of an image: each stretch of pixels is cut where a column ends."""
    runs, _, _ = rle.runs(Texts.of([text]))
    pixels = size[0] * size[1]
    if height == size[0]:
        height = pixels  # nothing to cut: columns lie in the image as they are
    ends = np.cumsum(runs)[: len(runs) // 2 * 2].reshape(-1, 2)  # stretches are [first, last)
    first, last = ends[ends[:, 0] < ends[:, 1]].T
    pieces = (last - 1) // height - first // height + 1
    column = np.repeat(first // height - np.cumsum(pieces) + pieces, pieces) + np.arange(pieces.sum())
    starts = np.maximum(np.repeat(first, pieces), column * height)
    stops = np.minimum(np.repeat(last, pieces), (column + 1) * height)
    moved = np.stack([starts, stops], axis=1) + ((column + x) * size[0] + y - column * height)[:, None]
    counts = np.diff(moved.flatten(), prepend=0, append=pixels).tolist()
    if not counts[-1]:
        counts.pop()
    return coco.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"].decode()


def remove_small_regions(mask: np.ndarray, area: int) -> np.ndarray | None:
    """[h, w] bool without holes and then islands of fewer than `area` pixels; None if it has none.

    Regions connect over corners; of islands that are all small the largest stays (as segment_anything's).
    """
    window = _window(mask)
    if mask.size - mask[window].size < area:  # what lies beyond it may be a hole itself
        window = slice(0, None), slice(0, None)
    inner = mask[window]
    holes, sizes = _regions(~inner)
    sizes[holes[(0, 0) if window[0].start or window[1].start else (-1, -1)]] += mask.size - inner.size
    filled = sizes < area
    inner = inner | filled[holes]
    islands, sizes = _regions(inner)
    small = sizes < area
    if not small.any() and not filled.any():
        return None
    if small[1:].all():
        small[1 + np.argmax(sizes[1:])] = False
    cleaned = mask.copy()
    cleaned[window] = inner & ~small[islands]
    return cleaned


def _regions(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[h, w] bool → each pixel's region, from 1 (0 where it is off), and the regions' sizes; 0 counts as endless."""
    from scipy import ndimage

    labels, _ = ndimage.label(plane, np.ones((3, 3), bool))
    sizes = np.bincount(labels.ravel())
    sizes[0] = ENDLESS
    return labels, sizes


def _window(mask: np.ndarray) -> tuple[slice, slice]:
    """The mask and one pixel around it, so that all beyond is one region with a corner of it; the whole where that
    would reach from edge to edge."""
    ends = []
    for axis, side in zip((1, 0), mask.shape, strict=True):
        found = np.flatnonzero(mask.any(axis))
        if not len(found) or (found[0] < 2 and found[-1] > side - 3):
            return slice(0, None), slice(0, None)
        ends.append(slice(int(max(0, found[0] - 1)), int(found[-1] + 2)))
    return ends[0], ends[1]


def iou(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two boolean masks; 1 where both are empty."""
    union = np.logical_or(first, second).sum()
    return float(np.logical_and(first, second).sum() / union) if union else 1.0
