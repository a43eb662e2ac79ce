"""CellSAM's detector: where the cells of an image are, as boxes. An Anchor DETR (arXiv:2109.07107) on a ViT of its own,
for inference: only the last layer's heads, and what does not depend on the image is computed once.

Its modules have the names that a CellSAM checkpoint gives their weights under `cellfinder.decode_head.`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from cluster.errors import InvalidSettings
from serve_app.model import checkpoint, modules
from serve_app.model.architectures import DetectorSizes
from serve_app.model.encoder import check_device, check_dtype
from serve_app.model.flash_encoder import FlashViT, batches

QUERIES_AT_ONCE = 512  # of row-column attention on a CPU: what they look at together fits its cache
TEMPERATURE = 10_000  # of sine embeddings
LEAST = 1e-5  # of an anchor's distance from the image's edge, as a share of the image


class Detector(Protocol):
    """What every runtime offers. Stateless."""

    card: checkpoint.ModelCard
    runtime: str  # what runs, for people: "openvino float32 on cpu"

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] float32, as `cellsam.detector_input` gives them → for each of Q anchors [B, Q, classes] logits,
        and boxes [B, Q, 4] (centre x, centre y, width, height) as shares of the input; float32."""
        ...


class CellFinder(nn.Module):
    """The detector's modules; weights are fresh. `prepare` follows once they are loaded."""

    def __init__(self, sizes: DetectorSizes) -> None:
        super().__init__()
        self.sizes, self.grid = sizes, sizes.backbone.grid
        body: Any = modules.build_encoder(sizes.backbone)
        body.neck = nn.Identity()
        projection = nn.Conv2d(sizes.backbone.width, sizes.width, 1)
        self.backbone = nn.ModuleDict({"body": body})
        self.input_proj: Any = nn.ModuleList([nn.Sequential(projection, nn.GroupNorm(32, sizes.width))])
        self.transformer = _Transformer(sizes)
        self.fixed: dict[str, Tensor] = {}

    @torch.inference_mode()
    def prepare(self) -> CellFinder:
        """Compute what is the same for all images: positions, anchors, and what anchors see of each other first."""
        own, device = self.transformer, self.input_proj[0][0].weight.device
        anchors = own.position.weight.repeat(self.sizes.patterns, 1).float()  # [Q, 2] (x, y) as shares of the image
        line = sine(((torch.arange(self.grid, device=device) + 0.5) / self.grid), self.sizes.width)
        dtype = own.position.weight.dtype
        halves = [sine(anchors[:, axis], self.sizes.width // 2) for axis in (1, 0)]
        self.fixed = {
            "line": own.adapt_pos1d(line.to(dtype)),  # [g, D]
            "x": own.adapt_pos1d(sine(anchors[:, 0], self.sizes.width).to(dtype)),  # [Q, D]
            "y": own.adapt_pos1d(sine(anchors[:, 1], self.sizes.width).to(dtype)),
            "both": own.adapt_pos2d(torch.cat(halves, 1).to(dtype)),
        }
        inside = anchors.clamp(0, 1)
        self.fixed["anchors"] = torch.log(inside.clamp(min=LEAST) / (1 - inside).clamp(min=LEAST))
        pattern = own.pattern.weight.repeat_interleave(self.sizes.anchors, 0)[None]  # [1, Q, D]
        self.fixed["first"] = own.decoder_layers[0].among(pattern, self.fixed["both"])
        self.fixed = {name: tensor.clone() for name, tensor in self.fixed.items()}
        return self

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `Detector.forward`, in the modules' dtype."""
        own, fixed = self.transformer, self.fixed
        tokens = self.input_proj[0](self.backbone["body"](pixels)).permute(0, 2, 3, 1)  # [B, g, g, D]
        for layer in own.encoder_layers:
            tokens = layer(tokens, fixed["line"])
        queries = fixed["first"].expand(len(tokens), -1, -1)
        for index, layer in enumerate(own.decoder_layers):
            if index:
                queries = layer.among(queries, fixed["both"])
            queries = layer(queries, tokens, fixed["x"], fixed["y"], fixed["line"])
        boxes = own.bbox_embed(queries).float()
        boxes = torch.cat([boxes[..., :2] + fixed["anchors"], boxes[..., 2:]], dim=-1)
        return own.class_embed(queries).float(), boxes.sigmoid()


class _Transformer(nn.Module):
    def __init__(self, sizes: DetectorSizes) -> None:
        super().__init__()
        width = sizes.width

        def adapter() -> nn.Module:
            return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

        self.encoder_layers: Any = nn.ModuleList(_EncoderLayer(sizes) for _ in range(sizes.encoder_layers))
        self.decoder_layers: Any = nn.ModuleList(_DecoderLayer(sizes) for _ in range(sizes.decoder_layers))
        self.pattern, self.position = _table(sizes.patterns, width), _table(sizes.anchors, 2)
        self.adapt_pos1d, self.adapt_pos2d = adapter(), adapter()
        self.class_embed, self.bbox_embed = nn.Linear(width, sizes.classes), _Boxes(width)


def _table(rows: int, width: int) -> nn.Embedding:
    """Not drawn: on the "meta" device that would import torch's compiler, seconds of a process's start."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width))


class _Boxes(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, out) for out in (width, width, 4))

    def forward(self, queries: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(torch.relu(second(torch.relu(first(queries)))))


class _FeedForward(nn.Module):
    def __init__(self, sizes: DetectorSizes) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(sizes.width, sizes.mlp_width), nn.Linear(sizes.mlp_width, sizes.width)
        self.norm2 = nn.LayerNorm(sizes.width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm2(tokens + self.linear2(torch.relu(self.linear1(tokens))))


class _EncoderLayer(nn.Module):
    def __init__(self, sizes: DetectorSizes) -> None:
        super().__init__()
        self.self_attn, self.norm1 = RowColumnAttention(sizes.width, sizes.heads), nn.LayerNorm(sizes.width)
        self.ffn = _FeedForward(sizes)

    def forward(self, tokens: Tensor, line: Tensor) -> Tensor:
        """tokens [B, g, g, D], line [g, D] → as tokens."""
        row, column = (tokens + line).flatten(1, 2), (tokens + line[:, None]).flatten(1, 2)
        seen = self.self_attn(row, column, tokens, line).view_as(tokens)
        return self.ffn(self.norm1(tokens + seen))


class _DecoderLayer(nn.Module):
    def __init__(self, sizes: DetectorSizes) -> None:
        super().__init__()
        self.cross_attn, self.norm1 = RowColumnAttention(sizes.width, sizes.heads), nn.LayerNorm(sizes.width)
        self.self_attn = nn.MultiheadAttention(sizes.width, sizes.heads)
        self.norm2, self.ffn = nn.LayerNorm(sizes.width), _FeedForward(sizes)

    def among(self, queries: Tensor, place: Tensor) -> Tensor:
        """The queries [B, Q, D] after they looked at each other; place [Q, D]."""
        own, width = self.self_attn, queries.shape[-1]
        weight, bias = own.in_proj_weight, own.in_proj_bias
        asking, seen = functional.linear(queries + place, weight[: 2 * width], bias[: 2 * width]).chunk(2, -1)
        value = functional.linear(queries, weight[2 * width :], bias[2 * width :])
        query, key, value = (_heads(part, own.num_heads) for part in (asking, seen, value))
        answer = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.norm2(queries + own.out_proj(answer))

    def forward(self, queries: Tensor, tokens: Tensor, x: Tensor, y: Tensor, line: Tensor) -> Tensor:
        """queries [B, Q, D] look at tokens [B, g, g, D]; x, y [Q, D], line [g, D] → as queries."""
        seen = self.cross_attn(queries + x, queries + y, tokens, line)
        return self.ffn(self.norm1(queries + seen))


class RowColumnAttention(nn.Module):
    """Row-column decoupled attention (arXiv:2109.07107, section 3.3): a query's weight for a token is the product of
    one for its row and one for its column."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(5 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(5 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, row: Tensor, column: Tensor, tokens: Tensor, line: Tensor) -> Tensor:
        """row, column: [B, Q, D] the queries, for the place in a row (x) and in a column (y). tokens [B, h, w, D];
        line [h or w, D], their places. → [B, Q, D]"""
        weights, biases = self.in_proj_weight.chunk(5), self.in_proj_bias.chunk(5)
        inputs = (row, column, tokens.mean(1) + line, tokens.mean(2) + line, tokens.flatten(1, 2))
        q_row, q_column, k_row, k_column, value = (
            _heads(functional.linear(*parts), self.heads) for parts in zip(inputs, weights, biases, strict=True)
        )
        scale, (height, width) = q_row.shape[-1] ** -0.5, tokens.shape[1:3]
        value = value.unflatten(2, (height, width)).flatten(3)  # [B, H, h, w·d]
        step = q_row.shape[2] if tokens.is_cuda or torch.jit.is_tracing() else QUERIES_AT_ONCE
        seen = []
        for asking_row, asking_column in zip(q_row.split(step, 2), q_column.split(step, 2), strict=True):
            in_row = torch.softmax(scale * asking_row @ k_row.transpose(2, 3), -1)  # [B, H, q, w]
            in_column = torch.softmax(scale * asking_column @ k_column.transpose(2, 3), -1)
            rows = (in_column @ value).unflatten(3, (width, -1))  # [B, H, q, w, d]
            seen.append((in_row[..., None, :] @ rows)[..., 0, :])
        return self.out_proj(torch.cat(seen, 2).transpose(1, 2).flatten(2))


def _heads(tokens: Tensor, heads: int) -> Tensor:
    """[B, N, H·d] → [B, H, N, d]."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def sine(places: Tensor, width: int) -> Tensor:
    """[N] shares of the image → [N, width] float32: sines and cosines in turn, of ever longer waves."""
    waves = TEMPERATURE ** (torch.arange(0, width, 2, device=places.device) / width)
    angles = 2 * math.pi * places.float()[:, None] / waves
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def module(folder: Path, card: checkpoint.ModelCard) -> CellFinder:
    """The detector of a split model, float32, on the CPU. Raises InvalidCheckpoint: the model has none."""
    state = checkpoint.load_half(folder, checkpoint.DETECTOR, card)
    assert card.detector is not None
    with torch.device("meta"):
        made = CellFinder(card.detector)
    made.load_state_dict({name.removeprefix("detector."): one for name, one in state.items()}, assign=True)
    return made.float().eval().requires_grad_(False)


class TorchDetector:
    """The modules in torch: in float32 anywhere, in bfloat16 on a GPU, where attention is that of `flash_encoder`."""

    def __init__(self, folder: Path, device: str, dtype: str = "float32") -> None:
        self.card = checkpoint.ModelCard.read(folder)
        self.device, self.dtype = device, getattr(torch, dtype)
        self.runtime = f"torch {dtype} on {device}"
        made = module(folder, self.card).to(device, self.dtype)
        if device != "cpu":
            made.backbone["body"] = FlashViT(made.backbone["body"])
        self.module = made.prepare()

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = [self.module(part.to(self.device, self.dtype)) for part in batches(pixels)]
        logits, boxes = zip(*found, strict=True)
        return torch.cat(logits), torch.cat(boxes)


def _openvino(folder: Path, device: str, dtype: str) -> Detector:
    from serve_app.model.openvino import OpenVINODetector

    return OpenVINODetector(folder, device, dtype)


RUNTIMES: dict[str, Callable[[Path, str, str], Detector]] = {"torch": TorchDetector, "openvino": _openvino}


def load(folder: Path, runtime: str = "auto", device: str = "cpu", dtype: str = "float32") -> Detector:
    """The detector of a split CellSAM model; nothing else of it is read. `dtype` is what products are computed in.

    runtime: `torch`, `openvino` (a CPU), or `auto`, the faster of them that is at hand.

    Raises:
        InvalidSettings: no such runtime or dtype, a device that is not there, or a runtime that cannot use them.
        InvalidCheckpoint: the model has no detector.
    """
    device = check_device(device)
    check_dtype(dtype, device)
    if runtime == "auto":
        runtime = "openvino" if device == "cpu" and find_spec("openvino") else "torch"
    if runtime not in RUNTIMES:
        raise InvalidSettings(f"no detector runtime {runtime!r}; there are auto, {', '.join(RUNTIMES)}")
    if runtime == "torch" and device == "cpu" and dtype != "float32":
        raise InvalidSettings(f"detector runtime 'torch' computes in float32 on a CPU, not {dtype}: take 'openvino'")
    return RUNTIMES[runtime](folder, device, dtype)


def boxes(logits: Tensor, places: Tensor, image_size: int) -> tuple[Tensor, Tensor]:
    """What `Detector.forward` gave → ([B, Q] scores 0–1, the best first, [B, Q, 4] (x0, y0, x1, y1) in pixels of the
    square input). An anchor whose classes both score is there twice, as in CellSAM."""
    count, classes = logits.shape[1:]
    scores, chosen = logits.sigmoid().flatten(1).topk(count, dim=1)
    centre, size = places.gather(1, (chosen // classes)[..., None].expand(-1, -1, 4)).split(2, -1)
    return scores, torch.cat([centre - size / 2, centre + size / 2], -1) * image_size
