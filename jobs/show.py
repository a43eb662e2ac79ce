"""A contact sheet of a data set: each image with its masks in colour, as one HTML file and one PNG."""

from __future__ import annotations

import base64
import colorsys
import html
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from cluster.errors import CellrayError, InvalidInput
from cluster.settings import Settings
from cluster.storage import Storage
from jobs import images, parts
from jobs.images import Entry
from jobs.views import View
from serve_app import dataset
from serve_app.dataset import Dataset
from serve_app.model import masks, preprocess

THUMBNAIL = 288  # px, long side
COLUMNS = 6
CAPTION = 34
GAP = 8
MAX_MASKS = 200  # drawn on one thumbnail, largest first
FILL = 0.45
GOLDEN = 0.618034  # hues a golden ratio apart stay distinct, however many
PAPER, INK, DIM, RED = (250, 250, 248), (34, 34, 34), (120, 120, 120), (176, 0, 32)


Plane = tuple[str, str]  # image URI, and what part of it


@dataclass(frozen=True)
class Tile:
    """One image of the sheet: its picture (None where it failed), name, and a line of facts."""

    picture: Image.Image | None
    name: str
    facts: str


def write(settings: Settings, out: str, folder: Path, limit: int) -> tuple[Path, Path]:
    """Draw at most `limit` images of the data set `out` into `folder`: (index.html, contact.png).

    Raises:
        NotFound: no data set there. InvalidInput: it holds no images, or `folder` cannot be written.
    """
    storage = Storage(settings.storage)
    found = dataset.open(out, storage)
    by_image: dict[Plane, list[dict[str, Any]]] = {}
    for row in found.table(dataset.MASKS, ["image_uri", "part", "segmentation", "area"]).to_pylist():
        by_image.setdefault(_plane(row), []).append(row)
    embedded = map(_plane, found.table(dataset.EMBEDDINGS, ["image_uri", "part"]).to_pylist())
    errors: dict[Plane, dict[str, Any]] = {}
    for row in found.table(dataset.ERRORS).to_pylist():
        errors.setdefault(_plane(row), row)  # the first job to fail says why
    names = sorted({*embedded, *by_image, *errors})
    if not names:
        raise InvalidInput(f"{found.uri} holds no committed images yet")
    shown = images.by_name(storage, [uri for uri, _ in names[:limit]])
    tiles = [
        _tile(storage, settings, shown[name[0]], name[1], by_image.get(name, []), errors.get(name))
        for name in names[:limit]
    ]
    model, trained = _model(found)
    title = f"{len(names)} images, {sum(map(len, by_image.values()))} masks, {len(errors)} errors · {model}"
    warning = "" if trained else "untrained model: random weights, these masks mean nothing"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        page, picture = folder / "index.html", folder / "contact.png"
        page.write_text(_page(tiles, title, warning), encoding="utf-8")
        _sheet(tiles, title, warning).save(picture)
    except OSError as error:
        raise InvalidInput(f"{folder} cannot be written: {error.strerror}") from error
    return page, picture


def _plane(row: dict[str, Any]) -> Plane:
    return row["image_uri"], str(replace(View.parse(row["part"]), xywh=""))


def _model(found: Dataset) -> tuple[str, bool]:
    """(name, whether trained), from the footer of a committed file."""
    for name in (dataset.MASKS, dataset.EMBEDDINGS, dataset.ERRORS):
        for uri, _ in found.files(name):
            with found.storage.open(uri) as file:
                metadata = pq.ParquetFile(file).schema_arrow.metadata
            return metadata[b"cellray.model"].decode(), metadata[b"cellray.trained"] == b"true"
    return "no model", True


