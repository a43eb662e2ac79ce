"""Whole slides: windows of a TIFF that is too large to hold, from a local file.

    with Slide(path, max_pixels) as slide:
        slide.size                                    # (height, width)
        slide.read(slice(0, 512), slice(512, 1024))   # [512, 512, 1 to 3] of the type that they are kept in

A window is what `preprocess.samples` has there. Only strips and tiles that it touches are decoded, and the last ones
are kept: who goes row by row, with windows of some rows that touch no more than CACHE_BYTES of them, has each decoded
about once. What Pillow and NumPy decode is read; of whole slides' usual compressions that leaves out JPEG 2000 alone.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np

from cluster.errors import CellrayError, InvalidImage, UnsupportedImage
from serve_app.model import planes, preprocess, segments
from serve_app.model.planes import Channels, Stack
from serve_app.model.preprocess import Size
from serve_app.model.segments import Cache, Page

CACHE_BYTES = 256 << 20  # of decoded strips and tiles


class Slide:
    """A TIFF file on this machine, read by windows, by several threads at a time.

    z, t, channels: which plane of several, and which of its channels as colours, as `planes.Stack` reads them; without
    any the first page as it is.

    Raises:
        TooLarge: more than `max_pixels`, or strips or tiles of more than segments.SEGMENT_BYTES. InvalidImage: damaged.
        UnsupportedImage: no TIFF, or of a compression or layout that is not read by windows.
    """

    def __init__(
        self,
        path: Path,
        max_pixels: int,
        z: int | None = None,
        t: int | None = None,
        channels: Channels = (),
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.map = mapped(path)
        try:
            self.cache = Cache(cache_bytes)
            self.pages: dict[int, Page] = {}
            self._open(max_pixels, z, t, channels)
        except CellrayError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise InvalidImage(f"the TIFF is damaged: {error}") from error

    def _open(self, max_pixels: int, z: int | None, t: int | None, channels: Channels) -> None:
        import tifffile

        self.chosen: list[tuple[Page, int]] = []
        self.colours = tuple(colour for colour, _ in channels)
        if z is None and t is None and not channels:
            with tifffile.TiffFile(cast(Any, self.map)) as file:
                first = self._page(file, file.pages.first, max_pixels)
        else:
            stack = Stack(self.map, max_pixels)
            for page, sample in stack.places(z or 0, t or 0, channels):
                self.chosen.append((self._page(stack.file, page, max_pixels), sample))
            first = self.chosen[0][0]
        self.size: Size = first.size
        if any(page.size != self.size for page, _ in self.chosen):
            raise UnsupportedImage("the TIFF's channels are of several sizes")

    def _page(self, file: Any, page: Any, max_pixels: int) -> Page:
        if page.offset not in self.pages:
            self.pages[page.offset] = Page(file, page, self.map, self.cache, max_pixels)
        return self.pages[page.offset]

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """[h, w, 1 to 3] of the type that they are kept in: of what the slices have of the image, as of an array.

        Raises:
            InvalidImage: damaged there, cut short, or with values that are not finite. UnsupportedImage: compressed in
            a way that is not read.
        """
        (top, bottom, _), (left, right, _) = rows.indices(self.size[0]), columns.indices(self.size[1])
        window = slice(top, max(top, bottom)), slice(left, max(left, right))
        if not self.chosen:
            (page,) = self.pages.values()
            found = page.shown(*window)
        else:
            read = [page.read(*window, [sample]) for page, sample in self.chosen]
            found = planes.coloured(self.colours, read) if self.colours else np.concatenate(read, axis=2)
        preprocess.check_finite(found)
        return found

    def close(self) -> None:
        self.pages, self.chosen, self.cache = {}, [], Cache(0)
        with suppress(BufferError):  # somebody reads: it goes with the last array
            self.map.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def mapped(path: Path) -> mmap.mmap:
    """A TIFF's bytes, and its first page's tags looked at. Raises as `Slide`."""
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise InvalidImage("the file is empty") from error
    try:
        if data[:4] not in preprocess.TIFFS:
            raise UnsupportedImage("only TIFFs are read by windows: re-save the image as a tiled TIFF")
        lengths = {tag: length for tag, (length, _) in preprocess.first_page(data).items()}
        count = max(lengths.get(tag, 0) for tag in (preprocess.STRIPS, preprocess.TILES))
        if count > segments.MAX_SEGMENTS or max(lengths.values(), default=0) > segments.MAX_VALUES:
            raise segments.too_many(count)
    except CellrayError:
        data.close()
        raise
    return data
