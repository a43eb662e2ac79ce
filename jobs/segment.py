"""`python -m jobs.segment INPUT OUTPUT --model NAME`: images or stored embeddings → masks, as Parquet."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice

import numpy as np
import ray

from cluster import memory
from cluster.errors import CellrayError, InvalidInput, NotFound
from cluster.settings import Settings
from cluster.storage import Storage, absolute
from jobs import driver, images, prompts, replicas
from jobs.driver import Job
from jobs.embed import embedding, failed
from jobs.images import Entry, ReadImage
from jobs.plan import Listing, Plan
from jobs.prompts import ImagePrompts
from jobs.shards import Pipeline, Progress, measured, sound
from serve_app import dataset
from serve_app.contract import Embedding, ModelInfo
from serve_app.dataset import ShardWriter
from serve_app.model.masks import MaskSet
from serve_app.model.prompts import DecodeRequest, GridOptions, crops

NAME = "segment"
DESCRIPTION = """Write instance masks for the images of INPUT to OUTPUT, from prompts or from a grid of points.

With --embeddings the images are neither read nor encoded: their embeddings come from a data set of jobs.embed, matched
by the image's URI, and only decoder replicas are called. Without it each image is encoded on the way.

A prompt table is Parquet, CSV or JSONL with one row an object: image_uri (full, or relative to INPUT), and box
[x0, y0, x1, y1] and/or points [[x, y], …] with labels [1, 0, …], in pixels of the original image."""
EPILOG = """examples:
  python -m jobs.segment ~/plates out --model nano --embeddings out --grid 16
  python -m jobs.segment s3://in/plates s3://out/plates --model sam_vit_b --prompts s3://in/boxes.parquet
"""
DEFAULT_GRID = 32


@dataclass(frozen=True, slots=True)
class Source:
    """One image to segment: its prompts (None: the grid), and its embedding's (file, row) if that is stored."""

    entry: Entry
    prompts: ImagePrompts | None
    stored: tuple[str, int] | None


@dataclass(frozen=True)
class Options:
    """What is asked of the decoder; `grid` is None where there are prompts."""

    multimask: bool
    grid: GridOptions | None
    from_embeddings: bool


def main(argv: Sequence[str] | None = None) -> int:
    made = driver.parser(NAME, DESCRIPTION, EPILOG)
    made.add_argument("--embeddings", metavar="DATASET", help="an OUTPUT of jobs.embed by the same model's encoder")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--prompts", metavar="TABLE", help="boxes or points to segment; images without any are left out")
    what.add_argument(
        "--grid", type=int, metavar="N", help=f"find all objects from N × N points (default: {DEFAULT_GRID})"
    )
    made.add_argument("--multimask", action="store_true", help="with --prompts: three masks a prompt, not one")
    grid = made.add_argument_group("grid", "options of segment_anything's SamAutomaticMaskGenerator")
    for field in fields(GridOptions)[1:]:
        option, kind = "--" + field.name.replace("_", "-"), type(field.default)
        grid.add_argument(option, type=kind, default=field.default, metavar="X", help="(default: %(default).3g)")
    return driver.main(NAME, made, _run, argv)


def _run(job: Job) -> int:
    arguments = job.arguments
    options = _options(arguments)
    generation, before = driver.generation(job)
    entries = images.find(job.storage, job.input)
    table = prompts.read(job.storage, arguments.prompts, job.input) if arguments.prompts else None
    if table is not None:
        entries = _prompted(table, entries, job)
    if arguments.mode == driver.RETRY:
        entries = failed(before, entries)
    listing = Listing(islice(entries, arguments.limit), arguments.shard_images)
    info = replicas.connect(arguments.model)
    stored = _stored(job, info, listing) if arguments.embeddings else {}

    def sources(index: int) -> list[Source]:
        entries = listing.shard(index)
        return [Source(entry, table[entry.uri] if table else None, stored.get(entry.uri)) for entry in entries]

    facts = {
        "input": job.input,
        "listing": listing.fingerprint,
        "images": listing.images,
        "shard_images": arguments.shard_images,
        "model": info.name,
        "encoder_sha256": info.encoder_sha256,
        "decoder_sha256": info.decoder_sha256,
        "compute_dtype": info.dtype,
        "preprocess": info.preprocess,
        "embeddings": absolute(arguments.embeddings) if arguments.embeddings else None,
        "prompts": _hash(table) if table is not None else None,
        "multimask": options.multimask,
        "grid": asdict(options.grid) if options.grid else None,
        "mode": arguments.mode,
    }
    context = (info, arguments.batch, options)
    work = driver.Work(Plan(NAME, facts, generation), listing, sources, _shard, context)
    return driver.execute(job, work, info, replicas.running(info.name))


