"""Real images in the formats people bring, to try the jobs on: `python -m jobs.samples OUT`.

The pictures are those inside the scikit-image wheel, none of the ones it would download.
"""

from __future__ import annotations

import argparse
import errno
import os
import struct
import sys
import zlib
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

Pixels = npt.NDArray[Any]  # [H, W] or [H, W, 3] uint8, as the wheel has them
Encode = Callable[[bytes], bytes]  # the bytes of a bundled file → the bytes of a sample

EXIF_ORIENTATION, ROTATE_RIGHT_TO_VIEW = 0x0112, 6  # EXIF 2.32, 4.6.4


def _pillow(source: bytes, kind: str, change: Callable[[Image.Image], Image.Image], **options: Any) -> bytes:
    out = BytesIO()
    change(Image.open(BytesIO(source))).save(out, kind, **options)
    return out.getvalue()


def _tiff(source: bytes, change: Callable[[Pixels], Pixels]) -> bytes:
    """Uncompressed, and without the date and the writer's version, which would change the bytes."""
    out, pixels = BytesIO(), change(np.asarray(Image.open(BytesIO(source))))
    photometric = "rgb" if pixels.shape[-1] == 3 else "minisblack"
    tifffile.imwrite(out, pixels, byteorder="<", photometric=photometric, metadata=None, software=False)
    return out.getvalue()


def _phone(source: bytes) -> bytes:
    """Lies on its side, and stands up again in a reader that obeys the tag."""
    image, exif, out = Image.open(BytesIO(source)), Image.Exif(), BytesIO()
    exif[EXIF_ORIENTATION] = ROTATE_RIGHT_TO_VIEW
    image.transpose(Image.Transpose.ROTATE_90).save(out, "JPEG", quality=90, exif=exif)
    return out.getvalue()


def _bomb(_: bytes) -> bytes:
    """A PNG whose header promises 50000 x 50000 grey pixels and whose data holds one row of them."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1 + 50_000))), (b"IEND", b"")):
        png += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return png


_as_is: Encode = bytes
_jpeg = partial(_pillow, kind="JPEG", change=lambda image: image, quality=90)
_cmyk = partial(_pillow, kind="JPEG", change=lambda image: image.convert("CMYK"), quality=90)
_palette = partial(_pillow, kind="PNG", change=lambda image: image.quantize(256))
_rgba = partial(_pillow, kind="PNG", change=lambda image: image.convert("RGBA"))
_png16 = partial(_pillow, kind="PNG", change=lambda image: Image.fromarray(np.array(image) * np.uint16(257)))
_tiff8 = partial(_pillow, kind="TIFF", change=lambda image: image, compression="tiff_adobe_deflate")
_tiff12 = partial(_tiff, change=lambda pixels: pixels * np.uint16(16) + pixels // 16)  # 255 → 4095
_tiff16 = partial(_tiff, change=lambda pixels: pixels * np.uint16(257))  # 255 → 65535
_float32 = partial(_tiff, change=lambda pixels: pixels / np.float32(255))
_nan = partial(_tiff, change=lambda pixels: np.where(pixels > 200, np.nan, pixels / 255).astype(np.float32))
_pages = partial(_tiff, change=lambda pixels: np.stack([pixels, pixels[::-1], pixels[:, ::-1]]))

GOOD: dict[str, tuple[Encode, str]] = {  # name: how, from which bundled files
    "{}_grey8.png": (_as_is, "camera.png cell.png clock_motion.png coins.png microaneurysms.png moon.png"),
    "{}_grey16.png": (_png16, "cell.png gravel.png"),
    "{}_palette.png": (_palette, "cell.png ihc.png"),
    "{}_rgb.png": (_as_is, "coffee.png ihc.png"),
    "{}_rgba.png": (_rgba, "horse.png ihc.png"),
    "{}_grey8.jpg": (_jpeg, "brick.png cell.png"),
    "{}_rgb.jpg": (_as_is, "hubble_deep_field.jpg retina.jpg rocket.jpg"),
    "{}_cmyk.jpg": (_cmyk, "ihc.png"),
    "{}_exif6.jpg": (_phone, "chelsea.png"),
    "{}_grey8.tif": (_tiff8, "coins.png grass.png page.png"),
    "{}_rgb8.tif": (_tiff8, "astronaut.png ihc.png"),
    "{}_grey12.tif": (_tiff12, "cell.png microaneurysms.png"),
    "{}_rgb16.tif": (_tiff16, "ihc.png"),
    "{}_float32.tif": (_float32, "cell.png coins.png"),
    "{}_pages.tif": (_pages, "cell.png ihc.png"),
    "{}.tif": (_as_is, "multipage.tif multipage_rgb.tif"),
}
BROKEN: dict[str, tuple[Encode, str]] = {
    "broken/truncated.jpg": (lambda source: source[: len(source) // 2], "retina.jpg"),
    "broken/empty.png": (lambda _: b"", "cell.png"),
    "broken/not_an_image.png": (lambda _: b"This is text, whatever its name says.\n", "cell.png"),
    "broken/nan.tif": (_nan, "cell.png"),
    "broken/bomb.png": (_bomb, "cell.png"),
}


def write_samples(out: Path, broken: bool = True) -> list[Path]:
    """About thirty small images in PNG, JPEG and TIFF, at most 1500 px a side, as `out/NAME` → their paths.

    Grey and colour; uint8, uint16 (12 or 16 bits used), float32 and float64 in 0..1; palette, alpha, CMYK,
    EXIF orientation, pages. With `broken` also five files in `out/broken/` that a reader should refuse.
    Writing again gives the same bytes; a file appears whole or not at all; others in `out` are left alone.
    ModuleNotFoundError without scikit-image; OSError where `out` is no folder or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder", str(out))
    bundled, paths = files("skimage.data"), []
    for name, (encode, sources) in (GOOD | BROKEN if broken else GOOD).items():
        for source in sources.split():
            path = out / name.format(Path(source).stem)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            try:
                part.write_bytes(encode((bundled / source).read_bytes()))
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
            paths.append(path)
    return paths


def main(argv: list[str] | None = None) -> int:
    """→ 0, or 2 with one line on stderr when nothing can be written or scikit-image is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.samples",
        description="Write about thirty small real images (PNG, JPEG, TIFF; grey and colour; 8 to 64 bits) "
        "to try the jobs on, and a few broken ones in OUT/broken. scikit-image brings them: no download.",
        epilog="example: python -m jobs.samples images && python -m jobs.embed images embeddings",
    )
    parser.add_argument("out", metavar="OUT", help="local folder to write into; made if missing")
    parser.add_argument("--no-broken", dest="broken", action="store_false", help="leave out the broken files")
    args = parser.parse_args(argv)
    try:
        if "://" in args.out:
            raise OSError(errno.EINVAL, "it is a URI, and a local folder is expected", args.out)
        paths = write_samples(Path(args.out), args.broken)
    except ModuleNotFoundError as error:
        print(f"scikit-image is needed ({error}): pip install 'cellray[samples]'", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cannot write the samples into {args.out}: {error.strerror}", file=sys.stderr)
        return 2
    bad = len(BROKEN) if args.broken else 0
    kinds = f"{len(paths) - bad} images" + (f" and {bad} broken ones" if bad else "")
    print(f"{kinds} in {args.out} ({sum(path.stat().st_size for path in paths) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
