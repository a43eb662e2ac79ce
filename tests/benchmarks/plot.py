"""Curves over time as a PNG, panel below panel, with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, PANEL, LEFT, RIGHT, TOP, GAP, BOTTOM = 1000, 190, 60, 190, 50, 44, 30  # px
COLOURS = ("#1f6fb4", "#d9541e", "#2a9d4a", "#8d4bbb", "#b8860b", "#555555")
GRID, TEXT, MARK = "#e4e4e4", "#222222", "#999999"
SIZE = 13

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """Curves by name, each (x, y) in order of x. kind: "steps", "line" or "dots". A logarithmic y begins at `floor`."""

    title: str
    curves: dict[str, Points]
    kind: str = "steps"
    logarithmic: bool = False
    floor: float = 0.1
    colours: Sequence[str] = field(default=COLOURS)


def draw(path: Path, title: str, panels: Sequence[Panel], marks: Sequence[tuple[float, str]], x_label: str) -> None:
    """`marks` are (x, words): vertical lines through all panels."""
    end = max((x for panel in panels for curve in panel.curves.values() for x, _ in curve), default=1.0)
    height = TOP + len(panels) * (PANEL + GAP) + BOTTOM
    image = Image.new("RGB", (WIDTH, height), "white")
    pen = ImageDraw.Draw(image)
    font, large = ImageFont.load_default(SIZE), ImageFont.load_default(SIZE + 4)
    pen.text((LEFT, 8), title, TEXT, large)

    def across(x: float) -> float:
        return LEFT + x / end * (WIDTH - LEFT - RIGHT)

    for row, (x, words) in enumerate(marks):
        y = TOP - 6 + 15 * (row % 3)
        pen.line([(across(x), y + 4), (across(x), TOP + GAP)], MARK)
        pen.text((across(x) + 4, y), words, MARK, font)
    for number, panel in enumerate(panels):
        top = TOP + GAP + number * (PANEL + GAP)
        most = max((y for curve in panel.curves.values() for _, y in curve), default=1.0)
        ticks = _decades(panel.floor, most) if panel.logarithmic else _even(most)

        def up(y: float, ticks: Sequence[float] = ticks, panel: Panel = panel, top: int = top) -> float:
            share = y / ticks[-1]
            if panel.logarithmic:
                share = math.log(max(y, ticks[0]) / ticks[0]) / math.log(ticks[-1] / ticks[0])
            return top + PANEL * (1 - share)

        pen.text((LEFT, top - 20), panel.title, TEXT, font)
        for tick in ticks:
            pen.line([(LEFT, up(tick)), (WIDTH - RIGHT, up(tick))], GRID)
            pen.text((LEFT - 8, up(tick)), f"{tick:g}", TEXT, font, anchor="rm")
        for tick in _even(end):
            if tick <= end:
                pen.line([(across(tick), top), (across(tick), top + PANEL)], GRID)
                pen.text((across(tick), top + PANEL + 3), f"{tick:g}", TEXT, font, anchor="ma")
        for x, _ in marks:
            pen.line([(across(x), top), (across(x), top + PANEL)], MARK)
        for row, (name, curve) in enumerate(panel.curves.items()):
            colour = panel.colours[row % len(panel.colours)]
            pen.rectangle((WIDTH - RIGHT + 12, top + 8 + 18 * row, WIDTH - RIGHT + 20, top + 16 + 18 * row), colour)
            pen.text((WIDTH - RIGHT + 26, top + 4 + 18 * row), name, colour, font)
            points = [(across(x), up(y)) for x, y in curve]
            if panel.kind == "dots":
                for x, y in points:
                    pen.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=colour)
                continue
            if panel.kind == "steps":
                points = [
                    one
                    for (x, y), (later, _) in zip(points, [*points[1:], points[-1]], strict=True)
                    for one in ((x, y), (later, y))
                ]
            if len(points) > 1:
                pen.line(points, colour, 2)
    pen.text((WIDTH - RIGHT, height - BOTTOM + 6), x_label, TEXT, font, anchor="ra")
    image.quantize(64).save(path, optimize=True)


def _even(most: float) -> list[float]:
    """From 0 to `most` at least, in round steps."""
    rough = max(most, 1e-9) / 5
    step = 10 ** math.floor(math.log10(rough))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= rough)
    return [step * index for index in range(math.ceil(most / step) + 1)]


def _decades(floor: float, most: float) -> list[float]:
    first = math.floor(math.log10(floor))
    return [10.0**power for power in range(first, max(first + 1, math.ceil(math.log10(most))) + 1)]
