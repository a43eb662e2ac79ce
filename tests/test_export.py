"""Masks as other tools read them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from pycocotools.coco import COCO

from cluster.errors import Conflict, InvalidImage, NotFound
from cluster.storage import Storage, join
from jobs import cli, export, export_labels, instances
from serve_app import commit, dataset
from serve_app.commit import ShardWriter
from serve_app.contract import Embedding
from serve_app.dataset import EMBEDDINGS, ERRORS, MASKS
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


def write(place: Place, job: str, rows: Any, shard: str = "0", **more: str) -> None:
    with ShardWriter(place.storage, place.uri, job, int(shard), METADATA | more) as writer:
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
    return int(write(found, export.Names(instances.uris(found)), to, done))


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
        (["/a.png"], ["a.png"]),
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
    assert run(export_labels.labels, filled, target, lambda: None) == 4
    assert run(export_labels.labels, filled, target, lambda: None) == 4  # the same bytes
    written = [file.uri.removeprefix(target + "/") for file in filled.storage.list(target)]
    assert sorted(written) == ["empty.tif", "plate 1/a.png.tif", "plate 1/a.tif.tif", "plate 2/x.tar/b/ü.tif"]


def test_of_overlapping_masks_the_smallest_shows(filled: Place, tmp_path: Path) -> None:
    run(export_labels.labels, filled, str(tmp_path / "x"), lambda: None)
    plane = tifffile.imread(tmp_path / "x" / "plate 1" / "a.png.tif")
    large, small = IMAGES["/in/plate 1/a.png"]
    np.testing.assert_array_equal(plane, np.where(small, 2, np.where(large, 1, 0)))
    assert plane.dtype == np.uint16
    assert not tifffile.imread(tmp_path / "x" / "empty.tif").any()


def failed(place: Place, uri: str, *boxes: str, job: str = "segment", **more: str) -> None:
    error = InvalidImage("a tile could not be read")
    rows = [(ERRORS, dataset.error_row(uri, "read", error, f"xywh={box}")) for box in boxes]
    write(place, job, rows, **more)


def blobs(count: int = 60) -> np.ndarray:
    """Masks of SIZE that overlap, some of equal area, one empty and one everywhere."""
    random = np.random.default_rng(0)
    corners, sides = random.integers(0, 25, (count, 2)), random.integers(1, 15, (count, 2))
    made = planes(*((x, y, x + w, y + h) for (x, y), (w, h) in zip(corners, sides, strict=True)))
    made[3], made[4] = False, True
    return made


def painted(found: np.ndarray) -> np.ndarray:
    """As it is said: the smallest mask at each pixel, of equal ones the last."""
    plane = np.zeros(SIZE, np.uint16)
    for index in sorted(range(len(found)), key=lambda index: -found[index].sum()):
        plane[found[index]] = index + 1
    return plane


@pytest.fixture
def many(tmp_path: Path) -> Place:
    """Two images whose rows are in each other's row groups, in one file."""
    place = Place(Storage(), str(tmp_path / "out"))
    tables = [mask_table(uri, blobs()) for uri in ("/in/a.png", "/in/b.png")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "MASK_ROW_GROUP", 7)
        turns = [(MASKS, table.slice(start, 5)) for start in range(0, 60, 5) for table in tables]
        write(place, "segment", turns)
    return place


def test_small_label_images_are_strips_of_the_whole(many: Place, tmp_path: Path) -> None:
    assert run(export_labels.labels, many, str(tmp_path / "to"), lambda: None) == 2
    content = io.BytesIO()
    tifffile.imwrite(content, painted(blobs()), compression="zlib", metadata=None, software=False)
    for name in ("a.tif", "b.tif"):
        assert (tmp_path / "to" / name).read_bytes() == content.getvalue()


