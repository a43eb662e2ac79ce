"""A CellSAM behind the app: every cell of an image, by a job and over HTTP, as in plain Python."""

from __future__ import annotations

import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import yaml
from PIL import Image
from skimage import data

from cluster import settings, telemetry
from cluster.storage import Storage
from jobs import cli, segment
from serve_app import dataset, models
from serve_app.model import cell_masks, cells, masks
from serve_app.model.cell_masks import Boxes, Cells
from serve_app.model.cells import CellSAM
from serve_app.model.cellsam import Options
from serve_app.model.paint import paint
from tests.conftest import CELLS, LICENCE, App

OPTIONS = Options(bbox_threshold=0.82, block_size=128, overlap=32)
ARGUMENTS = ["--bbox-threshold", "0.82", "--block-size", "128", "--overlap", "32"]
PATIENCE_S = 180.0


class AsServed(CellSAM):
    """With embeddings rounded as they travel."""

    def segment_tile(self, ready: np.ndarray, bbox_threshold: float) -> Cells:
        (found,), (embedding,) = cells.find(self.detector, [ready]), cells.embed(self.encoder, [ready])
        assert isinstance(found, Boxes)
        assert isinstance(embedding, np.ndarray)
        return paint(self.decoder, embedding.astype(np.float16), found.above(bbox_threshold), ready.shape[:2])


@dataclass(frozen=True)
class Served:
    """An app that serves a CellSAM beside nano, settings for jobs to which few pixels are many, and the same weights in
    this process."""

    http: str
    config: str
    model: CellSAM


