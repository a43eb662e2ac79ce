"""The encoder for GPUs against segment_anything's own module, on a CPU, every parameter random."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import InvalidSettings
from serve_app.model import checkpoint, decoder, encoder, modules
from serve_app.model.encoder import ReferenceEncoder
from serve_app.model.flash_encoder import FlashEncoder
from tests.weights_of_sam import extracted, relative

TOLERANCE = 1e-5
SHAPES = [(256, 256), (256, 170), (31, 256), (256, 1)]


def odd(state: checkpoint.State) -> checkpoint.State:
    """nano with windows of 7, which do not divide its 32 tokens: the last of each row and column are padded."""
    return {name: tensor[:13] if "rel_pos" in name and len(tensor) == 15 else tensor for name, tensor in state.items()}


@pytest.fixture(scope="module", params=["windows that fit", "padded windows"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = modules.seeded("nano", 5)
    return extracted(odd(state) if "padded" in request.param else state, tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in SHAPES]


def test_the_same_numbers(folder: Path, images: list[np.ndarray]) -> None:
    expected, found = ReferenceEncoder(folder, "cpu").encode(images), FlashEncoder(folder, "cpu").encode(images)
    assert found.dtype == torch.float32
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) <= TOLERANCE


@pytest.mark.parametrize("table", ["rel_pos_h", "rel_pos_w", "pos_embed"])
def test_position_counts(folder: Path, images: list[np.ndarray], table: str) -> None:
    reference = ReferenceEncoder(folder, "cpu")
    for name, parameter in reference.module.named_parameters():
        if name.endswith(table):
            parameter.data = torch.zeros_like(parameter)
    assert relative(FlashEncoder(folder, "cpu").encode(images[:1]), reference.encode(images[:1])) > 100 * TOLERANCE


def test_bfloat16_is_no_worse_than_that_of_torch(folder: Path, images: list[np.ndarray]) -> None:
    reference = ReferenceEncoder(folder, "cpu")
    true = reference.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = reference.encode(images).float()
    ours = FlashEncoder(folder, "cpu", "bfloat16").encode(images)
    assert ours.dtype == torch.float32
    assert 1e-4 < relative(ours, true) <= 1.25 * relative(theirs, true)


def test_compiles_whole(folder: Path, images: list[np.ndarray]) -> None:
    """As on a GPU, but for the kernels: one graph, which holds all of the numbers."""
    ours = FlashEncoder(folder, "cpu")
    expected = ours.encode(images[:1])
    ours.module.run = torch.compile(ours.module._forward, dynamic=False, fullgraph=True, backend="aot_eager")
    assert relative(ours.encode(images[:1]), expected) <= TOLERANCE


def test_what_would_be_slow_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSettings, match="'flash' computes in float32 on a CPU, not in bfloat16"):
        encoder.load(folder, "flash", "cpu", "bfloat16")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for half in (encoder, decoder):
        with pytest.raises(InvalidSettings, match="'bfloat16' needs a GPU of the Ampere generation or newer; cuda:0"):
            half.load(folder, "auto", "cuda:0", "bfloat16")


def test_batches_of_any_size(folder: Path, images: list[np.ndarray]) -> None:
    ours = FlashEncoder(folder, "cpu")
    alone = [ours.encode([image])[0] for image in images]
    for index, one in enumerate(ours.encode([images[index % 4] for index in range(10)])):
        assert relative(one, alone[index % 4]) <= TOLERANCE
    assert ours.encode([]).shape == (0, 256, 32, 32)