def _options(arguments: argparse.Namespace) -> Options:
    from_embeddings = arguments.embeddings is not None
    if arguments.prompts:
        return Options(arguments.multimask, None, from_embeddings)
    if arguments.multimask:
        raise InvalidInput("--multimask goes with --prompts; a grid always looks at three masks a point")
    given = {field.name: getattr(arguments, field.name) for field in fields(GridOptions)[1:]}
    grid = GridOptions(DEFAULT_GRID if arguments.grid is None else arguments.grid, **given)
    grid.check()
    if grid.crop_n_layers and from_embeddings:
        raise InvalidInput("--crop-n-layers needs the images' pixels: leave out --embeddings, which holds whole images")
    return Options(False, grid, from_embeddings)


def _prompted(table: dict[str, ImagePrompts], entries: Iterator[Entry], job: Job) -> Iterator[Entry]:
    """Those with prompts. Raises InvalidInput where there are prompts for others, before the first of them."""
    strangers, chosen = set(table), []
    for entry in entries:
        if entry.uri in table:
            strangers.discard(entry.uri)
            chosen.append(entry)
    if strangers:
        raise InvalidInput(
            f"{job.arguments.prompts} has prompts for {len(strangers)} images that are not under {job.input}, "
            f"e.g. {min(strangers)}"
        )
    return iter(chosen)


def _hash(table: dict[str, ImagePrompts]) -> str:
    text = json.dumps([(uri, table[uri].texts) for uri in sorted(table)])
    return hashlib.sha256(text.encode()).hexdigest()


def _stored(job: Job, info: ModelInfo, listing: Listing) -> dict[str, tuple[str, int]]:
    """Image URI → (embeddings file, row). Raises where nothing matches, or another encoder made the data set."""
    found = dataset.open(job.arguments.embeddings, job.storage)
    wanted = {entry.uri for index in range(len(listing)) for entry in listing.shard(index)}
    rows: dict[str, tuple[str, int]] = {}
    known = ""
    for uri, record in found.files(dataset.EMBEDDINGS):
        if record.encoder_sha256 != info.encoder_sha256:
            raise InvalidInput(
                f"{found.uri} was made by another encoder ({record.encoder_sha256[:12]}…) than that of {info.name} "
                f"({info.encoder_sha256[:12]}…): embed the images with {info.name} first"
            )
        names = found.read(uri, ["image_uri"])["image_uri"].to_pylist()
        for row, (image_uri, stands) in enumerate(zip(names, found.stands(record, names), strict=True)):
            known = image_uri
            if stands and image_uri in wanted:
                rows[image_uri] = uri, row
    if not rows:
        example = f"its images are like {known}" if known else "it holds no embeddings"
        raise NotFound(f"{found.uri} has none of the {listing.images} images of {job.input}: {example}")
    return rows


Item = tuple[Source, Embedding | ReadImage]
Embedded = tuple[Embedding, list[np.ndarray]]  # of the whole image, and of its crops
Answer = tuple[Embedding, MaskSet]


