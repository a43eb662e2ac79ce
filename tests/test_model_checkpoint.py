"""Checkpoints are recognised and split the same way every time, and whatever else is brought is refused in one line."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import pickle
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torchvision.models import resnet18

from cluster.errors import InvalidCheckpoint
from serve_app.model import architectures, checkpoint, decoder, encoder, modules
from serve_app.model import state as state_module
from serve_app.model.architectures import SAMS
from serve_app.model.checkpoint import ModelCard, State
from tests import weights_of_sam

FILES = ("encoder.safetensors", "decoder.safetensors", "model.json")
NORM = "image_encoder.blocks.1.norm1.weight"
SOURCE = {"source": "here", "source_sha256": "ab" * 32, "licence": "MIT"}


@pytest.fixture(scope="module")
def nano() -> State:
    return modules.seeded("nano", 1)


@pytest.fixture(scope="module")
def split(nano: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    checkpoint.extract(nano, folder, **SOURCE)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def refused(call: Callable[..., Any], *arguments: Any) -> str:
    """The one line of the InvalidCheckpoint that the call raises."""
    with pytest.raises(InvalidCheckpoint) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Recognised


@pytest.mark.parametrize("name", SAMS)
def test_recognised_by_shapes_alone(name: str) -> None:
    with torch.device("meta"):
        state = weights_of_sam.build(name).state_dict()
    assert architectures.recognise(state) == (name, SAMS[name])


def test_other_sizes_are_custom(nano: State) -> None:
    shallow = {name: tensor for name, tensor in nano.items() if not name.startswith("image_encoder.blocks.5.")}
    family, sizes = architectures.recognise(shallow)
    assert family == "custom"
    assert sizes == replace(SAMS["nano"], depth=5, global_blocks=(2,))


def test_seeded_is_the_same_for_the_same_seed_only(nano: State) -> None:
    again, other = modules.seeded("nano", 1), modules.seeded("nano", 2)
    assert again.keys() == nano.keys() == weights_of_sam.build("nano").state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in nano.items())
    assert not any(torch.equal(other[name], tensor) for name, tensor in nano.items())
    assert "sam_vit_x" in refused(modules.seeded, "sam_vit_x", 0)


# Split


def test_the_same_state_gives_the_same_bytes(nano: State, split: Path, tmp_path: Path) -> None:
    """In any order and memory layout, from any kind of file."""
    backwards = {name: nano[name].mT.contiguous().mT if nano[name].dim() > 1 else nano[name] for name in reversed(nano)}
    files = {
        "a.pth": saved(nano),
        "b.pt": saved(nano, _use_new_zipfile_serialization=False),
        "c.safetensors": save(nano),
    }
    states = [backwards]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        states.append(state_module.read(tmp_path / name))
    for index, state in enumerate(states):
        card = checkpoint.extract(state, tmp_path / f"out{index}", **SOURCE)
        assert contents(tmp_path / f"out{index}") == contents(split)
        assert card == ModelCard.read(split)


def test_card_survives_the_file(nano: State, tmp_path: Path) -> None:
    card = checkpoint.extract(nano, tmp_path, trained=False, **SOURCE)
    assert ModelCard.read(tmp_path) == card
    assert (card.family, card.architecture, card.trained) == ("nano", SAMS["nano"], False)
    assert (card.source, card.source_sha256, card.licence) == tuple(SOURCE.values())
    assert card.encoder_sha256 != card.decoder_sha256


def test_halves_are_disjoint_and_complete(nano: State, split: Path) -> None:
    assert sorted(contents(split)) == sorted(FILES)
    encoder, decoder = load_file(split / FILES[0]), load_file(split / FILES[1])
    assert {name.split(".")[0] for name in encoder} == {"image_encoder"}
    assert {name.split(".")[0] for name in decoder} == {"prompt_encoder", "mask_decoder"}
    assert (encoder | decoder).keys() == nano.keys()
    assert all(torch.equal(tensor, nano[name]) for name, tensor in (encoder | decoder).items())


def test_another_encoder_or_decoder_is_another_hash(nano: State, split: Path, tmp_path: Path) -> None:
    card = ModelCard.read(split)
    tuned = checkpoint.extract(nano | {"mask_decoder.iou_token.weight": torch.zeros(1, 256)}, tmp_path, **SOURCE)
    assert tuned.encoder_sha256 == card.encoder_sha256
    assert tuned.decoder_sha256 != card.decoder_sha256


def test_half_precision_is_kept(nano: State, tmp_path: Path) -> None:
    card = checkpoint.extract({name: tensor.half() for name, tensor in nano.items()}, tmp_path, **SOURCE)
    halves = [checkpoint.load_half(tmp_path, half, card) for half in ("encoder", "decoder")]
    assert {tensor.dtype for half in halves for tensor in half.values()} == {torch.float16}


def test_parameter_table_counts_everything(nano: State) -> None:
    rows = checkpoint.parameter_table(nano)
    assert sum(row[2] for row in rows) == len(nano)
    assert sum(row[3] for row in rows) == sum(tensor.numel() for tensor in nano.values())
    assert ("encoder", "image_encoder.pos_embed", 1, 32 * 32 * 192) in rows


@pytest.mark.parametrize(("changed", "other"), [("encoder", "decoder"), ("decoder", "encoder")])
def test_a_changed_half_is_refused_and_the_other_still_loads(
    split: Path, tmp_path: Path, changed: str, other: str
) -> None:
    for name, content in contents(split).items():
        (tmp_path / name).write_bytes(content)
    card, path = ModelCard.read(tmp_path), tmp_path / f"{changed}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    message = refused(checkpoint.load_half, tmp_path, changed, card)
    assert path.name in message
    assert "sha256" in message
    assert checkpoint.load_half(tmp_path, other, card)
    path.unlink()
    assert checkpoint.load_half(tmp_path, other, card)


def test_nothing_half_written_is_left(nano: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, target: Path) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoint.os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        checkpoint.extract(nano, tmp_path, **SOURCE)
    assert contents(tmp_path) == {}


# What trainers wrap around the weights


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def trainer(state: State) -> dict[str, Any]:
    """A training script's checkpoint: an optimizer that has run, a schedule, and a best loss as numpy gives it."""
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedule.step()
    return {
        "epoch": 3,
        "state_dict": state,
        "optimizer_state": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "best_loss": np.float64(0.25),
        "step": np.int64(7),
        "rng_state": torch.get_rng_state(),
        "hyper_parameters": OrderedDict(rate=0.1, name=None),
    }


