"""Tensors of the Open Inference Protocol: what arrives as bytes or as lists of values becomes arrays, or an error."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import InvalidInput, TooLarge
from serve_app.bodies import IMAGES

BYTES = "BYTES"
DTYPES = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    BYTES: np.dtype(object),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ANY = -1
MOST_VALUES = 1 << 21  # of a tensor that is no bytes: twice SAM's embedding


@dataclass(frozen=True)
class Tensor:
    """One that a model takes or gives: `shape` has ANY where every length will do. Of several datatypes metadata says
    the first."""

    name: str
    datatypes: tuple[str, ...]
    shape: tuple[int, ...]

    def metadata(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatypes[0], "shape": list(self.shape)}


@dataclass(frozen=True)
class Given:
    """An input as it came: `raw` bytes (little-endian, C order; strings behind their lengths), or a list of values."""

    name: str
    datatype: str
    shape: Sequence[int]
    raw: bytes | memoryview | None = None
    values: Sequence[Any] = ()
    parameters: frozenset[str] = frozenset()


def read(given: Given, expected: Tensor) -> np.ndarray:
    """The input as an array of its shape and datatype; strings are bytes objects.

    Raises:
        InvalidInput, TooLarge: it is not as expected. Names the input.
    """
    name, shape = given.name, tuple(given.shape)
    if given.datatype not in expected.datatypes:
        wanted = " or ".join(expected.datatypes)
        raise InvalidInput(f"input {name} is of datatype {given.datatype[:20]!r}; expected {wanted}")
    fits = len(shape) == len(expected.shape) and all(
        side >= 0 and wanted in (ANY, side) for side, wanted in zip(shape, expected.shape, strict=True)
    )
    if not fits:
        raise InvalidInput(f"input {name} has the shape {list(shape)[:8]}; expected {list(expected.shape)} (-1: any)")
    count = math.prod(shape)
    if given.datatype == BYTES and count > IMAGES:
        raise TooLarge(f"input {name} has {count} elements; the limit is {IMAGES}")
    make = _of_values if given.raw is None else _of_raw
    try:
        return make(given, count).reshape(shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidInput(f"input {name}: {error}") from error


def raw(array: np.ndarray) -> bytes:
    """As `Given.raw` has it."""
    if array.dtype == object:
        return b"".join(struct.pack("<I", len(one)) + one for one in array.flat)
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _of_raw(given: Given, count: int) -> np.ndarray:
    """[count]. Raises ValueError."""
    data, dtype = given.raw or b"", DTYPES[given.datatype]
    if given.datatype == BYTES:
        return _objects(_strings(data, count))
    if len(data) != count * dtype.itemsize:
        raise ValueError(
            f"{len(data)} bytes; a tensor {list(given.shape)} of {given.datatype} has {count * dtype.itemsize}"
        )
    found = np.frombuffer(data, np.uint8 if given.datatype == "BOOL" else dtype)
    return found.astype(dtype, copy=False)


def _strings(data: bytes | memoryview, count: int) -> list[bytes]:
    """Strings, each behind its length as a 32-bit little-endian number. Raises ValueError."""
    found, at = [], 0
    for _ in range(count):
        start = at + 4
        at = start + int.from_bytes(data[at:start], "little")
        found.append(bytes(data[start:at]))
    if at != len(data):
        raise ValueError(f"its {count} strings, each behind its length, have {at} bytes; {len(data)} were sent")
    return found


def _of_values(given: Given, count: int) -> np.ndarray:
    """[count], of a flat or nested list. Raises ValueError."""
    dtype = DTYPES[given.datatype]
    if given.datatype == BYTES:
        values = [one.encode() if isinstance(one, str) else one for one in given.values]
        if not all(isinstance(one, bytes) for one in values) or len(values) != count:
            raise ValueError(f"expected a flat list of {count} strings")
        return _objects(values)
    if max(count, len(given.values)) > MOST_VALUES:
        raise ValueError(f"it has over {MOST_VALUES} values: send it as binary data")
    found = np.array(given.values)  # ValueError: ragged
    if found.size != count:
        raise ValueError(f"{found.size} values; the shape {list(given.shape)} has {count}")
    kinds = {"b": "b", "i": "iu", "u": "iu", "f": "fiu"}[dtype.kind]
    if found.size and found.dtype.kind not in kinds:
        raise ValueError(f"its values are not all {given.datatype}")
    if dtype.kind in "iu" and found.size and not np.array_equal(found.astype(dtype), found):
        raise ValueError(f"a value is out of the range of {given.datatype}")
    return found.astype(dtype).ravel()


def _objects(values: list[bytes]) -> np.ndarray:
    found = np.empty(len(values), object)
    found[:] = values
    return found
