"""Checkpoints: recognised by their shapes, split into encoder, decoder and CellSAM's detector, kept as safetensors.

A split model is a folder: `encoder.safetensors`, `decoder.safetensors`, of a CellSAM `detector.safetensors`, and
`model.json`. Each replica reads only its part. A checkpoint of an encoder alone gives no second file, and a card whose
`decoder_sha256` is empty.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from cluster.errors import InvalidCheckpoint
from serve_app.model import cellsam_names, modules
from serve_app.model.architectures import (
    CELLSAMS,
    DECODERS,
    Architecture,
    DetectorSizes,
    has_decoder,
    recognise,
    recognise_detector,
)
from serve_app.model.preprocess import PIXEL_MEAN, PIXEL_STD
from serve_app.model.state import State, shown

ENCODER, DECODER, DETECTOR = "encoder", "decoder", "detector"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PREFIXES = {"image_encoder.": ENCODER, "prompt_encoder.": DECODER, "mask_decoder.": DECODER, "detector.": DETECTOR}
FAULTS_SHOWN = 8


NORM_EPS = "norm_eps"
BESIDE: dict[str, tuple[float, ...]] = {  # numbers that are no weights: forks save the first two as buffers
    "pixel_mean": PIXEL_MEAN,
    "pixel_std": PIXEL_STD,
    NORM_EPS: (Architecture.decoder_norm_eps,),
}


@dataclass(frozen=True)
class ModelCard:
    """`model.json`: what a split model is. The hashes are sha256 in hex; `trained` is False for random weights.

    detector: a CellSAM's; then `advanced` says whether its pixels are prepared as CellSAM does in advanced mode.
    """

    architecture: Architecture
    family: str
    source: str
    source_sha256: str
    encoder_sha256: str
    decoder_sha256: str
    licence: str
    trained: bool
    pixel_mean: tuple[float, ...] = PIXEL_MEAN
    pixel_std: tuple[float, ...] = PIXEL_STD
    detector: DetectorSizes | None = None
    detector_sha256: str = ""
    advanced: bool = False

    @classmethod
    def read(cls, folder: Path) -> ModelCard:
        """Raises InvalidCheckpoint where `folder` holds no split model."""
        path = folder / "model.json"
        try:
            values = json.loads(path.read_text())
            values |= {key: tuple(values[key]) for key in ("pixel_mean", "pixel_std")}
            values["architecture"] = _architecture(values["architecture"])
            if found := values.get("detector"):
                values["detector"] = DetectorSizes(**found | {"backbone": _architecture(found["backbone"])})
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidCheckpoint(f"{path} is missing or damaged: extract the checkpoint again") from error

    def sha256(self, part: str) -> str:
        """Of ENCODER, DECODER or DETECTOR; empty where the model has none."""
        return {ENCODER: self.encoder_sha256, DECODER: self.decoder_sha256, DETECTOR: self.detector_sha256}[part]

    def files(self) -> dict[str, str]:
        """The name and sha256 of each part's file beside the card."""
        return {f"{one}.safetensors": own for one in (ENCODER, DECODER, DETECTOR) if (own := self.sha256(one))}


def _architecture(values: dict[str, Any]) -> Architecture:
    return Architecture(**values | {"global_blocks": tuple(values["global_blocks"])})


def split(state: Mapping[str, torch.Tensor]) -> dict[str, State]:
    """The tensors of ENCODER, DECODER and DETECTOR, under their full names.

    Raises:
        InvalidCheckpoint: a tensor belongs to none; nothing is silently dropped.
    """
    parts: dict[str, State] = {ENCODER: {}, DECODER: {}, DETECTOR: {}}
    strangers = []
    memory: set[int] = set()
    for name, tensor in state.items():
        own = parts.get(part(name))
        if own is None:
            strangers.append(name)
        else:
            shared = tensor.untyped_storage().data_ptr() in memory  # safetensors stores no tensor twice
            own[name] = tensor.clone() if shared else tensor.contiguous()
            memory.add(own[name].untyped_storage().data_ptr())
    if strangers:
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        raise InvalidCheckpoint(
            f"the checkpoint has tensors of no known part: {', '.join(strangers[:3])}{more}; "
            f"expected names under {', '.join(PREFIXES)}"
        )
    return parts


