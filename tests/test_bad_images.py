"""Images as bad as they come, through the decoder and through a job: each is pixels or an error of its type."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs import embed, segment
from serve_app import dataset
from serve_app.contract import image_id
from serve_app.model import preprocess
from tests import bad_images
from tests.bad_images import pillow, tiff
from tests.conftest import App
from tests.s3 import ROOT

MUTATIONS = 10_000
GROWN_MB = 64.0  # images of four million pixels are 12 MB
NOISE = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
HOSTILE = (
    "細胞 ünï 😀.png",
    "a'b\"c;d&e|f.png",
    "new\nline\ttab.png",
    "%2e%2e%2f#part?query=1.png",
    "--help.png",
    "$(touch x)`y`.png",
    "back\\slash*[?]{}.png",
    "\u202egnp.right-to-left.png",
    "' OR 1=1; DROP TABLE images; --.png",
    f"{'long' * 62}.png",
    "upper.PNG",
    "no text \udcff\udcfe.png",  # a byte that is no UTF-8, as Python has it
)


def decoded(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bad_images", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    return dict(json.loads(done.stdout))


def test_ten_thousand_mutations_are_pixels_or_an_error() -> None:
    found = decoded("mutations", MUTATIONS, 0)
    assert sum(found["outcomes"].values()) == MUTATIONS + len(bad_images.bases())
    assert found["outcomes"].keys() <= {"pixels", "InvalidImage", "UnsupportedImage", "TooLarge"}
    assert min(found["outcomes"].values()) > 100, "the mutations reach too little"
    assert found["grown_mb"] < GROWN_MB


def test_bombs_are_refused_and_their_pixels_never_allocated() -> None:
    found, expected = decoded("bombs"), bad_images.bombs()
    assert {name: kind for name, (kind, *_) in found.items()} == {name: kind for name, (_, kind) in expected.items()}
    assert max(grown_mb for *_, grown_mb in found.values()) < 8


def test_tiles_and_strips_of_a_real_file_may_be_a_little_more_than_it_needs() -> None:
    small = np.arange(24 * 31, dtype=np.uint16).reshape(24, 31)
    expected = preprocess.decode(tiff(small), 10**6)
    assert np.array_equal(preprocess.decode(tiff(small, tile=(2048, 2048), compression="zlib"), 10**6), expected)
    rows = np.zeros((6000, 8, 3), np.uint16)
    assert preprocess.decode(tiff(rows, rowsperstrip=1, photometric="rgb"), 10**6).shape == rows.shape
    planes = tiff(np.moveaxis(rows, -1, 0), rowsperstrip=1, photometric="rgb", planarconfig="separate")
    assert preprocess.decode(planes, 10**6).shape == rows.shape
    many = np.zeros((1200, 1200), np.uint16)
    assert preprocess.decode(tiff(many, tile=(16, 16)), 10**7).shape == (1200, 1200, 3)


def corpus() -> dict[str, tuple[bytes, str]]:
    """Name: content, and the name of its error, none for those that are good."""
    made = {name: (content, "") for name, content in bad_images.bases(64).items()}
    for name, (content, _) in list(made.items()):
        if "animated" in name:
            continue  # what is cut off may be a later frame: below
        for tenth in range(1, 10):
            made[f"cut/{tenth}/{name}"] = content[: len(content) * tenth // 10], "InvalidImage"
    made |= {f"bombs/{name}": one for name, one in bad_images.bombs().items()}
    image, grey = Image.fromarray(NOISE), NOISE[..., 0]
    png, jpeg = pillow(image, "PNG"), pillow(image, "JPEG")
    floats = grey / np.float32(255)
    made |= {f"names/{name}": (pillow(Image.fromarray(NOISE + index), "PNG"), "") for index, name in enumerate(HOSTILE)}
    made |= {f"empty/{name}": (b"", "InvalidImage") for name in ("a.png", "a.jpg", "a.tif", "a.gif", "a.bmp", "a.webp")}
    made |= {f"twice/{index}.png": (png, "") for index in range(3)}
    return made | {
        "wrong/a_jpeg.png": (jpeg, ""),
        "wrong/a_png.tif": (png, ""),
        "wrong/text.jpg": (b"This is text.\n", "UnsupportedImage"),
        "wrong/zip.tif": (b"PK\x03\x04" + bytes(99), "UnsupportedImage"),
        "wrong/pdf.png": (b"%PDF-1.7\n", "UnsupportedImage"),
        "wrong/ppm.bmp": (pillow(image, "PPM"), "UnsupportedImage"),
        "numbers/nan.tif": (tiff(np.where(floats > 0.5, np.nan, floats)), "InvalidImage"),
        "numbers/infinite.tif": (tiff(np.where(floats > 0.99, np.inf, floats)), "InvalidImage"),
        "numbers/complex.tif": (tiff(floats.astype(np.complex64)), "UnsupportedImage"),
        "numbers/constant.tif": (tiff(np.full((9, 9), 777, np.uint16)), ""),
        "shapes/1x1.png": (pillow(Image.new("L", (1, 1)), "PNG"), ""),
        "shapes/1x1.tif": (tiff(np.zeros((1, 1), np.uint16)), ""),
        "shapes/1x20000.png": (pillow(Image.new("L", (1, 20_000)), "PNG"), "InvalidImage"),
        "shapes/20000x1.tif": (tiff(np.zeros((1, 20_000), np.uint16)), "InvalidImage"),
        "shapes/1024x1.png": (pillow(Image.new("L", (1024, 1)), "PNG"), ""),
    }


def embedded(app: App, source: Path, out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of one job: (embeddings without the arrays, errors)."""
    assert embed.main([str(source), str(out), "--model", "nano", "--config", app.config, "--max-error-rate", "1"]) == 0
    found = dataset.open(str(out))
    names = ["image_uri", "image_id", "embedding_id", "key", "width", "height"]
    return found.table(dataset.EMBEDDINGS, names).to_pylist(), found.table(dataset.ERRORS).to_pylist()


