"""Open Inference Protocol v2 without its transports: tensors, and a `NAME-encoder` and `NAME-decoder` for each model.

What they take and give stands in `_encoder` and `_decoder`, and is what a client reads as a model's metadata.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version as version_of
from typing import Any

import numpy as np
from anyio import to_thread

from cluster.errors import CellrayError, InvalidInput, InvalidPrompt, NotFound, TooLarge
from serve_app import contract
from serve_app.contract import ModelInfo
from serve_app.model import preprocess
from serve_app.model.masks import MaskSet
from serve_app.model.prompts import DecodeRequest, Prompts
from serve_app.oip_tensors import ANY, BYTES, Given, Tensor, read
from serve_app.service import LOGITS, Service, Stored, foreign

SERVER, PLATFORM, VERSION = "cellray", "cellray_sam", "1"
EXTENSIONS = ("binary_tensor_data", "model_repository")
SHOWN = 100  # characters of what was sent, in an error
POINTS = 1024  # most for one object: what the decoder holds grows with them

Arrays = dict[str, np.ndarray]
Run = Callable[[Service, ModelInfo, Arrays, Sequence[str]], Awaitable[Arrays]]


@dataclass(frozen=True)
class Model:
    """One half of a served model, as clients of the protocol see it."""

    name: str
    info: ModelInfo
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    run: Run = field(repr=False)

    def metadata(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": PLATFORM,
            "inputs": [one.metadata() for one in self.inputs],
            "outputs": [one.metadata() for one in self.outputs],
        }


Make = Callable[[str, ModelInfo], Model]


def server() -> dict[str, Any]:
    return {"name": SERVER, "version": version_of("cellray"), "extensions": list(EXTENSIONS)}


def index(service: Service) -> list[dict[str, str]]:
    """The models that there are, as a model repository's index."""
    return [{"name": name, "version": VERSION, "state": "READY", "reason": ""} for name in _halves(service)]


async def model(service: Service, name: str, version: str = "") -> Model:
    """Raises NotFound, Unavailable."""
    halves = _halves(service)
    if name not in halves:
        raise NotFound(f"model {name[:SHOWN]!r} is not served here; there are {', '.join(halves)}")
    if version not in ("", VERSION):
        raise NotFound(f"model {name} has no version {version[:SHOWN]!r}, only {VERSION}")
    whole, make = halves[name]
    return make(name, await service.info(whole))


async def ready(service: Service, name: str, version: str = "") -> None:
    """One of its replicas has answered. Raises NotFound, Unavailable."""
    found = await model(service, name, version)
    handles = service.encoders if found.run is _embed else service.decoders
    try:
        await handles[found.info.name].info.remote()
    except Exception as error:
        raise foreign(error) from error


async def infer(service: Service, model: Model, given: Sequence[Given], outputs: Sequence[str]) -> Arrays:
    """The named outputs, all if none is named.

    Raises:
        InvalidInput: an input or output that the model does not have, or that does not fit; names it.
        And whatever `Service` raises.
    """
    there = [one.name for one in model.outputs]
    for name in outputs:
        if name not in there:
            raise InvalidInput(f"{model.name} has no output {name[:SHOWN]!r}; there are {', '.join(there)}")
    arrays = await to_thread.run_sync(_read, model, given)
    wanted = [name for name in there if name in outputs or not outputs]
    return await model.run(service, model.info, arrays, wanted)


def _halves(service: Service) -> dict[str, tuple[str, Make]]:
    halves = dict[str, tuple[str, Make]]()
    for name in service.names:
        halves[contract.encoder_deployment(name)] = name, _encoder
        halves[contract.decoder_deployment(name)] = name, _decoder
    return halves


def _encoder(name: str, info: ModelInfo) -> Model:
    return Model(
        name,
        info,
        inputs=(Tensor("image", (BYTES,), (ANY,)),),  # image files, up to IMAGES
        outputs=(
            Tensor("embedding", ("FP16",), (ANY, *info.embedding_shape)),
            Tensor("embedding_id", (BYTES,), (ANY,)),
            Tensor("original_size", ("INT64",), (ANY, 2)),  # height, width
            Tensor("input_size", ("INT64",), (ANY, 2)),  # height, width: the rest of the model's input is padding
        ),
        run=_embed,
    )


def _decoder(name: str, info: ModelInfo) -> Model:
    side = 4 * info.embedding_shape[1]
    return Model(
        name,
        info,
        inputs=(
            Tensor("embedding_id", (BYTES,), (1,)),  # or the next two
            Tensor("embedding", ("FP16", "FP32"), (1, *info.embedding_shape)),
            Tensor("original_size", ("INT64",), (2,)),
            Tensor("boxes", ("FP32",), (ANY, 4)),  # x0, y0, x1, y1 in pixels of the original
            Tensor("points", ("FP32",), (ANY, ANY, 2)),  # for each object its points x, y
            Tensor("labels", ("INT32",), (ANY, ANY)),  # 1 on it, 0 off it, -1 none; all 1 if left out
            Tensor("masks", ("FP16", "FP32"), (ANY, side, side)),  # `logits` of an earlier answer
            Tensor("multimask", ("BOOL",), (1,)),  # three masks a prompt: whole, part, subpart
        ),
        outputs=(
            Tensor("masks", ("UINT8",), (ANY, ANY, ANY)),  # 0 and 1, in the original's size
            Tensor("rle", (BYTES,), (ANY,)),  # COCO's compressed run lengths of the same
            Tensor("bbox", ("FP32",), (ANY, 4)),  # x, y, width, height
            Tensor("area", ("INT64",), (ANY,)),
            Tensor("predicted_iou", ("FP32",), (ANY,)),
            Tensor("stability_score", ("FP32",), (ANY,)),
            Tensor("prompt_index", ("INT32",), (ANY,)),
            Tensor("logits", ("FP16",), (ANY, side, side)),
        ),
        run=_segment,
    )


