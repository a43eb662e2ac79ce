"""A data set's files become few, and at any moment, killed anywhere, each row is there once."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.errors import Conflict, InvalidInput, NotFound
from cluster.settings import Settings
from cluster.storage import Storage, join
from jobs import cli, compact, driver, plan, verify
from jobs.plan import Plan
from serve_app import dataset
from serve_app.commit import ShardWriter
from serve_app.contract import Embedding
from serve_app.dataset import EMBEDDINGS, ERRORS, MASKS
from serve_app.store import EmbeddingStore
from tests.s3 import Place, place_fixture, s3_fixture  # noqa: F401
from tests.test_dataset import committed
from tests.test_export import mask_table, planes

FACTS = {"input": "/x", "model": "nano"}
NAMES = (EMBEDDINGS, MASKS, ERRORS)


def uri_of(number: int) -> str:
    return f"/x/{number:02d}.png"


def write(place: Place, made: Plan, shard: int, numbers: Any, failed: Any = (), value: float = 0) -> None:
    metadata = {
        "fingerprint": made.fingerprint,
        "encoder_sha256": "e" * 64,
        "model": "nano",
        "trained": "true",
        "generation": str(made.generation),
    }
    with ShardWriter(place.storage, place.uri, made.job, shard, metadata) as writer:
        for number in [*numbers, *failed]:
            writer.supersede(uri_of(number))
        for number in numbers:
            uri = uri_of(number)
            if made.job == "segment":
                writer.add(MASKS, mask_table(uri, planes((0, 0, 3, 3), (5, 5, 9, 9 + number))))
                continue
            array = np.full((4, 2, 2), number + value, np.float16)
            one = Embedding(f"id-{number}-{value:g}", f"image-{number}", "nano", "e" * 64, (60, 80), (192, 256), array)
            writer.add(EMBEDDINGS, dataset.embedding_row(one, uri, array.mean(axis=(1, 2)), key=str(number)))
        for number in failed:
            writer.add(ERRORS, dataset.error_row(uri_of(number), "read", ValueError("damaged")))
        writer.commit()


def begin(place: Place, job: str, images: int, generation: int = 0, shards: int = 2) -> Plan:
    mode = {"mode": "update"} if generation else {}
    made = Plan(job, {**FACTS, "images": images, "shard_images": -(-images // shards), **mode}, generation)
    made.freeze(place.storage, place.uri)
    return made


def fill(place: Place, shards: int = 5) -> None:
    """3 images in each shard of each job, of which one failed; then an update of four, of which one had failed."""
    for job in dataset.JOBS:
        made = begin(place, job, 3 * shards, shards=shards)
        for shard in range(shards):
            first = 3 * shard
            write(place, made, shard, [first, first + 1], failed=[first + 2])
    made = begin(place, "embed", 4, 1)
    write(place, made, 0, [1, 2], value=0.5)
    write(place, made, 1, [6], failed=[7], value=0.5)


def rows(place: Place) -> dict[str, list[dict[str, Any]]]:
    found = dataset.open(place.uri, place.storage)

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["image_uri"], row.get("mask_index"), row.get("message")

    return {name: sorted(found.table(name).to_pylist(), key=order) for name in NAMES}


def faults(place: Place) -> list[str]:
    return list(verify.verify(dataset.open(place.uri, place.storage), lambda _: None))


def run(place: Place, delete: bool = False) -> None:
    """As the command does."""
    found = dataset.open(place.uri, place.storage)
    for work in [compact.prepare(found, job) for job in dataset.JOBS]:
        if work:
            compact.run(work, lambda _: None)
    if delete:
        found = dataset.open(place.uri, place.storage)
        for job in dataset.JOBS:
            compact.old(found, job).delete(lambda: None)


def files(place: Place) -> list[str]:
    return sorted(path for name in NAMES for path in dataset.stored(place.storage, place.uri, name))


def records(place: Place) -> list[str]:
    return sorted(file.uri.rsplit("/", 1)[1] for file in place.storage.list(join(place.uri, "_records")))


MERGED = ["embeddings/embed-002-000000", "masks/segment-001-000000", "errors/embed-002-000001"]
MERGED = sorted(f"{path}.parquet" for path in [*MERGED, "errors/segment-001-000001"])


def test_many_files_become_few_and_the_rows_are_the_same(place: Place) -> None:
    fill(place)
    before, old = rows(place), files(place)
    assert len(old) == 23
    run(place)
    assert rows(place) == before
    assert faults(place) == []
    found = dataset.open(place.uri, place.storage)
    assert sorted(file.path for _, file in found.current()) == MERGED
    assert files(place) == sorted(old + MERGED)
    if not place.uri.startswith("s3:"):
        for name in NAMES:
            assert sorted(row["image_uri"] for row in committed(place.uri, name)) == [
                row["image_uri"] for row in before[name]
            ]
    run(place)  # there is nothing left to merge
    assert files(place) == sorted(old + MERGED)
    run(place, delete=True)
    assert (rows(place), faults(place), files(place)) == (before, [], MERGED)
    shards = [f"embed-002-00000{shard}" for shard in range(4)]  # two of them of files of which nothing stood
    assert records(place) == [f"{name}.json" for name in (*shards, "segment-001-000000", "segment-001-000001")]


def test_what_is_merged_is_as_the_jobs_write_it(tmp_path: Path) -> None:
    place = Place(Storage(), str(tmp_path))
    fill(place)
    run(place)
    file = pq.ParquetFile(tmp_path / MERGED[0])
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [1] * 10
    images = file.read(["image_uri"])["image_uri"].to_pylist()
    again = [uri_of(number) for number in (1, 2, 6)]
    assert images == [uri_of(n) for n in range(15) if n % 3 != 2 and n not in (1, 6, 7)] + again
    footer = {key.decode(): value.decode() for key, value in file.schema_arrow.metadata.items()}
    named = ("schema_version", "job", "shard", "generation", "model", "trained", "encoder_sha256")
    assert [footer[f"cellray.{name}"] for name in named] == [
        dataset.SCHEMA_VERSION,
        "embed",
        "0",
        "2",
        "nano",
        "true",
        "e" * 64,
    ]
    (record,) = [one for one in dataset.open(str(tmp_path)).records if one.embedding_ids and one.generation == 2]
    assert record.embedding_ids[-3:] == ("id-1-0.5", "id-2-0.5", "id-6-0.5")
    assert (record.encoder_sha256, record.supersedes, len(record.replaces)) == ("e" * 64, (), 6)


class Killed(Exception):
    pass


class Failing(Storage):
    """Writes or deletes `most` times, and then no more: the last of those succeeds, and nobody hears of it."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.done, self.lock = most, 0, threading.Lock()

    def _count(self, act: Callable[..., None], *arguments: Any) -> None:
        with self.lock:
            self.done += 1
            if self.done <= self.most:
                act(*arguments)
            if self.done >= self.most:
                raise Killed

    def publish(self, uri: str, content: bytes | Path, ours: bool = False) -> None:
        self._count(super().publish, uri, content)

    def delete(self, uri: str) -> None:
        self._count(super().delete, uri)


