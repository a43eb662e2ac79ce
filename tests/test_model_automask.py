"""Automatic masks as segment_anything's generator makes them: grids, crops, filters, small regions."""

from __future__ import annotations

import functools
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.utils import amg

from cluster.errors import InvalidEmbedding, InvalidInput
from serve_app.model import automask, checkpoint, decoder, encoder, masks
from serve_app.model.decoder import Decoder
from serve_app.model.masks import MaskSet
from serve_app.model.preprocess import Size
from serve_app.model.prompts import Crop, GridOptions, View, crops, point_grid
from tests import weights_of_sam

pytest.importorskip("skimage")

SIZE = 200, 300  # height, width
NARROW = 70, 420
LARGE = 400, 600
TINY = 44, 60  # every crop, and half of the edges' 20 pixels, is smaller than a window of the encoder
ALL = {"pred_iou_thresh": -1e9, "stability_score_thresh": 0.05}


@pytest.fixture(scope="module")
def state() -> checkpoint.State:
    return weights_of_sam.smooth_nano(7)


@pytest.fixture(scope="module")
def folder(state: checkpoint.State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_of_sam.extracted(state, tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module", params=["reference", "fast", "openvino"])
def nano(request: pytest.FixtureRequest, folder: Path) -> Decoder:
    """Every test runs on all decoders."""
    if request.param == "openvino":
        pytest.importorskip("openvino")
    return decoder.load(folder, request.param)


@functools.cache
def image(size: Size) -> np.ndarray:
    path = files("skimage.data") / "coffee.png"
    return np.array(Image.open(str(path)).convert("RGB"))[: size[0], : size[1]]


@functools.cache
def views_of(folder: Path, size: Size, options: GridOptions) -> list[View]:
    encode = encoder.load(folder).encode
    return [(encode([crop.cut(image(size), 256)])[0].numpy(), crop) for crop in crops(size, options)]


@pytest.fixture(scope="module")
def expect(state: checkpoint.State) -> Any:
    """(size, options) → what segment_anything's generator finds; once for all decoders."""
    sam = weights_of_sam.filled("nano", state)

    @functools.cache
    def generate(size: Size, options: GridOptions) -> list[dict[str, Any]]:
        arguments = {name: getattr(options, name) for name in options.__dataclass_fields__}
        return SamAutomaticMaskGenerator(sam, **arguments).generate(image(size))

    return generate


def whole(folder: Path) -> list[View]:
    return views_of(folder, SIZE, GridOptions(2))


# The masks


CASES = {
    "all but empty ones": (SIZE, GridOptions(6, -1e9, 1e-9, 0.95), 20),
    "all thresholds": (SIZE, GridOptions(6, 0.1, 0.3, 0.8, 2.0), 5),
    "a layer": (SIZE, GridOptions(4, **ALL, box_nms_thresh=0.95, crop_n_layers=1, crop_nms_thresh=0.95), 20),
    "no overlap": (
        LARGE,
        GridOptions(3, **ALL, box_nms_thresh=0.95, crop_n_layers=1, crop_nms_thresh=0.95, crop_overlap_ratio=0.0),
        15,
    ),
    "two layers": (
        LARGE,
        GridOptions(4, **ALL, crop_n_layers=2, crop_nms_thresh=0.9, crop_n_points_downscale_factor=2),
        10,
    ),
    "narrow": (NARROW, GridOptions(3, **ALL, crop_n_layers=1, min_mask_region_area=200), 10),
    "tiny": (TINY, GridOptions(3, **ALL, crop_n_layers=1, crop_overlap_ratio=0.5), 5),
    "small regions": (SIZE, GridOptions(5, -1e9, 1e-9, 0.95, min_mask_region_area=400), 10),
}


@pytest.mark.parametrize("case", CASES)
def test_masks_are_segment_anythings(case: str, nano: Decoder, folder: Path, expect: Any) -> None:
    size, options, number = CASES[case]
    theirs, views = expect(size, options), views_of(folder, size, options)
    ours = automask.generate(nano, views, size, options)
    assert len(ours) == len(theirs) >= number
    planes = ours.decode()
    points = np.concatenate([crop.points() for _, crop in views])[:, 0]
    places = np.repeat(np.arange(len(views)), [crop.points_per_side**2 for _, crop in views])
    for index, expected in enumerate(theirs):  # in the same order
        assert masks.iou(planes[index], expected["segmentation"]) >= 0.99
        assert ours.areas[index] == planes[index].sum() == pytest.approx(expected["area"], rel=1e-2)
        assert ours.boxes[index] == pytest.approx(expected["bbox"] + np.array([0, 0, 1, 1]), abs=1)
        assert ours.predicted_iou[index] == pytest.approx(expected["predicted_iou"], abs=1e-3)
        assert ours.stability[index] == pytest.approx(expected["stability_score"], abs=1e-2)
        assert points[ours.prompt_index[index]] == pytest.approx(expected["point_coords"][0], rel=1e-6)
        x0, y0, x1, y1 = views[places[ours.prompt_index[index]]][1].box
        assert [x0, y0, x1 - x0, y1 - y0] == expected["crop_box"]


@pytest.mark.parametrize("case", [name for name, (_, options, _) in CASES.items() if options.crop_n_layers])
def test_masks_come_from_several_crops(case: str, expect: Any) -> None:
    """Else the test above would say little of them."""
    assert len({tuple(one["crop_box"]) for one in expect(*CASES[case][:2])}) >= 3


def assert_same(first: MaskSet, second: MaskSet) -> None:
    assert first.counts == second.counts
    for name in ("boxes", "areas", "predicted_iou", "stability", "prompt_index"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    np.testing.assert_allclose(first.object_embeddings, second.object_embeddings, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [0, 10 * 4 * 128**2])
def test_masks_that_cannot_wait_are_the_same(
    limit: int, nano: Decoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = GridOptions(6, -1e9, 1e-9, 0.9)
    expected = automask.generate(nano, whole(folder), SIZE, options)
    monkeypatch.setattr(automask, "WAITING_BYTES", limit)
    assert_same(automask.generate(nano, whole(folder), SIZE, options), expected)


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("thresholds", [{"pred_iou_thresh": 99.0}, {"stability_score_thresh": 1.1}])
def test_thresholds_can_leave_nothing(layers: int, thresholds: dict[str, float], nano: Decoder, folder: Path) -> None:
    options = GridOptions(2, **{**ALL, **thresholds}, crop_n_layers=layers, min_mask_region_area=9)
    assert len(automask.generate(nano, views_of(folder, SIZE, options), SIZE, options)) == 0


# What is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"points_per_side": 0}, "points_per_side is 0; expected 1 to 128"),
        ({"points_per_side": 129}, "1 to 128"),
        ({"pred_iou_thresh": math.nan}, "pred_iou_thresh is nan"),
        ({"stability_score_thresh": math.nan}, "stability_score_thresh is nan"),
        ({"box_nms_thresh": 1.5}, "box_nms_thresh is 1.5; expected 0 to 1"),
        ({"stability_score_offset": -1.0}, "stability_score_offset is -1.0"),
        ({"stability_score_offset": math.inf}, "stability_score_offset is inf"),
        ({"crop_n_layers": -1}, "crop_n_layers is -1; expected 0 to 3"),
        ({"crop_n_layers": 4}, "crop_n_layers is 4"),
        ({"crop_nms_thresh": -0.1}, "crop_nms_thresh"),
        ({"crop_overlap_ratio": 1.0}, "crop_overlap_ratio"),
        ({"crop_n_points_downscale_factor": 0}, "crop_n_points_downscale_factor"),
        ({"points_per_side": 7, "crop_n_layers": 2, "crop_n_points_downscale_factor": 3}, "leave none in crop layer 2"),
        ({"points_per_side": 128, "crop_n_layers": 2}, "344064 points in all"),
        ({"min_mask_region_area": -1}, "min_mask_region_area"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        automask.generate(None, [], SIZE, GridOptions(**options))  # type: ignore[arg-type]


def test_views_that_are_refused(nano: Decoder, folder: Path) -> None:
    ((embedding, crop),) = whole(folder)
    with pytest.raises(InvalidEmbedding):
        automask.generate(nano, [(embedding[:9], crop)], SIZE, GridOptions(2))
    for box in ((0, 0, 301, 200), (-1, 0, 300, 200), (0, 9, 300, 9)):
        with pytest.raises(InvalidInput, match="does not lie in the image of 300 × 200"):
            automask.generate(nano, [(embedding, Crop(box, 2))], SIZE, GridOptions(2))


# Grids and crops


@pytest.mark.parametrize("side", [1, 2, 7, 32])
def test_grid_is_segment_anythings(side: int) -> None:
    np.testing.assert_allclose(point_grid(side, SIZE)[:, 0], amg.build_point_grid(side) * SIZE[::-1], rtol=1e-6)


@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.integers(0, 3),
    st.floats(0, 0.9),
    st.integers(1, 128),
    st.integers(1, 4),
)
def test_crops_are_segment_anythings(size: Size, layers: int, overlap: float, side: int, factor: int) -> None:
    options = GridOptions(side, crop_n_layers=layers, crop_overlap_ratio=overlap, crop_n_points_downscale_factor=factor)
    boxes, numbers = amg.generate_crop_boxes(size, layers, overlap)
    expected = [
        (tuple(box), int(side / factor**number))
        for box, number in zip(boxes, numbers, strict=True)
        if box[0] < box[2] and box[1] < box[3]
    ]
    assert [(crop.box, crop.points_per_side) for crop in crops(size, options)] == expected


@given(arrays(bool, st.tuples(st.integers(0, 3), st.integers(1, 12), st.integers(1, 12))), st.data())
def test_masks_are_placed_in_the_image(planes: np.ndarray, data: st.DataObject) -> None:
    _, height, width = planes.shape
    x, y, right, below = (data.draw(st.integers(0, 9)) for _ in range(4))
    size = height + y + below, width + x + right
    counts = masks.encode(planes)
    areas, boxes = masks.areas_and_boxes(counts, (height, width))
    rest: list[Any] = [np.zeros(len(planes))] * 4
    placed = masks.place(MaskSet((height, width), counts, boxes, areas, *rest), (x, y), size)
    expected = np.pad(planes, ((0, 0), (y, below), (x, right)))
    assert np.array_equal(placed.decode(), expected)
    assert placed.counts == masks.encode(expected)
    there = placed.areas > 0
    assert np.array_equal(placed.boxes[there], masks.areas_and_boxes(placed.counts, size)[1][there])


# Small regions


@settings(max_examples=400)
@given(
    arrays(bool, st.tuples(st.integers(1, 14), st.integers(1, 14)), fill=st.booleans()),
    st.tuples(*[st.integers(0, 6)] * 4),
    st.integers(1, 60),
)
def test_small_regions_are_segment_anythings(plane: np.ndarray, margins: tuple[int, ...], area: int) -> None:
    pytest.importorskip("cv2")
    mask = np.pad(plane, (margins[:2], margins[2:]))
    filled, holes = amg.remove_small_regions(mask, area, "holes")
    expected, islands = amg.remove_small_regions(filled, area, "islands")
    before = mask.copy()
    found = masks.remove_small_regions(mask, area)
    assert np.array_equal(mask, before)
    assert (found is None) == (not holes and not islands)
    if found is not None and not np.array_equal(found, expected):  # of small islands of one size either may stay
        assert found.sum() == expected.sum() < area
        assert not (found & ~filled).any()
