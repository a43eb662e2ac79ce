"""Prompt tables: which boxes and points to segment in which image."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import InvalidPrompt
from cluster.settings import MIB
from cluster.storage import Storage, join
from serve_app.model.prompts import Prompts
from serve_app.model.tiles import Box

MAX_TABLE_BYTES = 1024 * MIB
COLUMNS = "image_uri and box [x0, y0, x1, y1], or points [[x, y], …] with labels [1, 0, …], or both"


@dataclass(frozen=True, slots=True)
class ImagePrompts:
    """One image's prompts, and each of them as JSON for the masks data set."""

    prompts: Prompts
    texts: list[str]
    left_out: tuple[str, ...] = ()

    def within(self, tiles: Sequence[Box], index: int) -> ImagePrompts:
        """Those that are for one of an image's tiles, in its coordinates. Each is for that of the tiles it lies in
        whose centre is nearest; `left_out` are those that lie in none."""
        least, most = self._extents()
        x, y, width, height = np.array(tiles).T
        first, last = np.stack([x, y], axis=1), np.stack([x + width, y + height], axis=1)
        there = np.all((least[:, None] >= first) & (most[:, None] <= last), axis=2)
        away = np.abs((least + most)[:, None] - first - last).max(axis=2)
        chosen = np.where(np.any(there, axis=1), np.where(there, away, np.inf).argmin(axis=1), -1)
        rows = np.flatnonzero(chosen == index)
        boxes, points, labels = self.prompts.boxes, self.prompts.points, self.prompts.labels
        corner = first[index].astype(np.float32)
        moved = Prompts(
            None if boxes is None else boxes[rows] - np.tile(corner, 2),
            None if points is None or labels is None else np.where(labels[rows, :, None] < 0, 0, points[rows] - corner),
            None if labels is None else labels[rows],
        )
        lost = tuple(self.texts[row] for row in np.flatnonzero(chosen < 0))
        return ImagePrompts(moved, [self.texts[row] for row in rows], lost)

    def _extents(self) -> tuple[np.ndarray, np.ndarray]:
        """(least, most) [N, 2] x and y that each prompt reaches."""
        corners: list[np.ndarray] = []
        if self.prompts.boxes is not None:
            corners += [self.prompts.boxes[:, None, :2], self.prompts.boxes[:, None, 2:]]
        if self.prompts.points is not None and self.prompts.labels is not None:
            real, first = self.prompts.labels[..., None] >= 0, self.prompts.points[:, :1]
            corners.append(np.where(real, self.prompts.points, first))
        every = np.concatenate(corners, axis=1)
        return every.min(axis=1), every.max(axis=1)

    @property
    def type(self) -> str:
        return "box" if self.prompts.points is None else "points" if self.prompts.boxes is None else "box+points"


def read(storage: Storage, uri: str, base: str) -> dict[str, ImagePrompts]:
    """A Parquet, CSV or JSONL table, one row an object, by image URI. CSV holds lists as JSON text.

    `image_uri` is a full URI, or relative to `base`.

    Raises:
        InvalidPrompt: a column is missing, or a row does not parse: names the row. NotFound: no such table.
    """
    by_image: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(_rows(storage, uri)):
        try:
            image, prompt = _parse(row)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise InvalidPrompt(f"{uri}, row {number}: {error}; expected columns {COLUMNS}") from error
        full = image if "://" in image or image.startswith("/") else join(base, image)
        by_image.setdefault(full, []).append(prompt)
    if not by_image:
        raise InvalidPrompt(f"{uri} has no rows; expected columns {COLUMNS}")
    return {image: _collect(uri, image, rows) for image, rows in by_image.items()}


def _rows(storage: Storage, uri: str) -> list[dict[str, Any]]:
    data = storage.read(uri, MAX_TABLE_BYTES)
    try:
        if uri.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(data))
        elif uri.endswith(".csv"):
            from pyarrow import csv

            table = csv.read_csv(io.BytesIO(data))
        elif uri.endswith((".jsonl", ".ndjson")):
            return [json.loads(line) for line in data.decode().split("\n") if line.strip()]
        else:
            raise InvalidPrompt(f"{uri} is no prompt table; expected .parquet, .csv or .jsonl")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InvalidPrompt(f"{uri} could not be read as a table: {error}") from error
    names = set(table.column_names)
    if "image_uri" not in names or not names & {"box", "points"}:
        raise InvalidPrompt(f"{uri} has columns {', '.join(sorted(names))}; expected {COLUMNS}")
    return table.to_pylist()


def _json(text: str) -> Any:
    """A cell of CSV; an empty one is none."""
    return json.loads(text) if text.strip() else None


def _number(value: Any) -> float:
    number = float(value)
    if not abs(number) < 1e9:
        raise ValueError(f"{value} is no coordinate")
    return number


def _parse(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(image URI, {"box": …, "points": …, "labels": …}) with lists of floats and ints."""
    if not isinstance(row, dict) or not isinstance(row.get("image_uri"), str):
        raise ValueError("no image_uri")
    values = {name: row.get(name) for name in ("box", "points", "labels")}
    values = {name: _json(value) if isinstance(value, str) else value for name, value in values.items()}
    prompt: dict[str, Any] = {}
    if values["box"] is not None:
        box = [_number(value) for value in values["box"]]
        if len(box) != 4:
            raise ValueError(f"a box has 4 numbers, found {len(box)}")
        prompt["box"] = box
    if values["points"] is not None:
        points = [[_number(x), _number(y)] for x, y in values["points"]]
        labels = [int(label) for label in values["labels"] or [1] * len(points)]
        if labels != list(values["labels"] or labels) or not {*labels} <= {0, 1}:
            raise ValueError("labels are 1 (foreground) or 0 (background)")
        if not points or len(labels) != len(points):
            raise ValueError(f"{len(points)} points with {len(labels)} labels")
        prompt |= {"points": points, "labels": labels}
    if not prompt:
        raise ValueError("neither box nor points")
    return row["image_uri"], prompt


def _collect(uri: str, image: str, rows: list[dict[str, Any]]) -> ImagePrompts:
    if len({frozenset(row) for row in rows}) > 1:
        raise InvalidPrompt(f"{uri}: the prompts of {image} are of different kinds; give one kind an image")
    boxes = np.array([row["box"] for row in rows], np.float32) if "box" in rows[0] else None
    texts = [json.dumps(row) for row in rows]
    if "points" not in rows[0]:
        return ImagePrompts(Prompts(boxes=boxes), texts)
    most = max(len(row["points"]) for row in rows)
    points = np.zeros((len(rows), most, 2), np.float32)
    labels = np.full((len(rows), most), -1, np.int32)
    for index, row in enumerate(rows):
        points[index, : len(row["points"])] = row["points"]
        labels[index, : len(row["labels"])] = row["labels"]
    return ImagePrompts(Prompts(boxes, points, labels), texts)
