"""A checkpoint's architecture as a tree: shapes, parameter counts, and which deployment would hold what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from serve_app.model import cellsam_names, checkpoint

DEPLOYMENTS = {
    checkpoint.ENCODER: "Encoder",
    checkpoint.DECODER: "Decoder",
    checkpoint.DETECTOR: "CellFinder",
    "card": "model.json",
    "unused": "nobody",
}
Tree = dict[str, Any]  # a name's part → what is below it, or a tensor's shape


def tree(state: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Lines for people, of the tensors by our names as `state.read` gives them. Numbered parts that are built alike, as
    a transformer's blocks, are shown once."""
    parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in DEPLOYMENTS}
    for name, tensor in state.items():
        parts[checkpoint.part(name)][name.removeprefix(cellsam_names.UNUSED)] = tensor
    for part, tensors in parts.items():
        if tensors:
            yield f"{_count(tensors.values()):>13,}  held by {DEPLOYMENTS[part]}"
            yield from _lines(_nested(tensors), "  ")


def _nested(tensors: Mapping[str, torch.Tensor]) -> Tree:
    root: Tree = {}
    for name, tensor in tensors.items():
        *above, last = name.split(".")
        node = root
        for step in above:
            node = node.setdefault(step, {})
        node[last] = tuple(tensor.shape)
    return root


def _lines(node: Tree, indent: str) -> Iterator[str]:
    alike: dict[tuple[str, str], list[str]] = {}
    for name, own in node.items():
        alike.setdefault((repr(own), "" if name.isdigit() else name), []).append(name)
    for names in alike.values():
        own, name = node[names[0]], ", ".join(names)
        if isinstance(own, tuple):
            yield f"{_size(own):>13,}  {indent}{name} {list(own)}"
            continue
        count = f"{len(names) * _total(own):>13,}  {indent}{name}"
        if all(isinstance(below, tuple) for below in own.values()):
            yield count + "".join(f"  {key} {list(shape)}" for key, shape in own.items())
        else:
            yield count
            yield from _lines(own, indent + "  ")


def _total(node: Tree) -> int:
    return sum(_size(own) if isinstance(own, tuple) else _total(own) for own in node.values())


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _count(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)
