"""Numbers agree with the installed segment_anything, run as its users run it, on weights that are all random."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from segment_anything import SamPredictor

from serve_app.model import decoder, encoder, masks, modules, preprocess
from serve_app.model.decoder import Decoder
from serve_app.model.encoder import Encoder
from serve_app.model.prompts import DecodeRequest, Prompts
from tests import weights_of_sam
from tests.weights_of_sam import relative

pytest.importorskip("skimage")

SAME = 1e-5  # of the norm; float32 sums in another order
HALF = 2.0**-11  # rounding to float16
BOXES = np.array([[30, 40, 290, 310], [5.5, 2.25, 60.75, 90], [100, 10, 420, 300]], np.float32)
POINTS = np.array([[[50, 60], [200, 220], [0, 0]], [[300, 100], [20, 310], [33, 44]], [[10, 9], [8, 7], [6, 5]]])
LABELS = np.array([[1, 0, -1], [1, 1, 0], [0, 1, -1]], np.int32)
KINDS = {
    "boxes": Prompts(boxes=BOXES),
    "points": Prompts(points=POINTS.astype(np.float32), labels=LABELS),
    "both": Prompts(boxes=BOXES, points=POINTS.astype(np.float32), labels=LABELS),
}


class Recorder:
    """An encoder that keeps the last float32 answer, so that one pass serves both precisions."""

    def __init__(self, inner: Encoder) -> None:
        self.inner, self.card = inner, inner.card

    def encode(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        self.answer = self.inner.encode(images)
        return self.answer


class Pair:
    """A model twice: in segment_anything's predictor with an image set, and in our halves."""

    def __init__(self, name: str, folder: Path, image: bytes) -> None:
        self.state = modules.seeded(name, 7)
        self.predictor = SamPredictor(weights_of_sam.filled(name, self.state))
        self.predictor.set_image(np.array(Image.open(BytesIO(image)).convert("RGB")))
        self.features = self.predictor.features[0].numpy()
        weights_of_sam.extracted(self.state, folder)
        self.encoder, self.decoder = Recorder(encoder.load(folder)), decoder.load(folder)
        self.image = preprocess.resize(preprocess.decode(image, 10**8), self.encoder.card.architecture.image_size)
        (self.half,) = encoder.embed(self.encoder, [self.image.pixels])

    def request(self, prompts: Prompts, multimask: bool) -> DecodeRequest:
        return DecodeRequest(self.features, self.image.original, prompts, multimask)


