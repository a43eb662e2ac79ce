"""Open Inference Protocol: the protocol's own client, by HTTP and gRPC, on a real Ray with the nano model; and what
arrives broken."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from cluster import keys
from cluster.errors import InvalidInput, TooLarge
from cluster.settings import ServiceSettings, Settings
from serve_app import oip_grpc, oip_http, oip_messages
from serve_app.contract import packed
from serve_app.guard import HAPROXY, Guard
from serve_app.model import masks
from serve_app.oip_tensors import ANY, DTYPES, Given, Tensor, raw, read
from serve_app.service import Service
from tests.conftest import CELLS, App

README = Path(__file__).parent.parent / "README.md"
BOXES = np.array([[20, 30, 300, 200], [0, 0, 600, 400]], np.float32)
POINTS = np.array([[[100, 100], [5, 5]], [[300, 200], [0, 0]]], np.float32)
LABELS = np.array([[1, 0], [1, -1]], np.int32)
SCORES = ("rle", "bbox", "area", "predicted_iou", "stability_score", "prompt_index")
CLIENTS = {"http": tritonclient.http, "grpc": tritonclient.grpc}
Inputs = dict[str, np.ndarray]


@dataclass
class Client:
    """One of the two clients: they have the same methods."""

    module: Any
    one: Any

    def asked(self, inputs: Inputs, outputs: tuple[str, ...]) -> dict[str, Any]:
        return {
            "inputs": [tensor(self.module, name, array) for name, array in inputs.items()],
            "outputs": [self.module.InferRequestedOutput(name) for name in outputs] or None,
        }

    def infer(self, model: str, inputs: Inputs, outputs: tuple[str, ...] = (), **more: Any) -> Any:
        return self.one.infer(model, **self.asked(inputs, outputs), **more)


def tensor(module: Any, name: str, array: np.ndarray) -> Any:
    found = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    found.set_data_from_numpy(array)
    return found


def strings(*values: str | bytes) -> np.ndarray:
    found = np.empty(len(values), object)
    found[:] = values
    return found


@pytest.fixture(scope="module", params=CLIENTS)
def client(app: App, request: pytest.FixtureRequest) -> Iterator[Client]:
    module = CLIENTS[request.param]
    url = {"http": app.http.removeprefix("http://"), "grpc": app.grpc}[request.param]
    with module.InferenceServerClient(url) as one:
        yield Client(module, one)


@pytest.fixture(scope="module")
def v1(app: App) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=app.http, timeout=60) as one:
        yield one


@pytest.fixture(scope="module")
def image(sample_images: Path) -> bytes:
    return (sample_images / "coffee_rgb.png").read_bytes()


@pytest.fixture(scope="module")
def embedding_id(v1: httpx.Client, image: bytes) -> str:
    return v1.post("/v1/embed", content=image).headers["x-embedding-id"]


def test_says_what_it_serves(client: Client) -> None:
    one = client.one
    assert one.is_server_live()
    assert one.is_server_ready()
    assert one.is_model_ready("nano-encoder")
    assert one.is_model_ready("nano-decoder", "1")
    as_json = {} if client.module is tritonclient.http else {"as_json": True}
    server = one.get_server_metadata(**as_json)
    assert server["name"] == "cellray"
    assert "binary_tensor_data" in server["extensions"]
    encoder = one.get_model_metadata("nano-encoder", **as_json)
    assert encoder["versions"] == ["1"]
    shape = [int(side) for side in encoder["outputs"][0]["shape"]]
    assert (encoder["outputs"][0]["datatype"], shape) == ("FP16", [-1, 256, 32, 32])
    decoder = one.get_model_metadata("nano-decoder", "1", **as_json)
    assert {"embedding_id", "embedding", "boxes", "points", "labels"} < {one["name"] for one in decoder["inputs"]}
    index = one.get_model_repository_index(**as_json)
    names = [model["name"] for model in (index if isinstance(index, list) else index["models"])]
    assert names == [f"{model}-{half}" for model in ("nano", CELLS) for half in ("encoder", "decoder")]
    with pytest.raises(InferenceServerException, match="not served"):
        one.get_model_metadata("nope")
    with pytest.raises(InferenceServerException, match="not served"):
        one.get_model_metadata("n" * 30_000)
    with pytest.raises(InferenceServerException, match="no version"):
        one.get_model_metadata("nano-encoder", "2")


def test_embeds_a_batch_as_v1_does(client: Client, v1: httpx.Client, image: bytes, sample_images: Path) -> None:
    images = [image, (sample_images / "coins_grey8.png").read_bytes()]
    found = client.infer("nano-encoder", {"image": strings(*images)}, request_id="seven")
    for number, data in enumerate(images):
        expected = v1.post("/v1/embed", content=data)
        headers = expected.headers
        array = np.frombuffer(expected.content, "<f2").reshape(256, 32, 32)
        np.testing.assert_array_equal(found.as_numpy("embedding")[number], array)
        assert found.as_numpy("embedding_id")[number].decode() == headers["x-embedding-id"]
        for name in ("original_size", "input_size"):
            sides = [int(side) for side in headers[f"x-{name.replace('_', '-')}"].split(",")]
            assert found.as_numpy(name)[number].tolist() == sides
    assert found.as_numpy("embedding").dtype == np.float16
    response = found.get_response()
    assert (response["id"] if client.module is tritonclient.http else response.id) == "seven"


@pytest.mark.parametrize("by", ["id", "float16", "float32"])
@pytest.mark.parametrize(
    ("inputs", "body"),
    [
        ({"boxes": BOXES}, {"boxes": BOXES.tolist()}),
        (
            {"points": POINTS, "labels": LABELS, "multimask": np.array([True])},
            {"points": POINTS.tolist(), "labels": LABELS.tolist(), "multimask": True},
        ),
        ({"points": POINTS, "boxes": BOXES}, {"points": POINTS.tolist(), "boxes": BOXES.tolist()}),
    ],
    ids=["boxes", "points", "both"],
)
def test_segments_as_v1_does(
    client: Client, v1: httpx.Client, embedding_id: str, inputs: Inputs, body: dict[str, Any], by: str
) -> None:
    what = {"embedding_id": strings(embedding_id)}
    if by != "id":
        array = np.frombuffer(v1.get(f"/v1/embeddings/{embedding_id}").content, "<f2").reshape(1, 256, 32, 32)
        what = {"embedding": array.astype(by), "original_size": np.array([400, 600])}
    found = client.infer("nano-decoder", {**what, **inputs})
    expected = v1.post("/v1/segment", json={"embedding_id": embedding_id, **body}).json()["masks"]
    assert [text.decode() for text in found.as_numpy("rle")] == [one["segmentation"]["counts"] for one in expected]
    for name in SCORES[1:]:
        np.testing.assert_allclose(found.as_numpy(name), [one[name] for one in expected], rtol=1e-6)
    counts = [one["segmentation"]["counts"] for one in expected]
    np.testing.assert_array_equal(found.as_numpy("masks"), masks.decode(counts, (400, 600)))
    assert found.as_numpy("masks").dtype == np.uint8


def test_refines_a_mask_from_its_logits(client: Client, v1: httpx.Client, embedding_id: str) -> None:
    what = {"embedding_id": strings(embedding_id), "boxes": BOXES}
    logits = client.infer("nano-decoder", what, ("logits",)).as_numpy("logits")
    assert (logits.shape, logits.dtype) == ((2, 128, 128), np.float16)
    refined = client.infer("nano-decoder", {**what, "masks": logits.astype(np.float32)}, ("rle",)).as_numpy("rle")
    body = {"embedding_id": embedding_id, "boxes": BOXES.tolist(), "masks": [packed(one) for one in logits]}
    expected = v1.post("/v1/segment", json=body).json()["masks"]
    assert [text.decode() for text in refined] == [one["segmentation"]["counts"] for one in expected]


def test_answers_only_what_was_asked_for(client: Client, embedding_id: str) -> None:
    what = {"embedding_id": strings(embedding_id), "boxes": BOXES}
    found = client.infer("nano-decoder", what, ("area", "predicted_iou"))
    assert found.as_numpy("masks") is None
    assert found.as_numpy("area").shape == found.as_numpy("predicted_iou").shape == (2,)
    nothing = client.infer("nano-decoder", {**what, "boxes": BOXES[:0]})
    assert nothing.as_numpy("masks").shape == (0, 400, 600)
    assert nothing.as_numpy("logits").shape == (0, 128, 128)


def test_async_clients(app: App, image: bytes) -> None:
    async def embed(module: Any, url: str) -> list[np.ndarray]:
        async with module.InferenceServerClient(url) as one:
            inputs = [tensor(module, "image", strings(image))]
            answers = await asyncio.gather(*(one.infer("nano-encoder", inputs) for _ in range(4)))
            return [answer.as_numpy("embedding") for answer in answers]

    by_http = asyncio.run(embed(tritonclient.http.aio, app.http.removeprefix("http://")))
    by_grpc = asyncio.run(embed(tritonclient.grpc.aio, app.grpc))
    for array in by_http + by_grpc:
        np.testing.assert_array_equal(array, by_http[0])


ID = {"embedding_id": strings("0" * 64)}
BOX = {"boxes": BOXES[:1]}
SIZE = {"original_size": np.array([400, 600])}
REFUSED: list[tuple[str, Inputs, tuple[str, ...], int, str, str]] = [
    ("nope-encoder", ID, (), 404, "NOT_FOUND", "there are nano-encoder, nano-decoder"),
    ("nano-encoder", {"picture": strings(b"x")}, (), 400, "INVALID_ARGUMENT", "no input 'picture'"),
    ("nano-encoder", {"image": np.zeros(9, np.uint8)}, (), 400, "INVALID_ARGUMENT", "expected BYTES"),
    ("nano-encoder", {"image": strings(b"x").reshape(1, 1)}, (), 400, "INVALID_ARGUMENT", "expected [-1]"),
    ("nano-encoder", {"image": strings()}, (), 400, "INVALID_ARGUMENT", "no image"),
    ("nano-encoder", {"image": strings(*[b"x"] * 65)}, (), 413, "INVALID_ARGUMENT", "the limit is 64"),
    ("nano-encoder", {"image": strings(b"x")}, ("masks",), 400, "INVALID_ARGUMENT", "no output 'masks'"),
    ("nano-encoder", {"image": strings(b"x")}, (), 415, "INVALID_ARGUMENT", "not an image"),
    ("nano-encoder", {"image": strings(b"x", b"")}, (), 415, "INVALID_ARGUMENT", "image 0: not an image"),
    ("nano-encoder", {"image": strings(bytes(9 << 20))}, (), 413, "INVALID_ARGUMENT", "over the limit of 8388608"),
    ("nano-decoder", {**ID, **BOX}, (), 404, "NOT_FOUND", "no embedding"),
    ("nano-decoder", BOX, (), 400, "INVALID_ARGUMENT", "found none of them"),
    ("nano-decoder", {**ID, **SIZE, **BOX}, (), 400, "INVALID_ARGUMENT", "found embedding_id and original_size"),
    ("nano-decoder", {"embedding": np.zeros((1, 256, 32, 32)), **SIZE}, (), 400, "INVALID_ARGUMENT", "FP16 or FP32"),
    ("nano-decoder", {"embedding": np.zeros((1, 9, 9, 9), "f2")}, (), 400, "INVALID_ARGUMENT", "[1, 256, 32, 32]"),
    ("nano-decoder", {**ID, "boxes": np.zeros((1, 3), "f4")}, (), 400, "INVALID_ARGUMENT", "expected [-1, 4]"),
    ("nano-decoder", {**ID, "points": np.zeros((1, 1025, 2), "f4")}, (), 422, "INVALID_ARGUMENT", "limit is 1024"),
    ("nano-decoder", {**ID, "boxes": np.zeros((65, 4), "f4")}, ("logits",), 413, "INVALID_ARGUMENT", "limit is 64"),
    ("nano-decoder", ID, (), 422, "INVALID_ARGUMENT", "no prompt"),
]
EMBEDDED: list[tuple[Inputs, int, str]] = [  # of an image of 600 × 400
    ({"boxes": np.array([[300, 30, 20, 200]], np.float32)}, 422, "inverted"),
    ({"boxes": np.array([[0, 0, np.nan, 9]], np.float32)}, 422, "not finite"),
    ({"points": POINTS, "labels": LABELS[:, :1]}, 422, "labels [N, K]"),
    ({"boxes": np.zeros((5000, 4), np.float32)}, 422, "5000 prompts"),
    ({"boxes": np.zeros((40, 4), np.float32)}, 413, "40 masks of 600 × 400 pixels"),
]


@pytest.mark.parametrize(("model", "inputs", "outputs", "status", "code", "says"), REFUSED)
def test_refuses(
    client: Client,
    request: pytest.FixtureRequest,
    model: str,
    inputs: Inputs,
    outputs: tuple[str, ...],
    status: int,
    code: str,
    says: str,
) -> None:
    if says == "no prompt":
        inputs = {"embedding_id": strings(request.getfixturevalue("embedding_id"))}
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, inputs, outputs)
    assert says in caught.value.message()
    expected = str(status) if client.module is tritonclient.http else f"StatusCode.{code}"
    assert caught.value.status() == expected


@pytest.mark.parametrize(("inputs", "status", "says"), EMBEDDED, ids=lambda value: str(value)[:20])
def test_refuses_prompts(client: Client, embedding_id: str, inputs: Inputs, status: int, says: str) -> None:
    outputs = ("masks",) if status == 413 else ("area",)
    with pytest.raises(InferenceServerException) as caught:
        client.infer("nano-decoder", {"embedding_id": strings(embedding_id), **inputs}, outputs)
    assert says in caught.value.message()


def test_refuses_sizes_that_no_image_has(client: Client) -> None:
    embedding = {"embedding": np.zeros((1, 256, 32, 32), np.float16), **BOX}
    for size, says in (([0, 600], "0 pixels"), ([20_000, 20_000], "limit"), ([-1, -1], "-1"), ([1, 5000], "longer")):
        with pytest.raises(InferenceServerException, match=says):
            client.infer("nano-decoder", {**embedding, "original_size": np.array(size)})


def test_plain_json(v1: httpx.Client, embedding_id: str) -> None:
    body: dict[str, Any] = {
        "inputs": [
            {"name": "embedding_id", "datatype": "BYTES", "shape": [1], "data": [embedding_id]},
            {"name": "boxes", "datatype": "FP32", "shape": [2, 4], "data": BOXES.tolist()},
        ],
        "outputs": [{"name": "rle"}, {"name": "area"}],
    }
    answer = v1.post("/v2/models/nano-decoder/infer", json=body)
    assert "inference-header-content-length" not in answer.headers
    by_name = {one["name"]: one for one in answer.json()["outputs"]}
    assert by_name["rle"]["datatype"] == "BYTES"
    assert masks.areas_and_boxes(by_name["rle"]["data"], (400, 600))[0].tolist() == by_name["area"]["data"]
    body["outputs"] = [{"name": "logits"}, {"name": "area", "parameters": {"binary_data": True}}]
    mixed = v1.post("/v2/models/nano-decoder/versions/1/infer", json=body)
    size = int(mixed.headers["inference-header-content-length"])
    logits, area = sorted(json.loads(mixed.content[:size])["outputs"], key=lambda one: "data" not in one)
    assert np.shape(logits["data"]) == (2 * 128 * 128,)
    assert area["parameters"] == {"binary_data_size": 16}
    assert np.frombuffer(mixed.content[size:], "<i8").tolist() == by_name["area"]["data"]


BOX_JSON = {"name": "boxes", "datatype": "FP32", "shape": [1, 4]}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"inputs": [BOX_JSON]}, 400, "one of both"),
        ({"inputs": [{**BOX_JSON, "data": [1, 2, 3]}]}, 400, "3 values"),
        ({"inputs": [{**BOX_JSON, "data": ["1"] * 4}]}, 400, "not all FP32"),
        ({"inputs": [{"name": "labels", "datatype": "INT32", "shape": [1, 1], "data": [1 << 40]}]}, 400, "range"),
        ({"inputs": [{"name": "multimask", "datatype": "BOOL", "shape": [1], "data": [7]}]}, 400, "not all BOOL"),
        ({"inputs": [{**BOX_JSON, "shape": [-1, 4], "data": []}]}, 400, "shape [-1, 4]"),
        ({"inputs": [{**BOX_JSON, "shape": [0, 4], "data": []}] * 2}, 400, "twice"),
        (
            {"inputs": [{**BOX_JSON, "data": [], "parameters": {"shared_memory_region": "x"}}]},
            400,
            "shared_memory_region",
        ),
        ({"inputs": [], "outputs": [{"name": "rle", "parameters": {"classification": 3}}]}, 400, "classification"),
        ({"inputs": [{}] * 100_000}, 400, "at most 64"),
        ({"outputs": []}, 400, "inputs"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refuses_json(v1: httpx.Client, body: dict[str, Any], status: int, says: str) -> None:
    answer = v1.post("/v2/models/nano-decoder/infer", json=body)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]


def test_refuses_what_it_does_not_speak(v1: httpx.Client, client: Client, image: bytes) -> None:
    packed_body = v1.post("/v2/models/nano-decoder/infer", content=b"x", headers={"content-encoding": "gzip"})
    assert packed_body.status_code == 415
    assert "gzip" in packed_body.json()["error"]
    assert "Not Found: /docs" in v1.get("/v2/models/nano-decoder/stats").json()["error"]
    huge = v1.post("/v2/models/nano-decoder/infer", content=b"[" * (9 << 20))
    assert huge.status_code == 413
    assert v1.post("/v2/models/nano-decoder/infer", content=b"[" * (1 << 20)).status_code == 400
    with pytest.raises(InferenceServerException):
        client.one.load_model("nano")


def test_typed_contents(app: App, embedding_id: str, v1: httpx.Client) -> None:
    pb = tritonclient.grpc.service_pb2

    def one(name: str, datatype: str, shape: list[int], **contents: Any) -> Any:
        held = pb.InferTensorContents(**contents)
        return pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape, contents=held)

    inputs = [
        one("embedding_id", "BYTES", [1], bytes_contents=[embedding_id.encode()]),
        one("points", "FP32", [2, 2, 2], fp32_contents=POINTS.ravel().tolist()),
        one("labels", "INT32", [2, 2], int_contents=LABELS.ravel().tolist()),
        one("multimask", "BOOL", [1], bool_contents=[True]),
    ]
    with grpc.insecure_channel(app.grpc) as channel:
        stub = tritonclient.grpc.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer = stub.ModelInfer(pb.ModelInferRequest(model_name="nano-decoder", inputs=inputs))
        body = {"embedding_id": embedding_id, "points": POINTS.tolist(), "labels": LABELS.tolist(), "multimask": True}
        expected = [one["area"] for one in v1.post("/v1/segment", json=body).json()["masks"]]
        (number,) = [i for i, output in enumerate(answer.outputs) if output.name == "area"]
        assert np.frombuffer(answer.raw_output_contents[number], "<i8").tolist() == expected

        both = pb.ModelInferRequest(model_name="nano-decoder", inputs=inputs, raw_input_contents=[b""] * 4)
        few = pb.ModelInferRequest(model_name="nano-decoder", inputs=inputs, raw_input_contents=[b""])
        for wrong, says in ((both, "one of both"), (few, "expected one for each")):
            with pytest.raises(grpc.RpcError) as caught:
                stub.ModelInfer(wrong)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert says in caught.value.details()
        assert [key for key, _ in caught.value.trailing_metadata()] == ["request_id"]  # no retry-after


def test_health_by_grpc(app: App) -> None:
    with grpc.insecure_channel(app.grpc) as channel:
        call = channel.unary_unary("/grpc.health.v1.Health/Check")  # bytes: field 1 is the service, and the status
        assert call(b"") == b"\x08\x01"
        assert call(b"\x0a\x1e" + b"inference.GRPCInferenceService") == b"\x08\x01"
        for request, code in ((b"\x0a\x01x", grpc.StatusCode.NOT_FOUND), (b"\x0a", grpc.StatusCode.INVALID_ARGUMENT)):
            with pytest.raises(grpc.RpcError) as caught:
                call(request)
            assert caught.value.code() is code


def test_messages_are_the_protocols() -> None:
    official = tritonclient.grpc.service_pb2.DESCRIPTOR

    service = official.services_by_name["GRPCInferenceService"]
    for name in oip_messages.SERVICES[service.full_name]:
        method = service.methods_by_name[name]
        for message in (method.input_type, method.output_type):
            ours = oip_messages.classes()[message.name].DESCRIPTOR
            assert _names(ours) == _names(message)


def _names(message: Any) -> list[Any]:
    found = []
    for field in message.fields:
        inner = field.message_type and _names(field.message_type)
        if message.name != "InferOutputTensor" or field.number <= 3:  # the rest we never fill in
            found.append((field.number, field.name, field.type, field.is_repeated, inner))
    return found


def test_the_proxy_loads_little() -> None:
    code = "import sys, serve_app.oip_messages; sys.exit(bool({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=README.parent, timeout=120)


@pytest.mark.parametrize("name", CLIENTS)
def test_the_example_of_the_readme(
    app: App, image: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    section = README.read_text().split("## Open Inference Protocol")[1].split("\n## ")[0]
    code = textwrap.dedent("".join(line for line in section.splitlines(True) if line.startswith(("    ", "\n"))))
    url = {"http": app.http.removeprefix("http://"), "grpc": app.grpc}[name]
    (tmp_path / "cell.png").write_bytes(image)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code.replace("tritonclient.http", f"tritonclient.{name}").replace("127.0.0.1:8000", url), found)
    assert found["cell"].as_numpy("embedding").shape == (1, 256, 32, 32)
    assert found["answer"].as_numpy("masks").any()


class Context:
    """A call's, as Serve hands it over."""

    def __init__(self, peer: str, **metadata: str) -> None:
        self.from_where, self.metadata = peer, metadata
        self.code, self.details, self.trailing = None, "", list[tuple[str, str]]()

    def peer(self) -> str:
        return self.from_where

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return list(self.metadata.items())

    def set_code(self, code: Any) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing: list[tuple[str, str]]) -> None:
        self.trailing = trailing


