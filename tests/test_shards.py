"""Shards one after the other, and those whose workers die."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image

from cluster.settings import Settings
from jobs import shards
from jobs.images import Entry
from jobs.shards import TASK_CPUS, Pipeline, Progress
from tests.conftest import App
from tests.poison import DEADLY, ENDLESS, ROOT


@pytest.mark.parametrize("content", [DEADLY, ENDLESS])
def test_an_image_that_ends_its_workers_is_left_out_and_the_job_goes_on(tmp_path: Path, content: bytes) -> None:
    for number in range(6):
        Image.fromarray(np.full((8, 9), number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "2b.png").write_bytes(b"no image, which is an error like others")
    (tmp_path / "3b.png").write_bytes(content)  # as the one above in the second shard
    command = [sys.executable, "-m", "tests.poison", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert lines == [[4, 0, 1], [4, 2, 3]]
    assert "3b.png ends its worker" in done.stderr


@pytest.mark.parametrize(("pause", "words"), [(0.0, 32 + 2), (3600.0, 2)])
def test_a_task_speaks_as_often_as_time_passes_not_as_it_has_batches(
    monkeypatch: pytest.MonkeyPatch, pause: float, words: int
) -> None:
    monkeypatch.setattr(shards, "FIRST_WORD_S", pause)
    monkeypatch.setattr(shards, "WORDS_S", pause)
    entry = Entry("image", 1)
    sources = [SimpleNamespace(entry=entry, part=None) for _ in range(64)]
    pipeline = Pipeline[Any, int, int](lambda one: 1, lambda items: items, lambda one: 1, 2, Progress(0))
    writer: Any = SimpleNamespace(commit=lambda: SimpleNamespace(files=()))
    said = list(shards.written(pipeline, sources, writer, "encode", lambda done: 0))
    assert len(said) == words
    assert [said[-1].images, said[-1].written, said[0].written] == [64, True, words == 2]


def test_a_shard_is_begun_while_the_one_before_is_published(app: App, tmp_path: Path) -> None:
    @ray.remote(num_cpus=TASK_CPUS, max_retries=0)
    def work(_: Settings, folder: str, index: int, *rest: Any) -> Iterator[Progress]:
        (Path(folder) / str(index)).touch()
        yield Progress(index)
        yield Progress(index, written=True)
        deadline = time.monotonic() + 60
        while not index and not (Path(folder) / "1").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        yield Progress(index, written=True, images=len(list(Path(folder).iterdir())))

    done = shards.run(work, (Settings(), str(tmp_path)), range(2), lambda _: [], 1, lambda _: True)
    first = min(done, key=lambda progress: progress.shard)
    assert first.images >= 2  # shards that were begun by its end
