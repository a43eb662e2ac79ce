"""Labels to train on: our masks data set, COCO JSON, or a folder of label images; by image, as RLE."""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from cluster.errors import CellrayError, InvalidInput, NotFound
from cluster.settings import MIB, Limits
from cluster.storage import Storage
from jobs import images
from serve_app import dataset
from serve_app.model import masks
from serve_app.model.preprocess import Size

MAX_JSON_BYTES = 2048 * MIB
READERS = 4
SUFFIXES = re.compile(r"_(cp_)?(masks?|labels?|seg)$")  # what label images have after their image's name


@dataclass(frozen=True)
class Objects:
    """The objects in one image of `size` (height, width), as compressed RLE, each of two pixels or more; `skipped` had
    fewer."""

    size: Size
    counts: tuple[str, ...]
    skipped: int = 0

    @classmethod
    def of(cls, size: Size, counts: list[str]) -> Objects:
        areas, _ = masks.areas_and_boxes(counts, size)
        kept = tuple(text for text, area in zip(counts, areas, strict=True) if area > 1)
        return cls(size, kept, len(counts) - len(kept))


@dataclass
class Labels:
    """Objects by the image's id, or by its name without folders and suffix (with its full path beside it)."""

    uri: str
    by_id: dict[str, Objects] = field(default_factory=dict)
    by_name: dict[str, list[tuple[PurePosixPath, Objects]]] = field(default_factory=lambda: defaultdict(list))

    def find(self, image_id: str, uri: str) -> Objects | None:
        """An image's objects; None if it is not labelled. Raises InvalidInput where two labels fit its name alike."""
        if image_id in self.by_id:
            return self.by_id[image_id]
        path = PurePosixPath(uri)
        found = self.by_name.get(path.stem, [])
        ranks = [_shared(path.parent, other.parent) for other, _ in found]
        if ranks.count(max(ranks, default=0)) > 1:
            both = " and ".join(str(other) for other, _ in found[:2])
            raise InvalidInput(f"{self.uri} has several labels for {uri}: {both}; give them the folders of the images")
        return found[ranks.index(max(ranks))][1] if found else None

    def example(self) -> str:
        return next(iter(self.by_id), "") or next((str(found[0][0]) for found in self.by_name.values()), "nothing")


def _shared(one: PurePosixPath, other: PurePosixPath) -> int:
    """How many folders, counted from the last, are the same."""
    pairs = zip(reversed(one.parts), reversed(other.parts), strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one.parts), len(other.parts)))


def read(storage: Storage, uri: str, limits: Limits) -> Labels:
    """All labels at `uri`, as RLE in memory: some 200 bytes an object.

    Raises:
        InvalidInput: a label image that is none, or JSON that is not COCO's. NotFound: nothing is there.
    """
    if uri.lower().endswith(".json"):
        return _coco(storage, uri)
    try:
        found = dataset.open(uri, storage)
    except NotFound:
        return _folder(storage, uri, limits)
    return _dataset(found)


def _dataset(found: dataset.Dataset) -> Labels:
    table = found.table(dataset.MASKS, ["image_id", "segmentation"])
    rows: dict[tuple[str, Size], list[str]] = defaultdict(list)
    for row in table.to_pylist():
        rows[row["image_id"], tuple(row["segmentation"]["size"])].append(row["segmentation"]["counts"])
    return Labels(found.uri, {image: Objects.of(size, counts) for (image, size), counts in rows.items()})


def _coco(storage: Storage, uri: str) -> Labels:
    labels = Labels(uri)
    try:
        content = json.loads(storage.read(uri, MAX_JSON_BYTES))
        rows = defaultdict(list)
        for one in content["annotations"]:
            if not one.get("iscrowd"):
                rows[one["image_id"]].append(one["segmentation"])
        for image in content["images"]:
            size, path = (int(image["height"]), int(image["width"])), PurePosixPath(image["file_name"])
            counts = [_rle(segmentation, size) for segmentation in rows[image["id"]]]
            labels.by_name[path.stem].append((path, Objects.of(size, counts)))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise InvalidInput(f"{uri} is no COCO file of instances: {type(error).__name__}: {error}") from error
    return labels


def _rle(segmentation: Any, size: Size) -> str:
    """Polygons, or RLE with its runs as numbers or as text."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], str):
            return str(segmentation["counts"])
        found = coco.frPyObjects(segmentation, *size)
    else:
        found = coco.merge(coco.frPyObjects([ring for ring in segmentation if len(ring) >= 6] or [[0.0] * 6], *size))
    return str(found["counts"].decode())


def _folder(storage: Storage, uri: str, limits: Limits) -> Labels:
    def one(file: images.File) -> tuple[PurePosixPath, Objects]:
        path = PurePosixPath(file.uri)
        try:
            plane = label_image(storage.read(file.uri, limits.image_bytes), limits.image_pixels)
        except CellrayError as error:
            raise type(error)(f"{file.uri}: {error}") from error
        size = plane.shape[0], plane.shape[1]
        return path.with_stem(SUFFIXES.sub("", path.stem) or path.stem), Objects.of(size, of_plane(plane))

    labels = Labels(uri)
    with ThreadPoolExecutor(READERS) as pool:
        for path, objects in pool.map(one, images.files(storage, uri)):
            labels.by_name[path.stem].append((path, objects))
    return labels


def label_image(data: bytes, max_pixels: int) -> np.ndarray:
    """PNG or TIFF file bytes → [height, width] integers, 0 for background. Raises InvalidInput."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "TIFF")) as image:
            if image.width * image.height > max_pixels:
                raise InvalidInput(f"{image.width} × {image.height} pixels; the limit is {max_pixels} in all")
            plane = np.asarray(image)
    except CellrayError:
        raise
    except Exception as error:
        raise InvalidInput(f"no label image: expected a PNG or TIFF of one channel ({error})") from error
    if plane.ndim != 2 or plane.dtype.kind not in "buif" or (plane.dtype.kind == "f" and (plane % 1 != 0).any()):
        raise InvalidInput(
            f"no label image: it has shape {list(plane.shape)} of {plane.dtype}; expected [height, width] whole "
            "numbers, a number an object, 0 for background"
        )
    return plane


def of_plane(plane: np.ndarray) -> list[str]:
    """[h, w] numbers → an RLE for each but 0, in the order of the numbers."""
    size = plane.shape[0], plane.shape[1]
    flat = plane.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts, stops = np.concatenate([[0], edges]), np.concatenate([edges, [flat.size]])
    values = flat[starts]
    order = np.argsort(values, kind="stable")
    _, firsts = np.unique(values[order], return_index=True)
    found = []
    for runs in np.split(order, firsts[1:]):
        if values[runs[0]]:
            ends = np.stack([starts[runs], stops[runs]], axis=1).ravel()
            counts = np.diff(ends, prepend=0, append=flat.size)
            found.append({"size": list(size), "counts": counts[: None if counts[-1] else -1].tolist()})
    return [rle["counts"].decode() for rle in coco.frPyObjects(found, *size)] if found else []
