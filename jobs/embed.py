"""`python -m jobs.embed INPUT OUTPUT --model NAME`: images → embeddings, as Parquet."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import ray

from cluster import memory
from cluster.errors import CellrayError
from cluster.settings import Settings
from cluster.storage import Storage
from jobs import driver, images, replicas
from jobs.driver import Job
from jobs.images import Entry, ReadImage
from jobs.plan import Listing, Plan
from jobs.shards import Pipeline, Progress, measured
from serve_app import contract, dataset
from serve_app.contract import Embedding, ModelInfo
from serve_app.dataset import ShardWriter

NAME = "embed"
DESCRIPTION = """Run a model's image encoder over every image of INPUT and write the embeddings to OUTPUT.

The images stream through the replicas of the Serve app, so the app must be running on the cluster (`make serve`, or
`serve deploy`). A bad image becomes a row of OUTPUT/errors and the job goes on. Killed anywhere, the same command
resumes; a different one on the same OUTPUT is refused."""
EPILOG = """examples:
  python -m jobs.embed ~/plates out --model nano
  ray job submit -- python -m jobs.embed s3://in/plates s3://out/plates --model sam_vit_b --parallel 8
"""


def main(argv: Sequence[str] | None = None) -> int:
    return driver.main(NAME, driver.parser(NAME, DESCRIPTION, EPILOG), _run, argv)


def _run(job: Job) -> int:
    entries = islice(images.find(job.storage, job.input), job.arguments.limit)
    listing = Listing(entries, job.arguments.shard_images)
    info = replicas.connect(job.arguments.model)
    facts = {
        "input": job.input,
        "listing": listing.fingerprint,
        "images": listing.images,
        "shard_images": job.arguments.shard_images,
        "model": info.name,
        "encoder_sha256": info.encoder_sha256,
        "preprocess": info.preprocess,
        "dtype": contract.DTYPE,
        "compute_dtype": info.dtype,
    }
    context = (job.settings, job.output, info, job.arguments.batch)
    work = driver.Work(Plan(NAME, facts), listing, listing.shard, _shard, context)
    return driver.execute(job, work, info, replicas.running(info.name))


def embedding(read: ReadImage, array: np.ndarray, info: ModelInfo) -> Embedding:
    return Embedding(
        embedding_id=contract.embedding_id(read.image_id, info.encoder_sha256, info.dtype),
        image_id=read.image_id,
        model=info.name,
        encoder_sha256=info.encoder_sha256,
        original=read.image.original,
        input=read.image.input,
        array=array,
    )


@ray.remote(num_cpus=1, max_retries=0)
def _shard(
    settings: Settings,
    out: str,
    info: ModelInfo,
    batch: int,
    metadata: dict[str, str],
    index: int,
    entries: Sequence[Entry],
) -> Iterator[Progress]:
    memory.give_back()
    storage, progress = Storage(settings.storage), Progress(index)
    encode = replicas.encoder(info.name, settings.limits.request_timeout_s)

    def call(read: list[ReadImage]) -> list[np.ndarray | CellrayError]:
        return encode([one.image.pixels for one in read])

    pipeline = Pipeline[Entry, ReadImage, np.ndarray](
        read=lambda entry: images.read(storage, entry, info.image_size, settings.limits),
        call=call,
        cost=lambda entry: entry.cost + 3 * info.image_size**2,
        batch=batch,
        progress=progress,
    )
    with ShardWriter(storage, out, NAME, index, metadata) as writer:
        for done in pipeline.run(entries):
            progress.images += 1
            progress.bytes_read += done.source.size
            if isinstance(done.item, CellrayError):
                progress.errors += 1
                writer.add(dataset.ERRORS, dataset.error_row(done.source.uri, "read", done.item))
            elif isinstance(done.result, np.ndarray):
                made = embedding(done.item, done.result, info)
                pooled = made.pooled(info.patch)
                writer.add(dataset.EMBEDDINGS, dataset.embedding_row(made, done.source.uri, pooled, done.source.key))
                progress.encoder_calls += 1
            elif done.result is not None:
                progress.errors += 1
                writer.add(dataset.ERRORS, dataset.error_row(done.source.uri, "encode", done.result))
            if progress.images % batch == 0:
                yield measured(progress)
        record = writer.commit()
    progress.bytes_written = sum(file.bytes for file in record.files)
    yield measured(progress)


if __name__ == "__main__":
    sys.exit(main())