def test_killed_anywhere_the_same_command_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MAX_ROWS_A_FILE", 6)
    fill(Place(Storage(), str(tmp_path / "filled")), 3)
    place = Place(Storage(), str(tmp_path / "out"))
    for at in range(1, 100):
        shutil.rmtree(place.uri, ignore_errors=True)
        shutil.copytree(tmp_path / "filled", place.uri)
        expected = rows(place)
        try:
            run(Place(Failing(at), place.uri), delete=True)
        except Killed:
            pass
        else:
            break
        assert rows(place) == expected, at
        assert {row["image_uri"] for row in committed(place.uri, EMBEDDINGS)} == {
            row["image_uri"] for row in expected[EMBEDDINGS]
        }
        assert len(committed(place.uri, MASKS)) == len(expected[MASKS])
        strays = [fault for fault in faults(place) if "the same command goes on" not in fault]
        assert all("still being committed" in fault for fault in strays), (at, strays)
        run(place, delete=True)
        assert rows(place) == expected, at
        assert faults(place) == [], at
        assert not set(files(place)) & dataset.open(place.uri).replaced
    assert at > 30, f"only {at - 1} steps"


@pytest.mark.parametrize("kept", ["float32", "pooled"])
def test_what_is_kept_of_embeddings_stays_as_it_is(tmp_path: Path, kept: str) -> None:
    place = Place(Storage(), str(tmp_path))
    made = Plan("embed", {**FACTS, "dtype": kept, "compression": "zstd", "images": 2, "shard_images": 1})
    made.freeze(place.storage, place.uri)
    named = {"fingerprint": made.fingerprint, "encoder_sha256": "e" * 64, "dtype": kept, "compression": "zstd"}
    for shard in range(2):
        with ShardWriter(place.storage, place.uri, "embed", shard, named) as writer:
            array = np.full((4, 2, 2), 0.1 + shard, np.float32)
            one = Embedding(f"id-{shard}", f"image-{shard}", "nano", "e" * 64, (60, 80), (192, 256), array)
            row = dataset.embedding_row(one, uri_of(shard), array[:, 0, 0], pooled_only=kept == "pooled")
            writer.add(EMBEDDINGS, row)
            writer.commit()
    before = rows(place)
    run(place, delete=True)
    assert (rows(place), faults(place)) == (before, [])
    (file,) = [pq.ParquetFile(tmp_path / path) for path in files(place)]
    assert file.num_row_groups == (1 if kept == "pooled" else 2)
    column = file.schema_arrow.get_field_index("embedding")
    assert file.metadata.row_group(0).column(column).compression == "ZSTD"


