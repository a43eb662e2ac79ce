"""Formats at rest: Arrow schemas, shards published whole, and readers that trust records, not files.

    OUT/embeddings/*.parquet  OUT/masks/*.parquet  OUT/errors/*.parquet  OUT/_records/*.json  OUT/_plan-JOB-000.json

A shard's files are published first, its record last; what has no record does not exist for a reader. The next
generation of a job (_plan-JOB-001.json) takes the place of what its images had before: `supersedes` names them. One by
`cellray compact` has the rows of whole files again: `replaces` names those, which no reader looks at from then on. In
one DuckDB statement, the committed rows of a data set are

    WITH records AS (FROM read_json('OUT/_records/*.json', columns = {job: 'VARCHAR', generation: 'INT',
                     files: 'STRUCT(path VARCHAR)[]', supersedes: 'VARCHAR[]', replaces: 'VARCHAR[]'})),
    files AS (SELECT job, generation, unnest(files).path AS path FROM records),
    newer AS (SELECT job, generation, unnest(supersedes) AS image FROM records),
    stand AS (FROM files ANTI JOIN (SELECT unnest(replaces) AS path FROM records) USING (path))
    SELECT e.* EXCLUDE (filename)
    FROM read_parquet('OUT/embeddings/*.parquet', filename = true) e
    JOIN stand f ON parse_path(filename)[-2:] = parse_path(f.path)
    ANTI JOIN newer n ON n.image = e.image_uri AND n.job = f.job AND n.generation > f.generation
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import InvalidEmbedding, InvalidInput, NotFound
from cluster.settings import MIB
from cluster.storage import Storage, absolute, join
from serve_app.contract import DTYPES, POOLED, Embedding, Made
from serve_app.model.masks import MaskSet
from serve_app.model.preprocess import PREPROCESS

SCHEMA_VERSION = "3"
EMBEDDINGS, MASKS, ERRORS = "embeddings", "masks", "errors"
MAX_ROWS_A_FILE = 512  # 2 MiB rows: past 1,024 of them the int32 offsets of binary columns overflow in many readers
MASK_ROW_GROUP = 4096
COMPRESSIONS = ("none", "zstd", "lz4")  # of the column `embedding`
JOBS = ("embed", "segment")
MAX_RECORD_BYTES = 64 * MIB
RECORD_READERS, RECORDS_AT_ONCE = 16, 256
OPEN_ATTEMPTS = 3
FACTS = ("embedding_id", "image_id", "image_uri", "part", "width", "height", "model", "encoder_sha256")
POOLED_ONLY = (
    "its data set was made with --pooled-only, for search; masks and training need jobs.embed without it, into another "
    "output"
)

SCHEMAS = {
    EMBEDDINGS: pa.schema(
        [
            ("embedding_id", pa.string()),
            ("image_id", pa.string()),
            ("image_uri", pa.string()),
            ("key", pa.string()),
            ("part", pa.string()),
            ("x", pa.int32()),
            ("y", pa.int32()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("input_width", pa.int32()),
            ("input_height", pa.int32()),
            ("model", pa.string()),
            ("encoder_sha256", pa.string()),
            ("preprocess", pa.string()),
            ("dtype", pa.string()),
            ("shape", pa.list_(pa.int32())),
            ("embedding", pa.binary()),
            ("pooled", pa.list_(pa.float32())),
        ]
    ),
    MASKS: pa.schema(
        [
            ("image_id", pa.string()),
            ("embedding_id", pa.string()),
            ("image_uri", pa.string()),
            ("part", pa.string()),
            ("mask_index", pa.int32()),
            ("segmentation", pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])),
            ("bbox", pa.list_(pa.float32())),
            ("area", pa.int64()),
            ("predicted_iou", pa.float32()),
            ("stability_score", pa.float32()),
            ("prompt_type", pa.string()),
            ("prompt", pa.string()),
            ("box_score", pa.float32()),
            ("object_embedding", pa.list_(pa.float32())),
            ("model", pa.string()),
            ("decoder_sha256", pa.string()),
        ]
    ),
    ERRORS: pa.schema(
        [(name, pa.string()) for name in ("image_uri", "part", "stage", "error_type", "message", "attempt")]
    ),
}


def rows_a_file(kept: str) -> int:
    """At most, where `kept` is one of DTYPES or POOLED: less than 2 GiB of embeddings in any."""
    if kept == POOLED:
        return MAX_ROWS_A_FILE << 7
    return MAX_ROWS_A_FILE // (np.dtype(kept).itemsize // 2)


def embedding_row(
    embedding: Embedding,
    image_uri: str,
    pooled: np.ndarray,
    key: str | None = None,
    part: str = "",
    corner: tuple[int, int] = (0, 0),
    pooled_only: bool = False,
) -> pa.Table:
    """One row of `embeddings`; `embedding` is C-order little-endian, of the array's dtype. With `pooled_only` it is
    null, as are `dtype` and `shape`. `part` says what of the file it is, empty
    for the whole, and `corner` (x, y) where a tile begins."""
    (height, width), array = embedding.original, embedding.array
    row = {
        "embedding_id": embedding.embedding_id,
        "image_id": embedding.image_id,
        "image_uri": printable(image_uri),
        "key": None if key is None else printable(key),
        "part": part,
        "x": corner[0],
        "y": corner[1],
        "width": width,
        "height": height,
        "input_width": embedding.input[1],
        "input_height": embedding.input[0],
        "model": embedding.model,
        "encoder_sha256": embedding.encoder_sha256,
        "preprocess": PREPROCESS,
        "dtype": None if pooled_only else array.dtype.name,
        "shape": None if pooled_only else list(array.shape),
        "embedding": None if pooled_only else array.astype(array.dtype.newbyteorder("<")).tobytes(),
        "pooled": pooled,
    }
    return pa.Table.from_pylist([row], SCHEMAS[EMBEDDINGS])


def embedding_of(row: dict[str, Any]) -> Embedding:
    """The inverse of `embedding_row`, from one row as a dict. The array is read-only.

    Raises:
        InvalidEmbedding: of a dtype that is none of ours; of none, as with --pooled-only.
    """
    if row["dtype"] not in DTYPES:
        raise InvalidEmbedding(f"the embedding of {row['image_uri']} is {row['dtype']}, not {' or '.join(DTYPES)}")
    array = np.frombuffer(row["embedding"], np.dtype(row["dtype"]).newbyteorder("<")).reshape(row["shape"])
    return Embedding(
        embedding_id=row["embedding_id"],
        image_id=row["image_id"],
        model=row["model"],
        encoder_sha256=row["encoder_sha256"],
        original=(row["height"], row["width"]),
        input=(row["input_height"], row["input_width"]),
        array=array,
    )


def mask_rows(
    found: MaskSet,
    embeddings: Sequence[Embedding | Made],
    image_uri: str,
    part: str,
    decoder_sha256: str,
    prompt_type: str,
    prompts: Sequence[str],
    box_scores: Sequence[float] | None = None,
    first: int = 0,
) -> pa.Table:
    """Rows of `masks` for one image, numbered from `first` on; `embeddings[i]` is what mask i was made from,
    `prompts[i]` its prompt as JSON, `box_scores[i]` what a detector gave its box."""
    size = list(found.size)
    rows = [
        {
            "image_id": embeddings[index].image_id,
            "embedding_id": embeddings[index].embedding_id,
            "image_uri": printable(image_uri),
            "part": part,
            "mask_index": first + index,
            "segmentation": {"size": size, "counts": found.counts[index]},
            "bbox": found.boxes[index],
            "area": int(found.areas[index]),
            "predicted_iou": found.predicted_iou[index],
            "stability_score": None if np.isnan(found.stability[index]) else found.stability[index],
            "prompt_type": prompt_type,
            "prompt": prompts[index],
            "box_score": None if box_scores is None else box_scores[index],
            "object_embedding": found.object_embeddings[index],
            "model": embeddings[index].model,
            "decoder_sha256": decoder_sha256,
        }
        for index in range(len(found))
    ]
    return pa.Table.from_pylist(rows, SCHEMAS[MASKS])


def error_row(image_uri: str, stage: str, error: Exception, part: str = "", attempt: int = 1) -> pa.Table:
    row = {
        "image_uri": printable(image_uri),
        "part": part,
        "stage": stage,
        "error_type": type(error).__name__,
        "message": str(error),
        "attempt": str(attempt),
    }
    return pa.Table.from_pylist([row], SCHEMAS[ERRORS])


def printable(name: str) -> str:
    """An image's URI or key as rows have it: a file's name may be no text."""
    return name.encode(errors="backslashreplace").decode()


def digest(text: str) -> str:
    """An id's or a URI's 64 bits, blake2b as hex: what lookups compare first."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class ShardFile:
    """A published file: its path within OUT, rows, bytes and sha256."""

    dataset: str
    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """What makes a shard exist. `embedding_ids` are those of its embeddings files, in row order, `image_digests` the
    `digest` of their images' URIs; `supersedes` are the URIs of the images whose rows of earlier generations it takes
    the place of; `replaces` are the paths of the files of earlier generations whose rows, where they stood, are in this
    shard's."""

    job: str
    generation: int
    shard: int
    fingerprint: str
    encoder_sha256: str
    files: tuple[ShardFile, ...]
    embedding_ids: tuple[str, ...] = ()
    image_digests: tuple[str, ...] = ()
    supersedes: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()

    def rows(self, dataset: str) -> int:
        return sum(file.rows for file in self.files if file.dataset == dataset)

    def ids(self, file: ShardFile) -> tuple[str, ...]:
        """The embedding ids of one of its files, in row order."""
        return self.embedding_ids[self._rows_of(file)]

    def digests(self, file: ShardFile) -> tuple[str, ...]:
        """The image digests of one of its files, in row order."""
        return self.image_digests[self._rows_of(file)]

    def _rows_of(self, file: ShardFile) -> slice:
        before = self.files[: self.files.index(file)]
        first = sum(one.rows for one in before if one.dataset == EMBEDDINGS)
        return slice(first, first + file.rows if file.dataset == EMBEDDINGS else first)

    def to_json(self) -> bytes:
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}).encode()

    @classmethod
    def from_json(cls, text: bytes, uri: str) -> Record:
        try:
            values = json.loads(text)
            if (version := values.pop("schema_version")) != SCHEMA_VERSION:
                raise ValueError(f"its version is {version}, not {SCHEMA_VERSION}")
            values["files"] = tuple(ShardFile(**file) for file in values["files"])
            for name in ("embedding_ids", "image_digests", "supersedes", "replaces"):
                values[name] = tuple(values[name])
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidInput(f"{uri} is no commit record of this version: {error}") from error


