"""Bytes to pixels to model input, and coordinates back. The rules are an id that data sets record.

Pixels become RGB uint8 like this, and no other way:
- EXIF rotation is applied; the first page of an animated or multi-page file is taken.
- 8-bit grey becomes three equal channels; palettes and CMYK are converted by Pillow; alpha is laid over black.
- 16- and 32-bit integers and floats are stretched so that their 0.1st percentile becomes 0 and their 99.9th 255,
  over all channels together (their minimum and maximum where these are equal); what lies outside is clipped.
  16-bit colour PNGs are read by Pillow as their high byte.
- TIFFs of two channels become (first, second, black); of more than three, the first three.
- The long side is resized to the model's input size with Pillow's bilinear filter, as segment_anything does.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cluster.errors import CellrayError, InvalidImage, TooLarge, UnsupportedImage

PREPROCESS = "rgb8-stretch0.1-99.9-long-side-bilinear-1"
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp")
STRETCH_PERCENTILES = (0.1, 99.9)
MAX_ASPECT = 1024  # beyond it the short side would vanish in a 1024 px input

PIXEL_MEAN = (123.675, 116.28, 103.53)  # ImageNet's, RGB in 0–255, as SAM was trained
PIXEL_STD = (58.395, 57.12, 57.375)

# TIFF tags and values (TIFF 6.0 and Adobe's registry).
BITS_PER_SAMPLE, ORIENTATION, SAMPLES_PER_PIXEL, EXTRA_SAMPLES, SAMPLE_FORMAT = 258, 274, 277, 338, 339
WIDTH, LENGTH, STRIPS, ROWS_PER_STRIP, TILE_WIDTH, TILE_LENGTH, TILES = 256, 257, 273, 278, 322, 323, 324
WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q", 17: "q"}  # types, as struct has them
DEFLATES, LZMA = (8, 32946), 34925
TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SPARE_TILE, SPARE_SEGMENTS = 4096 * 4096, 4096  # pixels of a tile, and strips, that a small page may have as well

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True, slots=True)
class ModelImage:
    """An image ready for an encoder: `pixels` [h, w, 3] uint8 RGB whose long side is the input size, and `original`,
    the (height, width) that prompts and masks refer to."""

    pixels: np.ndarray
    original: Size

    @property
    def input(self) -> Size:
        return self.pixels.shape[0], self.pixels.shape[1]


def decode(data: bytes, max_pixels: int) -> np.ndarray:
    """Image file bytes → [height, width, 3] uint8 RGB.

    Raises:
        TooLarge: the header says more than `max_pixels`; nothing was decoded.
        UnsupportedImage: of no format in FORMATS.
        InvalidImage: damaged, cut short, or with values that are not finite.
    """
    return stretch(samples(data, max_pixels))


def samples(data: bytes, max_pixels: int) -> np.ndarray:
    """Image file bytes → [height, width, 1 to 3] of the type that they are kept in, by the rules above but for the
    stretching: grey is one channel, and two stay two. Raises as `decode`."""
    pixels = np.asarray(_decoded(data, max_pixels))
    pixels = (pixels[..., None] if pixels.ndim == 2 else pixels)[..., :3]
    check_finite(pixels)
    return np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("="))


def prepare(data: bytes, image_size: int, max_pixels: int) -> ModelImage:
    """`resize` of `decode`, without a copy of the pixels between them. Raises as `decode`."""
    found = _decoded(data, max_pixels)
    if isinstance(found, np.ndarray):
        return resize(stretch(found), image_size)
    return resize(found if found.mode == "RGB" else found.convert("RGB"), image_size)


def _decoded(data: bytes, max_pixels: int) -> Image.Image | np.ndarray:
    """A grey or RGB image of 8 bits, or [h, w, C] pixels of any type."""
    if not data:
        raise InvalidImage("the file is empty")
    if data[:4] in TIFFS:
        check_layout(data)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(image.width, image.height, max_pixels)
            if image.format == "TIFF" and not _pillow_keeps(image):
                return _decode_tiff(data, max_pixels)
            return _upright_image(image)
    except CellrayError:
        raise
    except UnidentifiedImageError as error:
        if data[:4] in TIFFS:  # of a layout that Pillow does not know
            return _decode_tiff(data, max_pixels)
        raise UnsupportedImage(f"not an image of {', '.join(FORMATS)}, or its header is damaged") from error
    except Image.DecompressionBombError as error:
        raise TooLarge(f"the image has more pixels than the limit of {max_pixels}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError, zlib.error …
        raise InvalidImage(f"the image is damaged or cut short: {error}") from error


def check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooLarge(f"the image has {width} × {height} pixels; the limit is {max_pixels} in all")
    if width < 1 or height < 1:
        raise InvalidImage(f"the image has {width} × {height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InvalidImage(f"the image has {width} × {height} pixels: longer than {MAX_ASPECT} times its short side")


def check_layout(data: bytes | mmap) -> None:
    """A TIFF's tiles are not much larger than its page, and its strips not many more than its rows: a decoder would
    allocate such a tile whatever the page's size, and make a list of the strips before that size is known."""
    tags = first_page(data)

    def number(tag: int, default: int) -> int:
        count, value = tags.get(tag, (1, default))
        if count != 1 or value < 1:
            raise InvalidImage(f"the TIFF's tag {tag} is no positive number")
        return value

    width, height, samples = number(WIDTH, 1), number(LENGTH, 1), number(SAMPLES_PER_PIXEL, 1)
    tile = number(TILE_WIDTH, 1), number(TILE_LENGTH, 1)
    if math.prod(tile) > max(width * height, SPARE_TILE):
        raise TooLarge(f"the TIFF has tiles of {tile[0]} × {tile[1]} pixels, and {width} × {height} in all")
    rows = tags.get(ROWS_PER_STRIP, (1, 0))[1]
    strips = -(-height // rows) if rows > 0 else 1
    tiles = -(-width // max(tile[0], 16)) * -(-height // max(tile[1], 16))
    for tag, most in ((STRIPS, strips), (TILES, tiles)):
        if tags.get(tag, (0, 0))[0] > max(most * samples, SPARE_SEGMENTS):
            raise TooLarge(f"the TIFF has {tags[tag][0]} strips or tiles, and needs {most * samples}")


def first_page(data: bytes | mmap) -> dict[int, tuple[int, int]]:
    """Tag → (how many values, the only one; 0 if that is no whole number), as far as the file can be read: TIFF 6.0,
    page 14. Several values are elsewhere in the file, and not looked at."""
    order, big = "<" if data[:1] == b"I" else ">", 43 in data[2:4]
    offset, count, entry = (f"{order}{code}" for code in (("Q", "Q", "HHQ") if big else ("I", "H", "HHI")))
    tags = {}
    try:
        (at,) = struct.unpack_from(offset, data, 8 if big else 4)
        (entries,) = struct.unpack_from(count, data, at)
        at += struct.calcsize(count)
        for _ in range(min(entries, 1 << 16)):
            tag, kind, values = struct.unpack_from(entry, data, at)
            at += struct.calcsize(entry)
            code = WHOLE_NUMBERS.get(kind)
            tags[tag] = values, struct.unpack_from(order + code, data, at)[0] if code else 0
            at += struct.calcsize(offset)
    except (struct.error, OverflowError):  # cut short, or elsewhere: for the decoders to find
        pass
    return tags


def _pillow_keeps(image: Image.Image) -> bool:
    """Whether Pillow reads a TIFF's samples whole: 8 bits with known channels, or one deep channel."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    samples, signed = tags.get(SAMPLES_PER_PIXEL, 1), 2 in tuple_of(tags.get(SAMPLE_FORMAT, 1))
    if max(tuple_of(tags.get(BITS_PER_SAMPLE, 1))) > 8:
        known = image.mode == "F" or (image.mode == "I" and signed)
        swapped = tags.prefix == b"MM"  # Pillow swaps big-endian samples of 32 bits once too often when compressed
        return samples == 1 and (image.mode.startswith("I;16") or (known and not swapped))
    alpha = {1, 2} & {*tuple_of(tags.get(EXTRA_SAMPLES, 0))}
    return samples != 2 or bool(alpha)


def tuple_of(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _upright_image(image: Image.Image) -> Image.Image | np.ndarray:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        return np.asarray(image)[..., None]
    if "transparency" in image.info or image.mode in ("LA", "La", "RGBA", "RGBa", "PA"):
        image = over_black(image)
    image.load()
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def over_black(image: Image.Image) -> Image.Image:
    """Of any mode with alpha → RGBA."""
    image = image.convert("LA") if image.mode == "La" else image  # Pillow has no shorter way
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA"))


def _decode_tiff(data: bytes, max_pixels: int) -> np.ndarray:
    """The first page of a TIFF with several deep samples, with channels in planes, or of 64 bits."""
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            return page_pixels(file, file.pages.first, max_pixels)
    except CellrayError:
        raise
    except Exception as error:
        raise InvalidImage(f"the TIFF is damaged, or compressed in a way not read here: {error}") from error


def page_pixels(file: Any, page: Any, max_pixels: int) -> np.ndarray:
    """A page of tifffile's TiffFile → [h, w, samples] of the type it is kept in, upright.

    Raises:
        TooLarge, InvalidImage, UnsupportedImage; and anything, where the page is damaged.
    """
    key = page.keyframe  # which has what its like have in common
    if not isinstance(key.imagewidth, int) or not isinstance(key.imagelength, int):
        raise InvalidImage("the TIFF's width or height is no number")
    check_size(key.imagewidth, key.imagelength, max_pixels)
    if key.size > 4 * max_pixels:
        raise TooLarge(f"the TIFF page has {key.size} samples; the limit is {4 * max_pixels}")
    _check_strips(file, page)
    pixels: np.ndarray = page.asarray()
    if not pixels.size:
        raise InvalidImage("the TIFF is damaged: a page holds no pixels")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif key.planarconfig == 2 and pixels.ndim == 3:  # channels one after the other
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim != 3 or pixels.dtype.kind not in "buif":
        raise UnsupportedImage(f"a TIFF page of shape {pixels.shape} and type {pixels.dtype}")
    orientation = key.tags.get(ORIENTATION)
    return upright(pixels, orientation.value if orientation is not None else 1)


def _check_strips(file: Any, page: Any) -> None:
    """No strip or tile inflates to more than its share of the page: tifffile would inflate it whole."""
    key = page.keyframe
    if key.compression not in DEFLATES:
        if key.compression == LZMA:
            raise UnsupportedImage("a TIFF compressed with LZMA")
        return
    size = math.prod(key.chunks) * key.dtype.itemsize
    for data, *_ in file.filehandle.read_segments(page.dataoffsets, page.databytecounts):
        if data and len(zlib.decompressobj().decompress(data, size + 1)) > size:
            raise InvalidImage(f"a strip of the TIFF holds more than its {size} bytes")


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[h, w, C] turned as TIFF's Orientation says (TIFF 6.0, page 36)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def stretch(pixels: np.ndarray) -> np.ndarray:
    """[h, w, C] of any integer or float type → [h, w, 3] uint8, by the percentiles above."""
    pixels = stretched(pixels[..., :3])
    if pixels.shape[2] == 2:
        pixels = np.concatenate([pixels, np.zeros_like(pixels[..., :1])], axis=2)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def stretched(pixels: np.ndarray) -> np.ndarray:
    """Of any shape, and integer or float type → uint8. Raises InvalidImage: not all are finite."""
    check_finite(pixels)
    if pixels.dtype == np.uint8:
        return pixels
    values: np.ndarray = pixels.astype(np.float64 if pixels.dtype.itemsize > 2 else np.float32)
    low, high = np.percentile(values, STRETCH_PERCENTILES)
    if high <= low:  # all but a few pixels are the same
        low, high = values.min(), values.max()
    scale = 255.0 / (high - low) if high > low else 0.0
    made: np.ndarray = np.clip((values - low) * scale + 0.5, 0, 255).astype(np.uint8)
    return made


def check_finite(pixels: np.ndarray) -> None:
    """Raises InvalidImage."""
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise InvalidImage("the image has values that are not finite (NaN or infinite)")


def resize(image: np.ndarray | Image.Image, image_size: int) -> ModelImage:
    """[height, width, 3] uint8, or RGB → the same with its long side at `image_size`, as ResizeLongestSide does."""
    original = (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[0], image.shape[1])
    height, width = input_size(original, image_size)
    if (height, width) != original:
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return ModelImage(np.asarray(image), original)


def input_size(original: Size, image_size: int) -> Size:
    """(height, width) after resizing: segment_anything's rounding, and at least one pixel."""
    scale = image_size / max(original)
    return max(1, int(original[0] * scale + 0.5)), max(1, int(original[1] * scale + 0.5))


def to_input_coordinates(coordinates: np.ndarray, original: Size, image_size: int) -> np.ndarray:
    """[..., 2] (x, y) in original pixels → float32 in input pixels; each axis by its own rounded ratio."""
    height, width = input_size(original, image_size)
    ratio = np.array([width / original[1], height / original[0]])
    return (np.asarray(coordinates, dtype=np.float64) * ratio).astype(np.float32)
