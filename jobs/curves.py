"""Curves of a training as a PNG: loss above, IoU of validation below."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN = 720, 240, 44
IOUS = ("iou_box", "iou_click", "correlation")
COLOURS = {"loss": "#555555", "iou_box": "#0072b2", "iou_click": "#d55e00", "correlation": "#009e73"}
GRID = "#dddddd"
STEPS = 4


def draw(lines: Sequence[dict[str, float]]) -> bytes:
    """An epoch a line, as in curves.jsonl → PNG file bytes."""
    image = Image.new("RGB", (WIDTH, 2 * HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    most = max([line["loss"] for line in lines if line["loss"] == line["loss"]], default=1.0) or 1.0
    last = max([line["images"] for line in lines], default=1) or 1
    for top, names, scale in ((0, ("loss",), most), (HEIGHT, IOUS, 1.0)):
        _panel(pen, top, scale, last)
        for index, name in enumerate(names):
            points = [(line["images"] / last, line[name] / scale) for line in lines if name in line]
            _curve(pen, top, points, COLOURS[name])
            pen.text((MARGIN + 8 + 110 * index, top + 8), name, fill=COLOURS[name])
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def _panel(pen: ImageDraw.ImageDraw, top: int, scale: float, last: float) -> None:
    for step in range(STEPS + 1):
        y = _at(top, (0, step / STEPS))[1]
        pen.line([(MARGIN, y), (WIDTH - 8, y)], GRID)
        pen.text((4, y - 6), f"{scale * step / STEPS:.2f}", fill="black")
        x = _at(top, (step / STEPS, 0))[0]
        pen.text((x - 30, top + HEIGHT - 18), f"{last * step / STEPS:,.0f} img", fill="black")


def _curve(pen: ImageDraw.ImageDraw, top: int, points: list[tuple[float, float]], colour: str) -> None:
    places = [_at(top, point) for point in points if point[1] == point[1]]
    if len(places) > 1:
        pen.line(places, colour, 2)
    for x, y in places[-1:]:
        pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)


def _at(top: int, point: tuple[float, float]) -> tuple[float, float]:
    """(share of the width, share of the height) → pixels."""
    x, y = point
    return MARGIN + x * (WIDTH - MARGIN - 40), top + HEIGHT - 24 - min(max(y, 0), 1.05) * (HEIGHT - 48)
