"""`cellray compact OUT`: many small files, and rows that are superseded, become few files of a next generation.

Each of its shards merges whole files, and its record names them: as that one record appears, readers look at the new
file in place of those. So at any moment, killed anywhere, each row is there once.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import Conflict, InvalidInput
from cluster.settings import MIB
from cluster.storage import join, mapped
from jobs import plan
from jobs.plan import COMPACT, ITS_OWN, Plan
from serve_app import dataset
from serve_app.commit import ShardWriter
from serve_app.contract import DTYPE
from serve_app.dataset import EMBEDDINGS, MASK_ROW_GROUP, Dataset, Record, ShardFile

FILES_AT_ONCE = 4  # each with one file of its sources and its own on the local disk
EMBEDDINGS_BYTES = 1280 * MIB  # of a file's sources: 512 rows of 2 MiB, 256 of 4
OTHER_BYTES = 64 * MIB  # of other files: some readers hold one in memory
FOOTER = "cellray."
OF_A_SHARD = ("schema_version", "job", "shard", "generation", "fingerprint")  # in a footer, and not to be handed on


@dataclass(frozen=True)
class Source:
    """A committed file, and how many of its rows stand."""

    record: Record
    file: ShardFile
    rows: int

    @property
    def bytes(self) -> int:
        """About how many the rows that stand have."""
        return self.file.bytes * self.rows // max(self.file.rows, 1)


Group = tuple[Source, ...]


@dataclass(frozen=True)
class Work:
    """What compacting is for one job of a data set: shard i of the `plan` merges `groups[i]` into one file, and `left`
    are those that are not committed yet. `kept` are files that stay as they are."""

    plan: Plan
    before: Dataset
    groups: tuple[Group, ...]
    kept: Group
    left: tuple[int, ...]

    def bytes(self) -> int:
        """To read."""
        return sum(source.file.bytes for index in self.left for source in self.groups[index])

    def __str__(self) -> str:
        """Files and bytes before and after."""
        merged = [source for group in self.groups for source in group]
        files = len(self.kept) + sum(any(source.rows for source in group) for group in self.groups)
        whole = sum(source.file.bytes for source in (*self.kept, *merged))
        rest = sum(source.bytes for source in (*self.kept, *merged))
        if not merged:
            return f"{self.plan.job}: nothing to merge in {files:,} files, {whole:,} bytes"
        return (
            f"{self.plan.job}: {len(self.kept) + len(merged):,} files, {whole:,} bytes → {files:,} files, about "
            f"{rest:,} bytes"
        )


def prepare(found: Dataset, job: str) -> Work | None:
    """What is to do for a job of a data set, or is left of it; None where it never ran. Writes nothing.

    Raises:
        Conflict: the job is not done.
    """
    storage, out = found.storage, found.uri
    plans = plan.generations(storage, out, job)
    if not plans:
        return None
    records = [record for record in found.records if record.job == job]
    last = len(plans) - 1
    committed = {record.shard for record in records if record.generation == last}
    done = len(committed) >= plan.shards(plans[last])
    if not done and plans[last].get("mode") != COMPACT:
        raise Conflict(
            f"{out} is not done: {len(committed)} of {plan.shards(plans[last])} shards of {job} are committed. The "
            "command that began it goes on, then cellray compact can"
        )
    number = last + 1 if done else last
    before = Dataset(storage, out, tuple(record for record in records if record.generation < number))
    sources = {source.file.path: source for source in _sources(before)}
    if done:
        most = dataset.rows_a_file(plans[0].get("dtype", DTYPE))
        paths = [[source.file.path for source in group] for group in _groups([*sources.values()], most)]
        facts = {key: value for key, value in plans[0].items() if key not in ("job", "schema_version", *ITS_OWN)}
        facts |= {"mode": COMPACT, "sources": paths}
    else:
        paths, facts = plans[last]["sources"], plan.own(plans[last])
    groups = tuple(tuple(sources.pop(path) for path in group) for group in paths)
    left = tuple(index for index in range(len(groups)) if done or index not in committed)
    return Work(Plan(job, facts, number), before, groups, tuple(sources.values()), left)


def _sources(before: Dataset) -> list[Source]:
    """Current files in the order of their data set, generation and shard."""

    def source(one: tuple[Record, ShardFile]) -> Source:
        record, file = one
        if record.generation >= newest:
            return Source(record, file, file.rows)
        names = before.read(join(before.uri, file.path), ["image_uri"])["image_uri"].to_pylist()
        return Source(record, file, sum(before.stands(record, names)))

    newest = max(before.newest.values(), default=0)
    order = list(dataset.SCHEMAS)
    files = sorted(before.current(), key=lambda one: (order.index(one[1].dataset), one[0].generation, one[0].shard))
    with ThreadPoolExecutor(dataset.RECORD_READERS) as pool:
        return list(pool.map(source, files))


def _groups(sources: Sequence[Source], most: int) -> list[list[Source]]:
    """Which of them become a file: as many in a row as fit, if that is more than one, or if rows of it fall away. One
    that is half full stays as it is: a row is not written again for every few that are added."""
    groups: list[list[Source]] = []
    for source in sorted(sources, key=lambda source: not source.rows):  # nothing is written again for the empty ones
        whole = source.rows == source.file.rows
        if whole and not _fits([source, source], most):
            continue
        if not groups or not _fits([*groups[-1], source], most):
            groups.append([])
        groups[-1].append(source)
    return [group for group in groups if len(group) > 1 or group[0].rows < group[0].file.rows]


def _fits(group: Sequence[Source], most: int) -> bool:
    """Whether their rows that stand go into one file, of at most `most` embeddings."""
    if len({source.file.dataset for source in group}) > 1:
        return False
    size, rows = sum(source.bytes for source in group), sum(source.rows for source in group)
    if group[0].file.dataset == EMBEDDINGS:
        return size <= EMBEDDINGS_BYTES and rows <= most
    return size <= OTHER_BYTES


def run(work: Work, done: Callable[[int], Any]) -> None:
    """Freeze the plan, if there is anything to merge, and merge what is left; `done(bytes)` as they are read.

    Raises:
        Conflict: another job has begun a next generation. InvalidInput: a file is not what was committed.
    """
    if not work.groups:
        return
    try:
        work.plan.freeze(work.before.storage, work.before.uri)
    except Conflict as error:
        raise Conflict(
            f"another job has begun generation {work.plan.generation} of {work.plan.job} in {work.before.uri}: once "
            "that is done, the same command goes on"
        ) from error
    stopping, lock = threading.Event(), threading.Lock()

    def read(size: int) -> None:
        with lock:
            done(size)

    pool = ThreadPoolExecutor(FILES_AT_ONCE)
    try:
        for future in [pool.submit(_merge, work, index, read, stopping) for index in work.left]:
            future.result()
    finally:
        stopping.set()
        pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """Another file's error, or Ctrl-C, ends this one too."""


