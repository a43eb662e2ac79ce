"""Every cell of the images: what `jobs.segment` does with a CellSAM, unless it is given prompts or a grid.

Images go through tile by tile, as many at a time as replicas are kept busy by, and their cells come out as rows as soon
as no further tile can have a part of them: an image may be of any size. Those that are too large to be held are copied
to this node's temporary folder and read by windows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray

from cluster import memory, watch
from cluster.errors import CellrayError, InvalidImage, TooLarge
from cluster.scratch import Scratch
from cluster.settings import Limits, Settings
from cluster.storage import Storage
from jobs import images, replicas
from jobs.images import Entry
from jobs.parts import File, Part, crop_of
from jobs.shards import TASK_CPUS, Done, Pipeline, Progress, ahead, sound, written
from jobs.views import EACH, View
from serve_app import contract, dataset
from serve_app.commit import ShardWriter
from serve_app.contract import Made, ModelInfo
from serve_app.model import cell_masks, planes, seams
from serve_app.model.cell_masks import Cell, Cells
from serve_app.model.cellsam import Options, Pixels, Windows
from serve_app.model.preprocess import Size
from serve_app.model.seams import Seams, Tile
from serve_app.model.slides import Slide

PROMPT_TYPE = "cells"
PIXEL_BYTES = 24  # of CellSAM's pixels, which travel to two replicas
Item = tuple[np.ndarray, float]  # a tile's pixels [h, w, 3] float32, and its image's threshold for boxes


@dataclass(frozen=True, slots=True)
class Image:
    """What a shard is given."""

    entry: Entry


@dataclass
class Plane:
    """A plane of an image, open, and how far its cells are. `error` where it cannot be read; it has one tile then."""

    entry: Entry
    view: View
    ends: bool  # the last of its image
    image_id: str = ""
    pixels: Pixels | None = None
    places: list[Tile] = field(default_factory=list)
    joining: Seams | None = None
    error: CellrayError | None = None
    count: int = 0  # of its masks
    held: list[Cell] = field(default_factory=list)  # until it is clear that tiles will do
    closing: ExitStack = field(default_factory=ExitStack)

    def tiles(self) -> Iterator[TileSource]:
        """Row by row; one at least."""
        last = max(1, len(self.places)) - 1
        cores = tuple(_box(place.core) for place in self.places) if last else ()
        for index in range(last + 1):
            part = Part(self.entry, self.view, cores, index, index == last, self.ends and index == last)
            yield TileSource(self.entry, part, self)

    def read(self, index: int) -> Item:
        """Raises `error`, and what reading a tile does."""
        if self.error or self.pixels is None:
            raise self.error or InvalidImage("it was not read")
        return self.pixels.tile(self.places[index].seen), self.pixels.bbox_threshold


@dataclass(frozen=True, slots=True)
class TileSource:
    entry: Entry
    part: Part
    plane: Plane

    @property
    def pixels(self) -> int:
        if not self.plane.places:
            return 0
        rows, columns = self.plane.places[self.part.index].seen
        return (rows.stop - rows.start) * (columns.stop - columns.start)


@dataclass(frozen=True)
class Window:
    """A crop of an image in windows, as such a one."""

    image: Windows
    corner: tuple[int, int]  # x, y
    size: Size

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        x, y = self.corner
        return self.image.read(slice(rows.start + y, rows.stop + y), slice(columns.start + x, columns.stop + x))


def opened(storage: Storage, entry: Entry, limits: Limits, options: Options) -> list[Plane]:
    """An image's planes, in order of t and z, ready to be read tile by tile.

    Raises:
        CellrayError: the storage's; that of an image is in its only plane.
    """
    try:
        return _opened(storage, entry, limits, options)
    except CellrayError as error:
        if error.retry:
            raise
        return [Plane(entry, replace(View.parse(entry.view), tile=""), True, error=error)]


def _opened(storage: Storage, entry: Entry, limits: Limits, options: Options) -> list[Plane]:
    view = View.parse(entry.view)
    try:
        data = images.content(storage, entry, limits.image_bytes)
        with watch.ending():
            file = File(data, view, limits.image_pixels)
            found = file.planes()
            digest = contract.image_id(data)
            return [
                _plane(entry, plane, number == len(found), digest, file.samples(plane), options)
                for number, plane in enumerate(found, 1)
            ]
    except TooLarge:
        if entry.container or EACH in (view.z, view.t):
            raise
    return [_slide(storage, entry, limits, options)]


def _plane(entry: Entry, view: View, ends: bool, digest: str, image: np.ndarray | Windows, options: Options) -> Plane:
    pixels = Pixels(image, options)
    places = seams.tiles(pixels.size, options)
    image_id = contract.part_id(digest, str(view))
    return Plane(entry, view, ends, image_id, pixels, places, Seams(places, options))


def _slide(storage: Storage, entry: Entry, limits: Limits, options: Options) -> Plane:
    view, scratch = replace(View.parse(entry.view), tile=""), Scratch()
    with ExitStack() as closing:
        closing.callback(scratch.close)
        path = scratch.path / Path(images.file_uri(entry)).name
        digest = storage.fetch(images.file_uri(entry), path, limits.slide_bytes)
        z, t = (int(number) if number else None for number in (view.z, view.t))
        chosen = planes.channels(view.channels) if view.channels else ()
        slide = closing.enter_context(Slide(path, limits.slide_pixels, z, t, chosen))
        image: Windows = slide
        if view.crop:
            x, y, width, height = crop_of(view, slide.size)
            image = Window(slide, (x, y), (height, width))
        made = _plane(entry, view, True, digest, image, options)
        made.closing = closing.pop_all()
        return made


def _box(place: tuple[slice, slice]) -> tuple[int, int, int, int]:
    rows, columns = place
    return columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start


@ray.remote(num_cpus=TASK_CPUS, max_retries=0)
def shard(
    settings: Settings,
    out: str,
    info: ModelInfo,
    batch: int,
    options: Options,
    metadata: dict[str, str],
    index: int,
    sources: Sequence[Image],
    poisoned: frozenset[str],
) -> Iterator[Progress]:
    memory.share()
    storage, progress = Storage(settings.storage), Progress(index)
    segment = replicas.cells(info, settings.limits.request_timeout_s)

    def read(source: TileSource) -> Item:
        return source.plane.read(source.part.index)

    embedded = 2 * int(np.prod(info.embedding_shape))
    pipeline = Pipeline[TileSource, Item, Cells](
        read, segment, lambda one: one.pixels * PIXEL_BYTES + embedded, batch, progress
    )
    slides = ExitStack()

    def prepared(image: Image) -> list[Plane]:
        try:
            sound(image.entry, poisoned)
        except CellrayError as error:
            return [Plane(image.entry, View.parse(image.entry.view), True, error=error)]
        found: list[Plane] = pipeline.persist(lambda: opened(storage, image.entry, settings.limits, options))
        for plane in found:
            slides.callback(plane.closing.close)
        return found

    def tiles() -> Iterator[TileSource]:
        for found in ahead(sources, prepared):
            for plane in found:
                yield from plane.tiles()

    with slides, ShardWriter(storage, out, "segment", index, metadata) as writer:

        def write(plane: Plane, cells: Sequence[Cell]) -> None:
            if cells and plane.pixels:
                writer.add(dataset.MASKS, _rows(plane, cells, info))
                plane.count += len(cells)
                progress.masks += len(cells)

        def add(done: Done[TileSource, Item, Cells]) -> int:
            plane, part, failures = done.source.plane, done.source.part, 0
            writer.supersede(plane.entry.uri)
            if plane.joining and plane.pixels:
                progress.encoder_calls += 1
                found = plane.joining.add(done.result if isinstance(done.result, Cells) else None)
                if options.gauge_cell_size and len(plane.places) > 1:
                    plane.held += found
                    if part.last:
                        failures = again(plane)
                else:
                    write(plane, found)
            if part.last:
                plane.closing.close()
            if part.ends:
                progress.bytes_read += plane.entry.size
            return failures

        def again(plane: Plane) -> int:
            """As a whole, where cells are large; else those of the tiles. → how many errors there were."""
            pixels = plane.pixels
            assert pixels is not None
            areas = np.array([cell.mask.sum() for cell in plane.held if cell.mask is not None])
            if not isinstance(pixels.image, np.ndarray) or not seams.too_large(areas, pixels.size, options):
                write(plane, plane.held)
                return 0
            ready = pixels.tile(pixels.whole)
            (found,) = pipeline.persist(lambda: segment([(ready, pixels.bbox_threshold)]))
            if isinstance(found, CellrayError):
                writer.add(dataset.ERRORS, dataset.error_row(plane.entry.uri, "segment", found, plane.view.part))
                return 1
            write(plane, found.within(pixels.whole))
            return 0

        yield from written(pipeline, tiles(), writer, "segment", add)


def _rows(plane: Plane, cells: Sequence[Cell], info: ModelInfo) -> pa.Table:
    assert plane.pixels
    there = [cell for cell in cells if cell.mask is not None]
    found = cell_masks.outlined(there, plane.pixels.size)
    made = Made.of(plane.image_id, info)
    prompts = [json.dumps({"box": [round(float(side), 2) for side in cell.box]}) for cell in there]
    scores = [cell.box_score for cell in there]
    return dataset.mask_rows(
        found,
        [made] * len(found),
        plane.entry.uri,
        plane.view.part,
        info.decoder_sha256,
        PROMPT_TYPE,
        prompts,
        scores,
        plane.count,
    )