class _Segmenter:
    """Reads and segments sources; `read` and `call` are the two ends of a shard's pipeline."""

    def __init__(self, settings: Settings, info: ModelInfo, batch: int, options: Options) -> None:
        self.batch = batch
        self.storage, self.limits, self.info, self.options = Storage(settings.storage), settings.limits, info, options
        timeout_s = settings.limits.request_timeout_s
        self.encode = replicas.encoder(info.name, timeout_s)
        self.decode = replicas.decoder(info, timeout_s)
        self.automask = replicas.automask(info, options.grid, timeout_s) if options.grid else None

    def read(self, source: Source) -> Item:
        if not self.options.from_embeddings:
            return source, images.read(self.storage, source.entry, self.info.image_size, self.limits, self.options.grid)
        if source.stored is None:
            raise NotFound("its embedding is not in the data set: it failed there, or was added later")
        uri, row = source.stored
        return source, next(dataset.open_embeddings(self.storage, uri, [row]))

    def call(self, items: list[Item]) -> list[Answer | CellrayError]:
        embeddings = self._embed([item for _, item in items])
        pairs = zip((source for source, _ in items), embeddings, strict=True)
        ready = [(source, one) for source, one in pairs if not isinstance(one, CellrayError)]
        found = iter(self._segment(ready) if ready else [])
        answers: list[Answer | CellrayError] = []
        for one in embeddings:
            if isinstance(one, CellrayError):
                answers.append(one)
                continue
            masks = next(found)
            answers.append(masks if isinstance(masks, CellrayError) else (one[0], masks))
        return answers

    def _embed(self, items: list[Embedding | ReadImage]) -> list[Embedded | CellrayError]:
        """Stored embeddings as they are; images and their crops through the encoder, a batch at a time."""
        fresh = [item for item in items if isinstance(item, ReadImage)]
        pixels = [part for item in fresh for part in (item.image.pixels, *item.crops)]
        starts = range(0, len(pixels), self.batch)
        arrays = iter([array for start in starts for array in self.encode(pixels[start : start + self.batch])])
        results: list[Embedded | CellrayError] = []
        for item in items:
            if isinstance(item, Embedding):
                results.append((item, []))
                continue
            answers = list(islice(arrays, 1 + len(item.crops)))
            good = [one for one in answers if isinstance(one, np.ndarray)]
            failed = next((one for one in answers if isinstance(one, CellrayError)), None)
            results.append(failed or (embedding(item, good[0], self.info), good[1:]))
        return results

    def _segment(self, ready: list[tuple[Source, Embedded]]) -> list[MaskSet | CellrayError]:
        if self.automask and self.options.grid:
            return self.automask(
                [
                    (list(zip([one.array, *rest], crops(one.original, self.options.grid), strict=True)), one.original)
                    for _, (one, rest) in ready
                ]
            )
        return self.decode(
            [
                DecodeRequest(one.array, one.original, source.prompts.prompts, self.options.multimask)
                for source, (one, _) in ready
                if source.prompts is not None
            ]
        )


@ray.remote(num_cpus=1, max_retries=0)
def _shard(
    settings: Settings,
    out: str,
    info: ModelInfo,
    batch: int,
    options: Options,
    metadata: dict[str, str],
    index: int,
    sources: Sequence[Source],
    poisoned: frozenset[str],
) -> Iterator[Progress]:
    memory.give_back()
    progress = Progress(index)
    segmenter = _Segmenter(settings, info, batch, options)
    views = len(crops((info.image_size, info.image_size), options.grid)) if options.grid else 1
    held = views * (3 * info.image_size**2 + 2 * int(np.prod(info.embedding_shape)))

    def read(source: Source) -> Item:
        sound(source.entry, poisoned)
        return segmenter.read(source)

    pipeline = Pipeline[Source, Item, Answer](
        read, segmenter.call, lambda source: source.entry.cost + held, batch, progress
    )
    with ShardWriter(segmenter.storage, out, NAME, index, metadata) as writer:
        for done in pipeline.run(sources):
            progress.images += 1
            uri = done.source.entry.uri
            writer.supersede(uri)
            if isinstance(done.item, tuple) and isinstance(done.item[1], ReadImage):
                progress.encoder_calls += 1 + len(done.item[1].crops)
            if isinstance(done.item, CellrayError):
                progress.errors += 1
                writer.add(dataset.ERRORS, dataset.error_row(uri, "read", done.item))
            elif isinstance(done.result, CellrayError):
                progress.errors += 1
                writer.add(dataset.ERRORS, dataset.error_row(uri, "segment", done.result))
            elif done.result is not None:
                made, found = done.result
                texts, kind = _prompt_texts(done.source, found, options)
                writer.add(dataset.MASKS, dataset.mask_rows(found, made, uri, info.decoder_sha256, kind, texts))
                progress.masks += len(found)
            if progress.images % batch == 0:
                yield measured(progress)
        record = writer.commit()
    progress.bytes_written = sum(file.bytes for file in record.files)
    yield measured(progress)


def _prompt_texts(source: Source, found: MaskSet, options: Options) -> tuple[dict[int, str], str]:
    """Each mask's prompt as JSON, by prompt index, and the kind."""
    if source.prompts is not None:
        return dict(enumerate(source.prompts.texts)), source.prompts.type
    assert options.grid is not None
    whole, *parts = crops(found.size, options.grid)
    asked = [({"points": point, "labels": [1]}) for point in whole.points().tolist()]
    for crop in parts:
        x0, y0, x1, y1 = crop.box
        box = [x0, y0, x1 - x0, y1 - y0]
        asked += [{"points": point, "labels": [1], "crop_box": box} for point in crop.points().tolist()]
    return {int(index): json.dumps(asked[index]) for index in found.prompt_index}, "grid"


if __name__ == "__main__":
    sys.exit(main())
