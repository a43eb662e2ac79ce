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
    outputs = decoder.card.architecture.mask_outputs
    size = decoders.step(decoder, original, outputs)
    for start in range(0, len(points), size):
        request = DecodeRequest(embedding, original, prompts.take(slice(start, start + size)), multimask=True)
        logits, scores, places = decoder.accepted(request, options.pred_iou_thresh)
        if not len(places):
            continue
        index = (start + places.cpu().numpy() // outputs).astype(np.int32)
        part = decoders.to_masks(decoder, request, logits, scores, index)
        parts.append(part.take(np.flatnonzero((part.stability >= options.stability_score_thresh) & (part.areas > 0))))
    found = MaskSet.join(original, parts, decoder.card.architecture.channels)
    # segment_anything's boxes end at the last pixel, COCO's one after it
    corners = np.concatenate([found.boxes[:, :2], found.boxes[:, :2] + found.boxes[:, 2:] - 1], axis=1)
    kept = nms(torch.from_numpy(corners), torch.from_numpy(found.predicted_iou), options.box_nms_thresh)
    return found.take(kept.numpy())