class Ingress(oip_grpc.GrpcMethods):
    """The methods without Serve."""

    def __init__(self, guard: Guard) -> None:
        self.guard, self.service = guard, Service(Settings(), [], [])
        self.service.looked = math.inf  # nor what it would say


def test_who_may_by_grpc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far, near = "ipv4:10.0.0.1:5", "ipv6:%5B::1%5D:5"
    without = Ingress(Guard(ServiceSettings(), "127.0.0.1"))
    secret, key = keys.make("alice")
    file = tmp_path / "keys"
    file.write_text(f"{replace(key, per_minute=1)}\n")
    having = Ingress(Guard(ServiceSettings(keys=str(file)), "0.0.0.0"))

    def call(ingress: Ingress, name: str, context: Context, request: bytes = b"") -> Any:
        asyncio.run(getattr(ingress, name)(request, context))
        return context.code

    status = grpc.StatusCode
    assert call(without, "ServerMetadata", Context(near)) is None
    assert call(without, "ServerMetadata", Context(far)) is status.PERMISSION_DENIED
    health = b"\x0a\x1e" + oip_messages.OIP.encode()
    for open_one, asked in (("Check", b""), ("Check", health), ("ServerLive", b""), ("ServerReady", b"")):
        assert call(without, open_one, Context(far), asked) is None
        assert call(having, open_one, Context(far), asked) is None
    assert call(having, "ServerMetadata", Context(near)) is status.UNAUTHENTICATED
    assert call(having, "ServerMetadata", Context(far, authorization=f"Bearer {secret}x")) is status.UNAUTHENTICATED
    assert call(having, "ServerMetadata", Context(far, authorization=f"Bearer {secret}")) is None
    assert call(having, "Check", Context(near), health + b"\x12\xff\x01" + b"x" * 255) is status.UNAUTHENTICATED
    monkeypatch.setenv(HAPROXY, "1")
    behind = Ingress(Guard(ServiceSettings(), "127.0.0.1"))
    assert call(behind, "ServerMetadata", Context(near)) is status.PERMISSION_DENIED
    again = Context(far, authorization=f"Bearer {secret}")
    assert call(having, "ServerMetadata", again) is status.RESOURCE_EXHAUSTED
    ((name, seconds),) = again.trailing
    assert name == "retry-after"
    assert 0 < int(seconds) <= 60


