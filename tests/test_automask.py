"""Automatic masks over crops through both doors, the job and HTTP: as the model makes them from the same pixels."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from cluster import settings
from jobs import segment
from serve_app import dataset, model_replicas, models
from serve_app.model import automask, decoder, encoder, masks, preprocess
from serve_app.model.masks import MaskSet
from serve_app.model.prompts import GridOptions, crops
from tests.conftest import App

BOX = 100, 100, 148, 142  # so small that no edge of a crop is 20 pixels from the image's: nano's noise touches all
OPTIONS: dict[str, Any] = {
    "pred_iou_thresh": -1e9,
    "stability_score_thresh": 0.0,
    "box_nms_thresh": 1.0,
    "crop_n_layers": 1,
    "crop_nms_thresh": 1.0,
}


def test_a_replica_bounds_what_it_does_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = 0, 0

    def generate(*_: Any) -> MaskSet:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        running -= 1
        return MaskSet.join((4, 4), [], 256)

    async def ask(number: int) -> list[Any]:
        replica = model_replicas.DecoderReplica(settings.load(environ={}), "nano")
        calls = [replica.automask([([], (4, 4))], GridOptions()) for _ in range(number)]
        return await asyncio.gather(*calls)

    monkeypatch.setattr(model_replicas, "_use_cores", lambda: None)
    monkeypatch.setattr(automask, "generate", generate)
    assert len(asyncio.run(ask(6))) == 6
    assert most == model_replicas.WHOLE


@pytest.fixture(scope="module")
def path(sample_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("one") / "small.png"
    Image.open(sample_images / "ihc_rgb.png").crop(BOX).save(path)
    return path


@pytest.fixture(scope="module")
def expected(app: App, path: Path) -> MaskSet:
    folder = models.prepare(settings.load(app.config), "nano")
    pixels = preprocess.decode(path.read_bytes(), 10**8)
    size, options = (pixels.shape[0], pixels.shape[1]), GridOptions(2, **OPTIONS)
    parts = crops(size, options)
    arrays = encoder.embed(encoder.load(folder, "auto"), [crop.cut(pixels, 256) for crop in parts])
    views = [(array, crop) for array, crop in zip(arrays, parts, strict=True) if isinstance(array, np.ndarray)]
    found = automask.generate(decoder.load(folder, "auto"), views, size, options)
    assert len(views) == 5
    assert len(np.unique(found.prompt_index // 4)) >= 3, "several crops must have masks for this to mean something"
    return found


def assert_same(counts: list[str], expected: MaskSet) -> None:
    """One to one; float16 embeddings from batches of other sizes differ in their last bits."""
    assert len(counts) == len(expected)
    left = list(expected.decode())
    for plane in masks.decode(counts, expected.size):
        overlaps = [masks.iou(plane, other) for other in left]
        assert max(overlaps) > 0.98
        left.pop(int(np.argmax(overlaps)))


def test_the_job_looks_at_crops(app: App, path: Path, expected: MaskSet, tmp_path: Path) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    out = tmp_path / "out"
    arguments = [str(path.parent), str(out), "--model", "nano", "--config", app.config, "--grid", "2", *words]
    assert segment.main(arguments) == 0
    rows = dataset.open(str(out)).table(dataset.MASKS).to_pylist()
    assert_same([row["segmentation"]["counts"] for row in rows], expected)
    assert json.loads((out / "_report-segment.json").read_text())["encoder_calls"] == 5
    parts = crops(expected.size, GridOptions(2, **OPTIONS))
    boxes = {(x0, y0, x1 - x0, y1 - y0): crop for crop in parts[1:] for x0, y0, x1, y1 in [crop.box]}
    for row in rows:
        prompt = json.loads(row["prompt"])
        crop = boxes[tuple(prompt["crop_box"])] if "crop_box" in prompt else parts[0]
        assert prompt["points"] in crop.points().tolist()


def test_crops_of_stored_embeddings_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "nowhere"), str(tmp_path / "out"), "--model", "nano", "--embeddings", str(tmp_path)]
    assert segment.main([*arguments, "--crop-n-layers", "1"]) == 2
    assert "leave out --embeddings" in capsys.readouterr().err


def test_the_service_looks_at_crops(app: App, path: Path, expected: MaskSet) -> None:
    body = {"points_per_side": 2, **OPTIONS}
    image = {"image": (path.name, path.read_bytes())}
    with httpx.Client(base_url=app.http, timeout=60) as http:
        answer = http.post("/v1/automask", files=image, data={"request": json.dumps(body)})
        assert answer.status_code == 200, answer.text
        assert_same([one["segmentation"]["counts"] for one in answer.json()["masks"]], expected)

        by_id = http.post("/v1/automask", json={**body, "embedding_id": answer.json()["embedding_id"]})
        assert by_id.status_code == 400
        assert "crop_n_layers needs the image itself" in by_id.json()["error"]
        for wrong, status, says in (
            ({"crop_n_layers": 9}, 400, "crop_n_layers is 9; expected 0 to 3"),
            ({"box_nms_thresh": float("nan")}, 400, "box_nms_thresh is nan"),
            ({"points_per_side": 0}, 400, "points_per_side is 0"),
        ):
            text = json.dumps({**body, **wrong})
            refused = http.post("/v1/automask", files=image, data={"request": text})
            assert refused.status_code == status, refused.text
            assert says in refused.json()["error"]
