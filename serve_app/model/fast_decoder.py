"""The mask decoder with the work that all prompts share done once, and the rest reordered around the few tokens.

Exact up to rounding. What is different from segment_anything's module, for N prompts of T tokens (7 to 9) on an image
of P tokens (4096), H heads:
- The first layer's keys, values and queries of the image are the same for every prompt: projected once. Heads are told
  apart by zeroing the others' columns of the few tokens, so that each product is one large matrix.
- Later the product of tokens and image is taken through the tokens, `(q Wk) Kᵀ` in place of `q (K Wk)ᵀ`: H·T columns
  where the projection has 128 for each of P rows. A bias on keys adds the same to a whole softmax row: dropped.
- Upscaling runs token-major, as two matrix products, after scoring, and only for prompts that are wanted.
This is 0.79 GMAC a prompt where the module needs 1.81 (ViT-B).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cluster.errors import InvalidSettings
from serve_app.model.decoder import Decoded, ReferenceDecoder, chunks, pack
from serve_app.model.prompts import DecodeRequest

GPU_CHUNK = 64  # prompts at a time
CPU_CHUNK_BYTES = 32 << 20  # on a CPU the image tokens of a chunk: eight prompts of ViT-B


@dataclass(frozen=True)
class CrossAttention:
    """Weights of one attention between tokens and image, split by head: d is a head's width, C the channels.

    query, key, value: [H, d, C] and their biases [H, d]; out: [H, d, C], out_bias [C].
    """

    query: Tensor
    query_bias: Tensor
    key: Tensor
    key_bias: Tensor
    value: Tensor
    value_bias: Tensor
    out: Tensor
    out_bias: Tensor

    @classmethod
    def of(cls, module: Any) -> CrossAttention:
        heads = module.num_heads

        def split(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (heads, -1)).contiguous()

        return cls(
            query=split(module.q_proj.weight),
            query_bias=split(module.q_proj.bias),
            key=split(module.k_proj.weight),
            key_bias=split(module.k_proj.bias),
            value=split(module.v_proj.weight),
            value_bias=split(module.v_proj.bias),
            out=split(module.out_proj.weight.T),
            out_bias=module.out_proj.bias,
        )

    @property
    def scale(self) -> float:
        return float(self.query.shape[1] ** -0.5)

    def to_image(self, tokens: Tensor, image: Tensor, positioned: Tensor) -> Tensor:
        """tokens [N, T, C] (with their position) attend to image [N, P, C] → [N, T, C].

        `positioned` is the image with its position.
        """
        queries = torch.einsum("ntc,hdc->nhtd", tokens, self.query) + self.query_bias[:, None]
        through = (queries * self.scale) @ self.key  # [N, H, T, C]
        weights = torch.softmax(times(through.flatten(1, 2), positioned), dim=-1)  # [N, H·T, P]
        seen = (weights @ image).unflatten(1, through.shape[1:3])  # [N, H, T, C]
        values = seen @ self.value.transpose(1, 2) + self.value_bias[:, None]
        return torch.einsum("nhtd,hdc->ntc", values, self.out) + self.out_bias

    def to_tokens(self, positioned: Tensor, tokens: Tensor, position: Tensor) -> Tensor:
        """image [N, P, C] (with its position) attends to tokens [N, T, C] → what it sees, [N, P, C]."""
        keys = torch.einsum("ntc,hdc->nhtd", tokens + position, self.key) + self.key_bias[:, None]
        through = (keys * self.scale) @ self.query  # [N, H, T, C]
        bias = (keys * self.scale) @ self.query_bias[:, :, None]
        return self.spread(times(through.flatten(1, 2), positioned).unflatten(1, through.shape[1:3]) + bias, tokens)

    def spread(self, scores: Tensor, tokens: Tensor) -> Tensor:
        """scores [N, H, T, P] of tokens [N, T, C] → [N, P, C]: the tokens' values by the image's attention to them."""
        weights = torch.softmax(scores, dim=2).flatten(1, 2)
        values = torch.einsum("ntc,hdc->nhtd", tokens, self.value) + self.value_bias[:, None]
        # Each head's weights add up to 1, so its share of the output's bias can ride on its values.
        return weights.transpose(1, 2) @ (values @ self.out + self.out_bias / len(self.out)).flatten(1, 2)


class FastDecoder(ReferenceDecoder):
    """The reference's weights, computed as above. Two layers, as every published model has.

    In bfloat16 products and what lies between them are rounded; scores and mask weights are taken in float32.

    Raises:
        InvalidSettings: the model's decoder has not two layers.
    """

    joins = True  # prompts of several images may share a batch

    def __init__(self, folder: Path, device: str, dtype: str = "float32") -> None:
        super().__init__(folder, device)
        depth = self.card.architecture.decoder_depth
        if depth != 2:
            raise InvalidSettings(f"the fast decoders are for two layers, this model has {depth}: take 'reference'")
        self.runtime = f"fast {dtype} on {device}"
        decoder, self.dtype = self.mask_decoder, getattr(torch, dtype)
        decoder.transformer.to(self.dtype)
        decoder.output_upscaling.to(self.dtype)
        self.derive()
        self.position = self.dense_pe.flatten(2)[0].T.contiguous().to(self.dtype)  # [P, C]
        heads, width = self.second_look.query.shape[:2]
        self.heads = torch.eye(heads, dtype=self.dtype, device=device).repeat_interleave(width, dim=1)[:, None]
        tokens = self.position.numel() * self.position.element_size()
        self.chunk = GPU_CHUNK if device.startswith("cuda") else max(1, CPU_CHUNK_BYTES // tokens)

    def derive(self) -> None:
        """What `look` and `upscale` take in place of the modules' weights: to be called again when those change."""
        decoder = self.mask_decoder
        self.layers = list(decoder.transformer.layers)
        self.second_look = CrossAttention.of(self.layers[1].cross_attn_token_to_image)
        self.spreads = [CrossAttention.of(layer.cross_attn_image_to_token) for layer in self.layers]
        self.final = CrossAttention.of(decoder.transformer.final_attn_token_to_image)
        self.output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        first, self.norm, _, second, _ = decoder.output_upscaling
        self.upscale_first = _as_linear(first)
        self.upscale_second = _as_linear(second)

    @torch.inference_mode()
    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        kinds: dict[tuple[int | None, bool, bool], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):  # what goes together has as many tokens and outputs
            boxes, points = request.prompts.boxes, request.prompts.points
            kinds[None if points is None else points.shape[1], boxes is None, request.multimask].append(index)
        parts = [[self.nothing(request)] for request in requests]
        for (*_, multimask), indices in kinds.items():
            wanted = self.wanted(multimask)
            counts = [len(requests[index].prompts) for index in indices]
            sizes = [self._size(requests[index]) for index in indices]
            for batch in pack(counts, sizes, self.chunk if self.joins else 0):
                image, weights, scores = self._start([(requests[indices[which]], rows) for which, rows in batch])
                logits = self.upscale(image, weights[..., wanted], None)
                lengths = [rows.stop - rows.start for _, rows in batch]
                answers = zip(logits.split(lengths), scores[:, wanted].split(lengths), strict=True)
                for (which, _), answer in zip(batch, answers, strict=True):
                    parts[indices[which]].append(answer)
        return [(torch.cat([x for x, _ in each]), torch.cat([x for _, x in each])) for each in parts]

    @torch.inference_mode()
    def accepted(self, request: DecodeRequest, above: float) -> tuple[Tensor, Tensor, Tensor]:
        wanted = self.wanted(request.multimask)
        logits, scores = self.nothing(request)
        parts = [(logits.flatten(0, 1), scores.flatten(), torch.zeros(0, dtype=torch.int64, device=self.device))]
        for rows in chunks(len(request.prompts), self._size(request)):
            image, weights, scores = self._start([(request, rows)])
            scores = scores[:, wanted]
            good = scores > above
            prompts = torch.nonzero(good.any(1))[:, 0]
            if len(prompts):
                logits = self.upscale(image, weights[prompts][..., wanted], prompts)
                places = torch.nonzero(good.flatten())[:, 0] + rows.start * good.shape[1]
                parts.append((logits[good[prompts]], scores[good], places))
        logits, scores, places = (torch.cat(column) for column in zip(*parts, strict=True))
        return logits, scores, places

    def _size(self, request: DecodeRequest) -> int:
        """Prompts of one image at a time. With a mask each is an image of its own."""
        return 1 if request.prompts.masks is not None and not self.joins else self.chunk

    def _start(self, parts: list[tuple[DecodeRequest, slice]]) -> tuple[Any, Tensor, Tensor]:
        """Some prompts of some requests, with as many tokens each: through `look`."""
        images: list[Tensor] = []
        owner: list[int] = []
        for request, rows in parts:
            dense = self.dense(request, rows)
            own = [len(images) + (row if len(dense) > 1 else 0) for row in range(rows.stop - rows.start)]
            images.extend((self.image(request.embedding) + dense).flatten(2).transpose(1, 2))
            owner.extend(own)
        sparse = torch.cat([self.sparse(request, rows) for request, rows in parts])
        owners = torch.tensor(owner, device=self.device) if len(images) > 1 else None
        return self.look(torch.stack(images), sparse, owners)

    def look(self, images: Tensor, sparse: Tensor, owner: Tensor | None) -> tuple[Any, Tensor, Tensor]:
        """The transformer and what is read off its tokens, for N prompts.

        images [I, P, C] float32 with their dense prompt; sparse [N, K, C] float32; owner [N] int64, each prompt's
        image, or None where I is 1 → (image [N, P, C] as `upscale` takes it, mask weights [N, C/8, all outputs], scores
        [N, all outputs]), both float32.
        """

        def each(shared: Tensor) -> Tensor:
            return shared if owner is None else shared.index_select(0, owner)

        images, sparse = images.to(self.dtype), sparse.to(self.dtype)
        position = torch.cat([self.output_tokens.expand(sparse.shape[0], -1, -1).to(self.dtype), sparse], dim=1)
        positioned = images + self.position
        first, second = self.layers
        ahead, back = first.cross_attn_token_to_image, first.cross_attn_image_to_token

        tokens = first.norm1(first.self_attn(q=position, k=position, v=position))
        scores = times(self._by_head(ahead.q_proj(tokens + position)), each(ahead.k_proj(positioned)))
        seen = torch.softmax(self.spreads[0].scale * scores, dim=-1) @ each(ahead.v_proj(images))  # [N, H·T, H·d]
        tokens = first.norm2(tokens + ahead.out_proj((seen.unflatten(1, (-1, tokens.shape[1])) * self.heads).sum(1)))
        tokens = first.norm3(tokens + first.mlp(tokens))
        scores = times(self._by_head(back.k_proj(tokens + position)), each(back.q_proj(positioned)))
        scores = (self.spreads[0].scale * scores).unflatten(1, (-1, tokens.shape[1]))
        image = first.norm4(each(images) + self.spreads[0].spread(scores, tokens))  # [N, P, C]

        positioned, queries = image + self.position, tokens + position
        tokens = second.norm1(tokens + second.self_attn(q=queries, k=queries, v=tokens))
        tokens = second.norm2(tokens + self.second_look.to_image(tokens + position, image, positioned))
        tokens = second.norm3(tokens + second.mlp(tokens))
        image = second.norm4(image + self.spreads[1].to_tokens(positioned, tokens, position))
        seen = self.final.to_image(tokens + position, image, image + self.position)
        tokens = self.mask_decoder.transformer.norm_final_attn(tokens + seen).float()

        networks = list(self.mask_decoder.output_hypernetworks_mlps)
        masks = tokens[:, 1 : 1 + len(networks)].unbind(1)
        weights = torch.stack([network(token) for network, token in zip(networks, masks, strict=True)], dim=2)
        return image, weights, self.mask_decoder.iou_prediction_head(tokens[:, 0])

    def _by_head(self, rows: Tensor) -> Tensor:
        """[N, T, H·d] → [N, H·T, H·d]: for each head the rows with the other heads' columns zero."""
        return (rows[:, None] * self.heads).flatten(1, 2)

    def upscale(self, image: Any, weights: Tensor, prompts: Tensor | None) -> Tensor:
        """`look`'s image of N prompts, those of them that are wanted ([K] int64; None: all), and their mask weights
        [K, C/8, M] → logits [K, M, 4g, 4g] float32."""
        image = image if prompts is None else image[prompts]
        grid = math.isqrt(image.shape[1])
        pixels = functional.linear(image, *self.upscale_first).unflatten(2, (4, -1)).flatten(1, 2)  # [K, P·2·2, C/4]
        pixels = functional.layer_norm(pixels, pixels.shape[-1:], self.norm.weight, self.norm.bias, self.norm.eps)
        pixels = functional.linear(functional.gelu(pixels), *self.upscale_second)  # [K, P·4, 2·2·C/8]
        pixels = functional.gelu(pixels).unflatten(2, (4, -1)).flatten(1, 2)  # [K, P·4·4, C/8]
        flat = (pixels @ weights.to(self.dtype)).unflatten(1, (grid, grid, 2, 2, 2, 2))  # y, x, then each halving's
        return flat.permute(0, 7, 1, 3, 5, 2, 4, 6).flatten(2, 4).flatten(3, 5).float()


def times(rows: Tensor, image: Tensor) -> Tensor:
    """rows [N, R, D] and image [N or 1, P, D] → their products [N, R, P]."""
    if len(image) > 1:
        return rows @ image.transpose(1, 2)
    return (rows.flatten(0, 1) @ image[0].T).unflatten(0, (-1, rows.shape[1]))


def _as_linear(convolution: Any) -> tuple[Tensor, Tensor]:
    """A transposed convolution with kernel and stride 2 as (weight [4·out, in], bias [4·out]), rows (y, x, channel)."""
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous()
    return weight, convolution.bias.repeat(4)