def test_large_label_images_are_tiles_painted_band_by_band(
    many: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_labels, "WHOLE_PIXELS", 1199)
    monkeypatch.setattr(export_labels, "TILE", 16)
    monkeypatch.setattr(export_labels, "CLASSIC", 0)
    failed(many, "/in/b.png", "16,0,16,16", "0,0,16,16", shard="1")
    assert run(export_labels.labels, many, str(tmp_path / "to"), lambda: None) == 2
    assert run(export_labels.labels, many, str(tmp_path / "to"), lambda: None) == 2  # the same bytes
    for name, said in (("a.tif", ""), ("b.tif", '{"holes": [[0, 0, 16, 16], [16, 0, 16, 16]]}')):
        with tifffile.TiffFile(tmp_path / "to" / name) as file:
            page = file.pages.first
            assert file.is_bigtiff
            assert (page.tilewidth, page.tilelength) == (16, 16)
            assert page.description == said
            np.testing.assert_array_equal(page.asarray(), painted(blobs()))


def test_label_arrays_for_ome_zarr(many: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zarr = pytest.importorskip("zarr")
    monkeypatch.setattr(export_labels, "CHUNK", 16)
    failed(many, "/in/b.png", "0,0,16,16", shard="1")
    for _ in range(2):
        assert run(export_labels.zarr_labels, many, str(tmp_path / "to"), lambda: None) == 2
    for name, holes in (("a.zarr", None), ("b.zarr", [[0, 0, 16, 16]])):
        group = zarr.open_group(tmp_path / "to" / name, mode="r")
        np.testing.assert_array_equal(group["0"][:], painted(blobs()))
        assert group["0"].dtype == np.uint16
        (scales,) = group.attrs["multiscales"]
        assert [axis["name"] for axis in scales["axes"]] == ["y", "x"]
        assert scales["datasets"][0]["path"] == "0"
        assert group.attrs["image-label"] == {"version": "0.4"}
        assert group.attrs["cellray"].get("holes") == holes
        assert (tmp_path / "to" / name / "0" / "0" / "1").exists()


@pytest.mark.parametrize("kind", ["labels", "zarr-labels"])
def test_the_command_writes_label_images(
    many: Place, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "zarr-labels":
        pytest.importorskip("zarr")
    target = tmp_path / "to"
    assert cli.main(["export", many.uri, "--to", kind, str(target)]) == 0
    assert capsys.readouterr().out == f"2 images to {target}\n"
    suffix = "tif" if kind == "labels" else "zarr"
    assert sorted(path.name for path in target.iterdir()) == [f"a.{suffix}", f"b.{suffix}"]


def test_holes_are_said(many: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", many.uri, "--to", "coco"]
    assert cli.main([*words, str(tmp_path / "none.json")]) == 0
    failed(many, "/in/b.png", "20,0,20,20", "0,20,20,10", shard="1")
    failed(many, "/in/c.png", "0,0,9,9", shard="2")
    write(many, "segment", [(ERRORS, dataset.error_row("/in/d.png", "read", InvalidImage("no tile")))], shard="3")
    assert cli.main([*words, str(tmp_path / "some.json")]) == 1
    said = capsys.readouterr().out
    assert "/in/b.png: 2 tiles failed, and are holes without masks, x,y,width,height: 20,0,20,20; 0,20,20,10\n" in said
    assert "/in/c.png: 1 tiles failed, and are holes without masks, x,y,width,height: 0,0,9,9; the image has no" in said
    assert "d.png" not in said
    about = json.loads((tmp_path / "some.json").read_text())["images"]
    assert [one.get("holes") for one in about] == [None, [[20, 0, 20, 20], [0, 20, 20, 10]]]
    write(many, "segment", [(MASKS, mask_table("/in/b.png", blobs()))], shard="4", generation="1")
    assert instances.holes(dataset.open(many.uri)) == {"/in/c.png": [(0, 0, 9, 9)]}


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
        run(export_labels.labels, place, str(tmp_path), lambda: None)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(Storage(), str(tmp_path / "out"))
    write(place, "segment", [(MASKS, mask_table(uri, found)) for uri, found in IMAGES.items()])
    assert cli.main(["export", place.uri, "--to", "coco", str(tmp_path / "a.json")]) == 0
    assert capsys.readouterr().out == f"3 images to {tmp_path}/a.json\n"
    assert len(json.loads((tmp_path / "a.json").read_text())["annotations"]) == 4
    assert cli.main(["export", place.uri, "--to", "labels", str(tmp_path / "labels")]) == 0
    assert cli.main(["export", str(tmp_path / "none"), "--to", "coco", str(tmp_path / "b.json")]) == 1
    assert not (tmp_path / "b.json").exists()
