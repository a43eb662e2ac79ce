"""Files and folders of weights → one flat mapping of segment_anything's names to tensors. Nothing in them is executed.

Read are files by torch.save, safetensors, and folders by Hugging Face's `save_pretrained`, whole or in shards. What
training scripts wrap around the weights is taken off: a dict with an optimizer beside them, prefixes like `model.`.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cluster.errors import InvalidCheckpoint
from serve_app.model import cellsam_names, huggingface

State = dict[str, torch.Tensor]

INDEX = ".index.json"
FOLDER_FILES = tuple(name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", INDEX))
ADVICE = "expected a state dict saved by torch.save, or safetensors"
WOULD_RUN = ("Unsupported global", "Unsupported operand", "Unsupported class")  # torch's words for refused code
WRAPPERS = ("state_dict", "model_state", "model_state_dict", "model")  # where trainers put the weights
MAX_WRAPPERS = 4  # one in another; a mapping may hold itself
ROOTS = {  # a tensor that every encoder has → what is missing in front of it
    "image_encoder.patch_embed.proj.weight": "",
    huggingface.LANDMARK: "",
    "patch_embed.proj.weight": "image_encoder.",
    huggingface.LANDMARK.removeprefix("vision_encoder."): "vision_encoder.",
}


class _Number:
    """In place of a numpy number beside the weights, as a best loss: its value is not wanted, and numpy is not run."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


NUMBERS: list[Any] = [
    (_Number, f"numpy.{name}") for name in ("dtype", "core.multiarray.scalar", "_core.multiarray.scalar")
]


def read(path: Path) -> State:
    """The tensors of a file, of an index of shards, or of a folder that has one of FOLDER_FILES.

    Names are segment_anything's where they are known; others stay as they are, for `checkpoint.extract` to refuse.
    Beside them stand `pixel_mean` and `pixel_std`, three numbers each, and `norm_eps`, one, where the checkpoint says;
    of a CellSAM, what nothing here uses, under `unused.`, and `cellsam_advanced`.

    Raises:
        InvalidCheckpoint: not tensors, cut short, several models in one, or a pickle that wants to run code.
    """
    if not path.is_dir():
        return _named(_tensors(path), path.name)
    found = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
    if found is None:
        raise InvalidCheckpoint(f"the folder {path} is no checkpoint: expected one of {', '.join(FOLDER_FILES)} in it")
    return _named(_tensors(found), found.name) | huggingface.settings(path)


def shown(name: object) -> str:
    """A tensor's name for a message: on one line, printable, not endless."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 120 else f"{text[:117]}…"


def _tensors(path: Path) -> State:
    if not path.name.endswith(INDEX):
        return _unwrapped(_load(path), path.name)
    try:
        files: dict[str, str] = json.loads(path.read_bytes())["weight_map"]
        shards = sorted(set(files.values()))
        beside = all(Path(shard).name == shard and (path.parent / shard).is_file() for shard in shards)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidCheckpoint(f"{path.name} is damaged: expected a weight_map from names to files") from error
    if not beside:
        raise InvalidCheckpoint(f"{path.name} names files that are not beside it: {shown(', '.join(shards))}")
    state: State = {}
    for shard in shards:
        own = _unwrapped(_load(path.parent / shard), shard)
        differing = own.keys() ^ {name for name, file in files.items() if file == shard}
        if differing:
            raise InvalidCheckpoint(
                f"{shard} does not hold what {path.name} says, {shown(min(differing))} for one: save the model again"
            )
        state |= own
    return state


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(9)
    try:
        if head[8:] == b"{":  # eight bytes of length, then JSON: safetensors, whatever the file is called
            return load_file(path)
        with torch.serialization.safe_globals(NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK\x03\x04"))
    except Exception as error:  # a damaged pickle can raise anything
        pickled = head.startswith((b"\x80", b"PK\x03\x04"))
        if pickled and isinstance(error, pickle.UnpicklingError) and any(sign in str(error) for sign in WOULD_RUN):
            match = re.search(r"GLOBAL (\S+)", str(error))
            found = f" ({shown(match[1])})" if match else ""
            raise InvalidCheckpoint(
                f"{path.name} holds more than tensors and numbers{found} and would run code when read: refused. "
                f"{ADVICE}; torch.save(model.state_dict(), …) where it was made leaves the rest out"
            ) from error
        raise InvalidCheckpoint(f"{path.name} is not a checkpoint, or is cut short: {ADVICE}") from error


def _unwrapped(loaded: Any, file: str) -> State:
    """The innermost mapping under WRAPPERS; what stands beside it (epoch, optimizer) is the trainer's."""
    for _ in range(MAX_WRAPPERS):
        inner = [name for name in WRAPPERS if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping)]
        if len(inner) > 1:
            raise InvalidCheckpoint(f"{file} holds several models, {' and '.join(inner)}: {ADVICE} with one of them")
        if not inner:
            break
        loaded = loaded[inner[0]]
    if not isinstance(loaded, Mapping):
        raise InvalidCheckpoint(f"{file} does not hold a mapping of names to tensors: {ADVICE}")
    others = [
        shown(name) for name, value in loaded.items() if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    if others:
        raise InvalidCheckpoint(
            f"{file} does not hold a flat mapping of names to tensors ({', '.join(others[:3])}): {ADVICE}"
        )
    return {name: value.detach() for name, value in loaded.items()}


def _named(state: State, file: str) -> State:
    """Without a prefix that is not segment_anything's, and with its names for Hugging Face's and CellSAM's."""
    if cellsam_names.is_cellsam(state):
        found = dict(zip(cellsam_names.renamed(state), state.values(), strict=True))
        return found | {cellsam_names.ADVANCED: torch.tensor(float(cellsam_names.is_advanced(state)))}
    renamed: State = {}
    for landmark, root in ROOTS.items():
        prefixes = [name.removesuffix(landmark) for name in state if f".{name}".endswith(f".{landmark}")]
        if len(prefixes) > 1:
            under = " and ".join(shown(f"{prefix}*") for prefix in prefixes)
            raise InvalidCheckpoint(f"{file} holds several models, {under}: {ADVICE} with one of them")
        if prefixes:
            (prefix,) = prefixes
            names = [root + name.removeprefix(prefix) if name.startswith(prefix) else name for name in state]
            break
    else:
        return state
    if f"{root}{landmark}" == huggingface.LANDMARK:
        names = huggingface.renamed(names)
        renamed["norm_eps"] = torch.tensor(huggingface.NORM_EPS, dtype=torch.float64)
    for old, name, tensor in zip(state, names, state.values(), strict=True):
        if name in renamed and not _same(renamed[name], tensor):
            raise InvalidCheckpoint(f"{file} has two different tensors for {shown(name)}; one is {shown(old)}")
        renamed[name] = tensor
    return renamed


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    plain = one.layout == other.layout == torch.strided and one.dtype == other.dtype
    return plain and torch.equal(one, other)
