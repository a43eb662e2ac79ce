"""RLE strings taken apart many at a time, beside pycocotools one at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from cluster.errors import InvalidInput
from serve_app.model import masks, rle
from serve_app.model.rle import Texts


@st.composite
def some_masks(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.tuples(st.integers(0, 6), st.integers(1, 40), st.integers(1, 40)))
    values = np.random.default_rng(draw(st.integers(0, 1 << 32))).random(shape)
    return values < draw(st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]))


def test_more_masks_than_a_byte_counts_have_areas_and_boxes() -> None:
    plane = np.zeros((1, 9, 9), bool)
    plane[0, 2:5, 3:7] = True
    areas, boxes = masks.areas_and_boxes(masks.encode(plane) * 300, (9, 9))
    assert areas.tolist() == [12] * 300
    assert boxes.tolist() == [[3, 2, 4, 3]] * 300


@settings(max_examples=150)
@given(found=some_masks(), tall=st.integers(1, 50), group=st.integers(1, 100), seed=st.integers(0, 9))
def test_what_is_read_of_strings_is_what_was_written(found: np.ndarray, tall: int, group: int, seed: int) -> None:
    size, count = (found.shape[1], found.shape[2]), len(found)
    written = masks.encode(found)
    texts = Texts.of(written)
    assert rle.covered(texts, size).all()
    assert not rle.covered(texts, (size[0], size[1] + 1)).any()
    areas, boxes = rle.extents(texts, size)
    for index, text in enumerate(written):
        one = {"size": list(size), "counts": text.encode()}
        assert areas[index] == coco.area(one) == found[index].sum()
        assert boxes[index].tolist() == coco.toBbox(one).tolist()
    pieces, seen = rle.columns(texts, size), np.zeros(found.shape, int)
    for mask, column, top, bottom in zip(pieces.mask, pieces.column, pieces.top, pieces.bottom, strict=True):
        seen[mask, top:bottom, column] += 1
    np.testing.assert_array_equal(seen, found)

    sizes = np.random.default_rng(seed).integers(0, 3, count)  # with equal ones
    expected = np.zeros(size, int)
    for index in sorted(range(count), key=lambda index: -sizes[index]):
        expected[found[index]] = index + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rle, "AT_ONCE", group)
        patch.setattr(rle, "PIXELS_AT_ONCE", group)
        made = list(rle.bands(texts, sizes, np.arange(1, count + 1), size, np.uint16, tall))
    assert [len(band) for band in made[:-1]] == [tall] * (len(made) - 1)
    np.testing.assert_array_equal(np.concatenate(made), expected)


@settings(max_examples=150)
@given(text=st.one_of(st.text(max_size=20), st.text("0123456789:;<=>?@ABOPQRSTUVWXYZ_`abcdefghijklmno", max_size=20)))
def test_damage_is_found_and_stays_with_its_string(text: str) -> None:
    size = (20, 20)
    (good,) = masks.encode(np.random.default_rng(0).random((1, *size)) < 0.5)
    for damaged in (text, good[:-1], good + text, good[: len(good) // 2] + text):
        first, found, last = rle.covered(Texts.of([good, damaged, good]), size)
        assert first
        assert last
        if not found:
            with pytest.raises(InvalidInput, match="not a COCO RLE of 20 × 20 pixels"):
                rle.columns(Texts.of([good, damaged]), size)
        else:  # of 400 pixels by chance
            coco.decode({"size": list(size), "counts": damaged.encode()})
