"""HTTP, thin, over Service: reads requests within bounds, answers in the formats below, maps errors to statuses."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import asdict, fields
from importlib.metadata import version
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from cluster.errors import CellrayError, Internal, InvalidInput, InvalidPrompt, TooLarge, UnsupportedImage
from serve_app.contract import Embedding, ModelInfo
from serve_app.model.masks import MaskSet
from serve_app.model.prompts import GridOptions, Prompts
from serve_app.service import Service, Stored

log = logging.getLogger("ray.serve")

NPZ, RAW = "application/x-npz", "application/octet-stream"
RETRY_AFTER_S = 2
FOREVER = {"cache-control": "private, max-age=31536000, immutable", "vary": "accept"}
NAMED = ("embedding_id", "image_id", "image_uri")
GRID_FIELDS = [field.name for field in fields(GridOptions)][1:]
UNTRAINED = "untrained: random weights, the numbers mean nothing"


class SegmentBody(BaseModel):
    """What to segment. Coordinates are original pixels, x to the right, y down. Boxes and points may be combined:
    then the i-th box and the i-th set of points describe one object. `grid` asks for every object instead."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"embedding_id": "9f86d081…", "boxes": [[120, 80, 310, 260]]}]},
    )

    embedding_id: str | None = Field(
        None,
        description="of an image embedded before; or its image_id, or image_uri; none if the image is sent",
    )
    image_id: str | None = Field(None, description="sha256 of an image's file, in hex")
    image_uri: str | None = Field(None, description="an image's name in one of the service's data sets")
    part: str = Field("", description="with image_uri, of an image that is there in parts: as in the column part")
    model: str | None = Field(None, description="the first one served, if left out")
    boxes: list[tuple[float, float, float, float]] | None = Field(None, description="x0, y0, x1, y1")
    points: list[list[tuple[float, float]]] | None = Field(None, description="for each object its points (x, y)")
    labels: list[list[Literal[-1, 0, 1]]] | None = Field(
        None, description="for each point 1 (on the object), 0 (off it) or -1 (ignored); all 1 if left out"
    )
    multimask: bool = Field(False, description="three masks a prompt: whole, part, subpart")
    grid: int | None = Field(None, description="points a side; finds all objects. Excludes boxes and points")
    pred_iou_thresh: float | None = Field(None, description="with grid, as all below: masks under it are dropped")
    stability_score_thresh: float | None = Field(None, description="masks under it are dropped")
    stability_score_offset: float | None = Field(None, description="logits above and below the cut that it compares")
    box_nms_thresh: float | None = Field(None, description="of two boxes with a greater IoU the worse mask is dropped")
    crop_n_layers: int | None = Field(None, description="layers of 4ⁿ crops to look at too; needs the image")
    crop_nms_thresh: float | None = Field(None, description="as box_nms_thresh, between crops")
    crop_overlap_ratio: float | None = Field(None, description="of the short side, between the first layer's crops")
    crop_n_points_downscale_factor: int | None = Field(None, description="layer n has grid / factorⁿ points a side")
    min_mask_region_area: int | None = Field(None, description="smaller holes and islands are removed; pixels")

    def stored(self) -> Stored | None:
        """None where the image is sent. Raises InvalidInput."""
        given = [name for name in NAMED if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidInput(f"{' and '.join(given)} were sent; expected one of them")
        if self.part and given != ["image_uri"]:
            raise InvalidInput("part goes with image_uri")
        return Stored(self.embedding_id, self.image_id, self.image_uri, self.part) if given else None

    def grid_options(self) -> GridOptions | None:
        """None without a grid."""
        given = {name: value for name in GRID_FIELDS if (value := getattr(self, name)) is not None}
        if self.grid is None:
            if given:
                raise InvalidPrompt(f"{next(iter(given))} goes with grid")
            return None
        if self.boxes is not None or self.points is not None:
            raise InvalidPrompt("grid excludes boxes and points")
        options = GridOptions(self.grid, **given)
        options.check()
        return options

    def prompts(self) -> Prompts:
        boxes = None if self.boxes is None else np.array(self.boxes, np.float32).reshape(-1, 4)
        if self.points is None:
            if self.labels is not None:
                raise InvalidPrompt("labels without points")
            return Prompts(boxes=boxes)
        labels = self.labels or [[1] * len(points) for points in self.points]
        if [len(x) for x in labels] != [len(x) for x in self.points]:
            raise InvalidPrompt("labels must have the same shape as points without their last axis")
        most = max(map(len, self.points), default=0)  # objects may have different numbers of points: padded with −1
        padded = [[*points, *[(0.0, 0.0)] * (most - len(points))] for points in self.points]
        flags = [[*row, *[-1] * (most - len(row))] for row in labels]
        return Prompts(
            boxes=boxes,
            points=np.array(padded, np.float32).reshape(len(padded), most, 2),
            labels=np.array(flags, np.int32).reshape(len(padded), most),
        )


class Rle(BaseModel):
    size: tuple[int, int] = Field(description="height, width")
    counts: str = Field(description="COCO compressed run lengths, column-major")


class Mask(BaseModel):
    segmentation: Rle
    bbox: tuple[float, float, float, float] = Field(description="x, y, width, height around the mask")
    area: int = Field(description="pixels")
    predicted_iou: float
    stability_score: float
    prompt_index: int = Field(description="which prompt it answers")


class SegmentAnswer(BaseModel):
    model: str
    trained: bool
    embedding_id: str
    image_id: str
    width: int
    height: int
    masks: list[Mask]


class ErrorBody(BaseModel):
    error: str
    error_type: str


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 404, 413, 415, 422, 500, 503, 504)
}
_IMAGE = {"schema": {"type": "string", "format": "binary"}}
EMBED_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": _IMAGE,
            "image/*": _IMAGE,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}