def _tile(
    storage: Storage,
    settings: Settings,
    entry: Entry,
    plane: str,
    rows: list[dict[str, Any]],
    error: dict[str, Any] | None,
) -> Tile:
    name = "#".join(filter(None, (entry.uri.rsplit("/", 1)[-1], plane)))
    if error is not None and not rows:
        return Tile(None, name, f"{error['error_type']}: {error['message']}")
    try:
        data = images.content(storage, entry, settings.limits.image_bytes)
        pixels = parts.pixels(data, View.parse(entry.view).crop, plane, settings.limits.image_pixels)
    except CellrayError as problem:
        return Tile(None, name, f"{type(problem).__name__}: {problem}")
    facts = f"{pixels.shape[1]} × {pixels.shape[0]}, {len(rows)} mask{'s' * (len(rows) != 1)}"
    return Tile(_draw(pixels, rows), name, facts)


def _draw(pixels: np.ndarray, rows: list[dict[str, Any]]) -> Image.Image:
    """The image at thumbnail size, masks filled in distinct hues and outlined, small ones on top."""
    height, width = preprocess.input_size((pixels.shape[0], pixels.shape[1]), THUMBNAIL)
    canvas = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)).astype(np.float32)
    largest = sorted(rows, key=lambda row: -row["area"])[:MAX_MASKS]
    for index, row in enumerate(largest):
        rle = row["segmentation"]
        mask = masks.decode([rle["counts"]], tuple(rle["size"]))[0]
        small = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
        inner = small.copy()
        inner[1:-1, 1:-1] &= small[:-2, 1:-1] & small[2:, 1:-1] & small[1:-1, :-2] & small[1:-1, 2:]
        colour = 255 * np.array(colorsys.hsv_to_rgb(index * GOLDEN % 1, 0.85, 1.0), np.float32)
        canvas[small] = (1 - FILL) * canvas[small] + FILL * colour
        canvas[small & ~inner] = colour
    return Image.fromarray(canvas.astype(np.uint8))


def _sheet(tiles: list[Tile], title: str, warning: str) -> Image.Image:
    rows = -(-len(tiles) // COLUMNS)
    cell = THUMBNAIL + GAP
    top = 64
    sheet = Image.new("RGB", (COLUMNS * cell + GAP, top + rows * (cell + CAPTION)), PAPER)
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(18), ImageFont.load_default(12)
    draw.text((GAP, 10), title, INK, large)
    draw.text((GAP, 36), warning, RED, large)
    for index, tile in enumerate(tiles):
        x, y = GAP + index % COLUMNS * cell, top + index // COLUMNS * (cell + CAPTION)
        if tile.picture is None:
            draw.rectangle((x, y, x + THUMBNAIL, y + THUMBNAIL), outline=DIM)
            draw.text((x + GAP, y + GAP), _wrapped(tile.facts, 44), RED, small)
        else:
            sheet.paste(tile.picture, (x, y))
            draw.text((x, y + THUMBNAIL + 16), tile.facts.replace("×", "x"), DIM, small)
        draw.text((x, y + THUMBNAIL + 2), tile.name, INK, small)
    return sheet


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:8])


STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; background: #fafaf8; color: #222; margin: 2rem }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1rem }
figure { margin: 0 } img { max-width: 100%; display: block; border-radius: 4px }
figcaption small { color: #777; display: block } .bad { color: #b00020; border: 1px solid #ddd; padding: 1rem }
.warning { color: #b00020; font-weight: 600 }
"""


def _page(tiles: list[Tile], title: str, warning: str) -> str:
    figures = []
    for tile in tiles:
        name, facts = html.escape(tile.name), html.escape(tile.facts)
        if tile.picture is None:
            figures.append(f'<figure><div class="bad">{facts}</div><figcaption>{name}</figcaption></figure>')
            continue
        file = io.BytesIO()
        tile.picture.save(file, "JPEG", quality=88)
        data = base64.b64encode(file.getvalue()).decode()
        picture = f'<img alt="{name}" src="data:image/jpeg;base64,{data}">'
        figures.append(f"<figure>{picture}<figcaption>{name}<small>{facts}</small></figcaption></figure>")
    note = f'<p class="warning">{html.escape(warning)}</p>' if warning else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Cellray contact sheet</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{note}<main>{''.join(figures)}</main></html>"
    )
