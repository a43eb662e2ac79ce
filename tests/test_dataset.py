"""Data sets: what is written is read back, by us and by others, and only what a record names exists."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from cluster.errors import Conflict, InvalidEmbedding, InvalidInput, NotFound
from cluster.settings import MIB
from cluster.storage import Storage, join
from serve_app import contract, dataset
from serve_app.commit import ShardWriter
from serve_app.contract import Embedding
from serve_app.dataset import EMBEDDINGS, ERRORS, MASKS, SCHEMAS, Record
from serve_app.model import masks
from serve_app.model.masks import MaskSet
from tests.s3 import S3, Place, place_fixture, s3_fixture  # noqa: F401

ENCODER, DECODER = "e" * 64, "d" * 64
METADATA = {
    "fingerprint": "f" * 64,
    "encoder_sha256": ENCODER,
    "model": "nano",
    "licence": "Apache-2.0",
    "trained": "false",
    "preprocess": "1",
}
READERS = ["duckdb", "polars", "pandas"]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A writer leaves nothing in the folder for temporary files, committed or not."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


def embedding(number: int, grid: tuple[int, int] = (4, 4)) -> Embedding:
    image = contract.image_id(b"%d" % number)
    random = np.random.default_rng(number)
    return Embedding(
        embedding_id=contract.embedding_id(image, ENCODER, "float32"),
        image_id=image,
        model="nano",
        encoder_sha256=ENCODER,
        original=(480 + number, 640),
        input=(192, 256),
        array=random.standard_normal((256, *grid)).astype(np.float16),
    )


def uri_of(number: int) -> str:
    return f"s3://in/ü {number}.png"


def pooled(number: int) -> np.ndarray:
    return np.arange(256, dtype=np.float32) + number


def mask_set(number: int, size: tuple[int, int] = (24, 32)) -> MaskSet:
    """`number` masks: a rectangle each, of another width."""
    pixels = np.zeros((number, *size), bool)
    for index in range(number):
        pixels[index, 2:7, 3 : 5 + index] = True
    return MaskSet(
        size,
        masks.encode(pixels),
        np.array([[3, 2, 2 + index, 5] for index in range(number)], np.float32).reshape(number, 4),
        pixels.sum(axis=(1, 2)).astype(np.int64),
        np.linspace(0.5, 1, number, dtype=np.float32),
        np.linspace(0.25, 1, number, dtype=np.float32),
        np.arange(number, dtype=np.int32),
        np.arange(number * 256, dtype=np.float32).reshape(number, 256),
    )


def add_embeddings(writer: ShardWriter, numbers: Any, grid: tuple[int, int] = (4, 4)) -> None:
    for number in numbers:
        table = dataset.embedding_row(embedding(number, grid), uri_of(number), pooled(number), key=f"key {number}")
        writer.add(EMBEDDINGS, table)


def add_masks(writer: ShardWriter, numbers: Any) -> None:
    for number in numbers:
        found = mask_set(number)
        prompts = [json.dumps({"box": [0, 0, index + 1, 1]}) for index in range(number)]
        made = [embedding(number)] * number
        writer.add(MASKS, dataset.mask_rows(found, made, uri_of(number), "", DECODER, "box", prompts))


def add_errors(writer: ShardWriter, numbers: Any) -> None:
    for number in numbers:
        writer.add(ERRORS, dataset.error_row(uri_of(number), "read", NotFound(f"no\n {number}"), attempt=2))


def write(storage: Storage, out: str, shard: int = 0, embeddings: Any = (), errors: Any = (), **more: str) -> Record:
    with ShardWriter(storage, out, "embed", shard, METADATA | more) as writer:
        add_embeddings(writer, embeddings)
        add_errors(writer, errors)
        return writer.commit()


def names(place: Place, dataset_name: str) -> list[str]:
    try:
        return sorted(file.uri.rsplit("/", 1)[-1] for file in place.storage.list(join(place.uri, dataset_name)))
    except NotFound:
        return []


def orphan(place: Place, record: Record, shard: int) -> None:
    """The files of a committed shard once more, under another shard's names and without a record."""
    for file in record.files:
        content = place.storage.read(join(place.uri, file.path), 100 * MIB)
        place.storage.publish(join(place.uri, file.dataset, f"embed-000-{shard:06d}.parquet"), content)