@pytest.fixture(scope="module")
def served(app: App) -> Served:
    config = Path(app.config).with_name("slides.yaml")
    config.write_text(
        yaml.safe_dump({**yaml.safe_load(Path(app.config).read_text()), "limits": {"image_pixels": 300 * 300}})
    )
    loaded = cells.load(models.prepare(settings.load(app.config), CELLS))
    model = AsServed(loaded.encoder, loaded.detector, loaded.decoder, loaded.device)
    return Served(app.http, str(config), model)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Real ones: grey of 16 bits and of 8, RGB, two channels; the last three are larger than a tile."""
    tissue = data.immunohistochemistry()
    return {
        "deep.tif": data.coins()[100:220, 100:220].astype(np.uint16) * 211,
        "grey.png": data.coins()[:200, :180],
        "rgb.png": tissue[:200, :160],
        "two.tif": np.ascontiguousarray(tissue[200:330, 100:260, :2]),
    }


@pytest.fixture(scope="module")
def folder(images: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, image in images.items():
        if name.endswith("png"):
            Image.fromarray(image).save(folder / name)
        else:
            tifffile.imwrite(folder / name, image, planarconfig="contig" if image.ndim == 3 else None)
    return folder


def test_a_job_finds_what_plain_python_finds(
    served: Served, images: dict[str, np.ndarray], folder: Path, tmp_path: Path
) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    out = str(tmp_path / "out")
    arguments = [str(folder), out, "--model", "cells", "--config", served.config, *ARGUMENTS]
    assert segment.main([*arguments, "--max-error-rate", "1"]) == 0
    (folder / "broken.png").unlink()
    found = dataset.open(out, Storage(settings.load(served.config).storage))
    rows = found.table(dataset.MASKS, None).to_pylist()
    for name, image in images.items():
        expected = served.model.segment(image, OPTIONS)
        own = sorted((row for row in rows if row["image_uri"].endswith(name)), key=lambda row: row["mask_index"])
        assert [row["mask_index"] for row in own] == list(range(len(own)))
        _alike(own, expected)
        boxes = np.array([json.loads(row["prompt"])["box"] for row in own])
        apart = np.abs(boxes[:, None] - expected.boxes).max(2)
        nearest = apart.argmin(1)
        same = apart.min(1) < 0.1
        assert same.mean() > 0.9
        for column, wanted in (("box_score", expected.box_scores), ("object_embedding", expected.object_embeddings)):
            values = np.array([row[column] for row in own])[same]
            assert np.abs(values - wanted[nearest[same]]).max() < 1e-2 * np.abs(values).max()
        assert {row["prompt_type"] for row in own} == {"cells"}
        assert {row["stability_score"] for row in own} == {None}
    (error,) = found.table(dataset.ERRORS, None).to_pylist()
    assert (Path(error["image_uri"]).name, error["error_type"]) == ("broken.png", "UnsupportedImage")
    (file,) = Path(out, "masks").glob("*.parquet")
    footer = pq.read_schema(file).metadata
    assert (footer[b"cellray.licence"].decode(), footer[b"cellray.preprocess"]) == (LICENCE, b"cellsam-1")


def _alike(rows: list[dict[str, Any]], expected: Cells) -> None:
    """As many cells, but for one whose score is the threshold; and their pixels."""
    assert len(expected) > 1
    assert abs(len(rows) - len(expected)) <= 1
    assert ((_labels(rows) > 0) == (expected.labels > 0)).mean() > 0.99


def _labels(rows: list[dict[str, Any]]) -> np.ndarray:
    counts, areas = [row["segmentation"]["counts"] for row in rows], [row["area"] for row in rows]
    return masks.label_map(counts, areas, range(1, len(rows) + 1), tuple(rows[0]["segmentation"]["size"]))


def test_a_slide_is_read_by_windows_and_its_damage_is_a_hole(served: Served, tmp_path: Path) -> None:
    """One of more pixels than an image may have, with a tile that cannot be decoded."""
    whole = data.immunohistochemistry()[:320, :320]
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, whole, tile=(64, 64), compression="deflate", photometric="rgb")
    out = str(tmp_path / "sound")
    arguments = ["--model", "cells", "--config", served.config, *ARGUMENTS]
    assert segment.main([str(path), out, *arguments]) == 0
    expected = served.model.segment(whole, OPTIONS)
    _alike(_rows(out, dataset.MASKS, served), expected)

    with tifffile.TiffFile(path) as file:
        offset = file.pages.first.dataoffsets[5 * 2 + 3]  # rows from 128, columns from 192
        content = bytearray(path.read_bytes())
    content[offset : offset + 64] = bytes(64)
    path.write_bytes(content)
    out = str(tmp_path / "damaged")
    assert segment.main([str(path), out, *arguments, "--max-error-rate", "1"]) == 0
    errors = _rows(out, dataset.ERRORS, served)
    places = {tuple(map(int, row["part"].removeprefix("xywh=").split(","))) for row in errors}
    assert (128, 128, 128, 128) in places  # and its neighbours, which see some of it
    assert all(abs(x - 128) <= 128 and abs(y - 128) <= 128 for x, y, _, _ in places)
    labels = _labels(_rows(out, dataset.MASKS, served))
    for x, y, width, height in places:
        assert not labels[y : y + height, x : x + width].any()
    assert ((labels[:, :60] > 0) == (expected.labels[:, :60] > 0)).mean() > 0.99


def _rows(out: str, name: str, served: Served) -> list[dict[str, Any]]:
    found = dataset.open(out, Storage(settings.load(served.config).storage))
    return sorted(found.table(name, None).to_pylist(), key=lambda row: row.get("mask_index", 0))


def test_options_that_do_not_go_together(served: Served, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in (
        (["--model", "nano", "--bbox-threshold", "0.3"], "--bbox-threshold goes with a model that finds cells"),
        (["--model", "cells", "--grid", "4", "--block-size", "100"], "--block-size goes with a model"),
        (["--model", "cells", "--tile", "512"], "of cells the tiles are --block-size"),
        (["--model", "cells", "--iou-threshold", "2"], "iou_threshold is 2; expected above 0, at most 1"),
    ):
        assert segment.main([str(folder), "nowhere", "--config", served.config, *given]) == 2
        assert message in capsys.readouterr().err


def _ask(served: Served, image: bytes | None, request: dict[str, Any], accept: str = "*/*") -> httpx.Response:
    body = json.dumps({"model": "cells", **request})
    headers, url = {"accept": accept}, f"{served.http}/v1/segment"
    if image is None:
        json_type = {"content-type": "application/json"}
        return httpx.post(url, content=body, headers=headers | json_type, timeout=60)
    return httpx.post(url, files={"image": image}, data={"request": body}, headers=headers, timeout=60)


def test_over_http(served: Served, images: dict[str, np.ndarray], folder: Path) -> None:
    asked = {"prompts": "cells", "bbox_threshold": 0.82, "block_size": 128, "overlap": 32}
    for name in ("two.tif", "grey.png"):
        expected, content = served.model.segment(images[name], OPTIONS), (folder / name).read_bytes()
        answer = _ask(served, content, asked)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        _alike(found["masks"], expected)
        assert found["masks"][0]["box_score"] == pytest.approx(expected.box_scores[0], abs=1e-3)
        plane = np.asarray(Image.open(io.BytesIO(_ask(served, content, asked, "image/png").content)))
        assert ((plane > 0) == (expected.labels > 0)).mean() > 0.99
    end, told = time.monotonic() + PATIENCE_S, ""
    while not all(f"{name}_count{{" in told for name in (telemetry.CELLFINDER_SECONDS, telemetry.CELLS_SECONDS)):
        assert time.monotonic() < end, told
        time.sleep(1)
        told = httpx.get(f"{served.http}/metrics", timeout=60).text
    listed = {one["name"]: one for one in httpx.get(f"{served.http}/v1/models", timeout=60).json()}
    assert [listed[name]["cells"] for name in ("nano", "cells")] == [False, True]
    assert listed["cells"]["licence"] == LICENCE


@pytest.mark.parametrize(
    ("request_body", "message"),
    [
        ({"prompts": "cells", "model": "nano"}, "model nano finds no cells; models that do: cells"),
        ({"prompts": "cells", "boxes": [[1, 2, 3, 4]]}, "leave out boxes"),
        ({"bbox_threshold": 0.5, "boxes": [[1, 2, 30, 40]]}, "bbox_threshold: only with prompts: cells"),
        ({"prompts": "cells", "bbox_threshold": 2}, "bbox_threshold is 2; expected 0 to 1"),
        ({"prompts": "everything"}, "request.prompts: Input should be 'cells'"),
    ],
)
def test_requests_that_make_no_sense(served: Served, folder: Path, request_body: dict[str, Any], message: str) -> None:
    answer = _ask(served, (folder / "grey.png").read_bytes(), request_body)
    assert (answer.status_code, message in answer.json()["error"]) == (422, True) or (
        answer.status_code == 400 and message in answer.json()["error"]
    ), answer.text


def test_cells_of_no_image(served: Served) -> None:
    answer = _ask(served, None, {"prompts": "cells"})
    assert "needs the image (multipart), or the image_id" in answer.json()["error"]


def test_outlines_are_those_of_the_label_image(served: Served, images: dict[str, np.ndarray]) -> None:
    found = served.model.segment(images["rgb.png"], OPTIONS)
    made = found.masks()
    assert np.array_equal(made.areas, found.areas())
    _, boxes = masks.areas_and_boxes(made.counts, made.size)
    assert np.array_equal(made.boxes, boxes)
    assert len(cell_masks.outlined([], (4, 5))) == 0


def test_from_the_shell(served: Served, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, out = str(folder / "two.tif"), tmp_path / "cells.json"
    arguments = ["client", "--url", served.http, "--model", "cells", "segment", "--cells", image]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    found = json.loads(out.read_text())["masks"]
    assert capsys.readouterr().out.count("\n") == len(found) > 0
    assert {row["stability_score"] for row in found} == {None}
    assert cli.main([*arguments, "--box", "1,2,30,40"]) == 2
    assert "--cells finds them by itself" in capsys.readouterr().err
