"""Windows of large TIFFs: what a whole read has there, of every layout, within bounds of memory, or an error."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster.errors import CellrayError, InvalidImage, TooLarge, UnsupportedImage
from serve_app.model import planes, preprocess, segments
from serve_app.model.slides import Slide
from tests.s3 import ROOT

LIMIT = 1 << 26  # pixels
RANDOM = np.random.default_rng(0)
DEEP = RANDOM.integers(0, 1 << 16, (70, 90)).astype(np.uint16)
RGB = RANDOM.integers(0, 256, (70, 90, 3), dtype=np.uint8)
WHOLE = slice(None), slice(None)


def write(folder: Path, pixels: np.ndarray, **options: Any) -> Path:
    path = folder / "slide.tif"
    tifffile.imwrite(path, pixels, **({"metadata": None} | options))
    return path


def read(path: Path, **options: Any) -> np.ndarray:
    with Slide(path, LIMIT, **options) as slide:
        found = slide.read(*WHOLE)
        assert found.shape[:2] == slide.size
        assert found.dtype.isnative
        return found


# Equal to a whole read


@st.composite
def layouts(draw: st.DrawFn) -> tuple[np.ndarray, dict[str, Any]]:
    height, width, samples = (draw(st.integers(1, most)) for most in (150, 150, 4))
    kind = draw(st.sampled_from(["uint8", "uint16", "int16", "uint32", "float32", "float64"]))
    pixels = (np.random.default_rng(0).random((samples, height, width)) * 200).astype(kind)
    separate = samples > 1 and draw(st.booleans())
    options: dict[str, Any] = {
        "photometric": "rgb" if samples == 3 else "minisblack",
        "planarconfig": ("separate" if separate else "contig") if samples > 1 else None,
        "compression": draw(st.sampled_from([None, "zlib"])),
        "byteorder": draw(st.sampled_from("<>")),
        "bigtiff": draw(st.booleans()),
    }
    if options["compression"] and kind != "float64":
        options["predictor"] = draw(st.sampled_from([1, 2])) if kind[0] != "f" else 1
    side = st.integers(1, 6).map(lambda one: 16 * one)
    options |= draw(
        st.one_of(
            st.just({}),
            st.fixed_dictionaries({"rowsperstrip": st.integers(1, 160)}),
            st.fixed_dictionaries({"tile": st.tuples(side, side)}),
        )
    )
    if samples == 1:
        return pixels[0], options
    return pixels if separate else np.moveaxis(pixels, 0, -1), options


@settings(max_examples=120)
@given(layout=layouts(), places=st.tuples(*[st.integers(-20, 170)] * 4), orientation=st.integers(1, 8))
def test_a_window_is_what_a_whole_read_has_there(
    tmp_path_factory: pytest.TempPathFactory,
    layout: tuple[np.ndarray, dict[str, Any]],
    places: tuple[int, ...],
    orientation: int,
) -> None:
    pixels, options = layout
    path = tmp_path_factory.getbasetemp() / "layout.tif"
    tifffile.imwrite(path, pixels, metadata=None, extratags=[(274, "H", 1, orientation, True)], **options)
    expected = tifffile.imread(path)
    if expected.ndim == 2:
        expected = expected[..., None]
    elif options["planarconfig"] == "separate":
        expected = np.moveaxis(expected, 0, -1)
    expected = preprocess.upright(expected, orientation)[..., :3]
    rows, columns = slice(*places[:2]), slice(*places[2:])
    with Slide(path, LIMIT, cache_bytes=20_000) as slide:
        assert slide.size == expected.shape[:2]
        found = slide.read(rows, columns)
        assert found.dtype == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, expected[rows, columns])
        np.testing.assert_array_equal(slide.read(*WHOLE), expected)


def pillow(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "TIFF", **options)
    return file.getvalue()


def by_libtiff(pixels: np.ndarray, compression: str, **options: Any) -> tuple[bytes, dict[int, Any]]:
    """A strip of all of the pixels, as libtiff compresses it, and what its tags say."""
    image = Image.fromarray(pixels)
    if compression == "jpeg":
        image = image.convert("YCbCr")
    file = io.BytesIO(pillow(image, compression=compression, **options))
    with tifffile.TiffFile(file) as made:
        page = made.pages.first
        assert len(page.dataoffsets) == 1
        file.seek(page.dataoffsets[0])
        return file.read(page.databytecounts[0]), {tag.code: tag.value for tag in page.tags}


@pytest.mark.parametrize(
    ("compression", "pixels"),
    [(name, pixels) for name in ("tiff_lzw", "packbits", "zstd", "tiff_deflate") for pixels in (DEEP, RGB, RGB[..., 0])]
    + [("jpeg", RGB), ("jpeg", RGB[..., 0])],
)
def test_strips_that_pillow_wrote(tmp_path: Path, compression: str, pixels: np.ndarray) -> None:
    data = pillow(Image.fromarray(pixels), compression=compression, strip_size=90 * 3 * 16)
    (tmp_path / "a.tif").write_bytes(data)
    found = read(tmp_path / "a.tif")
    np.testing.assert_array_equal(found, preprocess.samples(data, LIMIT))
    if compression != "jpeg":
        np.testing.assert_array_equal(found, pixels.reshape(found.shape))


def tiled(folder: Path, pixels: np.ndarray, compression: str, byteorder: str = "<") -> Path:
    """In tiles of 32 x 32 that libtiff has compressed, which tifffile alone cannot."""
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    height, width = (-(-side // 32) * 32 for side in pixels.shape[:2])
    padded = np.pad(pixels, [(0, height - pixels.shape[0]), (0, width - pixels.shape[1]), (0, 0)], "edge").squeeze()
    padded = padded.astype(padded.dtype.newbyteorder(byteorder)).view(padded.dtype)
    places = [(row, column) for row in range(0, height, 32) for column in range(0, width, 32)]
    tiles = [by_libtiff(padded[y : y + 32, x : x + 32], compression) for y, x in places]
    tags = tiles[0][1]
    more = [(347, 7, len(tags[347]), tags[347], True), (530, 3, 2, tags[530], True)] if compression == "jpeg" else []
    with (folder / "tiles.tif").open("wb") as file:
        tifffile.imwrite(
            file,
            iter(data for data, _ in tiles),  # type: ignore[arg-type]
            shape=pixels.squeeze().shape,
            dtype=pixels.dtype,
            tile=(32, 32),
            compression="zlib",
            byteorder=byteorder,  # type: ignore[arg-type]
            photometric="rgb" if pixels.shape[2] == 3 else "minisblack",
            extratags=more,
            metadata=None,
        )
    with tifffile.TiffFile(folder / "tiles.tif", mode="r+b") as made:
        for tag in (259, 262):
            made.pages.first.tags[tag].overwrite(tags[tag])
    return folder / "tiles.tif"


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "zstd"])
@pytest.mark.parametrize("pixels", [DEEP, RGB], ids=["uint16", "rgb"])
@pytest.mark.parametrize("byteorder", "<>")
def test_tiles_that_libtiff_compressed(tmp_path: Path, compression: str, pixels: np.ndarray, byteorder: str) -> None:
    path = tiled(tmp_path, pixels, compression, byteorder)
    np.testing.assert_array_equal(read(path), pixels.reshape(70, 90, -1))


def test_tiles_of_jpeg_with_common_tables(tmp_path: Path) -> None:
    smooth = np.asarray(Image.fromarray(RGB[:7, :9]).resize((90, 70), Image.Resampling.BICUBIC))
    path = tiled(tmp_path, smooth, "jpeg")
    with Image.open(path) as image:
        assert image.tag_v2[262] == 6  # type: ignore[attr-defined]
    found = read(path)
    np.testing.assert_array_equal(found, preprocess.samples(path.read_bytes(), LIMIT))
    assert np.abs(found.astype(int) - smooth).mean() < 6


@pytest.mark.parametrize("extra", [1, 2], ids=["associated", "unassociated"])
@pytest.mark.parametrize("pixels", [np.dstack([RGB, RGB[..., :1]]), RGB[..., :2]], ids=["rgba", "grey with alpha"])
def test_alpha_is_laid_over_black(tmp_path: Path, pixels: np.ndarray, extra: int) -> None:
    kind = "rgb" if pixels.shape[2] == 4 else "minisblack"
    path = write(tmp_path, pixels, photometric=kind, extrasamples=[extra], tile=(32, 32), planarconfig="contig")
    expected = preprocess.samples(path.read_bytes(), LIMIT)
    np.testing.assert_array_equal(read(path), expected)


@pytest.mark.parametrize("pixels", [DEEP, RGB[..., 0]], ids=["uint16", "uint8"])
def test_white_is_zero(tmp_path: Path, pixels: np.ndarray) -> None:
    path = write(tmp_path, pixels, photometric="miniswhite", tile=(32, 32))
    np.testing.assert_array_equal(read(path), preprocess.samples(path.read_bytes(), LIMIT))


def test_tiles_that_were_never_written_are_zero(tmp_path: Path) -> None:
    def some() -> Any:
        for row in range(3):
            for column in range(3):
                tile = np.zeros((32, 32), np.uint16)
                there = DEEP[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
                tile[: there.shape[0], : there.shape[1]] = there
                yield None if column == 1 else tile

    path = write(tmp_path, some(), shape=DEEP.shape, dtype=DEEP.dtype, tile=(32, 32), compression="zlib")
    expected = DEEP.copy()
    expected[:, 32:64] = 0
    np.testing.assert_array_equal(read(path)[..., 0], expected)


@pytest.mark.parametrize("view", ["", "grey=2", "nuclear=DAPI,membrane=GFP & more", "red=3,blue=0,green=1"])
@pytest.mark.parametrize("options", [{"tile": (32, 32), "compression": "zlib"}, {}], ids=["tiles", "strips"])
def test_channels_in_pages_of_their_own(tmp_path: Path, options: dict[str, Any], view: str) -> None:
    stack = RANDOM.integers(0, 1 << 16, (2, 3, 4, 70, 90)).astype(np.uint16)  # t, z, c, y, x
    names = {"axes": "TZCYX", "Channel": {"Name": ["DAPI", "actin", "GFP & more", "blank"]}}
    path = write(tmp_path, stack, ome=True, metadata=names, photometric="minisblack", **options)
    chosen = planes.channels(view) if view else ()
    expected = planes.Stack(path.read_bytes(), LIMIT).samples(2, 1, chosen)
    np.testing.assert_array_equal(read(path, z=2, t=1, channels=chosen), expected)
    plane = stack[1, 2]
    if not view:
        np.testing.assert_array_equal(expected, np.moveaxis(plane[:3], 0, -1))
    elif view == "grey=2":
        np.testing.assert_array_equal(expected, plane[2][..., None])
    elif "nuclear" in view:
        np.testing.assert_array_equal(expected, np.dstack([np.zeros_like(plane[0]), plane[0], plane[2]]))
    with pytest.raises(InvalidImage, match="3 planes along z, none of number 3"):
        Slide(path, LIMIT, z=3)


# How much is read, and by whom


@pytest.mark.parametrize("options", [{"tile": (64, 48)}, {"rowsperstrip": 7}])
def test_going_row_by_row_decodes_each_tile_about_once(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = RANDOM.integers(0, 1 << 16, (640, 480)).astype(np.uint16)
    path, decoded = write(tmp_path, pixels, compression="zlib", **options), []
    inflate = zlib.decompressobj
    monkeypatch.setattr(segments.zlib, "decompressobj", lambda: decoded.append(1) or inflate())
    with Slide(path, LIMIT, cache_bytes=3 * 64 * 480 * 2) as slide:
        needed = slide.pages[next(iter(slide.pages))].across * -(-640 // options.get("tile", (7,))[0])
        for row in range(0, 640, 50):
            for column in range(0, 480, 50):
                window = slice(max(0, row - 7), row + 57), slice(max(0, column - 7), column + 57)
                np.testing.assert_array_equal(slide.read(*window)[..., 0], pixels[window])
        assert slide.cache.bytes <= slide.cache.limit
    assert needed <= len(decoded) <= 1.1 * needed


def test_threads_read_at_a_time_and_decode_each_tile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = RANDOM.integers(0, 1 << 16, (512, 512)).astype(np.uint16)
    path, decoded = write(tmp_path, pixels, compression="zlib", tile=(128, 128)), []
    inflate, together = zlib.decompressobj, threading.Barrier(8)
    monkeypatch.setattr(segments.zlib, "decompressobj", lambda: decoded.append(1) or inflate())

    def whole(_: int) -> np.ndarray:
        together.wait()
        return slide.read(*WHOLE)[..., 0]

    with Slide(path, LIMIT) as slide, ThreadPoolExecutor(8) as pool:
        for found in pool.map(whole, range(8)):
            np.testing.assert_array_equal(found, pixels)
    assert len(decoded) == 16


ROWS_MB = 90.0
BY_ROWS = """
import sys
from pathlib import Path
from cluster import memory
from serve_app.model.slides import Slide
before = most = memory.private_mb()
total = 0
with Slide(Path(sys.argv[1]), 1 << 32, cache_bytes=48 << 20) as slide:
    for row in range(0, slide.size[0], 512):
        for column in range(0, slide.size[1], 512):
            total += int(slide.read(slice(row, row + 512), slice(column, column + 512))[::64, ::64].sum())
            most = max(most, memory.private_mb())
