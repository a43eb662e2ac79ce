"""Where a data set's embeddings are, by id and by image, from its commit records alone: 24 bytes a row.

Keys are 64-bit digests, so that what is found is to be compared with what was asked for: about one lookup in
10^11 of 100 million rows finds another's too.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from cluster.errors import NotFound
from cluster.storage import Storage, absolute, join
from serve_app import dataset
from serve_app.dataset import EMBEDDINGS, Record

MERGED_FROM = 4  # a part is merged into the one before it, unless that is so many times larger
ADDED_AT_ONCE = 64  # records


class Multimap:
    """uint64 keys → uint32 values, 12 bytes a pair: sorted parts, each much larger than the next. One thread adds,
    others may look up meanwhile."""

    def __init__(self) -> None:
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self.parts)

    @property
    def bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.parts)

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        parts = [*self.parts, (keys.astype(np.uint64), values.astype(np.uint32))]
        first = len(parts) - 1
        while first and len(parts[first - 1][0]) < MERGED_FROM * sum(len(one) for one, _ in parts[first:]):
            first -= 1
        keys, values = (np.concatenate(column) for column in zip(*parts[first:], strict=True))
        order = np.argsort(keys, kind="stable")
        self.parts = [*parts[:first], (keys[order], values[order])]

    def find(self, key: int) -> list[int]:
        """All values of a key."""
        found: list[int] = []
        for keys, values in self.parts:
            first, end = (np.searchsorted(keys, np.uint64(key), side) for side in ("left", "right"))
            found += values[first:end].tolist()
        return found


@dataclass(frozen=True)
class Place:
    """A row of a committed file. `generation` is its shard's."""

    uri: str
    row: int
    generation: int


class Index:
    """Of the embeddings of one data set. Thread-safe; what is committed later is found after the next `refresh`."""

    def __init__(self, uri: str, storage: Storage) -> None:
        self.uri, self.storage = absolute(uri), storage
        self.ids, self.images = Multimap(), Multimap()
        self.superseded = Multimap()  # image → generations
        self.starts, self.files = array("Q"), list[tuple[str, int]]()  # a file's first position; its path, generation
        self.replaced: set[str] = set()
        self.encoders: set[str] = set()
        self.known: set[str] = set()  # URIs of records
        self.rows = 0
        self.refreshing = threading.Lock()

    def refresh(self, also: Callable[[Record], object] = lambda _: None) -> int:
        """Read the records that are new, `also` for those who want to see them; → how many. Raises NotFound where there
        is no data set yet."""
        with self.refreshing:
            before = len(self.known)
            for left in reversed(range(dataset.OPEN_ATTEMPTS)):
                try:
                    self.add(dataset.records(self.uri, self.storage, self.known), also)
                    break
                except NotFound:  # `cellray compact --delete-old` may just have deleted one that was listed
                    if not left:
                        raise
            return len(self.known) - before

    def by_id(self, embedding_id: str) -> list[Place]:
        """Rows that hold an embedding: all are the same."""
        return self._places(self.ids.find(_key(embedding_id)))

    def by_image(self, image_uri: str) -> list[Place]:
        """Rows of an image, as in the column `image_uri`: of all its parts, of the last generation that has any."""
        places = self._places(self.images.find(_key(image_uri)))
        return [place for place in places if self.stands(image_uri, place.generation)]

    def after(self, path: str, row: int, most: int) -> list[Place]:
        """The next rows, of one file: those after `row` of the file `path`, or else the first of the next file by
        name; `most` of them. None are left where it is empty."""
        sizes = np.diff([*self.starts, self.rows]).tolist()
        for (file, generation), rows in sorted(zip(self.files, sizes, strict=False)):
            first = row + 1 if file == path else 0
            if file >= path and first < rows and file not in self.replaced:
                return [Place(join(self.uri, file), one, generation) for one in range(first, min(rows, first + most))]
        return []

    def stands(self, image_uri: str, generation: int) -> bool:
        """No later generation has the image too."""
        return generation >= max(self.superseded.find(_key(image_uri)), default=0)

    def _places(self, positions: Iterable[int]) -> list[Place]:
        found = []
        for position in positions:
            file = bisect_right(self.starts, position) - 1
            path, generation = self.files[file]
            if path not in self.replaced:
                found.append(Place(join(self.uri, path), position - self.starts[file], generation))
        return found

    def add(self, records: Iterator[Record], also: Callable[[Record], object] = lambda _: None) -> None:
        """Of this data set, each once."""
        batch: list[Record] = []
        try:
            for record in records:
                batch.append(record)
                also(record)
                if len(batch) == ADDED_AT_ONCE:
                    self._take(batch)
                    batch = []
        finally:
            self._take(batch)

    def _take(self, batch: list[Record]) -> None:
        first, ids, images = self.rows, list[int](), list[str]()
        superseded: list[tuple[int, int]] = []
        for record in batch:
            self.replaced.update(record.replaces)
            for file in record.files:
                if file.dataset == EMBEDDINGS:
                    self.files.append((file.path, record.generation))
                    self.starts.append(self.rows)
                    self.rows += file.rows
            ids += map(_key, record.embedding_ids)
            images += record.image_digests
            if record.job == "embed":
                superseded += [(_key(uri), record.generation) for uri in record.supersedes]
            if record.embedding_ids:
                self.encoders.add(record.encoder_sha256)
            self.known.add(dataset.record_uri(self.uri, record.job, record.shard, record.generation))
        if superseded:
            keys, generations = zip(*superseded, strict=True)
            self.superseded.add(np.array(keys, np.uint64), np.array(generations, np.uint32))
        if ids:
            positions = np.arange(first, self.rows, dtype=np.uint32)
            self.ids.add(np.array(ids, np.uint64), positions)
            self.images.add(np.array([int(one, 16) for one in images], np.uint64), positions)


def _key(text: str) -> int:
    return int(dataset.digest(text), 16)
