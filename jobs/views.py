"""What of an image's file becomes a row: the whole, or a plane of it (z, t), some channels, a crop, a tile."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from urllib.parse import parse_qsl, urlencode

from cluster.errors import InvalidInput
from serve_app.model import planes

EACH = "each"
MIN_TILE = 64
CROPPED = re.compile(r"#xywh=(\d+,\d+,\d+,\d+)$")  # what a crop's URI ends with, a media fragment


@dataclass(frozen=True)
class View:
    """A view in words, as in the column `part` of every data set: `channels=nuclear=1,membrane=0&t=0&z=3&
    xywh=0,896,1024,1024`, each where it was asked for, none for a file's first page as it is.

    `channels` as `planes.channels` reads them; `z` and `t` a number, or EACH; `tile` side,overlap in pixels; `crop` and
    `xywh` x,y,width,height: of the plane, and of a tile in that or in its crop, whose image's URI says so already.
    """

    crop: str = ""
    channels: str = ""
    t: str = ""
    z: str = ""
    tile: str = ""
    xywh: str = ""

    def __post_init__(self) -> None:
        """Raises InvalidInput: names the word that is not as it should be."""
        if self.channels:
            planes.channels(self.channels)
        for axis in ("t", "z"):
            if (value := getattr(self, axis)) and value != EACH and not value.isdecimal():
                raise InvalidInput(f"{axis} is the number of a plane, from 0 on, or {EACH}; found {value!r}")
        for name, count in (("crop", 4), ("xywh", 4), ("tile", 2)):
            value = getattr(self, name)
            if value and [part.isdecimal() for part in value.split(",")] != [True] * count:
                raise InvalidInput(f"{name} is {count} numbers with commas, in pixels; found {value!r}")
        if self.tile:
            side, overlap = self.numbers("tile")
            if side < MIN_TILE or overlap > side // 2:
                raise InvalidInput(
                    f"a tile has at least {MIN_TILE} px a side, and overlaps by half of it at most: {self.tile}"
                )

    @classmethod
    def parse(cls, text: str) -> View:
        return _parsed(text)

    def __str__(self) -> str:
        words = {field.name: getattr(self, field.name) for field in fields(self)}
        return urlencode({name: value for name, value in words.items() if value}, safe="=,")

    def numbers(self, name: str) -> tuple[int, ...]:
        return tuple(map(int, getattr(self, name).split(",")))

    @property
    def several(self) -> bool:
        """Whether it may ask for more than one part of a file."""
        return bool(self.tile) or EACH in (self.t, self.z)

    @property
    def part(self) -> str:
        """As a row has it, where it asks for one part."""
        return str(replace(self, crop="", tile=""))


@lru_cache(maxsize=1024)
def _parsed(text: str) -> View:
    return View(**dict(parse_qsl(text)))
