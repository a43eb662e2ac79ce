"""`python -m jobs.segment INPUT OUTPUT --model NAME`: images or stored embeddings → masks, as Parquet."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from cluster import memory
from cluster.errors import CellrayError, InvalidInput, InvalidPrompt, NotFound
from cluster.settings import Settings
from cluster.storage import Storage, absolute
from jobs import driver, images, prompts, replicas
from jobs.cells import Image, shard
from jobs.driver import Job
from jobs.embed import embedding, failed
from jobs.images import Entry
from jobs.parts import Part, ReadImage, cost, expanded, name_of, only_part
from jobs.plan import Listing, Plan
from jobs.prompts import ImagePrompts
from jobs.shards import TASK_CPUS, Done, Pipeline, Progress, sound, written
from jobs.stored import FAILED, Row, StoredEmbeddings
from jobs.views import View
from serve_app import dataset
from serve_app.commit import ShardWriter
from serve_app.contract import Embedding, ModelInfo
from serve_app.model import cellsam, masks, tiles
from serve_app.model.cellsam import Options as CellOptions
from serve_app.model.masks import MaskSet
from serve_app.model.prompts import DecodeRequest, GridOptions, crops

NAME = "segment"
DESCRIPTION = """Write instance masks for the images of INPUT to OUTPUT: of every cell with a CellSAM model, else from
prompts or from a grid of points.

With --embeddings the images are neither read nor encoded: their embeddings come from a data set of jobs.embed, matched
by the image's URI, and only decoder replicas are called. Without it each image is encoded on the way.

A prompt table is Parquet, CSV or JSONL with one row an object: image_uri (full, or relative to INPUT), and box
[x0, y0, x1, y1] and/or points [[x, y], …] with labels [1, 0, …], in pixels of the original image."""
EPILOG = """examples:
  python -m jobs.segment ~/plates out --model nano --embeddings out --grid 16
  python -m jobs.segment s3://in/plates s3://out/plates --model sam_vit_b --prompts s3://in/boxes.parquet
  python -m jobs.segment s3://in/slides s3://out/slides --model cellsam_general --bbox-threshold 0.3