def test_two_at_once(place: Place) -> None:
    fill(place)
    before = rows(place)
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(run, place) for _ in range(2)]:
            future.result()
    assert (rows(place), faults(place)) == (before, [])
    assert sorted(file.path for _, file in dataset.open(place.uri, place.storage).current()) == MERGED


def test_a_job_that_is_not_done_is_not_compacted(tmp_path: Path) -> None:
    place = Place(Storage(), str(tmp_path))
    fill(place)
    made = begin(place, "embed", 4, 2)
    write(place, made, 1, [3], value=0.25)
    with pytest.raises(Conflict, match=r"1 of 2 shards of embed are committed\. The command that began it goes on"):
        run(place)
    with pytest.raises(NotFound, match="is no data set"):
        run(Place(place.storage, str(tmp_path / "none")))


def test_an_update_that_began_meanwhile_is_not_disturbed(tmp_path: Path) -> None:
    place = Place(Storage(), str(tmp_path))
    fill(place)
    work = compact.prepare(dataset.open(place.uri), "embed")
    assert work is not None
    begin(place, "embed", 4, 2)
    before = files(place)
    with pytest.raises(Conflict, match="another job has begun generation 2 of embed"):
        compact.run(work, lambda _: None)
    assert files(place) == before


@pytest.mark.parametrize("delete", [False, True], ids=["kept", "deleted"])
def test_generations_go_on_after_it(tmp_path: Path, delete: bool) -> None:
    place = Place(Storage(), str(tmp_path))
    fill(place)
    run(place, delete)
    made = begin(place, "embed", 4, 3)
    write(place, made, 0, [1, 14], failed=[0], value=0.75)
    assert any("1 of 2 shards are not committed" in fault for fault in faults(place))
    found = dataset.open(place.uri, place.storage)
    assert len(compact.old(found, "embed")) == 0  # as long as the update is not done
    write(place, made, 1, [7], value=0.75)
    after = rows(place)
    assert uri_of(0) in [row["image_uri"] for row in after[ERRORS]]
    assert uri_of(0) not in [row["image_uri"] for row in after[EMBEDDINGS]]
    ids = {row["image_uri"]: row["embedding_id"] for row in after[EMBEDDINGS]}
    assert [ids[uri_of(number)] for number in (1, 2, 7, 14)] == ["id-1-0.75", "id-2-0.5", "id-7-0.75", "id-14-0.75"]
    assert faults(place) == []
    run(place, delete=True)
    assert (rows(place), faults(place)) == (after, [])
    assert [path for path in files(place) if "embed-" in path] == [
        "embeddings/embed-004-000000.parquet",
        "errors/embed-004-000001.parquet",
    ]


