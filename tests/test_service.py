"""The HTTP service, on a real Ray with the nano model."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from ray import serve

from cluster import settings
from cluster.errors import Unavailable
from cluster.settings import Settings
from serve_app import models
from serve_app.model import decoder, encoder, masks, preprocess
from serve_app.model.prompts import DecodeRequest, Prompts
from serve_app.service import Service
from tests.conftest import CELLS, App

PATIENCE_S = 60.0
BOXES = [[20, 30, 300, 200], [0, 0, 600, 400]]


@pytest.fixture(scope="module")
def http(app: App) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=app.http, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def image(sample_images: Path) -> bytes:
    return (sample_images / "coffee_rgb.png").read_bytes()


@pytest.fixture(scope="module")
def folder(app: App) -> Path:
    return models.prepare(settings.load(app.config), "nano")


def test_says_what_it_serves(http: httpx.Client) -> None:
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json() == {"status": "ready"}
    model, cells = http.get("/v1/models").json()
    assert (model["name"], model["cells"], cells["name"], cells["cells"]) == ("nano", False, CELLS, True)
    assert model["trained"] is True
    assert model["dtype"] == "float32"
    assert model["note"] is None
    assert http.get("/docs").status_code == 200
    assert "/v1/segment" in http.get("/openapi.json").json()["paths"]


def test_whether_all_can_be_asked_wakes_nobody(app: App) -> None:
    @serve.deployment
    class Rare:
        async def info(self) -> str:
            return "awake"

    def ready(handle: Any) -> None:
        asyncio.run(Service(Settings(), ["one"], [handle, handle, None]).ready())

    idle = {"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1}
    rare = Rare.options(autoscaling_config=idle)  # type: ignore[attr-defined]
    stuck = Rare.options(ray_actor_options={"resources": {"what nobody has": 1}})  # type: ignore[attr-defined]
    targets = [serve.RunTarget(one.bind(), f"{name}-app", None) for name, one in (("rare", rare), ("stuck", stuck))]
    try:
        sleeping, starting = serve.run_many(targets, wait_for_applications_running=False)
        end = time.monotonic() + PATIENCE_S
        while (state := serve.status().applications["rare-app"]).status != "RUNNING":
            assert time.monotonic() < end, state
            time.sleep(0.2)
        ready(sleeping)
        with pytest.raises(Unavailable, match=r"no replica yet of Rare$"):
            ready(starting)
        assert serve.status().applications["rare-app"].deployments["Rare"].replica_states == {}
    finally:
        serve.delete("rare-app")
        serve.delete("stuck-app")


class _Starting:
    """A handle of a model without replicas: `info` answers once all halves were asked for it."""

    def __init__(self, asked: list[object], all_asked: asyncio.Event) -> None:
        self.asked, self.all_asked, self.info = asked, all_asked, self

    async def remote(self) -> str:
        self.asked.append(self)
        if len(set(self.asked)) == 2:
            self.all_asked.set()
        await self.all_asked.wait()
        return "info"


def test_a_model_without_replicas_starts_its_encoder_and_its_decoder_at_the_same_time(image: bytes) -> None:
    async def ask() -> list[object]:
        asked: list[object] = []
        event = asyncio.Event()
        service = Service(Settings(), ["rare"], [_Starting(asked, event), _Starting(asked, event), None])
        for _ in range(2):
            async with asyncio.timeout(30):
                with pytest.raises(AttributeError):  # it has an info by then, which is none
                    await service.embed(image, "rare")
        return asked

    assert len(asyncio.run(ask())) == 3  # both halves, and the decoder for what it is; the second time nobody


def test_embeds_as_the_model_does(http: httpx.Client, image: bytes, folder: Path) -> None:
    local = encoder.load(folder, "reference")
    pixels = preprocess.resize(preprocess.decode(image, 10**8), 256).pixels
    (expected,) = encoder.embed(local, [pixels])
    raw = http.post("/v1/embed", content=image, headers={"content-type": "image/png"})
    got = np.frombuffer(raw.content, "<f2").reshape([int(n) for n in raw.headers["x-shape"].split(",")])
    np.testing.assert_allclose(got.astype(np.float32), np.asarray(expected, np.float32), atol=2e-2, rtol=2e-3)
    assert raw.headers["x-original-size"] == "400,600"
    assert raw.headers["x-trained"] == "true"

    form = http.post("/v1/embed", files={"image": ("c.png", image)}, headers={"accept": "application/x-npz"})
    arrays = np.load(io.BytesIO(form.content))
    np.testing.assert_array_equal(arrays["embedding"], got)
    assert str(arrays["embedding_id"]) == raw.headers["x-embedding-id"]


@pytest.mark.parametrize(
    ("request_body", "prompts", "outputs"),
    [
        ({"boxes": BOXES}, Prompts(np.array(BOXES, np.float32)), 1),
        (
            {"points": [[[100, 100], [5, 5]], [[300, 200]]], "labels": [[1, 0], [1]], "multimask": True},
            Prompts(
                points=np.array([[[100, 100], [5, 5]], [[300, 200], [0, 0]]], np.float32),
                labels=np.array([[1, 0], [1, -1]], np.int32),
            ),
            3,
        ),
    ],
    ids=["boxes", "points"],
)
def test_segments_as_the_model_does(
    http: httpx.Client, image: bytes, folder: Path, request_body: dict[str, Any], prompts: Prompts, outputs: int
) -> None:
    embedded = http.post("/v1/embed", content=image)
    embedding = np.frombuffer(embedded.content, "<f2").reshape(256, 32, 32)
    (expected,) = decoder.segment(
        decoder.load(folder, "auto"), [DecodeRequest(embedding, (400, 600), prompts, multimask=outputs == 3)]
    )
    assert isinstance(expected, masks.MaskSet)

    by_id = http.post("/v1/segment", json={"embedding_id": embedded.headers["x-embedding-id"], **request_body})
    by_image = http.post("/v1/segment", files={"image": ("c.png", image)}, data={"request": json.dumps(request_body)})
    assert by_id.status_code == 200, by_id.text
    assert by_id.json() == by_image.json()
    found = by_id.json()["masks"]
    assert [one["prompt_index"] for one in found] == [i for i in range(2) for _ in range(outputs)]
    got = masks.decode([one["segmentation"]["counts"] for one in found], (400, 600))
    assert min(map(masks.iou, got, expected.decode())) > 0.999
    np.testing.assert_allclose([one["predicted_iou"] for one in found], expected.predicted_iou, atol=1e-3)
    np.testing.assert_array_equal([one["area"] for one in found], got.sum(axis=(1, 2)))


def test_finds_everything_on_a_grid(http: httpx.Client, image: bytes) -> None:
    answer = http.post("/v1/automask", files={"image": ("c.png", image)}, data={"request": '{"points_per_side": 2}'})
    assert answer.status_code == 200
    assert isinstance(answer.json()["masks"], list)


SEGMENT_ERRORS = [
    ({"embedding_id": "0" * 64, "boxes": [[1, 1, 2, 2]]}, 404, "NotFound", "no embedding"),
    ({"boxes": [[300, 30, 20, 200]]}, 422, "InvalidPrompt", "inverted"),
    ({"boxes": [[0, 0, 601, 10]]}, 422, "InvalidPrompt", "leaves the image of 600 × 400"),
    ({"boxes": [[1, 2, 3]]}, 422, "InvalidPrompt", "boxes.0"),
    ({"points": [[[700, 10]]]}, 422, "InvalidPrompt", "outside"),
    ({"points": [[[1, 1]]], "labels": [[2]]}, 422, "InvalidPrompt", "labels"),
    ({"points": [[[1, 1]]], "labels": [[1, 1]]}, 422, "InvalidPrompt", "same shape"),
    ({"labels": [[1]]}, 422, "InvalidPrompt", "labels without points"),
    ({}, 422, "InvalidPrompt", "no prompt"),
    ({"masks": [{"shape": [2, 2], "data": "AAAA"}]}, 422, "InvalidPrompt", "not base64 of (2, 2)"),
    ({"masks": [{"shape": [1, 1], "data": "AAA="}]}, 422, "InvalidPrompt", "masks must be [N, 128, 128]"),
    ({"masks": [{"shape": [-1, 1], "data": "AAA="}, {"shape": [1, 2], "data": "AAAAAA=="}]}, 422, "InvalidPrompt", ""),
    ({"boxes": [[1, 1, 2, 2]] * 65, "logits": True}, 422, "InvalidPrompt", "logits of 65 masks"),
    ({"boxs": []}, 422, "InvalidPrompt", "boxs"),
    ({"boxes": [[1, 1, 2, 2]], "model": "nope"}, 404, "NotFound", "'nope' is not served"),
    ({"boxes": [[1, 1, 2, 2]] * 5000}, 422, "InvalidPrompt", "5000 prompts"),
    ({"points": [[[1, 1]] * 129]}, 422, "InvalidPrompt", "129 points for one object"),
    ({"boxes": [[1, 1, 2, 2]], "multimask": "yes"}, 422, "InvalidPrompt", "multimask"),
]


@pytest.mark.parametrize(("body", "status", "kind", "says"), SEGMENT_ERRORS, ids=lambda value: str(value)[:40])
def test_refuses_bad_prompts(
    http: httpx.Client, image: bytes, body: dict[str, Any], status: int, kind: str, says: str
) -> None:
    if "embedding_id" not in body:
        body = {**body, "embedding_id": http.post("/v1/embed", content=image).headers["x-embedding-id"]}
    answer = http.post("/v1/segment", json=body)
    assert (answer.status_code, answer.json()["error_type"]) == (status, kind), answer.text
    assert says in answer.json()["error"]


def test_no_number_that_is_not_finite(http: httpx.Client, image: bytes) -> None:
    identity = http.post("/v1/embed", content=image).headers["x-embedding-id"]
    for number in ("NaN", "Infinity", "1e999"):
        text = f'{{"embedding_id": "{identity}", "boxes": [[0, 0, {number}, 9]]}}'
        answer = http.post("/v1/segment", content=text, headers={"content-type": "application/json"})
        assert answer.status_code == 422, answer.text


@pytest.mark.parametrize(
    ("name", "status"),
    [("truncated.jpg", 422), ("not_an_image.png", 415), ("nan.tif", 422), ("bomb.png", 413), ("empty.png", 400)],
)
def test_refuses_broken_images(http: httpx.Client, sample_images: Path, name: str, status: int) -> None:
    answer = http.post("/v1/embed", content=(sample_images / "broken" / name).read_bytes())
    assert answer.status_code == status
    assert set(answer.json()) == {"error", "error_type"}
    assert "Traceback" not in answer.text


def test_refuses_bodies_of_the_wrong_kind(http: httpx.Client, image: bytes) -> None:
    post = http.post
    assert post("/v1/embed", content=image, headers={"content-type": "text/html"}).status_code == 415
    assert post("/v1/embed", content=b"x", headers={"content-type": "multipart/form-data"}).status_code == 400
    assert post("/v1/embed", files={"picture": ("c.png", image)}).status_code == 400
    assert post("/v1/segment", content=b"{", headers={"content-type": "application/json"}).status_code == 422
    assert post("/v1/segment", files={"image": ("c.png", image)}).status_code == 400
    both = {"request": json.dumps({"embedding_id": "0" * 64, "boxes": [[1, 1, 2, 2]]})}
    assert post("/v1/segment", files={"image": ("c.png", image)}, data=both).status_code == 400
    for method, path, status in (("GET", "/nothing", 404), ("PUT", "/v1/embed", 405)):
        answer = http.request(method, path)
        assert (answer.status_code, set(answer.json())) == (status, {"error", "error_type"})


@pytest.mark.parametrize("declared", [True, False])
def test_refuses_a_body_over_the_limit(app: App, http: httpx.Client, image: bytes, declared: bool) -> None:
    limit = settings.load(app.config).limits.image_bytes
    body = image + bytes(limit)
    content = body if declared else iter([body[i : i + 65536] for i in range(0, len(body), 65536)])
    try:
        answer = http.post("/v1/embed", content=content, headers={"content-type": "image/png"})
        assert answer.status_code == 413
        assert str(limit) in answer.json()["error"]
    except (httpx.WriteError, httpx.RemoteProtocolError):  # it answered and closed before all was sent
        pass
    form = http.post("/v1/segment", files={"image": ("c.png", body)}, data={"request": "{}"})
    assert form.status_code == 413
    assert http.get("/healthz").status_code == 200


def test_settings_reach_the_replicas(app: App, http: httpx.Client) -> None:
    assert yaml.safe_load(Path(app.config).read_text())["datasets"] == [app.dataset, app.shown]
    answer = http.post("/v1/segment", json={"embedding_id": "0" * 64, "boxes": [[1, 1, 2, 2]]})
    assert app.dataset in answer.json()["error"]