def record_uri(out: str, job: str, shard: int, generation: int = 0) -> str:
    return join(out, "_records", f"{job}-{generation:03d}-{shard:06d}.json")


def read_record(storage: Storage, uri: str) -> Record:
    return Record.from_json(storage.read(uri, MAX_RECORD_BYTES), uri)


@dataclass(frozen=True)
class Dataset:
    """The committed shards of one OUT."""

    storage: Storage
    uri: str
    records: tuple[Record, ...]

    @cached_property
    def newest(self) -> dict[tuple[str, str], int]:
        """(job, image URI) → the last generation that has something of an image, where that is not the first."""
        records = sorted(self.records, key=lambda record: record.generation)
        return {(record.job, uri): record.generation for record in records for uri in record.supersedes}

    def stands(self, record: Record, images: Sequence[str]) -> list[bool]:
        """Of images in one of a record's files, whether their rows there are the last word on them."""
        return [self.newest.get((record.job, uri), 0) <= record.generation for uri in images]

    @cached_property
    def replaced(self) -> frozenset[str]:
        """Paths of committed files whose rows are in files of a later generation."""
        return frozenset(path for record in self.records for path in record.replaces)

    def current(self) -> Iterator[tuple[Record, ShardFile]]:
        """The committed files that none has replaced, each with its record."""
        for record in self.records:
            for file in record.files:
                if file.path not in self.replaced:
                    yield record, file

    def files(self, name: str) -> list[tuple[str, Record]]:
        """(URI, record) of each current file of `embeddings`, `masks` or `errors`."""
        return [(join(self.uri, file.path), record) for record, file in self.current() if file.dataset == name]

    def rows(self, name: str) -> int:
        """In current files; some may be superseded."""
        return sum(file.rows for _, file in self.current() if file.dataset == name)

    def bytes(self) -> int:
        return sum(file.bytes for _, file in self.current())

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """All rows that stand, of these columns, in memory: leave `embedding` out where there are many."""
        chosen = columns or SCHEMAS[name].names
        tables = []
        for uri, record in self.files(name):
            found = self.read(uri, list(dict.fromkeys([*chosen, "image_uri"])))
            if self.newest:
                found = found.filter(pa.array(self.stands(record, found["image_uri"].to_pylist()), pa.bool_()))
            tables.append(found.select(chosen))
        if tables:
            return pa.concat_tables(tables)
        return pa.schema([SCHEMAS[name].field(column) for column in chosen]).empty_table()

    def read(self, uri: str, columns: list[str]) -> pa.Table:
        """These columns of one committed file."""
        with self.storage.open(uri) as file:
            try:
                return pq.ParquetFile(file).read(columns=columns).replace_schema_metadata(None)
            except (pa.ArrowException, OSError) as error:
                raise InvalidInput(f"{uri} is damaged: {error}") from error


