"""What a model is trained on: images and objects in them, and prompts as Segment Anything's training draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from serve_app.model import masks, preprocess
from serve_app.model.training_network import Network, Place

SUBSAMPLES = 2  # a side, of the pixels that a logit covers: what its target is counted from
NOWHERE = 4  # clicks beside all objects, in an image where all are labelled: what is found there has an IoU of 0
BOX_JITTER = 0.06  # of a side: standard deviation
BOX_JITTER_MOST = 0.15


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

    def target(self, device: str) -> Tensor:
        """The masks as [N, 4g, 4g] float32 in 0–1."""
        return torch.tensor(self.masks, device=device) / SUBSAMPLES**2


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


class DrawnPrompts:
    """What one image's objects are asked for with: a box or a click each, then a click a round where it is wrong.

    Without a generator boxes are exact, and clicks as far inside as can be. `nowhere` more are in the background,
    where it is known.

    targets: [N, s, s] float32 in 0–1, what should be found; nothing for clicks in the background. counted: [N] bool,
    the prompts that are for an object.
    """

    def __init__(
        self,
        network: Network,
        one: Sample,
        place: Place,
        boxes: bool,
        generator: torch.Generator | None = None,
        nowhere: int = 0,
    ) -> None:
        patch, device = network.card.architecture.patch, network.device
        self.network, self.generator, self.stride = network, generator, patch / 4
        self.corner = torch.tensor([place[1], place[0]], device=device) * patch
        planes = self.targets = one.target(device)
        if not boxes and nowhere and one.background is not None:
            clear = torch.tensor(one.background == SUBSAMPLES**2, dtype=torch.float32, device=device)
            planes = torch.cat([planes, clear.expand(nowhere if clear.any() else 0, -1, -1)])
            self.targets = functional.pad(self.targets, (0, 0, 0, 0, 0, len(planes) - len(self.targets)))
        self.counted = torch.arange(len(planes), device=device) < len(one.boxes)
        self.points = torch.zeros(len(planes), 0, 2, device=device)
        self.labels = torch.zeros(len(planes), 0, dtype=torch.int32, device=device)
        self.boxes: Tensor | None = None
        self.masks: Tensor | None = None
        if not boxes:
            self._click(planes)
            return
        given = torch.tensor(one.boxes, device=device)
        if generator is not None:
            noise = torch.randn(given.shape, generator=generator, device=device) * BOX_JITTER
            given += noise.clamp(-BOX_JITTER_MOST, BOX_JITTER_MOST) * (given[:, 2:] - given[:, :2]).repeat(1, 2)
        self.boxes = given.clamp(0, one.window) + self.corner.repeat(2)

    def correct(self, logits: Tensor) -> None:
        """One more click an object, where logits [N, s, s] are wrong (anywhere in it where they are not); the logits
        become the next round's mask prompt. Clicks for no object end here."""
        self.points, self.labels, logits = self.points[self.counted], self.labels[self.counted], logits[self.counted]
        self.targets, self.counted = self.targets[self.counted], self.counted[self.counted]
        wrong = ((logits > 0) != (self.targets > 0.5)).float()
        self._click(torch.where(wrong.any(1).any(1)[:, None, None], wrong, self.targets), self.targets)
        self.masks = logits[:, None]

    def _click(self, weight: Tensor, target: Tensor | None = None) -> None:
        """A point in each of weight's planes [N, s, s]; foreground, or as target says there."""
        side, flat, inside = weight.shape[-1], weight.flatten(1), torch.tensor(0.5)
        if self.generator is None:  # the innermost: where a blurred mask is densest
            blurred = functional.avg_pool2d(weight[:, None], 5, 1, 2).flatten(1)
            chosen = (blurred * (flat >= flat.amax(1, True))).argmax(1, keepdim=True)
        else:
            flat = torch.where(flat >= 0.5, flat, flat * 1e-6)
            chosen = torch.multinomial(flat, 1, generator=self.generator)
            inside = torch.rand((len(flat), 2), generator=self.generator, device=flat.device)
        where = torch.cat([chosen % side, chosen // side], dim=1)
        points = (where + inside) * self.stride - 0.5 + self.corner  # the prompt encoder adds half a pixel
        labels = torch.ones_like(chosen) if target is None else target.flatten(1).gather(1, chosen) > 0.5
        self.points = torch.cat([self.points, points[:, None]], dim=1)
        self.labels = torch.cat([self.labels, labels.int()], dim=1)

    def embedded(self) -> tuple[Tensor, Tensor]:
        """([N, tokens, C], [N or 1, C, g or 1, g or 1]) float32, by segment_anything's prompt encoder."""
        encoder = self.network.decoder.prompt_encoder
        points = (self.points, self.labels) if self.points.shape[1] else None
        sparse, dense = encoder(points=points, boxes=self.boxes, masks=self.masks)
        return sparse, dense if self.masks is not None else encoder.no_mask_embed.weight.view(1, -1, 1, 1)


def embedded(drawn: Sequence[DrawnPrompts]) -> tuple[Tensor, Tensor, Tensor]:
    """Images' prompts, all of the same round: what `DrawnPrompts.embedded` gives of them together (a box and a click
    have as many tokens), and the place in `drawn` of each prompt's image, [N] int64."""
    sparse, dense = zip(*(one.embedded() for one in drawn), strict=True)
    counts = torch.tensor([len(one) for one in sparse], device=sparse[0].device)
    owner = torch.arange(len(drawn), device=counts.device).repeat_interleave(counts)
    return torch.cat(sparse), torch.cat(dense) if drawn[0].masks is not None else dense[0], owner
