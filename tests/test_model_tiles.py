"""Tiles and their seams: images of discs, cut up and put together again."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.model import masks, tiles
from serve_app.model.masks import MaskSet
from serve_app.model.tiles import Box

SIZE = (300, 420)


def seen(planes: np.ndarray, box: Box, better: float = 0.0) -> MaskSet:
    """What a model that makes no mistakes finds in a tile."""
    x, y, width, height = box
    cut = planes[:, y : y + height, x : x + width]
    cut = cut[cut.any(axis=(1, 2))]
    counts = masks.encode(cut)
    areas, around = masks.areas_and_boxes(counts, (height, width))
    flat = np.full(len(cut), 0.9 + better, np.float32)
    index = np.arange(len(cut), dtype=np.int32)
    return MaskSet((height, width), counts, around, areas, flat, flat, index, np.ones((len(cut), 4), np.float32))


def discs(*circles: tuple[int, int, int]) -> np.ndarray:
    """(x, y, radius) → [N, h, w]"""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.array([(columns - x) ** 2 + (rows - y) ** 2 <= radius**2 for x, y, radius in circles])


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(16, 300), st.data())
def test_tiles_cover_the_image_and_overlap(height: int, width: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile // 2))
    rows, columns = np.zeros(height, int), np.zeros(width, int)
    found = tiles.boxes((height, width), tile, overlap)
    for x, y, w, h in found:
        assert (w, h) == (min(tile, width), min(tile, height))
        assert 0 <= x <= width - w
        assert 0 <= y <= height - h
        rows[y : y + h] += 1
        columns[x : x + w] += 1
    assert rows.all()
    assert columns.all()
    assert len(set(found)) == len(found)
    for starts, side in ((sorted({y for _, y, _, _ in found}), tile), (sorted({x for x, _, _, _ in found}), tile)):
        assert all(first + side - second >= overlap for first, second in pairwise(starts))


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(0, 13), st.integers(0, 9), st.integers(3, 14)),
        min_size=1,
        max_size=20,
        unique_by=lambda c: c[:2],
    )
)
def test_discs_come_back_as_they_were(places: list[tuple[int, int, int]]) -> None:
    """None touches another; each is smaller than the overlap, so one tile at least sees it whole."""
    planes = discs(*((15 + 30 * x, 15 + 30 * y, radius) for x, y, radius in places))
    boxes = tiles.boxes(SIZE, 128, 40)
    found, owner = tiles.merged([(seen(planes, box), box) for box in boxes], SIZE)
    assert sorted(found.counts) == sorted(masks.encode(planes))
    assert len(owner) == len(found)


def test_an_object_larger_than_the_overlap_is_put_together() -> None:
    planes = discs((128, 150, 60), (300, 80, 20))
    boxes = tiles.boxes(SIZE, 150, 30)
    found, _ = tiles.merged([(seen(planes, box), box) for box in boxes], SIZE)
    assert sorted(found.counts) == sorted(masks.encode(planes))
    assert sorted(found.areas.tolist()) == sorted(planes.sum(axis=(1, 2)).tolist())
    np.testing.assert_array_equal(found.boxes, masks.areas_and_boxes(found.counts, SIZE)[1])
    np.testing.assert_allclose(found.object_embeddings, 1)


def test_of_two_whole_ones_the_better_stays_and_neighbours_do() -> None:
    planes = discs((200, 100, 15), (200, 132, 15))
    first, second = (0, 0, 260, 300), (160, 0, 260, 300)
    for better in (-0.1, 0.1):
        found, owner = tiles.merged([(seen(planes, first), first), (seen(planes, second, better), second)], SIZE)
        assert len(found) == 2
        assert owner.tolist() == [int(better > 0)] * 2


def test_two_objects_that_only_touch_at_a_seam_stay_two() -> None:
    """Each is cut off by an edge of its own tile, and they are not the same where both tiles see them."""
    planes = np.zeros((2, *SIZE), bool)
    planes[0, 100:120, 60:130] = planes[1, 121:141, 90:170] = True
    first, second = (0, 0, 130, 300), (90, 0, 330, 300)
    found, _ = tiles.merged([(seen(planes[:1], first), first), (seen(planes[1:], second), second)], SIZE)
    assert len(found) == 2


def test_no_masks_give_none() -> None:
    nothing = seen(np.zeros((0, *SIZE), bool), (0, 0, 100, 100))
    found, owner = tiles.merged([(nothing, (0, 0, 100, 100))], SIZE)
    assert len(found) == len(owner) == 0
    assert found.size == SIZE
