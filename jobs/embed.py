"""`python -m jobs.embed INPUT OUTPUT --model NAME`: images → embeddings, as Parquet."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import ray

from cluster import memory
from cluster.errors import CellrayError, InvalidInput
from cluster.settings import Settings
from cluster.storage import Storage
from jobs import driver, images, replicas
from jobs.driver import Job
from jobs.images import Entry
from jobs.parts import Part, ReadImage, cost, expanded, name_of, only_part
from jobs.plan import Listing, Plan
from jobs.shards import TASK_CPUS, Done, Pipeline, Progress, sound, written
from serve_app import contract, dataset
from serve_app.commit import ShardWriter
from serve_app.contract import DTYPE, POOLED, Embedding, ModelInfo
from serve_app.dataset import Dataset

NAME = "embed"
DESCRIPTION = """Run a model's image encoder over every image of INPUT and write the embeddings to OUTPUT.

The images stream through the replicas of the Serve app, so the app must be running on the cluster (`cellray up`). A bad
image becomes a row of OUTPUT/errors and the job goes on. Killed anywhere, the same command resumes; a different one on
the same OUTPUT is refused. When it is done, --retry-errors runs what failed, and --update what was added or changed;
readers then see the newer rows of an image in place of the older."""
EPILOG = """examples:
  python -m jobs.embed ~/plates out --model nano
  ray job submit -- python -m jobs.embed s3://in/plates s3://out/plates --model sam_vit_b --parallel 8
