"""A page of a TIFF file, strip by strip or tile by tile: what of its pixels a window needs, decoded once and kept."""

from __future__ import annotations

import io
import math
import mmap
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from cluster.errors import CellrayError, InvalidImage, TooLarge, UnsupportedImage
from serve_app.model import preprocess
from serve_app.model.preprocess import Size

SEGMENT_BYTES = 64 << 20  # of one, decoded
MAX_SEGMENTS = 1 << 20  # their places in the file are some 80 bytes each in memory
MAX_VALUES = 1 << 24  # of one tag
SPARE_BYTES = 1 << 16  # that a compressed strip or tile may have beyond twice what it holds

# TIFF 6.0 and Adobe's registry.
COMPRESSION, PHOTOMETRIC, STRIP_COUNTS, PLANAR, PREDICTOR = 259, 262, 279, 284, 317
JPEG_TABLES, SUBSAMPLING = 347, 530
NONE, JPEG = 1, 7
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, YCBCR = 0, 1, 2, 6
SHOWN = (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB)


class Cache:
    """What was made last, up to `limit` bytes; each is made by one thread while others wait for it."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.kept: OrderedDict[Any, np.ndarray] = OrderedDict()
        self.making: dict[Any, Future[np.ndarray]] = {}
        self.lock = threading.Lock()

    def get(self, key: Any, make: Callable[[], np.ndarray]) -> np.ndarray:
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
            other = self.making.get(key)
            if other is None:
                own = self.making[key] = Future()
        if other is not None:
            return other.result()
        try:
            made = make()
        except BaseException as error:
            own.set_exception(error)
            with self.lock:
                del self.making[key]
            raise
        with self.lock:
            del self.making[key]
            self.kept[key] = made
            self.bytes += made.nbytes
            while self.bytes > self.limit:
                self.bytes -= self.kept.popitem(last=False)[1].nbytes
        own.set_result(made)
        return made


class Page:
    """A page's strips or tiles: `segments` of [height, width, samples], row by row, once, or once a sample."""

    def __init__(self, file: Any, page: Any, data: mmap.mmap, cache: Cache, max_pixels: int) -> None:
        key = page.keyframe
        self.map, self.cache, self.name = data, cache, page.offset
        self.order = file.byteorder
        self._describe(key, max_pixels)
        self.across = -(-self.stored[1] // self.segment[1])
        self.down = -(-self.stored[0] // self.segment[0])
        needed = self.across * self.down * (self.samples if self.separate else 1)
        self.offsets, self.counts = page.dataoffsets, page.databytecounts
        if needed > MAX_SEGMENTS or len(self.offsets) > MAX_SEGMENTS:
            raise too_many(needed)
        if min(len(self.offsets), len(self.counts)) < needed:
            raise InvalidImage(f"the TIFF has {len(self.offsets)} strips or tiles, and needs {needed}")
        self.plain = self._plain()
        if self.plain is None and math.prod(self.segment) * self.dtype.itemsize > SEGMENT_BYTES:
            raise TooLarge(
                f"the TIFF is in strips or tiles of {self.segment[1]} × {self.segment[0]} pixels; a window needs them "
                f"whole, and the limit is {SEGMENT_BYTES} bytes: re-save it in tiles, of 512 × 512 pixels say"
            )

    def _describe(self, key: Any, max_pixels: int) -> None:
        """What the tags say, as far as it is what is read here."""
        if not isinstance(key.imagewidth, int) or not isinstance(key.imagelength, int):
            raise InvalidImage("the TIFF's width or height is no number")
        preprocess.check_size(key.imagewidth, key.imagelength, max_pixels)
        self.stored: Size = key.imagelength, key.imagewidth
        orientation = key.tags.get(preprocess.ORIENTATION)
        self.orientation = int(orientation.value) if orientation is not None else 1
        self.samples, self.separate = int(key.samplesperpixel), key.planarconfig == 2 and key.samplesperpixel > 1
        kinds = preprocess.tuple_of(key.tags.valueof(preprocess.SAMPLE_FORMAT, 1))
        if key.dtype is None or key.dtype.kind not in "uif" or key.bitspersample != 8 * key.dtype.itemsize:
            raise UnsupportedImage(f"a TIFF with samples of {key.bitspersample} bits; expected 8, 16, 32 or 64")
        if key.imagedepth != 1 or key.tiledepth != 1 or key.fillorder != 1 or len(set(kinds)) > 1:
            raise UnsupportedImage("a TIFF with volumes, reversed bits, or samples of several types")
        self.dtype = np.dtype(key.dtype)
        self.compression, self.predictor = int(key.compression), int(key.predictor)
        self.photometric = BLACK_IS_ZERO if key.photometric is None else int(key.photometric)
        jpeg = self.photometric == YCBCR and self.compression == JPEG
        if self.photometric not in SHOWN and not jpeg:
            raise UnsupportedImage(
                f"a large TIFF of colours that are {key.photometric.name}: re-save it as grey or RGB"
            )
        if self.compression == preprocess.LZMA:
            raise UnsupportedImage("a TIFF compressed with LZMA")
        self.alpha = ""  # Pillow's mode of such samples
        if self.dtype == np.uint8 and self.samples in (2, 4) and {1, 2} & {*key.extrasamples}:
            self.alpha = {2: ("La", "LA"), 4: ("RGBa", "RGBA")}[self.samples][1 not in key.extrasamples]
        tall, wide = (key.tilelength, key.tilewidth) if key.is_tiled else (key.rowsperstrip, key.imagewidth)
        if wide < 1 or tall < 1:
            raise InvalidImage(f"the TIFF is in strips or tiles of {wide} × {tall} pixels")
        self.tiled = bool(key.is_tiled)
        tall = tall if self.tiled else min(tall, key.imagelength)
        self.segment: tuple[int, int, int] = int(tall), int(wide), 1 if self.separate else self.samples
        self.libtiff = {tag: key.tags[tag].value for tag in (JPEG_TABLES, SUBSAMPLING) if tag in key.tags}

    @property
    def size(self) -> Size:
        """(height, width), upright."""
        return self.stored[::-1] if self.orientation in (5, 6, 7, 8) else self.stored

    def shown(self, rows: slice, columns: slice) -> np.ndarray:
        """As `preprocess.samples`, of a window."""
        count = self.samples if self.alpha else min(self.samples, 3)
        found = self.read(rows, columns, range(count))
        if self.alpha and found.size:
            image = Image.frombuffer(self.alpha, found.shape[1::-1], found)
            return np.asarray(preprocess.over_black(image).convert("RGB"))
        if self.photometric == WHITE_IS_ZERO and self.samples == 1 and self.dtype == np.uint8:
            return ~found
        return found

    def read(self, rows: slice, columns: slice, samples: Sequence[int]) -> np.ndarray:
        """[h, w, samples] of a window that lies in the page, native."""
        first, second = rows, columns
        if self.orientation in (3, 4, 7, 8):
            first = slice(self.size[0] - rows.stop, self.size[0] - rows.start)
        if self.orientation in (2, 3, 6, 7):
            second = slice(self.size[1] - columns.stop, self.size[1] - columns.start)
        if self.orientation in (5, 6, 7, 8):
            first, second = second, first
        return np.ascontiguousarray(preprocess.upright(self._stored(first, second, samples), self.orientation))

    def _stored(self, rows: slice, columns: slice, samples: Sequence[int]) -> np.ndarray:
        if self.plain is not None:
            if self.separate:
                window = np.moveaxis(self.plain[list(samples), rows, columns, 0], 0, -1)
            else:
                window = _picked(self.plain[0, rows, columns], samples)
            return window.astype(self.dtype)
        found = np.empty((rows.stop - rows.start, columns.stop - columns.start, len(samples)), self.dtype)
        if not found.size:
            return found
        tall, wide, _ = self.segment
        for row in range(rows.start // tall, (rows.stop - 1) // tall + 1):
            for column in range(columns.start // wide, (columns.stop - 1) // wide + 1):
                top, left = max(rows.start, row * tall), max(columns.start, column * wide)
                bottom, right = min(rows.stop, (row + 1) * tall), min(columns.stop, (column + 1) * wide)
                to = found[top - rows.start : bottom - rows.start, left - columns.start : right - columns.start]
                part = slice(top - row * tall, bottom - row * tall), slice(left - column * wide, right - column * wide)
                if self.separate:
                    for place, sample in enumerate(samples):
                        to[..., place] = self._segment(sample, row, column)[(*part, 0)]
                else:
                    to[:] = _picked(self._segment(0, row, column)[part], samples)
        return found

    def _segment(self, plane: int, row: int, column: int) -> np.ndarray:
        """[≤ height, width, samples] native; of the last row of segments perhaps no more than the image has."""
        key = self.name, plane, row, column
        return self.cache.get(key, lambda: self._decoded((plane * self.down + row) * self.across + column, row))

    def _decoded(self, index: int, row: int) -> np.ndarray:
        offset, count = self.offsets[index], self.counts[index]
        tall, wide, samples = self.segment
        there = min(tall, self.stored[0] - row * tall)
        if not count:  # never written, which means 0
            return np.zeros((there, wide, samples), self.dtype)
        size = math.prod(self.segment) * self.dtype.itemsize
        if offset + count > len(self.map) or count > 2 * size + SPARE_BYTES:
            raise InvalidImage(f"strip or tile {index} of the TIFF is {count} bytes at {offset}: cut short or damaged")
        data = self.map[offset : offset + count]
        try:
            if self.compression == NONE:
                found = self._array(data[:size])
            elif self.compression in preprocess.DEFLATES:
                found = self._array(_inflated(data, size))
            else:
                found = self._by_pillow(data, tall if self.tiled else there)
        except CellrayError:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError, zlib.error …
            raise InvalidImage(
                f"strip or tile {index} of the TIFF is damaged, or compressed in a way not read here: {error}"
            ) from error
        if len(found) < there:
            raise InvalidImage(f"strip or tile {index} of the TIFF has {len(found)} rows of {there}: it is cut short")
        return found

    def _array(self, data: bytes) -> np.ndarray:
        """Uncompressed bytes, as many rows as are whole, as numbers."""
        _, wide, samples = self.segment
        rows = len(data) // (wide * samples * self.dtype.itemsize)
        stored = self.dtype.newbyteorder(self.order)
        found = np.frombuffer(data, stored, rows * wide * samples).reshape(rows, wide, samples).astype(self.dtype)
        if self.predictor == 2:
            whole = found.view(f"u{self.dtype.itemsize}")
            np.cumsum(whole, axis=1, dtype=whole.dtype, out=whole)
        elif self.predictor != 1:
            raise UnsupportedImage(f"a TIFF with predictor {self.predictor}")
        return found

    def _by_pillow(self, data: bytes, rows: int) -> np.ndarray:
        """A strip or tile as a TIFF of its own, for libtiff. As there: few kinds of deep samples."""
        wide, samples = self.segment[1:]
        known = self.dtype == np.uint8 and samples in (1, 3, 4)
        if not known and not (samples == 1 and (self.dtype == np.uint16 or (self.dtype.kind != "u" and self._small))):
            raise UnsupportedImage(f"a TIFF of {samples} × {self.dtype} with compression {self.compression}")
        directory = TiffImagePlugin.ImageFileDirectory_v2(b"II*\0\0\0\0\0" if self.order == "<" else b"MM\0*\0\0\0\0")
        directory[preprocess.WIDTH], directory[preprocess.LENGTH] = wide, rows
        directory[preprocess.BITS_PER_SAMPLE] = (8 * self.dtype.itemsize,) * samples
        directory[preprocess.SAMPLE_FORMAT] = ({"u": 1, "i": 2, "f": 3}[self.dtype.kind],) * samples
        directory[preprocess.SAMPLES_PER_PIXEL], directory[preprocess.ROWS_PER_STRIP] = samples, rows
        directory[COMPRESSION], directory[PLANAR], directory[PREDICTOR] = self.compression, 1, self.predictor
        directory[PHOTOMETRIC] = BLACK_IS_ZERO if samples == 1 else YCBCR if self.photometric == YCBCR else RGB
        if samples == 4:
            directory[preprocess.EXTRA_SAMPLES] = 0
        for tag, value in self.libtiff.items():
            directory[tag] = value
        directory[preprocess.STRIPS], directory[STRIP_COUNTS] = 0, len(data)  # from where the directory ends
        file = struct.pack(f"{self.order}2sHI", directory.prefix[:2], 42, 8) + directory.tobytes(8) + data
        with Image.open(io.BytesIO(file), formats=["TIFF"]) as image:
            return np.asarray(image).reshape(rows, wide, samples).astype(self.dtype, copy=False)

    @property
    def _small(self) -> bool:
        """Whether Pillow has such samples, and in this order: see `preprocess`."""
        return self.dtype.itemsize == 4 and self.order == "<"

    def _plain(self) -> np.ndarray | None:
        """[planes, height, width, samples] as they lie in the file, where they do so one after the other."""
        _, wide, samples = self.segment
        if self.compression != NONE or self.predictor != 1 or wide != self.stored[1] or self.across != 1:
            return None
        sizes = [min(self.segment[0], self.stored[0] - row * self.segment[0]) for row in range(self.down)]
        planes = self.samples if self.separate else 1
        at, line = self.offsets[0], wide * samples * self.dtype.itemsize
        if not at:
            return None
        for index, rows in enumerate(sizes * planes):
            if self.offsets[index] != at or self.counts[index] < rows * line:
                return None
            at += rows * line
        if at > len(self.map):
            raise InvalidImage(f"the TIFF is cut short: {len(self.map)} bytes, and pixels up to {at}")
        shape = planes, *self.stored, samples
        stored = self.dtype.newbyteorder(self.order)
        return np.frombuffer(self.map, stored, math.prod(shape), self.offsets[0]).reshape(shape)


def _picked(pixels: np.ndarray, samples: Sequence[int]) -> np.ndarray:
    """Some samples of [h, w, C]: the first few without a copy."""
    return pixels[..., : len(samples)] if [*samples] == [*range(len(samples))] else pixels[..., list(samples)]


def _inflated(data: bytes, size: int) -> bytes:
    made = zlib.decompressobj().decompress(data, size + 1)
    if len(made) > size:
        raise InvalidImage(f"a strip or tile of the TIFF holds more than its {size} bytes")
    return made


def too_many(segments: int) -> TooLarge:
    return TooLarge(
        f"the TIFF has {segments} strips or tiles, or a tag that is too long; the limit is {MAX_SEGMENTS}: re-save it "
        "in larger tiles"
    )
