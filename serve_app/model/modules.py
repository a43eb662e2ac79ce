"""segment_anything's own modules, and CellSAM's detector, of any sizes: fresh, or with random weights."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import torch

from cluster.errors import InvalidCheckpoint
from serve_app.model import cellsam_names
from serve_app.model.architectures import CELLSAMS, SAMS, Architecture, DetectorSizes
from serve_app.model.state import State


def _modeling() -> Any:
    """`segment_anything.modeling` alone. Its package imports torchvision, and that torch's compiler: seconds of each
    process's start, which nothing here needs."""
    name = "segment_anything"
    if name in sys.modules:
        return importlib.import_module(f"{name}.modeling")
    spec = importlib.util.find_spec(name)
    assert spec is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)  # not run
    try:
        return importlib.import_module(f"{name}.modeling")
    finally:
        del sys.modules[name]  # who imports it has it whole, with these same modules


modeling = _modeling()


def build_encoder(sizes: Architecture) -> torch.nn.Module:
    """segment_anything's own image encoder of these sizes; weights are fresh, position tables zero."""
    return modeling.ImageEncoderViT(
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
    """segment_anything's own (prompt encoder, mask decoder) of these sizes; weights are fresh. On the CPU whatever the
    default device is: on "meta", their random tables would import torch's compiler, seconds of a process's start."""
    with torch.device("cpu"):
        return _prompt_encoder(sizes), _mask_decoder(sizes)


def _prompt_encoder(sizes: Architecture) -> torch.nn.Module:
    side = (sizes.grid, sizes.grid)
    return modeling.PromptEncoder(sizes.channels, side, (sizes.image_size, sizes.image_size), sizes.mask_channels)


def _mask_decoder(sizes: Architecture) -> torch.nn.Module:
    transformer = modeling.TwoWayTransformer(
        depth=sizes.decoder_depth,
        embedding_dim=sizes.channels,
        num_heads=sizes.decoder_heads,
        mlp_dim=sizes.decoder_mlp_width,
    )
    for layer in transformer.layers:
        for norm in (layer.norm1, layer.norm2, layer.norm3, layer.norm4):
            norm.eps = sizes.decoder_norm_eps
    return modeling.MaskDecoder(
        transformer_dim=sizes.channels,
        transformer=transformer,
        num_multimask_outputs=sizes.mask_outputs,
        iou_head_depth=sizes.iou_head_depth,
        iou_head_hidden_dim=sizes.iou_head_width,
    )


def build_detector(sizes: DetectorSizes) -> torch.nn.Module:
    """CellSAM's detector of these sizes; weights are fresh, its tables are not drawn."""
    from serve_app.model.cellfinder import CellFinder  # by way of `checkpoint` it imports this module

    return CellFinder(sizes)


def seeded(name: str, seed: int) -> State:
    """Random weights of a named architecture, the same for the same seed: for tests and machines without weights.

    Every tensor is drawn, position tables too, so that a runtime that forgets one of them is found out.
    """
    if name not in SAMS | CELLSAMS:
        raise InvalidCheckpoint(f"{name!r} is no architecture; there are {', '.join(SAMS | CELLSAMS)}")
    family, detector = CELLSAMS.get(name, (name, None))
    return drawn(SAMS[family], detector, seed)


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
