"""What goes out by HTTP: embeddings as bytes or npz; masks as JSON, PNG or a label map; errors."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import Response
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, Field

from cluster.errors import CellrayError, InvalidInput, Unauthorized
from serve_app.bodies import RAW, Logits
from serve_app.contract import Embedding, Made, ModelInfo, packed
from serve_app.model import masks
from serve_app.model.cell_masks import Cells
from serve_app.model.masks import MaskSet
from serve_app.model.preprocess import Size

NPZ, PNG = "application/x-npz", "image/png"
FOREVER = {"cache-control": "private, max-age=31536000, immutable", "vary": "accept"}


class Rle(BaseModel):
    size: tuple[int, int] = Field(description="height, width")
    counts: str = Field(description="COCO compressed run lengths, column-major")


class Mask(BaseModel):
    segmentation: Rle | None = Field(None, description="with encoding rle")
    png: str | None = Field(None, description="with encoding png: 8-bit grey, 0 and 255, in base64")
    bbox: tuple[float, float, float, float] = Field(description="x, y, width, height around the mask")
    area: int = Field(description="pixels")
    predicted_iou: float
    stability_score: float | None = Field(description="null of cells")
    prompt_index: int = Field(description="which prompt it answers")
    box_score: float | None = Field(None, description="of cells: what their box scored")
    logits: Logits | None = Field(None, description="where they were asked for")


class MasksAnswer(BaseModel):
    model: str
    trained: bool
    embedding_id: str
    image_id: str
    width: int = Field(description="of the image")
    height: int
    masks: list[Mask]


class Listed(BaseModel):
    """An image of the data sets."""

    image_id: str
    image_uri: str
    part: str = Field(description="which part of the file, empty for the whole")
    width: int
    height: int
    embedding_id: str
    model: str


class ImagesAnswer(BaseModel):
    images: list[Listed]
    next: str | None = Field(description="what to send as `after`; null at the end")


class ErrorBody(BaseModel):
    error: str = Field(description="one line")
    error_type: str = Field(description="a class of errors, which says more than the status")


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_TEXT = {"schema": {"type": "string"}}
_LATER = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds until it may be tried again"}}
_FACTS = ("embedding-id", "image-id", "original-size", "input-size", "shape", "dtype", "model", "trained")
Answers = dict[int | str, dict[str, Any]]
ERRORS: Answers = {status: {"model": ErrorBody} for status in (400, 401, 403, 404, 413, 415, 422, 429, 500, 503, 504)}
ERRORS[429] |= {"headers": _LATER}
# Where an ingress's own queue is full, Serve answers in its place, and in plain text.
ERRORS[503] |= {"headers": _LATER, "content": {"text/plain": _TEXT}}
FEW_ERRORS: Answers = {status: ERRORS[status] for status in (401, 429, 500, 503, 504)}
SAME: Answers = {304: {"description": "as If-None-Match"}}
METRICS_ANSWERS: Answers = {**FEW_ERRORS, 200: {"content": {"text/plain": _TEXT}}}
MODELS_ANSWERS: Answers = {
    **FEW_ERRORS,
    200: {
        "model": list[ModelInfo],
        "description": "and each with its embedding_shape, whether it finds cells, and a note if it is untrained",
    },
}
ONNX_ANSWERS: Answers = {**ERRORS, **SAME, 200: {"content": {RAW: _BINARY}}}
EMBEDDING_ANSWERS: Answers = {
    **ERRORS,
    200: {
        "description": "of one image bytes or npz, with `x-…` headers, sizes as height,width; of several npz",
        "content": {RAW: _BINARY, NPZ: _BINARY},
        "headers": {f"x-{name}": _TEXT for name in _FACTS},
    },
}
IMAGES_ANSWERS: Answers = {**ERRORS, 200: {"model": ImagesAnswer}}
PREVIEW_ANSWERS: Answers = {
    **ERRORS,
    **SAME,
    200: {"content": {"image/jpeg": _BINARY}},
    409: {"model": ErrorBody, "description": "the image is not what was embedded any more"},
}
MASKS_ANSWERS: Answers = {
    **ERRORS,
    200: {"model": MasksAnswer, "content": {PNG: _BINARY, RAW: _BINARY}, "description": "JSON, or a label map"},
}


def embedding(found: Embedding, info: ModelInfo, accept: str, pooled: bool = False) -> Response:
    """One embedding; with `pooled` no more than its mean over the image."""
    facts = _facts(found, info)
    array = found.pooled(info.patch) if pooled else found.array
    facts |= {"dtype": array.dtype.name, "shape": ",".join(map(str, array.shape))}
    headers = {f"x-{name}": value for name, value in facts.items()}
    headers["etag"] = tag(found.embedding_id, accept, pooled)
    if NPZ in accept:
        columns = {name.replace("-", "_"): np.array(value) for name, value in facts.items()}
        return Response(_npz({"pooled" if pooled else "embedding": array, **columns}), media_type=NPZ, headers=headers)
    return Response(array.astype(array.dtype.newbyteorder("<")).tobytes(), media_type=RAW, headers=headers)


def embeddings(
    found: Sequence[tuple[str, Embedding | CellrayError]], info: ModelInfo, accept: str, pooled: bool
) -> Response:
    """Several images' embeddings by their files' names, as one npz with a row each: one that failed has its error, and
    zeros.

    Raises:
        InvalidInput: another format was asked for.
    """
    if NPZ not in accept and accept not in ("", "*/*"):
        raise InvalidInput(f"several images are answered as {NPZ}; found Accept: {accept}")
    good = [one for _, one in found if isinstance(one, Embedding)]
    shape = (info.channels,) if pooled else info.embedding_shape
    array = np.zeros((len(found), *shape), np.float32 if pooled or not good else good[0].array.dtype)
    rows = []
    for row, (name, one) in zip(array, found, strict=True):
        facts = {"filename": name, "error": "", "error_type": "", "embedding_id": "", "image_id": ""}
        sizes = {"original_size": (0, 0), "input_size": (0, 0)}
        if isinstance(one, Embedding):
            row[:] = one.pooled(info.patch) if pooled else one.array
            facts |= {"embedding_id": one.embedding_id, "image_id": one.image_id}
            sizes = {"original_size": one.original, "input_size": one.input}
        else:
            facts |= {"error": str(one), "error_type": type(one).__name__}
        rows.append({**facts, **sizes})
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    made = {"model": info.name, "encoder_sha256": info.encoder_sha256, "preprocess": info.preprocess}
    columns |= {name: np.array(value) for name, value in made.items()}
    return Response(_npz({"pooled" if pooled else "embedding": array, **columns}), media_type=NPZ)


def _facts(found: Embedding, info: ModelInfo) -> dict[str, str]:
    return {
        "embedding-id": found.embedding_id,
        "image-id": found.image_id,
        "model": info.name,
        "encoder-sha256": info.encoder_sha256,
        "trained": str(info.trained).lower(),
        "preprocess": info.preprocess,
        "original-size": ",".join(map(str, found.original)),
        "input-size": ",".join(map(str, found.input)),
    }


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def tag(embedding_id: str, accept: str, pooled: bool = False) -> str:
    return f'"{embedding_id}{".pooled" if pooled else ""}{".npz" if NPZ in accept else ""}"'


def segmentation(
    found: MaskSet, embedding: Embedding, info: ModelInfo, accept: str, encoding: str, by_prompt: bool
) -> Response:
    """Masks in the format that `accept` asks for: JSON, or a label map as PNG or as raw uint16.

    In a label map object i is i + 1: of a prompt (`by_prompt`) its best mask, or the i-th mask; the smaller lie on top.
    """
    if is_map(accept):
        return _label_map(_plane(found, by_prompt), info, accept)
    made = [_mask(found, index, encoding) for index in range(len(found))]
    return JSONResponse(_answer(embedding, embedding.original, info, made))


def cells(found: Cells, made: Made, info: ModelInfo, accept: str, encoding: str) -> Response:
    """As `segmentation`, of an image's cells. Raises as that."""
    if is_map(accept):
        return _label_map(found.labels, info, accept)
    masks = found.masks()
    listed = [
        {**_mask(masks, index, encoding), "box_score": float(score)} for index, score in enumerate(found.box_scores)
    ]
    return JSONResponse(_answer(made, masks.size, info, listed))


