"""What the service answers beside one image's embedding and masks: many, pooled, label maps, lists, previews, ONNX."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import onnxruntime
import pytest
from PIL import Image

from cluster import settings
from cluster.errors import InvalidPrompt, NotFound
from serve_app import dataset, models
from serve_app.client import Client
from serve_app.model import decoder, masks
from serve_app.model.masks import MaskSet
from serve_app.model.prompts import DecodeRequest, Prompts
from tests.conftest import App

POINTS = [[[100, 100]], [[300, 200]]]


@pytest.fixture(scope="module")
def http(app: App) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=app.http, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def image(sample_images: Path) -> bytes:
    return (sample_images / "coffee_rgb.png").read_bytes()


@pytest.fixture(scope="module")
def identity(http: httpx.Client, image: bytes) -> str:
    return http.post("/v1/embed", content=image).headers["x-embedding-id"]


def test_many_images_are_answered_together_each_with_its_own_error(
    http: httpx.Client, image: bytes, sample_images: Path
) -> None:
    bad = (sample_images / "broken" / "truncated.jpg").read_bytes()
    coins = (sample_images / "coins_grey8.png").read_bytes()
    files = [("image", (name, data)) for name, data in (("a", image), ("b", bad), ("c", coins))]
    answer = http.post("/v1/embed", files=files)
    assert answer.status_code == 200, answer.text
    rows = np.load(io.BytesIO(answer.content))
    assert rows["filename"].tolist() == ["a", "b", "c"]
    assert rows["error_type"].tolist() == ["", "InvalidImage", ""]
    assert (rows["embedding"].dtype, rows["embedding"].shape) == (np.float16, (3, 256, 32, 32))
    assert not rows["embedding"][1].any()
    for row, data in ((0, image), (2, coins)):
        alone = http.post("/v1/embed", content=data)
        assert rows["embedding_id"][row] == alone.headers["x-embedding-id"]
        np.testing.assert_array_equal(rows["embedding"][row].ravel(), np.frombuffer(alone.content, "<f2"))
    assert rows["original_size"][0].tolist() == [400, 600]
    refused = http.post("/v1/embed", files=files, headers={"accept": "application/octet-stream"})
    assert (refused.status_code, "application/x-npz" in refused.text) == (400, True)
    too_many = http.post("/v1/embed", files=[("image", (str(n), b"x")) for n in range(65)])
    assert too_many.status_code == 400


def test_pooled_is_the_mean_over_the_image(http: httpx.Client, image: bytes, identity: str) -> None:
    whole = np.frombuffer(http.get(f"/v1/embeddings/{identity}").content, "<f2").reshape(256, 32, 32)
    held = whole[:, :22].mean(axis=(1, 2), dtype=np.float32)  # 400 × 600 fills 171 of 256 rows, 22 of 32 tokens
    for answer in (
        http.post("/v1/embed", params={"pooled": True}, content=image),
        http.get(f"/v1/embeddings/{identity}", params={"pooled": True}),
    ):
        assert (answer.headers["x-dtype"], answer.headers["x-shape"]) == ("float32", "256")
        np.testing.assert_allclose(np.frombuffer(answer.content, "<f4"), held, rtol=1e-4, atol=1e-5)
    tags = {http.get(f"/v1/embeddings/{identity}", params={"pooled": p}).headers["etag"] for p in (True, False)}
    assert len(tags) == 2


def test_a_mask_is_refined_with_a_next_click(app: App, image: bytes, identity: str) -> None:
    folder = models.prepare(settings.load(app.config), "nano")
    with Client(app.http) as cellray:
        first = cellray.segment(embedding_id=identity, points=POINTS, logits=True).found
        assert first.logits is not None
        second = cellray.segment(
            embedding_id=identity, points=[[[100, 100], [5, 5]]], labels=[[1, 0]], masks=first.logits[:1]
        ).found
        without = cellray.segment(embedding_id=identity, points=[[[100, 100], [5, 5]]], labels=[[1, 0]]).found
        array = cellray.embedding(identity).array
    assert (first.logits.shape, second.logits) == ((2, 128, 128), None)
    prompts = Prompts(
        points=np.array([[[100, 100], [5, 5]]], np.float32),
        labels=np.array([[1, 0]], np.int32),
        masks=first.logits[:1].astype(np.float32),
    )
    (expected,) = decoder.segment(decoder.load(folder, "auto"), [DecodeRequest(array, (400, 600), prompts)])
    assert isinstance(expected, MaskSet)
    assert masks.iou(second.decode()[0], expected.decode()[0]) > 0.999
    assert abs(second.predicted_iou[0] - expected.predicted_iou[0]) < 1e-3
    assert second.counts != without.counts


def test_low_resolution_is_the_decoders_own(app: App, identity: str) -> None:
    with Client(app.http) as cellray:
        low = cellray.segment(embedding_id=identity, points=POINTS, resolution="low", logits=True).found
        full = cellray.segment(embedding_id=identity, points=POINTS).found
    assert low.logits is not None
    assert (low.size, full.size) == ((86, 128), (400, 600))
    np.testing.assert_array_equal(low.decode(), low.logits[:, :86] > 0)
    for small, large in zip(low.decode(), full.decode(), strict=True):
        enlarged = np.array(Image.fromarray(small).resize((600, 400)))
        assert masks.iou(enlarged, large) > 0.9


def test_label_maps(http: httpx.Client, identity: str) -> None:
    body = {"embedding_id": identity, "points": POINTS, "multimask": True}
    found = http.post("/v1/segment", json=body).json()["masks"]
    expected = np.zeros((400, 600), np.uint16)
    best = [max((m for m in found if m["prompt_index"] == i), key=lambda m: m["predicted_iou"]) for i in range(2)]
    for mask in sorted(best, key=lambda mask: -mask["area"]):
        expected[masks.decode([mask["segmentation"]["counts"]], (400, 600))[0]] = mask["prompt_index"] + 1
    png = http.post("/v1/segment", json=body, headers={"accept": "image/png"})
    raw = http.post("/v1/segment", json=body, headers={"accept": "application/octet-stream"})
    opened = Image.open(io.BytesIO(png.content))
    assert opened.mode == "I;16"
    np.testing.assert_array_equal(np.array(opened), expected)
    assert raw.headers["x-shape"] == "400,600"
    np.testing.assert_array_equal(np.frombuffer(raw.content, "<u2").reshape(400, 600), expected)

    everything = http.post(
        "/v1/automask",
        json={"embedding_id": identity, "points_per_side": 4, "pred_iou_thresh": 0, "stability_score_thresh": 0},
        headers={"accept": "image/png"},
    )
    assert np.array(Image.open(io.BytesIO(everything.content))).max() > 1


def test_masks_as_png(http: httpx.Client, identity: str) -> None:
    body = {"embedding_id": identity, "points": POINTS}
    plain = http.post("/v1/segment", json=body).json()["masks"]
    for mask, same in zip(
        plain, http.post("/v1/segment", json={**body, "encoding": "png"}).json()["masks"], strict=True
    ):
        plane = np.array(Image.open(io.BytesIO(base64.b64decode(same["png"]))))
        assert set(np.unique(plane)) <= {0, 255}
        np.testing.assert_array_equal(plane > 0, masks.decode([mask["segmentation"]["counts"]], (400, 600))[0])
        assert "segmentation" not in same


def test_the_images_of_the_data_sets_are_listed_and_shown(
    app: App, http: httpx.Client, shown: str, sample_images: Path, image: bytes
) -> None:
    listed, after = [], ""
    for _ in range(99):
        page = http.get("/v1/images", params={"limit": 3, "after": after}).json()
        assert len(page["images"]) <= 3
        listed += page["images"]
        after = page["next"]
        if not after:
            break
    names = ["image_uri", "part", "embedding_id"]
    stored: Counter[tuple[str, ...]] = Counter()
    for uri in (app.dataset, shown):  # other tests may have put the same images into the first
        with suppress(NotFound):
            table = dataset.open(uri).table(dataset.EMBEDDINGS, names)
            stored.update(zip(*(table[name].to_pylist() for name in names), strict=True))
    assert Counter(tuple(one[name] for name in names) for one in listed) == stored
    coffee = next(one for one in listed if one["image_uri"] == str(sample_images / "coffee_rgb.png"))
    assert (coffee["width"], coffee["height"], coffee["part"]) == (600, 400, "")
    preview = http.get(f"/v1/images/{coffee['image_id']}", params={"size": 300})
    assert preview.headers["x-original-size"] == "400,600"
    drawn = Image.open(io.BytesIO(preview.content))
    assert drawn.size == (300, 200)
    small = Image.open(io.BytesIO(image)).convert("RGB").resize((300, 200))
    assert np.abs(np.asarray(drawn, int) - np.asarray(small, int)).mean() < 8
    assert http.get(f"/v1/images/{coffee['image_id']}", params={"size": 300}).headers["etag"] == preview.headers["etag"]
    masks_of = http.post("/v1/segment", json={"image_id": coffee["image_id"], "points": POINTS}).json()
    assert masks_of["embedding_id"] == coffee["embedding_id"]
    assert http.get(f"/v1/images/{'0' * 64}").status_code == 404
    assert http.get("/v1/images", params={"after": "nonsense"}).status_code == 400
    assert http.get("/v1/images", params={"limit": 1000}).status_code == 400


def test_a_preview_of_what_changed_since_is_refused(
    http: httpx.Client, app: App, shown: str, sample_images: Path
) -> None:
    path = sample_images / "coins_grey8.png"
    before = path.read_bytes()
    uri = str(path)
    listed = http.get("/v1/images", params={"limit": 100}).json()["images"]
    coins = next(one for one in listed if one["image_uri"] == uri)
    try:
        path.write_bytes((sample_images / "coffee_rgb.png").read_bytes())
        refused = http.get(f"/v1/images/{coins['image_id']}")
        assert (refused.status_code, refused.json()["error_type"]) == (409, "Conflict")
    finally:
        path.write_bytes(before)


def test_the_decoder_as_onnx(http: httpx.Client, image: bytes, identity: str) -> None:
    answer = http.get("/v1/models/nano/decoder.onnx")
    assert answer.status_code == 200, answer.text
    tag = {"if-none-match": answer.headers["etag"]}
    assert http.get("/v1/models/nano/decoder.onnx", headers=tag).status_code == 304
    assert http.get("/v1/models/none/decoder.onnx").status_code == 404
    session = onnxruntime.InferenceSession(answer.content)
    array = np.frombuffer(http.get(f"/v1/embeddings/{identity}").content, "<f2").reshape(1, 256, 32, 32)
    across, down = 256 / 600, 171 / 400  # a model's input has whole pixels
    found, _, _ = session.run(
        None,
        {
            "image_embeddings": array.astype(np.float32),
            "point_coords": np.array([[[100 * across, 100 * down], [0, 0]]], np.float32),
            "point_labels": np.array([[1, -1]], np.float32),
            "mask_input": np.zeros((1, 1, 128, 128), np.float32),
            "has_mask_input": np.zeros(1, np.float32),
            "orig_im_size": np.array([400, 600], np.float32),
        },
    )
    (mask,) = http.post("/v1/segment", json={"embedding_id": identity, "points": [[[100, 100]]]}).json()["masks"]
    ours = masks.decode([mask["segmentation"]["counts"]], (400, 600))[0]
    assert masks.iou(found[0, 0] > 0, ours) > 0.999


def test_the_specification_is_whole(http: httpx.Client) -> None:
    specification = http.get("/openapi.json").json()
    text = json.dumps(specification)
    for part in text.split('"$ref": "')[1:]:
        name = part.split('"')[0]
        assert name.startswith("#/components/schemas/"), name
        assert name.rsplit("/", 1)[1] in specification["components"]["schemas"], name
    for path in specification["paths"].values():
        assert all("summary" in operation for operation in path.values())


def test_logits_that_are_not_are_named() -> None:
    from serve_app.bodies import SegmentBody

    body = SegmentBody.parse('{"masks": [{"shape": [1, 1], "data": "?"}]}')
    with pytest.raises(InvalidPrompt, match="not base64"):
        body.asked(9)
