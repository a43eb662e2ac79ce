"""Hugging Face's `SamModel` → segment_anything's names. The two hold the same tensors, in the same layouts.

One number is another: the LayerNorms in the layers of the decoder's transformer add NORM_EPS, segment_anything's 1e-5.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from cluster.errors import InvalidCheckpoint

LANDMARK = "vision_encoder.patch_embed.projection.weight"  # every SamModel and SamVisionModel has it
NORM_EPS = 1e-6  # SamMaskDecoderConfig.layer_norm_eps, where no config.json says another
NAMES = (  # of transformers/models/sam/modeling_sam.py, and of segment_anything/modeling; applied in this order
    (r"^vision_encoder\.", "image_encoder."),
    (r"^image_encoder\.layers\.", "image_encoder.blocks."),
    (r"^image_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^image_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^image_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^image_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^image_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^(shared_image|prompt_encoder\.shared)_embedding\.positional_embedding$", "prompt_encoder.positional"),
    (r"^prompt_encoder\.positional$", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    (r"\.layer_norm(\d|_final_attn)\.", r".norm\1."),
)
# An MLP is `proj_in`, `layers.0` …, `proj_out` there, and `layers.0` … here.
MLP_LAYER = re.compile(r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.(.+)\.(\w+)$")


def renamed(names: list[str]) -> list[str]:
    """Each name as segment_anything has it; one that is not known stays as it is."""
    hidden: dict[str, int] = {}  # layers between the first and the last, by MLP
    for name in names:
        if (match := MLP_LAYER.match(name)) and match[2].startswith("layers.") and match[2][7:].isdecimal():
            hidden[match[1]] = max(hidden.get(match[1], 0), int(match[2][7:]) + 1)
    return [_renamed(name, hidden) for name in names]


def _renamed(name: str, hidden: dict[str, int]) -> str:
    if match := MLP_LAYER.match(name):
        mlp, layer, parameter = match.groups()
        if layer == "proj_in":
            layer = "layers.0"
        elif layer == "proj_out":
            layer = f"layers.{hidden.get(mlp, 0) + 1}"
        elif layer.startswith("layers.") and layer[7:].isdecimal():
            layer = f"layers.{int(layer[7:]) + 1}"
        return f"{mlp}.{layer}.{parameter}"
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def settings(folder: Path) -> dict[str, torch.Tensor]:
    """What a folder's JSON files say beside the weights: `pixel_mean` and `pixel_std`, [3] on the scale of 0 to 255, of
    its image processor, and `norm_eps`, [], of its decoder's transformer. Those that are not there are left out.

    Raises:
        InvalidCheckpoint: one of the files is damaged.
    """
    found: dict[str, torch.Tensor] = {}
    for file in ("preprocessor_config.json", "processor_config.json", "config.json"):
        try:
            values = json.loads((folder / file).read_bytes()) if (folder / file).exists() else {}
            processor = values.get("image_processor", values)
            for name, key in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
                if key in processor:
                    scale = processor.get("rescale_factor", 1 / 255)
                    found[name] = torch.tensor(processor[key], dtype=torch.float64) / scale
            decoder = values.get("mask_decoder_config") or {}
            if "layer_norm_eps" in decoder:
                found["norm_eps"] = torch.tensor(decoder["layer_norm_eps"], dtype=torch.float64)
        except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise InvalidCheckpoint(f"{folder / file} is damaged: expected what save_pretrained writes") from error
    return found