# Round trips


def test_embeddings_go_round(place: Place) -> None:
    grids = [(4, 4), (8, 8), (3, 5)]
    with ShardWriter(place.storage, place.uri, "embed", 7, METADATA) as writer:
        for number, grid in enumerate(grids):
            add_embeddings(writer, [number], grid)
        record = writer.commit()
    found = dataset.open(place.uri, place.storage)
    assert found.records == (record,)
    assert found.rows(EMBEDDINGS) == len(grids)
    ((uri, _),) = found.files(EMBEDDINGS)
    read = list(dataset.open_embeddings(place.storage, uri, [2, 0, 1]))
    for number, one in zip((2, 0, 1), read, strict=True):
        expected = embedding(number, grids[number])
        assert one.array.dtype == np.float16
        assert np.array_equal(one.array, expected.array)
        facts = ("embedding_id", "image_id", "model", "encoder_sha256", "original", "input")
        assert [getattr(one, name) for name in facts] == [getattr(expected, name) for name in facts]
    rows = found.table(EMBEDDINGS).to_pylist()
    assert [row["image_uri"] for row in rows] == [uri_of(number) for number in range(3)]
    assert [row["key"] for row in rows] == ["key 0", "key 1", "key 2"]
    assert [row["pooled"] for row in rows] == [pooled(number).tolist() for number in range(3)]
    assert record.embedding_ids == tuple(row["embedding_id"] for row in rows)


def test_masks_and_errors_go_round(place: Place) -> None:
    with ShardWriter(place.storage, place.uri, "segment", 0, METADATA) as writer:
        add_masks(writer, [3, 0, 2])
        add_errors(writer, [5])
        writer.commit()
    found = dataset.open(place.uri, place.storage)
    rows = found.table(MASKS).to_pylist()
    assert [row["image_uri"] for row in rows] == [uri_of(3)] * 3 + [uri_of(2)] * 2
    assert [row["mask_index"] for row in rows] == [0, 1, 2, 0, 1]
    expected = mask_set(3)
    for index, row in enumerate(rows[:3]):
        segmentation = row["segmentation"]
        assert np.array_equal(
            masks.decode([segmentation["counts"]], tuple(segmentation["size"]))[0], expected.decode()[index]
        )
        assert row["bbox"] == expected.boxes[index].tolist()
        assert row["area"] == expected.areas[index]
        assert row["predicted_iou"] == expected.predicted_iou[index]
        assert row["stability_score"] == expected.stability[index]
        assert row["object_embedding"] == expected.object_embeddings[index].tolist()
        assert json.loads(row["prompt"]) == {"box": [0, 0, index + 1, 1]}
        assert (row["prompt_type"], row["decoder_sha256"], row["box_score"]) == ("box", DECODER, None)
    assert found.table(ERRORS).to_pylist() == [
        {
            "image_uri": uri_of(5),
            "part": "",
            "stage": "read",
            "error_type": "NotFound",
            "message": "no 5",
            "attempt": "2",
        }
    ]


