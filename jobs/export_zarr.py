"""`cellray export OUT --to zarr`: stored embeddings as micro-sam's annotator reads them, so that it computes none.

TO/IMAGE.zarr, a Zarr group (format 2, which zarr-python 2 and 3 read): the array `features` [1, 256, 64, 64] float32,
and attributes that `precompute_image_embeddings` of micro-sam 1.8 compares with its image and model before it takes
them: data_signature, tile_shape, halo, model_type; and input_size and original_size, (height, width). It warns that
model_hash and micro_sam_version, which nobody but micro-sam can know, are missing.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster.errors import CellrayError, InvalidImage, InvalidInput, InvalidSettings, NotFound
from cluster.settings import Limits
from cluster.storage import Storage, absolute, join, mapped
from jobs import images
from jobs.export import Names
from jobs.images import Entry
from serve_app import contract, dataset
from serve_app.contract import Embedding
from serve_app.dataset import EMBEDDINGS, Dataset
from serve_app.model.preprocess import ORIENTATION

MODELS = ("vit_t", "vit_b", "vit_l", "vit_h")  # how micro-sam's names of models begin
SHAPE = (256, 64, 64)
AT_ONCE = 8  # images; each holds some 10 MB
ROOT = ".zattrs"  # written last: a group without `input_size` counts as empty


def check() -> None:
    """Raises InvalidSettings where a package is missing."""
    absent = [package for package in ("zarr", "imageio") if find_spec(package) is None]
    if absent:
        raise InvalidSettings(f"--to zarr needs {' and '.join(absent)}: pip install 'cellray[zarr]'")


def uris(found: Dataset) -> list[str]:
    """The images with an embedding.

    Raises:
        NotFound: there is none. InvalidInput: one is of a plane or a tile.
    """
    embedded = found.table(EMBEDDINGS, ["image_uri", "part"])
    if not len(embedded):
        raise NotFound(f"{found.uri} holds no embeddings: run jobs.embed first")
    if parts := [part for part in embedded["part"].to_pylist() if part]:
        raise InvalidInput(
            f"{found.uri} holds {len(parts)} embeddings of planes, channels or tiles (like {parts[0]}); micro-sam "
            "takes those of whole images: embed them without --channels, --z, --t and --tile"
        )
    return list(embedded["image_uri"].to_pylist())


def write(
    found: Dataset,
    names: Names,
    to: str,
    model: str | None,
    limits: Limits,
    done: Callable[[], Any],
    problem: Callable[[str], Any],
) -> int:
    """Write a group an image into the folder `to`; → how many. `model` is micro-sam's name, by default ours;
    `problem(text)` for an image that cannot be read again or is not what was embedded: it is left out.

    Raises:
        InvalidInput: embeddings or a model that micro-sam does not know. Conflict: there is another file of that name.
    """
    entries = images.by_name(found.storage, names.names)
    count = 0

    def one(work: tuple[str, Embedding]) -> str | None:
        uri, embedding = work
        attributes = _attributes(embedding, model, found.uri)
        try:
            pixels = _pixels(found, entries[uri], embedding, limits)
        except CellrayError as error:
            if error.retry:
                raise
            return f"{uri} is left out: {error}"
        attributes["data_signature"] = hashlib.sha1(pixels.tobytes()).hexdigest()
        attributes["cellray"] = {"image_uri": uri, "embedding_id": embedding.embedding_id}
        _publish(found, join(absolute(to), names.with_suffix(uri, ".zarr")), embedding.array, attributes)
        return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for file, record in found.files(EMBEDDINGS):
            there = found.read(file, ["image_uri"])["image_uri"].to_pylist()
            rows = [row for row, stands in enumerate(found.stands(record, there)) if stands]
            for start in range(0, len(rows), AT_ONCE):
                chosen = rows[start : start + AT_ONCE]
                embeddings = dataset.open_embeddings(found.storage, file, chosen)
                for said in pool.map(one, zip((there[row] for row in chosen), embeddings, strict=True)):
                    if said:
                        problem(said)
                    count += said is None
                    done()
    return count


def _attributes(embedding: Embedding, model: str | None, uri: str) -> dict[str, Any]:
    if embedding.array.shape != SHAPE:
        raise InvalidInput(
            f"{uri} holds embeddings of shape {list(embedding.array.shape)}; micro-sam reads those of SAM models of "
            f"1024 px, {list(SHAPE)}"
        )
    name = model or next((one for one in MODELS if one in embedding.model), "")
    if name[:5] not in MODELS:
        raise InvalidInput(
            f"{name or embedding.model!r} is no model of micro-sam: give the one that has this encoder with "
            f"--micro-sam-model, e.g. vit_b or vit_b_lm; names begin with {', '.join(MODELS)}"
        )
    return {
        "input_size": list(embedding.input),
        "original_size": list(embedding.original),
        "tile_shape": None,
        "halo": None,
        "model_type": name[:5],
        "model_name": name,
    }


def _pixels(found: Dataset, entry: Entry, embedding: Embedding, limits: Limits) -> np.ndarray:
    """The image's array as micro-sam gets it, from imageio. Raises CellrayError: it would not find the embedding's."""
    import imageio.v3 as imageio

    data = images.content(found.storage, entry, limits.image_bytes)
    if contract.image_id(data) != embedding.image_id:
        raise InvalidImage("it has changed since it was embedded, or is a crop of a file: run jobs.embed --update")
    suffix = os.path.splitext(entry.uri)[1].lower()
    options: dict[str, Any] = {"extension": suffix} if suffix else {}
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(ORIENTATION, 1) != 1
    except (OSError, ValueError):  # Pillow reads fewer TIFFs
        turned = False
    try:
        pixels = np.asarray(imageio.imread(data, **options))
    except Exception as error:
        raise InvalidImage(f"imageio, by which micro-sam reads images, cannot: {error}") from error
    if turned or pixels.shape[:2] != embedding.original or pixels.ndim > 3:
        height, width = embedding.original
        raise InvalidImage(
            f"micro-sam reads it as {' × '.join(map(str, pixels.shape))}; embedded was its first page, upright, "
            f"{height} × {width}"
        )
    return pixels


def _publish(found: Dataset, uri: str, array: np.ndarray, attributes: dict[str, Any]) -> None:
    import zarr

    features = array[None].astype(np.float32)
    with mapped(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix="cellray-zarr-") as folder:
        group = zarr.open_group(folder, mode="w", zarr_format=2)
        group.create_array("features", shape=features.shape, chunks=features.shape, dtype=features.dtype)[:] = features
        group.attrs.update(attributes)
        publish(found.storage, Path(folder), uri)


def publish(storage: Storage, folder: Path, uri: str, at_once: int = 1) -> None:
    """A group's files, its attributes last."""
    last = folder / ROOT
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != last]

    def one(path: Path) -> None:
        storage.publish(join(uri, *path.relative_to(folder).parts), path)

    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(one, files):
            pass
    one(last)