WRAPPED: dict[str, Callable[[State], Any]] = {
    "model.": lambda state: prefixed(state, "model."),
    "module.": lambda state: prefixed(state, "module."),
    "module.model.": lambda state: prefixed(state, "module.model."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "state_dict": lambda state: {"state_dict": state},
    "model_state": lambda state: {"model_state": state, "iteration": 5},
    "model": lambda state: {"model": OrderedDict(state), "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "nested twice": lambda state: {"model": {"state_dict": state}},
    "nested and prefixed": lambda state: {"state_dict": prefixed(state, "module.model.")},
    "a trainer": lambda state: trainer(prefixed(state, "sam.")),
    "parameters": lambda state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("case", WRAPPED)
def test_what_trainers_wrap_around_the_weights_is_taken_off(
    case: str, zipped: bool, nano: State, tmp_path: Path
) -> None:
    path = tmp_path / "tuned.pth"
    path.write_bytes(saved(WRAPPED[case](nano), _use_new_zipfile_serialization=zipped))
    found = state_module.read(path)
    assert found.keys() == nano.keys()
    assert all(torch.equal(found[name], tensor) and not found[name].requires_grad for name, tensor in nano.items())


def test_weights_outside_the_prefix_are_not_skipped(nano: State, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(saved(prefixed(nano, "model.") | {"loss.weight": torch.ones(5)}))
    message = refused(lambda: checkpoint.extract(state_module.read(tmp_path / "a.pth"), tmp_path / "out", **SOURCE))
    assert "loss.weight: 1 of no known place (first loss.weight [5])" in message
    (tmp_path / "b.pth").write_bytes(saved(prefixed(nano, "student.") | prefixed(nano, "teacher.")))
    assert "several models, student.* and teacher.*" in refused(state_module.read, tmp_path / "b.pth")
    (tmp_path / "c.pth").write_bytes(saved(prefixed(nano, "model.") | {NORM: nano[NORM] + 1}))
    assert f"two different tensors for {NORM}" in refused(state_module.read, tmp_path / "c.pth")


def test_what_would_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(saved({"model": TINY, "args": argparse.Namespace(lr=1)}))
    message = refused(state_module.read, tmp_path / "a.pth")
    assert "(argparse.Namespace) and would run code when read: refused" in message
    assert "torch.save(model.state_dict(), …)" in message


def test_a_mapping_that_holds_itself_is_refused(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"epoch": 3}
    endless["model"] = endless
    (tmp_path / "a.pth").write_bytes(saved(endless))
    assert "flat mapping" in refused(state_module.read, tmp_path / "a.pth")


# Encoders alone


@pytest.mark.parametrize("prefix", ["image_encoder.", "", "model.image_encoder.", "module."])
def test_an_encoder_alone_makes_embeddings(prefix: str, nano: State, split: Path, tmp_path: Path) -> None:
    own = {name.removeprefix("image_encoder."): nano[name] for name in nano if name.startswith("image_encoder.")}
    (tmp_path / "encoder.pth").write_bytes(saved(prefixed(own, prefix)))
    card = checkpoint.extract(state_module.read(tmp_path / "encoder.pth"), tmp_path / "out", **SOURCE)
    assert card == replace(ModelCard.read(split), decoder_sha256="") == ModelCard.read(tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["encoder.safetensors", "model.json"]
    assert encoder.load(tmp_path / "out").card == card
    for load in (decoder.load, lambda folder: decoder.load(folder, "auto")):
        message = refused(load, tmp_path / "out")
        assert "has no prompt encoder and mask decoder" in message
        assert "give the whole checkpoint" in message


# Numbers beside the weights


def test_the_usual_buffers_change_nothing(nano: State, split: Path, tmp_path: Path) -> None:
    sam = weights_of_sam.filled("nano", nano)
    for index, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        buffers = {name: getattr(sam, name).to(dtype) for name in ("pixel_mean", "pixel_std")}
        checkpoint.extract(nano | buffers, tmp_path / str(index), **SOURCE)
        assert contents(tmp_path / str(index)) == contents(split)
    rows = checkpoint.parameter_table(nano | buffers)
    assert sum(row[2] for row in rows) == len(nano) + 2


def test_other_buffers_are_the_encoders(nano: State, split: Path, tmp_path: Path) -> None:
    buffers = {"pixel_mean": torch.tensor([1.0, 2, 3]).view(3, 1, 1), "pixel_std": torch.tensor([4.0, 5, 6])}
    path = tmp_path / "fork.pth"
    path.write_bytes(saved(prefixed(nano | buffers, "module.")))
    card = checkpoint.extract(state_module.read(path), tmp_path / "out", **SOURCE)
    assert (card.pixel_mean, card.pixel_std) == ((1, 2, 3), (4, 5, 6))
    assert ModelCard.read(tmp_path / "out") == card
    assert card.encoder_sha256 != ModelCard.read(split).encoder_sha256
    assert card.decoder_sha256 == ModelCard.read(split).decoder_sha256
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    sam = weights_of_sam.filled("nano", nano)
    sam.pixel_mean, sam.pixel_std = buffers["pixel_mean"], buffers["pixel_std"].view(3, 1, 1)
    with torch.inference_mode():
        expected = sam.image_encoder(sam.preprocess(torch.tensor(image).permute(2, 0, 1)[None]))
    assert weights_of_sam.relative(encoder.load(tmp_path / "out").encode([image]), expected) <= 1e-5


@pytest.mark.parametrize(
    "buffers",
    [
        {"pixel_mean": torch.ones(4)},
        {"pixel_mean": torch.tensor([1, torch.nan, 3])},
        {"pixel_mean": torch.tensor([1, 2, 3])},
        {"pixel_std": torch.tensor([1.0, 0, 1])},
        {"pixel_std": torch.ones(3).to_sparse()},
        {"norm_eps": torch.tensor(-1.0)},
    ],
    ids=str,
)
def test_buffers_that_make_no_sense_are_refused(buffers: State, nano: State, tmp_path: Path) -> None:
    message = refused(lambda: checkpoint.extract(nano | buffers, tmp_path / "out", **SOURCE))
    assert f"{next(iter(buffers))} is " in message


# Files that are refused


class Trap:
    """A pickle that touches a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


TINY = {"weight": torch.ones(100), "bias": torch.zeros(100)}
BAD_FILES = {
    "truncated.pth": (saved(TINY)[:-300], "cut short"),
    "truncated-legacy.pth": (saved(TINY, _use_new_zipfile_serialization=False)[:-300], "cut short"),
    "random.pth": (bytes(i * 197 % 251 for i in range(5000)), "not a checkpoint"),
    "random.safetensors": (bytes(i * 197 % 251 for i in range(5000)), "not a checkpoint"),
    "empty.pth": (b"", "not a checkpoint"),
    "empty.safetensors": (b"", "not a checkpoint"),
    "text.pth": (b"Not Found: the page moved.\n" * 20, "not a checkpoint"),
    "page.safetensors": (b"<!DOCTYPE html><html>" * 20, "not a checkpoint"),
    "truncated.safetensors": (save(TINY)[:-1], "cut short"),
    "strange.pth": (saved({"net": TINY, "epoch": 3}), r"flat mapping.*(net, epoch)"),
    "mixed.pth": (saved({"model": TINY | {"step": 3}}), r"flat mapping.*(step)"),
    "two.pth": (saved({"model": TINY, "state_dict": TINY}), "several models, state_dict and model"),
    "list.pth": (saved([torch.ones(2)]), "a mapping of names"),
    "wrapped-list.pth": (saved({"model": [torch.ones(2)]}), "flat mapping"),
    "objects.pth": (saved(TINY | {"names": np.array([{}], object)}), "more than tensors.*numpy"),
    "module.pth": (saved(torch.nn.Linear(2, 2)), r"more than tensors.*Linear"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused(name: str, tmp_path: Path) -> None:
    content, expected = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    message = refused(state_module.read, tmp_path / name)
    assert re.search(expected, message), message
    assert name in message
    assert "expected a state dict" in message


def test_a_legacy_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = saved(TINY, _use_new_zipfile_serialization=False)
    for end in range(0, len(whole), 7):
        (tmp_path / "cut.pth").write_bytes(whole[:end])
        refused(state_module.read, tmp_path / "cut.pth")


def test_safetensors_are_read_whatever_the_file_is_called(tmp_path: Path) -> None:
    (tmp_path / "misnamed.pth").write_bytes(save(TINY))
    assert state_module.read(tmp_path / "misnamed.pth").keys() == TINY.keys()


@pytest.mark.parametrize("kind", ["plain", "in a state", "zip", "legacy"])
def test_a_malicious_pickle_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    state = TINY | {"weight": Trap(marker)}
    path.write_bytes(
        {
            "plain": lambda: pickle.dumps(Trap(marker)),
            "in a state": lambda: pickle.dumps(state, protocol=2),
            "zip": lambda: saved(state),
            "legacy": lambda: saved(state, _use_new_zipfile_serialization=False),
        }[kind]()
    )
    message = refused(state_module.read, path)
    assert "would run code" in message
    assert path.name in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(Trap(marker)))
    assert marker.exists()  # the trap works


# States that are refused


def without(*parts: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if not any(part in name for part in parts)}


def having(name: str, tensor: torch.Tensor) -> Callable[[State], State]:
    return lambda state: state | {name: tensor}


BAD_STATES = {
    "empty": (lambda _: {}, "lacks image_encoder.patch_embed.proj.weight"),
    "another model": (lambda _: resnet18().state_dict(), "not a Segment Anything model.*bn1, conv1, fc"),
    "no mask decoder": (without("mask_decoder"), "lacks mask_decoder"),
    "no prompt encoder": (without("prompt_encoder"), "lacks prompt_encoder"),
    "one missing": (
        without("iou_prediction_head.layers.2.bias"),
        r"iou_prediction_head.layers.2: 1 missing \(first .*bias expected \[4\]",
    ),
    "a table missing": (without("blocks.3.attn.rel_pos_h"), "lacks image_encoder.blocks.3.attn.rel_pos_h"),
    "one too many": (
        having("image_encoder.extra", torch.ones(1)),
        r"image_encoder.extra: 1 of no known place \(first image_encoder.extra \[1\]",
    ),
    "a head too": (having("mask_decoder.head", torch.ones(1)), r"mask_decoder.head: 1 of no known place"),
    "half a detector": (having("detector.head", torch.ones(1)), r"it lacks detector\.backbone\.body\.patch_embed"),
    "wrong shape": (having(NORM, torch.ones(191)), rf"{NORM} has shape \[191\], expected \[192\]"),
    "not finite": (having(NORM, torch.full((192,), torch.nan)), f"{NORM} has values that are not finite"),
    "infinite": (having(NORM, torch.full((192,), -torch.inf)), f"{NORM} has values that are not finite"),
    "windows differ": (having("image_encoder.blocks.0.attn.rel_pos_h", torch.ones(9, 64)), r"\[5, 8\]"),
}
UNFIT_STATES = {
    "rank of the patches": (having("image_encoder.patch_embed.proj.weight", torch.ones(192)), "patch_embed"),
    "rank of the positions": (having("image_encoder.pos_embed", torch.ones(3)), "pos_embed"),
    "rank of a table": (having("image_encoder.blocks.0.attn.rel_pos_h", torch.ones(15)), "rel_pos_h"),
    "no width of a head": (having("image_encoder.blocks.0.attn.rel_pos_h", torch.ones(15, 0)), "rel_pos_h"),
    "no blocks": (without("image_encoder.blocks"), "blocks"),
    "channels for no heads": (having("image_encoder.neck.0.weight", torch.ones(255, 192, 1, 1)), "neck"),
    "names that are numbers": (lambda _: {0: torch.ones(1)}, "name"),
    "sparse": (having(NORM, torch.ones(192).to_sparse()), NORM),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_that_does_not_fit_is_refused(case: str, nano: State, tmp_path: Path) -> None:
    change, expected = BAD_STATES[case]
    with pytest.raises(InvalidCheckpoint, match=expected) as caught:
        checkpoint.extract(change(nano), tmp_path, **SOURCE)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("case", UNFIT_STATES)
def test_a_state_of_odd_shapes_is_refused(case: str, nano: State, tmp_path: Path) -> None:
    change, expected = UNFIT_STATES[case]
    with pytest.raises(InvalidCheckpoint, match=expected):
        checkpoint.extract(change(nano), tmp_path, **SOURCE)


def test_what_does_not_fit_is_listed_by_part(nano: State, tmp_path: Path) -> None:
    state = without("mask_decoder.transformer.layers.1.", "mask_decoder.iou_token")(nano)
    state |= {"mask_decoder.hf_token.weight": torch.ones(1, 256), "mask_decoder.hf_mlp.layers.0.bias": torch.ones(2)}
    state |= {NORM: torch.ones(3), "image_encoder.blocks.1.norm2.bias": torch.ones(4)}
    state |= {"mask_decoder.transformer.layers.1.x": torch.ones(1)}  # so that there still are two layers
    message = refused(lambda: checkpoint.extract(state, tmp_path, **SOURCE))
    for expected in (
        "mask_decoder.transformer.layers.1: 36 missing (first mask_decoder.transformer.layers.1.self_attn.q_proj.we",
        "mask_decoder.iou_token: 1 missing (first mask_decoder.iou_token.weight expected [1, 256])",
        "mask_decoder.hf_token: 1 of no known place (first mask_decoder.hf_token.weight [1, 256])",
        "mask_decoder.hf_mlp.layers.0: 1 of no known place",
        f"image_encoder.blocks.1: 2 of another shape (first {NORM} has shape [3], expected [192])",
    ):
        assert expected in message


NAMES = st.one_of(st.text(max_size=20), st.text("ab.01\n\x1b\ud800", min_size=100, max_size=300))
TENSORS = st.sampled_from(
    [
        torch.ones(()),
        torch.ones(0),
        torch.ones(1, 2, 3, 4, 5),
        torch.full((2,), torch.nan),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, 2).to_sparse(),
        torch.ones(3, dtype=torch.int64),
    ]
)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_state_with_anything_wrong_is_refused_in_one_printable_line(data: st.DataObject, nano: State) -> None:
    """A tensor of any shape in place of one of the model's, or an absurd name beside them."""
    name = data.draw(st.one_of(st.sampled_from(sorted(nano)), NAMES), "name")
    shape = st.lists(st.integers(0, 300), max_size=5).filter(lambda sides: math.prod(sides) < 10**6)
    tensor = data.draw(st.one_of(TENSORS, shape.map(torch.ones)), "tensor")
    assume(name not in checkpoint.BESIDE)
    assume(name not in nano or tensor.shape != nano[name].shape)
    with tempfile.TemporaryDirectory() as folder:
        message = refused(lambda: checkpoint.extract(nano | {name: tensor}, Path(folder) / "out", **SOURCE))
        assert not (Path(folder) / "out").exists()
    assert message.isprintable()
    assert len(message) < 3000
    message.encode()


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_damaged_file_is_refused_or_read(data: st.DataObject) -> None:
    """Bytes overwritten anywhere: what is read is tensors, or InvalidCheckpoint."""
    whole = saved({"model": TINY, "epoch": 3}, _use_new_zipfile_serialization=data.draw(st.booleans(), "zipped"))
    content = bytearray(data.draw(st.sampled_from([whole, save(TINY)]), "file"))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8), "positions"):
        content[position] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.pth"
        path.write_bytes(content)
        with contextlib.suppress(InvalidCheckpoint):
            assert all(isinstance(tensor, torch.Tensor) for tensor in state_module.read(path).values())


def test_tensors_that_share_memory_are_split_too(nano: State, tmp_path: Path) -> None:
    tied = nano | {NORM: nano["image_encoder.blocks.0.norm1.weight"]}
    card = checkpoint.extract(tied, tmp_path, **SOURCE)
    assert torch.equal(checkpoint.load_half(tmp_path, "encoder", card)[NORM], tied[NORM])


@pytest.mark.parametrize("content", [None, b"", b"{", b"{}"])
def test_a_damaged_card_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model.json").write_bytes(content)
    assert "model.json" in refused(ModelCard.read, tmp_path)
