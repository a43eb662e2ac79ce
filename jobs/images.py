"""Readers: which images an INPUT holds, and one of them from storage to model input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cluster.errors import NotFound
from cluster.settings import Limits
from cluster.storage import File, Storage
from serve_app import contract
from serve_app.model import preprocess
from serve_app.model.preprocess import SUFFIXES, ModelImage
from serve_app.model.prompts import GridOptions, crops


@dataclass(frozen=True, slots=True)
class ReadImage:
    """An image in memory: its content's id, and the pixels for the model, of the whole and of crops if asked for."""

    image_id: str
    image: ModelImage
    crops: tuple[np.ndarray, ...] = ()


def find(storage: Storage, uri: str) -> Iterator[File]:
    """Image files at or below `uri` (a folder, a file, `s3://…`), by suffix, in a fixed order.

    Raises:
        NotFound: nothing is there, or nothing with a suffix of an image.
    """
    others = found = 0
    for file in storage.list(uri):
        if file.uri.lower().endswith(SUFFIXES):
            found += 1
            yield file
        else:
            others += 1
    if not found:
        passed = f" ({others} files with other names)" if others else ""
        raise NotFound(f"no images under {uri}{passed}; looked for {', '.join(SUFFIXES)}")


def read(storage: Storage, file: File, image_size: int, limits: Limits, grid: GridOptions | None = None) -> ReadImage:
    """Fetch, decode and resize one image, and the crops that `grid` lays over it.

    Raises:
        InvalidImage and its kinds: the row for `errors`. NotFound, Forbidden, Unavailable: the storage's.
    """
    data = storage.read(file.uri, limits.image_bytes)
    pixels = preprocess.decode(data, limits.image_pixels)
    parts = crops((pixels.shape[0], pixels.shape[1]), grid)[1:] if grid else []
    cut = tuple(crop.cut(pixels, image_size) for crop in parts)
    return ReadImage(contract.image_id(data), preprocess.resize(pixels, image_size), cut)