def test_a_file_has_at_most_so_many_embeddings(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MAX_ROWS_A_FILE", 3)
    record = write(place.storage, place.uri, embeddings=range(7), errors=[8])
    assert [(file.path, file.rows) for file in record.files] == [
        ("embeddings/embed-000-000000.parquet", 3),
        ("embeddings/embed-000-000000-01.parquet", 3),
        ("embeddings/embed-000-000000-02.parquet", 1),
        ("errors/embed-000-000000.parquet", 1),
    ]
    found = dataset.open(place.uri, place.storage)
    for file in record.files[:3]:
        table = found.read(join(place.uri, file.path), ["embedding_id"])
        assert tuple(table["embedding_id"].to_pylist()) == record.ids(file)
    assert found.table(EMBEDDINGS, ["image_uri"])["image_uri"].to_pylist() == [uri_of(number) for number in range(7)]


def test_the_record_says_what_the_files_are(place: Place) -> None:
    record = write(place.storage, place.uri, 3, embeddings=range(2), errors=[9])
    assert (record.job, record.shard, record.fingerprint) == ("embed", 3, METADATA["fingerprint"])
    assert [file.path for file in record.files] == [f"{name}/embed-000-000003.parquet" for name in (EMBEDDINGS, ERRORS)]
    for file in record.files:
        uri = join(place.uri, file.path)
        assert file.sha256 == place.storage.sha256(uri)
        assert file.bytes == place.storage.size(uri)
        assert file.rows == dataset.open(place.uri, place.storage).table(file.dataset).num_rows
    assert record == dataset.read_record(place.storage, dataset.record_uri(place.uri, "embed", 3))


def test_one_embedding_a_row_group_and_the_plan_in_the_footer(place: Place) -> None:
    write(place.storage, place.uri, embeddings=range(3), errors=[1])
    for name in (EMBEDDINGS, ERRORS):
        content = place.storage.read(join(place.uri, name, "embed-000-000000.parquet"), MIB)
        file = pq.ParquetFile(io.BytesIO(content))
        assert file.schema_arrow.equals(SCHEMAS[name])
        footer = {key.decode(): value.decode() for key, value in file.schema_arrow.metadata.items()}
        for key, value in METADATA.items():
            assert footer[f"cellray.{key}"] == value
        assert footer["cellray.schema_version"] == dataset.SCHEMA_VERSION
        assert (footer["cellray.job"], footer["cellray.shard"]) == ("embed", "0")
        if name == EMBEDDINGS:
            assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [1, 1, 1]
            assert codecs(file)["embedding"] == "UNCOMPRESSED"


def codecs(file: pq.ParquetFile) -> dict[str, str]:
    group = file.metadata.row_group(0)
    return {group.column(leaf).path_in_schema: group.column(leaf).compression for leaf in range(group.num_columns)}


def test_the_outlines_of_masks_are_compressed(tmp_path: Path) -> None:
    with ShardWriter(Storage(), str(tmp_path / "out"), "segment", 0, METADATA) as writer:
        add_masks(writer, [3])
        writer.commit()
    found = codecs(pq.ParquetFile(tmp_path / "out" / "masks" / "segment-000-000000.parquet"))
    assert {*found.values()} == {"ZSTD"}, found


def test_a_click_fetches_one_row(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(Storage(s3.settings), s3.make_bucket("test-click"))
    with ShardWriter(place.storage, place.uri, "embed", 0, METADATA) as writer:
        add_embeddings(writer, range(24), (64, 64))
        writer.commit()
    fetched = []
    real = s3fs.core._fetch_range
    monkeypatch.setattr(s3fs.core, "_fetch_range", lambda *a, **k: (fetched.append(a[5] - a[4]), real(*a, **k))[1])
    uri = join(place.uri, EMBEDDINGS, "embed-000-000000.parquet")
    (one,) = dataset.open_embeddings(place.storage, uri, [13])
    assert np.array_equal(one.array, embedding(13, (64, 64)).array)
    assert len(fetched) <= 3  # the footer's end, the rest of the footer, the row
    assert sum(fetched) < 2.5 * MIB


def test_float32_goes_round(place: Place) -> None:
    made = replace(embedding(1), array=np.random.default_rng(0).standard_normal((256, 3, 5)).astype(np.float32))
    with ShardWriter(place.storage, place.uri, "embed", 0, METADATA | {"dtype": "float32"}) as writer:
        writer.add(EMBEDDINGS, dataset.embedding_row(made, uri_of(1), pooled(1)))
        writer.commit()
    ((uri, _),) = dataset.open(place.uri, place.storage).files(EMBEDDINGS)
    (read,) = dataset.open_embeddings(place.storage, uri, [0])
    assert (read.array.dtype, read.array.dtype.isnative) == (np.float32, True)
    np.testing.assert_array_equal(read.array, made.array)


def test_a_file_has_less_than_2_gib_of_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {kept: dataset.rows_a_file(kept) for kept in ("float16", "float32", "pooled")}
    assert sizes == {"float16": 512, "float32": 256, "pooled": 65536}
    monkeypatch.setattr(dataset, "MAX_ROWS_A_FILE", 6)
    with ShardWriter(Storage(), str(tmp_path / "out"), "embed", 0, METADATA | {"dtype": "float32"}) as writer:
        for number in range(5):
            one = replace(embedding(number), array=embedding(number).array.astype(np.float32))
            writer.add(EMBEDDINGS, dataset.embedding_row(one, uri_of(number), pooled(number)))
        assert [file.rows for file in writer.commit().files] == [3, 2]


def test_of_a_pooled_only_data_set_there_is_no_embedding_to_read(place: Place) -> None:
    with ShardWriter(place.storage, place.uri, "embed", 0, METADATA | {"dtype": "pooled"}) as writer:
        for number in range(3):
            row = dataset.embedding_row(embedding(number), uri_of(number), pooled(number), pooled_only=True)
            writer.add(EMBEDDINGS, row)
        record = writer.commit()
    found = dataset.open(place.uri, place.storage)
    rows = found.table(EMBEDDINGS).to_pylist()
    assert [row["pooled"] for row in rows] == [pooled(number).tolist() for number in range(3)]
    assert all((row["embedding"], row["dtype"], row["shape"]) == (None, None, None) for row in rows)
    assert len(record.embedding_ids) == 3
    ((uri, _),) = found.files(EMBEDDINGS)
    with pytest.raises(InvalidEmbedding, match=r"\.parquet holds no embeddings: .* made with --pooled-only"):
        list(dataset.open_embeddings(place.storage, uri, [1]))
    with place.storage.open(uri) as file:
        assert pq.ParquetFile(file).num_row_groups == 1


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("compression", "codec"), [("zstd", "ZSTD"), ("lz4", "LZ4")])
def test_others_read_compressed_embeddings(tmp_path: Path, reader: str, compression: str, codec: str) -> None:
    out = str(tmp_path / "out")
    write(Storage(), out, embeddings=range(2), compression=compression)
    (path,) = (tmp_path / "out" / "embeddings").iterdir()
    assert codecs(pq.ParquetFile(path))["embedding"] == codec
    rows = sorted(rows_without_us(reader, out, EMBEDDINGS), key=lambda row: row["image_uri"])
    assert [bytes(row["embedding"]) for row in rows] == [embedding(number).array.tobytes() for number in range(2)]
    read = list(dataset.open_embeddings(Storage(), str(path), [1]))
    np.testing.assert_array_equal(read[0].array, embedding(1).array)


def test_a_dtype_that_is_none_of_ours(tmp_path: Path) -> None:
    row = dataset.embedding_row(embedding(0), uri_of(0), pooled(0)).to_pylist()[0] | {"dtype": "float64"}
    with pytest.raises(InvalidEmbedding, match="is float64, not float16 or float32"):
        dataset.embedding_of(row)


# What exists


def test_without_a_record_nothing_is_visible(place: Place) -> None:
    record = write(place.storage, place.uri, embeddings=range(3), errors=[1])
    orphan(place, record, 1)
    found = dataset.open(place.uri, place.storage)
    assert (found.rows(EMBEDDINGS), found.rows(ERRORS)) == (3, 1)
    assert found.table(EMBEDDINGS).num_rows == 3
    assert len(names(place, EMBEDDINGS)) == 2


def test_a_writer_that_does_not_commit_leaves_nothing(place: Place) -> None:
    class Killed(Exception):
        pass

    def die() -> None:
        with ShardWriter(place.storage, place.uri, "embed", 0, METADATA) as writer:
            add_embeddings(writer, range(3))
            raise Killed

    with pytest.raises(Killed):
        die()
    assert names(place, EMBEDDINGS) == []


def test_a_killed_predecessors_files_are_adopted(place: Place) -> None:
    """Its bits may differ (another codec library, another GPU); its rows are the same."""
    with ShardWriter(place.storage, place.uri, "embed", 0, METADATA | {"licence": "as it was"}) as writer:
        add_embeddings(writer, range(3))
        writer.writers[EMBEDDINGS].close()
        place.storage.publish(join(place.uri, EMBEDDINGS, "embed-000-000000.parquet"), writer.paths[EMBEDDINGS])
    theirs = place.storage.sha256(join(place.uri, EMBEDDINGS, "embed-000-000000.parquet"))
    record = write(place.storage, place.uri, embeddings=range(3), errors=[1])
    assert record.files[0].sha256 == theirs
    found = dataset.open(place.uri, place.storage)
    assert found.table(EMBEDDINGS, ["image_uri"])["image_uri"].to_pylist() == [uri_of(number) for number in range(3)]
    assert found.rows(ERRORS) == 1


@pytest.mark.parametrize("rows", [range(2), range(1, 4), [2, 1, 0]])
def test_a_killed_predecessors_other_rows_are_left_where_they_are(place: Place, rows: Any) -> None:
    """As where an image could not be read then, and now can."""
    orphan(place, write(place.storage, place.uri, 1, embeddings=rows, errors=[7]), 0)
    before = place.storage.sha256(join(place.uri, EMBEDDINGS, "embed-000-000000.parquet"))
    record = write(place.storage, place.uri, embeddings=range(3))
    assert record == write(place.storage, place.uri, embeddings=range(3))
    assert place.storage.sha256(join(place.uri, EMBEDDINGS, "embed-000-000000.parquet")) == before
    found = dataset.open(place.uri, place.storage)
    (file,) = [uri for uri, one in found.files(EMBEDDINGS) if one.shard == 0]
    assert found.read(file, ["image_uri"])["image_uri"].to_pylist() == [uri_of(number) for number in range(3)]
    assert len(names(place, EMBEDDINGS)) == 3  # shard 1's, the killed one's, ours
    assert [one.rows(ERRORS) for one in found.records] == [0, 1]


def test_another_plans_file_in_the_way_is_a_conflict(place: Place) -> None:
    orphan(place, write(place.storage, place.uri, 1, embeddings=range(3), fingerprint="0" * 64), 0)
    before = place.storage.sha256(join(place.uri, EMBEDDINGS, "embed-000-000000.parquet"))
    with pytest.raises(Conflict, match=r"embed-000-000000\.parquet exists with other content"):
        write(place.storage, place.uri, embeddings=range(3))
    assert place.storage.sha256(join(place.uri, EMBEDDINGS, "embed-000-000000.parquet")) == before
    assert names(place, "_records") == ["embed-000-000001.json"]


def test_a_file_in_the_way_that_is_no_parquet_is_a_conflict(place: Place) -> None:
    place.storage.publish(join(place.uri, EMBEDDINGS, "embed-000-000000.parquet"), b"no parquet")
    with pytest.raises(Conflict):
        write(place.storage, place.uri, embeddings=range(3))


def test_to_commit_twice_changes_nothing(place: Place) -> None:
    with ShardWriter(place.storage, place.uri, "embed", 0, METADATA) as writer:
        add_embeddings(writer, range(2))
        add_errors(writer, [3])
        first = writer.commit()
        assert writer.commit() == first
    assert write(place.storage, place.uri, embeddings=range(2), errors=[3]) == first  # another worker, the same bytes
    assert dataset.open(place.uri, place.storage).records == (first,)


def test_of_two_workers_the_faster_ones_record_stands(place: Place) -> None:
    first = write(place.storage, place.uri, embeddings=range(2))
    second = write(place.storage, place.uri, embeddings=range(2), encoder_sha256="0" * 64)
    assert second == first
    with pytest.raises(Conflict):
        write(place.storage, place.uri, embeddings=range(2), fingerprint="0" * 64)
    assert dataset.open(place.uri, place.storage).records == (first,)


def test_a_shard_without_rows(place: Place) -> None:
    record = write(place.storage, place.uri)
    assert record.files == ()
    found = dataset.open(place.uri, place.storage)
    assert found.records == (record,)
    for name, schema in SCHEMAS.items():
        assert found.rows(name) == 0
        assert found.table(name).schema.equals(schema)


def test_a_shard_of_images_without_objects(place: Place) -> None:
    with ShardWriter(place.storage, place.uri, "segment", 0, METADATA) as writer:
        add_masks(writer, [0, 0])
        writer.commit()
    assert dataset.open(place.uri, place.storage).table(MASKS).num_rows == 0


def test_many_masks_are_written_in_groups(tmp_path: Path) -> None:
    one = dataset.mask_rows(mask_set(1), [embedding(1)] * 9, uri_of(1), "", DECODER, "box", ["{}"] * 9)
    with ShardWriter(Storage(), str(tmp_path / "out"), "segment", 0, METADATA) as writer:
        for _ in range(3):
            writer.add(MASKS, pa.concat_tables([one] * 1500))
        writer.commit()
    file = pq.ParquetFile(tmp_path / "out" / "masks" / "segment-000-000000.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [4096, 404]


def test_what_is_no_data_set(place: Place) -> None:
    place.storage.publish(join(place.uri, "a.png"), b"1")
    for uri in (place.uri, join(place.uri, "none"), place.uri + "none"):
        with pytest.raises(NotFound, match="is no data set"):
            dataset.open(uri, place.storage)


def test_a_plan_makes_an_empty_data_set(place: Place) -> None:
    for job in dataset.JOBS:
        out = join(place.uri, job)
        place.storage.publish(dataset.plan_uri(out, job), b"{}")
        assert dataset.open(out, place.storage).records == ()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"{}",
        b"[]",
        b"\xff",
        b'{"schema_version": "3", "files": [{}], "embedding_ids": []}',
        b"null",
        b'"text"',
        Record("embed", 0, 0, "f", "e", ()).to_json().replace(b'"3"', b'"1"'),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, text: bytes) -> None:
    Storage().publish(dataset.record_uri(str(tmp_path), "embed", 0), text)
    with pytest.raises(InvalidInput, match=r"embed-000-000000\.json is no commit record") as caught:
        dataset.open(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write(Storage(), str(tmp_path / "out"), embeddings=range(2))
    path = tmp_path / "out" / "embeddings" / "embed-000-000000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InvalidInput, match=path.name):
        dataset.open(str(tmp_path / "out")).table(EMBEDDINGS)


def test_an_image_with_any_name_gets_its_row(tmp_path: Path) -> None:
    with ShardWriter(Storage(), str(tmp_path / "out"), "embed", 0, METADATA) as writer:
        writer.add(ERRORS, dataset.error_row(os.fsdecode(b"/in/\xff.png"), "read", NotFound("none")))
        writer.commit()


# Without our code


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> str:
    """OUT: embeddings 0–3 in two shards, masks of images 3, 0 and 2, errors 8 and 9."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("writers")))
        out, storage = str(tmp_path_factory.mktemp("published") / "out"), Storage()
        write(storage, out, 0, embeddings=[0, 1], errors=[8])
        write(storage, out, 1, embeddings=[2, 3], errors=[9])
        with ShardWriter(storage, out, "segment", 0, METADATA) as writer:
            add_masks(writer, [3, 0, 2])
            writer.commit()
    return out


def rows_without_us(reader: str, out: str, name: str) -> list[dict[str, Any]]:
    pattern = f"{out}/{name}/*.parquet"
    if reader == "duckdb":
        with duckdb.connect() as connection:
            found = connection.sql(f"SELECT * FROM read_parquet('{pattern}')")
            return [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]
    if reader == "polars":
        return pl.read_parquet(pattern).to_dicts()
    return pd.read_parquet(f"{out}/{name}").to_dict("records")


@pytest.mark.parametrize("reader", READERS)
def test_others_read_the_embeddings(published: str, reader: str) -> None:
    rows = sorted(rows_without_us(reader, published, EMBEDDINGS), key=lambda row: row["image_uri"])
    assert len(rows) == 4
    for number, row in enumerate(rows):
        assert list(row) == SCHEMAS[EMBEDDINGS].names
        expected = embedding(number)
        shape = tuple(int(side) for side in row["shape"])
        assert shape == expected.array.shape
        assert np.array_equal(np.frombuffer(row["embedding"], row["dtype"]).reshape(shape), expected.array)
        assert np.array_equal(np.asarray(row["pooled"], np.float32), pooled(number))
        assert (row["embedding_id"], row["image_uri"]) == (expected.embedding_id, uri_of(number))
        assert (row["height"], row["width"]) == expected.original
        assert (row["input_height"], row["input_width"]) == expected.input


@pytest.mark.parametrize("reader", READERS)
def test_others_read_the_masks_and_errors(published: str, reader: str) -> None:
    rows = rows_without_us(reader, published, MASKS)
    assert len(rows) == 5
    for row in rows:
        assert list(row) == SCHEMAS[MASKS].names
        height, width = row["segmentation"]["size"]
        (decoded,) = masks.decode([row["segmentation"]["counts"]], (int(height), int(width)))
        assert decoded.sum() == row["area"]
        assert list(row["bbox"]) == [3, 2, 2 + row["mask_index"], 5]
        assert len(row["object_embedding"]) == 256
    errors = rows_without_us(reader, published, ERRORS)
    assert sorted(row["image_uri"] for row in errors) == [uri_of(8), uri_of(9)]
    assert all(list(row) == SCHEMAS[ERRORS].names and isinstance(row["message"], str) for row in errors)


def committed(out: str, name: str) -> list[dict[str, Any]]:
    """The statement of the module's docstring, as it stands there."""
    statement = re.search(r"WITH records .*f.generation\n", dataset.__doc__ or "", re.DOTALL)
    assert statement
    text = statement.group().replace("OUT/embeddings", f"{out}/{name}").replace("OUT", out)
    with duckdb.connect() as connection:
        found = connection.sql(text)
        return [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]


def test_a_later_generations_rows_take_the_place_of_older_ones(place: Place) -> None:
    write(place.storage, place.uri, 0, embeddings=range(3), errors=[8, 9])
    with ShardWriter(place.storage, place.uri, "embed", 0, METADATA | {"generation": "1"}) as writer:
        add_embeddings(writer, [8])
        add_errors(writer, [1])
        for number in (8, 1):
            writer.supersede(uri_of(number))
        record = writer.commit()
    assert (record.generation, record.supersedes) == (1, (uri_of(8), uri_of(1)))
    assert [file.path for file in record.files] == [f"{name}/embed-001-000000.parquet" for name in (EMBEDDINGS, ERRORS)]
    found = dataset.open(place.uri, place.storage)
    for name, expected in ((EMBEDDINGS, [0, 2, 8]), (ERRORS, [9, 1])):
        assert found.table(name, ["image_uri"])["image_uri"].to_pylist() == [uri_of(number) for number in expected]
        if not place.uri.startswith("s3:"):
            assert {row["image_uri"] for row in committed(place.uri, name)} == {uri_of(number) for number in expected}
    assert found.table(ERRORS, ["stage"]).column_names == ["stage"]
    with ShardWriter(place.storage, place.uri, "segment", 0, METADATA) as writer:
        add_embeddings(writer, [1])  # another job's rows are its own
        writer.supersede(uri_of(1))
        assert writer.commit().supersedes == ()
    assert len(dataset.open(place.uri, place.storage).table(EMBEDDINGS, ["image_uri"])) == 4


@pytest.mark.parametrize("name", [EMBEDDINGS, MASKS, ERRORS])
def test_one_statement_sees_what_is_committed(tmp_path: Path, published: str, name: str) -> None:
    rows = committed(published, name)
    ours = dataset.open(published).table(name).to_pylist()
    assert [*rows[0]] == SCHEMAS[name].names
    assert sorted(map(str, (row["image_uri"] for row in rows))) == sorted(row["image_uri"] for row in ours)


def test_one_statement_does_not_see_what_is_not_committed(tmp_path: Path) -> None:
    place = Place(Storage(), str(tmp_path / "out"))
    record = write(place.storage, place.uri, embeddings=range(2), errors=[8])
    orphan(place, record, 1)
    write(place.storage, place.uri, 2)  # a record of no files
    assert len(committed(place.uri, EMBEDDINGS)) == 2
    assert len(committed(place.uri, ERRORS)) == 1


def test_one_statement_does_not_mix_up_files_of_one_name(tmp_path: Path) -> None:
    """A killed predecessor embedded the shard's images; the next attempt could read none of them."""
    place = Place(Storage(), str(tmp_path / "out"))
    orphan(place, write(place.storage, place.uri, 0, embeddings=range(2)), 1)
    write(place.storage, place.uri, 1, errors=[2, 3])
    assert dataset.open(place.uri).rows(EMBEDDINGS) == 2
    assert len(committed(place.uri, EMBEDDINGS)) == 2
