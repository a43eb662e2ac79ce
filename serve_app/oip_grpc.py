"""Open Inference Protocol v2 and health by gRPC: the methods that Serve's proxy calls on an ingress replica."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
import numpy as np
from anyio import to_thread

from cluster import draining, telemetry
from cluster.errors import CellrayError, Internal, InvalidInput, NotFound, TooLarge, Unavailable
from serve_app import oip
from serve_app.guard import Guard
from serve_app.oip_messages import NOT_SERVING, OIP, SERVING, classes, parsed
from serve_app.oip_tensors import NAMES, Given, raw
from serve_app.service import Service

log = logging.getLogger("ray.serve")

CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "BYTES": "bytes_contents",
}  # FP16 has none

OPEN = ("Check", "ServerLive", "ServerReady")  # to everybody: probes have no keys,
MOST_OPEN = 256  # bytes: and little to say
MOST_DETAILS = 1000  # characters: they travel in a header

Message = Any  # of `classes()`
Method = Callable[["GrpcMethods", Message], Awaitable[dict[str, Any]]]


def method(call: Method) -> Any:
    """`NameRequest` → the fields of `NameResponse`, as the method `Name` that Serve calls: bytes in, a message out, and
    errors as the call's status."""
    name = call.__name__

    async def answered(self: GrpcMethods, request: bytes, grpc_context: Any) -> Message:
        response, started, code, key = classes()[f"{name}Response"], time.perf_counter(), "OK", ""
        try:
            if draining.has_begun():
                raise Unavailable(draining.REASON)
            if name not in OPEN or len(request) > MOST_OPEN:
                key = self.guard.check_grpc(grpc_context)
            async with self.service.deadline():
                limit = self.service.limits.image_bytes
                if len(request) > limit:
                    raise TooLarge(f"the message is over the limit of {limit} bytes")
                return response(**await call(self, parsed(f"{name}Request", request)))
        except Exception as error:
            code = _refuse(grpc_context, name, error)
            return response()
        finally:
            _log(name, code, time.perf_counter() - started, key, len(request))

    return answered


def _refuse(context: Any, name: str, error: Exception) -> str:
    """→ its code. Not raised: Serve would log each refusal with a traceback."""
    if not isinstance(error, CellrayError):
        log.exception(f"gRPC {name} failed")
        error = Internal("an internal error; the service's log has the cause")
    context.set_code(grpc.StatusCode[error.grpc_code])
    context.set_details(str(error)[:MOST_DETAILS])
    if error.retry:
        context.set_trailing_metadata([("retry-after", str(error.retry_after_s))])
    return error.grpc_code


def _log(name: str, code: str, seconds: float, key: str, received: int) -> None:
    """As `journal` does for HTTP."""
    telemetry.observe(telemetry.REQUEST_SECONDS, seconds, route=name, status=code)
    telemetry.count(telemetry.BYTES_IN, received, route=name)
    facts = {"path": name, "status": code, "ms": round(1000 * seconds, 1), "key": key, "received": received}
    log.info("gRPC {path} {status} in {ms} ms".format_map(facts), extra=facts)


class GrpcMethods:
    """For a deployment that has these two. Method names are the protocol's."""

    guard: Guard
    service: Service

    @method
    async def Check(self, asked: Message) -> dict[str, Any]:
        """Of no service: this ingress is alive. Of the protocol's: every model can be asked."""
        if asked.service not in ("", OIP):
            raise NotFound(f"no service {asked.service[: oip.SHOWN]!r} here; there is {OIP}")
        return {"status": SERVING if not asked.service or await self._is_ready() else NOT_SERVING}

    @method
    async def ServerLive(self, _: Message) -> dict[str, Any]:
        return {"live": True}

    @method
    async def ServerReady(self, _: Message) -> dict[str, Any]:
        return {"ready": await self._is_ready()}

    @method
    async def ServerMetadata(self, _: Message) -> dict[str, Any]:
        return oip.server()

    @method
    async def RepositoryIndex(self, _: Message) -> dict[str, Any]:
        return {"models": oip.index(self.service)}

    @method
    async def ModelReady(self, asked: Message) -> dict[str, Any]:
        try:
            await oip.ready(self.service, asked.name, asked.version)
        except Unavailable:
            return {"ready": False}
        return {"ready": True}

    @method
    async def ModelMetadata(self, asked: Message) -> dict[str, Any]:
        return (await oip.model(self.service, asked.name, asked.version)).metadata()

    @method
    async def ModelInfer(self, asked: Message) -> dict[str, Any]:
        half = await oip.model(self.service, asked.model_name, asked.model_version)
        given = await to_thread.run_sync(tensors, asked)
        found = await oip.infer(self.service, half, given, _outputs(asked))
        facts = {"model_name": half.name, "model_version": oip.VERSION, "id": asked.id}
        return {**facts, **await to_thread.run_sync(_answered, found)}

    async def _is_ready(self) -> bool:
        try:
            await self.service.ready()
        except Unavailable:
            return False
        return True


def _outputs(asked: Message) -> list[str]:
    for output in asked.outputs:
        for parameter in output.parameters:
            raise InvalidInput(f"output {output.name}: parameter {parameter.key!r} is not supported here")
    return [output.name for output in asked.outputs]


def tensors(asked: Message) -> list[Given]:
    """Its tensors: all in `raw_input_contents`, or each in its own `contents`."""
    raws = list(asked.raw_input_contents)
    if raws and len(raws) != len(asked.inputs):
        raise InvalidInput(f"{len(asked.inputs)} inputs and {len(raws)} raw_input_contents: expected one for each")
    found = []
    for number, one in enumerate(asked.inputs):
        if raws and one.HasField("contents"):
            raise InvalidInput(f"input {one.name} has contents beside raw_input_contents: send one of both")
        values = [] if raws else getattr(one.contents, CONTENTS.get(one.datatype, "bytes_contents"))
        given = raws[number] if raws else None
        parameters = frozenset(parameter.key for parameter in one.parameters)
        found.append(Given(one.name, one.datatype, list(one.shape), given, values, parameters))
    return found


def _answered(found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    outputs = [{"name": name, "datatype": NAMES[one.dtype], "shape": one.shape} for name, one in found.items()]
    return {"outputs": outputs, "raw_output_contents": [raw(one) for one in found.values()]}
