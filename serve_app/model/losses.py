"""What is wrong with masks: losses to train by, and IoU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

FOCAL_ALPHA, FOCAL_GAMMA, FOCAL_SHARE = 0.25, 2.0, 20.0  # Segment Anything, appendix A: focal to dice 20 : 1
AROUND = 0.25  # of an object's sides: how far its surroundings reach in the weighted loss
DICE_SHARE = 2.0
LOSSES = {"focal": 0.0, "bce": 0.5}  # how much of the outputs beside the first all learn, not the best alone


def mask_loss(logits: Tensor, target: Tensor, kind: str, balance: float) -> Tensor:
    """logits [N, M, s, s], target [N, s, s] in 0–1 → [N, M], by a kind of LOSSES; `balance` is `_surroundings`'."""
    wanted = target[:, None].expand_as(logits)
    likely = torch.sigmoid(logits)
    overlap = (likely * wanted).flatten(2).sum(2)
    dice = 1 - (2 * overlap + 1) / (likely.flatten(2).sum(2) + wanted.flatten(2).sum(2) + 1)
    entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    if kind == "bce":
        near, far = _surroundings(target, balance)
        return ((near + far)[:, None] * entropy).flatten(2).sum(2) + DICE_SHARE * dice
    wrong = likely + wanted - 2 * likely * wanted  # 1 − the probability of what is right
    weight = FOCAL_ALPHA * wanted + (1 - FOCAL_ALPHA) * (1 - wanted)
    return FOCAL_SHARE * (weight * wrong**FOCAL_GAMMA * entropy).flatten(2).mean(2) + dice


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


def iou(logits: Tensor, target: Tensor) -> Tensor:
    """[N, s, s] logits and targets in 0–1 → [N]."""
    found, wanted = logits > 0, target > 0.5
    union = (found | wanted).flatten(1).sum(1)
    return (found & wanted).flatten(1).sum(1) / union.clamp(min=1)
