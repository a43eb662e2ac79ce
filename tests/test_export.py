"""Masks as other tools read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from pycocotools.coco import COCO

from cluster.errors import Conflict, NotFound
from cluster.storage import Storage, join
from jobs import cli, export
from serve_app import dataset
from serve_app.commit import ShardWriter
from serve_app.contract import Embedding
from serve_app.dataset import EMBEDDINGS, MASKS
from serve_app.model import masks
from serve_app.model.masks import MaskSet
from tests.s3 import Place, place_fixture, s3_fixture  # noqa: F401

METADATA = {"fingerprint": "f" * 64, "encoder_sha256": "e" * 64, "model": "nano", "trained": "true"}
SIZE = (30, 40)


def planes(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    made = np.zeros((len(boxes), *SIZE), bool)
    for plane, (x0, y0, x1, y1) in zip(made, boxes, strict=True):
        plane[y0:y1, x0:x1] = True
    return made


IMAGES = {  # the first's small mask lies on its large one
    "/in/plate 1/a.png": planes((0, 0, 20, 20), (5, 5, 9, 9)),
    "/in/plate 1/a.tif": planes((1, 2, 3, 4)),
    "/in/plate 2/x.tar#b/ü.png": planes((0, 0, 40, 30)),
}
EMPTY = "/in/empty.png"


def write(place: Place, job: str, rows: Any, **more: str) -> None:
    with ShardWriter(place.storage, place.uri, job, 0, METADATA | more) as writer:
        for name, table in rows:
            writer.add(name, table)
            for uri in dict.fromkeys(table["image_uri"].to_pylist()):
                writer.supersede(uri)
        writer.commit()


def made(uri: str) -> Embedding:
    return Embedding(f"id of {uri}", uri, "nano", "e" * 64, SIZE, (192, 256), np.zeros((4, 2, 2), np.float16))


def mask_table(uri: str, found: np.ndarray) -> Any:
    counts, one = masks.encode(found), np.ones(len(found), np.float32)
    areas, boxes = masks.areas_and_boxes(counts, SIZE)
    index = np.arange(len(found), dtype=np.int32)
    together = MaskSet(SIZE, counts, boxes, areas, one * 0.5, one, index, np.zeros((len(found), 4), np.float32))
    return dataset.mask_rows(together, [made(uri)] * len(found), uri, "", "d" * 64, "grid", ["{}"] * len(found))


@pytest.fixture
def filled(place: Place) -> Place:
    uris = [*IMAGES, EMPTY]
    write(place, "embed", [(EMBEDDINGS, dataset.embedding_row(made(u), u, np.zeros(4, np.float32))) for u in uris])
    write(place, "segment", [(MASKS, mask_table(uri, found)) for uri, found in IMAGES.items()])
    return place


def run(write: Any, place: Place, to: str, done: Any) -> int:
    found = dataset.open(place.uri, place.storage)
    return int(write(found, export.Names(export.uris(found)), to, done))


NAMES = ["plate 1/a.png", "plate 1/a.tif", "plate 2/x.tar/b/ü.png", "empty.png"]


def test_coco(filled: Place, tmp_path: Path) -> None:
    calls: list[int] = []
    target = tmp_path / "masks.json"
    assert run(export.coco, filled, str(target), lambda: calls.append(1)) == 4
    assert len(calls) == 4
    read = COCO(str(target))
    assert [one["file_name"] for one in read.dataset["images"]] == NAMES
    assert [(one["height"], one["width"]) for one in read.dataset["images"]] == [SIZE] * 4
    for one in read.dataset["images"]:
        annotations = read.loadAnns(read.getAnnIds(one["id"]))
        expected = IMAGES.get(one["image_uri"], [])
        assert [(a["area"], a["score"], a["category_id"]) for a in annotations] == [(m.sum(), 0.5, 1) for m in expected]
        for annotation, mask in zip(annotations, expected, strict=True):
            np.testing.assert_array_equal(read.annToMask(annotation), mask)


@pytest.mark.parametrize(
    ("uris", "names"),
    [
        (["s3://b/in/x/a.png", "s3://b/in/c.png"], ["x/a.png", "c.png"]),
        (["s3://b/a.png"], ["a.png"]),
        (["s3://b/a.png", "s3://c/a.png"], ["b/a.png", "c/a.png"]),
        (["/in/a.png", "s3://c/a.png"], ["in/a.png", "s3://c/a.png"]),
        (["/in/ab/1.png", "/in/a/1.png"], ["ab/1.png", "a/1.png"]),
    ],
)
def test_names_are_those_below_the_last_common_folder(uris: list[str], names: list[str]) -> None:
    made = export.Names(uris)
    assert [made[uri] for uri in uris] == names


def test_label_images(filled: Place) -> None:
    target = join(filled.uri, "labels of it")
    assert run(export.labels, filled, target, lambda: None) == 4
    assert run(export.labels, filled, target, lambda: None) == 4  # the same bytes
    written = [file.uri.removeprefix(target + "/") for file in filled.storage.list(target)]
    assert sorted(written) == ["empty.tif", "plate 1/a.png.tif", "plate 1/a.tif.tif", "plate 2/x.tar/b/ü.tif"]


def test_of_overlapping_masks_the_smallest_shows(filled: Place, tmp_path: Path) -> None:
    run(export.labels, filled, str(tmp_path / "x"), lambda: None)
    plane = tifffile.imread(tmp_path / "x" / "plate 1" / "a.png.tif")
    large, small = IMAGES["/in/plate 1/a.png"]
    np.testing.assert_array_equal(plane, np.where(small, 2, np.where(large, 1, 0)))
    assert plane.dtype == np.uint16
    assert not tifffile.imread(tmp_path / "x" / "empty.tif").any()


def test_a_later_generation_is_what_is_exported(filled: Place, tmp_path: Path) -> None:
    uri = "/in/plate 1/a.tif"
    write(filled, "segment", [(MASKS, mask_table(uri, planes((9, 9, 12, 12))))], generation="1")
    run(export.coco, filled, str(tmp_path / "a.json"), lambda: None)
    read = COCO(str(tmp_path / "a.json"))
    assert sorted(one["area"] for one in read.dataset["annotations"]) == [9, 16, 400, 1200]


def test_nothing_is_overwritten(filled: Place, tmp_path: Path) -> None:
    target = tmp_path / "masks.json"
    target.write_text("mine")
    with pytest.raises(Conflict, match=r"masks\.json exists"):
        run(export.coco, filled, str(target), lambda: None)
    assert target.read_text() == "mine"


def test_without_masks_there_is_nothing_to_export(place: Place, tmp_path: Path) -> None:
    write(place, "embed", [(EMBEDDINGS, dataset.embedding_row(made(EMPTY), EMPTY, np.zeros(4, np.float32)))])
    with pytest.raises(NotFound, match=r"run jobs\.segment first"):
        run(export.labels, place, str(tmp_path), lambda: None)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(Storage(), str(tmp_path / "out"))
    write(place, "segment", [(MASKS, mask_table(uri, found)) for uri, found in IMAGES.items()])
    assert cli.main(["export", place.uri, "--to", "coco", str(tmp_path / "a.json")]) == 0
    assert capsys.readouterr().out == f"3 images to {tmp_path}/a.json\n"
    assert len(json.loads((tmp_path / "a.json").read_text())["annotations"]) == 4
    assert cli.main(["export", place.uri, "--to", "labels", str(tmp_path / "labels")]) == 0
    assert cli.main(["export", str(tmp_path / "none"), "--to", "coco", str(tmp_path / "b.json")]) == 1
    assert not (tmp_path / "b.json").exists()
