"""Readers: which images an INPUT holds, and one of them from storage to model input."""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from cluster.errors import InvalidImage, InvalidInput, NotFound, TooLarge
from cluster.settings import MIB
from cluster.storage import File, Storage, absolute, join
from jobs.views import CROPPED, View
from serve_app.model.preprocess import SUFFIXES

WILDCARD = re.compile(r"[*?\[]")
TAR, PARQUET = ".tar", ".parquet"
TABLES = (".csv", ".jsonl", ".ndjson", ".txt")
BYTES = ("image", "bytes")  # columns that may hold images' bytes, or a struct of `bytes` and `path`
UNKNOWN_BYTES = 4 * MIB  # taken for the size of a file that is only named
MAX_GROUP_BYTES = 1 << 30  # of a Parquet file's row group: one is in memory, for one of its images
BLOCK = MIB  # read at a time from tables and from between a tar's images
INPUT = f"""a folder or s3://BUCKET/PREFIX with all below it; one image; a glob, in quotes (** for folders); a list
({", ".join(TABLES)} or {PARQUET}) with a column uri, full or relative to the list, and perhaps key, channels (as of
--channels) and crop (x,y,width,height); {PARQUET} with the images' bytes in a column image; {TAR}"""


@dataclass(frozen=True, slots=True)
class Entry:
    """An image to read. `uri` is its name in the data set; `size` in bytes, 0 if unknown; `key` is the user's own.

    One in another file is `container#name`, and `at` its first byte in a tar, or its row in Parquet. `view` says what
    of it becomes rows, as in `jobs.parts`.
    """

    uri: str
    size: int
    key: str | None = None
    container: str = ""
    at: int = 0
    view: str = ""

    @property
    def cost(self) -> int:
        """Bytes to reckon with."""
        return self.size or UNKNOWN_BYTES


def find(storage: Storage, uri: str, view: str = "") -> Iterator[Entry]:
    """What INPUT says, in a fixed order; of a folder or a prefix the images alone, by suffix. `view` is for all of
    them; a list's columns `channels` and `crop` go before it, and a crop's URI ends with it.

    Raises:
        NotFound: nothing is there, or no image. InvalidInput: a list, a tar or Parquet that is not as it should be.
    """
    whole, others, found = absolute(uri), 0, False
    listed, globbed = _listed(storage, whole)
    for file in listed:
        named, suffix = globbed or file.uri == whole, "." + file.uri.lower().rpartition(".")[2]
        made: Iterable[Entry] = ()
        if suffix in SUFFIXES:
            made = [Entry(file.uri, file.size)]
        elif named and suffix == TAR:
            made = _tar(storage, file.uri)
        elif named and suffix == PARQUET:
            made = _parquet(storage, file.uri)
        elif named and suffix in TABLES:
            made = _entries(file.uri, _rows(storage, file.uri, suffix))
        else:
            others += 1
        for entry in made:
            found = True
            yield replace(entry, view="&".join(filter(None, (view, entry.view)))) if view else entry
    if not found:
        passed = f" ({others} files with other names)" if others else ""
        raise NotFound(f"no images under {uri}{passed}; looked for {', '.join(SUFFIXES)}")


def files(storage: Storage, uri: str) -> Iterator[Entry]:
    """As `find`, of images that are files of their own. Raises InvalidInput for others."""
    for entry in find(storage, uri):
        if entry.container:
            raise InvalidInput(f"{uri}: expected a folder of images, or a glob or a list of them")
        yield entry


def by_name(storage: Storage, uris: Iterable[str]) -> dict[str, Entry]:
    """Images that a data set names, to be read again: those in tars and Parquet are looked for there."""
    found = {uri: _named(uri) for uri in uris}
    containers = {uri.rpartition("#")[0] for uri in found}
    for container in sorted(one for one in containers if one.lower().endswith((TAR, PARQUET)) and storage.exists(one)):
        found |= {entry.uri: entry for entry in find(storage, container) if entry.uri in found}
    return found


def content(storage: Storage, entry: Entry, limit: int) -> bytes:
    """An image's file.

    Raises:
        TooLarge: over `limit` bytes. InvalidImage: cut short. NotFound, Forbidden, Unavailable: the storage's.
    """
    if not entry.container:
        return storage.read(file_uri(entry), limit)
    if entry.size > limit:
        raise TooLarge(f"{entry.uri} is larger than the limit of {limit} bytes")
    if not entry.container.lower().endswith(TAR):
        return _row(storage, entry, limit)
    with storage.open(entry.container) as file:
        if file.seek(0, io.SEEK_END) < entry.at + entry.size:
            raise InvalidImage(f"{entry.container} ends before the {entry.size} bytes of {entry.uri}")
        file.seek(entry.at)
        return file.read(entry.size)


def file_uri(entry: Entry) -> str:
    """Of the file that the image is, or is a crop of."""
    return CROPPED.sub("", entry.uri) if "crop=" in entry.view else entry.uri


def _named(uri: str) -> Entry:
    crop = CROPPED.search(uri)
    return Entry(uri, 0, view=str(View(crop=crop[1])) if crop else "")


def _listed(storage: Storage, uri: str) -> tuple[Iterator[File], bool]:
    """(files, whether `uri` is a glob): where nothing has that very name, which may have wildcards in it too."""
    wildcard = WILDCARD.search(uri)
    if not wildcard:
        return storage.list(uri), False
    try:
        next(storage.list(uri), None)
        return storage.list(uri), False
    except NotFound:
        base, pattern = uri[: wildcard.start()].rpartition("/")[0] or "/", re.compile(glob_translate(uri))
        return (file for file in storage.list(base) if pattern.match(file.uri)), True


