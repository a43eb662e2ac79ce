"""Training: what is lost on a batch, and the step of the optimiser; by one process, or by several on a batch together.

Weights are kept and changed in float32, whatever dtype they are computed with. Masks are compared at the decoder's own
resolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from cluster.errors import InvalidInput
from serve_app.model.losses import LOSSES, iou, mask_loss
from serve_app.model.training_network import Network, Place
from serve_app.model.training_samples import NOWHERE, DrawnPrompts, Sample, embedded

BALANCED = 0.4  # of a training from scratch: until then object and background weigh more alike than they are large,
# less and less, and there are no corrections, nor clicks beside the objects
BOXES = 1 / 2  # of the images; the others' objects get a click
MOST_SEEDS = 1009  # a step: one for what its images share, and one an image
AT_ONCE = 1 << 14  # prompts times their images' tokens that are decoded together, with what their gradient needs
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.999), 0.02, 1.0
WARM_UP = 0.03  # of the whole training
LAST_RATE = 0.02  # of the learning rate, where the cosine ends


@dataclass(frozen=True)
class Outcome:
    """Means over a step's objects: the loss, its share for predicted IoU, and the IoU of the first round's masks."""

    loss: float
    iou_loss: float
    iou: float


@dataclass(frozen=True)
class Plan:
    """How to train. `loss`: `focal`, 20 focal + dice as Segment Anything; `bce`, binary cross-entropy over an object's
    surroundings and, as much again, the rest of the image, + 2 dice. From scratch that finds masks after some 900
    images, because at first it weighs object and background alike; else all background is hard to leave. With it no
    output learns parts of objects, which would be found automatically beside the whole."""

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
    """A network and its optimiser. The processes of a `group` are given the same batches; each takes its share of them,
    and all come to the weights that one process would have come to."""

    def __init__(
        self, folder: Path, plan: Plan, device: str = "cpu", dtype: str = "float32", group: Any = None
    ) -> None:
        """group: of torch.distributed. Raises InvalidInput, InvalidCheckpoint: a plan or a model not to be trained."""
        plan.check()
        self.plan, self.group, self.step_count, self.balance = plan, group, 0, 0.0
        self.network = Network(folder, plan.encoder, plan.seed, device, dtype)
        self.scratch = plan.encoder and not self.network.card.trained
        self.trained = {name: self.network.state[name] for name in self.network.working}
        decayed = [weight for name, weight in self.trained.items() if weight.dim() > 1 and "embed" not in name]
        others = [weight for name, weight in self.trained.items() if weight.dim() < 2 or "embed" in name]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, plan.lr, BETAS, weight_decay=WEIGHT_DECAY, fused=True)

    def step(self, samples: Sequence[Sample], progress: float) -> Outcome:
        """Change the weights by one batch, of one window; `progress` is the share of the training that is done. No
        samples: the step only counts.

        The outcome's loss is NaN where it, or its gradient, is no finite number: then no weight was changed.
        """
        if not samples:
            self.step_count += 1
            return Outcome(math.nan, math.nan, math.nan)
        uniform = partial(torch.rand, generator=self._seeded(0), device=self.network.device)
        self.balance = max(0.0, 1 - progress / BALANCED) if self.scratch else 0.0
        for parameter in self.network.working.values():
            parameter.grad = None
        sizes = self.network.card.architecture
        free = (sizes.image_size - samples[0].window) // sizes.patch + 1
        row, column = (uniform(2) * free).int().tolist()
        objects = sum(len(one.boxes) for one in samples)
        rounds = 1
        if not self.balance and uniform(1).item() < 0.5:
            rounds += int(uniform(1).item() * self.plan.rounds)
        sums = torch.zeros(3, dtype=torch.float64)
        rank, ranks = (self.group.rank(), self.group.size()) if self.group else (0, 1)
        if own := list(samples[rank::ranks]):
            place = (row, column)
            embeddings = self.network.embeddings([one.image for one in own], samples[0].window, place)
            leaf = embeddings.detach().requires_grad_(self.plan.encoder)
            drawn = [self._drawn(one, place, 1 + rank + ranks * index) for index, one in enumerate(own)]
            for part in _parts([len(one.targets) * leaf[0, 0].numel() for one in drawn]):
                sums += self._rounds(leaf[part], drawn[part], place, rounds, objects)
            if self.plan.encoder:
                embeddings.backward(leaf.grad)
        sums = self._gather(sums)
        loss, iou_loss, found = (sums / torch.tensor([objects * rounds, objects * rounds, objects])).tolist()
        changed = math.isfinite(loss) and self._update(self.plan.rate(progress))
        return Outcome(loss if changed else math.nan, iou_loss, found)

    @torch.no_grad()
    def evaluate(self, samples: Iterable[Sample]) -> dict[str, float]:
        """Means over objects, at the decoder's resolution; {} of no samples.

        iou_box, iou_click: IoU from exact boxes, and from one click inside each.
        correlation: between the predicted IoU and that of boxes.
        """
        rows, network, place = [], self.network, (0, 0)
        for one in samples:
            embedding, target = network.embeddings([one.image], one.window, place), one.target(network.device)
            asked = (DrawnPrompts(network, one, place, boxes) for boxes in (True, False))
            (box, predicted), (click, _) = (network.decode(embedding, place, *embedded([each])) for each in asked)
            rows.append(torch.stack([iou(box[:, 0], target), iou(click[:, 0], target), predicted[:, 0]]))
        if not rows:
            return {}
        found = torch.cat(rows, dim=1).cpu()
        box_mean, click_mean, _ = found.mean(1).tolist()
        correlation = torch.corrcoef(found)[0, 2].nan_to_num().item()
        return {"iou_box": box_mean, "iou_click": click_mean, "correlation": correlation}

    def weights(self) -> dict[str, Tensor]:
        """The trained halves' tensors, float32, under their full names."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.network.state.items()}

    def snapshot(self) -> dict[str, Any]:
        """All that `restore` needs to go on as if nothing had happened; on the CPU."""
        optimizer = self.optimizer.state_dict()
        moments = {at: {name: tensor.cpu() for name, tensor in own.items()} for at, own in optimizer["state"].items()}
        return {"state": self.weights(), "optimizer": optimizer | {"state": moments}, "step": self.step_count}

    def restore(self, snapshot: dict[str, Any]) -> None:
        for name, tensor in self.network.state.items():
            tensor.copy_(snapshot["state"][name])
        self.optimizer.load_state_dict(snapshot["optimizer"])
        self.step_count = snapshot["step"]
        self.network.share()

    def _seeded(self, index: int) -> torch.Generator:
        """Its draws depend on seed, step and `index` alone, whichever process makes them."""
        seed = ((self.plan.seed * 1_000_003 + self.step_count) * MOST_SEEDS + index) % 2**63
        return torch.Generator(self.network.device).manual_seed(seed)

    @torch.no_grad()
    def _gather(self, sums: Tensor) -> Tensor:
        """The weights' gradients in float32, and `sums`, each added up over the group; → those of `sums`."""
        weights = list(self.trained.values())
        for name, weight in self.trained.items():
            gradient = self.network.working[name].grad
            weight.grad = None if gradient is None else gradient.float()
        if self.group is None:
            return sums
        parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in weights]
        used = torch.tensor([one.grad is not None for one in weights])
        flat = torch.cat([*(part.flatten() for part in parts), *(one.to(weights[0]) for one in (used, sums))])
        distributed.all_reduce(flat, group=self.group)
        *parts, used, sums = flat.split([*(one.numel() for one in weights), len(used), len(sums)])
        for weight, part, anywhere in zip(weights, parts, used.tolist(), strict=True):
            weight.grad = part.view_as(weight) if anywhere else None  # None where no prompt of the batch needs it
        return sums.cpu().double()

    @torch.no_grad()
    def _update(self, rate: float) -> bool:
        if not torch.nn.utils.clip_grad_norm_(self.trained.values(), CLIP).isfinite():
            return False
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step_count += 1
        self.network.share()
        return True

    def _drawn(self, one: Sample, place: Place, index: int) -> DrawnPrompts:
        """An image's first prompts: boxes or clicks."""
        generator = self._seeded(index)
        boxes = torch.rand(1, generator=generator, device=generator.device).item() < BOXES
        return DrawnPrompts(self.network, one, place, boxes, generator, 0 if self.balance else NOWHERE)

    def _rounds(
        self, embeddings: Tensor, drawn: Sequence[DrawnPrompts], place: Place, rounds: int, objects: int
    ) -> Tensor:
        """Ask for images' objects, then correct where the masks are wrong → [3] sums: loss, IoU loss, first IoU."""
        sums = torch.zeros(3, dtype=torch.float64)
        for turn in range(rounds):
            target = torch.cat([one.targets for one in drawn])
            counted = torch.cat([one.counted for one in drawn])
            logits, predicted = self.network.decode(embeddings, place, *embedded(drawn))
            if turn:
                logits, predicted = logits[:, :1], predicted[:, :1]  # the first output is for clear prompts
            lost = mask_loss(logits, target, self.plan.loss, self.balance)
            with torch.no_grad():
                actual = iou(logits.flatten(0, 1), target.repeat_interleave(logits.shape[1], 0)).view_as(predicted)
            iou_loss = (predicted - actual).square().mean(1).sum()
            best = lost[:, 0]
            if not turn:  # whole, part or subpart may be meant: the best of them learns, or they all do in part
                alike = LOSSES[self.plan.loss]
                best = best + (1 - alike) * lost[:, 1:].amin(1) + alike * lost[:, 1:].mean(1)
            loss = best[counted].sum() + iou_loss
            (loss / objects).backward()
            first = 0.0 if turn else actual[:, 0].sum().item()
            sums += torch.tensor([loss.item(), iou_loss.item(), first], dtype=torch.float64)
            if turn + 1 < rounds:
                rows = torch.arange(len(target), device=target.device)
                chosen = logits.detach()[rows, predicted.detach().argmax(1)]
                for one, own in zip(drawn, chosen.split([len(one.targets) for one in drawn]), strict=True):
                    one.correct(own)
        return sums


def _parts(sizes: Sequence[int]) -> Iterator[slice]:
    """Runs of neighbours whose sizes add up to at most AT_ONCE, or of a single one."""
    first, total = 0, 0
    for index, size in enumerate(sizes):
        if total + size > AT_ONCE and index > first:
            yield slice(first, index)
            first, total = index, 0
        total += size
    yield slice(first, len(sizes))