def _merge(work: Work, index: int, done: Callable[[int], Any], stopping: threading.Event) -> None:
    before, group, made = work.before, work.groups[index], work.plan
    own = {"fingerprint": made.fingerprint, "generation": str(made.generation)}
    with (
        mapped(tempfile.gettempdir()),
        ShardWriter(before.storage, before.uri, made.job, index, _metadata(before, group[-1]) | own) as writer,
    ):
        for source in group:
            local, name = writer.folder / "source.parquet", source.file.dataset
            _fetch(before, source, local)
            for batch in pq.ParquetFile(local).iter_batches(1 if name == EMBEDDINGS else MASK_ROW_GROUP):
                if stopping.is_set():
                    raise _Stopped
                stands = before.stands(source.record, batch.column("image_uri").to_pylist())
                rows = pa.Table.from_batches([batch]).filter(pa.array(stands, pa.bool_()))
                if len(rows):
                    writer.add(name, rows)
            writer.replaces.append(source.file.path)
            done(source.file.bytes)
        writer.commit()


def _fetch(before: Dataset, source: Source, local: Path) -> None:
    uri = join(before.uri, source.file.path)
    if (digest := before.storage.fetch(uri, local)) != source.file.sha256:
        raise InvalidInput(
            f"{uri} is damaged: it has sha256 {digest[:12]}…, {source.file.sha256[:12]}… was committed. It stays as it "
            f"is; cellray verify {before.uri} says what else is wrong"
        )


def _metadata(before: Dataset, source: Source) -> dict[str, str]:
    """What a file's footer says of its model, to be said of its rows in another."""
    with before.storage.open(join(before.uri, source.file.path)) as file:
        footer = pq.ParquetFile(file).schema_arrow.metadata or {}
    named = {key.decode(): value.decode() for key, value in footer.items()}
    own = {key.removeprefix(FOOTER): value for key, value in named.items() if key.startswith(FOOTER)}
    for key in OF_A_SHARD:
        own.pop(key, None)
    return own | {"encoder_sha256": source.record.encoder_sha256}


@dataclass(frozen=True)
class Old:
    """What no reader needs any more: replaced files, and records that name no other."""

    found: Dataset
    job: str
    files: tuple[ShardFile, ...] = ()
    records: tuple[Record, ...] = ()

    def __len__(self) -> int:
        return len(self.files) + len(self.records)

    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def delete(self, done: Callable[[], Any]) -> None:
        """`done()` after each. Files first, then records from the oldest generation on: none that says what is replaced
        goes before what it replaced. Interrupted anywhere, the same command goes on."""
        out, uris = self.found.uri, {0: [join(self.found.uri, file.path) for file in self.files]}
        for record in self.records:
            uri = dataset.record_uri(out, record.job, record.shard, record.generation)
            uris.setdefault(1 + record.generation, []).append(uri)
        with ThreadPoolExecutor(dataset.RECORD_READERS) as pool:
            for step in sorted(uris):
                for _ in pool.map(self.found.storage.delete, uris[step]):
                    done()


def old(found: Dataset, job: str) -> Old:
    """What compacting has left behind of a job; nothing as long as its last generation is not done."""
    plans = plan.generations(found.storage, found.uri, job)
    compacts = [number for number, facts in enumerate(plans) if facts.get("mode") == COMPACT]
    records = sorted((record for record in found.records if record.job == job), key=lambda record: record.generation)
    if not compacts or sum(record.generation == len(plans) - 1 for record in records) < plan.shards(plans[-1]):
        return Old(found, job)
    there = {path for name in dataset.SCHEMAS for path in dataset.stored(found.storage, found.uri, name)}
    files = [file for record in records for file in record.files if file.path in found.replaced & there]
    gone, named = [], set[str]()  # `named`: by records that stay, which those that say what is replaced outlive
    for record in records:
        paths = {file.path for file in record.files}
        if record.generation < compacts[-1] and paths <= found.replaced and named.isdisjoint(record.replaces):
            gone.append(record)
        else:
            named |= paths
    return Old(found, job, tuple(files), tuple(gone))