def _tar(storage: Storage, uri: str) -> Iterator[Entry]:
    """Images in a tar by suffix. Their key is WebDataset's: the name up to the first dot after the last slash."""
    try:
        with storage.open(uri) as raw, tarfile.open(fileobj=_buffered(raw), mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
                folder, _, name = member.name.rpartition("/")
                if member.isreg() and name.lower().endswith(SUFFIXES) and name[0] != ".":
                    key = f"{folder}/{name.partition('.')[0]}".lstrip("/")
                    yield Entry(f"{uri}#{member.name}", member.size, key, uri, member.offset_data)
    except tarfile.TarError as error:
        raise InvalidInput(f"{uri} is no plain tar, or damaged: {error}; compressed ones are not read") from error


def _rows(storage: Storage, uri: str, suffix: str) -> Iterator[dict[str, Any]]:
    with storage.open(uri) as raw:
        text = io.TextIOWrapper(_buffered(raw), "utf-8-sig", newline="")
        try:
            if suffix == ".csv":
                yield from csv.DictReader(text)
            elif suffix == ".txt":
                yield from ({"uri": line.rstrip("\r\n")} for line in text if line.strip())
            else:
                yield from (json.loads(line) for line in text if line.strip())
        except (ValueError, csv.Error) as error:
            raise InvalidInput(f"{uri} could not be read as a list of images: {error}") from error


def _entries(uri: str, rows: Iterable[dict[str, Any]]) -> Iterator[Entry]:
    folder = uri.rpartition("/")[0]
    for number, row in enumerate(rows):
        there = row if isinstance(row, dict) else {}
        name, key, size = (there.get(column) for column in ("uri", "key", "size"))
        if not isinstance(name, str) or not name:
            found = ", ".join(map(str, there)) or "nothing"
            raise InvalidInput(f"{uri}, row {number}: expected a column uri with a name in it, found {found}")
        full = absolute(name if "://" in name or name.startswith(("/", "~")) else join(folder, name))
        crop, channels = (str(there.get(column) or "").strip() for column in ("crop", "channels"))
        try:
            view = str(View(crop=crop.replace(" ", ""), channels=channels))
        except InvalidInput as error:
            raise InvalidInput(f"{uri}, row {number}: {error}") from error
        full += f"#xywh={View.parse(view).crop}" if crop else ""
        yield Entry(full, int(str(size)) if str(size).isdecimal() else 0, None if key is None else str(key), view=view)


def _parquet(storage: Storage, uri: str) -> Iterator[Entry]:
    """Rows that name images, or hold them."""
    try:
        with storage.open(uri) as raw:
            file = pq.ParquetFile(raw)
            names = file.schema_arrow.names
            if "uri" in names:
                columns = [name for name in ("uri", "key", "size", "crop", "channels") if name in names]
                batches = file.iter_batches(columns=columns)
                yield from _entries(uri, (row for batch in batches for row in batch.to_pylist()))
                return
            column = _bytes_column(file.schema_arrow, uri)
            row = 0
            for group in range(file.num_row_groups):
                keys = file.read_row_group(group, ["key"])["key"].to_pylist() if "key" in names else None
                there = file.metadata.row_group(group)
                leaves = (there.column(leaf) for leaf in range(there.num_columns))
                size = sum(one.total_uncompressed_size for one in leaves if one.path_in_schema.split(".")[0] == column)
                if size > MAX_GROUP_BYTES:
                    most = f"{MAX_GROUP_BYTES >> 20} MiB"
                    raise InvalidInput(f"{uri}: row group {group} is over {most}; write it with smaller ones")
                for place in range(there.num_rows):
                    key = None if keys is None or keys[place] is None else str(keys[place])
                    yield Entry(f"{uri}#{row}", size // there.num_rows, key, uri, row)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(f"{uri} is no Parquet file, or damaged: {error}") from error


def _bytes_column(schema: pa.Schema, uri: str) -> str:
    for name in BYTES:
        kind = schema.field(name).type if name in schema.names else pa.null()
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return name
    found = ", ".join(schema.names)
    raise InvalidInput(f"{uri} has columns {found}; expected uri, or an image's bytes in {' or '.join(BYTES)}")


_reading = threading.Lock()


def _row(storage: Storage, entry: Entry, limit: int) -> bytes:
    try:
        with _reading:  # the next rows wait for the group that they are in as well
            first, values = _group(storage, entry.container, entry.at)
    except (pa.ArrowException, OSError) as error:
        raise InvalidImage(f"{entry.container} is damaged: {error}") from error
    data = values[entry.at - first].as_py()
    data = data["bytes"] if isinstance(data, dict) else data
    if data is None:
        raise InvalidImage(f"{entry.uri} has no bytes")
    if len(data) > limit:
        raise TooLarge(f"{entry.uri} is larger than the limit of {limit} bytes")
    return bytes(data)


def _group(storage: Storage, uri: str, row: int) -> tuple[int, pa.ChunkedArray]:
    """(its first row, its images) of the row group that a row is in."""
    file = _opened(storage, uri)
    first = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if row < first + count:
            return first, _images(storage, uri, group)
        first += count
    raise InvalidImage(f"{uri} has {first} rows, none of number {row}")


@lru_cache(maxsize=1)
def _opened(storage: Storage, uri: str) -> pq.ParquetFile:
    return pq.ParquetFile(storage.open(uri))


@lru_cache(maxsize=1)
def _images(storage: Storage, uri: str, group: int) -> pa.ChunkedArray:
    file = _opened(storage, uri)
    column = _bytes_column(file.schema_arrow, uri)
    return file.read_row_group(group, [column])[column]


def _buffered(raw: Any) -> io.BufferedReader:
    return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw, BLOCK)
