"""The encoder by OpenVINO against segment_anything's own module, every parameter random."""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from cluster import settings
from cluster.errors import InvalidSettings
from serve_app.model import checkpoint, encoder, gate, modules
from serve_app.model.encoder import ReferenceEncoder, normalise
from tests.weights_of_sam import extracted, relative

openvino = pytest.importorskip("openvino")

from serve_app.model import openvino as runtime  # noqa: E402
from serve_app.model.openvino import OpenVINOEncoder  # noqa: E402

TOLERANCE = 1e-5
SIZE = 256
BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not BF16, reason="this processor has no bfloat16 arithmetic")


def images(number: int) -> list[np.ndarray]:
    """Noise in blocks, of all the shapes that an encoder is given."""
    rng = np.random.default_rng(number)
    shapes = [(256, 256), (256, 170), (31, 256), (256, 1), (180, 256), (256, 255)]
    coarse = [rng.integers(0, 256, (-(-h // 8), -(-w // 8), 3), np.uint8) for h, w in shapes]
    grown = [block.repeat(8, 0).repeat(8, 1)[:h, :w] for block, (h, w) in zip(coarse, shapes, strict=True)]
    return [grown[index % len(grown)] for index in range(number)]


def exact(reference: ReferenceEncoder, pixels: list[np.ndarray]) -> torch.Tensor:
    """The reference in float64, from the same float32 input."""
    with torch.inference_mode():
        return copy.deepcopy(reference.module).double()(normalise(pixels, SIZE).double())


def token_cosines(ours: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """[B, C, g, g] twice → [B, g, g]: how alike each token is."""
    return functional.cosine_similarity(ours.double(), true.double(), dim=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extracted(modules.seeded("nano", 5), tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[ReferenceEncoder, OpenVINOEncoder]:
    return ReferenceEncoder(folder, "cpu"), OpenVINOEncoder(folder, "cpu")


@pytest.mark.parametrize("number", [1, 3, 9])
def test_the_same_numbers(both: tuple[ReferenceEncoder, OpenVINOEncoder], number: int) -> None:
    reference, ours = both
    expected, found = reference.encode(images(number)), ours.encode(images(number))
    assert found.dtype == torch.float32
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) <= TOLERANCE


def test_a_neighbour_changes_no_bit(both: tuple[ReferenceEncoder, OpenVINOEncoder]) -> None:
    _, ours = both
    batch = ours.encode(images(4))
    for image, embedding in zip(images(4), batch, strict=True):
        assert torch.equal(ours.encode([image])[0], embedding)
    assert ours.encode([]).shape == (0, 256, 32, 32)


@pytest.mark.parametrize("table", ["rel_pos_h", "rel_pos_w", "pos_embed"])
def test_position_counts(both: tuple[ReferenceEncoder, OpenVINOEncoder], table: str) -> None:
    """The tolerance is one that an encoder without one of the position tables would not meet."""
    reference, ours = both
    without = copy.deepcopy(reference)
    for name, parameter in without.module.named_parameters():
        if name.endswith(table):
            parameter.data = torch.zeros_like(parameter)
    assert relative(ours.encode(images(1)), without.encode(images(1))) > 100 * TOLERANCE


@needs_bf16
def test_bfloat16_is_no_worse_than_that_of_torch(folder: Path, both: tuple[ReferenceEncoder, OpenVINOEncoder]) -> None:
    reference, ours = both[0], OpenVINOEncoder(folder, "cpu", "bfloat16")
    assert ours.runtime == "openvino bfloat16 on cpu"
    true = exact(reference, images(6))
    with torch.autocast("cpu", torch.bfloat16):
        theirs = reference.encode(images(6))
    found, peer = token_cosines(ours.encode(images(6)), true), token_cosines(theirs, true)
    print(f"cosine of tokens, mean and least: {found.mean():.4f} {found.min():.4f}, torch's", peer.mean(), peer.min())
    assert 1 - found.mean() <= gate.MEAN_SLACK * (1 - peer.mean())
    assert 1 - found.min() <= gate.WORST_SLACK * (1 - peer.min())
    assert found.mean() < 1 - 1e-7  # it was bfloat16 that ran


def test_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    converted: list[Path] = []
    convert = runtime.convert

    def counted(folder: Path, card: checkpoint.ModelCard, part: str) -> Any:
        converted.append(folder)
        return convert(folder, card, part)

    monkeypatch.setattr(runtime, "convert", counted)
    extracted(modules.seeded("nano", 1), tmp_path)
    first = OpenVINOEncoder(tmp_path, "cpu").encode(images(1))
    (tmp_path / "encoder.safetensors").unlink()  # not read a second time
    assert torch.equal(OpenVINOEncoder(tmp_path, "cpu").encode(images(1)), first)
    assert len(converted) == 1
    (kept,) = tmp_path.glob("openvino-*")
    assert sorted(path.name for path in kept.iterdir()) == ["model.bin", "model.xml", "sha256"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    extracted(modules.seeded("nano", 1), tmp_path)
    with (kept / "model.bin").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(OpenVINOEncoder(tmp_path, "cpu").encode(images(1)), first)
    assert "is damaged: converting again" in caplog.text
    assert len(converted) == 2


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    extracted(modules.seeded("nano", 2), tmp_path)

    def refuse(**_: Any) -> str:
        raise PermissionError("read-only")

    monkeypatch.setattr(runtime.tempfile, "mkdtemp", refuse)
    with caplog.at_level(logging.WARNING):
        ours = OpenVINOEncoder(tmp_path, "cpu")
    assert "each start converts again" in caplog.text
    assert list(tmp_path.glob("openvino-*")) == []
    assert relative(ours.encode(images(1)), ReferenceEncoder(tmp_path, "cpu").encode(images(1))) <= TOLERANCE


def test_refusals(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSettings, match="runs on a CPU, not on 'cuda'"):
        OpenVINOEncoder(folder, "cuda")
    with pytest.raises(InvalidSettings, match="'reference' computes in float32"):
        encoder.load(folder, "reference", dtype="bfloat16")
    with pytest.raises(InvalidSettings, match="no dtype 'float16'; there are float32, bfloat16"):
        encoder.load(folder, "openvino", dtype="float16")
    with pytest.raises(InvalidSettings, match="no runtime 'onnx'; there are auto, reference, openvino"):
        encoder.load(folder, "onnx")

    with pytest.raises(InvalidSettings, match=r"models\.nano\.runtime"):
        settings.load(environ={}, models={"nano": {"runtime": "onnx"}})

    class Old:
        def get_property(self, *_: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(runtime, "_core", Old)
    with pytest.raises(InvalidSettings, match="needs a processor with AVX512-BF16 or AMX"):
        OpenVINOEncoder(folder, "cpu", "bfloat16")


def test_auto(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert encoder.choose("auto", "cpu")[0] == "openvino"
    assert encoder.choose("auto", "cuda:1") == ("reference", "auto: float32 on a GPU")
    assert encoder.choose("auto", "cuda", "bfloat16") == ("flash", "auto: bfloat16 on a GPU")
    assert encoder.load(folder, "auto").runtime == "openvino float32 on cpu"
    monkeypatch.setattr(encoder, "find_spec", lambda name: None)
    assert encoder.choose("auto", "cpu") == ("reference", "auto: OpenVINO is not installed")
    assert encoder.load(folder, "auto").runtime == "reference float32 on cpu"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InvalidSettings, match=r"pip install 'cellray\[cpu\]'"):
        encoder.load(folder, "openvino")
