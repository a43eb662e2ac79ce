"""One fault at a time at the storage; then many, and kills, at whole jobs: a small part of tests.benchmarks.faults."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from cluster import storage as storage_module
from cluster.errors import Unavailable
from cluster.settings import StorageSettings
from cluster.storage import Storage
from tests import faulty_s3
from tests.benchmarks import faults
from tests.faulty_s3 import SIDES, Fault, Faults, Operation
from tests.s3 import ROOT, client, server

CONTENT = b"0123456789" * 10


class Faulty(NamedTuple):
    """A storage behind a proxy, and what shall go wrong there."""

    storage: Storage
    faults: Faults


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    folder = tmp_path_factory.mktemp("faulty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S3_UPLOAD_PART_MIN_SIZE", "1")
        patch.setenv("AWS_SDK_UA_APP_ID", "worker-0")
        patch.setattr(storage_module, "PART_BYTES", 40)
        coming = Faults(0, folder / "replica")
        with server(folder) as endpoint, faulty_s3.proxy(endpoint, coming) as url:
            client(endpoint, "s3").create_bucket(Bucket="faulty")
            yield Faulty(Storage(StorageSettings(endpoint_url=url, attempts=3)), coming)


def arm(behind: Faulty, *wrong: tuple[str, str]) -> str:
    """A new URI, of which (kind, verb) go wrong, once each."""
    made = [Fault(kind, Operation("worker", verb, "embeddings"), SIDES[kind]) for kind, verb in wrong]
    behind.faults.begin("", 0.0, [(0, fault) for fault in made])
    return f"s3://faulty/{'-'.join(kind + verb for kind, verb in wrong)}/embeddings/a"


@pytest.mark.parametrize(
    "wrong",
    [
        [("lost", "create")],
        [("lost", "part")],
        [("lost", "complete")],  # the upload is over, and what it made is there
        [("412", "complete")],
        [("409", "complete")],
        [("412", "complete"), ("lost", "abort")],
        [("412", "complete"), ("short", "get")],
        [("reset", "complete"), ("503", "part")],
    ],
    ids=str,
)
def test_a_file_in_parts_is_published_whatever_goes_wrong_once(
    behind: Faulty, wrong: list[tuple[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    uri = arm(behind, *wrong)
    behind.storage.publish(uri, tmp_path / "a")
    assert not behind.faults.armed
    assert behind.storage.read(uri, 1000) == CONTENT


@pytest.mark.parametrize("kind", ["lost", "412", "409", "reset"])
def test_a_small_file_is_published_whatever_goes_wrong_once(behind: Faulty, kind: str) -> None:
    uri = arm(behind, (kind, "put"))
    behind.storage.publish(uri, CONTENT)
    assert not behind.faults.armed
    assert behind.storage.read(uri, 1000) == CONTENT


def test_a_short_body_is_asked_for_again(behind: Faulty) -> None:
    uri = arm(behind, *[("short", "get")] * 2)
    behind.storage.publish(uri, CONTENT)
    assert behind.storage.read(uri, 1000) == CONTENT
    assert not behind.faults.armed
    arm(behind, *[("short", "get")] * 3)
    with pytest.raises(Unavailable):
        behind.storage.read(uri, 1000)


def test_what_is_lost_duplicated_or_wrong_is_counted() -> None:
    golden = {"a": {"n": 1}, "b": {"n": 2}, "c": {"n": 3}}
    assert faults.compare(golden, [("b", {"n": 2}), ("a", {"n": 1})], 2) == {"lost": 0, "duplicated": 0, "wrong": 0}
    rows = [("a", {"n": 1}), ("a", {"n": 1}), ("b", {"n": 7}), ("d", {"n": 4})]
    assert faults.compare(golden, rows, 3) == {"lost": 1, "duplicated": 1, "wrong": 2}


def test_jobs_on_a_storage_that_fails_and_processes_that_are_killed() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.faults", "--some", "12", "--runs", "1", "--faults", "15"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert figures["faults_fired"] >= 15
    assert figures["lost"] == figures["duplicated"] == figures["wrong"] == figures["points_never_reached"] == 0
