"""Every object of an image: a grid of points, filtered by score and stability, overlaps removed; also over crops, which
show small objects larger. The masks, in the order, of segment_anything's SamAutomaticMaskGenerator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from cluster.errors import InvalidInput
from serve_app.model import decoder as decoders
from serve_app.model import masks
from serve_app.model.decoder import Decoder
from serve_app.model.masks import MaskSet
from serve_app.model.preprocess import Size
from serve_app.model.prompts import Crop, DecodeRequest, GridOptions, Prompts, View, point_grid

EDGE_PIXELS = 20.0  # masks that end so near an edge of their crop are cut off by it; as `is_box_near_crop_edge`
WAITING_BYTES = 256 << 20  # logits of masks that may yet fall to a better one; past it masks are made of all of them


@dataclass(frozen=True, slots=True)
class _Candidates:
    """K masks that passed the thresholds: logits [K, 4g, 4g], scores and stability [K], corners [K, 4] float32
    (x0, y0, x1, y1 of the first and last pixel), points [K] int64, each one's place in the grid."""

    logits: torch.Tensor
    scores: torch.Tensor
    stability: torch.Tensor
    corners: torch.Tensor
    points: torch.Tensor

    @property
    def columns(self) -> tuple[torch.Tensor, ...]:
        return self.logits, self.scores, self.stability, self.corners, self.points

    def take(self, rows: torch.Tensor) -> _Candidates:
        return _Candidates(*(column[rows] for column in self.columns))

    @classmethod
    def join(cls, parts: list[_Candidates]) -> _Candidates:
        return cls(*map(torch.cat, zip(*(part.columns for part in parts), strict=True)))


@torch.inference_mode()
def generate(decoder: Decoder, views: Sequence[View], original: Size, options: GridOptions) -> MaskSet:
    """All masks of an image of `original` (height, width) that pass the options.

    views: each of `prompts.crops(original, options)` with its embedding.
    Best predicted IoU first; with several views the smaller crops before that, and with a min_mask_region_area the
    masks that it left alone. `prompt_index` counts the points of all views, in their order.

    Raises:
        InvalidInput, InvalidEmbedding
    """
    options.check()
    height, width = original
    parts, ranks, points = [], [], 0
    for embedding, crop in views:
        x0, y0, x1, y1 = crop.box
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise InvalidInput(f"crop {crop.box} does not lie in the image of {width} × {height} pixels")
        found = masks.place(_search(decoder, embedding, crop, original, options), crop.box[:2], original)
        parts.append(replace(found, prompt_index=found.prompt_index + np.int32(points)))
        ranks.append(np.full(len(found), 1 / (crop.size[0] * crop.size[1]), np.float32))
        points += crop.points_per_side**2
    found = MaskSet.join(original, parts, decoder.card.architecture.channels)
    if len(views) > 1:
        found = found.take(_suppress(_corners(found), np.concatenate(ranks), options.crop_nms_thresh))
    if options.min_mask_region_area:
        found = _clean(found, options)
    return found


