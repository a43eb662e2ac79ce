"""Training: prompts drawn as Segment Anything's training draws them, losses, and the step of the optimiser.

The modules are segment_anything's; they compute in `dtype`, while their weights are kept and changed in float32. The
encoder may see a square window of its padded input instead of the whole: positions are those of the window, so that
what it learns holds for the whole, at a fraction of the time. Masks are compared at the decoder's own resolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cluster.errors import InvalidCheckpoint, InvalidInput
from serve_app.model import checkpoint, masks, preprocess
from serve_app.model.encoder import ReferenceEncoder, normalise
from serve_app.model.fast_decoder import FastDecoder

SUBSAMPLES = 2  # a side, of the pixels that a logit covers: what its target is counted from
NOWHERE = 4  # clicks beside all objects, in an image where all are labelled: what is found there has an IoU of 0
BOX_JITTER = 0.06  # of a side: standard deviation
BOX_JITTER_MOST = 0.15
FOCAL_ALPHA, FOCAL_GAMMA, FOCAL_SHARE = 0.25, 2.0, 20.0  # Segment Anything, appendix A: focal to dice 20 : 1
AROUND = 0.25  # of an object's sides: how far its surroundings reach in the weighted loss
BALANCED = 0.5  # of the training, in which object and background weigh more alike than they are large, less and less
DICE_SHARE = 2.0
LOSSES = ("focal", "bce")
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.999), 0.02, 1.0
WARM_UP = 0.03  # of the whole training
LAST_RATE = 0.02  # of the learning rate, where the cosine ends


@dataclass(frozen=True)
class Sample:
    """An image to train on and some of its objects, in a square window of the model's padded input.

    image: [C, g, g] float16 embedding of the whole; or [h, w, 3] uint8 pixels that fill the window, or its upper left.
    window: pixels a side; the model's input size for a whole one.
    boxes: [N, 4] float32 (x0, y0, x1, y1) in pixels of the window.
    masks: [N, 4g, 4g] uint8, 0 to SUBSAMPLES²: how much of what a logit covers is object; g is the window's.
    background: [4g, 4g] uint8, likewise; None where there may be objects that nobody labelled.
    """

    image_id: str
    image: np.ndarray
    window: int
    boxes: np.ndarray
    masks: np.ndarray
    background: np.ndarray | None = None


@dataclass(frozen=True)
class Outcome:
    """Means over a step's objects: the loss, its share for predicted IoU, and the IoU of the first round's masks."""

    loss: float
    iou_loss: float
    iou: float


def sample(
    image_id: str,
    image: np.ndarray,
    window: int,
    patch: int,
    found: np.ndarray,
    least: float = 0.25,
    background: np.ndarray | None = None,
) -> Sample | None:
    """A sample of `found`, masks [N, h, w] bool of the image at any resolution, and its `background` [h, w] bool, if
    known. None where none is left: objects that cover less than `least` logits are left out."""
    size, side = (found.shape[1], found.shape[2]), 4 * window // patch
    covered = coverage(found, window, side)
    shown = covered.sum((1, 2)) >= least * SUBSAMPLES**2
    if not shown.any():
        return None
    _, boxes = masks.areas_and_boxes(masks.encode(found[shown]), size)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    inside = preprocess.to_input_coordinates(corners.reshape(-1, 2, 2), size, window)
    clear = None if background is None else coverage(background[None], window, side)[0]
    return Sample(image_id, image, window, inside.reshape(-1, 4), covered[shown], clear)


def coverage(found: np.ndarray, window: int, side: int) -> np.ndarray:
    """Masks [N, h, w] bool, their long side filling `window` pixels → [N, side, side] uint8, as in `Sample.masks`."""
    size = found.shape[1], found.shape[2]
    steps = side * SUBSAMPLES
    centres = (np.arange(steps) + 0.5) * (window / steps)
    rows, columns = (
        np.floor(centres[centres < extent] * (length / extent)).astype(int).clip(0, length - 1)
        for length, extent in zip(size, preprocess.input_size(size, window), strict=True)
    )
    fine = np.zeros((len(found), steps, steps), np.uint8)
    fine[:, : len(rows), : len(columns)] = found[:, rows[:, None], columns]
    return fine.reshape(len(found), side, SUBSAMPLES, side, SUBSAMPLES).sum((2, 4), dtype=np.uint8)


@dataclass(frozen=True)
class Plan:
    """How to train. `loss`: `focal`, 20 focal + dice as Segment Anything; `bce`, binary cross-entropy over an object's
    surroundings and, as much again, the rest of the image, + 2 dice. From scratch that finds masks after some 900
    images, because at first it weighs object and background alike; else all background is hard to leave."""

    lr: float
    loss: str
    rounds: int
    seed: int
    encoder: bool = False

    def check(self) -> None:
        """Raises InvalidInput: names the first that is out of its range."""
        if self.loss not in LOSSES:
            raise InvalidInput(f"no loss {self.loss!r}; there are {', '.join(LOSSES)}")
        if not 0 < self.lr < 1:
            raise InvalidInput(f"a learning rate of {self.lr:g}; expected above 0 and below 1")
        if self.rounds < 1:
            raise InvalidInput(f"{self.rounds} rounds of prompts; expected at least 1")

    def rate(self, progress: float) -> float:
        """The learning rate after a share of the whole training: warm-up, then a cosine."""
        warm = min(1.0, (progress + 1e-3) / WARM_UP)
        return self.lr * warm * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * min(1.0, progress))) / 2)


class Trainer:
    """A split model's decoder, or both its halves, and the optimiser. A model of random weights starts from fresh ones:
    those of `seeded:` are made for tests."""

    def __init__(self, folder: Path, plan: Plan, device: str = "cpu", dtype: str = "float32") -> None:
        """Raises InvalidCheckpoint: the model has no decoder, or one whose depth is not 2."""
        plan.check()
        self.plan, self.device, self.dtype, self.step_count = plan, device, getattr(torch, dtype), 0
        self.card = checkpoint.ModelCard.read(folder)
        sizes = self.card.architecture
        if self.card.decoder_sha256 and sizes.decoder_depth != 2:
            raise InvalidCheckpoint(f"the decoder has {sizes.decoder_depth} layers; training takes one of 2")
        self.decoder = FastDecoder(folder, device, dtype)
        halves: dict[str, Any] = {
            "prompt_encoder.": self.decoder.prompt_encoder,
            "mask_decoder.": self.decoder.mask_decoder,
        }
        state = checkpoint.load_half(folder, checkpoint.DECODER, self.card)
        self.encoder: Any = None
        if plan.encoder:
            self.encoder = ReferenceEncoder(folder, device).module.to(self.dtype)
            halves["image_encoder."] = self.encoder
            state |= checkpoint.load_half(folder, checkpoint.ENCODER, self.card)
        if not self.card.trained and plan.encoder:
            state = _fresh(sizes, plan.seed)
        self.state = {name: tensor.float().to(device) for name, tensor in state.items()}
        self.working: dict[str, Tensor] = {
            prefix + name: parameter.requires_grad_(True)
            for prefix, module in halves.items()
            for name, parameter in module.named_parameters()
        }
        self.buffers = {p + name: buffer for p, module in halves.items() for name, buffer in module.named_buffers()}
        decayed = [self.state[name] for name in self.working if self.state[name].dim() > 1 and "embed" not in name]
        others = [self.state[name] for name in self.working if self.state[name].dim() < 2 or "embed" in name]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, plan.lr, BETAS, weight_decay=WEIGHT_DECAY, fused=True)
        self.generator = torch.Generator(device)
        self.balance = 0.0
        self._share()

    def step(self, samples: Sequence[Sample], progress: float) -> Outcome:
        """Change the weights by one batch, of one window; `progress` is the share of the training that is done.

        The outcome's loss is NaN where it, or its gradient, is no finite number: then no weight was changed.
        """
        self.generator.manual_seed(self.plan.seed * 1_000_003 + self.step_count)
        self.balance = max(0.0, 1 - progress / BALANCED) if self.plan.encoder else 0.0
        for parameter in self.working.values():
            parameter.grad = None
        window, place = samples[0].window, self._place(samples[0].window)
        self.decoder.derive()
        embeddings = self._embeddings(samples, window, place)
        leaf = embeddings.detach().requires_grad_(self.plan.encoder)
        objects = sum(len(one.boxes) for one in samples)
        rounds = 1 + int(self._uniform(1).item() * self.plan.rounds) if self._uniform(1).item() < 0.5 else 1
        sums = torch.zeros(3, dtype=torch.float64)
        for index, one in enumerate(samples):
            sums += self._rounds(leaf[index : index + 1], one, place, rounds, objects)
            self.decoder.derive()  # a graph's backward pass frees what the weights were made into
        if self.plan.encoder:
            embeddings.backward(leaf.grad)
        loss, iou_loss, iou = (sums / torch.tensor([objects * rounds, objects * rounds, objects])).tolist()
        changed = math.isfinite(loss) and self._update(self.plan.rate(progress))
        return Outcome(loss if changed else math.nan, iou_loss, iou)

    @torch.no_grad()
    def evaluate(self, samples: Iterable[Sample]) -> dict[str, float]:
        """Means over objects, at the decoder's resolution; {} of no samples.

        iou_box, iou_click: IoU from exact boxes, and from one click inside each.
        correlation: between the predicted IoU and that of boxes.
        """
        self.generator.manual_seed(0)
        self.decoder.derive()
        found: dict[str, list[Tensor]] = {"box": [], "click": [], "predicted": []}
        for one in samples:
            embedding = self._embeddings([one], one.window, (0, 0))
            target = self._target(one)
            for kind in ("box", "click"):
                prompts = _Prompts(self, one, (0, 0), kind == "box", jitter=False)
                logits, predicted = self._decode(embedding, prompts, (0, 0))
                found[kind].append(_iou(logits[:, 0], target))
                if kind == "box":
                    found["predicted"].append(predicted[:, 0])
        if not found["box"]:
            return {}
        box, click, predicted = (torch.cat(found[name]).cpu() for name in ("box", "click", "predicted"))
        both = torch.corrcoef(torch.stack([box, predicted]))[0, 1]
        return {"iou_box": box.mean().item(), "iou_click": click.mean().item(), "correlation": both.nan_to_num().item()}

    def weights(self) -> dict[str, Tensor]:
        """The trained halves' tensors, float32, under their full names."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.state.items()}

    def snapshot(self) -> dict[str, Any]:
        """All that `restore` needs to go on as if nothing had happened."""
        return {"state": self.weights(), "optimizer": self.optimizer.state_dict(), "step": self.step_count}

    def restore(self, snapshot: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, tensor in self.state.items():
                tensor.copy_(snapshot["state"][name])
        self.optimizer.load_state_dict(snapshot["optimizer"])
        self.step_count = snapshot["step"]
        self._share()

    @torch.no_grad()
    def _share(self) -> None:
        """The float32 weights as the modules compute with them."""
        for name, tensor in {**self.working, **self.buffers}.items():
            tensor.copy_(self.state[name])
        self.decoder.dense_pe = self.decoder.prompt_encoder.get_dense_pe()

    @torch.no_grad()
    def _update(self, rate: float) -> bool:
        for name, parameter in self.working.items():
            self.state[name].grad = None if parameter.grad is None else parameter.grad.float()
        if not torch.nn.utils.clip_grad_norm_([self.state[name] for name in self.working], CLIP).isfinite():
            return False
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step_count += 1
        self._share()
        return True

    def _place(self, window: int) -> tuple[int, int]:
        """Where in the padded input a window lies: (row, column) in tokens."""
        free = (self.card.architecture.image_size - window) // self.card.architecture.patch + 1
        row, column = (self._uniform(2) * free).int().tolist()
        return row, column

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def _target(self, one: Sample) -> Tensor:
        """[N, s, s] float32 in 0–1."""
        return torch.tensor(one.masks, device=self.device) / SUBSAMPLES**2

    def _embeddings(self, samples: Sequence[Sample], window: int, place: tuple[int, int]) -> Tensor:
        """[B, C, g, g] in the trainer's dtype: as stored, or through the encoder with its gradient."""
        if samples[0].image.dtype != np.uint8:
            stored = np.stack([one.image for one in samples])
            return torch.tensor(stored, device=self.device).to(self.dtype)
        card = self.card
        pixels = normalise([one.image for one in samples], window, card.pixel_mean, card.pixel_std, self.device)
        return self._encode(pixels.to(self.dtype), place)

    def _encode(self, pixels: Tensor, place: tuple[int, int]) -> Tensor:
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

    def _rounds(
        self, embedding: Tensor, one: Sample, place: tuple[int, int], rounds: int, objects: int
    ) -> torch.Tensor:
        """Prompt one image's objects, then correct where the masks are wrong → [3] sums: loss, IoU loss, first IoU."""
        target = self._target(one)
        count = len(target)
        prompts = _Prompts(self, one, place, boxes=bool(self._uniform(1).item() < 0.5))
        target = functional.pad(target, (0, 0, 0, 0, 0, prompts.nowhere))
        sums = torch.zeros(3, dtype=torch.float64)
        for turn in range(rounds):
            if turn:
                self.decoder.derive()
            logits, predicted = self._decode(embedding, prompts, place)
            if turn:
                logits, predicted = logits[:, :1], predicted[:, :1]  # the first output is for clear prompts
            mask_loss = self._mask_loss(logits, target)
            with torch.no_grad():
                actual = _iou(logits.flatten(0, 1), target.repeat_interleave(logits.shape[1], 0)).view_as(predicted)
            iou_loss = (predicted - actual).square()
            best = mask_loss[:, 0]
            if not turn:  # whole, part or subpart may be meant: only the best of them learns
                best = best + mask_loss[:, 1:].amin(1)
            loss = best[:count].sum() + iou_loss.mean(1).sum()
            (loss / objects).backward()
            first = 0.0 if turn else actual[:, 0].sum().item()
            sums += torch.tensor([loss.item(), iou_loss.mean(1).sum().item(), first], dtype=torch.float64)
            if turn + 1 < rounds:
                target, rows = target[:count], torch.arange(count, device=self.device)
                prompts.correct(logits.detach()[rows, predicted.detach()[:count].argmax(1)], target)
        return sums

    def _decode(self, embedding: Tensor, prompts: _Prompts, place: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """One image's embedding [1, C, g, g] → ([N, outputs, 4g, 4g] logits, [N, outputs] predicted IoU), float32."""
        decoder, side = self.decoder, embedding.shape[-1]
        row, column = place
        position = decoder.dense_pe[0, :, row : row + side, column : column + side]
        decoder.position = position.flatten(1).T.to(self.dtype)
        sparse, dense = prompts.embedded()
        images = (embedding + dense.to(self.dtype)).flatten(2).transpose(1, 2)
        owner = None if len(images) == 1 else torch.arange(len(images), device=self.device)
        image, weights, scores = decoder.look(images, sparse, owner)
        return decoder.upscale(image, weights, None), scores

    def _mask_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits [N, M, s, s], target [N, s, s] in 0–1 → [N, M]."""
        wanted = target[:, None].expand_as(logits)
        likely = torch.sigmoid(logits)
        overlap = (likely * wanted).flatten(2).sum(2)
        dice = 1 - (2 * overlap + 1) / (likely.flatten(2).sum(2) + wanted.flatten(2).sum(2) + 1)
        entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        if self.plan.loss == "bce":
            near, far = _surroundings(target, self.balance)
            return ((near + far)[:, None] * entropy).flatten(2).sum(2) + DICE_SHARE * dice
        wrong = likely + wanted - 2 * likely * wanted  # 1 − the probability of what is right
        weight = FOCAL_ALPHA * wanted + (1 - FOCAL_ALPHA) * (1 - wanted)
        return FOCAL_SHARE * (weight * wrong**FOCAL_GAMMA * entropy).flatten(2).mean(2) + dice


class _Prompts:
    """What one image's objects are asked for with: a box or a click each, then a click a round where it is wrong."""

    def __init__(self, trainer: Trainer, one: Sample, place: tuple[int, int], boxes: bool, jitter: bool = True) -> None:
        sizes = trainer.card.architecture
        self.trainer = trainer
        self.masks: Tensor | None = None
        self.stride = sizes.patch / 4
        self.corner = torch.tensor([place[1], place[0]], device=trainer.device) * sizes.patch
        planes = trainer._target(one)
        clear = None if one.background is None else torch.tensor(one.background == SUBSAMPLES**2, device=trainer.device)
        if not boxes and jitter and clear is not None and clear.any():
            planes = torch.cat([planes, clear.float().expand(NOWHERE, -1, -1)])
        self.nowhere = len(planes) - len(one.boxes)  # the last of the prompts are for no object
        self.points = torch.zeros(len(planes), 0, 2, device=trainer.device)
        self.labels = torch.zeros(len(planes), 0, dtype=torch.int32, device=trainer.device)
        self.boxes = None
        if boxes:
            given = torch.tensor(one.boxes, device=trainer.device)
            sides = (given[:, 2:] - given[:, :2]).repeat(1, 2)
            noise = torch.randn(given.shape, generator=trainer.generator, device=trainer.device) * BOX_JITTER
            moved = given + (noise.clamp(-BOX_JITTER_MOST, BOX_JITTER_MOST) * sides if jitter else 0)
            self.boxes = moved.clamp(0, one.window) + self.corner.repeat(2)
        else:
            self._click(planes, centre=not jitter)

    def correct(self, logits: Tensor, target: Tensor) -> None:
        """One more click an object, where logits [N, s, s] are wrong (anywhere in it where they are not); the logits
        become the next round's mask prompt. Clicks for no object end here."""
        self.points, self.labels = self.points[: len(target)], self.labels[: len(target)]
        wrong = ((logits > 0) != (target > 0.5)).float()
        self._click(torch.where(wrong.any(1).any(1)[:, None, None], wrong, target), target)
        self.masks = logits[:, None]

    def _click(self, weight: Tensor, target: Tensor | None = None, centre: bool = False) -> None:
        """A point in each of weight's planes [N, s, s]; foreground, or as target says there."""
        side = weight.shape[-1]
        flat = weight.flatten(1)
        if centre:  # the innermost: where a blurred mask is densest
            flat = functional.avg_pool2d(weight[:, None], 5, 1, 2).flatten(1) * (
                weight.flatten(1) >= flat.amax(1, True)
            )
            chosen = flat.argmax(1, keepdim=True)
        else:
            flat = torch.where(flat >= 0.5, flat, flat * 1e-6)
            chosen = torch.multinomial(flat, 1, generator=self.trainer.generator)
        where = torch.cat([chosen % side, chosen // side], dim=1)
        inside = 0.5 if centre else self.trainer._uniform(len(where), 2)
        points = (where + inside) * self.stride - 0.5 + self.corner  # the prompt encoder adds half a pixel
        ones = torch.ones_like(chosen, dtype=torch.int32)
        labels = ones if target is None else (target.flatten(1).gather(1, chosen) > 0.5).int()
        self.points = torch.cat([self.points, points[:, None]], dim=1)
        self.labels = torch.cat([self.labels, labels], dim=1)

    def embedded(self) -> tuple[Tensor, Tensor]:
        """([N, tokens, C], [N or 1, C, g or 1, g or 1]) float32, by segment_anything's prompt encoder."""
        encoder = self.trainer.decoder.prompt_encoder
        points = (self.points, self.labels) if self.points.shape[1] else None
        sparse, dense = encoder(points=points, boxes=self.boxes, masks=self.masks)
        return sparse, dense if self.masks is not None else encoder.no_mask_embed.weight.view(1, -1, 1, 1)


def _fresh(sizes: checkpoint.Architecture, seed: int) -> dict[str, Tensor]:
    """segment_anything's own initial weights, from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = (checkpoint.build_encoder(sizes), *checkpoint.build_decoder(sizes))
    prefixes = ("image_encoder.", "prompt_encoder.", "mask_decoder.")
    return {k: v for p, module in zip(prefixes, modules, strict=True) for k, v in module.state_dict(prefix=p).items()}


def _attention(block: Any, tokens: Tensor) -> Tensor:
    """A block's attention with its gradient, [B, g, g, D] → [B, g, g, D]; written out, which is fastest on CPUs."""
    from segment_anything.modeling.image_encoder import window_partition, window_unpartition

    attention, window, grid = block.attn, block.window_size, tokens.shape[1:3]
    if window:
        tokens, pads = window_partition(tokens, window)
    number, side = tokens.shape[:2]
    qkv = attention.qkv(tokens).view(number, side * side, 3, attention.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [N, H, side², d]
    bias = _bias(attention, query.unflatten(2, (side, side)))
    scores = torch.matmul(query * attention.scale, key.transpose(2, 3)) + bias
    seen = torch.matmul(torch.softmax(scores, dim=-1), value).transpose(1, 2).reshape(number, side, side, -1)
    seen = attention.proj(seen)
    return window_unpartition(seen, window, pads, grid) if window else seen


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


def _surroundings(target: Tensor, balance: float) -> tuple[Tensor, Tensor]:
    """target [N, s, s] → weights of the pixels in and around an object's box, and of the others; each adds up to 1.

    balance: 0 to 1, the share of the former in which the object weighs as much as what is around it.
    """
    side = target.shape[-1]
    places = torch.arange(side, device=target.device)
    inside = []
    for axis in (2, 1):  # rows of the object, then columns
        used = (target > 0).any(axis)
        first, last = used.int().argmax(1), side - 1 - used.flip(1).int().argmax(1)
        reach = AROUND * (last - first + 1) + 1
        inside.append((places >= (first - reach)[:, None]) & (places <= (last + reach)[:, None]))
    near = (inside[0][:, :, None] & inside[1][:, None, :]).float()
    far = 1 - near
    alike = (_spread(near * target) + _spread(near * (1 - target))) / 2
    return (1 - balance) * _spread(near) + balance * alike, _spread(far)


def _spread(weight: Tensor) -> Tensor:
    """Each plane of [N, s, s], so that it adds up to 1; an empty one stays empty."""
    return weight / weight.sum((1, 2), keepdim=True).clamp(min=1e-6)


def _iou(logits: Tensor, target: Tensor) -> Tensor:
    """[N, s, s] logits and targets in 0–1 → [N]."""
    found, wanted = logits > 0, target > 0.5
    union = (found | wanted).flatten(1).sum(1)
    return (found & wanted).flatten(1).sum(1) / union.clamp(min=1)
