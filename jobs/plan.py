"""The plan of a job: what its output is a function of, frozen in the output before the first shard."""

from __future__ import annotations

import hashlib
import json
import tempfile
from array import array
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from cluster.errors import Conflict
from cluster.storage import Storage, mapped
from jobs.images import Entry
from serve_app.dataset import MAX_RECORD_BYTES, MAX_ROWS_A_FILE, SCHEMA_VERSION, plan_uri

DEFAULT_SHARD_IMAGES = 256
# Facts in which a later generation may differ:
ITS_OWN = ("generation", "mode", "listing", "images", "shard_images", "sources")
COMPACT = "compact"  # the mode of a generation by `cellray compact`; `sources` are the files that each shard merges
values = attrgetter(*Entry.__slots__)


@dataclass(frozen=True)
class Plan:
    """`facts` is everything that decides the rows; two plans with equal facts write the same shards. A `generation`
    after the first is a plan of its own in the same output."""

    job: str
    facts: dict[str, Any]
    generation: int = 0

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._canonical()).hexdigest()

    def _canonical(self) -> bytes:
        facts = {"job": self.job, "schema_version": SCHEMA_VERSION, **self.facts}
        facts |= {"generation": self.generation} if self.generation else {}
        return json.dumps(facts, sort_keys=True).encode()

    def freeze(self, storage: Storage, out: str) -> bool:
        """Write the plan into `out`, or find it there; True if it was there: the job resumes.

        Raises:
            Conflict: another plan is there, or one of a first generation that was about something else; says what
                differs.
        """
        if self.generation:
            self._compare(storage, plan_uri(out, self.job), out, ITS_OWN)
        uri = plan_uri(out, self.job, self.generation)
        if storage.exists(uri):
            self._compare(storage, uri, out)
            return True
        try:
            storage.publish(uri, self._canonical())
        except Conflict:  # another driver was faster
            self._compare(storage, uri, out)
            return True
        return False

    def _compare(self, storage: Storage, uri: str, out: str, but: Container[str] = ()) -> None:
        there = read(storage, uri)
        ours = json.loads(self._canonical())
        if keys := [key for key in sorted(there | ours) if key not in but and there.get(key) != ours.get(key)]:
            found = "; ".join(f"{key}: {_short(there.get(key))} there, {_short(ours.get(key))} here" for key in keys)
            added = "; --update adds what is new in the input, once it is done" if "listing" in keys else ""
            raise Conflict(
                f"{out} holds another {self.job} ({found}). Choose another output, or the same arguments{added}"
            )


def read(storage: Storage, uri: str) -> dict[str, Any]:
    """A plan's facts. Raises Conflict where it is none."""
    try:
        return dict(json.loads(storage.read(uri, MAX_RECORD_BYTES)) or [0])
    except (ValueError, TypeError) as error:
        raise Conflict(f"{uri} is no plan of this version: {error}") from error


def generations(storage: Storage, out: str, job: str) -> list[dict[str, Any]]:
    """The facts of a job's plans in `out`, the first generation's first; none if it never ran. Raises Conflict."""
    found: list[dict[str, Any]] = []
    while storage.exists(uri := plan_uri(out, job, len(found))):
        found.append(read(storage, uri))
    return found


def own(facts: dict[str, Any]) -> dict[str, Any]:
    """A plan's facts as `Plan` takes them."""
    return {key: value for key, value in facts.items() if key not in ("job", "schema_version", "generation")}


def shards(facts: dict[str, Any]) -> int:
    """How many a plan has."""
    if facts.get("mode") == COMPACT:
        return len(facts["sources"])
    return -(-facts["images"] // min(facts["shard_images"], MAX_ROWS_A_FILE))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…{text[-20:]}"


class Listing:
    """A job's images in their order, in shards: consecutive ones, the same whatever runs them. They are kept on disk,
    since there may be tens of millions. Of one that a list names more than once the first stands.

    images: how many. repeated: how often one was named again. bytes: of those whose size is known. fingerprint: sha256
    over what is known of them, in order.
    """

    def __init__(self, entries: Iterable[Entry], shard_images: int) -> None:
        self.shard_images = min(shard_images, MAX_ROWS_A_FILE)
        names = array("q")
        self._write(entries, names)
        ordered = np.sort(np.frombuffer(names, np.int64))
        again = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        self.repeated = self.images
        if again:
            self._write(_once(self._all(), again), array("q"))
        self.repeated -= self.images

    def _write(self, entries: Iterable[Entry], names: array[int]) -> None:
        """`names` gets a number for each: equal ones have the same."""
        starts, digest, images, size = array("Q"), hashlib.sha256(), 0, 0
        with mapped(tempfile.gettempdir()):
            lines = tempfile.TemporaryFile(prefix="cellray-listing-")  # noqa: SIM115
            for entry in entries:
                if images % self.shard_images == 0:
                    starts.append(lines.tell())
                line = json.dumps(values(entry)).encode() + b"\n"
                digest.update(line)
                lines.write(line)
                names.append(_number(entry))
                images += 1
                size += entry.size
        self.lines, self.starts, self.images, self.bytes = lines, starts, images, size
        self.fingerprint = digest.hexdigest()

    def _all(self) -> Iterator[Entry]:
        for index in range(len(self)):
            yield from self.shard(index)

    def __len__(self) -> int:
        """Shards."""
        return len(self.starts)

    def shard(self, index: int) -> list[Entry]:
        self.lines.seek(self.starts[index])
        return [Entry(*json.loads(self.lines.readline())) for _ in range(self.size(index))]

    def entry(self, index: int) -> Entry:
        """One image, by its number in the whole."""
        return self.shard(index // self.shard_images)[index % self.shard_images]

    def size(self, index: int) -> int:
        """Images in a shard."""
        return min(self.shard_images, self.images - index * self.shard_images)


def _number(entry: Entry) -> int:
    return hash((entry.uri, entry.view))


def _once(entries: Iterable[Entry], again: Container[int]) -> Iterator[Entry]:
    """The first of each, where `again` has the numbers of those that come more than once, and perhaps of others."""
    seen: set[tuple[str, str]] = set()
    for entry in entries:
        if _number(entry) in again:
            if (entry.uri, entry.view) in seen:
                continue
            seen.add((entry.uri, entry.view))
        yield entry
