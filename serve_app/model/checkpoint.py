"""Checkpoints: recognised by their shapes, split into encoder, decoder and CellSAM's detector, kept as safetensors.

A split model is a folder: `encoder.safetensors`, `decoder.safetensors`, of a CellSAM `detector.safetensors`, and
`model.json`. Each replica reads only its part. A checkpoint of an encoder alone gives no second file, and a card whose
`decoder_sha256` is empty.
Sizes come from the tensors themselves, so any Segment Anything ViT is read, not only B, L and H.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from cluster.errors import InvalidCheckpoint
from serve_app.model import cellsam_names
from serve_app.model.preprocess import PIXEL_MEAN, PIXEL_STD
from serve_app.model.state import State, shown

ENCODER, DECODER, DETECTOR = "encoder", "decoder", "detector"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PREFIXES = {"image_encoder.": ENCODER, "prompt_encoder.": DECODER, "mask_decoder.": DECODER, "detector.": DETECTOR}
FAULTS_SHOWN = 8


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Segment Anything model. `image_size` in pixels, `patch` in pixels, `window` in tokens."""

    image_size: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    window: int
    global_blocks: tuple[int, ...]
    channels: int = 256
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_width: int = 2048
    iou_head_depth: int = 3
    iou_head_width: int = 256
    mask_outputs: int = 3
    mask_channels: int = 16
    decoder_norm_eps: float = 1e-5

    @property
    def grid(self) -> int:
        """Tokens along one side of the embedding."""
        return self.image_size // self.patch


@dataclass(frozen=True)
class DetectorSizes:
    """Sizes of CellSAM's detector, an Anchor DETR; `backbone` is a ViT without a neck. `heads` and `anchors` are
    `nheads` and `num_query_position` in CellSAM's own configuration, `mlp_width` is `dim_feedforward`."""

    backbone: Architecture
    width: int = 256
    heads: int = 8
    mlp_width: int = 1024
    encoder_layers: int = 6
    decoder_layers: int = 6
    anchors: int = 3500
    patterns: int = 1
    classes: int = 2


NORM_EPS = "norm_eps"
BESIDE: dict[str, tuple[float, ...]] = {  # numbers that are no weights: forks save the first two as buffers
    "pixel_mean": PIXEL_MEAN,
    "pixel_std": PIXEL_STD,
    NORM_EPS: (Architecture.decoder_norm_eps,),
}

# Image size, patch, width, depth, heads, MLP width, window, global blocks. B, L, H: as segment_anything.build_sam.
ARCHITECTURES = {
    "nano": Architecture(256, 8, 192, 6, 3, 768, 8, (2, 5), decoder_mlp_width=512),
    "sam_vit_b": Architecture(1024, 16, 768, 12, 12, 3072, 14, (2, 5, 8, 11)),
    "sam_vit_l": Architecture(1024, 16, 1024, 24, 16, 4096, 14, (5, 11, 17, 23)),
    "sam_vit_h": Architecture(1024, 16, 1280, 32, 16, 5120, 14, (7, 15, 23, 31)),
}


# CellSAM's, as its modelconfig.yaml has it, and a small one for tests: the SAM that it is made with, and its detector.
CELLSAMS = {
    "cellsam": ("sam_vit_b", DetectorSizes(ARCHITECTURES["sam_vit_b"])),
    "nano_cellsam": ("nano", DetectorSizes(ARCHITECTURES["nano"], 64, 8, 128, 2, 2, 150)),
}
CONFIGURED = {  # key of CellSAM's modelconfig.yaml → field of DetectorSizes
    "hidden_dim": "width",
    "nheads": "heads",
    "dim_feedforward": "mlp_width",
    "enc_layers": "encoder_layers",
    "dec_layers": "decoder_layers",
    "num_query_position": "anchors",
    "num_query_pattern": "patterns",
    "num_classes": "classes",
}
FIXED = {"spatial_prior": "learned", "attention_type": "RCDA", "num_feature_levels": 1}  # the only ones read here


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


def recognise(state: Mapping[str, torch.Tensor]) -> tuple[str, Architecture]:
    """The family's name (`custom` where sizes are nobody's) and the sizes, read off the tensors.

    Of an encoder alone, the decoder's sizes are those of the family, or segment_anything's.

    Raises:
        InvalidCheckpoint: the tensors are not those of a Segment Anything model: names the first that is missing.
    """

    if not all(isinstance(name, str) for name in state):
        raise InvalidCheckpoint("the checkpoint has tensors whose name is no text")
    encoder, decoder = "image_encoder.", "mask_decoder."
    shape, count = partial(_shape, state), partial(_count, state)
    sizes = _vit(state, encoder) | {"channels": shape(encoder + "neck.0.weight", 4)[0]}
    if _has_decoder(state):
        sizes |= {
            "decoder_depth": count(decoder + "transformer.layers."),
            "decoder_mlp_width": shape(decoder + "transformer.layers.0.mlp.lin1.weight", 2)[0],
            "iou_head_depth": count(decoder + "iou_prediction_head.layers."),
            "iou_head_width": shape(decoder + "iou_prediction_head.layers.0.weight", 2)[0],
            "mask_outputs": shape(decoder + "mask_tokens.weight", 2)[0] - 1,
            "mask_channels": shape("prompt_encoder.mask_downscaling.3.weight", 4)[0],
        }
    if sizes["channels"] % (8 * Architecture.decoder_heads):
        raise InvalidCheckpoint(f"{encoder}neck.0.weight has {sizes['channels']} channels, expected a multiple of 64")
    for name, known in ARCHITECTURES.items():
        if replace(known, **sizes) == known:
            return name, known
    return "custom", Architecture(**sizes)


