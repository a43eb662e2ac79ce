"""Embeddings by id: memory first, then the data sets that the settings name. A cache here only ever saves a read."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict

from cluster.errors import CellrayError, NotFound
from cluster.settings import Settings
from cluster.storage import Storage, join
from serve_app import dataset
from serve_app.contract import Embedding

log = logging.getLogger("ray.serve")

REFRESH_S = 10.0  # how often an id that is not known may look for new shards


class EmbeddingStore:
    """Thread-safe. Keeps at most `limits.cache_bytes` of embeddings, and the index id → (file, row)."""

    def __init__(self, settings: Settings) -> None:
        self.storage = Storage(settings.storage)
        self.datasets = settings.datasets
        self.capacity = settings.limits.cache_bytes
        self.memory: OrderedDict[str, Embedding] = OrderedDict()
        self.held = 0
        self.index: dict[str, tuple[str, int]] = {}
        self.refreshed = float("-inf")
        self.lock = threading.Lock()
        self.refreshing = threading.Lock()

    def put(self, embedding: Embedding) -> None:
        with self.lock:
            if embedding.embedding_id in self.memory or embedding.array.nbytes > self.capacity:
                return
            self.memory[embedding.embedding_id] = embedding
            self.held += embedding.array.nbytes
            while self.held > self.capacity:
                self.held -= self.memory.popitem(last=False)[1].array.nbytes

    def recall(self, embedding_id: str) -> Embedding | None:
        """From memory only."""
        with self.lock:
            if embedding_id in self.memory:
                self.memory.move_to_end(embedding_id)
            return self.memory.get(embedding_id)

    def get(self, embedding_id: str) -> Embedding:
        """From memory, else one row read from a data set.

        Raises:
            NotFound: no committed shard has it.
        """
        found = self.recall(embedding_id)
        if found:
            return found
        if embedding_id not in self.index:
            self._refresh()
        if embedding_id not in self.index:
            places = ", ".join(self.datasets) or "none are configured"
            raise NotFound(
                f"no embedding {embedding_id[:16]}… in memory or in the data sets ({places}): send the image instead"
            )
        uri, row = self.index[embedding_id]
        try:
            embedding = next(dataset.open_embeddings(self.storage, uri, [row]))
        except NotFound:  # `cellray compact --delete-old` has moved its row to another file
            self._refresh(at_once=True)
            if self.index.get(embedding_id) in (None, (uri, row)):
                raise
            uri, row = self.index[embedding_id]
            embedding = next(dataset.open_embeddings(self.storage, uri, [row]))
        self.put(embedding)
        return embedding

    def _refresh(self, at_once: bool = False) -> None:
        with self.refreshing:
            if time.monotonic() - self.refreshed < REFRESH_S and not at_once:
                return
            for uri in self.datasets:
                try:
                    found = dataset.open(uri, self.storage)
                except CellrayError as error:
                    log.warning(f"data set {uri} could not be read: {error}")
                    continue
                for record, file in found.current():
                    places = enumerate(record.ids(file))
                    self.index |= {identity: (join(found.uri, file.path), row) for row, identity in places}
            self.refreshed = time.monotonic()
