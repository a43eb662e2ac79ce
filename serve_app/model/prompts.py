"""What is asked of a decoder: prompts for an image, and a grid's options. Plain numpy: jobs and clients use it too."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cluster.errors import InvalidInput, InvalidPrompt
from serve_app.model.preprocess import Size, resize

MAX_CLICKS = 128  # of one object: a decoder's memory grows with them
MAX_GRID = 128
MAX_CROP_LAYERS = 3  # 84 crops
MAX_POINTS = 100_000  # on all crops together
MAX_OFFSET = 1000.0  # logits; past it every mask is as stable as the next
MAX_OVERLAP = 0.9  # neighbours that share more are nearly the same crop
MAX_REGION = 1 << 30  # pixels: more than any image has


@dataclass(frozen=True, slots=True)
class Prompts:
    """N objects asked for in one image, in its original pixels. At least one of `boxes`, `points` and `masks` is given.

    boxes: [N, 4] float32 (x0, y0, x1, y1).
    points: [N, K, 2] float32 (x, y), with labels [N, K] int32: 1 foreground, 0 background, −1 padding.
    masks: [N, 4g, 4g] float32 logits of the padded input, as a decoder answers them (g: tokens a side, 64 for SAM).
    """

    boxes: np.ndarray | None = None
    points: np.ndarray | None = None
    labels: np.ndarray | None = None
    masks: np.ndarray | None = None

    def __len__(self) -> int:
        return next((len(given) for given in (self.boxes, self.points, self.masks) if given is not None), 0)

    def take(self, rows: slice) -> Prompts:
        return Prompts(*(None if x is None else x[rows] for x in (self.boxes, self.points, self.labels, self.masks)))

    def check(self, size: Size) -> None:
        """Shapes agree, numbers are finite, every box has an area and lies in the image, every point too.

        Raises:
            InvalidPrompt: names the first prompt that does not fit, and the image's size.
        """
        height, width = size
        if self.boxes is None and self.points is None and self.masks is None:
            raise InvalidPrompt("no prompt: give boxes, points with labels, or masks")
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
            check_clicks(self.points.shape[1])
            if self.boxes is not None and len(self.boxes) != len(self.points):
                raise InvalidPrompt(f"{len(self.boxes)} boxes but {len(self.points)} sets of points")
            if not np.isin(self.labels, (-1, 0, 1)).all():
                raise InvalidPrompt("labels must be 1 (foreground), 0 (background) or -1 (padding)")
            alone = self.boxes is None and self.masks is None
            if len(self.points) and not (self.labels >= 0).any(axis=1).all() and alone:
                raise InvalidPrompt("a set of points is all padding (labels -1)")
            real = self.points[self.labels >= 0]
            if not np.isfinite(self.points).all():
                raise InvalidPrompt("a point is not finite")
            outside = (real < 0).any(axis=1) | (real[:, 0] > width) | (real[:, 1] > height)
            if outside.any():
                point = real[outside][0].tolist()
                raise InvalidPrompt(f"point {point} lies outside the image of {width} × {height} pixels")
        if self.masks is not None:
            if self.masks.ndim != 3 or len(self.masks) != len(self):
                raise InvalidPrompt(f"masks must be [N, h, w] with N = {len(self)}, found {list(self.masks.shape)}")
            if self.masks.dtype.kind != "f" or not np.isfinite(self.masks).all():
                raise InvalidPrompt("masks must be finite floating-point logits")


def check_clicks(points: int) -> None:
    """Of one object. Raises InvalidPrompt."""
    if points > MAX_CLICKS:
        raise InvalidPrompt(f"{points} points for one object; the limit is {MAX_CLICKS}")


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """One image's prompts. `embedding` [256, g, g] float16 or float32; `original` (height, width) in pixels.
    `multimask` asks for three masks a prompt (whole, part, subpart) rather than one; `low_resolution` for masks as the
    decoder makes them, not enlarged; `logits` for what `Prompts.masks` takes, too."""

    embedding: np.ndarray
    original: Size
    prompts: Prompts
    multimask: bool = False
    low_resolution: bool = False
    logits: bool = False


@dataclass(frozen=True, slots=True)
class GridOptions:
    """Names, defaults and meaning of segment_anything's SamAutomaticMaskGenerator.

    points_per_side: the grid is its square.
    pred_iou_thresh, stability_score_thresh: masks below either are dropped; 0 or less drops none.
    box_nms_thresh: of two masks whose boxes overlap by a greater IoU, the one with the lower predicted IoU is dropped.
    stability_score_offset: logits above and below the cut that the stability score compares.
    crop_n_layers: layer n looks at 4ⁿ crops beside the whole image, each with an embedding of its own.
    crop_nms_thresh: as box_nms_thresh, between crops: the mask of the larger crop is dropped.
    crop_overlap_ratio: of the short side, shared by neighbours in the first layer; halved with each further one.
    crop_n_points_downscale_factor: layer n has points_per_side / factorⁿ points a side.
    min_mask_region_area: holes and islands of fewer pixels are removed.
    """

    points_per_side: int = 32
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    box_nms_thresh: float = 0.7
    stability_score_offset: float = 1.0
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0

    def check(self) -> None:
        """Raises InvalidInput: names the first option that is out of its range."""
        self._within("points_per_side", 1, MAX_GRID)
        self._within("pred_iou_thresh", -math.inf, math.inf)
        self._within("stability_score_thresh", -math.inf, math.inf)
        self._within("box_nms_thresh", 0, 1)
        self._within("stability_score_offset", 0, MAX_OFFSET)
        self._within("crop_n_layers", 0, MAX_CROP_LAYERS)
        self._within("crop_nms_thresh", 0, 1)
        self._within("crop_overlap_ratio", 0, MAX_OVERLAP)
        self._within("crop_n_points_downscale_factor", 1, MAX_GRID)
        self._within("min_mask_region_area", 0, MAX_REGION)
        sides = [self.side(layer) for layer in range(self.crop_n_layers + 1)]
        if not sides[-1]:
            raise InvalidInput(
                f"{self.points_per_side} points a side leave none in crop layer {self.crop_n_layers}; "
                "lower crop_n_points_downscale_factor"
            )
        points = sum(4**layer * side**2 for layer, side in enumerate(sides))
        if points > MAX_POINTS:
            raise InvalidInput(f"{points} points in all crops together; expected at most {MAX_POINTS}")

    def side(self, layer: int) -> int:
        """Points a side of each crop of a layer; layer 0 is the whole image."""
        return int(self.points_per_side / self.crop_n_points_downscale_factor**layer)

    def _within(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not low <= value <= high:  # NaN is nowhere
            raise InvalidInput(f"{name} is {value}; expected {low:g} to {high:g}")


@dataclass(frozen=True, slots=True)
class Crop:
    """A part of an image that a grid is laid over: `box` (x0, y0, x1, y1) in pixels of the image."""

    box: tuple[int, int, int, int]
    points_per_side: int

    @property
    def size(self) -> Size:
        x0, y0, x1, y1 = self.box
        return y1 - y0, x1 - x0

    def cut(self, pixels: np.ndarray, image_size: int) -> np.ndarray:
        """[height, width, 3] uint8 of the image → [h, w, 3] of the crop, its long side at `image_size`."""
        x0, y0, x1, y1 = self.box
        return resize(np.ascontiguousarray(pixels[y0:y1, x0:x1]), image_size).pixels

    def points(self) -> np.ndarray:
        """[points_per_side², 1, 2] float32 (x, y) in pixels of the image."""
        return point_grid(self.points_per_side, self.size) + np.array(self.box[:2], np.float32)


View = tuple[np.ndarray, Crop]
"""A crop, or the whole image, and its embedding [256, g, g] float16 or float32."""


def crops(size: Size, options: GridOptions) -> list[Crop]:
    """What automatic masks look at, in order: the whole image of (height, width), then each layer's crops.

    The crops of SamAutomaticMaskGenerator, without those that a very small image leaves empty.
    """
    height, width = size
    found = [Crop((0, 0, width, height), options.side(0))]
    for layer in range(1, options.crop_n_layers + 1):
        number = 2**layer
        overlap = int(options.crop_overlap_ratio * min(size) * (2 / number))
        high, wide = (math.ceil((overlap * (number - 1) + side) / number) for side in size)
        for column in range(number):
            for row in range(number):
                x, y = column * (wide - overlap), row * (high - overlap)
                if x < width and y < height:
                    box = x, y, min(x + wide, width), min(y + high, height)
                    found.append(Crop(box, options.side(layer)))
    return found


def point_grid(points_per_side: int, size: Size) -> np.ndarray:
    """[N², 1, 2] float32 (x, y): the centres of N × N equal cells of an image of (height, width)."""
    steps = (np.arange(points_per_side) + 0.5) / points_per_side
    x, y = np.meshgrid(steps * size[1], steps * size[0])
    return np.stack([x, y], axis=-1).reshape(-1, 1, 2).astype(np.float32)
