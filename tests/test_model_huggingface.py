"""Checkpoints of transformers' SamModel: the same tensors under other names, and the same numbers out of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    SamConfig,
    SamImageProcessor,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
    SamVisionModel,
)

from cluster.errors import InvalidCheckpoint
from serve_app.model import architectures, checkpoint, decoder, encoder, huggingface, modules, state
from serve_app.model.architectures import SAMS
from serve_app.model.checkpoint import ModelCard, State
from serve_app.model.prompts import DecodeRequest, Prompts
from tests.weights_of_sam import relative

SAME = 1e-5
SIZE = 256, 200  # height, width: no resizing
BOXES = np.array([[10, 20, 110, 120], [0, 0, 200, 200.5]], np.float32)
POINTS = np.array([[[50, 60], [20, 22.25]], [[100, 100], [5, 3]]], np.float32)
LABELS = np.array([[1, 0], [1, -1]], np.int32)
LOGITS = np.random.default_rng(1).normal(scale=8, size=(1, 128, 128)).astype(np.float32)
KINDS = {
    "boxes": Prompts(boxes=BOXES),
    "points": Prompts(points=POINTS, labels=LABELS),
    "both": Prompts(boxes=BOXES, points=POINTS, labels=LABELS),
    "a box after a mask": Prompts(boxes=BOXES[:1], masks=LOGITS),
}


def configured(name: str, **decoder: Any) -> SamConfig:
    sizes = SAMS[name]
    return SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=sizes.width,
            num_hidden_layers=sizes.depth,
            num_attention_heads=sizes.heads,
            image_size=sizes.image_size,
            patch_size=sizes.patch,
            window_size=sizes.window,
            global_attn_indexes=list(sizes.global_blocks),
            mlp_dim=sizes.mlp_width,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(image_size=sizes.image_size, patch_size=sizes.patch),
        mask_decoder_config=SamMaskDecoderConfig(mlp_dim=sizes.decoder_mlp_width, **decoder),
    )


def filled(seed: int, **decoder: Any) -> SamModel:
    """The nano model with every parameter random. Named by hand, so that no mapping of ours is trusted."""
    model = SamModel(configured("nano", **decoder)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data = 0.1 * noise + (1 if name.endswith("weight") else 0)
        elif "pos" in name:
            parameter.data = 0.3 * noise
        elif "embed.weight" in name or "token" in name.split(".")[1] or "point_embed" in name:
            parameter.data = noise
        else:
            gain = 3 if ".qkv." in name or "q_proj" in name or "k_proj" in name else 1
            parameter.data = gain * noise / (3 * parameter[0].numel()) ** 0.5
    return model


@pytest.fixture(scope="module")
def peer() -> SamModel:
    return filled(5)


@pytest.fixture(scope="module")
def saved(peer: SamModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    peer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(saved: Path) -> State:
    return state.read(saved)


def extracted(folder: Path, out: Path) -> ModelCard:
    return checkpoint.extract(state.read(folder), out, source="here", source_sha256="0" * 64)


def equal(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# Numbers


@pytest.mark.parametrize("eps", [None, 1e-3], ids=["usual", "another epsilon"])
def test_numbers_are_transformers_own(eps: float | None, peer: SamModel, tmp_path: Path) -> None:
    if eps:
        peer = filled(6, layer_norm_eps=eps)
    peer.save_pretrained(tmp_path)
    card = extracted(tmp_path, tmp_path / "split")
    assert (card.family, card.architecture.decoder_norm_eps) == ("nano", eps or 1e-6)
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    embedding = encoder.load(tmp_path / "split").encode([pixels])
    batch = SamImageProcessor(size={"longest_edge": 256}, pad_size={"height": 256, "width": 256})(pixels)
    assert relative(embedding, peer.get_image_embeddings(torch.as_tensor(np.stack(batch["pixel_values"])))) <= SAME
    for runtime in ("reference", "fast"):
        ours = decoder.load(tmp_path / "split", runtime)
        for kind, prompts in KINDS.items():
            request = DecodeRequest(embedding[0].numpy(), SIZE, prompts)
            answers = [ours.decode([replace(request, multimask=multimask)])[0] for multimask in (False, True)]
            expected = [asked(peer, embedding, prompts, multimask) for multimask in (False, True)]
            logits, scores = (torch.cat(parts, dim=1) for parts in zip(*answers, strict=True))
            limit = SAME if runtime == "reference" else 3 * SAME  # sums in another order
            assert relative(logits, torch.cat([one.pred_masks[0] for one in expected], dim=1)) <= limit, kind
            assert relative(scores, torch.cat([one.iou_scores[0] for one in expected], dim=1)) <= limit, kind


@torch.inference_mode()
def asked(peer: SamModel, embedding: torch.Tensor, prompts: Prompts, multimask: bool) -> Any:
    def given(array: np.ndarray | None) -> torch.Tensor | None:
        return None if array is None else torch.tensor(array)[None]

    boxes, points, labels, masks = map(given, (prompts.boxes, prompts.points, prompts.labels, prompts.masks))
    return peer(
        image_embeddings=embedding,
        input_boxes=boxes,
        input_points=points,
        input_labels=labels,
        input_masks=masks,
        multimask_output=multimask,
    )


@pytest.mark.parametrize("name", ["sam_vit_b", "sam_vit_h"])
def test_names_and_shapes_of_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        theirs = SamModel(configured(name)).state_dict()
    renamed = dict(zip(huggingface.renamed(list(theirs)), theirs.values(), strict=True))
    assert architectures.recognise(renamed) == (name, SAMS[name])
    prompts, _ = modules.build_decoder(SAMS["nano"])
    assert {name for name in renamed if name.startswith("prompt_encoder.")} == {
        f"prompt_encoder.{key}" for key in prompts.state_dict()
    }


# Files


def test_every_way_of_saving_gives_the_same_state(peer: SamModel, saved: Path, whole: State, tmp_path: Path) -> None:
    peer.save_pretrained(tmp_path / "shards", max_shard_size="5MB")
    (tmp_path / "bin").mkdir()
    torch.save(peer.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "old").mkdir()
    halves: list[State] = [{}, {}]
    for index, (name, tensor) in enumerate(peer.state_dict().items()):
        halves[index % 2][name] = tensor
    for index, half in enumerate(halves):
        torch.save(half, tmp_path / "old" / f"pytorch_model-0000{index}.bin")
    files = {name: f"pytorch_model-0000{index}.bin" for index, half in enumerate(halves) for name in half}
    listing = tmp_path / "old" / "pytorch_model.bin.index.json"
    listing.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for path in (saved / "model.safetensors", tmp_path / "shards", tmp_path / "bin", tmp_path / "old", listing):
        assert equal(state.read(path), whole), path


def test_the_folder_of_an_image_processor_says_the_normalisation(saved: Path, tmp_path: Path) -> None:
    plain = extracted(saved, tmp_path / "plain")
    folder = shutil.copytree(saved, tmp_path / "folder")
    SamImageProcessor().save_pretrained(folder)
    assert extracted(folder, tmp_path / "usual") == plain
    SamImageProcessor(image_mean=[0.5, 0.25, 0], image_std=[1, 0.5, 0.5]).save_pretrained(folder)
    other = extracted(folder, tmp_path / "other")
    assert other.pixel_mean == pytest.approx((127.5, 63.75, 0))
    assert other.pixel_std == pytest.approx((255, 127.5, 127.5))
    assert other.encoder_sha256 != plain.encoder_sha256  # or their embeddings would be taken for each other's
    assert other.decoder_sha256 == plain.decoder_sha256
    assert encoder.load(tmp_path / "other").card == other


def test_a_vision_model_is_an_encoder_alone(tmp_path: Path) -> None:
    SamVisionModel(configured("nano").vision_config).save_pretrained(tmp_path)
    card = extracted(tmp_path, tmp_path / "out")
    assert (card.family, card.decoder_sha256) == ("nano", "")
    assert encoder.load(tmp_path / "out").encode([np.zeros((*SIZE, 3), np.uint8)]).shape == (1, 256, 32, 32)
    bare = {name.removeprefix("vision_encoder."): value for name, value in load_file(one(tmp_path)).items()}
    torch.save(bare, tmp_path / "bare.pth")
    assert extracted(tmp_path / "bare.pth", tmp_path / "bare") == card


# What is refused


def test_a_copy_of_the_shared_embedding_must_be_one(peer: SamModel, tmp_path: Path) -> None:
    copy = "prompt_encoder.shared_embedding.positional_embedding"
    torch.save(peer.state_dict() | {copy: peer.state_dict()[copy] + 1}, tmp_path / "tuned.bin")
    with pytest.raises(InvalidCheckpoint, match=r"two different tensors for prompt_encoder\.pe_layer"):
        state.read(tmp_path / "tuned.bin")


def test_names_that_are_not_known_are_refused(peer: SamModel, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in peer.state_dict().items() if ".layers.1.self_attn." not in name}
    torch.save(tensors | {"mask_decoder.upscale_conv3.weight": torch.ones(2, 3)}, tmp_path / "a.bin")
    with pytest.raises(InvalidCheckpoint) as caught:
        extracted(tmp_path / "a.bin", tmp_path / "out")
    assert "mask_decoder.transformer.layers.1: 8 missing (first" in str(caught.value)
    assert "(first mask_decoder.upscale_conv3.weight [2, 3])" in str(caught.value)
    assert not (tmp_path / "out").exists()


DAMAGES: dict[str, Any] = {
    "a shard is missing": (lambda folder: one(folder).unlink(), "not beside it"),
    "a shard is cut": (lambda folder: one(folder).write_bytes(one(folder).read_bytes()[:-9]), "cut short"),
    "a shard lacks a tensor": (
        lambda folder: drop(one(folder)),
        "does not hold what model.safetensors.index.json says",
    ),
    "a shard elsewhere": (lambda folder: point(folder, "../config.json"), "not beside it"),
    "a shard that is a number": (lambda folder: point(folder, 3), "damaged"),
    "no index": (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "damaged"),
    "no checkpoint": (lambda folder: (folder / "model.safetensors.index.json").unlink(), "expected one of model.safe"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
    "no mean": (lambda folder: (folder / "config.json").write_text('{"image_mean": "x"}'), "config.json is damaged"),
    "half a mean": (
        lambda folder: (folder / "config.json").write_text('{"image_mean": [1]}'),
        "pixel_mean is .* 3 fin",
    ),
    "no std": (
        lambda folder: (folder / "config.json").write_text('{"image_std": [0, 1, 1]}'),
        "pixel_std is .* above 0",
    ),
}


def one(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def drop(shard: Path) -> None:
    tensors = load_file(shard)
    tensors.popitem()
    save_file(tensors, shard)


def point(folder: Path, target: Any) -> None:
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][min(values["weight_map"])] = target
    index.write_text(json.dumps(values))


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_refused(case: str, peer: SamModel, tmp_path: Path) -> None:
    damage, expected = DAMAGES[case]
    peer.save_pretrained(tmp_path, max_shard_size="10MB")
    damage(tmp_path)
    with pytest.raises(InvalidCheckpoint, match=expected) as caught:
        extracted(tmp_path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
