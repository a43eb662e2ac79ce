"""The stored embeddings that `jobs.segment --embeddings` works from: an image's rows, and what part of it each is."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import lru_cache

from cluster.errors import InvalidInput, NotFound
from cluster.storage import Storage
from jobs.plan import Listing
from serve_app import dataset
from serve_app.contract import ModelInfo
from serve_app.dataset import EMBEDDINGS, ERRORS, Dataset, Record
from serve_app.index import Index

Row = tuple[str, int, str]  # file, row, and what part of the image it is; a row of FAILED is not there
FAILED = -1
FILES_HELD = 8  # whose names are in memory: images come in the order of the files, more or less


class StoredEmbeddings:
    """Rows of one data set by image. In memory are its index, and the parts that failed."""

    def __init__(self, uri: str, storage: Storage, info: ModelInfo, listing: Listing, given: str) -> None:
        """given: the listing's INPUT. Raises InvalidInput: another encoder made the data set, or it holds none.
        NotFound: it has none of the images."""
        light: list[Record] = []  # of many rows the ids are much
        self.index = Index(uri, storage)
        self.index.refresh(lambda record: light.append(replace(record, embedding_ids=(), image_digests=())))
        self.found = Dataset(storage, self.index.uri, tuple(light))
        self.names = lru_cache(FILES_HELD)(self._names)
        for other in self.index.encoders - {info.encoder_sha256}:
            raise InvalidInput(
                f"{self.found.uri} was made by another encoder ({other[:12]}…) than that of {info.name} "
                f"({info.encoder_sha256[:12]}…): embed the images with {info.name} first"
            )
        self.failed = defaultdict[str, list[str]](list)
        errors = self.found.table(ERRORS, ["image_uri", "part"])
        for image_uri, part in zip(*errors.to_pydict().values(), strict=True):
            if part:
                self.failed[image_uri].append(part)
        images = (dataset.printable(entry.uri) for index in range(len(listing)) for entry in listing.shard(index))
        if not any(map(self.of, images)):
            files = self.found.files(EMBEDDINGS)
            example = f"its images are like {self.names(files[0][0])[0][0]}" if files else "it holds no embeddings"
            raise NotFound(f"{self.found.uri} has none of the {listing.images} images of {given}: {example}")

    def of(self, image_uri: str) -> list[Row]:
        """An image's rows, those of its parts that failed too, where another part has one."""
        rows = []
        for place in self.index.by_image(image_uri):
            name, part = self.names(place.uri)[place.row]
            if name == image_uri:
                rows.append((place.uri, place.row, part))
        return rows + [("", FAILED, part) for part in self.failed.get(image_uri, ())] if rows else []

    def _names(self, uri: str) -> list[tuple[str, str]]:
        """A file's rows: (image_uri, part)."""
        names, parts, dtypes = self.found.read(uri, ["image_uri", "part", "dtype"]).to_pydict().values()
        if None in dtypes:
            raise InvalidInput(f"{self.found.uri} holds no embeddings: {dataset.POOLED_ONLY}")
        return list(zip(names, parts, strict=True))
