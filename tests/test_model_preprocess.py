"""Every rule of preprocess.py, its limits, and that nothing but our own errors comes out of it."""

from __future__ import annotations

import io
import re
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide

from cluster.errors import CellrayError, InvalidImage, TooLarge, UnsupportedImage
from serve_app.model import encoder, preprocess
from tests import weights_of_sam

pytest.importorskip("skimage")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged tags

LIMIT = 4_000_000  # pixels
RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (24, 31), dtype=np.uint8)
RGB = RANDOM.integers(0, 256, (24, 31, 3), dtype=np.uint8)
DEEP = RANDOM.integers(0, 65536, (24, 31), dtype=np.uint16)
CHANNELS = RANDOM.integers(0, 256, (24, 31, 6), dtype=np.uint8)


def pillow(pixels: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, metadata=None, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        out += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return out


def decode(data: bytes) -> np.ndarray:
    pixels = preprocess.decode(data, LIMIT)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.flags.c_contiguous
    assert pixels.size
    return pixels


def stretched(pixels: np.ndarray) -> np.ndarray:
    """The rule, spelled out."""
    low, high = np.percentile(pixels.astype(np.float64), (0.1, 99.9))
    return np.rint(np.clip((pixels.astype(np.float64) - low) / (high - low), 0, 1) * 255)


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def assert_near(found: np.ndarray, expected: np.ndarray, levels: int = 1) -> None:
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= levels


# Rules


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
def test_grey_becomes_three_equal_channels(kind: str) -> None:
    assert np.array_equal(decode(pillow(GREY, kind)), three(GREY))


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_colour_stays(kind: str, options: dict[str, Any]) -> None:
    assert np.array_equal(decode(pillow(RGB, kind, **options)), RGB)


def test_jpeg_stays_within_its_loss() -> None:
    smooth = np.asarray(Image.fromarray(RGB[:4, :4]).resize((64, 64), Image.Resampling.BILINEAR))
    assert np.abs(decode(pillow(smooth, "JPEG", quality=95)).astype(int) - smooth).mean() < 5


def test_bilevel_is_black_and_white() -> None:
    bits = Image.fromarray(GREY > 99)
    assert np.array_equal(decode(pillow(bits, "PNG")), three((GREY > 99) * np.uint8(255)))


def test_palette() -> None:
    palette = Image.fromarray(RGB).quantize(256)
    assert np.array_equal(decode(pillow(palette, "PNG")), np.asarray(palette.convert("RGB")))


def test_cmyk() -> None:
    cmyk = Image.fromarray(RGB).convert("CMYK")
    assert np.array_equal(decode(pillow(cmyk, "TIFF")), np.asarray(cmyk.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_laid_over_black(kind: str) -> None:
    rgba = np.dstack([RGB, GREY])
    rgba[:4, :, 3], rgba[-4:, :, 3] = 0, 255
    found = decode(pillow(rgba, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert_near(found, np.rint(rgba[..., :3] * (rgba[..., 3:] / 255)))
    assert not found[:4].any()
    assert np.array_equal(found[-4:], RGB[-4:])


def test_grey_with_alpha_is_laid_over_black() -> None:
    found = decode(pillow(np.dstack([GREY, np.full_like(GREY, 128)]), "PNG"))
    assert_near(found, three(np.rint(GREY * (128 / 255))))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_colour_is_black(kind: str) -> None:
    palette = Image.fromarray(np.where(GREY > 99, 200, 50).astype(np.uint8)).convert("P")
    clear = palette.getpixel(tuple(np.argwhere(GREY.T > 99)[0].tolist()))
    found = decode(pillow(palette, kind, transparency=clear))
    assert np.array_equal(found, three(np.where(GREY > 99, 0, 50)))


@pytest.mark.parametrize(("pixels", "clear"), [(GREY, 7), (RGB, (7, 7, 7))])
def test_a_transparent_colour_is_black(pixels: np.ndarray, clear: int | tuple[int, ...]) -> None:
    pixels = pixels.copy()
    pixels[:5] = 7
    assert not decode(pillow(pixels, "PNG", transparency=clear))[:5].any()


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.transpose(1, 0, 2)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: x[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda x: np.rot90(x)),
    ],
)
def test_exif_rotation_is_applied(orientation: int, turn: Callable[[np.ndarray], np.ndarray]) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    assert np.array_equal(decode(pillow(RGB, "PNG", exif=exif)), turn(RGB))
    tag = [(274, "H", 1, orientation, True)]
    assert np.array_equal(decode(tiff(RGB, photometric="rgb", extratags=tag)), turn(RGB))


def test_rotation_of_a_deep_tiff_is_applied() -> None:
    found = decode(tiff(DEEP, extratags=[(274, "H", 1, 6, True)]))
    assert np.array_equal(found, np.rot90(decode(tiff(DEEP)), -1))


@pytest.mark.parametrize(
    "data",
    [
        tiff(np.stack([GREY, GREY[::-1]]), photometric="minisblack"),
        pillow(GREY, "GIF", save_all=True, append_images=[Image.fromarray(GREY[::-1])]),
        pillow(Image.fromarray(GREY), "PNG", save_all=True, append_images=[Image.fromarray(GREY[::-1])]),
    ],
    ids=["tiff", "gif", "apng"],
)
def test_first_page(data: bytes) -> None:
    assert np.array_equal(decode(data), three(GREY))


def test_first_page_of_a_deep_tiff() -> None:
    assert np.array_equal(decode(tiff(np.stack([DEEP, DEEP[::-1]]), photometric="minisblack")), decode(tiff(DEEP)))


def scaled(kind: str) -> np.ndarray:
    values = DEEP.astype(np.float64) - (0 if kind.startswith("u") else 30000)
    return (values / (1e3 if kind == "float16" else 1) * (1e30 if kind == "float64" else 1)).astype(kind)


@pytest.mark.parametrize("kind", ["uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64"])
def test_deep_tiff_is_stretched(kind: str) -> None:
    assert_near(decode(tiff(scaled(kind))), three(stretched(scaled(kind))))


def test_deep_png_is_stretched() -> None:
    assert_near(decode(pillow(DEEP, "PNG")), three(stretched(DEEP)))


def test_outliers_are_clipped_and_the_rest_keeps_its_contrast() -> None:
    pixels = np.tile(np.arange(1000, 2000, dtype=np.uint16), (100, 1))
    pixels[0, 0], pixels[0, 1] = 65535, 0
    found = decode(tiff(pixels))[..., 0]
    assert (found[0, 0], found[0, 1]) == (255, 0)
    assert_near(found[1], stretched(pixels)[1])
    assert np.unique(found[1]).size == 256


def test_channels_are_stretched_together() -> None:
    deep = np.dstack([DEEP // 4, DEEP // 2, DEEP])
    assert_near(decode(tiff(deep, photometric="rgb")), stretched(deep))


def test_constant_image_is_black() -> None:
    assert not decode(tiff(np.full((9, 9), 777, np.uint16))).any()


def test_deep_colour_png_is_read_as_its_high_byte() -> None:
    deep = RANDOM.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    assert np.array_equal(decode(png(7, 5, 16, 2, rows)), deep >> 8)


@pytest.mark.parametrize("options", [{"byteorder": ">"}, {"bigtiff": True}, {"rowsperstrip": 5}, {"tile": (16, 16)}])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("pixels", [GREY, RGB, DEEP, scaled("float32")], ids=["grey", "rgb", "uint16", "float32"])
def test_layout_of_the_file_does_not_matter(
    pixels: np.ndarray, compression: str | None, options: dict[str, Any]
) -> None:
    kind = {"photometric": "rgb" if pixels.ndim == 3 else "minisblack"}
    found = decode(tiff(pixels, compression=compression, **kind, **options))
    assert np.array_equal(found, decode(tiff(pixels, **kind)))


@pytest.mark.parametrize("compression", ["tiff_adobe_deflate", "packbits", "tiff_lzw"])
def test_compressed_deep_tiff(compression: str) -> None:
    assert np.array_equal(decode(pillow(DEEP, "TIFF", compression=compression)), decode(tiff(DEEP)))


@pytest.mark.parametrize("planar", [False, True])
def test_planes_or_pixels(planar: bool) -> None:
    deep = np.dstack([DEEP, DEEP[::-1], DEEP[:, ::-1]]).astype(np.float64)
    if planar:
        data = tiff(np.ascontiguousarray(np.moveaxis(deep, -1, 0)), photometric="rgb", planarconfig="separate")
    else:
        data = tiff(deep, photometric="rgb")
    assert_near(decode(data), stretched(deep))


def scientific(pixels: np.ndarray, planar: bool) -> bytes:
    if planar:
        pixels = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    return tiff(pixels, photometric="minisblack", planarconfig="separate" if planar else "contig")


@pytest.mark.parametrize(("kind", "planar"), [("uint16", False), ("uint16", True), ("uint8", True), ("uint8", False)])
def test_two_channels_become_the_first_two_and_black(kind: str, planar: bool) -> None:
    found, pixels = decode(scientific(CHANNELS[..., :2].astype(kind), planar)), CHANNELS[..., :2]
    assert_near(found[..., :2], pixels if kind == "uint8" else stretched(pixels))
    assert not found[..., 2].any()


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("count", [4, 5, 6])
def test_of_many_channels_the_first_three(count: int, kind: str, planar: bool) -> None:
    found, pixels = decode(scientific(CHANNELS[..., :count].astype(kind), planar)), CHANNELS[..., :3]
    assert_near(found, pixels if kind == "uint8" else stretched(pixels))


def test_real_files_of_every_kind(sample_images: Path) -> None:
    ihc = decode((sample_images / "ihc_rgb.png").read_bytes())
    for name, levels in {"rgb8.tif": 0, "rgba.png": 0, "pages.tif": 0, "rgb16.tif": 70, "cmyk.jpg": 60}.items():
        assert_near(decode((sample_images / f"ihc_{name}").read_bytes()), ihc, levels)
    cell = decode((sample_images / "cell_grey8.png").read_bytes())
    for name in ("grey16.png", "grey12.tif", "float32.tif"):
        found = decode((sample_images / f"cell_{name}").read_bytes())
        assert np.corrcoef(found.ravel(), cell.ravel())[0, 1] > 0.99
    chelsea = decode((sample_images / "chelsea_exif6.jpg").read_bytes())
    assert chelsea.shape == (300, 451, 3)
    planar = tifffile.imread(sample_images / "multipage_rgb.tif", key=0)  # float64, [3, h, w]
    assert_near(decode((sample_images / "multipage_rgb.tif").read_bytes()), stretched(np.moveaxis(planar, 0, -1)))


# Samples as they are kept

KEPT: dict[str, tuple[bytes, np.ndarray]] = {
    "grey": (pillow(GREY, "PNG"), GREY[..., None]),
    "bilevel": (pillow(Image.fromarray(GREY > 99), "PNG"), ((GREY > 99) * np.uint8(255))[..., None]),
    "rgb": (pillow(RGB, "PNG"), RGB),
    "uint16.png": (pillow(DEEP, "PNG"), DEEP[..., None]),
    "uint16.tif": (pillow(DEEP, "TIFF"), DEEP[..., None]),
    "big-endian.tif": (tiff(DEEP, byteorder=">"), DEEP[..., None]),
    "int32.tif": (tiff(scaled("int32"), byteorder=">", compression="zlib"), scaled("int32")[..., None]),
    "float32.tif": (tiff(scaled("float32")), scaled("float32")[..., None]),
    "float64.tif": (tiff(scaled("float64")), scaled("float64")[..., None]),
    "two.tif": (scientific(CHANNELS[..., :2], True), CHANNELS[..., :2]),
    "deep-two.tif": (scientific(CHANNELS[..., :2].astype(np.uint16), False), CHANNELS[..., :2].astype(np.uint16)),
    "six.tif": (scientific(CHANNELS.astype(np.float32), False), CHANNELS[..., :3].astype(np.float32)),
    "turned.tif": (tiff(DEEP, extratags=[(274, "H", 1, 6, True)]), np.rot90(DEEP, -1)[..., None]),
    "palette": (pillow(Image.fromarray(GREY).convert("P"), "PNG"), three(GREY)),
    "alpha": (pillow(np.dstack([GREY, np.full_like(GREY, 255)]), "PNG"), three(GREY)),
}


@pytest.mark.parametrize("name", KEPT)
def test_samples_are_as_the_file_keeps_them_and_decode_stretches_them(name: str) -> None:
    data, expected = KEPT[name]
    found = preprocess.samples(data, LIMIT)
    assert found.dtype == expected.dtype
    assert found.dtype.isnative
    assert found.flags.c_contiguous
    assert np.array_equal(found, expected)
    assert np.array_equal(decode(data), preprocess.stretch(expected))
    assert np.array_equal(preprocess.prepare(data, 31, LIMIT).pixels, decode(data))


@pytest.mark.parametrize("data", [b"", b"text", b"II*\0", tiff(np.full((9, 9), np.nan, np.float32))])
def test_samples_raise_what_decode_does(data: bytes) -> None:
    with pytest.raises(CellrayError) as expected:
        preprocess.decode(data, LIMIT)
    with pytest.raises(type(expected.value), match=re.escape(str(expected.value))):
        preprocess.samples(data, LIMIT)


# What is refused


@pytest.mark.parametrize(
    ("data", "error", "expected"),
    [
        (b"", InvalidImage, "empty"),
        (b"This is text.\n", UnsupportedImage, "PNG, JPEG, TIFF"),
        (pillow(GREY, "PPM"), UnsupportedImage, "PNG, JPEG, TIFF"),
        (b"II*\0", InvalidImage, "damaged"),
        (tiff(np.full((9, 9), np.nan, np.float32)), InvalidImage, "not finite"),
        (tiff(np.full((9, 9), np.inf)), InvalidImage, "not finite"),
        (tiff(np.full((9, 9), 1j, np.complex64)), UnsupportedImage, "complex64"),
        (pillow(np.zeros((1, 1025), np.uint8), "PNG"), InvalidImage, "1025 × 1 pixels"),
    ],
    ids=["empty", "text", "ppm", "tiff of nothing", "nan", "inf", "complex", "a line"],
)
def test_refused(data: bytes, error: type[InvalidImage], expected: str) -> None:
    with pytest.raises(error, match=expected) as caught:
        decode(data)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_the_longest_line_is_read() -> None:
    assert decode(pillow(np.zeros((1, 1024), np.uint8), "PNG")).shape == (1, 1024, 3)


def promised(height: int, width: int, **options: Any) -> bytes:
    """A 16-bit TIFF whose header promises more than there is."""
    data = bytearray(tiff(DEEP, **options))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tags = file.pages.first.tags
    for code, value in ((256, width), (257, height)):
        data[tags[code].offset + 2 : tags[code].offset + 12] = struct.pack("<HII", 4, 1, value)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [png(50_000, 50_000, 8, 0, bytes(50_001)), png(10_000, 10_000, 8, 0, b""), promised(50_000, 50_000)],
    ids=["bomb", "large", "tiff"],
)
def test_too_large_is_refused_on_its_header(data: bytes) -> None:
    decode(pillow(GREY, "PNG"))  # what is imported on first use is not counted
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(TooLarge, match=str(LIMIT)):
            decode(data)
        took, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
    assert took < 0.5


def test_the_limit_itself_is_allowed() -> None:
    assert preprocess.decode(pillow(GREY, "PNG"), GREY.size).shape == (24, 31, 3)
    with pytest.raises(TooLarge, match="31 × 24"):
        preprocess.decode(pillow(GREY, "PNG"), GREY.size - 1)


def peak_of(data: bytes) -> int:
    """Bytes that Python had allocated at most while it refused or decoded."""
    tracemalloc.start()
    try:
        preprocess.decode(data, LIMIT)
    except CellrayError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_a_strip_that_inflates_without_end() -> None:
    data = bytearray(tiff(np.zeros((16, 16), np.uint16), compression="zlib"))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tags = file.pages.first.tags
    strip = zlib.compress(bytes(64 << 20), 9)
    data[tags[273].offset + 2 : tags[273].offset + 12] = struct.pack("<HII", 4, 1, len(data))
    data[tags[279].offset + 2 : tags[279].offset + 12] = struct.pack("<HII", 4, 1, len(strip))
    assert peak_of(bytes(data) + strip) < 16 << 20


def test_a_width_of_two_values() -> None:
    data = bytearray(tiff(scaled("uint64")))  # a type that Pillow leaves to tifffile
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tags = file.pages.first.tags
    data[tags[256].offset + 2 : tags[256].offset + 12] = struct.pack("<HIHH", 3, 2, 31, 31)
    data[tags[257].offset + 2 : tags[257].offset + 12] = struct.pack("<HII", 4, 1, 5_000_000)
    assert peak_of(bytes(data)) < 16 << 20


def outcome(data: bytes) -> np.ndarray | InvalidImage:
    """Pixels as they should be, or an error as it should be."""
    try:
        return decode(data)
    except InvalidImage as error:
        return error


def test_truncated_anywhere_is_refused(sample_images: Path) -> None:
    for path in sorted(path for path in sample_images.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for tenth in range(10):
            found = outcome(data[: len(data) * tenth // 10])
            if isinstance(found, InvalidImage):
                assert "\n" not in str(found), path.name
            else:
                assert "page" in path.name, "only pages after the first may be missing"


@pytest.fixture(scope="module")
def seeds() -> list[bytes]:
    """Small files of every reader."""
    exif = Image.Exif()
    exif[274], exif[271] = 6, "maker"
    image = Image.fromarray(RGB)
    kinds = [pillow(image, kind) for kind in ("PNG", "GIF", "BMP", "WEBP", "TIFF")]
    kinds += [pillow(image, kind, exif=exif) for kind in ("PNG", "JPEG", "WEBP", "TIFF")]
    kinds += [pillow(image.convert("P"), "PNG"), pillow(image.convert("RGBA"), "PNG"), pillow(DEEP, "PNG")]
    kinds += [pillow(image.convert("CMYK"), "JPEG"), pillow(image, "TIFF", compression="tiff_lzw")]
    kinds += [tiff(DEEP), tiff(DEEP, compression="zlib", tile=(16, 16)), tiff(DEEP, byteorder=">")]
    return [*kinds, scientific(CHANNELS.astype(np.float64), True), scientific(CHANNELS, False)]


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_files_raise_nothing_else(seeds: list[bytes], data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(seeds)))
    place = st.one_of(st.integers(0, min(len(content), 300) - 1), st.integers(0, len(content) - 1))
    for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=8)):
        content[at] = value
    outcome(bytes(content[: data.draw(st.one_of(st.none(), place))]))


@settings(max_examples=100)
@given(st.binary(max_size=400), st.sampled_from([b"", b"II*\0", b"MM\0*", b"\xff\xd8\xff", b"GIF89a"]))
def test_bytes_of_nothing_raise_nothing_else(data: bytes, start: bytes) -> None:
    outcome(start + data)


# Sizes, coordinates and numbers


@pytest.fixture(scope="module")
def sam() -> Sam:
    return weights_of_sam.build("nano")


@settings(deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([256, 1024]))
def test_input_size_is_segment_anythings(height: int, width: int, image_size: int) -> None:
    expected = ResizeLongestSide.get_preprocess_shape(height, width, image_size)
    found = preprocess.input_size((height, width), image_size)
    assert found == tuple(max(1, side) for side in expected)  # a side of no pixels cannot be resized to
    assert max(found) == image_size


@settings(max_examples=25)
@given(st.integers(1, 600), st.integers(1, 600), st.sampled_from([64, 256]))
def test_resize_is_segment_anythings(height: int, width: int, image_size: int) -> None:
    transform = ResizeLongestSide(image_size)
    assume(min(transform.get_preprocess_shape(height, width, image_size)) > 0)
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = preprocess.resize(pixels, image_size)
    assert np.array_equal(found.pixels, transform.apply_image(pixels))
    assert found.original == (height, width)
    assert found.input == found.pixels.shape[:2]


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 99))
def test_coordinates_are_segment_anythings(height: int, width: int, seed: int) -> None:
    transform = ResizeLongestSide(1024)
    assume(min(transform.get_preprocess_shape(height, width, 1024)) > 0)
    points = np.random.default_rng(seed).uniform(0, 1, (3, 4, 2)) * (width, height)
    found = preprocess.to_input_coordinates(points, (height, width), 1024)
    assert found.dtype == np.float32
    assert np.array_equal(found, transform.apply_coords(points, (height, width)).astype(np.float32))


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 256), st.booleans(), st.integers(0, 99))
def test_normalise_is_segment_anythings(sam: Sam, short: int, upright: bool, seed: int) -> None:
    shape = (256, short, 3) if upright else (short, 256, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    found = encoder.normalise([pixels, pixels[:9, :9]], 256)
    assert found.shape == (2, 3, 256, 256)
    for ours, image in zip(found, (pixels, pixels[:9, :9]), strict=True):
        assert torch.equal(ours, sam.preprocess(torch.tensor(image).permute(2, 0, 1)))
