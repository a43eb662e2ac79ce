"""The plan of a job: what its output is a function of, frozen in the output before the first shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.errors import Conflict
from cluster.storage import File, Storage
from serve_app.dataset import MAX_RECORD_BYTES, MAX_ROWS_A_FILE, SCHEMA_VERSION, plan_uri

Source = TypeVar("Source")

DEFAULT_SHARD_IMAGES = 256


@dataclass(frozen=True)
class Plan:
    """`facts` is everything that decides the rows; two plans with equal facts write the same shards."""

    job: str
    facts: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._canonical()).hexdigest()

    def _canonical(self) -> bytes:
        facts = {"job": self.job, "schema_version": SCHEMA_VERSION, **self.facts}
        return json.dumps(facts, sort_keys=True).encode()

    def freeze(self, storage: Storage, out: str) -> bool:
        """Write the plan into `out`, or find it there; True if it was there: the job resumes.

        Raises:
            Conflict: another plan is there; says what differs.
        """
        uri = plan_uri(out, self.job)
        if storage.exists(uri):
            self._compare(storage, uri, out)
            return True
        try:
            storage.publish(uri, self._canonical())
        except Conflict:  # another driver was faster
            self._compare(storage, uri, out)
            return True
        return False

    def _compare(self, storage: Storage, uri: str, out: str) -> None:
        try:
            there = dict(json.loads(storage.read(uri, MAX_RECORD_BYTES)) or [0])
        except (ValueError, TypeError) as error:
            raise Conflict(f"{uri} is no plan of this version: {error}") from error
        ours = json.loads(self._canonical())
        if there != ours:
            keys = [key for key in sorted(there | ours) if there.get(key) != ours.get(key)]
            found = "; ".join(f"{key}: {_short(there.get(key))} there, {_short(ours.get(key))} here" for key in keys)
            raise Conflict(f"{out} holds another {self.job} ({found}). Choose another output, or the same arguments")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…{text[-20:]}"


def listing_hash(files: Iterable[File]) -> str:
    """sha256 over URIs and sizes, in order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.uri}\t{file.size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def shards(sources: Sequence[Source], images: int) -> list[Sequence[Source]]:
    """Consecutive slices of at most `images`: the same for the same listing, whatever runs them."""
    images = min(images, MAX_ROWS_A_FILE)
    return [sources[start : start + images] for start in range(0, len(sources), images)]
