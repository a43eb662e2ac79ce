"""The messages of the Open Inference Protocol's gRPC service, and of gRPC's health service, without generated code.

Field numbers are those of the protocols' published definitions. Messages that are nested there stand on their own
here, a map is its entries, and the choices of a `oneof` are plain fields: all the same on the wire. This module is
what Serve's proxy loads, and so loads little itself.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from cluster.errors import InvalidInput, TooLarge

PACKAGE = "cellray"
OIP, HEALTH = "inference.GRPCInferenceService", "grpc.health.v1.Health"
SERVICES = {
    OIP: ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelInfer",
          "RepositoryIndex"),
    HEALTH: ("Check",),
}  # fmt: skip
MESSAGES = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "bool live",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "bool ready",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "string name, string version, repeated string extensions",
    "ModelReadyRequest": "string name, string version",
    "ModelReadyResponse": "bool ready",
    "ModelMetadataRequest": "string name, string version",
    "ModelMetadataResponse": "string name, repeated string versions, string platform, "
    "repeated TensorMetadata inputs, repeated TensorMetadata outputs",
    "TensorMetadata": "string name, string datatype, repeated int64 shape",
    "ModelInferRequest": "string model_name, string model_version, string id, repeated Parameter parameters, "
    "repeated InferInputTensor inputs, repeated InferRequestedOutputTensor outputs, repeated bytes raw_input_contents",
    "InferInputTensor": "string name, string datatype, repeated int64 shape, repeated Parameter parameters, "
    "InferTensorContents contents",
    "InferRequestedOutputTensor": "string name, repeated Parameter parameters",
    "ModelInferResponse": "string model_name, string model_version, string id, repeated Parameter parameters, "
    "repeated InferOutputTensor outputs, repeated bytes raw_output_contents",
    "InferOutputTensor": "string name, string datatype, repeated int64 shape",
    "InferTensorContents": "repeated bool bool_contents, repeated int32 int_contents, repeated int64 int64_contents, "
    "repeated uint32 uint_contents, repeated uint64 uint64_contents, repeated float fp32_contents, "
    "repeated double fp64_contents, repeated bytes bytes_contents",
    "Parameter": "string key, InferParameter value",
    "InferParameter": "bool bool_param, int64 int64_param, string string_param, double double_param, "
    "uint64 uint64_param",
    "RepositoryIndexRequest": "string repository_name, bool ready",
    "RepositoryIndexResponse": "repeated ModelIndex models",
    "ModelIndex": "string name, string version, string state, string reason",
    "CheckRequest": "string service",
    "CheckResponse": "int32 status",  # an enum: SERVING, NOT_SERVING
}
SERVING, NOT_SERVING = 1, 2
INFER, RAW = "ModelInferRequest", 7  # the field of its tensors' bytes
MOST_FIELDS, MOST_BESIDE = 256, 16 << 20  # of INFER, and bytes beside RAW: in memory they are 50 times as many
MOST_BYTES = 1 << 16  # of other requests


@cache
def classes() -> dict[str, Any]:
    """Message classes by name. In a pool of their own: others may bring the generated ones into the same process."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="cellray.proto", package=PACKAGE, syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, words in enumerate(filter(None, fields.split(", ")), 1):
            *repeated, kind, label = words.split()
            field = message.field.add(name=label, number=number)
            field.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            if kind in MESSAGES:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
            else:
                field.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in MESSAGES}


def parsed(name: str, data: bytes) -> Any:
    """A message of that class.

    Raises:
        InvalidInput: it is none. TooLarge: it would take far more memory than it has bytes.
    """
    from google.protobuf.message import DecodeError

    try:
        beside = _beside(data) if name == INFER else len(data)
        most = MOST_BESIDE if name == INFER else MOST_BYTES
        if beside > most:
            raise TooLarge(f"{beside} bytes of {name} beside raw contents; the limit is {most}")
        return classes()[name].FromString(data)
    except (DecodeError, IndexError) as error:
        raise InvalidInput(f"the message is no {name}") from error


def _beside(data: bytes) -> int:
    """Bytes of an INFER that are not in RAW. Its fields are all a tag, a length and so many bytes."""
    at = found = fields = 0
    while at < len(data):
        tag, at = _number(data, at)
        size, at = _number(data, at)
        at, fields = at + size, fields + 1
        found += 0 if tag == RAW << 3 | 2 else size
        if fields > MOST_FIELDS or tag & 7 != 2:
            raise InvalidInput(f"the message is no {INFER}, or has over {MOST_FIELDS} parts")
    return found


def _number(data: bytes, at: int) -> tuple[int, int]:
    """(a varint, where it ends). Raises IndexError."""
    value = 0
    for place in range(0, 70, 7):
        value |= (data[at] & 127) << place
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise IndexError("more than ten bytes")


def add_to_server(_: Any, server: Any) -> None:
    """For `grpc_options.grpc_servicer_functions`: the methods that Serve's proxy takes. Requests pass through it as
    bytes, to the ingress's methods of the same names."""
    import grpc

    for service, names in SERVICES.items():
        methods = {name: grpc.unary_unary_rpc_method_handler(None) for name in names}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
