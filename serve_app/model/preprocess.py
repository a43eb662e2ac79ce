"""Bytes to pixels to model input, and coordinates back. The rules are an id that data sets record.

Pixels become RGB uint8 like this, and no other way:
- EXIF rotation is applied; the first page of an animated or multi-page file is taken.
- 8-bit grey becomes three equal channels; palettes and CMYK are converted by Pillow; alpha is laid over black.
- 16- and 32-bit integers and floats are stretched so that their 0.1st percentile becomes 0 and their 99.9th 255,
  over all channels together; what lies outside is clipped. (16-bit colour PNGs are read by Pillow as their high byte.)
- TIFFs of two channels become (first, second, black); of more than three, the first three.
- The long side is resized to the model's input size with Pillow's bilinear filter, as segment_anything does.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

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
    if not data:
        raise InvalidImage("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit stands below
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image.width, image.height, max_pixels)
                if image.format == "TIFF" and _is_scientific(image):
                    return _decode_tiff(data, max_pixels)
                return _to_rgb8(image)
    except CellrayError:
        raise
    except UnidentifiedImageError as error:
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):  # TIFFs of a layout that Pillow does not know
            return _decode_tiff(data, max_pixels)
        raise UnsupportedImage(f"not an image of {', '.join(FORMATS)}, or its header is damaged") from error
    except Image.DecompressionBombError as error:
        raise TooLarge(f"{error}; the limit is {max_pixels} pixels") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError, zlib.error …
        raise InvalidImage(f"the image is damaged or cut short: {error}") from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooLarge(f"the image has {width} × {height} pixels; the limit is {max_pixels} in all")
    if width < 1 or height < 1:
        raise InvalidImage(f"the image has {width} × {height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InvalidImage(f"the image has {width} × {height} pixels: longer than {MAX_ASPECT} times its short side")


def _is_scientific(image: Image.Image) -> bool:
    bits = image.tag_v2.get(258, (8,))  # type: ignore[attr-defined]  # TIFF tag BitsPerSample
    return max(bits if isinstance(bits, tuple) else (bits,)) > 8


def _to_rgb8(image: Image.Image) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _stretch(np.asarray(image)[..., None])
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.ascontiguousarray(np.asarray(image.convert("RGB")))


def _decode_tiff(data: bytes, max_pixels: int) -> np.ndarray:
    """The first page of a TIFF with more than 8 bits a sample, or with channels in planes."""
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages.first
            _check_size(page.imagewidth, page.imagelength, max_pixels)
            if page.size > 4 * max_pixels:
                raise TooLarge(f"the TIFF page has {page.size} samples; the limit is {4 * max_pixels}")
            pixels = page.asarray()
            planar = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and pixels.ndim == 3
    except CellrayError:
        raise
    except Exception as error:
        raise InvalidImage(f"the TIFF is damaged, or compressed in a way not read here: {error}") from error
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif planar:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim != 3 or pixels.dtype.kind not in "buif":
        raise UnsupportedImage(f"a TIFF page of shape {pixels.shape} and type {pixels.dtype}")
    return _stretch(pixels)


def _stretch(pixels: np.ndarray) -> np.ndarray:
    """[h, w, C] of any integer or float type → [h, w, 3] uint8, by the percentiles above."""
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise InvalidImage("the image has values that are not finite (NaN or infinite)")
    pixels = pixels[..., :3]
    if pixels.dtype != np.uint8:
        values: np.ndarray = pixels.astype(np.float64 if pixels.dtype.itemsize > 2 else np.float32)
        low, high = np.percentile(values, STRETCH_PERCENTILES)
        scale = 255.0 / (high - low) if high > low else 0.0
        pixels = np.clip((values - low) * scale + 0.5, 0, 255).astype(np.uint8)
    if pixels.shape[2] == 2:
        pixels = np.concatenate([pixels, np.zeros_like(pixels[..., :1])], axis=2)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def resize(pixels: np.ndarray, image_size: int) -> ModelImage:
    """[height, width, 3] uint8 → the same image with its long side at `image_size`, as ResizeLongestSide does."""
    original = pixels.shape[0], pixels.shape[1]
    height, width = input_size(original, image_size)
    if (height, width) != original:
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    return ModelImage(pixels, original)


def input_size(original: Size, image_size: int) -> Size:
    """(height, width) after resizing: segment_anything's rounding, and at least one pixel."""
    scale = image_size / max(original)
    return max(1, int(original[0] * scale + 0.5)), max(1, int(original[1] * scale + 0.5))


def to_input_coordinates(coordinates: np.ndarray, original: Size, image_size: int) -> np.ndarray:
    """[..., 2] (x, y) in original pixels → float32 in input pixels; each axis by its own rounded ratio."""
    height, width = input_size(original, image_size)
    ratio = np.array([width / original[1], height / original[0]])
    return (np.asarray(coordinates, dtype=np.float64) * ratio).astype(np.float32)
