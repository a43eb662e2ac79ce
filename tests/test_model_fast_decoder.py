"""The fast decoder against segment_anything's own modules, every parameter random."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from serve_app.model import checkpoint, decoder
from serve_app.model.decoder import ReferenceDecoder
from serve_app.model.fast_decoder import FastDecoder
from serve_app.model.prompts import DecodeRequest, Prompts
from tests.weights_of_sam import extracted, relative

Both = tuple[ReferenceDecoder, FastDecoder]

SIZE = (300, 420)
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["nano", "sam_vit_b"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ReferenceDecoder, FastDecoder]:
    folder = extracted(checkpoint.seeded(request.param, 5), tmp_path_factory.mktemp(request.param))
    return ReferenceDecoder(folder, "cpu"), FastDecoder(folder, "cpu")


def asked(kind: str, number: int, grid: int, multimask: bool) -> DecodeRequest:
    rng = np.random.default_rng(number)
    embedding = rng.normal(0, 1, (256, grid, grid)).astype(np.float32)
    corners = rng.uniform(0, 200, (number, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(10, 90, (number, 2))], 1).astype(np.float32)
    points = rng.uniform(0, 300, (number, 3, 2)).astype(np.float32)
    labels = rng.integers(-1, 2, (number, 3)).astype(np.int32)
    labels[:, 0] = 1
    chosen = {"boxes": (boxes, None, None), "points": (None, points, labels), "both": (boxes, points, labels)}[kind]
    return DecodeRequest(embedding, SIZE, Prompts(*chosen), multimask)


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize(("kind", "number"), [("boxes", 1), ("boxes", 5), ("points", 3), ("both", 2)])
def test_the_same_numbers(both: Both, kind: str, number: int, multimask: bool) -> None:
    reference, fast = both
    request = asked(kind, number, reference.card.architecture.grid, multimask)
    for ours, theirs in zip(fast.logits(request), reference.logits(request), strict=True):
        assert ours.shape == theirs.shape
        assert relative(ours, theirs) <= TOLERANCE or (ours - theirs).abs().max() <= 1e-6  # a single score near zero


def test_position_counts(both: Both) -> None:
    """The tolerance is one that a decoder without the image's position would not meet."""
    reference, fast = both
    request = asked("boxes", 2, reference.card.architecture.grid, False)
    expected, position = reference.logits(request)[0], fast.position
    fast.position = torch.zeros_like(position)
    try:
        assert relative(fast.logits(request)[0], expected) > 100 * TOLERANCE
    finally:
        fast.position = position


def test_auto_is_fast_where_it_can(tmp_path: Path) -> None:
    state = checkpoint.seeded("nano", 0)
    assert type(decoder.load(extracted(state, tmp_path / "two"), "auto")).__name__ == "FastDecoder"
    deeper = dict(state)
    for name, tensor in state.items():
        if "transformer.layers.1." in name:
            deeper[name.replace("layers.1.", "layers.2.")] = tensor
    three = extracted(deeper, tmp_path / "three")
    assert type(decoder.load(three, "auto")).__name__ == "ReferenceDecoder"