async def _embed(service: Service, info: ModelInfo, given: Arrays, wanted: Sequence[str]) -> Arrays:
    images = given["image"].tolist() if "image" in given else []
    if not images:
        raise InvalidInput("no image: send one image file or more as the input 'image'")
    made = await service.embed_many(images, info.name)
    for number, one in enumerate(made):
        if isinstance(one, CellrayError):
            raise one if len(made) == 1 else type(one)(f"image {number}: {one}")
    columns: dict[str, Callable[[Any], Any]] = {
        "embedding": lambda one: one.array,
        "embedding_id": lambda one: one.embedding_id.encode(),
        "original_size": lambda one: one.original,
        "input_size": lambda one: one.input,
    }
    dtypes = {"embedding_id": object, "original_size": np.int64, "input_size": np.int64}

    def stacked() -> Arrays:
        return {name: np.array([columns[name](one) for one in made], dtypes.get(name)) for name in wanted}

    return await to_thread.run_sync(stacked)


async def _segment(service: Service, info: ModelInfo, given: Arrays, wanted: Sequence[str]) -> Arrays:
    prompts, multimask = _prompts(given), bool(given.get("multimask", np.zeros(1))[0])
    most = len(prompts) * (3 if multimask else 1)
    if "logits" in wanted and most > LOGITS:
        raise TooLarge(f"logits of {most} masks; the limit is {LOGITS}: name the other outputs that you want")
    array, original = await _embedding(service, info, given)
    if "masks" in wanted and most * math.prod(original) > service.limits.image_bytes:
        raise TooLarge(
            f"{most} masks of {original[1]} × {original[0]} pixels are over the limit of {service.limits.image_bytes} "
            "bytes: ask for rle, or for fewer"
        )
    request = DecodeRequest(array, original, prompts, multimask, logits="logits" in wanted)
    found = await service.segment(request, info.name)
    return await to_thread.run_sync(_columns, found, wanted, 4 * info.embedding_shape[1])


def _columns(found: MaskSet, wanted: Sequence[str], side: int) -> Arrays:
    columns: dict[str, Callable[[], np.ndarray]] = {
        "masks": lambda: found.decode().view(np.uint8),
        "rle": lambda: np.array([counts.encode() for counts in found.counts], object),
        "bbox": lambda: found.boxes,
        "area": lambda: found.areas,
        "predicted_iou": lambda: found.predicted_iou,
        "stability_score": lambda: found.stability,
        "prompt_index": lambda: found.prompt_index,
        "logits": lambda: np.zeros((0, side, side), np.float16) if found.logits is None else found.logits,
    }
    return {name: columns[name]() for name in wanted}


async def _embedding(service: Service, info: ModelInfo, given: Arrays) -> tuple[np.ndarray, preprocess.Size]:
    """[C, g, g], and the original image's size."""
    sent = [name for name in ("embedding_id", "embedding", "original_size") if name in given]
    if sent == ["embedding_id"]:
        text = given["embedding_id"][0].decode(errors="replace")
        found, _ = await service.stored(Stored(text), info.name)
        return found.array, found.original
    if sent != ["embedding", "original_size"]:
        raise InvalidInput(
            f"expected embedding_id, or embedding and original_size, found {' and '.join(sent) or 'none of them'}"
        )
    height, width = given["original_size"].tolist()
    preprocess.check_size(width, height, service.limits.image_pixels)
    return given["embedding"][0], (height, width)


def _prompts(given: Mapping[str, np.ndarray]) -> Prompts:
    points, labels, masks = given.get("points"), given.get("labels"), given.get("masks")
    if points is not None and points.shape[1] > POINTS:
        raise InvalidPrompt(f"{points.shape[1]} points for an object; the limit is {POINTS}")
    if points is not None and labels is None:
        labels = np.ones(points.shape[:2], np.int32)
    return Prompts(given.get("boxes"), points, labels, None if masks is None else masks.astype(np.float32))


def _read(model: Model, given: Sequence[Given]) -> Arrays:
    there, arrays = {one.name: one for one in model.inputs}, dict[str, np.ndarray]()
    for one in given:
        if one.name not in there:
            raise InvalidInput(f"{model.name} has no input {one.name[:SHOWN]!r}; there are {', '.join(there)}")
        if one.name in arrays:
            raise InvalidInput(f"input {one.name} was sent twice")
        for parameter in one.parameters:
            raise InvalidInput(f"input {one.name}: parameter {parameter!r} is not supported here")
        arrays[one.name] = read(one, there[one.name])
    return arrays
