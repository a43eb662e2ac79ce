"""A model as it is trained: segment_anything's modules, which compute in one dtype, and their weights in float32.

The encoder may see a square window of its padded input instead of the whole: positions are those of the window, so that
what it learns holds for the whole, at a fraction of the time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cluster.errors import InvalidCheckpoint
from serve_app.model import architectures, checkpoint, modules
from serve_app.model.encoder import ReferenceEncoder, normalise
from serve_app.model.fast_decoder import FastDecoder

Place = tuple[int, int]  # where in the padded input a window lies: (row, column) in tokens


class Network:
    """A split model's decoder, or both its halves. A model of random weights starts from fresh ones: those of `seeded:`
    are made for tests.

    state: the halves' tensors by their full names, float32. working: the parameters that the modules compute with.
    """

    def __init__(self, folder: Path, full: bool, seed: int, device: str, dtype: str) -> None:
        """Raises InvalidCheckpoint: the model has no decoder, or one whose depth is not 2."""
        self.card, self.device, self.dtype = checkpoint.ModelCard.read(folder), device, getattr(torch, dtype)
        sizes = self.card.architecture
        if self.card.decoder_sha256 and sizes.decoder_depth != 2:
            raise InvalidCheckpoint(f"the decoder has {sizes.decoder_depth} layers; training takes one of 2")
        self.decoder = made = FastDecoder(folder, device, dtype)
        halves: dict[str, Any] = {"prompt_encoder.": made.prompt_encoder, "mask_decoder.": made.mask_decoder}
        state = checkpoint.load_half(folder, checkpoint.DECODER, self.card)
        self.encoder: Any = None
        if full:
            self.encoder = halves["image_encoder."] = ReferenceEncoder(folder, device).module.to(self.dtype)
            state |= checkpoint.load_half(folder, checkpoint.ENCODER, self.card)
            state = state if self.card.trained else _fresh(sizes, seed)
        self.state = {name: tensor.float().to(device) for name, tensor in state.items()}
        self.working = {p + n: x.requires_grad_(True) for p, half in halves.items() for n, x in half.named_parameters()}
        self.buffers = {p + name: buffer for p, half in halves.items() for name, buffer in half.named_buffers()}
        self.share()

    @torch.no_grad()
    def share(self) -> None:
        """The float32 weights as the modules compute with them: to be called when those change."""
        for name, tensor in {**self.working, **self.buffers}.items():
            tensor.copy_(self.state[name])
        self.decoder.dense_pe = self.decoder.prompt_encoder.get_dense_pe()

    def embeddings(self, images: list[np.ndarray], window: int, place: Place) -> Tensor:
        """Images as in `Sample` → [B, C, g, g] in the network's dtype: as stored, or by the encoder, with gradient."""
        if images[0].dtype != np.uint8:
            return torch.tensor(np.stack(images), device=self.device).to(self.dtype)
        pixels = normalise(images, window, self.card.pixel_mean, self.card.pixel_std, self.device)
        return self.encode(pixels.to(self.dtype), place)

    def encode(self, pixels: Tensor, place: Place) -> Tensor:
        """[B, 3, S, S] of a window → [B, C, g, g], by the modules of ImageEncoderViT."""
        module, side = self.encoder, pixels.shape[-1] // self.card.architecture.patch
        row, column = place
        tokens = module.patch_embed(pixels) + module.pos_embed[:, row : row + side, column : column + side]
        for block in module.blocks:
            tokens = tokens + _attention(block, block.norm1(tokens))
            tokens = tokens + block.mlp(block.norm2(tokens))
        first, norm, second, last = module.neck
        channels = _normed(functional.linear(tokens, first.weight.flatten(1)), norm).permute(0, 3, 1, 2)
        return _normed(second(channels).permute(0, 2, 3, 1), last).permute(0, 3, 1, 2)

    def decode(
        self, embeddings: Tensor, place: Place, sparse: Tensor, dense: Tensor, owner: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Images' embeddings [I, C, g, g], and prompts as of `training_samples.embedded` → ([N, M, 4g, 4g] logits,
        [N, M] predicted IoU), float32."""
        decoder, side = self.decoder, embeddings.shape[-1]
        row, column = place
        decoder.derive()  # each time: a graph's backward pass frees what the weights were made into
        position = decoder.dense_pe[0, :, row : row + side, column : column + side]
        decoder.position = position.flatten(1).T.to(self.dtype)
        images, dense = (each.flatten(2).transpose(1, 2).contiguous() for each in (embeddings, dense.to(self.dtype)))
        if len(dense) > 1:  # a mask prompt each: each looks at an image of its own
            images, owner = images.index_select(0, owner), torch.arange(len(owner), device=self.device)
        images = images + dense
        image, weights, scores = decoder.look(images, sparse, None if len(images) == 1 else owner)
        return decoder.upscale(image, weights, None), scores


def _fresh(sizes: architectures.Architecture, seed: int) -> dict[str, Tensor]:
    """segment_anything's own initial weights, from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = (modules.build_encoder(sizes), *modules.build_decoder(sizes))
    prefixes = ("image_encoder.", *architectures.DECODERS)
    return {k: v for p, module in zip(prefixes, made, strict=True) for k, v in module.state_dict(prefix=p).items()}


def _attention(block: Any, tokens: Tensor) -> Tensor:
    """A block's attention with its gradient, [B, g, g, D] → [B, g, g, D]; written out, which is fastest on CPUs."""
    attention, window, grid = block.attn, block.window_size, tokens.shape[1:3]
    if window:
        tokens, pads = modules.modeling.image_encoder.window_partition(tokens, window)
    number, side = tokens.shape[:2]
    qkv = attention.qkv(tokens).view(number, side * side, 3, attention.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [N, H, side², d]
    bias = _bias(attention, query.unflatten(2, (side, side)))
    scores = torch.matmul(query * attention.scale, key.transpose(2, 3)) + bias
    seen = torch.matmul(torch.softmax(scores, dim=-1), value).transpose(1, 2).reshape(number, side, side, -1)
    seen = attention.proj(seen)
    return modules.modeling.image_encoder.window_unpartition(seen, window, pads, grid) if window else seen


def _bias(attention: Any, query: Tensor) -> Tensor:
    """What a query [N, H, side, side, d] adds for relative positions: [N, H, side², side²]."""
    side = query.shape[2]
    places = torch.arange(side, device=query.device)
    apart = places[:, None] - places
    tables = [table[apart + len(table) // 2] for table in (attention.rel_pos_h, attention.rel_pos_w)]
    rows = torch.einsum("nhyxd,ykd->nhyxk", query, tables[0])
    columns = torch.einsum("nhyxd,xkd->nhyxk", query, tables[1])
    return (rows[..., :, None] + columns[..., None, :]).flatten(4, 5).flatten(2, 3)


def _normed(tokens: Tensor, norm: Any) -> Tensor:
    """segment_anything's LayerNorm2d, with the channels last."""
    return functional.layer_norm(tokens, tokens.shape[-1:], norm.weight, norm.bias, norm.eps)
