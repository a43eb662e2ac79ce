"""The ONNX decoder in onnxruntime: segment_anything's names, the reference decoder's numbers."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from segment_anything.utils.transforms import ResizeLongestSide

from cluster.errors import InvalidCheckpoint, InvalidInput, InvalidSettings
from serve_app.model import decoder, modules, onnx
from serve_app.model.checkpoint import ModelCard
from serve_app.model.decoder import Decoder
from serve_app.model.prompts import DecodeRequest, Prompts
from tests import weights_of_sam
from tests.weights_of_sam import relative

SAME = 1e-4
GRID = 32
RNG = np.random.default_rng(1)
EMBEDDING = RNG.normal(size=(256, GRID, GRID)).astype(np.float32)
BOXES = np.array([[10, 20, 110, 120], [0, 0, 150, 100], [30.5, 5, 60, 70.25]], np.float32)
POINTS = RNG.uniform(0, 100, (3, 5, 2)).astype(np.float32)
LABELS = np.array([[1, 0, 1, 1, 0], [1, 1, -1, -1, -1], [0, 1, 1, 0, -1]], np.int32)
LOGITS = RNG.normal(scale=8, size=(1, 4 * GRID, 4 * GRID)).astype(np.float32)
CASES = {
    "one box": Prompts(boxes=BOXES[:1]),
    "boxes": Prompts(boxes=BOXES),
    "a point": Prompts(points=POINTS[:1, :1], labels=LABELS[:1, :1]),
    "points": Prompts(points=POINTS, labels=LABELS),
    "a box and points": Prompts(boxes=BOXES[:1], points=POINTS[:1, :2], labels=LABELS[:1, :2]),
    "boxes and points": Prompts(boxes=BOXES, points=POINTS, labels=LABELS),
    "a click after a mask": Prompts(points=POINTS[:1, :2], labels=LABELS[:1, :2], masks=LOGITS),
    "a box after a mask": Prompts(boxes=BOXES[:1], masks=LOGITS),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_of_sam.extracted(modules.seeded("nano", 9), tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("new") / "sub" / "decoder.onnx"
    onnx.export(folder, out, "mine")
    return out


@pytest.fixture(scope="module")
def session(exported: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def reference(folder: Path) -> Decoder:
    return decoder.load(folder)


def inputs(prompts: Prompts, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """As the export's users write it: corners are points, and without a box the points end with a padding point."""
    count = len(prompts)
    coordinates, labels = np.zeros((count, 0, 2)), np.zeros((count, 0))
    if prompts.points is not None:
        coordinates, labels = prompts.points, prompts.labels
    if prompts.boxes is not None:
        coordinates = np.concatenate([coordinates, prompts.boxes.reshape(-1, 2, 2)], axis=1)
        labels = np.concatenate([labels, np.full((count, 2), (2, 3))], axis=1)
    else:
        coordinates = np.concatenate([coordinates, np.zeros((count, 1, 2))], axis=1)
        labels = np.concatenate([labels, np.full((count, 1), -1)], axis=1)
    given = prompts.masks is not None
    values = {
        "image_embeddings": EMBEDDING[None],
        "point_coords": ResizeLongestSide(256).apply_coords(coordinates, size),
        "point_labels": labels,
        "mask_input": LOGITS[None] if given else np.zeros((1, 1, 4 * GRID, 4 * GRID)),
        "has_mask_input": np.array([given]),
        "orig_im_size": np.array(size),
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


def test_names_and_shapes(session: onnxruntime.InferenceSession) -> None:
    assert {given.name: given.shape for given in session.get_inputs()} == {
        "image_embeddings": [1, 256, GRID, GRID],
        "point_coords": ["prompts", "points", 2],
        "point_labels": ["prompts", "points"],
        "mask_input": [1, 1, 4 * GRID, 4 * GRID],
        "has_mask_input": [1],
        "orig_im_size": [2],
    }
    assert {given.name: given.shape for given in session.get_outputs()} == {
        "masks": ["prompts", 4, "height", "width"],
        "iou_predictions": ["prompts", 4],
        "low_res_masks": ["prompts", 4, 4 * GRID, 4 * GRID],
    }
    assert {given.type for given in (*session.get_inputs(), *session.get_outputs())} == {"tensor(float)"}


@pytest.mark.parametrize("size", [(256, 256), (200, 300), (777, 150)])
@pytest.mark.parametrize("case", CASES)
def test_numbers_are_the_references(
    case: str, size: tuple[int, int], session: onnxruntime.InferenceSession, reference: Decoder
) -> None:
    masks, scores, low = session.run(None, inputs(CASES[case], size))
    request = DecodeRequest(EMBEDDING, size, CASES[case])
    answers = reference.decode([request]) + reference.decode([replace(request, multimask=True)])
    logits, expected = (torch.cat(parts, dim=1) for parts in zip(*answers, strict=True))
    assert relative(low, logits) <= SAME
    assert relative(scores, expected) <= SAME
    for found, one in zip(masks, logits, strict=True):
        assert relative(found, decoder.upscale(one, size, 256)) <= SAME


def test_the_file_says_what_it_is(session: onnxruntime.InferenceSession, folder: Path) -> None:
    card = ModelCard.read(folder)
    said = session.get_modelmeta().custom_metadata_map
    assert said == {
        "model": "mine",
        "decoder_sha256": card.decoder_sha256,
        "licence": card.licence,
        "trained": "false",
    }


def test_a_file_is_replaced_only_if_that_is_said(exported: Path, folder: Path) -> None:
    with pytest.raises(InvalidInput, match="--overwrite"):
        onnx.check(exported, overwrite=False)
    onnx.check(exported, overwrite=True)
    with pytest.raises(InvalidInput, match="is a folder"):
        onnx.check(folder, overwrite=True)
    assert [path.name for path in exported.parent.iterdir()] == ["decoder.onnx"]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(InvalidSettings, match=r"need onnxscript: pip install 'cellray\[onnx\]'"):
        onnx.check(tmp_path / "a.onnx", overwrite=False)


def test_an_encoder_alone_has_nothing_to_export(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in modules.seeded("nano", 1).items() if name.startswith("image_encoder.")}
    weights_of_sam.extracted(state, tmp_path)
    with pytest.raises(InvalidCheckpoint, match="an image encoder alone"):
        onnx.export(tmp_path, tmp_path / "a.onnx", "mine")
    assert not (tmp_path / "a.onnx").exists()
