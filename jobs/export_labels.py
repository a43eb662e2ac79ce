"""`cellray export OUT --to labels|zarr-labels`: masks as label images, which whole slides become band by band.

A pixel is 0, or mask_index + 1 of the smallest mask there: uint16, or uint32 where there are 65,536 masks or more.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.util import find_spec
from itertools import chain
from typing import Any

import numpy as np
import tifffile

from cluster.errors import InvalidSettings
from cluster.scratch import Scratch
from cluster.storage import absolute, join, mapped
from jobs import export_zarr, instances
from jobs.export import Names
from jobs.instances import Instances
from serve_app.dataset import Dataset
from serve_app.model import rle

WHOLE_PIXELS = 1 << 26  # up to these an image is painted whole, and kept in strips
TILE, CHUNK = 512, 1024  # of larger TIFFs, and of Zarr arrays, px
CLASSIC = (1 << 32) - (1 << 25)  # bytes: what is more is a BigTIFF, however well it is compressed
WRITERS, WRITING_BYTES = 4, 64 << 20
AT_ONCE = 8  # files of a Zarr array


def check() -> None:
    """Raises InvalidSettings where what zarr-labels needs is missing."""
    if find_spec("zarr") is None:
        raise InvalidSettings("--to zarr-labels needs zarr: pip install 'cellray[zarr]'")


def labels(found: Dataset, names: Names, to: str, done: Callable[[], Any]) -> int:
    """Write a TIFF an image into the folder `to`; → images. Above WHOLE_PIXELS it is in tiles. Where tiles of the image
    failed, its description is {"holes": [[x, y, width, height], …]}. Raises Conflict: there is another file of that
    name."""
    count = 0
    for image in instances.images(found):
        uri = join(absolute(to), names.with_suffix(image.uri, ".tif"))
        if math.prod(image.size) <= WHOLE_PIXELS:
            (plane,) = _bands(image, image.size[0])
            content = io.BytesIO()
            tifffile.imwrite(content, plane, **_options(image))
            found.storage.publish(uri, content.getvalue())
        else:
            _publish_tiles(found, image, uri)
        count += 1
        done()
    return count


def zarr_labels(found: Dataset, names: Names, to: str, done: Callable[[], Any]) -> int:
    """Write a Zarr group an image (format 2) into the folder `to`, an OME-NGFF 0.4 label image of one resolution: the
    array `0` [height, width]; → images. Where tiles of the image failed, they are `holes` among its attributes. Raises
    as `labels`."""
    import zarr

    count = 0
    for image in instances.images(found):
        uri = join(absolute(to), names.with_suffix(image.uri, ".zarr"))
        with mapped(tempfile.gettempdir()), closing(Scratch()) as scratch:
            folder = scratch.path / "labels"
            group = zarr.open_group(folder, mode="w", zarr_format=2)
            bands = _bands(image, CHUNK)
            first = next(bands)
            array = group.create_array(
                "0",
                shape=image.size,
                chunks=(CHUNK, CHUNK),
                dtype=first.dtype,
                fill_value=0,
                chunk_key_encoding={"name": "v2", "separator": "/"},
            )
            for row, band in enumerate(chain([first], bands)):
                array[row * CHUNK : row * CHUNK + len(band)] = band
            group.attrs.update(_attributes(image))
            export_zarr.publish(found.storage, folder, uri, AT_ONCE)
        count += 1
        done()
    return count


def problems(found: Dataset, names: Names) -> Iterator[str]:
    """A line for each image with holes: how many, and where. Those of which nothing else is known are no images of an
    export."""
    for uri, holes in instances.holes(found).items():
        places = "; ".join(",".join(map(str, box)) for box in holes)
        text = f"{len(holes)} tiles failed, and are holes without masks, x,y,width,height: {places}"
        yield f"{uri}: {text}" + ("" if uri in names else "; the image has no masks at all, and is left out")


def _bands(image: Instances, tall: int) -> Iterator[np.ndarray]:
    """[≤ tall, width] at a time."""
    texts, areas, indices = image.read()
    dtype = np.uint16 if indices.max(initial=0) < (1 << 16) - 1 else np.uint32
    return rle.bands(texts, areas, indices.astype(np.int64) + 1, image.size, dtype, tall)


def _options(image: Instances) -> dict[str, Any]:
    holes = json.dumps({"holes": image.holes}) if image.holes else None
    return {"compression": "zlib", "metadata": None, "software": False, "description": holes}


def _publish_tiles(found: Dataset, image: Instances, uri: str) -> None:
    bands = _bands(image, TILE)
    first = next(bands)

    def tiles() -> Iterator[np.ndarray]:
        for band in chain([first], bands):
            for left in range(0, image.size[1], TILE):
                tile = np.zeros((TILE, TILE), band.dtype)
                there = band[:, left : left + TILE]
                tile[: there.shape[0], : there.shape[1]] = there
                yield tile

    with mapped(tempfile.gettempdir()), closing(Scratch()) as scratch:
        path = scratch.path / "labels.tif"
        tifffile.imwrite(
            path,
            tiles(),
            shape=image.size,
            dtype=first.dtype,
            tile=(TILE, TILE),
            bigtiff=math.prod(image.size) * first.itemsize > CLASSIC,
            maxworkers=WRITERS,
            buffersize=WRITING_BYTES,
            **_options(image),
        )
        found.storage.publish(uri, path, ours=True)


def _attributes(image: Instances) -> dict[str, Any]:
    scale = {"type": "scale", "scale": [1.0, 1.0]}
    axes = [{"name": name, "type": "space"} for name in "yx"]
    about: dict[str, Any] = {"image_uri": image.uri}
    if image.holes:
        about["holes"] = [list(box) for box in image.holes]
    return {
        "multiscales": [
            {"version": "0.4", "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": [scale]}]}
        ],
        "image-label": {"version": "0.4"},
        "cellray": about,
    }
