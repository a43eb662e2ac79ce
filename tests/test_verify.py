"""`cellray verify` finds what is wrong with a data set, and nothing where nothing is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.storage import Storage, join
from jobs import cli, verify
from jobs.plan import Plan
from serve_app import dataset
from serve_app.commit import ShardWriter
from serve_app.contract import Embedding
from serve_app.dataset import EMBEDDINGS, ERRORS
from tests.s3 import Place, place_fixture, s3_fixture  # noqa: F401

PLAN = Plan("embed", {"images": 5, "shard_images": 3})
METADATA = {"fingerprint": PLAN.fingerprint, "encoder_sha256": "e" * 64, "model": "nano", "trained": "true"}


def write(
    place: Place,
    shard: int,
    numbers: Any,
    failed: Any = (),
    value: float = 1.0,
    replacing: bool = True,
    **metadata: str,
) -> None:
    with ShardWriter(place.storage, place.uri, "embed", shard, METADATA | metadata) as writer:
        for number in [*numbers, *failed] if replacing else []:
            writer.supersede(f"/x/{number}.png")
        for number in numbers:
            array = np.full((4, 2, 2), value, np.float16)
            made = Embedding(f"id-{number}", f"image-{number}", "nano", "e" * 64, (60, 80), (192, 256), array)
            writer.add(EMBEDDINGS, dataset.embedding_row(made, f"/x/{number}.png", np.zeros(4, np.float32)))
        for number in failed:
            writer.add(ERRORS, dataset.error_row(f"/x/{number}.png", "read", ValueError("damaged")))
        writer.commit()


@pytest.fixture
def whole(place: Place) -> Place:
    PLAN.freeze(place.storage, place.uri)
    write(place, 0, range(3))
    write(place, 1, [3], failed=[4])
    return place


def faults(place: Place) -> list[str]:
    sizes: list[int] = []
    found = dataset.open(place.uri, place.storage)
    said = list(verify.verify(found, sizes.append))
    assert sum(sizes) == found.bytes()
    return said


def replaced(place: Place, path: str, content: bytes) -> None:
    place.storage.overwrite(join(place.uri, path), content)


def test_a_whole_one_has_no_faults(whole: Place) -> None:
    assert faults(whole) == []


def test_one_that_is_not_done_says_how_to_go_on(place: Place) -> None:
    PLAN.freeze(place.storage, place.uri)
    write(place, 1, [3, 4])
    assert faults(place) == ["embed: 1 of 2 shards are not committed (0): the same command goes on"]


def flipped(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


@pytest.mark.parametrize(
    ("change", "said"),
    [(flipped, "has sha256"), (lambda content: content[:-1], "bytes,"), (lambda _: b"", "has 0 bytes")],
)
def test_a_changed_file(whole: Place, change: Callable[[bytes], bytes], said: str) -> None:
    path = "embeddings/embed-000-000000.parquet"
    replaced(whole, path, change(whole.storage.read(join(whole.uri, path), 1 << 20)))
    (fault,) = faults(whole)
    assert path in fault
    assert said in fault


def test_float32(place: Place) -> None:
    PLAN.freeze(place.storage, place.uri)
    for shard, numbers in enumerate((range(3), [3, 4])):
        kept = {0: "float32", 1: "float16"}[shard]  # the second shard's footer says float32
        metadata = METADATA | {"dtype": "float32"}
        with ShardWriter(place.storage, place.uri, "embed", shard, metadata) as writer:
            for number in numbers:
                array = np.full((4, 2, 2), 1e6 if not shard else 1, kept)
                made = Embedding(f"id-{number}", f"image-{number}", "nano", "e" * 64, (60, 80), (192, 256), array)
                writer.add(EMBEDDINGS, dataset.embedding_row(made, f"/x/{number}.png", np.zeros(4, np.float32)))
            writer.commit()
    assert faults(place) == [
        "embeddings/embed-000-000001.parquet: 2 embeddings are not finite float32 numbers of their shape"
    ]


def test_pooled_only(place: Place) -> None:
    PLAN.freeze(place.storage, place.uri)
    for shard, (numbers, value) in enumerate(((range(3), 1), ([3, 4], np.nan))):
        with ShardWriter(place.storage, place.uri, "embed", shard, METADATA | {"dtype": "pooled"}) as writer:
            for number in numbers:
                array = np.zeros((4, 2, 2), np.float16)
                made = Embedding(f"id-{number}", f"image-{number}", "nano", "e" * 64, (60, 80), (192, 256), array)
                pooled = np.full(4, value, np.float32)
                writer.add(EMBEDDINGS, dataset.embedding_row(made, f"/x/{number}.png", pooled, pooled_only=number != 4))
            writer.commit()
    assert faults(place) == [
        "embeddings/embed-000-000001.parquet: 2 embeddings are not finite pooled numbers of their shape"
    ]


def test_a_missing_file(tmp_path: Path) -> None:
    place = Place(Storage(), str(tmp_path))
    PLAN.freeze(place.storage, place.uri)
    write(place, 0, range(5))
    (tmp_path / "embeddings" / "embed-000-000000.parquet").unlink()
    assert any("embed-000-000000.parquet: cannot be read: " in fault for fault in faults(place))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(place: Place, value: float) -> None:
    PLAN.freeze(place.storage, place.uri)
    write(place, 0, range(3), value=value)
    write(place, 1, [3, 4])
    (fault,) = faults(place)
    assert fault == "embeddings/embed-000-000000.parquet: 3 embeddings are not finite float16 numbers of their shape"


def test_an_image_that_is_there_twice(place: Place) -> None:
    PLAN.freeze(place.storage, place.uri)
    write(place, 0, range(3))
    write(place, 1, [2, 3], failed=[0, 4])
    assert faults(place) == [
        "embeddings of embed: 1 rows are there twice, by image_uri and part",
        "1 images have an embedding and an error",
    ]


def test_a_shard_of_another_plan(place: Place) -> None:
    PLAN.freeze(place.storage, place.uri)
    write(place, 0, range(3))
    write(place, 1, [3, 4], fingerprint="0" * 64)
    (fault,) = faults(place)
    assert "embed-000-000001.json is of another plan (000000000000…)" in fault


def test_a_record_that_says_something_else(whole: Place) -> None:
    uri = dataset.record_uri(whole.uri, "embed", 1)
    record = dataset.read_record(whole.storage, uri)
    files = tuple(replace(file, rows=9) if file.dataset == EMBEDDINGS else file for file in record.files)
    whole.storage.overwrite(uri, replace(record, files=files, embedding_ids=("id-8",)).to_json())
    path = "embeddings/embed-000-000001.parquet"
    assert faults(whole) == [
        f"{path}: has 1 rows, 9 were committed",
        f"{path}: its rows are not the record's embedding_ids and image_digests",
    ]


def test_files_in_no_record(whole: Place) -> None:
    replaced(whole, "embeddings/embed-000-000007.parquet", b"a killed worker's")
    (fault,) = faults(whole)
    assert fault.startswith("embeddings/embed-000-000007.parquet: in no record")


def test_a_later_generation(whole: Place) -> None:
    again = Plan("embed", {"images": 2, "shard_images": 3, "mode": "update"}, 1)
    again.freeze(whole.storage, whole.uri)
    assert "1 of 1 shards are not committed" in faults(whole)[0]
    write(whole, 0, [4, 0], fingerprint=again.fingerprint, generation="1")
    assert faults(whole) == []


def test_a_later_generation_that_takes_the_place_of_nothing(whole: Place) -> None:
    again = Plan("embed", {"images": 2, "shard_images": 3, "mode": "update"}, 1)
    again.freeze(whole.storage, whole.uri)
    write(whole, 0, [4, 0], replacing=False, fingerprint=again.fingerprint, generation="1")
    assert faults(whole) == [
        "embeddings of embed: 1 rows are there twice, by image_uri and part",
        "1 images have an embedding and an error",
    ]


def test_a_plan_that_is_gone_or_damaged(whole: Place) -> None:
    whole.storage.overwrite(dataset.plan_uri(whole.uri, "embed"), b"[]")
    assert "is no plan of this version" in faults(whole)[0]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(Storage(), str(tmp_path))
    PLAN.freeze(place.storage, place.uri)
    write(place, 0, range(3))
    write(place, 1, [3], failed=[4])
    assert cli.main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(": 4 embeddings, 0 masks, 1 errors in 2 shards, no faults\n")
    path = tmp_path / "errors" / "embed-000-000001.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows, path)
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert "errors/embed-000-000001.parquet: has " in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "none")]) == 1
    assert "is no data set" in capsys.readouterr().err
    assert json.loads((tmp_path / "_plan-embed-000.json").read_text())["images"] == 5