SEGMENT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": SegmentBody.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image", "request"],
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "request": {"type": "string", "description": "the JSON above, naming no image"},
                    },
                }
            },
        },
    }
}


def create_app(service: Service) -> FastAPI:
    """The application of one ingress replica."""
    app = FastAPI(
        title="Cellray",
        version=version("cellray"),
        description="Segment Anything embeddings and instance masks.",
        redoc_url=None,
    )
    app.exception_handler(CellrayError)(_error)
    app.exception_handler(RequestValidationError)(_invalid)
    app.middleware("http")(_timed)

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("docs")

    @app.get("/healthz", summary="This ingress is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Every model answers", responses={503: ERRORS[503]})
    async def readyz() -> dict[str, str]:
        await service.ready()
        return {"status": "ready"}

    @app.get("/v1/models", summary="The models that are served, their hashes, sizes and licences")
    async def models() -> list[dict[str, Any]]:
        return [
            {**asdict(info), "embedding_shape": info.embedding_shape, "note": None if info.trained else UNTRAINED}
            for info in await service.models()
        ]

    @app.post(
        "/v1/embed",
        summary="An image's embedding",
        responses={**ERRORS, 200: {"content": {RAW: _IMAGE, NPZ: _IMAGE}}},
        response_class=Response,
        openapi_extra=EMBED_BODY,
    )
    async def embed(request: Request, model: Annotated[str | None, Query()] = None) -> Response:
        """The body is the image file itself, or multipart with a part `image`. The answer is float16, C order,
        little-endian; its shape and ids stand in `x-…` headers. `Accept: application/x-npz` gives all as one npz."""
        image, _ = await _body(request, service.limits.image_bytes)
        if image is None:
            raise InvalidInput("no image: send the file as the body, or as the multipart part 'image'")
        embedding = await service.embed(image, model)
        return _embedding_response(embedding, await service.info(model), request.headers.get("accept", ""))

    @app.get(
        "/v1/embeddings/{embedding_id}",
        summary="An embedding made before",
        responses={**ERRORS, 200: {"content": {RAW: _IMAGE, NPZ: _IMAGE}}, 304: {"description": "as If-None-Match"}},
        response_class=Response,
    )
    async def embeddings(request: Request, embedding_id: str) -> Response:
        """As `/v1/embed` answers; what an id names never changes, so caches may keep it."""
        accept = request.headers.get("accept", "")
        tag = _tag(embedding_id, accept)
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers={"etag": tag, **FOREVER})
        embedding, info = await service.stored(Stored(embedding_id), None)
        response = _embedding_response(embedding, info, accept)
        response.headers.update(FOREVER)
        return response

    @app.post(
        "/v1/segment",
        summary="Masks from boxes, points or a grid",
        responses=ERRORS,
        response_model=SegmentAnswer,
        openapi_extra=SEGMENT_BODY,
    )
    async def segment(request: Request) -> SegmentAnswer:
        """JSON that names an image embedded before, by `embedding_id`, `image_id` or `image_uri`, which never runs the
        encoder; or multipart with parts `image` and `request`."""
        image, text = await _body(request, service.limits.image_bytes)
        body = _parse(text)
        options, stored = body.grid_options(), body.stored()
        if stored and image is None:
            embedding, info = await service.stored(stored, body.model)
        elif image is not None and not stored:
            embedding, info = await service.embed(image, body.model), await service.info(body.model)
        else:
            raise InvalidInput(f"send either an image (multipart) or one of {', '.join(NAMED)}, not both, not neither")
        if options:
            found = await service.automask(embedding, info, options, image)
        else:
            found = await service.segment(embedding, info.name, body.prompts(), body.multimask)
        return _segment_answer(found, embedding, info)

    return app


