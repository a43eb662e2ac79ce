"""The gate: a runtime and a dtype beside segment_anything's own modules in float32, on real images.

What is faster is switched on only where it passes. Both sides see the same pixels and the same prompts; each decoder
starts from its own encoder's float32 answer, so that masks are compared as users get them (storing in float16 comes
after, and is the same for both).

float32: the difference of embeddings, of logits and of scores (predicted IoU) is at most SAME of the reference's norm.

Less than float32, trained weights: the tokens' cosine with the reference's is at least COSINE in the mean and
WORST_COSINE for the worst token, and the mean IoU of an image's masks at least IOU. It is the mean that is judged: of a
mask of twenty pixels, one that flips is 5 %. The least stands in the table.

Less than float32, random weights: they amplify rounding to where those numbers mean nothing (attention is sharp, masks
are noise), so the measure is torch's own bfloat16 autocast of the reference, on the same weights and image: how far a
candidate is from 1 is at most MEAN_SLACK times how far that is, WORST_SLACK times for the worst token. Two correct
ways to round were measured 0.8 to 1.1 apart in the mean and 0.5 to 1.5 in the worst of thousands of tokens.

The worst token is that of all tokens, padding's too: the decoder attends to every one, and the neck's last LayerNorm
gives them all the same norm, so that none is too faint for a cosine. The worst of those that hold image is given too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from cluster.errors import InvalidInput, InvalidSettings
from serve_app.model import masks
from serve_app.model.architectures import Architecture
from serve_app.model.decoder import MASK_THRESHOLD, Decoder, upscale
from serve_app.model.encoder import Encoder
from serve_app.model.preprocess import ModelImage, Size
from serve_app.model.prompts import DecodeRequest, Prompts, point_grid

SAME = 1e-5  # of the norm: float32 sums in another order
COSINE, WORST_COSINE = 0.999, 0.99
IOU = {"bfloat16": 0.99, "float16": 0.99, "int8": 0.98}
MEAN_SLACK, WORST_SLACK = 1.25, 2.0
GRID = 4  # points a side


@dataclass(frozen=True)
class Model:
    """One side of the comparison."""

    encoder: Encoder
    decoder: Decoder

    @property
    def runtime(self) -> str:
        return f"encoder {self.encoder.runtime}, decoder {self.decoder.runtime}"


@dataclass(frozen=True)
class Measures:
    """How far one image's answers are from the reference's.

    Errors are norms of the difference over the norm of the reference. Cosines are of tokens (256 channels each): the
    mean, the worst, and the worst of those that hold image. IoU is of masks at original resolution, of which there are
    `masks`. `score_difference` is the largest of a predicted IoU.
    """

    embedding_error: float
    cosine: float
    worst: float
    worst_inside: float
    logits_error: float
    scores_error: float
    score_difference: float
    iou: float
    iou_least: float
    masks: int


@dataclass(frozen=True)
class Row:
    """One image. `peer` is torch's bfloat16 autocast of the reference, where that is what the rules go by."""

    image: str
    candidate: Measures
    peer: Measures | None


@dataclass(frozen=True)
class Verdict:
    """One rule on the image that comes closest to breaking it, or breaks it most. `at_least`: the limit is a least."""

    rule: str
    image: str
    found: float
    limit: float
    at_least: bool

    @property
    def margin(self) -> float:
        """Below zero where the rule is broken, as by what is no number."""
        margin = self.found - self.limit if self.at_least else self.limit - self.found
        return -math.inf if math.isnan(margin) else margin

    @property
    def passed(self) -> bool:
        return self.margin >= 0


@dataclass(frozen=True)
class Report:
    candidate: str
    dtype: str
    trained: bool
    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)


def run(reference: Model, candidate: Model, images: Iterable[tuple[str, ModelImage]], dtype: str) -> Report:
    """Named images through both; `reference` is in float32, `dtype` what the candidate claims to be judged as.

    Raises:
        InvalidSettings: there are no rules for this dtype.
        InvalidInput: no images.
    """
    if dtype != "float32" and dtype not in IOU:
        raise InvalidSettings(f"the gate has no rules for dtype {dtype!r}; there are float32, {', '.join(IOU)}")
    trained, sizes = reference.encoder.card.trained, reference.encoder.card.architecture
    rows = []
    for name, image in images:
        expected = _answers(reference, image)
        found = _measure(_answers(candidate, image), expected, image, sizes)
        peer = None
        if dtype != "float32" and not trained:
            with torch.autocast(expected.embedding.device.type, torch.bfloat16):
                rounded = _answers(reference, image)
            peer = _measure(rounded, expected, image, sizes)
        rows.append(Row(name, found, peer))
    if not rows:
        raise InvalidInput("no images to compare on")
    return Report(candidate.runtime, dtype, trained, tuple(rows), tuple(_judge(rows, dtype)))


