"""segment_anything's own models, built from its own classes, with weights of which every parameter is random."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from serve_app.model import architectures, checkpoint, modules
from serve_app.model.checkpoint import State

NANO_SIZE = 256
VIT = {"sam_vit_b": "vit_b", "sam_vit_l": "vit_l", "sam_vit_h": "vit_h"}


def build(name: str) -> Sam:
    """The model as its users build it, B, L and H from its registry; fresh weights."""
    if name in VIT:
        return sam_model_registry[VIT[name]]()
    encoder = ImageEncoderViT(
        img_size=NANO_SIZE,
        patch_size=8,
        embed_dim=192,
        depth=6,
        num_heads=3,
        mlp_ratio=4,
        out_chans=256,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=8,
        global_attn_indexes=(2, 5),
    )
    prompts = PromptEncoder(256, (32, 32), (NANO_SIZE, NANO_SIZE), 16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=512)
    masks = MaskDecoder(transformer_dim=256, transformer=transformer, iou_head_depth=3, iou_head_hidden_dim=256)
    return Sam(encoder, prompts, masks).eval()


def filled(name: str, state: State) -> Sam:
    """The model with `state` in every parameter and buffer; strict, so that none is left fresh."""
    sam = build(name)
    sam.load_state_dict(state, strict=True)
    return sam


def extracted(state: State, folder: Path) -> Path:
    checkpoint.extract(state, folder, source="seeded", source_sha256="0" * 64, trained=False)
    return folder


def smooth_nano(seed: int) -> State:
    return smooth("nano", seed)


def smooth(name: str, seed: int) -> State:
    """Random weights whose masks are blobs of many sizes and places, where `seeded` gives noise everywhere.

    Position tables of low frequency, and blocks that add little to them.
    """
    state = modules.seeded(name, seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = architectures.SAMS[name]
    wave = torch.linspace(0, math.pi, sizes.grid)
    waves = torch.stack([torch.cos(wave * i)[:, None] * torch.cos(wave * j) for i in range(4) for j in range(4)])
    mix = torch.randn(sizes.width, len(waves), generator=generator)
    table = (mix @ waves.flatten(1)).view(1, sizes.width, sizes.grid, sizes.grid)
    state["image_encoder.pos_embed"] = table.permute(0, 2, 3, 1).contiguous()
    for name, tensor in state.items():
        if "cross_attn" in name or "final_attn" in name:  # so that prompts make a difference
            state[name] = tensor * (5 if name.endswith(("v_proj.weight", "out_proj.weight")) else 2)
        elif name.startswith("mask_decoder.") and tensor.dim() > 1 and "token" not in name:
            state[name] = 3**0.5 * tensor
        if name.startswith("image_encoder.blocks.") and name.endswith(("attn.proj.weight", "mlp.lin2.weight")):
            state[name] = 0.05 * tensor
        elif "patch_embed.proj.weight" in name or name.endswith("gaussian_matrix"):
            state[name] = 0.2 * tensor
        elif "output_upscaling" in name and tensor.dim() == 4:  # the same for all four pixels a pixel becomes
            state[name] = state[name].mean((2, 3), keepdim=True).expand_as(tensor).contiguous()
        elif "output_hypernetworks_mlps" in name and name.endswith("layers.2.weight"):
            state[name] = 20 * state[name]
    return state


def relative(ours: np.ndarray | torch.Tensor, reference: np.ndarray | torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    expected = torch.as_tensor(reference).double()
    assert ours.shape == expected.shape
    return float((torch.as_tensor(ours).double() - expected).norm() / expected.norm())
