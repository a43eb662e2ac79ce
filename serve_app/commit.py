"""Writing: a shard's rows, collected in local files, become part of a data set all at once.

Its files are published first, each create-only, then its record; before that no reader sees anything of it. Whoever is
killed in between leaves files without a record, which the next to work on the shard takes over or passes by.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import Conflict
from cluster.scratch import Scratch
from cluster.storage import Storage, join
from serve_app.contract import DTYPE, POOLED
from serve_app.dataset import (
    COMPRESSIONS,
    EMBEDDINGS,
    MASK_ROW_GROUP,
    SCHEMA_VERSION,
    SCHEMAS,
    Record,
    ShardFile,
    digest,
    printable,
    read_record,
    record_uri,
    rows_a_file,
)


class ShardWriter:
    """Collects one shard's rows in local files, a row or an image at a time, then commits them. Use it in a `with`."""

    def __init__(self, storage: Storage, out: str, job: str, shard: int, metadata: dict[str, str]) -> None:
        """`metadata` goes to every footer and must hold `fingerprint` and `encoder_sha256`; `generation`, if not 0;
        `dtype` and `compression` where embeddings are not kept as usual. Without an `out` nothing is published."""
        self.storage, self.out, self.job, self.shard = storage, out, job, shard
        self.generation = int(metadata.get("generation", 0))
        self.metadata = {"schema_version": SCHEMA_VERSION, "job": job, "shard": str(shard), **metadata}
        self.kept, self.compression = metadata.get("dtype", DTYPE), metadata.get("compression", COMPRESSIONS[0])
        self.scratch = Scratch()
        self.folder = self.scratch.path
        self.writers: dict[str, pq.ParquetWriter] = {}
        self.waiting: dict[str, list[pa.Table]] = {}
        self.rows: dict[str, int] = {}
        self.paths: dict[str, Path] = {}
        self.written: list[tuple[str, Path, int]] = []  # data set, file, rows
        self.embedding_ids: list[str] = []
        self.image_digests: list[str] = []
        self.supersedes: list[str] = []
        self.replaces: list[str] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for writer in self.writers.values():
                writer.close()
        finally:
            self.scratch.close()

    def add(self, dataset: str, table: pa.Table) -> None:
        """Append rows. Embeddings go to disk at once, one row a row group; the rest in groups of thousands."""
        if dataset == EMBEDDINGS and self.rows.get(dataset) == rows_a_file(self.kept):
            self._close(dataset)
        if dataset not in self.writers:
            self.writers[dataset] = self._open(dataset)
            self.waiting[dataset], self.rows[dataset] = [], 0
        self.rows[dataset] += len(table)
        if dataset == EMBEDDINGS:
            self.embedding_ids += table["embedding_id"].to_pylist()
            self.image_digests += map(digest, table["image_uri"].to_pylist())
        if dataset == EMBEDDINGS and self.kept != POOLED:
            self.writers[dataset].write_table(table, row_group_size=1)
            return
        self.waiting[dataset].append(table)
        if sum(map(len, self.waiting[dataset])) >= MASK_ROW_GROUP:
            self._flush(dataset)

    def supersede(self, image_uri: str) -> None:
        """What earlier generations have of an image ends with this shard, whether or not it has rows of it."""
        uri = printable(image_uri)
        if self.generation and self.supersedes[-1:] != [uri]:
            self.supersedes.append(uri)

    def _open(self, dataset: str) -> pq.ParquetWriter:
        schema = SCHEMAS[dataset]
        self.paths[dataset] = self.folder / f"{dataset}-{len(self.written)}.parquet"
        plain = ["embedding"] if dataset == EMBEDDINGS else []  # a blob: nothing to gain from a dictionary
        columns = [field.name for field in schema if field.name not in plain]
        return pq.ParquetWriter(
            self.paths[dataset],
            schema.with_metadata({f"cellray.{key}": value for key, value in self.metadata.items()}),
            compression={leaf: self.compression if leaf in plain else "zstd" for leaf in _leaves(schema)},
            use_dictionary=[name for name in columns if dataset != EMBEDDINGS],
            write_statistics=[name for name in columns if name in ("image_uri", "image_id", "area", "model")],
        )

    def _close(self, dataset: str) -> None:
        self._flush(dataset)
        self.writers.pop(dataset).close()
        self.written.append((dataset, self.paths.pop(dataset), self.rows.pop(dataset)))

    def _flush(self, dataset: str) -> None:
        if self.waiting[dataset]:
            table = pa.concat_tables(self.waiting[dataset])
            self.writers[dataset].write_table(table, row_group_size=MASK_ROW_GROUP)
            self.waiting[dataset] = []

    def commit(self) -> Record:
        """Publish the files, then the record. After this the shard exists; before it, it does not.

        Raises:
            Conflict: a file of another plan is in the way.
        """
        for dataset in list(self.writers):
            self._close(dataset)
        files: list[ShardFile] = []
        for dataset, local, rows in self.written:
            number = sum(file.dataset == dataset for file in files)
            name = f"{self.job}-{self.generation:03d}-{self.shard:06d}" + (f"-{number:02d}" if number else "")
            files.append(self._publish(dataset, f"{dataset}/{name}.parquet", local, rows))
        record = Record(
            job=self.job,
            generation=self.generation,
            shard=self.shard,
            fingerprint=self.metadata["fingerprint"],
            encoder_sha256=self.metadata["encoder_sha256"],
            files=tuple(files),
            embedding_ids=tuple(self.embedding_ids),
            image_digests=tuple(self.image_digests),
            supersedes=tuple(self.supersedes),
            replaces=tuple(self.replaces),
        )
        if not self.out:
            return record
        uri = record_uri(self.out, self.job, self.shard, self.generation)
        try:
            self.storage.publish(uri, record.to_json())
        except Conflict:
            theirs = read_record(self.storage, uri)  # another worker of the same plan was faster: its shard stands
            if theirs.fingerprint != record.fingerprint:
                raise
            return theirs
        return record

    def _publish(self, dataset: str, path: str, local: Path, rows: int) -> ShardFile:
        """Of a killed predecessor's file at `path`, of the same plan, the same rows are taken over (bits may differ);
        beside other rows, as where an image failed that now did not, ours stand under a name of their own."""
        uri = join(self.out, path)
        try:
            if self.out:
                self.storage.publish(uri, local, ours=True)
        except Conflict:
            with self.storage.open(uri) as theirs, local.open("rb") as ours:
                plan, own = _identity(ours)
                try:
                    there, kept = _identity(theirs)
                except (pa.ArrowException, OSError):
                    there, kept = None, ""
            if there != plan:
                raise
            if kept != own:
                return self._publish(dataset, f"{path.removesuffix('.parquet')}-{own}.parquet", local, rows)
            return ShardFile(dataset, path, rows, self.storage.size(uri), self.storage.sha256(uri))
        with local.open("rb") as file:
            return ShardFile(dataset, path, rows, local.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _leaves(schema: pa.Schema) -> list[str]:
    """Parquet's own names of the columns, e.g. `segmentation.size.list.element`."""
    file = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), file)
    leaves = pq.ParquetFile(pa.BufferReader(file.getvalue())).schema
    return [leaves.column(index).path for index in range(len(leaves))]


def _identity(file: IO[bytes]) -> tuple[bytes | None, str]:
    """What two writings of one shard share: the plan's fingerprint, and a hash of which rows of which images."""
    parquet = pq.ParquetFile(file)
    metadata = parquet.schema_arrow.metadata or {}
    names = [
        name
        for name in ("embedding_id", "image_uri", "part", "mask_index", "stage")
        if name in parquet.schema_arrow.names
    ]
    rows = json.dumps(parquet.read(columns=names).to_pydict()).encode()
    return metadata.get(b"cellray.fingerprint"), hashlib.sha256(rows).hexdigest()[:12]