def refusing() -> AbstractContextManager[None]:
    """The one kind of error that may come of what arrives."""
    return suppress(InvalidInput, TooLarge)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), lambda one: st.lists(one, max_size=3)
)


@given(
    head=st.sampled_from([b'{"inputs": []}', b"{", b"", b"[]", b'{"inputs": [{"name": "a"}]}'])
    | st.binary(max_size=40),
    header=st.none() | st.text(max_size=30) | st.integers(-5, 80).map(str) | st.just("9" * 30),
    tail=st.binary(max_size=20),
)
def test_any_framing_is_read_or_refused(head: bytes, header: str | None, tail: bytes) -> None:
    with refusing():
        oip_http.parse(head + tail, header)


@given(
    datatype=st.sampled_from(sorted(DTYPES)) | st.text(max_size=5),
    shape=st.lists(st.integers(-3, 4) | st.just(1 << 70), max_size=3),
    size=st.none() | st.integers(-2, 40) | st.booleans() | st.text(max_size=2),
    data=st.none() | st.lists(VALUES, max_size=5),
    tail=st.binary(max_size=40),
    ragged=st.integers(-2, 2),
)
def test_any_tensor_is_read_or_refused(
    datatype: str, shape: list[int], size: Any, data: Any, tail: bytes, ragged: int
) -> None:
    tensor: dict[str, Any] = {"name": "x", "datatype": datatype, "shape": shape, "data": data}
    if size is not None:
        tensor["parameters"] = {"binary_data_size": size}
    head = json.dumps({"inputs": [tensor]}).encode()
    with refusing():
        _, (one,) = oip_http.parse(head + tail, str(len(head) + ragged))
        found = read(one, Tensor("x", tuple(DTYPES), (ANY,) * len(shape)))
        assert (list(found.shape), found.dtype) == (shape, DTYPES[datatype])