def part(name: str) -> str:
    """ENCODER, DECODER, DETECTOR; `unused`, which no part reads, or `card`, which stands beside the weights."""
    if name.startswith(cellsam_names.UNUSED):
        return "unused"
    return next((half for prefix, half in PREFIXES.items() if name.startswith(prefix)), "card")


def extract(
    state: Mapping[str, torch.Tensor],
    out: Path,
    *,
    source: str,
    source_sha256: str,
    licence: str = "unknown",
    trained: bool = True,
    config: Mapping[str, Any] | None = None,
) -> ModelCard:
    """Split `state` into `out`. The folder appears whole, `model.json` last; the same state gives the same bytes.
    `config`: a CellSAM's modelconfig.yaml, as of `recognise_detector`.

    Raises:
        InvalidCheckpoint: not a Segment Anything model, or numbers that are not finite.
    """
    apart = (*BESIDE, cellsam_names.ADVANCED)
    weights = {
        name: tensor
        for name, tensor in state.items()
        if name not in apart and not str(name).startswith(cellsam_names.UNUSED)
    }
    family, sizes = recognise(weights)
    detector = recognise_detector(weights, config)
    if detector is not None:
        family = next((name for name, known in CELLSAMS.items() if known == (family, detector)), "custom")
        if detector.backbone.image_size != sizes.image_size:
            raise InvalidCheckpoint(
                f"the detector is for {detector.backbone.image_size} px, the image encoder for {sizes.image_size} px"
            )
    _check(weights, sizes, detector)
    beside = {name: _beside(name, state[name]) if name in state else usual for name, usual in BESIDE.items()}
    digests = {ENCODER: "", DECODER: "", DETECTOR: ""}
    out.mkdir(parents=True, exist_ok=True)
    for half, tensors in split(weights).items():
        if tensors:  # other numbers beside the weights are another model: they belong into the hash
            own = {name: repr(value) for name, value in beside.items() if (name == NORM_EPS) == (half == DECODER)}
            other = {name: value for name, value in own.items() if value != repr(BESIDE[name])}
            content = save(dict(sorted(tensors.items())), metadata=other or None)
            digests[half] = hashlib.sha256(content).hexdigest()
            write_whole(out / f"{half}.safetensors", content)
    card = ModelCard(
        architecture=replace(sizes, decoder_norm_eps=beside[NORM_EPS][0]),
        family=family,
        source=source,
        source_sha256=source_sha256,
        encoder_sha256=digests[ENCODER],
        decoder_sha256=digests[DECODER],
        licence=licence,
        trained=trained,
        pixel_mean=beside["pixel_mean"],
        pixel_std=beside["pixel_std"],
        detector=detector,
        detector_sha256=digests[DETECTOR],
        advanced=bool(state.get(cellsam_names.ADVANCED, False)),
    )
    write_whole(out / "model.json", json.dumps(asdict(card), indent=2).encode())
    return card


def _beside(name: str, tensor: torch.Tensor) -> tuple[float, ...]:
    """The tensor's numbers; segment_anything's own where those differ by no more than rounding."""
    usual = BESIDE[name]
    plain = tensor.layout == torch.strided and tensor.dtype in FLOATS and tensor.numel() == len(usual)
    values = tensor.flatten() if plain else torch.tensor([torch.nan])
    if not torch.isfinite(values).all() or (name != "pixel_mean" and not (values > 0).all()):
        found = shown(tensor.tolist() if plain else f"{tensor.dtype} {list(tensor.shape)}")
        raise InvalidCheckpoint(f"{name} is {found}, expected {len(usual)} finite, above 0 in all but a mean")
    rounded = torch.tensor(usual, dtype=values.dtype)
    return usual if torch.allclose(values, rounded, rtol=1e-5, atol=0) else tuple(values.tolist())


