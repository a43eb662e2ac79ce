"""What CellSAM's image encoder and its detector are given: of the same pixels, each in its own way.

Source of all steps and numbers: as of `cellsam`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from serve_app.model.preprocess import PIXEL_MEAN, PIXEL_STD

INPUT_BRIGHTEST = 99.5  # percentile of the square input's values above 0
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPSILON = 1e-6


def square(image: np.ndarray, size: int, device: str = "cpu") -> Tensor:
    """[h, w, 3] float32 in 0–1 → [3, size, size], whatever its aspect: bilinear, with antialiasing."""
    pixels = torch.tensor(image, dtype=torch.float32, device=device).permute(2, 0, 1)
    if pixels.shape[1:] == (size, size):
        return pixels
    return functional.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]


def encoder_input(pixels: Tensor, advanced: bool) -> Tensor:
    """[3, S, S] float32 of `square` → the image encoder's input."""
    above = pixels[pixels != 0]
    if above.numel():
        low, high = above.min(), _percentile(above, INPUT_BRIGHTEST)
        if high > low:
            pixels = (pixels.clamp(low, high) - low) / (high - low)
    if advanced:
        pixels = _standardised(pixels)
    return _shifted(pixels, [value / 255 for value in PIXEL_MEAN], [value / 255 for value in PIXEL_STD])


def detector_input(pixels: Tensor, advanced: bool) -> Tensor:
    """[3, S, S] float32 of `square` → the detector's input."""
    levels = (pixels * 255).to(torch.uint8).float()
    shifted = _shifted(levels, PIXEL_MEAN, PIXEL_STD)
    if not advanced:
        return shifted
    made = _standardised(shifted)
    if made[1].max() == 0:  # without nuclei, cells are shown twice, and the other way round
        made[1] = made[2]
    if made[2].max() == 0:
        made[2] = made[1]
    return made


def _standardised(pixels: Tensor) -> Tensor:
    """Each channel from 0 to 1."""
    shifted = _shifted(pixels, IMAGENET_MEAN, IMAGENET_STD)
    low, high = shifted.amin((1, 2), keepdim=True), shifted.amax((1, 2), keepdim=True)
    return (shifted - low) / (high - low + EPSILON)


def _shifted(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    centre, spread = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    return (pixels - centre) / spread


def _percentile(values: Tensor, percent: float) -> Tensor:
    if values.is_cuda:
        return torch.quantile(values, percent / 100)
    return torch.tensor(np.percentile(values.numpy(), percent), dtype=values.dtype)  # ten times as fast as sorting