def _shape(state: Mapping[str, torch.Tensor], name: str, rank: int) -> torch.Size:
    if name not in state:
        found = ", ".join(sorted({str(key).split(".")[0] for key in state})[:5]) or "nothing"
        raise InvalidCheckpoint(
            f"the checkpoint is not a Segment Anything model: it lacks {name} (its top-level parts: {found})"
        )
    found_shape = state[name].shape
    if len(found_shape) != rank or 0 in found_shape:
        raise InvalidCheckpoint(f"{name} has shape {list(found_shape)}, expected {rank} sizes above 0")
    return found_shape


def _count(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def _vit(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, Any]:
    """A ViT's sizes, as of Architecture."""
    shape = partial(_shape, state)
    width, _, patch, _ = shape(prefix + "patch_embed.proj.weight", 4)
    grid = shape(prefix + "pos_embed", 4)[1]
    depth = _count(state, prefix + "blocks.") or 1  # the first is missed by name below
    tables = [shape(f"{prefix}blocks.{i}.attn.rel_pos_h", 2) for i in range(depth)]  # [2 · side − 1, head width]
    sides = [(table[0] + 1) // 2 for table in tables]
    windows = {side for side in sides if side != grid}
    if len(windows) > 1:
        raise InvalidCheckpoint(f"the checkpoint has attention windows of several sizes: {sorted(windows)}")
    return {
        "image_size": grid * patch,
        "patch": patch,
        "width": width,
        "depth": depth,
        "heads": width // tables[0][1],
        "mlp_width": shape(prefix + "blocks.0.mlp.lin1.weight", 2)[0],
        "window": windows.pop() if windows else 0,
        "global_blocks": tuple(i for i, side in enumerate(sides) if side == grid),
    }


def recognise_detector(
    state: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None
) -> DetectorSizes | None:
    """The sizes of a CellSAM's detector, read off its tensors; None where there is none. `config` is its
    modelconfig.yaml, by whose keys it is built: `nheads` is in no tensor, the others must agree with them.

    Raises:
        InvalidCheckpoint: the detector is another one than `config` says, or of a kind that CellSAM's is not.
    """
    own, shape = "detector.transformer.", partial(_shape, state)
    if not any(str(name).startswith("detector.") for name in state):
        return None
    backbone, config = _vit(state, "detector.backbone.body."), config or {}
    known = (one for one in ARCHITECTURES.values() if replace(one, **backbone) == one)
    made = DetectorSizes(
        backbone=next(known, Architecture(**backbone)),
        width=shape("detector.input_proj.0.0.weight", 4)[0],
        heads=config.get("nheads", DetectorSizes.heads),
        mlp_width=shape(own + "encoder_layers.0.ffn.linear1.weight", 2)[0],
        encoder_layers=_count(state, own + "encoder_layers."),
        decoder_layers=_count(state, own + "decoder_layers."),
        anchors=shape(own + "position.weight", 2)[0],
        patterns=shape(own + "pattern.weight", 2)[0],
        classes=shape(own + "class_embed.weight", 2)[0],
    )
    found = FIXED | {key: getattr(made, field) for key, field in CONFIGURED.items()}
    for key in found.keys() & config.keys():
        if config[key] != found[key]:
            raise InvalidCheckpoint(f"modelconfig says {key}: {shown(config[key])}; the checkpoint has {found[key]}")
    if not isinstance(made.heads, int) or made.heads < 1 or made.width % made.heads:
        raise InvalidCheckpoint(f"modelconfig says nheads: {shown(made.heads)}; expected a divisor of {made.width}")
    return made


def _has_decoder(state: Mapping[str, torch.Tensor]) -> bool:
    return any(PREFIXES.get(name.split(".")[0] + ".") == DECODER for name in state)


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
            expected = {**build_encoder(sizes).state_dict(prefix="image_encoder.")}
            modules = build_decoder(sizes) if _has_decoder(state) else ()
            for prefix, module in zip(("prompt_encoder.", "mask_decoder."), modules, strict=False):
                expected |= module.state_dict(prefix=prefix)
            if detector is not None:
                expected |= build_detector(detector).state_dict(prefix="detector.")
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


def build_encoder(sizes: Architecture) -> torch.nn.Module:
    """segment_anything's own image encoder of these sizes; weights are fresh, position tables zero."""
    from segment_anything.modeling import ImageEncoderViT

    return ImageEncoderViT(
        img_size=sizes.image_size,
        patch_size=sizes.patch,
        embed_dim=sizes.width,
        depth=sizes.depth,
        num_heads=sizes.heads,
        mlp_ratio=(sizes.mlp_width + 0.5) / sizes.width,  # it is multiplied by the width again, and cut off
        out_chans=sizes.channels,
        norm_layer=_layer_norm,
        use_rel_pos=True,
        window_size=sizes.window,
        global_attn_indexes=sizes.global_blocks,
    )


def _layer_norm(width: int) -> torch.nn.LayerNorm:
    return torch.nn.LayerNorm(width, eps=1e-6)  # as segment_anything's build_sam


def build_decoder(sizes: Architecture) -> tuple[torch.nn.Module, torch.nn.Module]:
    """segment_anything's own (prompt encoder, mask decoder) of these sizes; weights are fresh."""
    from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

    side = (sizes.grid, sizes.grid)
    prompts = PromptEncoder(sizes.channels, side, (sizes.image_size, sizes.image_size), sizes.mask_channels)
    transformer = TwoWayTransformer(
        depth=sizes.decoder_depth,
        embedding_dim=sizes.channels,
        num_heads=sizes.decoder_heads,
        mlp_dim=sizes.decoder_mlp_width,
    )
    for layer in transformer.layers:
        for norm in (layer.norm1, layer.norm2, layer.norm3, layer.norm4):
            norm.eps = sizes.decoder_norm_eps
    masks = MaskDecoder(
        transformer_dim=sizes.channels,
        transformer=transformer,
        num_multimask_outputs=sizes.mask_outputs,
        iou_head_depth=sizes.iou_head_depth,
        iou_head_hidden_dim=sizes.iou_head_width,
    )
    return prompts, masks


def build_detector(sizes: DetectorSizes) -> torch.nn.Module:
    """CellSAM's detector of these sizes; weights are fresh."""
    from serve_app.model.cellfinder import CellFinder  # it imports this module

    return CellFinder(sizes)


def seeded(name: str, seed: int) -> State:
    """Random weights of a named architecture, the same for the same seed: for tests and machines without weights.

    Every tensor is drawn, position tables too, so that a runtime that forgets one of them is found out.
    """
    if name not in ARCHITECTURES | CELLSAMS:
        raise InvalidCheckpoint(f"{name!r} is no architecture; there are {', '.join(ARCHITECTURES | CELLSAMS)}")
    family, detector = CELLSAMS.get(name, (name, None))
    return drawn(ARCHITECTURES[family], detector, seed)


def drawn(sizes: Architecture, detector: DetectorSizes | None, seed: int) -> State:
    """Random weights of any sizes, as `seeded`."""
    with torch.device("meta"):  # names and shapes are all that is wanted of them
        modules = {"image_encoder.": build_encoder(sizes)}
        modules |= dict(zip(("prompt_encoder.", "mask_decoder."), build_decoder(sizes), strict=True))
        if detector is not None:
            modules["detector."] = build_detector(detector)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for prefix, module in modules.items():
        for key, value in module.state_dict(prefix=prefix).items():
            noise = torch.randn(value.shape, generator=generator)
            state[key] = _draw(key, value, noise)
    if detector is not None:
        state[cellsam_names.ADVANCED] = torch.tensor(1.0)
    return state


def _draw(key: str, fresh: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    if "rel_pos" in key:
        return 0.25 * noise
    if key.endswith("pos_embed"):
        return 0.3 * noise
    table = key.split(".")[1].endswith(("embed", "embeddings", "token", "tokens"))  # of tokens, not of products
    if key.endswith("gaussian_matrix") or (fresh.dim() == 2 and table) or key.endswith(".pattern.weight"):
        return noise
    if key.endswith(".position.weight"):  # anchors: anywhere in the image
        return torch.special.ndtr(noise)
    if fresh.dim() == 1:  # biases and norms, around their fresh value (norms: 1)
        centre = 1.0 if key.endswith("weight") else 0.0
        return centre + 0.1 * noise
    fan_in = fresh[0].numel()
    asking = key.split(".")[-2] in ("qkv", "q_proj", "k_proj") or key.endswith("in_proj_weight")
    gain = 3.0 if asking else 1.0  # attention that is far from uniform
    if ".adapt_pos" in key or ".class_embed." in key:  # of a detector, whose anchors all start from one pattern
        gain = 6.0
    return gain * noise / (3 * fan_in) ** 0.5


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