def _search(decoder: Decoder, embedding: np.ndarray, crop: Crop, original: Size, options: GridOptions) -> MaskSet:
    """The masks of one view, in the crop's own pixels. None is encoded before it is sure to stay, if memory allows."""
    sizes = decoder.card.architecture
    points = point_grid(crop.points_per_side, crop.size)
    prompts = Prompts(points=points, labels=np.ones(points.shape[:2], np.int32))
    request = DecodeRequest(embedding, crop.size, prompts, multimask=True)
    decoders.check(decoder, request)
    above = options.pred_iou_thresh if options.pred_iou_thresh > 0 else -np.inf
    step = decoders.step(decoder, crop.size, sizes.mask_outputs)
    early: list[MaskSet] = []
    waiting: list[_Candidates] = []
    for start in range(0, len(points), step):
        some = replace(request, prompts=prompts.take(slice(start, start + step)))
        logits, scores, places = decoder.accepted(some, above)
        if not len(places):
            continue
        full = decoders.upscale(logits, crop.size, sizes.image_size)
        stability = decoders.stability(full, options.stability_score_offset)
        corners = _around(full)
        passed = stability >= options.stability_score_thresh
        passed &= (corners[:, 0] <= corners[:, 2]) & ~_cut_off(corners, crop, original)
        candidates = _Candidates(logits, scores, stability, corners, start + places // sizes.mask_outputs)
        waiting.append(candidates.take(passed))
        if sum(one.logits.nbytes for one in waiting) > WAITING_BYTES:
            early.append(_encode(decoder, request, _Candidates.join(waiting), step))
            waiting.clear()
    found = MaskSet.join(crop.size, early, sizes.channels)
    if not waiting:
        return found.take(_suppress(_corners(found), found.predicted_iou, options.box_nms_thresh))
    late = _Candidates.join(waiting)
    kept = _suppress(
        np.concatenate([_corners(found), late.corners.cpu().numpy()]),
        np.concatenate([found.predicted_iou, late.scores.cpu().numpy()]),
        options.box_nms_thresh,
    )
    is_late = kept >= len(found)
    chosen = late.take(torch.from_numpy(kept[is_late] - len(found)).to(late.scores.device))
    parts = [found.take(kept[~is_late]), _encode(decoder, request, chosen, step)]
    joined = MaskSet.join(crop.size, parts, sizes.channels)
    return joined.take(np.argsort(-joined.predicted_iou, kind="stable"))


def _encode(decoder: Decoder, request: DecodeRequest, found: _Candidates, step: int) -> MaskSet:
    """Candidates → masks, a step's worth at a time."""
    sizes = decoder.card.architecture
    parts = []
    for rows in decoders.chunks(len(found.scores), step * sizes.mask_outputs):
        index = found.points[rows].cpu().numpy().astype(np.int32)
        part = decoders.to_masks(decoder, request, found.logits[rows], found.scores[rows], index)
        parts.append(replace(part, stability=found.stability[rows].cpu().numpy()))
    return MaskSet.join(request.original, parts, sizes.channels)


def _around(full: torch.Tensor) -> torch.Tensor:
    """[N, h, w] logits → [N, 4] float32 corners: first and last pixel of each mask; of an empty one in wrong order."""
    ends = []
    for axis in (1, 2):
        on = full.amax(axis) > decoders.MASK_THRESHOLD  # columns, then rows
        place = torch.arange(1, on.shape[1] + 1, device=on.device)
        ends.append((len(place) - (on * place.flip(0)).amax(1), (on * place).amax(1) - 1))
    (x0, x1), (y0, y1) = ends
    return torch.stack([x0, y0, x1, y1], 1).float()


def _cut_off(corners: torch.Tensor, crop: Crop, original: Size) -> torch.Tensor:
    """[N, 4] corners in the crop → [N] bool: those near an edge of it that is not the image's too."""
    x, y = crop.box[:2]
    corners = corners + corners.new_tensor([x, y, x, y])
    height, width = original
    near = (corners - corners.new_tensor(crop.box)).abs() <= EDGE_PIXELS
    outer = (corners - corners.new_tensor([0, 0, width, height])).abs() <= EDGE_PIXELS
    return (near & ~outer).any(1)


def _clean(found: MaskSet, options: GridOptions) -> MaskSet:
    """Without small holes and islands, and without the masks that thereby became another's double."""
    counts, changed = [], np.zeros(len(found), bool)
    for index, text in enumerate(found.counts):
        cleaned = masks.remove_small_regions(masks.decode([text], found.size)[0], options.min_mask_region_area)
        changed[index] = cleaned is not None
        counts.append(text if cleaned is None else masks.encode(cleaned[None])[0])
    areas, boxes = masks.areas_and_boxes(counts, found.size)
    found = replace(found, counts=counts, areas=areas, boxes=boxes)
    threshold = max(options.box_nms_thresh, options.crop_nms_thresh)
    return found.take(_suppress(_corners(found), (~changed).astype(np.float32), threshold))


def _corners(found: MaskSet) -> np.ndarray:
    """[N, 4] float32: segment_anything's boxes end at the last pixel, COCO's one after it."""
    return np.concatenate([found.boxes[:, :2], found.boxes[:, :2] + found.boxes[:, 2:] - 1], axis=1)


def _suppress(corners: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Indices of what is left, best score first, where of two boxes [N, 4] with a greater IoU the worse one goes."""
    from torchvision.ops import nms

    kept: torch.Tensor = nms(torch.from_numpy(corners), torch.from_numpy(scores), threshold)
    return kept.numpy()