def _embedding_response(embedding: Embedding, info: ModelInfo, accept: str) -> Response:
    facts = {
        "embedding-id": embedding.embedding_id,
        "image-id": embedding.image_id,
        "model": info.name,
        "encoder-sha256": info.encoder_sha256,
        "trained": str(info.trained).lower(),
        "preprocess": info.preprocess,
        "dtype": embedding.array.dtype.name,
        "shape": ",".join(map(str, embedding.array.shape)),
        "original-size": ",".join(map(str, embedding.original)),
        "input-size": ",".join(map(str, embedding.input)),
    }
    headers = {f"x-{name}": value for name, value in facts.items()}
    headers["etag"] = _tag(embedding.embedding_id, accept)
    if NPZ in accept:
        file = io.BytesIO()
        arrays = {name.replace("-", "_"): np.array(value) for name, value in facts.items()}
        np.savez(file, embedding=embedding.array, **arrays)  # type: ignore[arg-type]
        return Response(file.getvalue(), media_type=NPZ, headers=headers)
    ordered = embedding.array.astype(embedding.array.dtype.newbyteorder("<"))
    return Response(ordered.tobytes(), media_type=RAW, headers=headers)


def _tag(embedding_id: str, accept: str) -> str:
    return f'"{embedding_id}{".npz" if NPZ in accept else ""}"'


def _segment_answer(found: MaskSet, embedding: Embedding, info: ModelInfo) -> SegmentAnswer:
    height, width = embedding.original
    return SegmentAnswer(
        model=info.name,
        trained=info.trained,
        embedding_id=embedding.embedding_id,
        image_id=embedding.image_id,
        width=width,
        height=height,
        masks=[
            Mask(
                segmentation=Rle(size=found.size, counts=found.counts[index]),
                bbox=tuple(found.boxes[index].tolist()),
                area=int(found.areas[index]),
                predicted_iou=float(found.predicted_iou[index]),
                stability_score=float(found.stability[index]),
                prompt_index=int(found.prompt_index[index]),
            )
            for index in range(len(found))
        ],
    )


def _parse(text: str | None) -> SegmentBody:
    if text is None:
        raise InvalidInput("no request: send JSON, or multipart with the parts 'image' and 'request'")
    try:
        return SegmentBody.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidPrompt(f"request.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


async def _body(request: Request, limit: int) -> tuple[bytes | None, str | None]:
    """(image, JSON text) of a request of at most `limit` bytes, counted as they arrive."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    stream = _bounded(request, limit)
    if kind == "multipart/form-data":
        return await _multipart(MultiPartParser(request.headers, stream, max_files=1, max_fields=4))
    data = b"".join([chunk async for chunk in stream])
    if kind == "application/json":
        return None, data.decode(errors="replace")
    if kind in ("", RAW, "application/x-www-form-urlencoded") or kind.startswith("image/"):  # the third is curl's
        return data or None, None
    raise UnsupportedImage(f"content type {kind!r}: send image/…, {RAW}, multipart/form-data or application/json")


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


async def _multipart(parser: MultiPartParser) -> tuple[bytes | None, str | None]:
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:  # KeyError: a content type without its boundary
        raise InvalidInput(f"the multipart body is malformed: {getattr(error, 'message', error)}") from error
    try:
        image, text = form.get("image"), form.get("request")
        if image is not None and not isinstance(image, UploadFile):
            raise InvalidInput("the part 'image' must be a file, with a filename")
        if isinstance(text, UploadFile):
            raise InvalidInput("the part 'request' must be a text field, without a filename")
        return (await image.read() if image else None), text
    finally:
        await form.close()


async def _error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, CellrayError)
    headers = {"retry-after": str(RETRY_AFTER_S)} if error.retry else {}
    body = {"error": str(error), "error_type": type(error).__name__}
    return JSONResponse(body, status_code=error.http_status, headers=headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return await _error(request, InvalidInput(f"{'.'.join(map(str, first['loc']))}: {first['msg']}"))


async def _timed(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
    """Adds x-total-time (milliseconds), and turns a defect of ours into JSON without its traceback."""
    start = time.perf_counter()
    try:
        response = await call(request)
    except Exception:
        log.exception(f"{request.method} {request.url.path} failed")
        response = await _error(request, Internal("an internal error; the service's log has the cause"))
    response.headers["x-total-time"] = f"{1000 * (time.perf_counter() - start):.1f}"
    return response
