"""The jobs, end to end: real images, a real Ray with the app, local folders and a real S3 server."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import duckdb
import httpx
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
import s3fs
import tifffile
from PIL import Image

from cluster import settings
from cluster.storage import Storage
from jobs import cli, embed, estimate, replicas, segment, verify
from serve_app import contract, dataset, models
from serve_app.model import decoder, encoder, masks, preprocess
from serve_app.model.prompts import DecodeRequest, Prompts
from tests.conftest import App
from tests.s3 import ROOT

BROKEN = 5
GRID = ["--grid", "2", "--pred-iou-thresh=-inf", "--stability-score-thresh", "0"]


def run(job: object, app: App, *arguments: object) -> int:
    return job.main([*map(str, arguments), "--model", "nano", "--config", app.config])  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def embedded(app: App, sample_images: Path) -> str:
    """The sample images embedded into the data set that the app's settings name."""
    code = run(embed, app, sample_images, app.dataset, "--max-error-rate", 0.5, "--shard-images", 12)
    assert code == 0
    return app.dataset


def report(out: str | Path, job: str) -> dict:
    return json.loads((Path(out) / f"_report-{job}.json").read_text())


def test_every_image_is_a_row_and_every_bad_one_an_error(embedded: str, sample_images: Path) -> None:
    files = [path for path in sample_images.rglob("*") if path.is_file()]
    found = dataset.open(embedded)
    good = found.table(dataset.EMBEDDINGS, ["image_uri"])["image_uri"].to_pylist()
    bad = found.table(dataset.ERRORS).to_pylist()
    assert sorted(good + [row["image_uri"] for row in bad]) == sorted(map(str, files))
    assert {Path(row["image_uri"]).name: row["error_type"] for row in bad} == {
        "bomb.png": "TooLarge",
        "empty.png": "InvalidImage",
        "nan.tif": "InvalidImage",
        "not_an_image.png": "UnsupportedImage",
        "truncated.jpg": "InvalidImage",
    }
    assert len(found.records) == -(-len(files) // 12)


def test_a_job_stops_once_too_many_failed_and_goes_on_where_more_may(
    app: App, tmp_path: Path, sample_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = (next(sample_images.rglob(name)) for name in ("not_an_image.png", "coins_grey8.png"))
    for number in range(30):
        shutil.copy(bad if number % 3 else good, tmp_path / f"{number}.png")
    out, small = tmp_path / "out", ("--shard-images", 5, "--parallel", 1)
    assert run(embed, app, tmp_path, out, *small) == 1
    said = capsys.readouterr().out
    done = report(out, "embed")["done"]
    assert done < 30
    assert f"stopped after {done} of them" in said
    assert "higher --max-error-rate" in said
    assert dataset.open(str(out)).rows(dataset.ERRORS) == report(out, "embed")["errors"] > 3
    assert run(embed, app, tmp_path, out, *small) == 1
    assert report(out, "embed")["done"] == done
    assert run(embed, app, tmp_path, out, *small, "--max-error-rate", 0.7) == 0
    assert not list(verify.verify(dataset.open(str(out)), lambda _: None))
    assert (report(out, "embed")["done"], report(out, "embed")["errors"]) == (30, 20)


def test_an_image_named_twice_in_a_list_is_one_row(
    app: App, tmp_path: Path, sample_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(sample_images.rglob("coins_grey8.png"))
    (tmp_path / "list.txt").write_text(f"{name}\n" * 3)
    assert run(embed, app, tmp_path / "list.txt", tmp_path / "out") == 0
    assert "2 images are named again" in capsys.readouterr().out
    found = dataset.open(str(tmp_path / "out"))
    assert found.rows(dataset.EMBEDDINGS) == 1
    assert not list(verify.verify(found, lambda _: None))


def test_three_readers_see_what_the_model_computed(app: App, embedded: str, sample_images: Path) -> None:
    folder = models.prepare(settings.load(app.config), "nano")
    path = sample_images / "ihc_rgb.png"
    pixels = preprocess.resize(preprocess.decode(path.read_bytes(), 10**8), 256).pixels
    (expected,) = encoder.embed(encoder.load(folder, "reference"), [pixels])
    pattern = f"{embedded}/embeddings/*.parquet"
    rows = [
        duckdb.sql(f"SELECT * FROM '{pattern}' WHERE image_uri = '{path}'").fetchdf().to_dict("records"),
        pl.scan_parquet(pattern).filter(pl.col("image_uri") == str(path)).collect().to_dicts(),
        pd.read_parquet(f"{embedded}/embeddings")
        .query("image_uri == @path", local_dict={"path": str(path)})
        .to_dict("records"),
    ]
    for (row,) in rows:
        image_id = contract.image_id(path.read_bytes())
        assert row["embedding_id"] == contract.embedding_id(image_id, row["encoder_sha256"], "float32")
        array = np.frombuffer(bytes(row["embedding"]), "<f2").reshape(list(row["shape"]))
        assert array.shape == (256, 32, 32)
        np.testing.assert_allclose(array.astype(np.float32), np.asarray(expected, np.float32), atol=2e-2, rtol=2e-3)
        np.testing.assert_allclose(list(row["pooled"]), array.astype(np.float32).mean((1, 2)), atol=1e-3)


def test_embeddings_in_float32_compressed(app: App, sample_images: Path, tmp_path: Path) -> None:
    path, out = sample_images / "ihc_rgb.png", tmp_path / "out"
    assert run(embed, app, path, out, "--dtype", "float32", "--compression", "zstd") == 0
    folder = models.prepare(settings.load(app.config), "nano")
    pixels = preprocess.resize(preprocess.decode(path.read_bytes(), 10**8), 256).pixels
    (expected,) = encoder.embed(encoder.load(folder, "reference"), [pixels], dtype="float32")
    ((file, record),) = dataset.open(str(out)).files(dataset.EMBEDDINGS)
    (read,) = dataset.open_embeddings(Storage(), file, [0])
    assert isinstance(expected, np.ndarray)
    assert read.array.dtype == expected.dtype == np.float32
    assert np.abs(read.array - expected).max() < 1e-4 * np.abs(expected).max()
    assert (read.array != read.array.astype(np.float16)).mean() > 0.9  # they came as float32, too
    image_id = contract.image_id(path.read_bytes())
    assert record.embedding_ids == (contract.embedding_id(image_id, record.encoder_sha256, "float32", "float32"),)
    codecs = pq.ParquetFile(file).metadata.row_group(0)
    assert {codecs.column(leaf).compression for leaf in range(codecs.num_columns)} == {"ZSTD"}
    assert list(verify.verify(dataset.open(str(out)), lambda _: None)) == []
    assert run(segment, app, path, tmp_path / "masks", "--embeddings", out, *GRID) == 0
    assert dataset.open(str(tmp_path / "masks")).rows(dataset.MASKS) > 0


def test_pooled_vectors_alone(
    app: App, sample_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = sample_images / "ihc_rgb.png", tmp_path / "out"
    assert run(embed, app, path, out, "--pooled-only", "--dtype", "float32") == 2
    assert "leave out --dtype and --compression" in capsys.readouterr().err
    assert run(embed, app, path, out, "--pooled-only") == 0
    (row,) = dataset.open(str(out)).table(dataset.EMBEDDINGS).to_pylist()
    assert (row["embedding"], len(row["pooled"])) == (None, 256)
    assert list(verify.verify(dataset.open(str(out)), lambda _: None)) == []
    assert run(segment, app, path, tmp_path / "masks", "--embeddings", out, *GRID) == 2
    assert "holds no embeddings: its data set was made with --pooled-only" in capsys.readouterr().err
    assert run(embed, app, path, out) == 1
    assert "dtype: pooled there, float16 here" in capsys.readouterr().err


def test_the_service_answers_from_what_the_job_embedded(app: App, embedded: str) -> None:
    record = next(record for record in dataset.open(embedded).records if record.embedding_ids)
    body = {"embedding_id": record.embedding_ids[0], "boxes": [[0, 0, 8, 8]]}
    with httpx.Client(base_url=app.http, timeout=60) as http:
        for _ in range(15):  # an id that was not found just before is looked up again after ten seconds
            answer = http.post("/v1/segment", json=body)
            if answer.status_code == 200:
                break
            time.sleep(1)
    assert answer.status_code == 200, answer.text
    assert answer.json()["embedding_id"] == record.embedding_ids[0]


def test_the_service_finds_an_image_by_every_name(app: App, embedded: str, sample_images: Path) -> None:
    path = next(sample_images.rglob("coins_grey8.png"))
    rows = dataset.open(embedded).table(dataset.EMBEDDINGS).to_pylist()
    row = next(row for row in rows if row["image_uri"] == str(path))
    asked = [{name: row[name], "boxes": [[0, 0, 90, 90]]} for name in ("embedding_id", "image_id", "image_uri")]
    with httpx.Client(base_url=app.http, timeout=60) as http:
        answers = [http.post("/v1/segment", json=body).json() for body in asked]
        assert answers[0]["masks"]
        assert all(answer == answers[0] for answer in answers)
        got = http.get(f"/v1/embeddings/{row['embedding_id']}")
        assert (got.content, got.headers["x-image-id"]) == (row["embedding"], row["image_id"])
        assert "immutable" in got.headers["cache-control"]
        again = http.get(got.url, headers={"if-none-match": got.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        as_npz = http.get(got.url, headers={"if-none-match": got.headers["etag"], "accept": "application/x-npz"})
        assert np.load(io.BytesIO(as_npz.content))["embedding"].tobytes() == row["embedding"]
        assert http.get("/v1/embeddings/none").status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"image_uri": "/no/such.png"}, 404, "send the image instead"),
        ({"image_uri": "PATH", "part": "z=1"}, 404, "no part 'z=1' in the data sets; what is there is the whole"),
        ({"image_id": "0" * 64}, 404, "send the image instead"),
        ({"image_uri": "PATH", "image_id": "0" * 64}, 400, "image_id and image_uri were sent"),
        ({"image_id": "0" * 64, "part": "z=1"}, 400, "part goes with image_uri"),
        ({}, 400, "embedding_id, image_id, image_uri"),
    ],
)
def test_the_service_says_which_name_is_wrong(
    app: App, embedded: str, sample_images: Path, body: dict[str, str], status: int, said: str
) -> None:
    path = str(next(sample_images.rglob("coins_grey8.png")))
    asked = {name: path if value == "PATH" else value for name, value in body.items()}
    answer = httpx.post(f"{app.http}/v1/segment", json={**asked, "boxes": [[0, 0, 9, 9]]}, timeout=60)
    assert (answer.status_code, said in answer.json()["error"]) == (status, True), answer.text


def test_the_same_command_does_nothing_twice(
    app: App, embedded: str, sample_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(embedded).rglob("*.parquet")}
    code = run(embed, app, sample_images, embedded, "--max-error-rate", 0.5, "--shard-images", 12)
    assert code == 0
    assert "40 of 40 images are committed" in capsys.readouterr().out
    assert report(embedded, "embed")["encoder_calls"] == 0
    assert before == {path: path.stat().st_mtime_ns for path in Path(embedded).rglob("*.parquet")}


def test_another_plan_is_refused_with_the_difference(
    app: App, embedded: str, sample_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(embed, app, sample_images, embedded, "--limit", 3) == 1
    error = capsys.readouterr().err
    assert "images: 40 there, 3 here" in error
    assert "shard_images: 12 there, 256 here" in error


def test_another_dtype_is_another_plan_but_its_embeddings_are_good(
    app: App,
    embedded: str,
    sample_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    connect = replicas.connect
    monkeypatch.setattr(replicas, "connect", lambda model: replace(connect(model), dtype="bfloat16"))
    arguments = ("--max-error-rate", 0.5, "--shard-images", 12)
    assert run(embed, app, sample_images, embedded, *arguments) == 1
    assert "compute_dtype: float32 there, bfloat16 here" in capsys.readouterr().err
    one = sample_images / "coins_grey8.png"
    assert run(segment, app, one, tmp_path / "out", "--embeddings", embedded, *GRID) == 0
    found = dataset.open(str(tmp_path / "out"))
    for uri, _ in found.files(dataset.MASKS):
        assert pq.read_schema(uri).metadata[b"cellray.compute_dtype"] == b"bfloat16"
    assert report(tmp_path / "out", "segment")["model"]["dtype"] == "bfloat16"


def test_segments_stored_embeddings_without_images_or_encoder(
    app: App, embedded: str, sample_images: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sample_images, copy)
    assert run(embed, app, copy, tmp_path / "out", "--max-error-rate", 0.5) == 0
    for path in copy.rglob("*.*"):
        path.write_bytes(b"no image any more")  # whoever read the images now would fail
    code = run(segment, app, copy, tmp_path / "out", "--embeddings", tmp_path / "out", "--max-error-rate", 0.5, *GRID)
    assert code == 0
    assert report(tmp_path / "out", "segment")["encoder_calls"] == 0
    found = dataset.open(str(tmp_path / "out"))
    rows = found.table(dataset.MASKS).to_pylist()
    assert len({row["image_uri"] for row in rows}) == found.rows(dataset.EMBEDDINGS)
    for row in rows[:20]:
        mask = masks.decode([row["segmentation"]["counts"]], tuple(row["segmentation"]["size"]))[0]
        assert mask.sum() == row["area"] > 0
        assert len(row["object_embedding"]) == 256


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory, sample_images: Path) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "boxes.jsonl"
    rows = [
        {"image_uri": "ihc_rgb.png", "box": [10, 20, 200, 220]},
        {"image_uri": "ihc_rgb.png", "box": [200, 200, 500, 512]},
        {"image_uri": str(sample_images / "coins_grey8.png"), "points": [[50, 60], [5, 5]], "labels": [1, 0]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("from_embeddings", [True, False])
def test_segments_prompts_as_the_model_does(
    app: App, embedded: str, sample_images: Path, prompts: Path, tmp_path: Path, from_embeddings: bool
) -> None:
    extra = ["--embeddings", embedded] if from_embeddings else []
    assert run(segment, app, sample_images, tmp_path / "out", "--prompts", prompts, *extra) == 0
    rows = dataset.open(str(tmp_path / "out")).table(dataset.MASKS).to_pylist()
    assert [row["prompt_type"] for row in rows] == ["points", "box", "box"]
    assert json.loads(rows[1]["prompt"]) == {"box": [10, 20, 200, 220]}
    assert report(tmp_path / "out", "segment")["encoder_calls"] == (0 if from_embeddings else 2)

    folder = models.prepare(settings.load(app.config), "nano")
    image = preprocess.resize(preprocess.decode((sample_images / "ihc_rgb.png").read_bytes(), 10**8), 256)
    (array,) = encoder.embed(encoder.load(folder, "auto"), [image.pixels])
    assert isinstance(array, np.ndarray)
    boxes = Prompts(boxes=np.array([[10, 20, 200, 220], [200, 200, 500, 512]], np.float32))
    (expected,) = decoder.segment(decoder.load(folder, "auto"), [DecodeRequest(array, image.original, boxes)])
    assert isinstance(expected, masks.MaskSet)
    got = masks.decode([row["segmentation"]["counts"] for row in rows[1:]], image.original)
    assert min(map(masks.iou, got, expected.decode())) > 0.98  # float16 embeddings from batches of other sizes


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image of 2 focal planes of 3 channels, with a disc each, within a tile and on a seam; and a damaged one."""
    folder = tmp_path_factory.mktemp("stacks")
    rows, columns = np.mgrid[:300, :400]
    planes = np.full((2, 3, 300, 400), 500, np.uint16)
    for z, (x, y) in enumerate([(200, 150), (80, 70)]):
        planes[z, 1] += (20_000 * ((rows - y) ** 2 + (columns - x) ** 2 < 24**2)).astype(np.uint16)
    names = ["blank", "DAPI", "noise"]
    tifffile.imwrite(folder / "a.ome.tif", planes, ome=True, metadata={"axes": "ZCYX", "Channel": {"Name": names}})
    (folder / "b.tif").write_bytes((folder / "a.ome.tif").read_bytes()[:9000])
    return folder


@pytest.mark.parametrize("from_embeddings", [False, True])
def test_planes_and_tiles_are_rows_and_masks_those_of_a_plane(
    app: App, stacks: Path, tmp_path: Path, from_embeddings: bool
) -> None:
    out, looked = tmp_path / "out", ["--channels", "grey=DAPI", "--z", "each", "--tile", 256, "--overlap", 64]
    prompts = tmp_path / "boxes.csv"
    boxes = [[176, 126, 224, 174], [56, 46, 104, 94], [100, 10, 390, 290]]
    prompts.write_text("image_uri,box\n" + "".join(f'a.ome.tif,"{box}"\n' for box in boxes))
    arguments = [stacks, out, "--prompts", prompts, "--max-error-rate", 1]
    if from_embeddings:
        assert run(embed, app, stacks, out, *looked, "--max-error-rate", 0.5) == 0
        found = dataset.open(str(out))
        rows = found.table(dataset.EMBEDDINGS, ["part", "x", "y", "width", "height", "image_id"]).to_pylist()
        assert [row["part"] for row in rows[:4]] == [
            f"channels=grey=DAPI&z=0&xywh={x},{y},256,256" for y in (0, 44) for x in (0, 144)
        ]
        assert [(row["x"], row["y"], row["width"]) for row in rows[2:4]] == [(0, 44, 256), (144, 44, 256)]
        assert len({row["image_id"] for row in rows}) == len(rows) == 8
        assert found.rows(dataset.ERRORS) >= 1
        assert report(out, "embed")["images"] == 2
        assert report(out, "embed")["errors"] == 1
        assert cli.main(["verify", str(out)]) == 0
        arguments += ["--embeddings", out]
    else:
        arguments += looked
    assert run(segment, app, *arguments) == 0
    found = dataset.open(str(out))
    rows = found.table(dataset.MASKS).to_pylist()
    assert [row["part"] for row in rows] == ["channels=grey=DAPI&z=0"] * 2 + ["channels=grey=DAPI&z=1"] * 2
    assert {row["segmentation"]["size"][0] for row in rows} == {300}
    seen = {row["part"][-1]: row for row in rows if json.loads(row["prompt"])["box"] == boxes[int(row["part"][-1])]}
    for z, (x, y) in {"0": (200, 150), "1": (80, 70)}.items():
        (mask,) = masks.decode([seen[z]["segmentation"]["counts"]], (300, 400))
        around, down = np.mgrid[:300, :400]
        assert masks.iou(mask, (around - y) ** 2 + (down - x) ** 2 < 24**2) > 0.7
    errors = [row for row in found.table(dataset.ERRORS).to_pylist() if row["stage"] == "segment"]
    assert [row["error_type"] for row in errors] == ["InvalidPrompt"] * 2
    assert "lies in no tile of 256 px" in errors[0]["message"]


def test_automatic_masks_of_tiles_are_whole_once(app: App, stacks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--channels", "grey=1", "--z", 0, "--tile", 256, "--overlap", 96, "--grid", 12]
    assert (
        run(
            segment, app, stacks / "a.ome.tif", out, *options, "--pred-iou-thresh", 0.5, "--stability-score-thresh", 0.8
        )
        == 0
    )
    rows = dataset.open(str(out)).table(dataset.MASKS).to_pylist()
    rows_there, columns = np.mgrid[:300, :400]
    disc = (rows_there - 150) ** 2 + (columns - 200) ** 2 < 24**2
    found = masks.decode([row["segmentation"]["counts"] for row in rows], (300, 400))
    assert sum(masks.iou(mask, disc) > 0.7 for mask in found) == 1
    assert cli.main(["verify", str(out)]) == 0
    assert cli.main(["show", str(out), "--to", str(tmp_path / "sheet")]) == 0


def test_a_job_on_s3_through_ray_job_submit(app: App, sample_images: Path) -> None:
    """Reads from and writes to S3 as a user would run it; then the readers read from there."""
    s3 = s3fs.S3FileSystem(endpoint_url=app.endpoint)
    s3.mkdir("plates")
    names = ["cell_grey16.png", "ihc_rgb16.tif", "coins_grey8.png", "retina_rgb.jpg", "broken/truncated.jpg"]
    for name in names:
        s3.put_file(sample_images / name, f"plates/in/{name}")
    ray = Path(sys.executable).with_name("ray")
    for job, extra in (("embed", []), ("segment", ["--embeddings", "s3://plates/out", *GRID])):
        words = ["python", "-m", f"jobs.{job}", "s3://plates/in", "s3://plates/out", "--model", "nano"]
        words += ["--config", app.config, "--max-error-rate", "0.5", *extra]
        command = [ray, "job", "submit", "--address", app.dashboard, "--", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{job}: 5 images, 1 errors" in done.stdout
    keys = sorted(key.split("/")[2] for key in s3.find("plates/out"))
    assert set(keys) >= {"embeddings", "masks", "errors", "_records", "_plan-embed-000.json", "_plan-segment-000.json"}
    options = {"endpoint_url": app.endpoint}
    with s3.open(next(iter(s3.glob("plates/out/masks/*.parquet")))) as file:
        assert len(pd.read_parquet(file)) >= 4
    storage = {"aws_endpoint_url": options["endpoint_url"], "aws_allow_http": "true", "aws_region": "us-east-1"}
    frame = pl.read_parquet("s3://plates/out/embeddings/*.parquet", storage_options=storage)
    assert frame.height == 4
    assert np.frombuffer(frame["embedding"][0], "<f2").reshape(256, 32, 32).any()


def test_ctrl_c_keeps_what_is_committed_and_the_same_command_ends_it(
    app: App, sample_images: Path, tmp_path: Path
) -> None:
    import ray

    words = [sys.executable, "-m", "jobs.segment", sample_images, tmp_path / "out", "--model", "nano"]
    words += ["--config", app.config, "--shard-images", 4, "--parallel", 1, "--max-error-rate", 0.5, *GRID]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    process = subprocess.Popen([*map(str, words)], env=environment, stderr=subprocess.PIPE, text=True)
    records = tmp_path / "out" / "_records"
    deadline = time.monotonic() + 90
    while not (records.exists() and len(list(records.iterdir())) >= 2) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "the same command goes on" in error
    committed = {path.name for path in records.iterdir()}
    assert 2 <= len(committed) < 10

    assert subprocess.run([*map(str, words)], env=environment, timeout=200, check=False).returncode == 0
    found = dataset.open(str(tmp_path / "out"))
    assert len(found.records) == 10
    images = found.table(dataset.MASKS, ["image_uri"])["image_uri"].to_pylist()
    errors = found.table(dataset.ERRORS, ["image_uri"])["image_uri"].to_pylist()
    assert len(set(images)) + len(errors) == 40
    assert report(tmp_path / "out", "segment")["already_committed"] >= 8


def test_a_dry_run_writes_nothing(
    app: App, embedded: str, sample_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--dry-run", "--price-per-gpu-hour", 3, "--shard-images", 8]
    assert run(embed, app, sample_images, tmp_path / "out", *asked) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(said) == ["images", "input", "sizes", "output", "rate", "time", "cost"]
    files = [path for path in sample_images.rglob("*") if path.is_file()]
    assert said["images"].startswith(f"{len(files)} in {-(-len(files) // 8)} shards of at most 8")
    assert said["input"] == estimate.amount(sum(path.stat().st_size for path in files))
    assert "nano-encoder × 1, nano-decoder × 1" in said["rate"]
    assert "per 1,000 images, at $3 an hour" in said["cost"]
    assert run(segment, app, sample_images, tmp_path / "out", "--embeddings", embedded, *asked[:1], *GRID) == 0
    assert " masks an image" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_failed_is_run_again_and_what_is_new_is_added(
    app: App, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()

    def put(name: str, level: int) -> None:
        Image.fromarray(np.full((30, 40), level, np.uint8)).save(source / name)

    def rows(name: str) -> list[str]:
        found = dataset.open(str(out)).table(name, ["image_uri"])["image_uri"].to_pylist()
        return sorted(Path(uri).name for uri in found)

    for number in range(4):
        put(f"{number}.png", 10 * number)
    (source / "bad.png").write_bytes(b"no image")
    assert run(embed, app, source, out, "--retry-errors") == 1
    assert "is no data set" in capsys.readouterr().err
    assert run(embed, app, source, out, "--max-error-rate", 0.5) == 0
    put("bad.png", 200)
    put("new.png", 210)
    assert run(segment, app, source, out, "--retry-errors", *GRID) == 2
    assert "holds no segment: run it without --retry-errors first" in capsys.readouterr().err
    assert run(embed, app, source, out, "--retry-errors") == 0
    assert (report(out, "embed")["images"], report(out, "embed")["encoder_calls"]) == (1, 1)
    assert rows(dataset.EMBEDDINGS) == ["0.png", "1.png", "2.png", "3.png", "bad.png"]
    assert rows(dataset.ERRORS) == []
    assert run(embed, app, source, out, "--retry-errors") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run(embed, app, source, out) == 1
    assert "--update adds what is new" in capsys.readouterr().err
    before = (source / "1.png").stat().st_size
    put("1.png", 77)
    assert (source / "1.png").stat().st_size == before  # seen by its content alone
    (source / "2.png").write_bytes(b"no image any more")
    assert run(embed, app, source, out, "--update", "--max-error-rate", 0.5) == 0
    said = report(out, "embed")
    assert [said[name] for name in ("images", "unchanged", "encoder_calls", "errors")] == [6, 3, 2, 1]
    assert rows(dataset.EMBEDDINGS) == ["0.png", "1.png", "3.png", "bad.png", "new.png"]
    assert rows(dataset.ERRORS) == ["2.png"]
    segmenting = (source, out, "--embeddings", out, "--max-error-rate", 0.5, "--shard-images", 3, *GRID)
    assert run(segment, app, *segmenting) == 0
    masked = rows(dataset.MASKS)
    assert set(masked) == {"0.png", "1.png", "3.png", "bad.png", "new.png"}
    assert cli.main(["verify", str(out)]) == 0

    assert cli.main(["compact", str(out), "--delete-old"]) == 0
    assert cli.main(["verify", str(out)]) == 0
    assert (rows(dataset.MASKS), rows(dataset.ERRORS)) == (masked, ["2.png", "2.png"])
    assert len(dataset.open(str(out)).files(dataset.MASKS)) == 1
    capsys.readouterr()
    assert run(segment, app, *segmenting) == 0
    assert "6 of 6 images are committed" in (said_again := capsys.readouterr().out)
    assert "6 images, 1 errors" in said_again
    assert rows(dataset.MASKS) == masked
    assert run(segment, app, source, tmp_path / "masks", *segmenting[2:]) == 0  # from the new files
    assert len(dataset.open(str(tmp_path / "masks")).table(dataset.MASKS)) == len(masked)
    assert run(embed, app, source, out, "--update", "--max-error-rate", 0.5) == 0
    said = report(out, "embed")
    assert [said[name] for name in ("images", "unchanged", "encoder_calls", "errors")] == [6, 5, 0, 1]
    assert rows(dataset.EMBEDDINGS) == ["0.png", "1.png", "3.png", "bad.png", "new.png"]


SWALLOWED = """
import signal, sys
from jobs import driver

class Swallows:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def work(_):
    one = Swallows()
    del one
    driver.raise_if_interrupted()
    return 0

sys.exit(driver.main("embed", driver.parser("embed", "", ""), work, ["in", "out", "--model", "nano"]))
"""


def test_an_interrupt_that_a_destructor_swallows_is_not_lost() -> None:
    done = subprocess.run([sys.executable, "-c", SWALLOWED], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert "the same command goes on from there" in done.stderr


def test_too_many_errors_is_exit_code_one(
    app: App, sample_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(embed, app, sample_images / "broken", tmp_path / "out") == 1
    assert "5 images, 5 errors" in capsys.readouterr().out
    assert dataset.open(str(tmp_path / "out")).rows(dataset.ERRORS) == 5


def _table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_what_bad_input_gets(
    app: App,
    embedded: str,
    sample_images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line that says what was wrong, an exit code that is not 0, and nothing that a reader would take for whole."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.md").write_text("no image")
    no_columns = _table(tmp_path / "a.csv", "name,box\nx.png,1\n")
    no_number = _table(tmp_path / "b.jsonl", '{"image_uri": "ihc_rgb.png", "box": [NaN, 2, 3, 4]}')
    stranger = _table(tmp_path / "c.jsonl", '{"image_uri": "nowhere.png", "box": [1, 2, 3, 4]}')
    typo = _table(tmp_path / "d.yaml", "storrage: {}\n")
    s3fs.S3FileSystem(endpoint_url=app.endpoint).mkdir("bucket-of-nothing")
    out = tmp_path / "out"
    nano = ["--model", "nano", "--config", app.config]
    cases: list[tuple[object, list[object], str]] = [
        (embed, [tmp_path / "missing", out, *nano], "does not exist"),
        (embed, [tmp_path / "empty", out, *nano], "no images under"),
        (embed, [tmp_path / "text", out, *nano], "1 files with other names"),
        (embed, ["s3://bucket-of-nothing", out, *nano], "holds no objects"),
        (embed, ["s3://no-such-bucket/x", out, *nano], "not found"),
        (embed, ["http://example.com/x", out, *nano], "neither a local path nor s3"),
        (embed, [sample_images, out, "--model", "nope", "--config", app.config], "'nope' is not served"),
        (embed, [sample_images, out, "--model", "nano", "--config", typo], "storrage"),
        (embed, [sample_images, out, "--model", "nano", "--config", tmp_path / "no.yaml"], "not found"),
        (embed, [sample_images, typo / "under-a-file", *nano], "cannot be used"),
        (segment, [sample_images, out, *nano, "--prompts", no_columns], "expected image_uri and box"),
        (segment, [sample_images, out, *nano, "--prompts", no_number], "row 0"),
        (segment, [sample_images, out, *nano, "--prompts", stranger], "not under"),
        (segment, [sample_images, out, *nano, "--prompts", sample_images / "ihc_rgb.png"], "no prompt table"),
        (segment, [sample_images, out, *nano, "--embeddings", tmp_path / "empty", *GRID], "no data set"),
        (segment, [tmp_path / "text" / "notes.md", out, *nano, *GRID], "no images under"),
        (segment, [sample_images, out, *nano, "--grid", "0"], "expected 1 to"),
    ]
    for job, arguments, says in cases:
        code = job.main([*map(str, arguments)])  # type: ignore[attr-defined]
        error = capsys.readouterr().err
        assert code in (1, 2), (arguments, error)
        assert says in error, (arguments, error)
        assert error.count("\n") == 1, error
        assert not list(tmp_path.rglob("*.parquet")), arguments


def test_boxes_that_do_not_fit_the_image_are_error_rows(
    app: App, embedded: str, sample_images: Path, tmp_path: Path
) -> None:
    rows = [
        {"image_uri": "ihc_rgb.png", "box": [10, 20, 200, 220]},
        {"image_uri": "coins_grey8.png", "box": [10, 20, 5, 220]},
        {"image_uri": "cell_grey8.png", "box": [10, 20, 9999, 220]},
    ]
    table = _table(tmp_path / "boxes.jsonl", "\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    code = run(segment, app, sample_images, out, "--prompts", table, "--embeddings", embedded, "--max-error-rate", 0.8)
    assert code == 0
    found = dataset.open(str(out))
    assert found.rows(dataset.MASKS) == 1
    messages = {Path(row["image_uri"]).name: row["message"] for row in found.table(dataset.ERRORS).to_pylist()}
    assert "inverted" in messages["coins_grey8.png"]
    assert "leaves the image" in messages["cell_grey8.png"]


def test_help_teaches() -> None:
    for words in ("jobs.embed --help", "jobs.segment --help", "jobs.cli --help", "jobs.cli extract --help"):
        done = subprocess.run([sys.executable, "-m", *shlex.split(words)], capture_output=True, text=True, check=True)
        assert "usage:" in done.stdout