@pytest.fixture(scope="module", params=["nano", "sam_vit_b"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    image = (files("skimage.data") / "rocket.jpg").read_bytes()  # 427 × 640
    return Pair(request.param, tmp_path_factory.mktemp("pair"), image)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> tuple[SamPredictor, Encoder, Decoder]:
    state = modules.seeded("nano", 3)
    folder = weights_of_sam.extracted(state, tmp_path_factory.mktemp("nano"))
    return SamPredictor(weights_of_sam.filled("nano", state)), encoder.load(folder), decoder.load(folder)


def predicted(predictor: SamPredictor, prompts: Prompts, multimask: bool) -> tuple[torch.Tensor, ...]:
    """(masks, predicted IoU, low-resolution logits) of all prompts in one call of the predictor."""
    size, transform = predictor.original_size, predictor.transform
    boxes = points = labels = None
    if prompts.boxes is not None:
        boxes = torch.as_tensor(transform.apply_boxes(prompts.boxes, size), dtype=torch.float)
    if prompts.points is not None:
        points = torch.as_tensor(transform.apply_coords(prompts.points, size), dtype=torch.float)
        labels = torch.as_tensor(prompts.labels)
    return predictor.predict_torch(points, labels, boxes, multimask_output=multimask)


def test_no_parameter_is_fresh(pair: Pair) -> None:
    """What the comparisons below rest on: a constant table could be left out and nothing would show."""
    constant = [name for name, tensor in pair.state.items() if tensor.numel() > 1 and tensor.std() < 0.01]
    assert constant == []


def test_embedding(pair: Pair) -> None:
    assert pair.image.original == (427, 640)
    assert relative(pair.encoder.answer[0], pair.features) <= SAME


def test_float16_embedding(pair: Pair) -> None:
    assert isinstance(pair.half, np.ndarray)
    assert pair.half.dtype == np.float16
    assert relative(pair.half, pair.features) <= HALF + SAME


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_predicted_iou(pair: Pair, kind: str, multimask: bool) -> None:
    logits, scores = pair.decoder.logits(pair.request(KINDS[kind], multimask))
    _, expected_scores, expected = predicted(pair.predictor, KINDS[kind], multimask)
    assert relative(logits, expected) <= SAME
    assert relative(scores, expected_scores) <= SAME


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_masks(pair: Pair, kind: str, multimask: bool) -> None:
    (found,) = decoder.segment(pair.decoder, [pair.request(KINDS[kind], multimask)])
    assert isinstance(found, masks.MaskSet)
    expected, scores, _ = predicted(pair.predictor, KINDS[kind], multimask)
    assert_same_masks(found.decode(), expected.flatten(0, 1).numpy())
    assert relative(found.predicted_iou, scores.flatten()) <= SAME
    assert found.prompt_index.tolist() == np.repeat(range(len(expected)), expected.shape[1]).tolist()


def test_masks_of_one_prompt_as_people_ask_for_them(pair: Pair) -> None:
    """One prompt a request: random weights make much of the last bit, and that depends on the size of a batch."""
    requests = [pair.request(KINDS["both"].take(slice(index, index + 1)), True) for index in range(3)]
    for index, found in enumerate(decoder.segment(pair.decoder, requests)):
        assert isinstance(found, masks.MaskSet)
        expected, _, _ = pair.predictor.predict(POINTS[index], LABELS[index], BOXES[index], multimask_output=True)
        assert_same_masks(found.decode(), expected)


def assert_same_masks(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert expected.any((1, 2)).all()
    assert not expected.all((1, 2)).any()
    assert min(map(masks.iou, found, expected)) > 0.9999


@pytest.mark.parametrize("table", ["rel_pos_h", "rel_pos_w", "pos_embed"])
def test_position_matters(nano: tuple[SamPredictor, Encoder, Decoder], table: str) -> None:
    """A runtime that ignores one of the position tables could not pass."""
    ours = nano[1].encode([np.full((256, 200, 3), 90, np.uint8)])
    state = modules.seeded("nano", 3)
    state |= {name: torch.zeros_like(tensor) for name, tensor in state.items() if name.endswith(table)}
    predictor = SamPredictor(weights_of_sam.filled("nano", state))
    predictor.set_image(np.full((256, 200, 3), 90, np.uint8))
    assert relative(ours, predictor.features) > 0.1


def test_a_batch_of_many_sizes_is_as_one_by_one(nano: tuple[SamPredictor, Encoder, Decoder]) -> None:
    predictor, ours, _ = nano
    images = [noise(height, width) for height, width in ((300, 200), (200, 300), (256, 256), (70, 640), (2, 500))]
    batch = ours.encode([preprocess.resize(image, 256).pixels for image in images])
    for image, embedding in zip(images, batch, strict=True):
        predictor.set_image(image)
        assert relative(embedding, predictor.features[0]) <= SAME, image.shape


@settings(max_examples=6, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 700), st.integers(1, 700))
def test_any_size(nano: tuple[SamPredictor, Encoder, Decoder], height: int, width: int) -> None:
    predictor, ours, _ = nano
    assume(min(predictor.transform.get_preprocess_shape(height, width, 256)) > 0)
    image = noise(height, width)
    predictor.set_image(image)
    assert relative(ours.encode([preprocess.resize(image, 256).pixels]), predictor.features) <= SAME


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_prompts(nano: tuple[SamPredictor, Encoder, Decoder], data: st.DataObject) -> None:
    predictor, _, ours = nano
    height, width = data.draw(st.tuples(st.integers(16, 400), st.integers(16, 400)), "size")
    prompts, points = data.draw(st.integers(1, 3), "prompts"), data.draw(st.integers(0, 3), "points")
    rng = np.random.default_rng(data.draw(st.integers(0, 999), "seed"))
    corners = np.sort(rng.uniform(0, 1, (prompts, 2, 2)), axis=1) * (width, height)
    asked = Prompts(
        boxes=corners.reshape(-1, 4).astype(np.float32) if not points or data.draw(st.booleans(), "boxes") else None,
        points=(rng.uniform(0, 1, (prompts, points, 2)) * (width, height)).astype(np.float32) if points else None,
        labels=np.sort(rng.integers(-1, 2, (prompts, points)))[:, ::-1].astype(np.int32) if points else None,
    )
    multimask = data.draw(st.booleans(), "multimask")
    predictor.set_image(noise(height, width))
    logits, scores = ours.logits(DecodeRequest(predictor.features[0].numpy(), (height, width), asked, multimask))
    _, expected_scores, expected = predicted(predictor, asked, multimask)
    assert relative(logits, expected) <= SAME
    assert relative(scores, expected_scores) <= SAME


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