print(most - before, total)
"""


def test_memory_is_bounded_whatever_the_size(tmp_path: Path) -> None:
    """400 million pixels, 800 MB."""
    side, tile = 20_000, np.arange(512, dtype=np.uint16).repeat(512).reshape(512, 512)
    encoded: Any = iter([zlib.compress(tile.tobytes(), 1)] * 40**2)
    path = write(tmp_path, encoded, shape=(side, side), dtype=tile.dtype, tile=tile.shape, compression="zlib")
    done = subprocess.run([sys.executable, "-c", BY_ROWS, path], cwd=ROOT, capture_output=True, text=True, check=True)
    grown, total = done.stdout.split()
    assert float(grown) < ROWS_MB
    ys = np.arange(0, side) % 512
    assert int(total) == int(ys[ys % 64 == 0].sum()) * len(np.flatnonzero(np.arange(side) % 512 % 64 == 0))


# What is refused


def test_a_strip_of_all_of_it_is_read_where_it_is_plain_and_named_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1000)
    np.testing.assert_array_equal(read(write(tmp_path, DEEP))[..., 0], DEEP)
    with pytest.raises(TooLarge, match=r"strips or tiles of 90 × 70 pixels.*re-save it in tiles"):
        Slide(write(tmp_path, DEEP, compression="zlib", rowsperstrip=70), LIMIT)


def patched(path: Path, tag: int, value: Any) -> Path:
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages.first.tags[tag].overwrite(value)
    return path


def damaged(folder: Path) -> dict[str, tuple[Path, type[CellrayError], str]]:
    """Name: file, error, words of its message."""

    def made(name: str, pixels: np.ndarray = DEEP, **options: Any) -> Path:
        (folder / name).mkdir()
        return write(folder / name, pixels, **({"tile": (32, 32), "compression": "zlib"} | options))

    bomb, size = zlib.compress(bytes(1 << 20)), {"shape": (64, 64), "dtype": np.uint8}
    short = zlib.compress(bytes(100))
    (folder / "text.tif").write_bytes(b"text")
    (folder / "empty.tif").write_bytes(b"")
    (folder / "head.tif").write_bytes(b"II*\0")
    cut = made("cut")
    cut.write_bytes(cut.read_bytes()[:-3000])
    flat = made("flat", compression=None, tile=None)
    flat.write_bytes(flat.read_bytes()[:-300])
    flipped = made("flipped")
    content = bytearray(flipped.read_bytes())
    with tifffile.TiffFile(flipped) as file:
        content[file.pages.first.dataoffsets[4] + 2] ^= 255
    flipped.write_bytes(content)
    return {
        "text": (folder / "text.tif", UnsupportedImage, "only TIFFs are read by windows"),
        "empty": (folder / "empty.tif", InvalidImage, "empty"),
        "head": (folder / "head.tif", InvalidImage, "damaged"),
        "bomb": (made("bomb", iter([bomb] * 4), **size), InvalidImage, "holds more than its 1024 bytes"),  # type: ignore[arg-type]
        "short": (made("short", iter([short] * 4), **size), InvalidImage, "3 rows of 32: it is cut short"),  # type: ignore[arg-type]
        "large": (patched(patched(made("large"), 256, 60_000), 257, 60_000), TooLarge, "60000 × 60000 pixels"),
        "wide": (patched(made("wide"), 256, 900), InvalidImage, "9 strips or tiles, and needs 87"),
        "tall tile": (patched(patched(made("tall tile"), 322, 65_520), 323, 65_520), TooLarge, "re-save it in tiles"),
        "no tile": (patched(made("no tile"), 322, 0), InvalidImage, ""),
        "offset": (patched(made("offset"), 324, [1 << 31] * 9), InvalidImage, "cut short or damaged"),
        "count": (patched(made("count"), 325, [60_000] * 9), InvalidImage, "cut short or damaged"),
        "cut": (cut, InvalidImage, ""),
        "flat": (flat, InvalidImage, "cut short"),
        "flipped": (flipped, InvalidImage, "tile 4 of the TIFF is damaged"),
        "lzma": (patched(made("lzma"), 259, 34925), UnsupportedImage, "LZMA"),
        "jpeg 2000": (patched(made("jpeg 2000"), 259, 33003), InvalidImage, "compressed in a way not read here"),
        "deep lzw": (patched(made("deep lzw", np.dstack([DEEP] * 3), photometric="rgb"), 259, 5), UnsupportedImage, ""),
        "palette": (patched(made("palette", RGB[..., 0]), 262, 3), UnsupportedImage, "PALETTE: re-save it as grey or"),
        "nan": (made("nan", np.full((64, 64), np.nan, np.float32)), InvalidImage, "not finite"),
        "complex": (made("complex", DEEP.astype(np.complex64)), UnsupportedImage, "bits; expected 8"),
        "narrow": (made("narrow", np.zeros((2, 4096), np.uint8)), InvalidImage, "longer than 1024 times"),
    }


def test_what_is_refused(tmp_path: Path) -> None:
    for name, (path, error, words) in damaged(tmp_path).items():
        with pytest.raises(CellrayError) as caught:
            read(path)
        assert type(caught.value) is error, f"{name}: {caught.value!r}"
        assert words in str(caught.value), name


@settings(max_examples=300)
@given(
    flips=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=4),
    tile=st.booleans(),
    big=st.booleans(),
)
def test_a_damaged_file_is_pixels_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], tile: bool, big: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.tif"
    kind: dict[str, Any] = {"tile": (32, 32)} if tile else {"rowsperstrip": 20}
    tifffile.imwrite(path, DEEP, metadata=None, compression="zlib", bigtiff=big, **kind)
    content = bytearray(path.read_bytes())
    for place, value in flips:
        content[place] = value
    path.write_bytes(content)
    try:
        found = read(path)
    except CellrayError:
        return
    assert found.ndim == 3
    assert 1 <= found.shape[2] <= 3