def test_a_file_that_is_large_enough_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MAX_ROWS_A_FILE", 3)
    place = Place(Storage(), str(tmp_path))
    fill(place)
    before = rows(place)
    run(place, delete=True)
    assert (rows(place), faults(place)) == (before, [])
    there = [path for path in files(place) if path.startswith("embeddings/")]
    untouched = [f"embeddings/embed-000-00000{shard}.parquet" for shard in (1, 3, 4)]  # 2 rows each, and all stand
    assert there == [*untouched, "embeddings/embed-001-000000.parquet", "embeddings/embed-002-000000.parquet"]
    assert "embed-000-000001.json" in records(place)  # its errors are merged, its embeddings are not
    assert "embed-000-000000.json" not in records(place)
    made = begin(place, "embed", 2, 3, 1)
    write(place, made, 0, [8], failed=[11])
    before = rows(place)
    run(place, delete=True)  # the merged errors are merged again, and the record that merged them has no file left
    assert (rows(place), faults(place)) == (before, [])


def test_a_damaged_file_is_not_carried_on(tmp_path: Path) -> None:
    place = Place(Storage(), str(tmp_path))
    fill(place)
    path = tmp_path / "embeddings" / "embed-000-000003.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(InvalidInput, match=r"embed-000-000003\.parquet is damaged: it has sha256 .* was committed"):
        run(place)
    path.write_bytes(content)
    run(place)
    assert faults(place) == []


def test_a_service_finds_rows_that_have_moved(tmp_path: Path) -> None:
    place = Place(Storage(), str(tmp_path))
    fill(place)
    store = EmbeddingStore(Settings(datasets=[place.uri]))
    assert store.get("id-0-0").array[0, 0, 0] == 0
    run(place, delete=True)
    assert store.get("id-1-0.5").array[0, 0, 0] == 1.5
    run(place, delete=True)
    with pytest.raises(NotFound):
        store.get("id-1-0")  # superseded, and so dropped


def test_a_job_goes_on_from_it(tmp_path: Path) -> None:
    place = Place(Storage(), str(tmp_path))
    fill(place)
    run(place, delete=True)
    arguments = driver.parser("embed", "", "", update=True).parse_args(
        ["/x", place.uri, "--model", "nano", "--retry-errors"]
    )
    job = driver.Job("embed", arguments, Settings(), place.storage, "/x", place.uri)
    number, before = driver.generation(job)
    assert number == 3
    failed = set(before.table(ERRORS, ["image_uri"])["image_uri"].to_pylist())
    assert failed == {uri_of(number) for number in (5, 7, 8, 11, 14)}
    made = Plan("embed", {"mode": plan.COMPACT, "sources": [["a"]], **FACTS}, 3)
    made.freeze(place.storage, place.uri)
    with pytest.raises(Conflict, match="is being compacted: end `cellray compact"):
        driver.generation(job)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(Storage(), str(tmp_path))
    fill(place)
    before = files(place)
    assert cli.main(["compact", place.uri, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "embed: 13 files, " in said
    assert " → 2 files, about " in said
    assert "segment: 10 files, " in said
    assert files(place) == before
    assert not place.storage.exists(dataset.plan_uri(place.uri, "embed", 2))
    assert cli.main(["compact", place.uri]) == 0
    assert "embed: 13 replaced files, " in capsys.readouterr().out
    assert cli.main(["compact", place.uri, "--delete-old"]) == 0
    said = capsys.readouterr().out
    assert "embed: nothing to merge in 2 files, " in said
    assert "segment: 10 replaced files, " in said
    assert files(place) == MERGED
    assert cli.main(["compact", str(tmp_path / "none")]) == 1
    assert "is no data set" in capsys.readouterr().err