"""


@dataclass(frozen=True, slots=True)
class Source:
    """An image to embed, or a part of it; and by part the ids of what was last embedded, to be passed over if they are
    that still."""

    entry: Entry
    known: Mapping[str, str]
    part: Part | None = None


def main(argv: Sequence[str] | None = None) -> int:
    made = driver.parser(NAME, DESCRIPTION, EPILOG, update=True)
    kept = made.add_argument_group("what is kept")
    kept.add_argument("--dtype", choices=contract.DTYPES, help=f"of embeddings (default: {DTYPE})")
    kept.add_argument(
        "--compression",
        choices=dataset.COMPRESSIONS,
        help="of embeddings (default: none); zstd makes them a little smaller, and slower to read",
    )
    kept.add_argument(
        "--pooled-only",
        action="store_true",
        help="only `pooled`, the mean over each image: 1 kB in place of 2 MB, for search; no masks can be made of it",
    )
    return driver.main(NAME, made, _run, argv)


def _kept(arguments: argparse.Namespace) -> dict[str, str]:
    """What of an embedding is kept, and how. Raises InvalidInput."""
    if arguments.pooled_only and (arguments.dtype or arguments.compression):
        raise InvalidInput("--pooled-only keeps no embeddings: leave out --dtype and --compression")
    dtype = POOLED if arguments.pooled_only else arguments.dtype or DTYPE
    return {"dtype": dtype, "compression": arguments.compression or dataset.COMPRESSIONS[0]}


def _run(job: Job) -> int:
    kept = _kept(job.arguments)
    generation, before = driver.generation(job)
    entries = images.find(job.storage, job.input, driver.view(job.arguments))
    if job.arguments.mode == driver.RETRY:
        entries = failed(before, entries)
    listing = Listing(islice(entries, job.arguments.limit), job.arguments.shard_images)
    known = _known(before) if job.arguments.mode == driver.UPDATE else {}

    def sources(index: int) -> list[Source]:
        return [Source(entry, known.get(dataset.printable(entry.uri), {})) for entry in listing.shard(index)]

    info = replicas.connect(job.arguments.model)
    facts = {
        "input": job.input,
        "view": driver.view(job.arguments),
        "listing": listing.fingerprint,
        "images": listing.images,
        "shard_images": job.arguments.shard_images,
        "model": info.name,
        "encoder_sha256": info.encoder_sha256,
        "preprocess": info.preprocess,
        **kept,
        "compute_dtype": info.dtype,
        "mode": job.arguments.mode,
    }
    context = (info, job.arguments.batch)
    work = driver.Work(Plan(NAME, facts, generation), listing, sources, _shard, context)
    return driver.execute(job, work, info, replicas.running(info.name))


def _known(before: Dataset) -> dict[str, dict[str, str]]:
    """Image URI → part → image id, of images of which no part failed."""
    known: dict[str, dict[str, str]] = {}
    columns = ["image_uri", "part", "image_id"]
    for uri, part, image_id in zip(*before.table(dataset.EMBEDDINGS, columns).to_pydict().values(), strict=True):
        known.setdefault(uri, {})[part] = image_id
    for uri in before.table(dataset.ERRORS, ["image_uri"])["image_uri"].to_pylist():
        known.pop(uri, None)
    return known


def failed(before: Dataset, entries: Iterator[Entry]) -> Iterator[Entry]:
    """Those that have an error in a data set."""
    errors = set(before.table(dataset.ERRORS, ["image_uri"])["image_uri"].to_pylist())
    return (entry for entry in entries if dataset.printable(entry.uri) in errors)


def embedding(read: ReadImage, array: np.ndarray, info: ModelInfo, kept: str = DTYPE) -> Embedding:
    return Embedding(
        embedding_id=contract.embedding_id(read.image_id, info.encoder_sha256, info.dtype, kept),
        image_id=read.image_id,
        model=info.name,
        encoder_sha256=info.encoder_sha256,
        original=read.image.original,
        input=read.image.input,
        array=array,
    )


@ray.remote(num_cpus=TASK_CPUS, max_retries=0)
def _shard(
    settings: Settings,
    out: str,
    info: ModelInfo,
    batch: int,
    metadata: dict[str, str],
    index: int,
    sources: Sequence[Source],
    poisoned: frozenset[str],
) -> Iterator[Progress]:
    memory.share()
    storage, progress = Storage(settings.storage), Progress(index)
    kept = metadata["dtype"]
    wire = DTYPE if kept == POOLED else kept
    encode = replicas.encoder(info.name, settings.limits.request_timeout_s, wire)

    def fetch(entry: Entry) -> bytes:
        return images.content(storage, entry, settings.limits.image_bytes)

    def read(source: Source) -> ReadImage | None:
        sound(source.entry, poisoned)
        part = source.part or only_part(source.entry, fetch(source.entry), settings.limits)
        if source.known.get(part.name) == part.image_id():
            return None
        return part.read(info.image_size)

    def call(read: list[ReadImage | None]) -> list[np.ndarray | CellrayError | None]:
        fresh = [one.image.pixels for one in read if one is not None]
        arrays = iter(encode(fresh) if fresh else [])
        return [None if one is None else next(arrays) for one in read]

    pipeline = Pipeline[Source, ReadImage | None, np.ndarray | None](
        read=read,
        call=call,
        cost=lambda source: cost(source) + 3 * info.image_size**2,
        batch=batch,
        progress=progress,
    )
    found = expanded(sources, lambda entry: pipeline.persist(lambda: fetch(entry)), settings.limits, poisoned)
    with ShardWriter(storage, out, NAME, index, metadata) as writer:

        def add(done: Done[Source, ReadImage | None, np.ndarray | None]) -> int:
            entry, part = done.source.entry, done.source.part
            if done.item is not None:
                writer.supersede(entry.uri)
            if isinstance(done.item, ReadImage) and isinstance(done.result, np.ndarray):
                made, corner = embedding(done.item, done.result, info, kept), part.corner if part else (0, 0)
                pooled, name = made.pooled(info.patch), name_of(done.source)
                row = dataset.embedding_row(made, entry.uri, pooled, entry.key, name, corner, kept == POOLED)
                writer.add(dataset.EMBEDDINGS, row)
                progress.encoder_calls += 1
            if part is None or part.ends:
                progress.bytes_read += entry.size
                progress.unchanged += done.item is None
            return 0

        yield from written(pipeline, found, writer, "encode", add)


if __name__ == "__main__":
    sys.exit(main())
