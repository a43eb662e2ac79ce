"""Embeddings by id or by image: memory first, then the data sets that the settings name. A cache here only ever saves
a read."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from cluster import telemetry
from cluster.errors import CellrayError, InvalidInput, NotFound
from cluster.settings import Settings
from cluster.storage import Storage
from serve_app import dataset
from serve_app.contract import Embedding
from serve_app.index import Index, Place

log = logging.getLogger("ray.serve")

REFRESH_S = 10.0  # how often it may look for new shards,
REFRESH_SHARE = 0.1  # and which share of the time it may spend on that
FILES_A_PAGE = 16  # of a listing
NAMES_KEPT = 100_000  # images whose embedding's id is remembered


Facts = dict[str, Any]  # dataset.FACTS of a row


class EmbeddingStore:
    """Thread-safe. Keeps at most `limits.cache_bytes` of embeddings, and an index of each data set."""

    def __init__(self, settings: Settings) -> None:
        self.storage = Storage(settings.storage)
        self.indexes = [Index(uri, self.storage) for uri in settings.datasets]
        self.capacity = settings.limits.cache_bytes
        self.memory: OrderedDict[str, Embedding] = OrderedDict()
        self.names: OrderedDict[tuple[str, ...], str] = OrderedDict()  # image, part, encoders → embedding
        self.held = 0
        self.refreshes, self.next_refresh = 0, float("-inf")  # those that found something new
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

    def recall(self, *embedding_ids: str) -> Embedding | None:
        """One of them, from memory only."""
        with self.lock:
            found = next((one for one in embedding_ids if one in self.memory), "")
            if found:
                self.memory.move_to_end(found)
            known = self.memory.get(found)
        if known:
            telemetry.count(telemetry.CACHE, result="hit")
        return known

    def get(self, *embedding_ids: str) -> Embedding:
        """One of them: from memory, else one row read from a data set.

        Raises:
            NotFound: no committed shard has any.
        """
        known = self.recall(*embedding_ids)
        if known:
            return known
        for _ in self._looks():
            for index in self.indexes:
                for embedding_id in embedding_ids:
                    for place in index.by_id(embedding_id):
                        found = self._read(place)
                        if found and found.embedding_id == embedding_id:
                            return found
        raise NotFound(
            f"no embedding {embedding_ids[0][:16]}… in memory or in the data sets ({self._places}): "
            "send the image instead"
        )

    def of_image(self, image_uri: str, part: str, encoders: Sequence[str]) -> Embedding:
        """Of an image by its name in a data set, `part` as there, by one of these encoders (sha256): one row read, or
        none.

        Raises:
            NotFound: no committed shard has it; says which parts there are.
        """
        self._refresh_behind()
        name, parts = (image_uri, part, *encoders), set[str]()
        with self.lock:
            remembered = self.names.get(name)
        if remembered:
            with suppress(NotFound):
                return self.get(remembered)
        for _ in self._looks():
            for place, facts in self._rows(image_uri, encoders):
                parts.add(facts["part"])
                if facts["part"] == part and (found := self.recall(facts["embedding_id"]) or self._read(place)):
                    self._remember(name, found)
                    return found
        if parts:
            shown = ", ".join(one or "the whole" for one in sorted(parts)[:3]) + (", …" if len(parts) > 3 else "")
            raise NotFound(f"{image_uri} has no part {part!r} in the data sets; what is there is {shown}")
        raise NotFound(
            f"no embedding of {image_uri} by an encoder that is served in the data sets ({self._places}): "
            "send the image instead"
        )

    def facts(self, *embedding_ids: str) -> Facts:
        """What is known of the first of these that there is, without reading the embedding. Raises NotFound."""
        for _ in self._looks():
            for index in self.indexes:
                for embedding_id in embedding_ids:
                    for place in index.by_id(embedding_id):
                        with self._moving():
                            (facts,) = dataset.facts(self.storage, place.uri, [place.row])
                            if facts["embedding_id"] == embedding_id:
                                return facts
        raise NotFound(f"no such image in the data sets ({self._places})")

    def images(self, encoders: Sequence[str], after: str, most: int) -> tuple[list[Facts], str]:
        """Images of the data sets by these encoders, `most` or, where other encoders' lie between, fewer; and the
        cursor after which the next ones come: empty at the end.

        Raises:
            InvalidInput: `after` is no cursor.
        """
        self._refresh_behind() if after else self._refresh()
        which, path, row = _cursor(after)
        found: list[Facts] = []
        for _ in range(FILES_A_PAGE):
            if which >= len(self.indexes):
                return found, ""
            index = self.indexes[which]
            places = index.after(path, row, most - len(found))
            if not places:
                which, path, row = which + 1, "", -1
                continue
            path, row = places[-1].uri.removeprefix(index.uri).lstrip("/"), places[-1].row
            with self._moving():
                read = dataset.facts(self.storage, places[0].uri, [place.row for place in places])
                generation = places[0].generation
                found += [
                    one
                    for one in read
                    if one["encoder_sha256"] in encoders and index.stands(one["image_uri"], generation)
                ]
            if len(found) == most:
                break
        return found, f"{which}:{row}:{path}"

    @property
    def _places(self) -> str:
        return ", ".join(index.uri for index in self.indexes) or "none are configured"

    def _rows(self, image_uri: str, encoders: Sequence[str]) -> Iterator[tuple[Place, Facts]]:
        """Where an image's embeddings are, and what they are of."""
        for index in self.indexes:
            for place in index.by_image(image_uri):
                with self._moving():
                    (facts,) = dataset.facts(self.storage, place.uri, [place.row])
                    if facts["image_uri"] == image_uri and facts["encoder_sha256"] in encoders:
                        yield place, facts

    def _read(self, place: Place) -> Embedding | None:
        with self._moving(), telemetry.timing(telemetry.STORAGE_READ_SECONDS):
            telemetry.count(telemetry.CACHE, result="miss")
            found = next(dataset.open_embeddings(self.storage, place.uri, [place.row]))
            self.put(found)
            return found
        return None

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """A file that is gone, because `cellray compact --delete-old` has moved its rows, is no error: it is time to
        refresh."""
        try:
            yield
        except NotFound:
            self.next_refresh = float("-inf")

    def _remember(self, name: tuple[str, ...], found: Embedding) -> None:
        with self.lock:
            self.names[name] = found.embedding_id
            if len(self.names) > NAMES_KEPT:
                self.names.popitem(last=False)

    def _looks(self) -> Iterator[None]:
        """Once, and once more if there is something new since."""
        before = self.refreshes
        yield
        self._refresh()
        if self.refreshes > before:
            yield

    def _refresh(self) -> None:
        """Read what was committed since, if it is time."""
        with self.refreshing:
            if time.monotonic() < self.next_refresh:
                return
            start, new = time.monotonic(), 0
            for index in self.indexes:
                try:
                    new += index.refresh()
                except CellrayError as error:
                    log.warning(f"data set {index.uri} could not be read: {error}")
            if new:
                self.refreshes += 1
                with self.lock:
                    self.names.clear()
            now = time.monotonic()
            self.next_refresh = now + max(REFRESH_S, (now - start) / REFRESH_SHARE)

    def _refresh_behind(self) -> None:
        """What is asked for by name may have a newer embedding; nobody waits for that."""
        if time.monotonic() >= self.next_refresh and not self.refreshing.locked():
            threading.Thread(target=self._refresh, daemon=True).start()


def _cursor(text: str) -> tuple[int, str, int]:
    """(index, file, row) after which to go on."""
    try:
        which, row, path = text.split(":", 2) if text else ("0", "-1", "")
        return max(0, int(which)), path, max(-1, int(row))
    except ValueError as error:
        raise InvalidInput(f"{text!r} is no cursor: expected the `next` of an earlier answer") from error
