"""From an image's file in memory to the parts of it that become rows, and their pixels as a model takes them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from cluster import watch
from cluster.errors import CellrayError, InvalidImage
from cluster.settings import Limits
from jobs.images import Entry
from jobs.views import EACH, View
from serve_app import contract
from serve_app.model import planes, preprocess, tiles
from serve_app.model.planes import Stack
from serve_app.model.preprocess import ModelImage, Size
from serve_app.model.prompts import GridOptions, crops
from serve_app.model.tiles import Box


class File:
    """An image's file in memory, decoded a plane at a time, for several threads.

    Raises what `preprocess.decode` does, here or in `pixels`.
    """

    def __init__(self, data: bytes, view: View, max_pixels: int) -> None:
        self.view, self.max_pixels, self.data = view, max_pixels, data
        self.chosen = planes.channels(view.channels) if view.channels else ()
        with watch.ending():
            self.stack = Stack(data, max_pixels) if view.channels or view.t or view.z else None
        self.lock = threading.Lock()
        self.kept: tuple[View, np.ndarray] | None = None

    @property
    def plain(self) -> bool:
        """Whether all that is asked for is the first page as it is."""
        return self.stack is None and not self.view.crop

    @property
    def depths(self) -> tuple[int, int]:
        """(z, t) planes."""
        return self.stack.depths if self.stack else (1, 1)

    def pixels(self, plane: View) -> np.ndarray:
        """[height, width, 3] uint8 RGB of a plane, or its crop."""
        with self.lock:
            if self.kept is None or self.kept[0] != plane:
                with watch.ending():
                    self.kept = plane, self._decoded(plane)
            return self.kept[1]

    def _decoded(self, plane: View) -> np.ndarray:
        if self.stack:
            return _cropped(self.stack.plane(int(plane.z or 0), int(plane.t or 0), self.chosen), plane)
        return _cropped(preprocess.decode(self.data, self.max_pixels), plane)

    def samples(self, plane: View) -> np.ndarray:
        """[height, width, 1 to 3] of a plane, or its crop, in the type that they are kept in."""
        with self.lock:
            if self.stack:
                return _cropped(self.stack.samples(int(plane.z or 0), int(plane.t or 0), self.chosen), plane)
            return _cropped(preprocess.samples(self.data, self.max_pixels), plane)

    def planes(self) -> list[View]:
        """What the view asks for, in order of t and z, without tiles."""
        depths = zip((self.view.z, self.view.t), self.depths, strict=True)
        chosen = [list(map(str, range(depth))) if asked == EACH else [asked] for asked, depth in depths]
        return [replace(self.view, z=z, t=t, tile="") for t in chosen[1] for z in chosen[0]]


def _cropped(pixels: np.ndarray, plane: View) -> np.ndarray:
    if not plane.crop:
        return pixels
    x, y, width, height = crop_of(plane, (pixels.shape[0], pixels.shape[1]))
    return np.ascontiguousarray(pixels[y : y + height, x : x + width])


def crop_of(plane: View, size: Size) -> Box:
    """Raises InvalidImage: it is empty, or leaves the image of `size`."""
    x, y, width, height = plane.numbers("crop")
    if x + width > size[1] or y + height > size[0] or not width * height:
        raise InvalidImage(
            f"the crop {plane.crop} (x,y,width,height) is empty or leaves the image of {size[1]} × {size[0]} pixels"
        )
    return x, y, width, height


@dataclass(frozen=True, slots=True)
class ReadImage:
    """An image in memory: its content's id, and the pixels for the model, of the whole and of crops if asked for."""

    image_id: str
    image: ModelImage
    crops: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Part:
    """What becomes a row. `plane` is its view without a tile; `tiles` are the whole plane's where it is in tiles, and
    `index` is this one's place among them. `last` of its plane, and `ends` its image. `error`: it cannot be had."""

    entry: Entry
    plane: View
    tiles: tuple[Box, ...] = ()
    index: int = 0
    last: bool = True
    ends: bool = True
    file: File | None = field(default=None, repr=False)
    error: CellrayError | None = None

    @property
    def box(self) -> Box | None:
        return self.tiles[self.index] if self.tiles else None

    @property
    def corner(self) -> tuple[int, int]:
        """(x, y) in the plane."""
        return self.box[:2] if self.box else (0, 0)

    @property
    def name(self) -> str:
        """As in the column `part`."""
        return replace(self.plane, xywh=",".join(map(str, self.box or ()))).part

    @property
    def whole(self) -> Size:
        """(height, width) of the plane, where it is in tiles."""
        return max(y + height for _, y, _, height in self.tiles), max(x + width for x, _, width, _ in self.tiles)

    def image_id(self) -> str:
        """Raises `error`."""
        return contract.image_id(self._file.data, str(replace(View.parse(self.name), crop=self.plane.crop)))

    def read(self, image_size: int, grid: GridOptions | None = None) -> ReadImage:
        """Decode and resize, and cut the crops that `grid` lays over it. Raises what `File` does, and `error`."""
        file = self._file
        if file.plain and not self.box and not grid:
            with watch.ending():
                return ReadImage(self.image_id(), preprocess.prepare(file.data, image_size, file.max_pixels))
        pixels = file.pixels(self.plane)
        if self.box:
            x, y, width, height = self.box
            pixels = np.ascontiguousarray(pixels[y : y + height, x : x + width])
        looked = crops((pixels.shape[0], pixels.shape[1]), grid)[1:] if grid else []
        image = preprocess.resize(pixels, image_size)
        return ReadImage(self.image_id(), image, tuple(crop.cut(pixels, image_size) for crop in looked))

    @property
    def _file(self) -> File:
        if self.error or self.file is None:
            raise self.error or InvalidImage("it was not read")
        return self.file


