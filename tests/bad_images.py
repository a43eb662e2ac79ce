"""Damaged image files and bombs, and a process that decodes them: `python -m tests.bad_images mutations COUNT SEED` and
`python -m tests.bad_images bombs` print one line of JSON. The process has 2 GiB of address space, and CPU_S seconds of
CPU for each file: a decoder that takes more ends it, as a crash does. The file at hand is the last line of stderr."""

from __future__ import annotations

import io
import json
import resource
import signal
import struct
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from cluster.errors import InvalidImage
from cluster.settings import Limits
from jobs import samples
from serve_app.model import preprocess

MAX_PIXELS = 4_000_000
ADDRESS_SPACE = 2 << 30
CPU_S = 20.0  # thousands of times what the slowest needs
TAGS = (254, 256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 282, 284, 317, 320, 322, 323, 324, 325, 338, 339, 347)
LENGTHS = (0, 1, 2, 255, 256, 65535, 1 << 24, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def pillow(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, metadata=None, **options)
    return file.getvalue()


def bases(side: int = 24) -> dict[str, bytes]:
    """A small good file of each format, layout and codec, half smooth and half noise."""
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (side, side + 7, 3), dtype=np.uint8)
    smooth = np.indices(noise.shape).sum(0) * 3 % 256
    pixels = np.where(np.indices(noise.shape)[0] < side // 2, noise, smooth).astype(np.uint8)
    image, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    deep = pixels[..., 0] * np.uint16(257)
    exif = Image.Exif()
    exif[274], exif[271] = 6, "maker"
    frames = {"save_all": True, "append_images": [image.rotate(180)]}
    made = {
        "rgb.png": pillow(image, "PNG"),
        "palette.png": pillow(image.quantize(16), "PNG"),
        "grey16.png": pillow(Image.fromarray(deep), "PNG"),
        "exif6.png": pillow(image, "PNG", exif=exif),
        "animated.png": pillow(image, "PNG", **frames),
        "rgb.jpg": pillow(image, "JPEG"),
        "cmyk.jpg": pillow(image.convert("CMYK"), "JPEG"),
        "progressive.jpg": pillow(image, "JPEG", progressive=True, exif=exif),
        "animated.gif": pillow(image, "GIF", **frames),
        "grey.bmp": pillow(grey, "BMP"),
        "rgb.bmp": pillow(image, "BMP"),
        "lossy.webp": pillow(image, "WEBP"),
        "animated.webp": pillow(image, "WEBP", lossless=True, **frames),
        "float64_planes.tif": tiff(np.moveaxis(pixels / 255, -1, 0), photometric="rgb", planarconfig="separate"),
        "rgb16_tiles_bigtiff.tif": tiff(np.dstack([deep] * 3), photometric="rgb", tile=(16, 16), bigtiff=True),
        "float32.tif": tiff((deep / 65535).astype(np.float32), byteorder=">", rowsperstrip=5),
    }
    for bits, array in ((8, pixels), (16, deep)):
        kind = {"photometric": "rgb" if bits == 8 else "minisblack"}
        made[f"strips{bits}.tif"] = tiff(array, rowsperstrip=4, **kind)
        made[f"tiles{bits}.tif"] = tiff(array, tile=(16, 16), **kind)
        made[f"deflate{bits}.tif"] = tiff(array, compression="zlib", predictor=True, rowsperstrip=8, **kind)
        made[f"deflate_tiles{bits}.tif"] = tiff(array, compression="zlib", tile=(16, 16), **kind)
        made[f"lzw{bits}.tif"] = pillow(Image.fromarray(array), "TIFF", compression="tiff_lzw")
    made["deflate_rgb16.tif"] = tiff(np.dstack([deep] * 3), photometric="rgb", compression="zlib")
    made["jpeg.tif"] = pillow(image, "TIFF", compression="jpeg")
    return made


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """One to four of: bytes or bits changed, most of them near the ends, where headers are; a part cut out, doubled or
    filled in; four bytes that may be a length; a TIFF's tag."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        if not data:
            break
        near = rng.integers(0, min(len(data), 200))
        at = int([near, len(data) - 1 - near, rng.integers(0, len(data))][rng.integers(0, 3)])
        length = int(rng.integers(1, 40))
        order = "<" if data[:1] == b"I" else ">"
        match rng.integers(0, 8):
            case 0:
                data[at] = rng.integers(0, 256)
            case 1:
                data[at] ^= 1 << rng.integers(0, 8)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                data[at:at] = rng.bytes(length)
            case 6:
                data[at : at + 4] = np.array(rng.choice(LENGTHS), f"{order}u4").tobytes()
            case _:
                tag = np.array(rng.choice(TAGS), f"{order}u2").tobytes()
                if (place := data.find(tag, 4)) >= 0:
                    data[place + 8 : place + 12] = np.array(rng.choice(LENGTHS), f"{order}u4").tobytes()
    return bytes(data)


def mutation(number: int, seed: int, files: list[bytes]) -> bytes:
    """The same for the same numbers."""
    return mutated(files[number % len(files)], np.random.default_rng((seed, number)))


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def zeros(size: int) -> bytes:
    """So many of them deflated, without having them in memory."""
    deflate = zlib.compressobj(9)
    return b"".join(deflate.compress(bytes(1 << 20)) for _ in range(size >> 20)) + deflate.flush()


def patched(content: bytes, at: int, values: bytes) -> bytes:
    return content[:at] + values + content[at + len(values) :]


def tags_set(content: bytes, tags: dict[int, tuple[int, int]]) -> bytes:
    """A little-endian TIFF with other (count, value or place) in these tags of its first page."""
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        places = {tag: file.pages.first.tags[tag].offset for tag in tags}
    for tag, (count, value) in tags.items():
        content = patched(content, places[tag] + 2, struct.pack("<HII", 4, count, value))
    return content


def bombs() -> dict[str, tuple[bytes, str]]:
    """Small files that promise or inflate to gigabytes, by suffix and kind, and the error that each is."""
    side, files = 50_000, bases()
    jpeg, bmp, webp = files["rgb.jpg"], files["rgb.bmp"], files["animated.webp"]
    grey, palette = np.zeros((24, 31), np.uint8), Image.new("P", (31, 24))
    gif, lossless = pillow(palette, "GIF"), pillow(palette.convert("RGB"), "WEBP", lossless=True)
    made = {
        "pixels.png": samples._bomb(b""),
        "pixels.jpg": patched(jpeg, jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", side, side)),
        "pixels.bmp": patched(bmp, 18, struct.pack("<ii", side, side)),
        "screen.gif": patched(gif, 6, struct.pack("<HH", side, side)),
        "frame.gif": patched(gif, gif.index(b",") + 5, struct.pack("<HH", side, side)),
        "canvas.webp": patched(webp, webp.index(b"VP8X") + 12, (side - 1).to_bytes(3, "little") * 2),
        "lossless.webp": patched(lossless, lossless.index(b"VP8L") + 9, struct.pack("<I", 16382 | 16382 << 14)),
        "many_strips.tif": tags_set(files["strips8.tif"], {273: (1 << 31, 8), 279: (1 << 31, 8)}),
    }
    for bits in (8, 16):
        made[f"pixels{bits}.tif"] = tags_set(files[f"strips{bits}.tif"], {256: (1, side), 257: (1, side)})
        made[f"tiles{bits}.tif"] = tags_set(files[f"deflate_tiles{bits}.tif"], {322: (1, side), 323: (1, side)})
        made[f"less_large_tiles{bits}.tif"] = tags_set(
            files[f"deflate_tiles{bits}.tif"], {322: (1, 1 << 13), 323: (1, 1 << 13)}
        )
    plain, count = tiff(grey, photometric="minisblack"), 1 << 20
    strips = {273: (count, len(plain)), 279: (count, len(plain)), 278: (1, 1)}
    made["a_million_strips.tif"] = tags_set(plain, strips) + bytes(4 * count)
    tiles = tiff(np.dstack([grey] * 3).astype(np.uint16), photometric="rgb", tile=(16, 16), compression="zlib")
    inflates, end = zeros(6 << 26), len(tiles)
    lists = struct.pack("<8I", *[end + 32] * 4, *[len(inflates)] * 4)
    there = {322: (1, 1 << 13), 323: (1, 1 << 13), 324: (4, end), 325: (4, end + 16)}
    made["a_tile_inflates.tif"] = tags_set(tiles, there) + lists + inflates
    found = {name: (content, "TooLarge") for name, content in made.items()}
    text = files["rgb.png"][:33] + png_chunk(b"zTXt", b"k\0\0" + inflates) + files["rgb.png"][33:]
    strip = tiff(np.dstack([grey] * 3).astype(np.uint16), photometric="rgb", compression="zlib")
    strip = tags_set(strip, {273: (1, len(strip)), 279: (1, len(inflates))}) + inflates
    return found | {"text_inflates.png": (text, "InvalidImage"), "a_strip_inflates.tif": (strip, "InvalidImage")}


def outcome(data: bytes, max_pixels: int) -> str:
    """ "pixels", or the name of the error. Raises what should come of no file."""
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        pixels = preprocess.decode(data, max_pixels)
    except InvalidImage as error:
        if isinstance(error.__cause__, MemoryError):
            raise
        return type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    assert pixels.dtype == np.uint8, pixels.dtype
    assert pixels.shape[2:] == (3,), pixels.shape
    assert pixels.size, pixels.shape
    return "pixels"


def peak_mb() -> float:
    """The most that this process ever held; ru_maxrss would begin with its parent's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024  # KiB


def decode_mutations(count: int, seed: int) -> dict[str, Any]:
    """How often what came of so many, and by how much the process grew."""
    files = list(bases().values())
    found = Counter(outcome(one, MAX_PIXELS) for one in files)
    assert found == {"pixels": len(files)}, found
    before = peak_mb()
    for number in range(count):
        print(number, file=sys.stderr)
        found[outcome(mutation(number, seed, files), MAX_PIXELS)] += 1
    return {"outcomes": found, "grown_mb": peak_mb() - before}


def decode_bombs() -> dict[str, Any]:
    """name: (what came of it, milliseconds of CPU, by how many MB the process grew), under the default limits."""
    found = {}
    made = bombs()
    for one in bases().values():  # what is loaded on first use is not a bomb's
        outcome(one, MAX_PIXELS)
    for name, (content, _) in made.items():
        print(name, file=sys.stderr)
        before, start = peak_mb(), time.thread_time()
        result = outcome(content, Limits().image_pixels)
        found[name] = result, 1000 * (time.thread_time() - start), peak_mb() - before
    return found


def main(what: str, *numbers: str) -> None:
    warnings.simplefilter("ignore")  # Pillow's, of damaged tags
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    print(json.dumps(decode_bombs() if what == "bombs" else decode_mutations(*map(int, numbers))))


if __name__ == "__main__":
    main(*sys.argv[1:])
