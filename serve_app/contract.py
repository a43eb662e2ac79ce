"""Formats on the wire: what ids mean, and the types that travel between jobs, ingress and replicas."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from serve_app.model.cellsam import PREPROCESS as CELLSAM
from serve_app.model.preprocess import PREPROCESS, Size

APP_NAME = "cellray"
INGRESS = "ingress"
DTYPE = "float16"  # of embeddings as they travel and are kept, if nothing is said; not what they are computed in
DTYPES = (DTYPE, "float32")
LOGITS_DTYPE = "<f2"
POOLED = "pooled"  # where a data set keeps no more of an embedding than the mean over its image
Item = TypeVar("Item")


def encoder_deployment(model: str) -> str:
    """The name to use in deploy YAML for a model's encoder."""
    return f"{model}-encoder"


def decoder_deployment(model: str) -> str:
    return f"{model}-decoder"


def cellfinder_deployment(model: str) -> str:
    """Of models whose settings say `cells: true`."""
    return f"{model}-cellfinder"


def image_id(data: bytes, part: str = "") -> str:
    """sha256 of the image file's bytes, hex; of a part of it, sha256 over that and the part's name."""
    return part_id(hashlib.sha256(data).hexdigest(), part)


def part_id(image: str, part: str) -> str:
    """Of a part of an image that has the id `image`."""
    return hashlib.sha256(f"{image}\n{part}".encode()).hexdigest() if part else image


def embedding_id(image: str, encoder_sha256: str, dtype: str, kept: str = DTYPE, preprocess: str = PREPROCESS) -> str:
    """sha256 over what an embedding is a function of: image, `preprocess`, encoder, `kept`, one of DTYPES or POOLED,
    and `dtype`, what it was computed in. Hex."""
    return hashlib.sha256("\n".join((image, preprocess, encoder_sha256, kept, dtype)).encode()).hexdigest()


def packed(logits: np.ndarray) -> dict[str, Any]:
    """[h, w] → what JSON has of a mask's logits: their shape, and float16, little-endian, C order, in base64."""
    data = np.ascontiguousarray(logits, LOGITS_DTYPE).tobytes()
    return {"shape": logits.shape, "data": base64.b64encode(data).decode()}


def unpacked(shape: Sequence[int], data: str) -> np.ndarray:
    """What `packed` packed: [h, w] float16. Raises ValueError."""
    return np.frombuffer(base64.b64decode(data, validate=True), LOGITS_DTYPE).reshape(shape)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a replica says of its model. Sizes in pixels; hashes are sha256 in hex, empty for a part that it has not;
    `dtype` is what products are computed in; `warning` is for whoever runs the service."""

    name: str
    family: str
    image_size: int
    patch: int
    channels: int
    encoder_sha256: str
    decoder_sha256: str
    licence: str
    trained: bool
    runtime: str
    device: str
    dtype: str
    preprocess: str = PREPROCESS
    warning: str = ""
    detector_sha256: str = ""

    @property
    def embedding_shape(self) -> tuple[int, int, int]:
        grid = self.image_size // self.patch
        return (self.channels, grid, grid)


@dataclass(frozen=True, slots=True)
class Embedding:
    """One image's embedding. `array` [channels, grid, grid] of one of DTYPES; `original`, `input`: (height, width)."""

    embedding_id: str
    image_id: str
    model: str
    encoder_sha256: str
    original: Size
    input: Size
    array: np.ndarray

    def pooled(self, patch: int) -> np.ndarray:
        """[channels] float32: the mean over the tokens that hold image, not padding."""
        rows, columns = (-(-side // patch) for side in self.input)
        return self.array[:, :rows, :columns].mean(axis=(1, 2), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Made:
    """What cells are made from: an embedding that is kept nowhere."""

    embedding_id: str
    image_id: str
    model: str

    @classmethod
    def of(cls, image: str, info: ModelInfo) -> Made:
        """Of an image, or a part of one, by its id."""
        made = embedding_id(image, info.encoder_sha256, info.dtype, preprocess=CELLSAM)
        return cls(made, image, info.name)


class Timed(list[Item]):
    """A replica's answer, an item each; `ran_s` are the seconds that `model` took for all of its batch."""

    def __init__(self, items: Iterable[Item], model: str, ran_s: float) -> None:
        super().__init__(items)
        self.model, self.ran_s = model, ran_s