@given(
    datatype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 1000),
)
def test_bytes_come_back_as_they_were(datatype: str, shape: list[int], seed: int) -> None:
    random, count = np.random.default_rng(seed), int(np.prod(shape))
    if datatype == "BYTES":
        array = strings(*[random.bytes(int(random.integers(0, 9))) for _ in range(count)]).reshape(shape)
    else:
        array = random.integers(0, 2, shape).astype(DTYPES[datatype])
    expected = Tensor("x", (datatype,), (ANY,) * len(shape))
    np.testing.assert_array_equal(read(Given("x", datatype, shape, raw(array)), expected), array)
    values = [one.decode("latin-1") for one in array.flat] if datatype == "BYTES" else array.tolist()
    if shape and datatype != "BYTES":
        np.testing.assert_array_equal(read(Given("x", datatype, shape, None, values), expected), array)


@given(st.binary(max_size=60))
def test_any_message_is_read_or_refused(data: bytes) -> None:
    with refusing():
        oip_messages.parsed("ModelReadyRequest", data)
    with refusing():
        oip_grpc.tensors(oip_messages.parsed("ModelInferRequest", data))


def test_small_messages_that_would_be_large_in_memory_are_refused() -> None:
    many_inputs = b"\x2a\x00" * 300
    with pytest.raises(InvalidInput, match="over 256 parts"):
        oip_messages.parsed("ModelInferRequest", many_inputs)
    request = tritonclient.grpc.service_pb2.ModelInferRequest()
    request.inputs.add().contents.bytes_contents.extend([b""] * (9 << 20))
    with pytest.raises(TooLarge, match="beside raw contents"):
        oip_messages.parsed("ModelInferRequest", request.SerializeToString())
    request = tritonclient.grpc.service_pb2.ModelInferRequest(raw_input_contents=[bytes(32 << 20)])
    assert len(oip_messages.parsed("ModelInferRequest", request.SerializeToString()).raw_input_contents[0]) == 32 << 20
    with pytest.raises(TooLarge):
        oip_messages.parsed("ModelReadyRequest", b"\x0a\x80\x80\x08" + bytes(1 << 17))


FRAMES = st.tuples(st.integers(-4, 4), st.integers(-40, 40), st.integers(-40, 40))


@settings(max_examples=40)
@given(frame=FRAMES, datatype=st.sampled_from(["BYTES", "UINT8", "FP16", "XX"]), shape=st.lists(st.integers(-1, 3)))
def test_broken_framing_is_never_our_fault(
    app: App, frame: tuple[int, int, int], datatype: str, shape: list[int]
) -> None:
    header, size, cut = frame
    data = raw(strings(b"no image", b"none"))
    tensor = {
        "name": "image",
        "datatype": datatype,
        "shape": shape,
        "parameters": {"binary_data_size": len(data) + size},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    body = (head + data)[: len(head) + len(data) + min(cut, 0)] + bytes(max(cut, 0))
    headers = {"inference-header-content-length": str(len(head) + header)}
    answer = httpx.post(f"{app.http}/v2/models/nano-encoder/infer", content=body, headers=headers)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["error"]
