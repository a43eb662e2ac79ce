"""CellSAM: pixels, boxes and cells equal those of its own package, whose answers are in cellsam_golden.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from skimage import exposure
from torch.nn import functional

from cluster.errors import InvalidCheckpoint, InvalidImage, InvalidInput, InvalidSettings
from serve_app.model import (
    architectures,
    cell_masks,
    cellfinder,
    cells,
    cellsam,
    cellsam_inputs,
    cellsam_names,
    checkpoint,
    decoder,
    encoder,
    masks,
    modules,
    paint,
    seams,
    state,
)
from serve_app.model.cell_masks import Boxes, Cells
from serve_app.model.cells import CellSAM
from serve_app.model.cellsam import Options
from tests import cellsam_oracle
from tests.cellsam_oracle import SMALL

GOLDEN = json.loads(cellsam_oracle.GOLDEN.read_text())["images"]
IMAGES = cellsam_oracle.images()
SOURCE: dict[str, Any] = {"source": "test", "source_sha256": "", "trained": False}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> CellSAM:
    """The weights that the golden file is of; by the reference runtimes."""
    folder = tmp_path_factory.mktemp("small")
    checkpoint.extract(cellsam_oracle.weights(SMALL), folder, **SOURCE)
    parts = encoder.load(folder, "reference"), cellfinder.load(folder, "torch"), decoder.load(folder, "fast")
    return CellSAM(*parts, "cpu")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    checkpoint.extract(cellsam_oracle.weights(cellsam_oracle.NANO), folder, **SOURCE)
    return folder


@pytest.mark.parametrize("name", IMAGES)
def test_pixels_equal_cellsams(name: str) -> None:
    ready = cellsam.normalise(cellsam.channels(IMAGES[name]))
    square = cellsam_inputs.square(ready, 1024)
    made = {
        "image": ready,
        "encoder": cellsam_inputs.encoder_input(square, True).numpy(),
        "detector": cellsam_inputs.detector_input(square, True).numpy(),
    }
    for key, values in made.items():
        assert np.abs(np.array(cellsam_oracle.shown(values)) - GOLDEN[name][key]).max() <= 1e-5, key


def test_boxes_and_cells_equal_cellsams(small: CellSAM) -> None:
    image, golden = IMAGES[cellsam_oracle.ANSWERED], GOLDEN[cellsam_oracle.ANSWERED]
    size, wanted = (image.shape[0], image.shape[1]), np.array(golden["boxes"], np.float32)
    ready = cellsam.normalise(cellsam.channels(image))
    (found,) = cells.find(small.detector, [ready])
    assert np.abs(found.scores[: len(wanted)] - golden["scores"]).max() <= 1e-5
    assert np.abs(found.boxes[: len(wanted)] - wanted).max() <= 1e-2  # of 1024 px
    assert np.ptp(golden["scores"]) > 5e-3  # they do differ from each other
    (embedding,) = cells.embed(small.encoder, [ready])
    own = paint.paint(small.decoder, embedding, Boxes(wanted, found.scores[: len(wanted)]), size)
    labels = np.zeros(size, int)
    for number, mask in enumerate(masks.decode(golden["cells"], size), start=1):
        labels[mask] = number
    assert (own.labels != labels).mean() <= 1e-4  # a pixel whose logit is the threshold
    assert len(own) == len(golden["cells"]) > 5


def test_the_encoder_alone_answers_as_in_the_pipeline(nano: Path) -> None:
    """An ordinary encoder of an ordinary Segment Anything model, once the detector is gone."""
    whole = checkpoint.ModelCard.read(nano)
    alone = nano.parent / "alone"
    state_of_it = checkpoint.load_half(nano, checkpoint.ENCODER, whole)
    card = checkpoint.extract(state_of_it, alone, **SOURCE)
    assert (card.family, card.encoder_sha256, card.detector) == ("nano", whole.encoder_sha256, None)
    ready = cellsam.normalise(cellsam.channels(IMAGES["rgb"]))
    (inside,) = cells.embed(encoder.load(nano, "reference"), [ready])
    pixels = cellsam_inputs.encoder_input(cellsam_inputs.square(ready, 256), whole.advanced)
    outside = encoder.load(alone, "reference").forward(pixels[None])[0].numpy()
    assert np.array_equal(inside, outside)


def test_runtimes_of_the_detector_agree(nano: Path) -> None:
    pixels = torch.rand(3, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    ours, theirs = (cellfinder.load(nano, name).forward(pixels) for name in ("torch", "openvino"))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-4
    alone = [cellfinder.load(nano, "torch").forward(one[None])[0] for one in pixels]
    assert (torch.cat(alone) - ours[0]).abs().max() <= 1e-5
    assert ours[0].std(1).min() > 0.01


def test_refused_settings(nano: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="no detector runtime 'fast'; there are auto, torch, openvino"):
        cellfinder.load(nano, "fast")
    with pytest.raises(InvalidSettings, match="computes in float32 on a CPU, not bfloat16"):
        cellfinder.load(nano, "torch", dtype="bfloat16")
    checkpoint.extract(modules.seeded("nano", 0), tmp_path, **SOURCE)
    with pytest.raises(InvalidCheckpoint, match="has no detector"):
        cells.load(tmp_path)


def test_a_checkpoint_taken_apart(tmp_path: Path) -> None:
    ours = modules.seeded("nano_cellsam", 3)
    theirs = cellsam_oracle.renamed(ours, 2)
    torch.save({"state_dict": theirs, "epoch": 3}, tmp_path / "cellsam.pt")
    read = state.read(tmp_path / "cellsam.pt")
    assert read[cellsam_names.ADVANCED] == 1
    assert {name for name in read if not name.startswith(cellsam_names.UNUSED)} == set(ours)
    assert all(torch.equal(read[name], tensor) for name, tensor in ours.items())
    unused = {name.split(".")[1] for name in read if name.startswith(cellsam_names.UNUSED)}
    assert unused == {"model", "detector"}  # the other SAM, and the first layer's heads
    card = checkpoint.extract(read, tmp_path / "out", source="test", source_sha256="")
    assert (card.family, card.advanced) == ("nano_cellsam", True)
    again = checkpoint.ModelCard.read(tmp_path / "out")
    assert again == card
    table = checkpoint.parameter_table(read)
    assert {half for half, *_ in table} == {"encoder", "decoder", "detector", "unused", "card"}
    assert sum(numbers for *_, numbers in table) == sum(tensor.numel() for tensor in read.values())

    plain = {name: one for name, one in theirs.items() if not name.startswith(cellsam_names.COPY)}
    torch.save(plain, tmp_path / "plain.pt")
    read = state.read(tmp_path / "plain.pt")
    assert read[cellsam_names.ADVANCED] == 0
    assert torch.equal(read["image_encoder.pos_embed"], ours["image_encoder.pos_embed"] + 1)


def test_a_checkpoint_that_lacks_a_part(tmp_path: Path) -> None:
    made = modules.seeded("nano_cellsam", 3)
    del made["detector.transformer.decoder_layers.1.norm1.bias"]
    with pytest.raises(InvalidCheckpoint, match=r"detector\.transformer\.decoder_layers\.1: 1 missing"):
        checkpoint.extract(made, tmp_path / "out", **SOURCE)
    sizes = architectures.CELLSAMS["nano_cellsam"][1]
    other = replace(sizes, backbone=replace(sizes.backbone, image_size=128))
    made = modules.drawn(architectures.SAMS["nano"], other, 0)
    with pytest.raises(InvalidCheckpoint, match="the detector is for 128 px, the image encoder for 256 px"):
        checkpoint.extract(made, tmp_path / "out", **SOURCE)


def test_every_tensor_of_the_detector_counts(nano: Path) -> None:
    """Nothing is loaded and then not used."""
    module = cellfinder.module(nano, checkpoint.ModelCard.read(nano)).requires_grad_(True)
    type(module).prepare.__wrapped__(module)  # type: ignore[attr-defined]  # with its gradient
    logits, boxes = module(torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1)))
    (logits.square().sum() + boxes.square().sum()).backward()
    unused = [name for name, own in module.named_parameters() if own.grad is None or not own.grad.any()]
    assert unused == []


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5, 4)), r"found \[4, 5, 4\] float64"),
        (np.zeros((0, 5)), r"found \[0, 5\]"),
        (np.zeros(5), r"expected \[h, w\] or \[h, w, 1 to 3\]"),
        (np.full((4, 5), np.nan), "not finite"),
        (np.zeros((4, 5), "U1"), "found"),
    ],
)
def test_images_that_are_none(image: np.ndarray, message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        cellsam.channels(image)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bbox_threshold": 1.5}, "bbox_threshold is 1.5; expected 0 to 1"),
        ({"iou_threshold": 0.0}, "iou_threshold is 0"),
        ({"block_size": 10}, "block_size is 10; expected 64 to 4096 pixels"),
        ({"overlap": 300}, "overlap is 300; expected 0 to half of block_size, 200"),
    ],
)
def test_options_out_of_range(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        replace(Options(), **changed).check()


def test_where_channels_go() -> None:
    grey = cellsam.channels(np.array([[0, 5], [10, 10]], np.uint16))
    assert grey[..., :2].max() == 0
    assert grey[..., 2].tolist() == [[0, 0.5], [1, 1]]
    two = cellsam.channels(np.array([[[1, 7], [3, 7]]]))
    assert two[0].tolist() == [[0, 0, 7], [0, 1, 7]]  # a channel of one value stays as it is, and becomes 0 later
    assert cellsam.normalise(two)[..., 2].max() == 0


def test_black_images_have_no_cells(nano: Path) -> None:
    model = cells.load(nano)
    for image in (np.zeros((80, 90), np.uint8), np.full((80, 90, 3), 7, np.uint16)):
        found = model.segment(image)
        assert found.labels.shape == (80, 90)
        assert np.isfinite(found.box_scores).all()


def test_low_contrast_is_enhanced() -> None:
    y, x = np.mgrid[:256, :256] / 255
    flat = np.zeros((256, 256, 3), np.float32)
    flat[..., 2] = (x + y) / 2
    brighter, threshold = cellsam.enhance(flat)  # CellSAM's own function fails on such an image
    equalised = exposure.equalize_adapthist(flat, kernel_size=384, clip_limit=0.01)
    assert np.allclose(brighter, equalised**1.2, atol=1e-6)
    assert threshold == 0.15
    flat[..., 2] = x
    assert cellsam.enhance(flat)[0] is flat  # has contrast enough


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=60))
def test_the_threshold_splits_scores_best(values: list[float]) -> None:
    scores = np.array(values, np.float32)
    low, high = cellsam._two_means(scores)
    assert low <= high + 1e-9

    def spread(lower: np.ndarray, upper: np.ndarray) -> float:
        return float(sum(((part - part.mean()) ** 2).sum() for part in (lower, upper) if len(part)))

    ordered = np.sort(scores.astype(np.float64))
    best = min(spread(ordered[:cut], ordered[cut:]) for cut in range(1, len(ordered)))
    near = np.abs(ordered - low) <= np.abs(ordered - high)
    assert spread(ordered[near], ordered[~near]) <= best + 1e-6
    assert cellsam.threshold(scores, 0.4) == pytest.approx(0.66 * 0.4 + 0.33 * (low + high) / 2)


@pytest.mark.parametrize("size", [(300, 200), (1024, 1024), (37, 911), (1, 60)])
def test_masks_are_resized_as_segment_anything_does(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).normal(-0.6, 1, (256, 256))
    logits = 3 * ndimage.gaussian_filter(noise, 4).astype(np.float32)
    tensor = torch.from_numpy(logits)[None, None]
    for length in ((1024, 1024), size):
        tensor = functional.interpolate(tensor, length, mode="bilinear", align_corners=False)
    expected = torch.sigmoid(tensor[0, 0]) > 0.4
    labels = np.zeros(size, np.int32)
    paint._draw(labels, logits, 5, 1024)
    assert set(np.unique(labels)) <= {0, 5}
    assert ((labels == 5) != expected.numpy()).mean() <= 1e-4  # a pixel whose logit is the threshold
    nothing = np.zeros(size, np.int32)
    paint._draw(nothing, np.full((256, 256), -9, np.float32), 5, 1024)
    assert not nothing.any()


def test_holes_are_filled_and_specks_dropped() -> None:
    labels = np.zeros((40, 40), np.int32)
    labels[2:12, 2:12] = 3
    labels[5:7, 5:7] = 0
    labels[20:23, 20:23] = 4  # 9 pixels
    labels[30:38, 30:38] = 9
    assert paint._tidy(labels).tolist() == [3, 9]
    assert [(labels == number).sum() for number in (1, 2)] == [100, 64]
    assert labels.max() == 2


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.floats(0.1, 0.9))
def test_holes_are_those_of_scipy(seed: int, height: int, width: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    assert np.array_equal(paint._filled(mask), ndimage.binary_fill_holes(mask))


def drawn(labels: np.ndarray) -> Cells:
    """Cells with the boxes of their labels, in pixels."""
    places = [place for place in ndimage.find_objects(labels) if place]
    boxes = [[x.start, y.start, x.stop, y.stop] for y, x in places]
    count = len(places)
    scores = np.linspace(0.9, 0.5, count, dtype=np.float32)
    return Cells(labels, np.array(boxes, np.float32).reshape(-1, 4), scores, scores, np.zeros((count, 2), np.float32))


@given(st.integers(0, 2**32 - 1), st.integers(64, 120), st.integers(8, 32), st.integers(70, 260), st.integers(70, 260))
def test_tiles_join_to_the_whole(seed: int, block: int, overlap: int, height: int, width: int) -> None:
    """Cells that fit into what two tiles share come out as in one piece."""
    rng = np.random.default_rng(seed)
    whole = np.zeros((height, width), np.int32)
    for number in range(1, 30):
        y, x, side = (int(rng.integers(0, most)) for most in (height, width, overlap))
        whole[y : y + side, x : x + side] = number
    whole = _renumbered(whole)
    options = Options(block_size=block, overlap=overlap, iou_threshold=0.5)
    places = seams.tiles((height, width), options)
    covered = np.zeros((height, width), int)
    for place in places:
        covered[place.core] += 1
    assert (covered == 1).all()
    parts = [drawn(_renumbered(whole[place.seen])) for place in places]
    found = seams.joined(parts, places, (height, width), options)
    assert (found.labels > 0).tolist() == (whole > 0).tolist()
    pairs = {(int(a), int(b)) for a, b in zip(whole.ravel(), found.labels.ravel(), strict=True) if a}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(found)
    for number, box in enumerate(found.boxes, start=1):
        y, x = ndimage.find_objects((found.labels == number).astype(int))[0]
        assert box.tolist() == [x.start, y.start, x.stop, y.stop]


def _renumbered(labels: np.ndarray) -> np.ndarray:
    _, numbers = np.unique(np.append(labels.ravel(), 0), return_inverse=True)
    return numbers[:-1].reshape(labels.shape).astype(np.int32)


def test_an_image_in_tiles(nano: Path) -> None:
    model = cells.load(nano)
    image = cellsam_oracle.data.immunohistochemistry()[:200, :220]
    options = Options(block_size=128, overlap=32, bbox_threshold=0.92)
    found = model.segment(image, options)
    assert found.labels.shape == (200, 220)
    assert np.unique(found.labels).tolist() == list(range(len(found) + 1))
    made = found.masks()
    assert masks.label_map(made.counts, made.areas.tolist(), range(1, len(made) + 1), made.size).tolist() == (
        found.labels.tolist()
    )
    assert len(found) > 1
    gauged = model.segment(image, replace(options, gauge_cell_size=True))
    small = np.median(made.areas) < seams.SMALL * found.labels.size
    whole = model.segment(image, replace(options, use_wsi=False))
    assert np.array_equal(gauged.labels, (found if small else whole).labels)
    assert not np.array_equal(found.labels, whole.labels)


@given(st.integers(0, 2**32 - 1), st.integers(65, 300), st.integers(65, 300))
def test_a_tile_that_failed_is_a_hole(seed: int, height: int, width: int) -> None:
    """What lies in other tiles is as it is there; nothing is where the failed one has its core."""
    rng = np.random.default_rng(seed)
    whole = (ndimage.zoom(rng.integers(0, 40, (5, 5)), (height / 5, width / 5), order=0)).astype(np.int32)
    whole = _renumbered(whole)
    options = Options(block_size=64, overlap=16)
    places = seams.tiles(whole.shape, options)
    missing = int(rng.integers(len(places)))
    parts = [None if index == missing else drawn(_renumbered(whole[place.seen])) for index, place in enumerate(places)]
    running = seams.Seams(places, options)
    found = [cell for part in parts for cell in running.add(part)]
    assert not running.groups
    labels = seams.labelled(found, whole.shape).labels
    expected = whole > 0
    expected[places[missing].core] = False
    assert np.array_equal(labels > 0, expected)
    made = cell_masks.outlined(found, whole.shape)
    assert np.array_equal(masks.label_map(made.counts, made.areas.tolist(), range(1, len(made) + 1), made.size), labels)


def test_compat_tiles_are_cellsams(small: CellSAM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tiles, with the opposite edge beyond the border, joined as it joins them."""
    image, options = IMAGES[cellsam_oracle.ANSWERED][: cellsam_oracle.TILED_ROWS], cellsam_oracle.TILES
    count = cellsam_oracle.TILE_BOXES
    monkeypatch.setattr(Boxes, "above", lambda own, _: Boxes(own.boxes[:count], own.scores[:count]))
    found = small.segment(image, options)
    assert set(found.masks().counts) == set(GOLDEN[cellsam_oracle.ANSWERED]["tiled"])
    with pytest.raises(InvalidInput, match="compat needs a whole image"):
        cellsam.Pixels(Windowed(), options)


class Windowed:
    size = 10, 10

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        raise AssertionError("it is not to be read")
