"""Every object of an image: a grid of points, filtered by score and stability, overlaps removed."""

from __future__ import annotations

import numpy as np
import torch

from serve_app.model import decoder as decoders
from serve_app.model.decoder import Decoder
from serve_app.model.masks import MaskSet
from serve_app.model.preprocess import Size
from serve_app.model.prompts import DecodeRequest, GridOptions, Prompts, point_grid


def generate(decoder: Decoder, embedding: np.ndarray, original: Size, options: GridOptions) -> MaskSet:
    """All masks that pass the options, best predicted IoU first; `prompt_index` is the grid point.

    Raises:
        InvalidInput, InvalidEmbedding
    """
    from torchvision.ops import nms

    options.check()
    points = point_grid(options.points_per_side, original)
    prompts = Prompts(points=points, labels=np.ones(points.shape[:2], np.int32))
    decoders.check(decoder, DecodeRequest(embedding, original, prompts))
    parts = []
    size = decoders.step(decoder, original, decoder.card.architecture.mask_outputs)
    for start in range(0, len(points), size):
        request = DecodeRequest(embedding, original, prompts.take(slice(start, start + size)), multimask=True)
        logits, scores = decoder.logits(request)
        keep = torch.nonzero(scores.flatten() > options.pred_iou_thresh)[:, 0]
        if not len(keep):
            continue
        index = np.repeat(np.arange(start, start + len(logits), dtype=np.int32), logits.shape[1])[keep.cpu().numpy()]
        part = decoders.to_masks(decoder, request, logits.flatten(0, 1)[keep], scores.flatten()[keep], index)
        parts.append(part.take(np.flatnonzero((part.stability >= options.stability_score_thresh) & (part.areas > 0))))
    found = MaskSet.join(original, parts, decoder.card.architecture.channels)
    # segment_anything's boxes end at the last pixel, COCO's one after it
    corners = np.concatenate([found.boxes[:, :2], found.boxes[:, :2] + found.boxes[:, 2:] - 1], axis=1)
    kept = nms(torch.from_numpy(corners), torch.from_numpy(found.predicted_iou), options.box_nms_thresh)
    return found.take(kept.numpy())
