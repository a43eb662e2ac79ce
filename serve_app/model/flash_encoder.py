"""The image encoder for GPUs: segment_anything's weights, attention without a stored bias, nothing done for padding.

Exact up to rounding. What is different from segment_anything's module, for tokens of h rows and w columns:
- Global blocks add the relative position inside the attention kernel (flex attention), from two tables of h and w
  entries a query; the module writes a bias of (h·w)² for every head.
- Window blocks fold it into the product: q' = [q·s, rel_h, rel_w], k' = [k, onehot(y), onehot(x)], so that a kernel
  without a mask runs.
- The pads of windows take part in attention with the keys and values of a zero token, which are the projection's bias:
  they are put there, not projected, and what pads would see is not projected either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from serve_app.model.encoder import ReferenceEncoder, normalise

BATCHES = (8, 1)  # images at a time: each size is compiled once, for its own shapes
KERNEL_WIDTH = 8  # attention kernels want heads of a multiple of this


class FlashEncoder:
    """ImageEncoderViT in float32 or bfloat16; on a GPU compiled for batches of 8 and of 1."""

    def __init__(self, folder: Path, device: str, dtype: str = "float32") -> None:
        reference = ReferenceEncoder(folder, device)
        self.card, self.device, self.dtype = reference.card, device, getattr(torch, dtype)
        self.runtime = f"flash {dtype} on {device}"
        self.module = FlashViT(reference.module.requires_grad_(False).to(self.dtype))
        if device.startswith("cuda"):
            black = np.zeros((self.card.architecture.image_size,) * 2 + (3,), np.uint8)
            for size in BATCHES:  # compiled here, in no request's time
                self.encode([black] * size)

    def encode(self, images: Sequence[np.ndarray]) -> Tensor:
        """B images [h, w, 3] uint8 RGB, long side = input size S → [B, C, S/patch, S/patch] float32."""
        card, sizes = self.card, self.card.architecture
        return self.forward(normalise(list(images), sizes.image_size, card.pixel_mean, card.pixel_std, self.device))

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] float32, normalised and padded → as `encode`."""
        sizes = self.card.architecture
        none = torch.zeros(0, sizes.channels, sizes.grid, sizes.grid, device=self.device)
        return torch.cat([none, *(self.module(part.to(self.device, self.dtype)).float() for part in batches(pixels))])


def batches(pixels: Tensor) -> Iterator[Tensor]:
    """Parts of a batch, of BATCHES' sizes."""
    while len(pixels):
        size = next(size for size in BATCHES if size <= len(pixels))
        yield pixels[:size]
        pixels = pixels[size:]


class FlashViT(torch.nn.Module):
    """segment_anything's ImageEncoderViT, with its weights; on a GPU compiled for each batch size that it is given.

    LayerNorm and softmax are taken in float32 by torch's kernels.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.tables = [
            tuple(_table(own).contiguous() for own in (block.attn.rel_pos_h, block.attn.rel_pos_w))
            for block in module.blocks
        ]
        on_gpu = module.pos_embed.is_cuda
        self.run = torch.compile(self._forward, dynamic=False) if on_gpu else self._forward

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, C, g, g], in the module's dtype."""
        return self.run(pixels)

    def _forward(self, pixels: Tensor) -> Tensor:
        module = self.module
        tokens = module.patch_embed(pixels) + module.pos_embed  # [B, g, g, D]
        for block, tables in zip(module.blocks, self.tables, strict=True):
            tokens = tokens + _attention(block, block.norm1(tokens), tables)
            tokens = tokens + block.mlp(block.norm2(tokens))
        return module.neck(tokens.permute(0, 3, 1, 2))


def _attention(block: Any, tokens: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
    """One block's attention, [B, g, g, D] → [B, g, g, D]."""
    projection, window, grid = block.attn.qkv, block.window_size, tokens.shape[1]
    qkv = functional.linear(tokens, projection.weight)  # [B, g, g, 3·D]
    if not window:
        return block.attn.proj(_whole(*_heads(qkv + projection.bias, block.attn), tables).flatten(3))
    side = -(-grid // window)
    pad = side * window - grid
    padded = functional.pad(qkv, (0, 0, 0, pad, 0, pad)) + projection.bias  # a pad is the bias alone
    windows = padded.unflatten(2, (side, window)).unflatten(1, (side, window)).transpose(2, 3).flatten(0, 2)
    seen = _folded(*_heads(windows, block.attn), tables).flatten(3)  # [B·side², window, window, D]
    seen = seen.unflatten(0, (-1, side, side)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return block.attn.proj(seen[:, :grid, :grid])


def _heads(qkv: Tensor, attention: Any) -> tuple[Tensor, Tensor, Tensor]:
    """[N, h, w, 3·H·d] → queries, keys and values, [N, H, h, w, d] each."""
    query, key, value = qkv.unflatten(3, (3, attention.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
    return query, key, value


def _table(table: Tensor) -> Tensor:
    """[2·side − 1, d] relative positions → [side, side, d], of each query (row) and key."""
    side = (len(table) + 1) // 2
    places = torch.arange(side, device=table.device)
    return table[places[:, None] - places + side - 1]


def _positions(query: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """query [N, H, h, w, d] → its scores for each row [N, H, h·w, h] and column [N, H, h·w, w] of keys."""
    rows = torch.einsum("nhyxd,ykd->nhyxk", query, tables[0])
    columns = torch.einsum("nhyxd,xkd->nhyxk", query, tables[1])
    return rows.flatten(2, 3), columns.flatten(2, 3)


def _folded(query: Tensor, key: Tensor, value: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
    """Attention with the relative position inside the product, [N, H, h, w, d] → [N, h, w, H, d]."""
    number, heads, height, width, size = query.shape
    rows, columns = _positions(query, tables)
    spare = -(size + height + width) % KERNEL_WIDTH
    queries = torch.cat([query.flatten(2, 3) * size**-0.5, rows, columns, rows.new_zeros(*rows.shape[:3], spare)], -1)
    y = torch.eye(height, dtype=key.dtype, device=key.device).repeat_interleave(width, 0)
    x = torch.eye(width, dtype=key.dtype, device=key.device).repeat(height, 1)
    onehot = torch.cat([y, x, y.new_zeros(len(y), spare)], 1).expand(number, heads, -1, -1)
    keys = torch.cat([key.flatten(2, 3), onehot], -1)
    seen = functional.scaled_dot_product_attention(queries, keys, value.flatten(2, 3), scale=1.0)
    return seen.unflatten(2, (height, width)).permute(0, 2, 3, 1, 4)


def _whole(query: Tensor, key: Tensor, value: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
    """Attention with the relative position added in the kernel, [N, H, h, w, d] → [N, h, w, H, d]."""
    from torch.nn.attention.flex_attention import flex_attention

    height, width = query.shape[2:4]
    rows, columns = _positions(query, tables)

    def score(found: Tensor, image: Tensor, head: Tensor, asking: Tensor, seen: Tensor) -> Tensor:
        return found + rows[image, head, asking, seen // width] + columns[image, head, asking, seen % width]

    answer = flex_attention(query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3), score_mod=score)
    return answer.unflatten(2, (height, width)).permute(0, 2, 3, 1, 4)
