"""The fast decoder against segment_anything's own modules, every parameter random."""

from __future__ import annotations

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.utils.transforms import ResizeLongestSide

from cluster.errors import InvalidSettings
from serve_app.model import decoder, modules
from serve_app.model.decoder import Decoded, Decoder, ReferenceDecoder
from serve_app.model.fast_decoder import FastDecoder
from serve_app.model.prompts import DecodeRequest, Prompts
from tests.weights_of_sam import extracted, filled, relative

Both = tuple[ReferenceDecoder, Decoder]

SIZE = (300, 420)
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["nano", "sam_vit_b"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extracted(modules.seeded(request.param, 5), tmp_path_factory.mktemp(request.param))


only_nano = pytest.mark.parametrize("folder", ["nano"], indirect=True, scope="module")
only_vit_b = pytest.mark.parametrize("folder", ["sam_vit_b"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def reference(folder: Path) -> ReferenceDecoder:
    return ReferenceDecoder(folder, "cpu")


@pytest.fixture(scope="module", params=["fast", "openvino"])
def both(request: pytest.FixtureRequest, folder: Path, reference: ReferenceDecoder) -> Both:
    if request.param == "openvino":
        pytest.importorskip("openvino")
    return reference, decoder.load(folder, request.param)


def asked(kind: str, number: int, grid: int, multimask: bool, seed: int = 0) -> DecodeRequest:
    rng = np.random.default_rng((number, seed))
    embedding = rng.normal(0, 1, (256, grid, grid)).astype(np.float32)
    corners = rng.uniform(0, 200, (number, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(10, 90, (number, 2))], 1).astype(np.float32)
    points = rng.uniform(0, 300, (number, 3, 2)).astype(np.float32)
    labels = rng.integers(-1, 2, (number, 3)).astype(np.int32)
    labels[:, 0] = 1
    planes = rng.normal(0, 5, (number, 4 * grid, 4 * grid)).astype(np.float32)
    chosen = {
        "boxes": Prompts(boxes),
        "points": Prompts(None, points, labels),
        "boxes and points": Prompts(boxes, points, labels),
        "masks": Prompts(masks=planes),
        "masks and boxes": Prompts(boxes, masks=planes),
        "all": Prompts(boxes, points, labels, planes),
    }[kind]
    return DecodeRequest(embedding, SIZE, chosen, multimask)


def same(ours: Decoded, theirs: Decoded) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert one.dtype == torch.float32
        if one.numel():  # a single score may lie near zero
            assert relative(one, other) <= TOLERANCE or (one - other).abs().max() <= 1e-6


@only_nano
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("boxes", 1),
        ("boxes", 5),
        ("points", 3),
        ("boxes and points", 2),
        ("masks", 2),
        ("masks and boxes", 2),
        ("all", 1),
    ],
)
def test_the_same_numbers(both: Both, kind: str, number: int, multimask: bool) -> None:
    reference, fast = both
    request = asked(kind, number, reference.card.architecture.grid, multimask)
    same(fast.logits(request), reference.logits(request))


@only_vit_b
@pytest.mark.parametrize(("kind", "multimask"), [("boxes", False), ("points", True), ("all", True)])
def test_the_same_numbers_of_vit_b(both: Both, kind: str, multimask: bool) -> None:
    test_the_same_numbers(both, kind, 2, multimask)


@only_nano
def test_masks_as_prompts_are_segment_anythings(reference: ReferenceDecoder) -> None:
    request = asked("all", 2, reference.card.architecture.grid, True)
    sam = filled(reference.card.family, modules.seeded(reference.card.family, 5))
    predictor = SamPredictor(sam)
    predictor.features, predictor.is_image_set = torch.from_numpy(request.embedding)[None], True
    predictor.original_size = SIZE
    predictor.transform = ResizeLongestSide(sam.image_encoder.img_size)
    predictor.input_size = predictor.transform.get_preprocess_shape(*SIZE, sam.image_encoder.img_size)
    prompts = request.prompts
    _, scores, logits = predictor.predict_torch(
        torch.from_numpy(predictor.transform.apply_coords(prompts.points, SIZE)).float(),
        torch.from_numpy(prompts.labels),
        torch.from_numpy(predictor.transform.apply_boxes(prompts.boxes, SIZE)).float(),
        torch.from_numpy(prompts.masks)[:, None],
    )
    same(reference.logits(request), (logits, scores))


@only_nano
def test_many_images_in_one_batch(both: Both) -> None:
    """Different numbers of prompts, of several kinds, one of them empty, more than one chunk."""
    reference, fast = both
    grid = reference.card.architecture.grid
    kinds = ["boxes", "points", "boxes", "masks and boxes", "boxes", "boxes and points", "points"]
    counts = [2, 1, 0, 2, 3, 1, 2]
    requests = [asked(kind, n, grid, n == 2, seed) for seed, (kind, n) in enumerate(zip(kinds, counts, strict=True))]
    for ours, request in zip(fast.decode(requests), requests, strict=True):
        same(ours, reference.logits(request))
    assert fast.decode([]) == []


@only_nano
def test_callers_at_once(both: Both) -> None:
    """A replica decodes a batch and automatic masks in threads of their own."""
    reference, fast = both
    grid = reference.card.architecture.grid
    requests = [
        asked(kind, number, grid, number > 2, number)
        for kind, number in (("boxes", 1), ("points", 3), ("boxes", 4), ("masks", 2))
    ]
    expected = [reference.logits(request) for request in requests]
    start = threading.Barrier(len(requests))

    def ask(request: DecodeRequest) -> list[Decoded]:
        start.wait()
        return [answer for _ in range(3) for answer in (fast.logits(request), fast.accepted(request, -1e9)[:2])]

    with ThreadPoolExecutor(len(requests)) as threads:
        found = list(threads.map(ask, requests))
    for answers, (logits, scores) in zip(found, expected, strict=True):
        for whole, flat in zip(answers[::2], answers[1::2], strict=True):
            same(whole, (logits, scores))
            same(flat, (logits.flatten(0, 1), scores.flatten()))


@only_nano
def test_more_prompts_than_fit(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, fast = both
    request = asked("boxes", 5, reference.card.architecture.grid, False)
    monkeypatch.setattr(fast, "chunk", 2)
    same(fast.logits(request), reference.logits(request))


def middle(scores: torch.Tensor) -> float:
    """Between two of them, so that rounding decides nothing."""
    low, high = scores.flatten().sort().values[scores.numel() // 2 - 1 :][:2].tolist()
    return (low + high) / 2


@only_nano
@pytest.mark.parametrize("multimask", [False, True])
def test_only_accepted_masks(both: Both, multimask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, fast = both
    request = asked("boxes", 6, reference.card.architecture.grid, multimask)
    above = middle(reference.logits(request)[1])
    monkeypatch.setattr(fast, "chunk", 4)
    expected, found = reference.accepted(request, above), fast.accepted(request, above)
    assert 0 < len(expected[2]) < 6 * (3 if multimask else 1)
    assert found[2].tolist() == expected[2].tolist()
    same(found[:2], expected[:2])
    none = fast.accepted(request, 1e9)
    assert [list(part.shape) for part in none] == [[0, *expected[0].shape[1:]], [0], [0]]


@only_nano
def test_prompts_whose_masks_are_rejected_are_not_upscaled(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, fast = both
    request = asked("boxes", 6, reference.card.architecture.grid, False)
    above, upscaled = middle(reference.logits(request)[1]), []
    inner = type(fast).upscale  # type: ignore[attr-defined]

    def counted(self: Decoder, image: Any, weights: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        upscaled.append(len(weights))
        return inner(self, image, weights, prompts)

    monkeypatch.setattr(type(fast), "upscale", counted)
    kept = len(fast.accepted(request, above)[2])
    assert sum(upscaled) == kept < 6
    upscaled.clear()
    fast.accepted(request, 1e9)
    assert upscaled == []


@pytest.mark.parametrize("runtime", ["fast", "openvino"])
def test_bfloat16_is_no_worse_than_that_of_torch(folder: Path, reference: ReferenceDecoder, runtime: str) -> None:
    if runtime == "openvino":
        openvino = pytest.importorskip("openvino")
        if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            pytest.skip("this processor has no bfloat16 arithmetic")
        ours = decoder.load(folder, "openvino", dtype="bfloat16")
    else:  # it is meant for GPUs, where it runs as it does here
        ours = FastDecoder(folder, "cpu", "bfloat16")
    request = asked("boxes", 4, reference.card.architecture.grid, True)
    expected = reference.logits(request)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = reference.logits(request)
    for found, peer, true in zip(ours.logits(request), theirs, expected, strict=True):
        assert found.dtype == torch.float32
        assert 1e-4 < relative(found, true) <= 1.25 * relative(peer.float(), true)


@only_nano
def test_position_counts(both: Both) -> None:
    """The tolerance is one that a decoder without the image's position would not meet."""
    reference, fast = both
    request = asked("boxes", 2, reference.card.architecture.grid, False)
    ours = fast.logits(request)[0]
    without = copy.copy(reference)
    without.dense_pe = torch.zeros_like(reference.dense_pe)
    assert relative(ours, without.logits(request)[0]) > 100 * TOLERANCE


def test_auto_is_fast_where_it_can(tmp_path: Path) -> None:
    state = modules.seeded("nano", 0)
    best = "OpenVINODecoder" if find_spec("openvino") else "FastDecoder"
    assert type(decoder.load(extracted(state, tmp_path / "two"), "auto")).__name__ == best
    deeper = dict(state)
    for name, tensor in state.items():
        if "transformer.layers.1." in name:
            deeper[name.replace("layers.1.", "layers.2.")] = tensor
    three = extracted(deeper, tmp_path / "three")
    assert type(decoder.load(three, "auto")).__name__ == "ReferenceDecoder"
    with pytest.raises(InvalidSettings, match="for two layers, this model has 3: take 'reference'"):
        decoder.load(three, "fast")


@pytest.mark.parametrize("runtime", ["fast", "openvino"])
def test_models_with_other_outputs(runtime: str, tmp_path: Path) -> None:
    """Two masks beside the first, where segment_anything's have three."""
    if runtime == "openvino":
        pytest.importorskip("openvino")
    state = modules.seeded("nano", 5)
    for name in ("mask_tokens.weight", "iou_prediction_head.layers.2.weight", "iou_prediction_head.layers.2.bias"):
        state[f"mask_decoder.{name}"] = state[f"mask_decoder.{name}"][:3]
    fewer = {name: tensor for name, tensor in state.items() if "output_hypernetworks_mlps.3." not in name}
    folder = extracted(fewer, tmp_path)
    reference, made = ReferenceDecoder(folder, "cpu"), decoder.load(folder, runtime)
    for number, multimask in ((2, True), (0, True), (2, False)):
        request = asked("boxes", number, 32, multimask)
        logits, scores = made.logits(request)
        assert (logits.shape[:2], scores.shape) == ((number, 2 if multimask else 1),) * 2
        same((logits, scores), reference.logits(request))


@only_nano
def test_what_a_runtime_cannot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for runtime in ("reference", "fast"):
        with pytest.raises(InvalidSettings, match="float32"):
            decoder.load(folder, runtime, dtype="bfloat16")
    with pytest.raises(InvalidSettings, match="no dtype 'int4'"):
        decoder.load(folder, dtype="int4")
    with pytest.raises(InvalidSettings, match="no decoder runtime 'faster'"):
        decoder.load(folder, "faster")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InvalidSettings, match=r"pip install 'cellray\[cpu\]'"):
        decoder.load(folder, "openvino")