def _answer(made: Embedding | Made, size: Size, info: ModelInfo, masks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": info.name,
        "trained": info.trained,
        "embedding_id": made.embedding_id,
        "image_id": made.image_id,
        "width": size[1],
        "height": size[0],
        "masks": masks,
    }


def is_map(accept: str) -> bool:
    """Whether a label map is asked for."""
    return PNG in accept or RAW in accept


def _mask(found: MaskSet, index: int, encoding: str) -> dict[str, Any]:
    mask: dict[str, Any] = {
        "bbox": found.boxes[index].tolist(),
        "area": int(found.areas[index]),
        "predicted_iou": float(found.predicted_iou[index]),
        "stability_score": None if np.isnan(found.stability[index]) else float(found.stability[index]),
        "prompt_index": int(found.prompt_index[index]),
    }
    if encoding == "png":
        (plane,) = masks.decode([found.counts[index]], found.size)
        mask["png"] = base64.b64encode(_png(plane.astype(np.uint8) * 255)).decode()
    else:
        mask["segmentation"] = {"size": found.size, "counts": found.counts[index]}
    if found.logits is not None:
        mask["logits"] = packed(found.logits[index])
    return mask


def _plane(found: MaskSet, by_prompt: bool) -> np.ndarray:
    rows = np.arange(len(found))
    if by_prompt:
        order = np.lexsort((-found.predicted_iou, found.prompt_index))  # each prompt's best first
        rows = order[np.unique(found.prompt_index[order], return_index=True)[1]]
    kept = found.take(rows)
    labels = (kept.prompt_index if by_prompt else rows) + 1
    return masks.label_map(kept.counts, kept.areas.tolist(), labels.tolist(), found.size)


def _label_map(plane: np.ndarray, info: ModelInfo, accept: str) -> Response:
    """[h, w] of any integer type."""
    if (most := int(plane.max(initial=0))) > np.iinfo(np.uint16).max:
        raise InvalidInput(f"{most} masks do not fit a label map of uint16; ask for JSON")
    plane = plane.astype(np.uint16)
    headers = {"x-model": info.name, "x-trained": str(info.trained).lower(), "x-dtype": "uint16"}
    headers["x-shape"] = ",".join(map(str, plane.shape))
    if PNG in accept:
        return Response(_png(plane), media_type=PNG, headers=headers)
    return Response(plane.astype("<u2").tobytes(), media_type=RAW, headers=headers)


def _png(plane: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(plane).save(file, "PNG", compress_level=1)
    return file.getvalue()


def error(error: CellrayError) -> JSONResponse:
    headers = {"retry-after": str(error.retry_after_s)} if error.retry else {}
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    body = {"error": str(error), "error_type": type(error).__name__}
    return JSONResponse(body, status_code=error.http_status, headers=headers)