def _check(state: Mapping[str, torch.Tensor], sizes: Architecture, detector: DetectorSizes | None) -> None:
    """Every name and shape is what a model of these sizes has, and every number is finite."""
    try:
        with torch.device("meta"):
            expected = {**modules.build_encoder(sizes).state_dict(prefix="image_encoder.")}
            halves = modules.build_decoder(sizes) if has_decoder(state) else ()
            for prefix, module in zip(DECODERS, halves, strict=False):
                expected |= module.state_dict(prefix=prefix)
            if detector is not None:
                expected |= modules.build_detector(detector).state_dict(prefix="detector.")
    except (AssertionError, ArithmeticError, ValueError, RuntimeError) as error:
        raise InvalidCheckpoint(f"the checkpoint's sizes are no Segment Anything model's: {sizes}") from error
    faults = [
        *_faults("missing", {name: f"expected {list(expected[name].shape)}" for name in expected if name not in state}),
        *_faults("of no known place", {name: list(state[name].shape) for name in state if name not in expected}),
        *_faults(
            "of another shape",
            {
                name: f"has shape {list(tensor.shape)}, expected {list(expected[name].shape)}"
                for name, tensor in state.items()
                if name in expected and tensor.shape != expected[name].shape
            },
        ),
    ]
    if faults:
        more = f"; and {len(faults) - FAULTS_SHOWN} more parts" if len(faults) > FAULTS_SHOWN else ""
        raise InvalidCheckpoint(
            "the checkpoint does not fit the Segment Anything model that its sizes make it (names as in "
            f"segment_anything): {'; '.join(faults[:FAULTS_SHOWN])}{more}"
        )
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.dtype not in FLOATS:
            raise InvalidCheckpoint(f"{name} is {tensor.dtype} {tensor.layout}, expected plain floating-point numbers")
        if not torch.isfinite(tensor).all():
            raise InvalidCheckpoint(f"{name} has values that are not finite")


def _faults(kind: str, names: Mapping[str, object]) -> list[str]:
    """A phrase a part of the model: `mask_decoder.transformer.layers.1: 12 missing (first NAME expected [256])`."""
    parts: dict[str, list[str]] = {}
    for name in names:
        match = re.match(r".*?\.\d+(?=\.)|[^.]*\.?[^.]*", name, re.DOTALL)
        parts.setdefault(match[0] if match else "", []).append(name)
    return [f"{shown(part)}: {len(own)} {kind} (first {shown(own[0])} {names[own[0]]})" for part, own in parts.items()]


def parameter_table(state: Mapping[str, torch.Tensor]) -> list[tuple[str, str, int, int]]:
    """Where parameters went: rows of (`part`, its own part, tensors, parameters), in file order."""
    tensors: Counter[tuple[str, str]] = Counter()
    numbers: Counter[tuple[str, str]] = Counter()
    for name, tensor in state.items():
        key = part(name), ".".join(name.removeprefix(cellsam_names.UNUSED).split(".")[:2])
        tensors[key] += 1
        numbers[key] += tensor.numel()
    return [(*key, tensors[key], numbers[key]) for key in tensors]


def write_whole(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def load_half(folder: Path, half: str, card: ModelCard) -> dict[str, Any]:
    """One half's tensors, checked against the card's sha256.

    Raises:
        InvalidCheckpoint: the file is not the one that was extracted, or the checkpoint was an encoder alone.
    """
    path = folder / f"{half}.safetensors"
    expected = card.sha256(half)
    if not expected:
        raise no_decoder() if half == DECODER else no_detector(folder)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise InvalidCheckpoint(f"{path} has sha256 {found[:12]}…, expected {expected[:12]}…: extract it again")
    return load_file(path)


def no_decoder() -> InvalidCheckpoint:
    return InvalidCheckpoint(
        "the model's checkpoint is an image encoder alone: it makes embeddings, and has no prompt encoder and mask "
        "decoder for masks; give the whole checkpoint as its source"
    )


def no_detector(folder: Path) -> InvalidCheckpoint:
    return InvalidCheckpoint(f"the model in {folder} has no detector: expected a split CellSAM checkpoint")
