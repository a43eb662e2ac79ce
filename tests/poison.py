"""Files that end whoever decodes them, or never end, as a defect in a codec would: `python -m tests.poison FOLDER` runs
two shards of its images on a Ray of its own, and prints a line of JSON each: images, errors, how often it was begun.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray

from cluster import watch
from cluster.errors import InvalidImage
from cluster.settings import Settings
from cluster.storage import Storage
from jobs import images, parts, shards
from jobs.images import Entry
from jobs.shards import Progress
from serve_app.model import preprocess

DEADLY, ENDLESS = b"deadly", b"endless"
DECODE_S = 5.0
ROOT = Path(__file__).parent.parent


class Source(NamedTuple):
    entry: Entry


def set_up() -> None:
    """In every worker."""
    decode = preprocess._decoded

    def deadly(data: bytes, *rest: Any) -> Any:
        if data == DEADLY:
            os._exit(1)
        if data == ENDLESS:
            sum(itertools.repeat(0))  # in C, and with the GIL
        return decode(data, *rest)

    preprocess._decoded, watch.DECODE_S = deadly, DECODE_S


@ray.remote(num_cpus=1, max_retries=0)
def work(
    settings: Settings, folder: str, index: int, sources: Sequence[Source], poisoned: frozenset[str]
) -> Iterator[Progress]:
    with (Path(folder) / f"begun-{index}").open("a") as begun:
        begun.write(".")
    progress = Progress(index)
    for source in sources:
        try:
            shards.sound(source.entry, poisoned)
            data = images.content(Storage(), source.entry, settings.limits.image_bytes)
            parts.only_part(source.entry, data, settings.limits).read(64)
        except InvalidImage:
            progress.errors += 1
        progress.images += 1
    yield progress


def main(folder: str) -> None:
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}, "worker_process_setup_hook": "tests.poison.set_up"}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    entries = list(images.find(Storage(), folder))
    halves = [[Source(one) for one in entries[::2]], [Source(one) for one in entries[1::2]]]
    try:
        done = shards.run(work, (Settings(), folder), [0, 1], halves.__getitem__, 2, lambda _: True)
        for one in sorted(done, key=lambda progress: progress.shard):
            begun = len((Path(folder) / f"begun-{one.shard}").read_text())
            print(json.dumps([one.images, one.errors, begun]))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
