"""What is asked of a decoder: prompts for an image, and a grid's options. Plain numpy: jobs and clients use it too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.errors import InvalidInput, InvalidPrompt
from serve_app.model.preprocess import Size

MAX_GRID = 128


@dataclass(frozen=True, slots=True)
class Prompts:
    """N objects asked for in one image, in its original pixels. At least one of `boxes` and `points` is given.

    boxes: [N, 4] float32 (x0, y0, x1, y1).
    points: [N, K, 2] float32 (x, y), with labels [N, K] int32: 1 foreground, 0 background, −1 padding.
    """

    boxes: np.ndarray | None = None
    points: np.ndarray | None = None
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        given = self.boxes if self.boxes is not None else self.points
        return 0 if given is None else len(given)

    def take(self, rows: slice) -> Prompts:
        return Prompts(*(None if x is None else x[rows] for x in (self.boxes, self.points, self.labels)))

    def check(self, size: Size) -> None:
        """Shapes agree, numbers are finite, every box has an area and lies in the image, every point too.

        Raises:
            InvalidPrompt: names the first prompt that does not fit, and the image's size.
        """
        height, width = size
        if self.boxes is None and self.points is None:
            raise InvalidPrompt("no prompt: give boxes, or points with labels")
        if (self.points is None) != (self.labels is None):
            raise InvalidPrompt("points and labels go together: give both or neither")
        if self.boxes is not None:
            if self.boxes.ndim != 2 or self.boxes.shape[1] != 4:
                raise InvalidPrompt(f"boxes must be [N, 4] (x0, y0, x1, y1), found {list(self.boxes.shape)}")
            for index, (x0, y0, x1, y1) in enumerate(self.boxes.tolist()):
                if not np.isfinite([x0, y0, x1, y1]).all():
                    raise InvalidPrompt(f"box {index} is not finite: {[x0, y0, x1, y1]}")
                if not (x0 < x1 and y0 < y1):
                    raise InvalidPrompt(f"box {index} is inverted or empty: {[x0, y0, x1, y1]}; x0 < x1 and y0 < y1")
                if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
                    raise InvalidPrompt(f"box {index} {[x0, y0, x1, y1]} leaves the image of {width} × {height} pixels")
        if self.points is not None and self.labels is not None:
            if self.points.ndim != 3 or self.points.shape[2] != 2 or self.labels.shape != self.points.shape[:2]:
                found = f"{list(self.points.shape)} and {list(self.labels.shape)}"
                raise InvalidPrompt(f"points must be [N, K, 2] and labels [N, K], found {found}")
            if self.boxes is not None and len(self.boxes) != len(self.points):
                raise InvalidPrompt(f"{len(self.boxes)} boxes but {len(self.points)} sets of points")
            if not np.isin(self.labels, (-1, 0, 1)).all():
                raise InvalidPrompt("labels must be 1 (foreground), 0 (background) or -1 (padding)")
            if len(self.points) and not (self.labels >= 0).any(axis=1).all() and self.boxes is None:
                raise InvalidPrompt("a set of points is all padding (labels -1)")
            real = self.points[self.labels >= 0]
            if not np.isfinite(self.points).all():
                raise InvalidPrompt("a point is not finite")
            outside = (real < 0).any(axis=1) | (real[:, 0] > width) | (real[:, 1] > height)
            if outside.any():
                point = real[outside][0].tolist()
                raise InvalidPrompt(f"point {point} lies outside the image of {width} × {height} pixels")


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """One image's prompts. `embedding` [256, g, g] float16 or float32; `original` (height, width) in pixels.
    `multimask` asks for three masks a prompt (whole, part, subpart) rather than one."""

    embedding: np.ndarray
    original: Size
    prompts: Prompts
    multimask: bool = False


@dataclass(frozen=True, slots=True)
class GridOptions:
    """Thresholds with the names and defaults of segment_anything's SamAutomaticMaskGenerator.

    points_per_side: the grid is its square.
    pred_iou_thresh, stability_score_thresh: masks below either are dropped.
    box_nms_thresh: of two masks whose boxes overlap by a greater IoU, the one with the lower predicted IoU is dropped.
    """

    points_per_side: int = 32
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    box_nms_thresh: float = 0.7

    def check(self) -> None:
        thresholds = (self.pred_iou_thresh, self.stability_score_thresh, self.box_nms_thresh)
        if any(np.isnan(thresholds)):
            raise InvalidInput(f"a threshold is no number: {thresholds}")
        if not 1 <= self.points_per_side <= MAX_GRID:
            raise InvalidInput(f"a grid of {self.points_per_side} points a side; expected 1 to {MAX_GRID}")


def point_grid(points_per_side: int, size: Size) -> np.ndarray:
    """[N², 1, 2] float32 (x, y): the centres of N × N equal cells of an image of (height, width)."""
    steps = (np.arange(points_per_side) + 0.5) / points_per_side
    x, y = np.meshgrid(steps * size[1], steps * size[0])
    return np.stack([x, y], axis=-1).reshape(-1, 1, 2).astype(np.float32)