def open_embeddings(storage: Storage, uri: str, rows: list[int]) -> Iterator[Embedding]:
    """Rows of one embeddings file, each read alone: about 2 MB. Raises InvalidEmbedding."""
    with _one_a_group(storage, uri) as parquet:
        for row in rows:
            yield embedding_of(parquet.read_row_group(row).to_pylist()[0])


def facts(storage: Storage, uri: str, rows: list[int]) -> list[dict[str, Any]]:
    """The columns FACTS, all but the embedding itself, of rows of an embeddings file. Raises InvalidEmbedding."""
    with _one_a_group(storage, uri) as parquet:
        return parquet.read_row_groups(rows, columns=list(FACTS)).to_pylist()


@contextmanager
def _one_a_group(storage: Storage, uri: str) -> Iterator[pq.ParquetFile]:
    with storage.open(uri) as file:
        parquet = pq.ParquetFile(file)
        if (parquet.schema_arrow.metadata or {}).get(b"cellray.dtype") == POOLED.encode():
            raise InvalidEmbedding(f"{uri} holds no embeddings: {POOLED_ONLY}")
        yield parquet


def open(uri: str, storage: Storage | None = None) -> Dataset:
    """The data set at `uri` as its records stand now; empty if nothing was committed yet.

    Raises:
        NotFound: there is no plan at `uri`, so it is no data set.
    """
    storage, uri = storage or Storage(), absolute(uri)
    for left in reversed(range(OPEN_ATTEMPTS)):
        try:
            return Dataset(storage, uri, tuple(records(uri, storage)))
        except NotFound:  # `cellray compact --delete-old` may just have deleted one that was listed
            if not left:
                raise
    raise AssertionError("unreachable")


def records(uri: str, storage: Storage, but: Container[str] = ()) -> Iterator[Record]:
    """The records of `open`, a few at a time, without those whose URIs are in `but`."""
    try:
        listed = [file.uri for file in storage.list(join(uri, "_records")) if file.uri not in but]
    except NotFound:
        if not any(storage.exists(plan_uri(uri, job)) for job in JOBS):
            raise NotFound(f"{uri} is no data set: it holds no {plan_uri('', 'embed').strip('/')}") from None
        listed = []
    with ThreadPoolExecutor(RECORD_READERS) as pool:
        for start in range(0, len(listed), RECORDS_AT_ONCE):
            yield from pool.map(lambda one: read_record(storage, one), listed[start : start + RECORDS_AT_ONCE])


def stored(storage: Storage, uri: str, name: str) -> set[str]:
    """Paths of the files of `embeddings`, `masks` or `errors` that are there, committed or not."""
    try:
        return {file.uri.removeprefix(uri + "/") for file in storage.list(join(uri, name))}
    except NotFound:
        return set()


def plan_uri(out: str, job: str, generation: int = 0) -> str:
    return join(out, f"_plan-{job}-{generation:03d}.json")