def parts(entry: Entry, data: bytes, limits: Limits) -> Iterator[Part]:
    """What an image's file holds, planes in order of t and z, each plane's tiles by rows; one part at least. Of what
    cannot be read there is one part, whose `read` says why."""
    view = View.parse(entry.view)
    try:
        file = File(data, view, limits.image_pixels)
    except CellrayError as error:
        yield Part(entry, replace(view, tile=""), error=error)
        return
    places = file.planes()
    for number, plane in enumerate(places, 1):
        boxes = _boxes(file, plane, view)
        for index in range(max(1, len(boxes))):
            last = index + 1 >= len(boxes)
            yield Part(entry, plane, boxes, index, last, last and number == len(places), file)


def _boxes(file: File, plane: View, view: View) -> tuple[Box, ...]:
    """Empty where the plane is no larger than a tile, or cannot be read."""
    if not view.tile:
        return ()
    side, overlap = view.numbers("tile")
    try:
        height, width = file.pixels(plane).shape[:2]
    except CellrayError:
        return ()
    return tuple(tiles.boxes((height, width), side, overlap)) if max(height, width) > side else ()


Source = TypeVar("Source", bound=Any)  # with an `entry` and a `part`: the latter None until it is known


def expanded(
    sources: Sequence[Source], fetch: Callable[[Entry], bytes], limits: Limits, but: frozenset[str]
) -> Iterator[Source]:
    """Those that may be several parts, part by part; the others, and those whose URI is in `but`, as they are."""
    for source in sources:
        entry: Entry = source.entry
        if not View.parse(entry.view).several or entry.uri in but:
            yield source
            continue
        try:
            found = parts(entry, fetch(entry), limits)
        except CellrayError as error:
            if error.retry:
                raise
            found = iter([Part(entry, replace(View.parse(entry.view), tile=""), error=error)])
        for part in found:
            yield replace(source, part=part)


def only_part(entry: Entry, data: bytes, limits: Limits) -> Part:
    """Of an image whose view asks for no more."""
    return next(parts(entry, data, limits))


def name_of(source: Any) -> str:
    """As in the column `part`: of a source that is a part, or whose entry asks for one."""
    return str(source.part.name if source.part else View.parse(source.entry.view).part)


def cost(source: Any) -> int:
    """Bytes to reckon with while a source is in flight; the parts of a file share it."""
    part: Part | None = source.part
    return int(source.entry.cost) if part is None or part.index == 0 else 0


def pixels(data: bytes, crop: str, part: str, max_pixels: int) -> np.ndarray:
    """[h, w, 3] uint8 RGB of what a row is about, from its image's file. Raises what `File` does."""
    view = replace(View.parse(part), crop=crop)
    plane = replace(view, xywh="")
    found = File(data, plane, max_pixels).pixels(plane)
    x, y, width, height = view.numbers("xywh") if view.xywh else (0, 0, found.shape[1], found.shape[0])
    return found[y : y + height, x : x + width]
