"""Embeddings by id and by image: what the index says of data sets that grow, change and are compacted."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from cluster.errors import InvalidEmbedding, NotFound
from cluster.settings import Limits, Settings
from cluster.storage import Storage
from serve_app import dataset, store
from serve_app.commit import ShardWriter
from serve_app.contract import Embedding
from serve_app.dataset import EMBEDDINGS, ERRORS
from serve_app.index import Index, Multimap
from serve_app.store import EmbeddingStore
from tests.s3 import Place
from tests.test_compact import run, uri_of

ENCODER = "e" * 64


def embedding(name: str, value: float, encoder: str = ENCODER) -> Embedding:
    return Embedding(name, f"image of {name}", "nano", encoder, (60, 80), (192, 256), np.full((4, 2, 2), value, "f2"))


def commit(
    place: Place,
    shard: int,
    rows: list[tuple[str, str, Embedding]],
    generation: int = 0,
    failed: list[str] | None = None,
    **more: str,
) -> None:
    """rows: (image URI, part, embedding)."""
    plan = dataset.plan_uri(place.uri, "embed", generation)
    if not place.storage.exists(plan):
        place.storage.publish(plan, b"{}")
    metadata = {"fingerprint": str(generation), "encoder_sha256": ENCODER, "generation": str(generation), **more}
    with ShardWriter(place.storage, place.uri, "embed", shard, metadata) as writer:
        for uri, part, one in rows:
            writer.supersede(uri)
            pooled = one.array.mean(axis=(1, 2))
            row = dataset.embedding_row(one, uri, pooled, part=part, pooled_only="dtype" in more)
            writer.add(EMBEDDINGS, row)
        for uri in failed or []:
            writer.supersede(uri)
            writer.add(ERRORS, dataset.error_row(uri, "read", ValueError("damaged")))
        writer.commit()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(Storage(), str(tmp_path / "out"))


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store looks for new shards whenever it misses something."""
    monkeypatch.setattr(store, "REFRESH_S", 0.0)
    monkeypatch.setattr(store, "REFRESH_SHARE", float("inf"))


def opened(*places: Place, **limits: Any) -> EmbeddingStore:
    return EmbeddingStore(Settings(datasets=[place.uri for place in places], limits=Limits(**limits)))


@given(
    some.lists(some.lists(some.tuples(some.integers(0, 2**64 - 1) | some.integers(0, 9), some.integers(0, 2**32 - 1))))
)
def test_a_multimap_has_what_was_added(batches: list[list[tuple[int, int]]]) -> None:
    made, expected = Multimap(), defaultdict[int, list[int]](list)
    for batch in filter(None, batches):
        keys, values = zip(*batch, strict=True)
        made.add(np.array(keys, np.uint64), np.array(values, np.uint32))
        for key, value in batch:
            expected[key].append(value)
    assert {key: sorted(made.find(key)) for key in expected} == {key: sorted(own) for key, own in expected.items()}
    assert made.find(2**63 + 11) == expected.get(2**63 + 11, [])
    sizes = [len(keys) for keys, _ in made.parts]
    assert all(first >= 4 * second for first, second in itertools.pairwise(sizes))


def test_an_index_takes_24_bytes_a_row(tmp_path: Path) -> None:
    index, rows = Index(str(tmp_path), Storage()), 512
    for shard in range(200):
        file = dataset.ShardFile(EMBEDDINGS, f"embeddings/{shard}", rows, 1, "")
        names = [f"{shard} {row}" for row in range(rows)]
        index.add(
            iter(
                [
                    dataset.Record(
                        "embed", 0, shard, "", ENCODER, (file,), tuple(names), tuple(map(dataset.digest, names))
                    )
                ]
            )
        )
    assert index.rows == 200 * rows
    assert index.ids.bytes + index.images.bytes + index.superseded.bytes == 24 * index.rows
    for found in (index.by_id("199 511"), index.by_image("199 511")):
        assert [(place.uri, place.row) for place in found] == [(f"{tmp_path}/embeddings/199", 511)]


def test_an_embedding_is_found_by_its_id_and_by_its_image(place: Place) -> None:
    commit(place, 0, [("/x/a.png", "", embedding("a", 1)), ("/x/b.png", "", embedding("b", 2))])
    commit(place, 1, [("/x/c.png", "", embedding("c", 3))])
    one = opened(place)
    assert one.get("c").array[0, 0, 0] == 3
    assert one.of_image("/x/b.png", "", [ENCODER]).embedding_id == "b"
    for missing in (lambda: one.get("d"), lambda: one.of_image("/x/d.png", "", [ENCODER])):
        with pytest.raises(NotFound, match=place.uri):
            missing()
    with pytest.raises(NotFound):
        one.of_image("/x/b.png", "", ["f" * 64])


def test_parts_of_an_image_are_told_apart(place: Place) -> None:
    commit(place, 0, [("/x/a.tif", f"z={z}", embedding(f"a{z}", z)) for z in range(3)])
    one = opened(place)
    assert one.of_image("/x/a.tif", "z=2", [ENCODER]).embedding_id == "a2"
    with pytest.raises(NotFound, match="no part 'z=7' in the data sets; what is there is z=0, z=1, z=2"):
        one.of_image("/x/a.tif", "z=7", [ENCODER])


