"""A data set's masks image by image, some thousands of rows in memory at a time, and the holes that failed tiles left.

Rows are read by row groups, and stay Arrow tables: a whole slide has a million of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import InvalidInput, NotFound
from jobs.views import View
from serve_app.dataset import EMBEDDINGS, ERRORS, MASKS, Dataset, Record
from serve_app.model.preprocess import Size
from serve_app.model.rle import Texts
from serve_app.model.tiles import Box

COLUMNS = ["mask_index", "segmentation", "bbox", "area", "predicted_iou", "stability_score"]


@dataclass(frozen=True)
class Instances:
    """An image, or a plane of one, of an export. `batches()`: its masks, COLUMNS, a table after the other. `holes`:
    the tiles that failed, of which nothing is known."""

    uri: str
    size: Size
    holes: list[Box] = field(default_factory=list)
    batches: Callable[[], Iterator[pa.Table]] = field(default=lambda: iter(()), repr=False)

    def read(self) -> tuple[Texts, np.ndarray, np.ndarray]:
        """(RLE strings, areas [N], indices [N]) of all of its masks: some 100 bytes each."""
        data, lengths, areas, indices = [], [np.zeros(1, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for batch in self.batches():
            counts = pc.struct_field(batch["segmentation"], "counts").cast(pa.large_string()).combine_chunks()
            starts = np.frombuffer(counts.buffers()[1], np.int64)[counts.offset : counts.offset + len(counts) + 1]
            data.append(np.frombuffer(counts.buffers()[2] or b"", np.uint8)[starts[0] : starts[-1]])
            lengths.append(np.diff(starts))
            areas.append(batch["area"].to_numpy())
            indices.append(batch["mask_index"].to_numpy())
        joined = np.concatenate(data) if data else np.zeros(0, np.uint8)
        return Texts(joined, np.cumsum(np.concatenate(lengths))), np.concatenate(areas), np.concatenate(indices)


def images(found: Dataset) -> Iterator[Instances]:
    """Those with masks, then those with an embedding alone. An image's masks are in one file."""
    seen: set[str] = set()
    failed = holes(found)
    for file, record in found.files(MASKS):
        with found.storage.open(file) as opened:
            reader = _Reader(file, opened)
            by_image = _by_image(found, record, reader.names())
            for uri in [uri for uri in by_image if uri not in seen]:
                height, width = reader.first(by_image[uri])["segmentation"]["size"]
                batches = _batches(reader, by_image[uri])
                yield Instances(uri, (int(height), int(width)), failed.get(uri, []), batches)
            seen |= by_image.keys()
    columns = ["image_uri", "part", "x", "y", "height", "width"]
    for file, record in found.files(EMBEDDINGS):
        table = found.read(file, columns)
        by_image = _by_image(found, record, table)
        ends = [
            np.add(table[start].to_numpy(), table[side].to_numpy()) for start, side in (("y", "height"), ("x", "width"))
        ]
        for uri in [uri for uri in by_image if uri not in seen]:
            rows = by_image[uri]
            yield Instances(uri, (int(ends[0][rows].max()), int(ends[1][rows].max())), failed.get(uri, []))
        seen |= by_image.keys()


def uris(found: Dataset) -> list[str]:
    """The images of `images`. Raises NotFound: none has masks."""
    segmented = _uris(found, MASKS)
    if not segmented:
        raise NotFound(f"{found.uri} holds no masks: run jobs.segment first")
    return list(dict.fromkeys(segmented + _uris(found, EMBEDDINGS)))


def holes(found: Dataset) -> dict[str, list[Box]]:
    """Image → the tiles of it that failed, by rows."""
    made: dict[str, set[Box]] = {}
    for file, record in found.files(ERRORS):
        table = found.read(file, ["image_uri", "part"])
        table = table.filter(pc.match_substring(table["part"], "xywh="))
        uris = table["image_uri"].to_pylist()
        for row, stands in zip(table.to_pylist(), found.stands(record, uris), strict=True):
            if stands:
                x, y, width, height = View.parse(row["part"]).numbers("xywh")
                made.setdefault(_name(row), set()).add((x, y, width, height))
    return {uri: sorted(boxes, key=lambda box: box[1::-1]) for uri, boxes in made.items()}


def _uris(found: Dataset, name: str) -> list[str]:
    made: dict[str, None] = {}
    for file, record in found.files(name):
        made |= dict.fromkeys(_by_image(found, record, found.read(file, ["image_uri", "part"])))
    return list(made)


def _name(row: dict[str, Any]) -> str:
    """An image's URI; of a plane, or what else is a part of it, after that which part."""
    plane = str(replace(View.parse(row["part"]), xywh=""))
    return f"{row['image_uri']}#{plane}" if plane else str(row["image_uri"])


def _by_image(found: Dataset, record: Record, table: pa.Table) -> dict[str, np.ndarray]:
    """Image → its rows in a file's table, in order, where they stand."""
    codes = np.zeros(len(table), np.int64)
    for column in ("image_uri", "part"):
        coded = table[column].combine_chunks().dictionary_encode()
        codes = codes * (len(coded.dictionary) + 1) + coded.indices.to_numpy(zero_copy_only=False)
    _, first, owner = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)  # by where they appear
    rows = table.select(["image_uri", "part"]).take(first[order]).to_pylist()
    split = np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner))[:-1]) if len(table) else []
    made: dict[str, list[np.ndarray]] = {}
    for place, row, stands in zip(order, rows, found.stands(record, [row["image_uri"] for row in rows]), strict=True):
        if stands:
            made.setdefault(_name(row), []).append(split[place])
    return {uri: np.sort(np.concatenate(parts)) for uri, parts in made.items()}


class _Reader:
    """A file of masks, of which the last row group is kept."""

    def __init__(self, uri: str, file: Any) -> None:
        self.uri, self.kept = uri, (-1, pa.table({}))
        self.parquet: pq.ParquetFile = self._mapped(lambda: pq.ParquetFile(file))
        metadata = self.parquet.metadata
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def names(self) -> pa.Table:
        return self._mapped(lambda: self.parquet.read(columns=["image_uri", "part"]))

    def group(self, group: int) -> pa.Table:
        if self.kept[0] != group:
            self.kept = group, self._mapped(lambda: self.parquet.read_row_group(group, columns=COLUMNS))
        return self.kept[1]

    def first(self, rows: np.ndarray) -> dict[str, Any]:
        return next(_batches(self, rows[:1])()).to_pylist()[0]

    def _mapped(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (pa.ArrowException, OSError) as error:
            raise InvalidInput(f"{self.uri} is damaged: {error}") from error


def _batches(reader: _Reader, rows: np.ndarray) -> Callable[[], Iterator[pa.Table]]:
    def batches() -> Iterator[pa.Table]:
        groups = np.searchsorted(reader.starts, rows, side="right") - 1
        for own in np.split(rows, np.flatnonzero(np.diff(groups)) + 1):
            group = int(np.searchsorted(reader.starts, own[0], side="right")) - 1
            yield reader.group(group).take(own - reader.starts[group])

    return batches
