"""Open Inference Protocol v2 by HTTP, with its binary extension: tensors as JSON, or as bytes behind the JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
from anyio import to_thread
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field, ValidationError

from cluster.errors import InvalidInput, TooLarge, UnsupportedImage
from cluster.settings import MIB
from serve_app import bodies, oip
from serve_app.answers import ERRORS
from serve_app.oip_tensors import MOST_VALUES, NAMES, Given, raw
from serve_app.service import Service

HEADER = "inference-header-content-length"  # bytes of JSON; tensors follow
MOST_JSON = 16 * MIB
MOST_TENSORS, MOST_AXES = 64, 8
BINARY_SIZE, BINARY, ALL_BINARY = "binary_data_size", "binary_data", "binary_data_output"
TAG: list[str | Enum] = ["Open Inference Protocol"]

Parameters = dict[str, Any]


class InputTensor(BaseModel):
    name: str
    datatype: str
    shape: list[int] = Field(max_length=MOST_AXES)
    parameters: Parameters = {}
    data: list[Any] | None = None


class OutputTensor(BaseModel):
    name: str
    parameters: Parameters = {}


class InferRequest(BaseModel):
    """The JSON of a request."""

    id: str = ""
    parameters: Parameters = {}
    inputs: list[InputTensor] = Field(max_length=MOST_TENSORS)
    outputs: list[OutputTensor] = Field([], max_length=MOST_TENSORS)

    def binary(self, name: str) -> bool:
        """Whether that output is to be bytes."""
        said = {one.name: one.parameters[BINARY] for one in self.outputs if BINARY in one.parameters}
        return said.get(name, self.parameters.get(ALL_BINARY)) is True


def add_routes(app: FastAPI, service: Service) -> None:
    """All below /v2."""

    @app.get("/v2", tags=TAG, summary="The server")
    async def server() -> dict[str, Any]:
        return oip.server()

    @app.get("/v2/health/live", tags=TAG, summary="This ingress is alive")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", tags=TAG, summary="Every model can be asked", responses={503: ERRORS[503]})
    async def ready() -> dict[str, bool]:
        await service.ready()
        return {"ready": True}

    @app.post("/v2/repository/index", tags=TAG, summary="The models")
    async def index() -> list[dict[str, str]]:
        return oip.index(service)

    @app.get("/v2/models/{name}", tags=TAG, summary="A model's tensors", responses=ERRORS)
    @app.get("/v2/models/{name}/versions/{version}", include_in_schema=False)
    async def model(name: str, version: str = "") -> dict[str, Any]:
        return (await oip.model(service, name, version)).metadata()

    @app.get("/v2/models/{name}/ready", tags=TAG, summary="A model answers", responses=ERRORS)
    @app.get("/v2/models/{name}/versions/{version}/ready", include_in_schema=False)
    async def model_ready(name: str, version: str = "") -> dict[str, Any]:
        await oip.ready(service, name, version)
        return {"name": name, "ready": True}

    @app.post("/v2/models/{name}/infer", tags=TAG, summary="Tensors to tensors", responses=ERRORS)
    @app.post("/v2/models/{name}/versions/{version}/infer", include_in_schema=False)
    async def infer(request: Request, name: str, version: str = "") -> Response:
        """`/v2/models/{name}` says which. Images, FP16 and whatever is large come and go as binary data."""
        half = await oip.model(service, name, version)
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise UnsupportedImage(f"content encoding {encoding!r}: send the body as it is")
        body = await bodies.whole(request, service.limits.image_bytes)
        asked, given = await to_thread.run_sync(parse, body, request.headers.get(HEADER))
        found = await oip.infer(service, half, given, [one.name for one in asked.outputs])
        return await to_thread.run_sync(answer, name, asked, found)


def parse(body: bytes, header: str | None) -> tuple[InferRequest, list[Given]]:
    """A request's body, of which the first `header` bytes are JSON, or all without one.

    Raises:
        InvalidInput: the JSON, or the sizes of the tensors behind it, are not as the protocol has them.
        TooLarge: the JSON is.
    """
    if header is not None and not (header.isascii() and header.isdigit() and int(header[:20]) <= len(body)):
        raise InvalidInput(f"{HEADER} is {header[:20]!r}; the body has {len(body)} bytes")
    end = len(body) if header is None else int(header)
    if end > MOST_JSON:
        raise TooLarge(f"{end} bytes of JSON; the limit is {MOST_JSON}: send tensors as binary data")
    try:
        asked = InferRequest.model_validate_json(body[:end])
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(f"request.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    given, view = [], memoryview(body)
    for one in asked.inputs:
        size, data = one.parameters.pop(BINARY_SIZE, None), None
        if (size is None) == (one.data is None):
            raise InvalidInput(
                f"input {one.name}: send it as data or as {BINARY_SIZE} bytes behind the JSON, one of both"
            )
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(body) - end:
                raise InvalidInput(f"input {one.name}: {BINARY_SIZE} is {size!r}; {len(body) - end} bytes are left")
            data, end = view[end : end + size], end + size
        given.append(Given(one.name, one.datatype, one.shape, data, one.data or [], frozenset(one.parameters)))
    if end != len(body):
        raise InvalidInput(f"{len(body) - end} bytes follow the last tensor")
    for output in asked.outputs:
        for parameter in output.parameters.keys() - {BINARY}:
            raise InvalidInput(f"output {output.name}: parameter {parameter!r} is not supported here")
    return asked, given


def answer(model: str, asked: InferRequest, found: Mapping[str, np.ndarray]) -> Response:
    """Raises InvalidInput: an output is too large for JSON."""
    outputs, parts = [], list[bytes]()
    for name, array in found.items():
        output: dict[str, Any] = {"name": name, "datatype": NAMES[array.dtype], "shape": list(array.shape)}
        if asked.binary(name):
            parts.append(raw(array))
            output["parameters"] = {BINARY_SIZE: len(parts[-1])}
        else:
            output["data"] = _values(name, array)
        outputs.append(output)
    echoed = {"id": asked.id} if asked.id else {}
    head = json.dumps({"model_name": model, "model_version": oip.VERSION, **echoed, "outputs": outputs}).encode()
    if not parts:
        return Response(head, media_type="application/json")
    return Response(b"".join((head, *parts)), media_type=bodies.RAW, headers={HEADER: str(len(head))})


def _values(name: str, array: np.ndarray) -> Sequence[Any]:
    if array.size > MOST_VALUES:
        raise InvalidInput(f"output {name} has {array.size} values: ask for it with the parameter {BINARY}: true")
    values = array.ravel().tolist()
    return [one.decode() for one in values] if array.dtype == object else values