"""
DEFAULT_GRID = 32
CELLS = {  # options of CellSAM's pipeline
    "bbox_threshold": "score of boxes, 0 to 1: lower finds more cells; the threshold moves with each image's scores",
    "low_contrast_enhancement": "brighten images of little contrast first",
    "use_wsi": "cut images larger than --block-size into tiles",
    "gauge_cell_size": "images whose median cell is large are done again as a whole, after their tiles",
    "block_size": "of tiles, a side in pixels, to which --overlap is added on all sides",
    "iou_threshold": "of what two tiles see: from it on, cells across their seam are one",
    "compat": "as CellSAM's own pipeline does it where this does better, at the images' borders above all",
}


@dataclass(frozen=True, slots=True)
class Source:
    """One image to segment, or a part of it: its prompts (None: the grid), and its embeddings if those are stored."""

    entry: Entry
    prompts: ImagePrompts | None
    stored: Sequence[Row] = ()
    part: Part | None = None


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
    found = made.add_argument_group(
        "cells", "of a CellSAM model, without --prompts and --grid: options of its own pipeline, and --overlap (56)"
    )
    for name, about in CELLS.items():
        option, default = "--" + name.replace("_", "-"), getattr(CellOptions, name)
        if isinstance(default, bool):
            found.add_argument(option, action=argparse.BooleanOptionalAction, help=f"{about} (default: {default})")
        else:
            found.add_argument(option, type=type(default), metavar="X", help=f"{about} (default: {default:g})")
    return driver.main(NAME, made, _run, argv)


def _run(job: Job) -> int:
    arguments = job.arguments
    given = {name: value for name in (*CELLS, "overlap") if (value := getattr(arguments, name)) is not None}
    info = cells = None
    if arguments.prompts is None and arguments.grid is None and arguments.embeddings is None:
        info = replicas.connect(arguments.model)
        cells = CellOptions(**given) if replicas.finds_cells(info.name) else None
    options = _options(arguments, given, cells)
    generation, before = driver.generation(job)
    entries = images.find(job.storage, job.input, driver.view(arguments))
    table = prompts.read(job.storage, arguments.prompts, job.input) if arguments.prompts else None
    if table is not None:
        entries = _prompted(table, entries, job)
    if arguments.mode == driver.RETRY:
        entries = failed(before, entries)
    listing = Listing(islice(entries, arguments.limit), arguments.shard_images)
    info = info or replicas.connect(arguments.model)
    stored = None
    if arguments.embeddings:
        stored = StoredEmbeddings(arguments.embeddings, job.storage, info, listing, job.input)

    def sources(index: int) -> list[Source]:
        return [
            Source(
                entry,
                table[entry.uri] if table else None,
                stored.of(dataset.printable(entry.uri)) if stored else (),
            )
            for entry in listing.shard(index)
        ]

    facts: dict[str, Any] = {
        "input": job.input,
        "view": driver.view(arguments),
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
    if cells:
        facts |= {"detector_sha256": info.detector_sha256, "cells": asdict(cells), "preprocess": cellsam.PREPROCESS}
        found = driver.Work(
            Plan(NAME, facts, generation),
            listing,
            lambda index: [Image(entry) for entry in listing.shard(index)],
            shard,
            (info, arguments.batch, cells),
        )
        return driver.execute(job, found, replace(info, preprocess=cellsam.PREPROCESS), replicas.running(info.name))
    context = (info, arguments.batch, options)
    work = driver.Work(Plan(NAME, facts, generation), listing, sources, _shard, context)
    return driver.execute(job, work, info, replicas.running(info.name))


def _options(arguments: argparse.Namespace, given: dict[str, Any], cells: CellOptions | None) -> Options:
    """Raises InvalidInput: they do not go together; `given` are those of `cells`."""
    if cells:
        cells.check()
        if arguments.multimask or arguments.tile:
            raise InvalidInput("--multimask and --tile go with prompts or a grid; of cells the tiles are --block-size")
        return Options(False, None, False)
    for name in given:
        if name != "overlap":
            raise InvalidInput(
                f"--{name.replace('_', '-')} goes with a model that finds cells, as cellsam_general does, and without "
                "--prompts, --grid and --embeddings"
            )
    from_embeddings = arguments.embeddings is not None
    if from_embeddings and driver.view(arguments):
        raise InvalidInput(
            "--embeddings has the planes, channels and tiles that it was made of: leave those options out"
        )
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


def _parts_of(source: Source) -> Iterator[Source]:
    """An image whose parts have embeddings, part by part, planes together; one that is whole as it is."""
    if not any(part for _, _, part in source.stored):
        yield source
        return
    planes: dict[View, list[tuple[tuple[int, ...], Row]]] = {}
    for one in source.stored:
        view = View.parse(one[2])
        planes.setdefault(replace(view, xywh=""), []).append((view.numbers("xywh") if view.xywh else (), one))
    for number, (plane, rows) in enumerate(planes.items(), 1):
        rows.sort(key=lambda row: row[0][1::-1])
        boxes = tuple((x, y, width, height) for box, _ in rows if box for x, y, width, height in [box])
        for index, (_, one) in enumerate(rows):
            last = index + 1 == len(rows)
            part = Part(source.entry, plane, boxes, index, last, last and number == len(planes))
            yield replace(source, stored=[one], part=part)


Item = tuple[Source, Embedding | ReadImage] | None  # None: a tile without prompts
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

    def parts(
        self, sources: Sequence[Source], pipeline: Pipeline[Source, Any, Any], poisoned: frozenset[str]
    ) -> Iterator[Source]:
        """Part by part; a tile with the prompts that are for it."""
        if self.options.from_embeddings:
            found: Iterable[Source] = (part for source in sources for part in _parts_of(source))
        else:
            found = expanded(sources, lambda entry: pipeline.persist(lambda: self._fetch(entry)), self.limits, poisoned)
        for source in found:
            if source.prompts is not None and source.part is not None and source.part.tiles:
                yield replace(source, prompts=source.prompts.within(source.part.tiles, source.part.index))
            else:
                yield source

    def _fetch(self, entry: Entry) -> bytes:
        return images.content(self.storage, entry, self.limits.image_bytes)

    def read(self, source: Source) -> Item:
        if source.prompts is not None and not source.prompts.texts:
            return None
        if not self.options.from_embeddings:
            part = source.part or only_part(source.entry, self._fetch(source.entry), self.limits)
            return source, part.read(self.info.image_size, self.options.grid)
        if not source.stored or source.stored[0][1] == FAILED:
            raise NotFound("its embedding is not in the data set: it failed there, or was added later")
        ((uri, row, _),) = source.stored
        return source, next(dataset.open_embeddings(self.storage, uri, [row]))

    def call(self, items: list[Item]) -> list[Answer | CellrayError | None]:
        there = [item for item in items if item is not None]
        embeddings = self._embed([item for _, item in there])
        pairs = zip((source for source, _ in there), embeddings, strict=True)
        ready = [(source, one) for source, one in pairs if not isinstance(one, CellrayError)]
        found, made = iter(self._segment(ready) if ready else []), iter(embeddings)
        answers: list[Answer | CellrayError | None] = []
        for one in (None if item is None else next(made) for item in items):
            if one is None or isinstance(one, CellrayError):
                answers.append(one)
                continue
            seen = next(found)
            answers.append(seen if isinstance(seen, CellrayError) else (one[0], seen))
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


@ray.remote(num_cpus=TASK_CPUS, max_retries=0)
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
    memory.share()
    progress = Progress(index)
    segmenter = _Segmenter(settings, info, batch, options)
    views = len(crops((info.image_size, info.image_size), options.grid)) if options.grid else 1
    held = views * (3 * info.image_size**2 + 2 * int(np.prod(info.embedding_shape)))

    def read(source: Source) -> Item:
        sound(source.entry, poisoned)
        return segmenter.read(source)

    pipeline = Pipeline[Source, Item, Answer | None](
        read, segmenter.call, lambda source: cost(source) + held, batch, progress
    )
    with ShardWriter(segmenter.storage, out, NAME, index, metadata) as writer:
        pieces: list[Piece] = []

        def add(done: Done[Source, Item, Answer | None]) -> int:
            source, part = done.source, done.source.part
            writer.supersede(source.entry.uri)
            if isinstance(done.item, tuple) and isinstance(done.item[1], ReadImage):
                progress.encoder_calls += 1 + len(done.item[1].crops)
            errors = _beyond_tiles(source) if part and part.index == 0 else []
            for row in errors:
                writer.add(dataset.ERRORS, row)
            if isinstance(done.result, tuple):
                pieces.append((source, *done.result))
            if (part is None or part.last) and pieces:
                writer.add(dataset.MASKS, made := _rows(pieces, info, options))
                progress.masks += len(made)
                pieces.clear()
            return len(errors)

        yield from written(pipeline, segmenter.parts(sources, pipeline, poisoned), writer, "segment", add)


def _beyond_tiles(source: Source) -> list[pa.Table]:
    """Errors of a plane's prompts that are for no tile."""
    if source.prompts is None or source.part is None or not source.part.tiles:
        return []
    side, found = max(source.part.tiles[0][2:]), []
    for text in source.prompts.left_out:
        error = InvalidPrompt(
            f"{text} lies in no tile of {side} px: outside the image, or larger than --overlap lets be whole in one"
        )
        found.append(dataset.error_row(source.entry.uri, "segment", error, source.part.plane.part))
    return found


