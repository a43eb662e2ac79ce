"""From an image's file to the parts of it that become rows."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from cluster.errors import CellrayError, InvalidImage, InvalidInput, NotFound, TooLarge, UnsupportedImage
from cluster.settings import Limits
from cluster.storage import Storage, join
from jobs import images, parts
from jobs.images import Entry
from jobs.parts import Part
from jobs.views import View
from serve_app.model import planes, preprocess
from tests.s3 import Place, place_fixture, s3_fixture  # noqa: F401

NAMES = ["DAPI", "actin", "GFP & more", "blank"]
STACK = np.random.default_rng(0).integers(0, 1 << 16, (2, 3, 4, 30, 40)).astype(np.uint16)  # t, z, c, y, x


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def ome(**options: Any) -> bytes:
    return tiff(STACK, ome=True, metadata={"axes": "TZCYX", "Channel": {"Name": NAMES}}, **options)


def png(width: int = 20, height: int = 10) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(file, "PNG")
    return file.getvalue()


def of(data: bytes, view: str = "", limits: Limits | None = None) -> list[Part]:
    return list(parts.parts(Entry("a.tif", len(data), view=view), data, limits or Limits()))


STACKS = {
    "OME": ome(),
    "OME in tiles, deflated, big-endian BigTIFF": ome(compression="zlib", tile=(16, 16), byteorder=">", bigtiff=True),
    "ImageJ": tiff(STACK, imagej=True, metadata={"axes": "TZCYX", "Labels": NAMES * 6}),
}


@pytest.mark.parametrize("data", STACKS.values(), ids=STACKS)
def test_each_plane_is_a_part_with_its_channels_as_colours(data: bytes) -> None:
    found = of(data, "channels=nuclear=DAPI,red=2&t=each&z=each")
    assert [part.name for part in found] == [
        f"channels=nuclear=DAPI,red=2&t={t}&z={z}" for t in range(2) for z in range(3)
    ]
    assert [part.ends for part in found] == [False] * 5 + [True]
    assert len({part.image_id() for part in found}) == 6
    for part in found:
        pixels = part.read(40).image.pixels
        plane = STACK[int(part.plane.t), int(part.plane.z)]
        np.testing.assert_array_equal(pixels[..., 0], preprocess.stretched(plane[2]))
        np.testing.assert_array_equal(pixels[..., 1], preprocess.stretched(plane[0]))
        assert not pixels[..., 2].any()


def test_without_a_choice_the_first_three_channels_are_stretched_together() -> None:
    (part,) = of(STACKS["OME"], "z=1")
    assert part.name == "z=1"
    expected = preprocess.stretch(np.moveaxis(STACK[0, 1, :3], 0, -1))
    np.testing.assert_array_equal(part.read(40).image.pixels, expected)


def test_a_file_as_it_is_has_no_part_and_its_content_for_id() -> None:
    (part,) = of(png())
    assert part.name == ""
    assert part.image_id() == hashlib.sha256(png()).hexdigest()


def test_pages_that_nothing_names_are_focal_planes() -> None:
    pages = np.stack([np.full((20, 30, 3), level, np.uint8) for level in (10, 20, 30)])
    found = of(tiff(pages, photometric="rgb", metadata=None), "z=each")
    assert [part.name for part in found] == ["z=0", "z=1", "z=2"]
    assert [part.read(30).image.pixels.max() for part in found] == [10, 20, 30]


@pytest.mark.parametrize(
    ("view", "said"),
    [
        ("z=3", "the image has 3 planes along z, none of number 3"),
        ("t=9", "the image has 2 planes along t"),
        ("channels=grey=4", "no channel 4; it has 4, from 0 on, named DAPI, actin, GFP & more, blank"),
        ("channels=grey=dapi", "no channel dapi"),
        ("crop=35,0,10,10", "leaves the image of 40 × 30 pixels"),
        ("crop=0,0,10,0", "is empty"),
    ],
)
def test_what_is_not_there_is_an_error_of_the_image(view: str, said: str) -> None:
    (part,) = of(STACKS["OME"], view)
    with pytest.raises(InvalidImage, match=said):
        part.read(40)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (STACKS["OME"][:300], InvalidImage),
        (tiff(STACK, photometric="minisblack"), UnsupportedImage),
        (tiff(STACK[0, :2, 0], volumetric=True, tile=(16, 16, 16), photometric="minisblack"), UnsupportedImage),
        (b"", InvalidImage),
        (b"no image", UnsupportedImage),
        (ome()[:30_000], InvalidImage),
    ],
)
def test_a_damaged_stack_is_one_part_or_more_that_say_why(data: bytes, kind: type[CellrayError]) -> None:
    found = of(data, "z=each&tile=64,0&channels=red=1")
    with pytest.raises(kind):
        [part.read(40) for part in found]
    assert [part.ends for part in found] == [False] * (len(found) - 1) + [True]


def test_a_stack_is_within_the_limit_of_pixels() -> None:
    with pytest.raises(TooLarge):
        of(STACKS["OME"], "z=1", Limits(image_pixels=1199))[0].read(40)


def test_tiles_are_parts_with_their_offset_and_cover_the_image() -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (100, 150, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    found = of(file.getvalue(), "tile=64,16")
    assert [part.name for part in found] == [f"xywh={x},{y},64,64" for y in (0, 36) for x in (0, 48, 86)]
    assert [part.last for part in found] == [False] * 5 + [True]
    seen = np.zeros_like(pixels)
    for part in found:
        (x, y), tile = part.corner, part.read(64).image
        assert tile.original == (64, 64)
        seen[y : y + 64, x : x + 64] = tile.pixels
        shown = parts.pixels(file.getvalue(), "", part.name, 10**6)
        np.testing.assert_array_equal(shown, tile.pixels)
    np.testing.assert_array_equal(seen, pixels)
    assert found[0].whole == (100, 150)
    (whole,) = of(png(), "tile=64,16")
    assert whole.name == ""


def test_a_crop_is_an_image_of_its_own_in_a_list(place: Place) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (50, 60, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    place.storage.publish(join(place.uri, "a.png"), file.getvalue())
    lines = 'uri,crop,channels\na.png,"10, 20,30,25",\na.png,,"grey=1"\n'
    place.storage.publish(join(place.uri, "list.csv"), lines.encode())
    first, second = images.find(place.storage, join(place.uri, "list.csv"), "channels=red=0")
    assert first.uri == join(place.uri, "a.png#xywh=10,20,30,25")
    read = [
        parts.only_part(entry, images.content(place.storage, entry, 10**6), Limits()).read(60)
        for entry in (first, second)
    ]
    assert read[0].image.original == (25, 30)
    assert read[1].image.original == (50, 60)
    np.testing.assert_array_equal(read[1].image.pixels, np.repeat(pixels[..., 1:2], 3, axis=2))
    assert not read[0].image.pixels[..., 1:].any()
    assert len({one.image_id for one in read} | {hashlib.sha256(file.getvalue()).hexdigest()}) == 3
    again = images.by_name(place.storage, [first.uri])[first.uri]
    assert images.content(place.storage, again, 10**6) == file.getvalue()


@pytest.mark.parametrize("words", ["red", "red=", "purple=1", "red=1,red=2", "green=1,nuclear=0", "grey=1,red=0", ","])
def test_channels_that_make_no_picture(words: str) -> None:
    with pytest.raises(InvalidInput, match="expected channels like nuclear=1,membrane=0"):
        planes.channels(words)


@pytest.mark.parametrize("view", ["z=all", "t=-1", "crop=1,2,3", "tile=63,0", "tile=64,33", "tile=big,1"])
def test_views_that_are_none(view: str) -> None:
    with pytest.raises(InvalidInput):
        View.parse(view)


def test_a_view_in_words_and_back() -> None:
    view = View(channels="red=GFP & more,green=a%b", z="each", tile="1024,128")
    assert View.parse(str(view)) == view
    assert str(View(channels="nuclear=1,membrane=0", z="3")) == "channels=nuclear=1,membrane=0&z=3"


# Whole images


def read_image(storage: Storage, uri: str, limits: Limits) -> parts.ReadImage:
    entry = Entry(uri, 1)
    return parts.only_part(entry, images.content(storage, entry, limits.image_bytes), limits).read(256)


def test_an_image_is_read_to_pixels_and_identity(place: Place) -> None:
    content = png()
    uri = join(place.uri, "a b.png")
    place.storage.publish(uri, content)
    read = read_image(place.storage, uri, Limits())
    assert read.image_id == hashlib.sha256(content).hexdigest()
    assert read.image.original == (10, 20)
    assert read.image.input == (128, 256)
    assert (read.image.pixels.shape, read.image.pixels.dtype) == ((128, 256, 3), np.uint8)
    assert read.image.pixels[64, 128].tolist() == [200, 100, 50]


@pytest.mark.parametrize(
    ("content", "limits", "kind"),
    [
        (b"", Limits(), InvalidImage),
        (b"no image", Limits(), InvalidImage),
        (png(200, 100)[:200], Limits(), InvalidImage),
        (png(), Limits(image_bytes=10), TooLarge),
        (png(), Limits(image_pixels=199), TooLarge),
        (None, Limits(), NotFound),
    ],
)
def test_a_bad_image_is_an_error_of_ours(
    tmp_path: Path, content: bytes | None, limits: Limits, kind: type[CellrayError]
) -> None:
    uri = str(tmp_path / "a.png")
    if content is not None:
        Path(uri).write_bytes(content)
    with pytest.raises(kind) as caught:
        read_image(Storage(), uri, limits)
    assert "\n" not in str(caught.value)
