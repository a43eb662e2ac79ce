"""Sizes of models: those that are known by name, and those that are read off a checkpoint's tensors, so that any
Segment Anything ViT is read, not only B, L and H."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from cluster.errors import InvalidCheckpoint
from serve_app.model.state import shown

DECODERS = ("prompt_encoder.", "mask_decoder.")


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


# Image size, patch, width, depth, heads, MLP width, window, global blocks. B, L, H: as segment_anything.build_sam.
SAMS = {
    "nano": Architecture(256, 8, 192, 6, 3, 768, 8, (2, 5), decoder_mlp_width=512),
    "sam_vit_b": Architecture(1024, 16, 768, 12, 12, 3072, 14, (2, 5, 8, 11)),
    "sam_vit_l": Architecture(1024, 16, 1024, 24, 16, 4096, 14, (5, 11, 17, 23)),
    "sam_vit_h": Architecture(1024, 16, 1280, 32, 16, 5120, 14, (7, 15, 23, 31)),
}
# CellSAM's, as its modelconfig.yaml has it, and a small one for tests: the SAM that it is made with, and its detector.
CELLSAMS = {
    "cellsam": ("sam_vit_b", DetectorSizes(SAMS["sam_vit_b"])),
    "nano_cellsam": ("nano", DetectorSizes(SAMS["nano"], 64, 8, 128, 2, 2, 150)),
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
    if has_decoder(state):
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
    for name, known in SAMS.items():
        if replace(known, **sizes) == known:
            return name, known
    return "custom", Architecture(**sizes)


def has_decoder(state: Mapping[str, torch.Tensor]) -> bool:
    return any(name.startswith(DECODERS) for name in state)


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
    known = (one for one in SAMS.values() if replace(one, **backbone) == one)
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