def test_what_is_committed_later_is_found(place: Place, tmp_path: Path, ready: None) -> None:
    other = Place(Storage(), str(tmp_path / "other"))
    one = opened(place, other)
    with pytest.raises(NotFound):
        one.get("a")  # there is no data set yet
    commit(place, 0, [("/x/a.png", "", embedding("a", 1))])
    assert one.get("a").array[0, 0, 0] == 1
    commit(place, 1, [("/x/b.png", "", embedding("b", 2))])
    commit(other, 0, [("/y/c.png", "", embedding("c", 3))])
    assert one.of_image("/x/b.png", "", [ENCODER]).embedding_id == "b"
    assert one.of_image("/y/c.png", "", [ENCODER]).embedding_id == "c"


def eventually(check: Any) -> None:
    """Within ten seconds: another thread sees to it."""
    for _ in range(100):
        if check():
            return
        threading.Event().wait(0.1)
    raise AssertionError("it did not come")


def test_an_image_has_its_last_embedding_and_none_once_it_fails(place: Place, ready: None) -> None:
    commit(place, 0, [("/x/a.png", "", embedding("a", 1)), ("/x/b.png", "", embedding("b", 2))])
    one = opened(place)
    assert one.of_image("/x/a.png", "", [ENCODER]).embedding_id == "a"
    commit(place, 0, [("/x/a.png", "", embedding("A", 5))], generation=1, failed=["/x/b.png"])
    eventually(lambda: one.of_image("/x/a.png", "", [ENCODER]).embedding_id == "A")
    with pytest.raises(NotFound):
        one.of_image("/x/b.png", "", [ENCODER])
    assert one.get("b").array[0, 0, 0] == 2  # whoever has the id may go on


def test_rows_that_compact_has_moved_are_found(tmp_path: Path) -> None:
    from tests.test_compact import fill

    place = Place(Storage(), str(tmp_path))
    fill(place)
    one = opened(place)
    assert one.of_image(uri_of(0), "", [ENCODER]).embedding_id == "id-0-0"
    run(place, delete=True)
    assert one.of_image(uri_of(1), "", [ENCODER]).embedding_id == "id-1-0.5"
    one = opened(place)
    assert one.of_image(uri_of(0), "", [ENCODER]).embedding_id == "id-0-0"
    one.memory.clear()
    run(place, delete=True)
    assert one.of_image(uri_of(0), "", [ENCODER]).embedding_id == "id-0-0"
    with pytest.raises(NotFound):
        one.get("id-1-0")  # superseded, and so dropped


def test_rows_whose_digests_are_the_same_are_told_apart(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("commit", "dataset"):
        monkeypatch.setattr(f"serve_app.{module}.digest", lambda text: "0" * 15 + "7")
    commit(place, 0, [(f"/x/{name}.png", "", embedding(name, number)) for number, name in enumerate("abcd")])
    one = opened(place)
    for number, name in enumerate("abcd"):
        assert one.get(name).array[0, 0, 0] == number
        assert one.of_image(f"/x/{name}.png", "", [ENCODER]).array[0, 0, 0] == number


def test_a_data_set_without_embeddings_says_so(place: Place) -> None:
    commit(place, 0, [("/x/a.png", "", embedding("a", 1))], dtype="pooled")
    for call in (lambda: opened(place).get("a"), lambda: opened(place).of_image("/x/a.png", "", [ENCODER])):
        with pytest.raises(InvalidEmbedding, match="pooled-only"):
            call()


def test_no_more_is_kept_than_allowed_and_a_hit_reads_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(place, 0, [(f"/x/{number}.png", "", embedding(str(number), number)) for number in range(10)])
    one, reads = opened(place, cache_bytes=100), list[str]()
    read = dataset.open_embeddings

    def counted(storage: Storage, uri: str, rows: list[int]) -> Any:
        reads.append(uri)
        return read(storage, uri, rows)

    monkeypatch.setattr(dataset, "open_embeddings", counted)
    for number in [*range(10), 9, 9, 8, 0]:
        assert one.get(str(number)).array[0, 0, 0] == number
        assert one.held == sum(kept.array.nbytes for kept in one.memory.values()) <= 100
    assert len(reads) == 11
    for _ in range(3):
        one.of_image("/x/0.png", "", [ENCODER])
    assert len(reads) == 11


def test_threads_share_a_store(place: Place) -> None:
    commit(place, 0, [(f"/x/{number}.png", "", embedding(str(number), number)) for number in range(8)])
    one, wrong = opened(place, cache_bytes=100), list[object]()

    def look(offset: int) -> None:
        for turn in range(40):
            number = (turn + offset) % 8
            found = one.get(str(number)) if turn % 2 else one.of_image(f"/x/{number}.png", "", [ENCODER])
            if found.array[0, 0, 0] != number:
                wrong.append(found)

    threads = [threading.Thread(target=look, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