def prompts(size: Size) -> list[tuple[Prompts, bool]]:
    """What is asked of an image of (height, width), each with multimask or not: boxes, a grid of single points, sets of
    points on and off an object, and boxes with them."""
    scale = np.array([size[1], size[0]], np.float32)  # (x, y)
    corners = np.array([[[0, 0], [1, 1]], [[0.1, 0.2], [0.5, 0.6]], [[0.6, 0.4], [0.7, 0.55]]], np.float32)
    boxes = (corners * scale).reshape(-1, 4)
    several = np.array([[[0.3, 0.4], [0.9, 0.9]], [[0.2, 0.3], [0.4, 0.5]], [[0.65, 0.5], [0, 0]]], np.float32) * scale
    labels = np.array([[1, 0], [1, 1], [1, -1]], np.int32)
    grid = point_grid(GRID, size)
    asked = [
        Prompts(boxes=boxes),
        Prompts(points=grid, labels=np.ones(grid.shape[:2], np.int32)),
        Prompts(points=several, labels=labels),
        Prompts(boxes, several, labels),
    ]
    return [(one, multimask) for one in asked for multimask in (False, True)]


@dataclass(frozen=True)
class _Answers:
    """An image's embedding [C, g, g], and for each of its prompts' requests logits [N, M, 4g, 4g] and scores [N, M]."""

    embedding: torch.Tensor
    logits: list[torch.Tensor]
    scores: list[torch.Tensor]


def _answers(model: Model, image: ModelImage) -> _Answers:
    embedding = model.encoder.encode([image.pixels])[0].float()
    array = embedding.cpu().numpy()
    found = [
        model.decoder.logits(DecodeRequest(array, image.original, one, multimask))
        for one, multimask in prompts(image.original)
    ]
    return _Answers(embedding, [logits.float() for logits, _ in found], [scores.float() for _, scores in found])


def _measure(found: _Answers, expected: _Answers, image: ModelImage, sizes: Architecture) -> Measures:
    cosines = functional.cosine_similarity(found.embedding.double(), expected.embedding.double(), dim=0)
    rows, columns = (-(-side // sizes.patch) for side in image.input)
    scores, expected_scores = (torch.cat([one.flatten() for one in side.scores]) for side in (found, expected))
    ious = np.array(
        [
            masks.iou(*pair)
            for ours, theirs in zip(found.logits, expected.logits, strict=True)
            for prompt in zip(ours, theirs, strict=True)
            for pair in zip(*(_masks(logits, image.original, sizes.image_size) for logits in prompt), strict=True)
        ]
    )
    return Measures(
        embedding_error=_relative([found.embedding], [expected.embedding]),
        cosine=float(cosines.mean()),
        worst=float(cosines.min()),
        worst_inside=float(cosines[:rows, :columns].min()),
        logits_error=_relative(found.logits, expected.logits),
        scores_error=_relative(found.scores, expected.scores),
        score_difference=float((scores - expected_scores).abs().max()),
        iou=float(ious.mean()),
        iou_least=float(ious.min()),
        masks=len(ious),
    )


def _masks(logits: torch.Tensor, original: Size, image_size: int) -> np.ndarray:
    """One prompt's logits [M, 4g, 4g] → [M, height, width] bool."""
    return (upscale(logits, original, image_size) > MASK_THRESHOLD).cpu().numpy()


def _relative(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Norm of the difference over the norm of what is expected, over all tensors together."""
    pairs = list(zip(found, expected, strict=True))
    difference = sum(float((one.double() - other.double()).square().sum()) for one, other in pairs)
    return math.sqrt(difference / sum(float(other.double().square().sum()) for _, other in pairs))


def _judge(rows: list[Row], dtype: str) -> Iterator[Verdict]:
    """Each rule, on the image that it is closest to failing on, or fails worst on."""
    if dtype == "float32":
        for name, field in (("embedding", "embedding_error"), ("logits", "logits_error"), ("scores", "scores_error")):
            rule = f"relative error of the {name}"
            yield min(
                (Verdict(rule, row.image, getattr(row.candidate, field), SAME, False) for row in rows), key=_margin
            )
        return
    for rule, field, floor, slack in (
        ("cosine of tokens, mean", "cosine", COSINE, MEAN_SLACK),
        ("cosine of tokens, worst", "worst", WORST_COSINE, WORST_SLACK),
        ("IoU of masks, mean", "iou", IOU[dtype], MEAN_SLACK),
    ):
        yield min(
            (
                Verdict(rule, row.image, getattr(row.candidate, field), _least(row.peer, field, floor, slack), True)
                for row in rows
            ),
            key=_margin,
        )


def _least(peer: Measures | None, field: str, floor: float, slack: float) -> float:
    return floor if peer is None else 1 - slack * (1 - getattr(peer, field))


def _margin(verdict: Verdict) -> float:
    return verdict.margin
