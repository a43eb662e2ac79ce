"""`cellray verify OUT`: every committed file against its record, and the whole against its plan."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import CellrayError, Conflict, NotFound
from cluster.storage import join
from jobs import plan
from serve_app import dataset
from serve_app.contract import DTYPE, DTYPES, POOLED
from serve_app.dataset import EMBEDDINGS, ERRORS, MASKS, Dataset, Record, ShardFile

FILES_AT_ONCE = 4
BATCH_ROWS = 4096
NOTHING = np.zeros(0, np.uint64)
KEYS = {EMBEDDINGS: ("image_uri", "part"), MASKS: ("image_uri", "part", "mask_index"), ERRORS: ("image_uri", "part")}


@dataclass(frozen=True)
class Checked:
    """A file: what is wrong with it, and for each of its rows that stand a number, by what may be there only once."""

    path: str
    faults: list[str]
    rows: np.ndarray


def verify(found: Dataset, done: Callable[[int], Any]) -> Iterator[str]:
    """What is wrong with a data set, in words; nothing where it is whole. `done(bytes)` after each file.

    Files that none has replaced: sha256, bytes, rows, the schema, the plan's fingerprint in the footer; embeddings of
    the stated shape and finite. In all: no image twice, no shard missing, none of another plan.
    """
    storage, out = found.storage, found.uri
    for job in dataset.JOBS:
        records = [record for record in found.records if record.job == job]
        generation, last = 0, max((record.generation for record in records), default=0)
        compacted = _compacted(found, job)
        while generation <= last or storage.exists(dataset.plan_uri(out, job, generation)):
            yield from _against_plan(found, job, generation, generation < compacted)
            generation += 1
        work = [(record, file) for record, file in found.current() if record.job == job]
        seen: dict[str, list[np.ndarray]] = {}
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            for (_, file), checked in zip(work, pool.map(lambda one: _check(found, *one), work), strict=True):
                yield from (f"{checked.path}: {fault}" for fault in checked.faults)
                seen.setdefault(file.dataset, []).append(checked.rows)
                done(file.bytes)
        for name, parts in seen.items():
            _, counts = np.unique(np.concatenate(parts), return_counts=True)
            if more := int((counts - 1).sum()):
                yield f"{name} of {job}: {more} rows are there twice, by {' and '.join(KEYS[name])}"
        embedded, failed = (np.concatenate(seen.get(name, [NOTHING])) for name in (EMBEDDINGS, ERRORS))
        if job == "embed" and (shared := len(np.intersect1d(embedded, failed))):
            yield f"{shared} images have an embedding and an error"
    kept = {file.path for record in found.records for file in record.files}
    for name in dataset.SCHEMAS:
        for stray in sorted(dataset.stored(storage, out, name) - kept):
            yield f"{stray}: in no record, so no reader sees it: left by a killed worker, or still being committed"


def _compacted(found: Dataset, job: str) -> int:
    """The last generation by `cellray compact` that is done: records of those before it may have been deleted."""
    shards = Counter(record.generation for record in found.records if record.job == job)
    for generation in sorted(shards, reverse=True):
        try:
            facts = plan.read(found.storage, dataset.plan_uri(found.uri, job, generation))
            if facts.get("mode") == plan.COMPACT and shards[generation] >= plan.shards(facts):
                return generation
        except (NotFound, Conflict, TypeError, KeyError):
            continue
    return 0


def _against_plan(found: Dataset, job: str, generation: int, compacted: bool) -> Iterator[str]:
    records = [record for record in found.records if (record.job, record.generation) == (job, generation)]
    uri = dataset.plan_uri(found.uri, job, generation)
    if not found.storage.exists(uri):
        if records:
            yield f"{uri} is missing: {len(records)} shards of {job} belong to no plan"
        return
    try:  # what cannot be read at all is the storage's error, and raised
        facts = plan.read(found.storage, uri)
        shards = plan.shards(facts)
        fingerprint = plan.Plan(job, plan.own(facts), generation).fingerprint
    except (Conflict, TypeError, KeyError) as error:
        yield f"{uri} is no plan of this version: {error}"
        return
    for record in records:
        if record.fingerprint != fingerprint:
            named = dataset.record_uri(found.uri, job, record.shard, generation)
            yield f"{named} is of another plan ({record.fingerprint[:12]}…)"
    missing = sorted(set(range(shards)) - {record.shard for record in records})
    if missing and not compacted:
        shown = ", ".join(map(str, missing[:5])) + (" …" if len(missing) > 5 else "")
        yield f"{job}: {len(missing)} of {shards} shards are not committed ({shown}): the same command goes on"


def _check(found: Dataset, record: Record, file: ShardFile) -> Checked:
    try:
        faults, rows = _contents(found, record, file)
    except (CellrayError, pa.ArrowException, OSError, ValueError, TypeError) as error:
        faults, rows = [f"cannot be read: {str(error) or type(error).__name__}"], NOTHING
    return Checked(file.path, faults, rows)


def _contents(found: Dataset, record: Record, file: ShardFile) -> tuple[list[str], np.ndarray]:
    faults, numbers, storage, uri = [], [NOTHING], found.storage, join(found.uri, file.path)
    if (size := storage.size(uri)) != file.bytes:
        return [f"has {size} bytes, {file.bytes} were committed"], NOTHING
    if (digest := storage.sha256(uri)) != file.sha256:
        return [f"has sha256 {digest[:12]}…, {file.sha256[:12]}… was committed"], NOTHING
    with storage.open(uri) as raw:
        parquet = pq.ParquetFile(raw)
        schema = parquet.schema_arrow
        if (schema.metadata or {}).get(b"cellray.fingerprint", b"").decode() != record.fingerprint:
            faults.append("its footer names another plan")
        if not schema.equals(dataset.SCHEMAS[file.dataset]):
            return [*faults, f"its columns are not those of {file.dataset}"], NOTHING
        if parquet.metadata.num_rows != file.rows:
            faults.append(f"has {parquet.metadata.num_rows} rows, {file.rows} were committed")
        kept = (schema.metadata or {}).get(b"cellray.dtype", DTYPE.encode()).decode()
        ids, images = list[str](), list[str]()
        wrong = 0
        for batch in parquet.iter_batches(1 if file.dataset == EMBEDDINGS else BATCH_ROWS):
            stands = found.stands(record, batch.column("image_uri").to_pylist())
            numbers.append(_numbers(batch.column(name) for name in KEYS[file.dataset])[stands])
            if file.dataset == EMBEDDINGS:
                ids += batch.column("embedding_id").to_pylist()
                images += map(dataset.digest, batch.column("image_uri").to_pylist())
                wrong += not _plausible(batch.to_pylist()[0], kept)
        if wrong:
            faults.append(f"{wrong} embeddings are not finite {kept} numbers of their shape")
        if file.dataset == EMBEDDINGS and (tuple(ids), tuple(images)) != (record.ids(file), record.digests(file)):
            faults.append("its rows are not the record's embedding_ids and image_digests")
    return faults, np.concatenate(numbers)


def _plausible(row: dict[str, Any], kept: str) -> bool:
    content, shape, dtype = row["embedding"], row["shape"], row["dtype"]
    if not row["pooled"] or not np.isfinite(row["pooled"]).all():
        return False
    if kept == POOLED:
        return (content, shape, dtype) == (None, None, None)
    if dtype != kept or dtype not in DTYPES or not content or not shape:
        return False
    return len(content) == np.dtype(dtype).itemsize * int(np.prod(shape)) and bool(
        np.isfinite(np.frombuffer(content, np.dtype(dtype).newbyteorder("<"))).all()
    )


def _numbers(columns: Iterable[pa.Array]) -> np.ndarray:
    """Columns → [rows] uint64: rows of the same values have the same, others hardly ever (2^-64 for a pair)."""
    texts = pc.binary_join_element_wise(*(column.cast(pa.string()) for column in columns), "\0")
    digests = [hashlib.blake2b((text or "").encode(), digest_size=8).digest() for text in texts.to_pylist()]
    return np.frombuffer(b"".join(digests), np.uint64)
