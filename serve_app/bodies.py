"""What comes in by HTTP: bodies read within their bounds, and the JSON that they hold."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

import numpy as np
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from cluster.errors import InvalidInput, InvalidPrompt, TooLarge, UnsupportedImage
from cluster.settings import MIB
from serve_app import contract
from serve_app.model.cellsam import BLOCK_SIZES, Options
from serve_app.model.prompts import (
    MAX_CROP_LAYERS,
    MAX_GRID,
    MAX_OFFSET,
    MAX_OVERLAP,
    MAX_REGION,
    GridOptions,
    Prompts,
    check_clicks,
)
from serve_app.service import Stored

IMAGES = 64  # most in one body
JSON_BYTES = 16 * MIB  # as many logits as a request may have are 11 MB; parsed, JSON takes many times its length
RAW = "application/octet-stream"
NAMED = ("embedding_id", "image_id", "image_uri")
OPTIONS = [option.name for option in fields(Options)]
PROMPTED = ("boxes", "points", "labels", "masks", "multimask", "resolution", "logits")  # not with prompts: cells


def _within(low: float, high: float, description: str) -> Any:
    """What the options check, documented."""
    return Field(None, description=description, json_schema_extra={"minimum": low, "maximum": high})


class Logits(BaseModel):
    """A mask as the decoder makes it, before it is enlarged: what it takes to refine it with a next click."""

    model_config = ConfigDict(extra="forbid", strict=True)

    shape: tuple[int, int] = Field(description="rows, columns, of the padded input: 256 × 256 for SAM")
    data: str = Field(description="float16, little-endian, C order, in base64")

    def array(self) -> np.ndarray:
        """[h, w] float32. Raises InvalidPrompt."""
        try:
            return contract.unpacked(self.shape, self.data).astype(np.float32)
        except ValueError as error:
            raise InvalidPrompt(f"a mask's data is not base64 of {self.shape} float16 numbers: {error}") from error


class ImageBody(BaseModel):
    """The image that is meant: sent beside this, or embedded before and named by one of three."""

    model_config = ConfigDict(extra="forbid", strict=True)

    embedding_id: str | None = Field(
        None,
        description="of an image embedded before; or its image_id, or image_uri; none if the image is sent",
    )
    image_id: str | None = Field(None, description="sha256 of an image's file, in hex")
    image_uri: str | None = Field(None, description="an image's name in one of the service's data sets")
    part: str = Field("", description="with image_uri, of an image that is there in parts: as in the column part")
    model: str | None = Field(None, description="the first one served, if left out")
    encoding: Literal["rle", "png"] = Field("rle", description="of a mask in JSON: COCO RLE, or a PNG of 0 and 255")

    def stored(self) -> Stored | None:
        """None where the image is sent. Raises InvalidInput."""
        given = [name for name in NAMED if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidInput(f"{' and '.join(given)} were sent; expected one of them")
        if self.part and given != ["image_uri"]:
            raise InvalidInput("part goes with image_uri")
        return Stored(self.embedding_id, self.image_id, self.image_uri, self.part) if given else None

    @classmethod
    def parse(cls, text: str | None) -> Self:
        """Raises InvalidInput, InvalidPrompt: names the first key that does not fit."""
        if text is None:
            raise InvalidInput("no request: send JSON, or multipart with the parts 'image' and 'request'")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            raise InvalidPrompt(f"request.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


class SegmentBody(ImageBody):
    """What to segment. Coordinates are original pixels, x to the right, y down. Boxes, points and masks may be
    combined: then the i-th of each describe one object."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"embedding_id": "9f86d081…", "boxes": [[120, 80, 310, 260]]},
                {"image_uri": "s3://in/plates/a1.tif", "points": [[[200, 150], [20, 30]]], "labels": [[1, 0]]},
                {"prompts": "cells", "bbox_threshold": 0.3, "model": "cellsam_general"},
            ]
        },
    )

    boxes: list[tuple[float, float, float, float]] | None = Field(None, description="x0, y0, x1, y1")
    points: list[list[tuple[float, float]]] | None = Field(None, description="for each object its points (x, y)")
    labels: list[list[Literal[-1, 0, 1]]] | None = Field(
        None, description="for each point 1 (on the object), 0 (off it) or -1 (ignored); all 1 if left out"
    )
    masks: list[Logits] | None = Field(None, description="for each object the `logits` of an earlier answer")
    multimask: bool = Field(False, description="three masks a prompt: whole, part, subpart")
    resolution: Literal["full", "low"] = Field(
        "full", description="low: as the decoder makes them, a quarter of its input; bbox and area are in those pixels"
    )
    logits: bool = Field(False, description="answer each mask's logits too, to send them back as masks")
    prompts: Literal["cells"] | None = Field(
        None,
        description="every cell, found by a CellSAM, in place of boxes, points and masks; of an image that is sent, or "
        "named by its image_id. The options below go with it, and have the names of CellSAM's own pipeline",
    )
    bbox_threshold: float | None = _within(0, 1, "score of boxes; lower finds more cells")
    low_contrast_enhancement: bool | None = Field(None, description="brighten images of little contrast first")
    use_wsi: bool | None = Field(None, description="cut images larger than block_size into tiles; true if left out")
    gauge_cell_size: bool | None = Field(None, description="images of large cells are done again as a whole")
    block_size: int | None = _within(*BLOCK_SIZES, "of tiles, a side in pixels")
    overlap: int | None = _within(0, BLOCK_SIZES[1] // 2, "pixels that tiles see beyond their own on all sides")
    compat: bool | None = Field(None, description="as CellSAM's own pipeline does it where this does better")
    iou_threshold: float | None = _within(0, 1, "of what two tiles see: from it on, cells across their seam are one")

    def cells(self) -> Options | None:
        """What goes with `prompts: cells`; None where that is not asked for. Raises InvalidPrompt, InvalidInput."""
        given = {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}
        if self.prompts is None:
            if given:
                raise InvalidPrompt(f"{', '.join(given)}: only with prompts: cells")
            return None
        beside = [name for name in PROMPTED if getattr(self, name) not in (None, False, "full")]
        if beside:
            raise InvalidPrompt(f"prompts: cells finds every cell by itself: leave out {', '.join(beside)}")
        options = Options(**given)
        options.check()
        return options

    def asked(self, limit: int) -> Prompts:
        """At most `limit`. Raises InvalidPrompt."""
        count = max(len(given or ()) for given in (self.boxes, self.points, self.masks))
        if count > limit:
            raise InvalidPrompt(f"{count} prompts for one image; the limit is {limit}")
        boxes = None if self.boxes is None else np.array(self.boxes, np.float32).reshape(-1, 4)
        masks = None if self.masks is None else _stack([mask.array() for mask in self.masks])
        if self.points is None:
            if self.labels is not None:
                raise InvalidPrompt("labels without points")
            return Prompts(boxes=boxes, masks=masks)
        labels = self.labels or [[1] * len(points) for points in self.points]
        if [len(x) for x in labels] != [len(x) for x in self.points]:
            raise InvalidPrompt("labels must have the same shape as points without their last axis")
        most = max(map(len, self.points), default=0)  # objects may have different numbers of points: padded with −1
        check_clicks(most)
        padded = [[*points, *[(0.0, 0.0)] * (most - len(points))] for points in self.points]
        flags = [[*row, *[-1] * (most - len(row))] for row in labels]
        return Prompts(
            boxes=boxes,
            points=np.array(padded, np.float32).reshape(len(padded), most, 2),
            labels=np.array(flags, np.int32).reshape(len(padded), most),
            masks=masks,
        )


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    if len({array.shape for array in arrays}) > 1:
        raise InvalidPrompt("masks have different shapes")
    return np.stack(arrays) if arrays else np.zeros((0, 0, 0), np.float32)


class AutomaskBody(ImageBody):
    """Find every object, from a grid of points. Names and meaning are those of segment_anything's
    SamAutomaticMaskGenerator; what is left out has its default."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"embedding_id": "9f86d081…", "points_per_side": 32}]})

    points_per_side: int | None = _within(1, MAX_GRID, "the grid is its square")
    pred_iou_thresh: float | None = Field(None, description="masks under it are dropped")
    stability_score_thresh: float | None = Field(None, description="masks under it are dropped")
    stability_score_offset: float | None = _within(
        0, MAX_OFFSET, "logits above and below the cut that the stability score compares"
    )
    box_nms_thresh: float | None = _within(0, 1, "of two boxes with a greater IoU the worse mask is dropped")
    crop_n_layers: int | None = _within(0, MAX_CROP_LAYERS, "layers of 4ⁿ crops to look at too; needs the image")
    crop_nms_thresh: float | None = _within(0, 1, "as box_nms_thresh, between crops")
    crop_overlap_ratio: float | None = _within(
        0, MAX_OVERLAP, "of the short side, shared by neighbours in the first layer"
    )
    crop_n_points_downscale_factor: int | None = _within(1, MAX_GRID, "layer n has points / factorⁿ a side")
    min_mask_region_area: int | None = _within(0, MAX_REGION, "smaller holes and islands are removed; pixels")

    def options(self) -> GridOptions:
        """Raises InvalidInput."""
        names = [option.name for option in fields(GridOptions)]
        options = GridOptions(**{name: value for name in names if (value := getattr(self, name)) is not None})
        options.check()
        return options


@dataclass
class Sent:
    """A body's parts: images by their files' names, and the text of its JSON."""

    images: list[tuple[str, bytes]] = field(default_factory=list)
    text: str | None = None

    def image(self) -> bytes | None:
        """The only one. Raises InvalidInput where there are several."""
        if len(self.images) > 1:
            raise InvalidInput(f"{len(self.images)} images were sent; expected one")
        return self.images[0][1] if self.images else None


async def read(request: Request, limit: int) -> Sent:
    """A body of at most `limit` bytes, counted as they arrive.

    Raises:
        TooLarge, InvalidInput, UnsupportedImage: neither an image nor multipart nor JSON.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        stream = _bounded(request, limit)
        return await _multipart(
            MultiPartParser(request.headers, stream, max_files=IMAGES, max_fields=4, max_part_size=JSON_BYTES)
        )
    if kind == "application/json":
        return Sent(text=(await whole(request, min(limit, JSON_BYTES))).decode(errors="replace"))
    data = await whole(request, limit)
    if kind in ("", RAW, "application/x-www-form-urlencoded") or kind.startswith("image/"):  # the third is curl's
        return Sent([("", data)] if data else [])
    raise UnsupportedImage(f"content type {kind!r}: send image/…, {RAW}, multipart/form-data or application/json")


async def whole(request: Request, limit: int) -> bytes:
    """Raises TooLarge."""
    return b"".join([chunk async for chunk in _bounded(request, limit)])


async def _bounded(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    declared = request.headers.get("content-length", "")
    seen = int(declared) if declared.isdigit() and int(declared) > limit else 0
    if not seen:
        async for chunk in request.stream():
            seen += len(chunk)
            if seen > limit:
                break
            yield chunk
    if seen > limit:
        raise TooLarge(f"the body is over the limit of {limit} bytes")


async def _multipart(parser: MultiPartParser) -> Sent:
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:  # KeyError: a content type without its boundary
        raise InvalidInput(f"the multipart body is malformed: {getattr(error, 'message', error)}") from error
    try:
        text = form.get("request")
        if isinstance(text, UploadFile):
            raise InvalidInput("the part 'request' must be a text field, without a filename")
        return Sent([(file.filename or "", await file.read()) for file in _files(form.getlist("image"))], text)
    finally:
        await form.close()


def _files(parts: list[UploadFile | str]) -> Iterator[UploadFile]:
    for part in parts:
        if not isinstance(part, UploadFile):
            raise InvalidInput("the part 'image' must be a file, with a filename")
        yield part


def documented(schema: dict[str, Any] | None) -> dict[str, Any]:
    """OpenAPI of a body: an image, with the JSON of `schema` beside it or in its place where there is one."""
    image = {"type": "string", "format": "binary"}
    images = {"type": "array", "items": image, "minItems": 1, "maxItems": IMAGES}
    form: dict[str, Any] = {"type": "object", "required": ["image"], "properties": {"image": images}}
    content: dict[str, Any] = {"multipart/form-data": {"schema": form}}
    if schema is None:
        content[RAW] = content["image/*"] = {"schema": image}
    else:
        form |= {"required": ["request"], "properties": {"image": image, "request": schema}}
        content["multipart/form-data"]["encoding"] = {"request": {"contentType": "application/json"}}
        content["application/json"] = {"schema": schema}
    return {"requestBody": {"required": True, "content": content}}