Piece = tuple[Source, Embedding, MaskSet]  # of a plane: the whole, or a tile


def _rows(pieces: list[Piece], info: ModelInfo, options: Options) -> pa.Table:
    """A plane's masks, in its own coordinates."""
    source, _, found = pieces[0]
    owner = np.zeros(len(found), int)
    if source.part is not None and source.part.tiles:
        placed = [(one, piece.part.box) for piece, _, one in pieces if piece.part and piece.part.box]
        if options.grid:
            found, owner = tiles.merged(placed, source.part.whole)
        else:
            parts = [masks.place(one, box[:2], source.part.whole) for one, box in placed]
            found = MaskSet.join(source.part.whole, parts, info.channels)
            owner = np.repeat(np.arange(len(parts)), [len(one) for one in parts])
    texts = [_prompt_texts(piece, one, options) for piece, _, one in pieces]
    return dataset.mask_rows(
        found,
        [pieces[place][1] for place in owner],
        source.entry.uri,
        source.part.plane.part if source.part else name_of(source),
        info.decoder_sha256,
        "grid" if source.prompts is None else source.prompts.type,
        [texts[place][prompt] for place, prompt in zip(owner, found.prompt_index, strict=True)],
    )


def _prompt_texts(source: Source, found: MaskSet, options: Options) -> dict[int, str]:
    """Each mask's prompt as JSON, by prompt index, in coordinates of the plane."""
    if source.prompts is not None:
        return dict(enumerate(source.prompts.texts))
    assert options.grid is not None
    corner = np.array(source.part.corner if source.part else (0, 0))
    whole, *parts = crops(found.size, options.grid)
    asked = [({"points": point, "labels": [1]}) for point in (whole.points() + corner).tolist()]
    for crop in parts:
        x0, y0, x1, y1 = crop.box
        box = [x0 + int(corner[0]), y0 + int(corner[1]), x1 - x0, y1 - y0]
        points = (crop.points() + corner).tolist()
        asked += [{"points": point, "labels": [1], "crop_box": box} for point in points]
    return {int(index): json.dumps(asked[index]) for index in found.prompt_index}


if __name__ == "__main__":
    sys.exit(main())
