"""Files of several planes: focal planes (z), time points (t) and channels of a TIFF, one plane at a time.

Without a choice of channels, a plane's become colours as `preprocess` says, stretched together. With one, each channel
is stretched on its own (samples of 8 bits are kept), and a colour that none is given for is black.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import cached_property
from mmap import mmap
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np

from cluster.errors import CellrayError, InvalidImage, InvalidInput, TooLarge, UnsupportedImage
from serve_app.model import preprocess

GREY, COLOURS = "grey", {"red": 0, "green": 1, "blue": 2, "nuclear": 1, "membrane": 2}  # the last two as in CellSAM
UNNAMED = "IQR"  # tifffile's axes of pages that no metadata speaks of: z here
MAX_PLANES = 100_000

Channels = tuple[tuple[str, str], ...]


def channels(text: str) -> Channels:
    """`nuclear=1,membrane=0` → ((colour, channel), …). A channel is an index from 0, or a name.

    Raises:
        InvalidInput: not of that form, an unknown colour, or one twice.
    """
    pairs = [tuple(part.strip() for part in word.split("=", 1)) for word in text.split(",")]
    names = [pair[0] for pair in pairs]
    places = [COLOURS.get(name) for name in names]
    once = names == [GREY] or (None not in places and len(set(places)) == len(places))
    if not once or any(len(pair) < 2 or not pair[1] for pair in pairs):
        raise InvalidInput(
            f"expected channels like nuclear=1,membrane=0 or red=DAPI or grey=2, with colours of {', '.join(COLOURS)} "
            f"(green is nuclear, blue membrane), or grey alone; found {text!r}"
        )
    return tuple((name, channel) for name, channel in pairs)


class Stack:
    """An image file, in memory or mapped, to be read plane by plane, not by several threads at a time.

    depths: (z, t), how many focal planes and time points it has.
    """

    def __init__(self, data: bytes | mmap, max_pixels: int) -> None:
        """Raises what `preprocess.decode` does; and UnsupportedImage where planes are in no known order."""
        self.data, self.max_pixels = data, max_pixels
        self.file: Any = None
        self.axes, self.shape = "", tuple[int, ...]()
        if data[:4] not in preprocess.TIFFS:
            return
        preprocess.check_layout(data)
        import tifffile

        try:
            self.file = tifffile.TiffFile(io.BytesIO(data) if isinstance(data, bytes) else cast(Any, data))
            self.series = self.file.series[0]
            inner = self.series.keyframe.axes
            self.axes = "".join("Z" if axis in UNNAMED else axis for axis in self.series.axes.removesuffix(inner))
            self.shape = tuple(map(int, self.series.shape[: len(self.axes)]))
        except Exception as error:
            raise InvalidImage(f"the TIFF is damaged: {error}") from error
        if math.prod(self.shape) > MAX_PLANES:
            raise TooLarge(f"the TIFF has {math.prod(self.shape)} planes; the limit is {MAX_PLANES}")
        if len(set(self.axes)) < len(self.axes) or set(self.axes) - set("TZC") or inner not in ("YX", "YXS", "SYX"):
            raise UnsupportedImage(f"a TIFF of axes {self.series.axes}; expected some of T, Z and C before Y and X")

    @property
    def depths(self) -> tuple[int, int]:
        return self._depth("Z"), self._depth("T")

    def _depth(self, axis: str) -> int:
        return self.shape[self.axes.index(axis)] if axis in self.axes else 1

    @cached_property
    def names(self) -> list[str]:
        """The channels', as far as the file says: by OME-XML, or ImageJ's labels of the first slices."""
        if self.file is None:
            return []
        try:
            if text := self.file.ome_metadata:
                first = ElementTree.fromstring(text).find("{*}Image/{*}Pixels")
                return [] if first is None else [one.get("Name", "") for one in first.findall("{*}Channel")]
            return list((self.file.imagej_metadata or {}).get("Labels", []))[: self._depth("C")]
        except (ElementTree.ParseError, TypeError) as error:
            raise InvalidImage(f"the TIFF's metadata is damaged: {error}") from error

    def plane(self, z: int, t: int, chosen: Channels) -> np.ndarray:
        """[height, width, 3] uint8 RGB. Raises as `samples`."""
        found, colours = self._channels(z, t, chosen), tuple(colour for colour, _ in chosen)
        if colours:
            made = coloured(colours, [preprocess.stretched(channel) for channel in found])
            return np.repeat(made, 3, axis=2) if made.shape[2] == 1 else made
        return preprocess.stretch(np.concatenate(found, axis=2))

    def samples(self, z: int, t: int, chosen: Channels) -> np.ndarray:
        """[height, width, 1 to 3] of the type that they are kept in: of chosen channels those that are grey alone, or
        as colours; else the first three.

        Raises:
            InvalidImage, TooLarge, UnsupportedImage: as `preprocess.decode`; and there is no such plane or channel.
        """
        found, colours = self._channels(z, t, chosen), tuple(colour for colour, _ in chosen)
        made = coloured(colours, found) if colours else np.concatenate(found, axis=2)
        preprocess.check_finite(made)
        return made

    def places(self, z: int, t: int, chosen: Channels) -> list[tuple[Any, int]]:
        """(page, sample) of each chosen channel of a TIFF's plane, else of the first three. Raises as `samples`."""
        self._check(z, t)
        samples = int(self.series.keyframe.samplesperpixel)
        count = self._depth("C") * samples
        indices = [self._index(name, count) for _, name in chosen] or range(min(count, 3))
        made: list[tuple[Any, int]] = []
        for at, sample in (divmod(index, samples) for index in indices):
            place = {"Z": z, "T": t, "C": at}
            number = int(np.ravel_multi_index([place[axis] for axis in self.axes], self.shape)) if self.axes else 0
            page = self.series.pages[number]
            if page is None:
                raise InvalidImage("the plane is in another file of its OME-TIFF")
            made.append((page, sample))
        return made

    def _channels(self, z: int, t: int, chosen: Channels) -> list[np.ndarray]:
        """[h, w, 1] of each chosen channel, else of the first three."""
        if self.file is None:
            self._check(z, t)
            pixels = preprocess.samples(bytes(self.data), self.max_pixels)
            pixels = np.repeat(pixels, 3, axis=2) if chosen and pixels.shape[2] == 1 else pixels
            indices = [self._index(name, pixels.shape[2]) for _, name in chosen] or range(pixels.shape[2])
            return [pixels[..., index : index + 1] for index in indices]
        read: dict[int, np.ndarray] = {}
        made = []
        try:
            for page, sample in self.places(z, t, chosen):
                if page.offset not in read:
                    read[page.offset] = preprocess.page_pixels(self.file, page, self.max_pixels)
                made.append(read[page.offset][..., sample : sample + 1])
        except CellrayError:
            raise
        except Exception as error:
            raise InvalidImage(f"the TIFF is damaged, or compressed in a way not read here: {error}") from error
        if len({channel.shape for channel in made}) > 1:
            raise InvalidImage("the TIFF's channels are of several sizes")
        return made

    def _check(self, z: int, t: int) -> None:
        for name, place, depth in zip("zt", (z, t), self.depths, strict=True):
            if place >= depth:
                raise InvalidImage(f"the image has {depth} planes along {name}, none of number {place} (from 0 on)")

    def _index(self, name: str, count: int) -> int:
        if name in self.names:
            return self.names.index(name)
        if name.isdecimal() and int(name) < count:
            return int(name)
        named = f", named {', '.join(self.names)}" if any(self.names) else ""
        raise InvalidImage(f"the image has no channel {name}; it has {count}, from 0 on{named}")


def coloured(colours: Sequence[str], channels: Sequence[np.ndarray]) -> np.ndarray:
    """[h, w, 1] each → as they are called: the one that is grey, or [h, w, 3] with 0 in a colour that none is."""
    if GREY in colours:
        return channels[colours.index(GREY)]
    made = np.zeros((*channels[0].shape[:2], 3), np.result_type(*channels))
    for colour, channel in zip(colours, channels, strict=True):
        made[..., COLOURS[colour]] = channel[..., 0]
    return made