def test_every_file_of_the_corpus_is_a_row(app: App, tmp_path: Path) -> None:
    source, made = tmp_path / "in", corpus()
    for name, (content, _) in made.items():
        path = os.fsencode(source / name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    rows, errors = embedded(app, source, tmp_path / "out")
    expected = {dataset.printable(f"{source}/{name}"): error for name, (_, error) in made.items()}
    found = [(row["image_uri"], "") for row in rows] + [(row["image_uri"], row["error_type"]) for row in errors]
    assert len(found) == len(made)
    assert dict(found) == expected
    assert all(row["stage"] == "read" and row["message"] for row in errors)
    twice = [row for row in rows if f"{source}/twice/" in row["image_uri"]]
    assert len(twice) == 3
    assert {row["image_id"] for row in twice} == {image_id(made["twice/0.png"][0])}
    assert len({row["embedding_id"] for row in twice}) == 1
    assert {(row["width"], row["height"]) for row in rows if "exif6" in row["image_uri"]} == {(64, 71)}

    again = [str(source / "names"), str(tmp_path / "masks"), "--model", "nano", "--config", app.config, "--grid", "1"]
    assert segment.main([*again, "--embeddings", str(tmp_path / "out"), "--pred-iou-thresh=-inf"]) == 0


def test_keys_and_names_of_a_list_are_kept_as_they_are(app: App, tmp_path: Path) -> None:
    for index in range(2):
        Image.fromarray(NOISE + index).save(tmp_path / f"{index}.png")
    keys = [
        "../../etc/passwd",
        "'; DROP TABLE images; --",
        "\u0000",
        "細胞\u202e",
        "",
        "a" * 100_000,
        "\ud800",
        None,
        7,
    ]
    for index in range(len(keys)):
        shutil.copy(tmp_path / "0.png", tmp_path / f"key-{index}.png")
    lines = [json.dumps({"uri": f"key-{index}.png", "key": key}) for index, key in enumerate(keys)]
    names = ["x/../0.png", "0.png/x", "\ud800.png", "x" * 300 + ".png", ".", "1.png", "1.png"]
    lines += [json.dumps({"uri": name}) for name in names]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    rows, errors = embedded(app, tmp_path / "list.jsonl", tmp_path / "out")
    expected = [None if key is None else dataset.printable(str(key)) for key in keys]
    assert [row["key"] for row in rows[: len(keys)]] == expected
    assert len(rows) + len(errors) == len(lines) - 1
    assert {row["error_type"] for row in errors} <= {"NotFound", "InvalidInput"}
    assert [Path(row["image_uri"]).name for row in rows[len(keys) :]] == ["0.png", "1.png"]  # named again: once
