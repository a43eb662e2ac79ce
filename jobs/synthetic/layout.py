"""Where the objects of a synthetic field lie: outlines as depth fields in small windows, placed one after another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Plane = npt.NDArray[np.float32]  # [h, w]
Size = tuple[int, int]  # height, width

MIN_AREA = 9  # px of an instance
MOST = 200  # objects of a field
PATIENCE = 40  # objects in a row that found no place; the later ones of them look everywhere
FAR = np.float32(1000)  # px: no object near
MARGIN = 6.0  # px around an outline in which its distance is still known


@dataclass(frozen=True)
class Shape:
    """An outline around the origin: `depth(dy [m, 1], dx [1, n])` → px inside it, negative outside, [m, n]."""

    reach: float
    depth: Callable[[Plane, Plane], Plane]


@dataclass(frozen=True)
class Part:
    """A shape, its offset from the object's place in px, and how bright it is beside its neighbours."""

    shape: Shape
    dy: float = 0.0
    dx: float = 0.0
    bright: float = 1.0


@dataclass(frozen=True)
class Item:
    """An object that was placed: centre and radius in px."""

    y: float
    x: float
    radius: float
    bright: float
    area: int


Make = Callable[[np.random.Generator, float], list[Part]]  # radius in px → the parts of one object
Rule = Literal["over", "under", "deep"]  # who owns a pixel of two: the later, the earlier, the one it lies deeper in


@dataclass
class Layout:
    """A field's objects. After `finish`: `labels` int32 0..N, `signed` px to the outline (negative outside),
    `relative` 0..1 from outline to core, all [h, w]; `stack` is the sum of the objects' heights, 0..1 each."""

    size: Size
    radius: float
    roughness: Plane | None = None
    items: list[Item] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.labels = np.zeros(self.size, np.int32)
        self.signed = np.full(self.size, -FAR)
        self.second = np.full(self.size, -FAR)
        self.stack = np.zeros(self.size, np.float32)
        self.relative = np.zeros(self.size, np.float32)

    def place(self, part: Part, y: float, x: float, radius: float, overlap: float = 1, rule: Rule = "under") -> bool:
        """Draw one part, or nothing where it would cover more than `overlap` of itself or of a neighbour."""
        (height, width), y, x = self.size, y + part.dy, x + part.dx
        reach = part.shape.reach + MARGIN
        top, bottom = max(0, math.ceil(y - reach)), min(height, int(y + reach) + 1)
        left, right = max(0, math.ceil(x - reach)), min(width, int(x + reach) + 1)
        if bottom <= top or right <= left:
            return False
        window = np.s_[top:bottom, left:right]
        rows, columns = np.arange(top, bottom, dtype=np.float32), np.arange(left, right, dtype=np.float32)
        depth = part.shape.depth(rows[:, None] - y, columns[None] - x)
        if self.roughness is not None:
            depth = depth + self.roughness[window]
        inside = depth > 0
        area = int(np.count_nonzero(inside))
        labels, signed, second = self.labels[window], self.signed[window], self.second[window]
        hits = np.bincount(labels[inside], minlength=1)
        covered = [(int(hits[i]), self.items[i - 1].area) for i in np.flatnonzero(hits[1:]) + 1]
        crowded = sum(hit for hit, _ in covered) > overlap * area or any(hit > overlap * own for hit, own in covered)
        if area < MIN_AREA or crowded:
            return False
        self.items.append(Item(y, x, radius, part.bright, area))
        deeper = depth > signed
        if rule == "deep":
            np.maximum(second, np.where(deeper, signed, depth), out=second)
        won = inside & (deeper if rule == "deep" else (labels == 0) | (rule == "over"))
        second[won & (rule == "over")] = -FAR
        labels[won] = len(self.items)
        np.copyto(signed, depth, where=won | ((labels == 0) & deeper))
        height_of = np.clip(depth / depth.max(), 0, 1)
        self.stack[window] += part.bright * np.sqrt(height_of * (2 - height_of))
        return True

    def finish(self, gap: float = 0.0) -> Layout:
        """Keep the largest piece of each object, number them 1..N; touching ones part by `gap` px."""
        np.minimum(self.signed, (self.signed - self.second) / 2, out=self.signed)
        labels = np.where(self.signed > gap / 2, self.labels, 0)
        self.signed -= np.float32(gap / 2)
        self.labels, items = np.zeros(self.size, np.int32), []
        for index, box in enumerate(ndimage.find_objects(labels)):
            if box is None:
                continue
            own = labels[box] == index + 1
            pieces, count = ndimage.label(own)
            if count > 1:
                own = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
            if np.count_nonzero(own) >= MIN_AREA:
                items.append(self.items[index])
                self.labels[box][own] = len(items)
                signed = self.signed[box][own]
                self.relative[box][own] = np.clip(signed / max(1.0, signed.max()), 0, 1)
        self.items = items
        np.minimum(self.signed, 0, out=self.signed, where=self.labels == 0)
        return self

    def spread(self, values: npt.ArrayLike) -> Plane:
        """N numbers → [h, w], each on its own object, 0 elsewhere."""
        return np.append(0, values).astype(np.float32)[self.labels]

    def per_object(self, rng: np.random.Generator, deviation: float) -> Plane:
        """[h, w] a brightness for each object, log-normal around its part's own."""
        own = [item.bright * math.exp(rng.normal(0, deviation)) for item in self.items]
        return self.spread(own)

    def inside(self, width: float = 1.0) -> Plane:
        """0..1 across the outline within `width` px."""
        return np.clip(self.signed / width + 0.5, 0, 1)

    def edge(self, at: float, share: float) -> Plane:
        """1 where the outline is `at` px away, falling to 1/4 in `share` of a radius."""
        off = (self.signed - at) / max(0.9, share * self.radius)
        near = 1 + off * off
        return np.asarray(1 / (near * near))


def star(
    rng: np.random.Generator, radius: float, stretch: float = 1.0, wobble: float = 0.0, turn: float | None = None
) -> Shape:
    """An ellipse whose radius swings by about `wobble` (a fraction) around its circumference."""
    turn = rng.uniform(0, 2 * math.pi) if turn is None else turn
    c, s = math.cos(turn), math.sin(turn)
    long, short = radius * math.sqrt(stretch), radius / math.sqrt(stretch)
    waves = [(a * wobble / k**1.3, b * wobble / k**1.3) for k, (a, b) in enumerate(rng.normal(size=(5, 2)).tolist(), 1)]

    def depth(dy: Plane, dx: Plane) -> Plane:
        u, v = (c * dx + s * dy) / long, (c * dy - s * dx) / short
        rho = np.sqrt(u * u + v * v) + np.float32(1e-4)
        if wobble == 0:
            return (1 - rho) * short
        p, q = u / rho, v / rho
        real, imaginary, edge = p, q, np.ones_like(rho)
        for a, b in waves:
            real, imaginary = real * p - imaginary * q, real * q + imaginary * p  # cos and sin of one more turn
            edge += a * real + b * imaginary
        return np.asarray((1 - rho / np.maximum(edge, np.float32(0.4))) * np.float32(short))

    swing = sum(math.hypot(a, b) for a, b in waves)
    return Shape(long * (1 + swing), depth)


def rod(rng: np.random.Generator, radius: float, length: float, bend: float, segments: int) -> Shape:
    """A tube around a line of `length` px that turns by `bend` radians in all."""
    turns = rng.uniform(0, 2 * math.pi) + np.linspace(0, bend, segments)
    steps = np.stack([np.sin(turns), np.cos(turns)], 1) * length / segments
    points = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, 0)])
    points -= (points.max(0) + points.min(0)) / 2
    ends = points.tolist()

    def depth(dy: Plane, dx: Plane) -> Plane:
        nearest = np.full(np.broadcast_shapes(dy.shape, dx.shape), FAR * FAR, np.float32)
        for (ay, ax), (by, bx) in pairwise(ends):
            (top, bottom), (left, right) = _near(dy[:, 0], ay, by, radius), _near(dx[0], ax, bx, radius)
            y, x, ey, ex = dy[top:bottom] - ay, dx[:, left:right] - ax, by - ay, bx - ax
            along = np.clip((y * ey + x * ex) / (ey * ey + ex * ex + 1e-6), 0, 1)
            off_y, off_x, box = y - along * ey, x - along * ex, nearest[top:bottom, left:right]
            np.minimum(box, off_y * off_y + off_x * off_x, out=box)
        return np.float32(radius) - np.sqrt(nearest)

    return Shape(float(np.hypot(*points.T).max()) + radius, depth)


def _near(pixels: Plane, a: float, b: float, radius: float) -> tuple[int, int]:
    """The range of `pixels`, one apart, from which the segment a..b may be the nearest that matters."""
    away, first = radius + MARGIN, float(pixels[0])
    return max(0, int(min(a, b) - away - first)), max(0, int(max(a, b) + away - first) + 2)


def union(parts: list[Part]) -> Shape:
    """Several shapes as one outline."""

    def depth(dy: Plane, dx: Plane) -> Plane:
        deepest = parts[0].shape.depth(dy - parts[0].dy, dx - parts[0].dx)
        for part in parts[1:]:
            np.maximum(deepest, part.shape.depth(dy - part.dy, dx - part.dx), out=deepest)
        return deepest

    return Shape(max(part.shape.reach + math.hypot(part.dy, part.dx) for part in parts), depth)


def scatter(
    rng: np.random.Generator,
    layout: Layout,
    make: Make,
    cover: float,
    vary: float = 0.2,
    overlap: float = 0.1,
    rule: Rule = "over",
    colony: float = 0.0,
    most: int = MOST,
) -> Layout:
    """Place objects until they cover about `cover` of the field; `colony` is the share that settles beside others."""
    height, width = layout.size
    wanted, misses = cover * height * width, 0
    while wanted > 0 and len(layout.items) < most and misses < PATIENCE:
        radius = layout.radius * math.exp(rng.normal(0, vary))
        y, x = rng.uniform(-0.3 * radius, height + 0.3 * radius), rng.uniform(-0.3 * radius, width + 0.3 * radius)
        if layout.items and rng.random() < colony and misses < PATIENCE // 4:
            near, turn = layout.items[rng.integers(len(layout.items))], rng.uniform(0, 2 * math.pi)
            away = (near.radius + radius) * rng.uniform(0.85, 1.15)
            y, x = near.y + away * math.sin(turn), near.x + away * math.cos(turn)
        placed = [layout.place(part, y, x, radius, overlap, rule) for part in make(rng, radius)]
        wanted -= sum(item.area for item in layout.items[len(layout.items) - sum(placed) :])
        misses = 0 if any(placed) else misses + 1
    return layout


def tessellation(rng: np.random.Generator, layout: Layout, stretch: float, jitter: float) -> Layout:
    """Cells that fill the field, as in an epithelium: a jittered lattice of seeds, each pixel to the seed it is
    deepest in."""
    height, width = layout.size
    pitch = max(1.8 * layout.radius, math.sqrt(height * width / MOST))
    turn = rng.uniform(0, 2 * math.pi)
    for row in range(-1, int(height / pitch) + 2):
        for column in range(-1, int(width / pitch) + 2):
            y = (row + 0.5 + rng.normal(0, jitter)) * pitch
            x = (column + 0.5 * (row % 2) + 0.25 + rng.normal(0, jitter)) * pitch
            own, reach = stretch * math.exp(rng.normal(0, 0.1)), 1.2 * pitch * math.exp(rng.normal(0, 0.1))
            layout.place(Part(star(rng, reach, own, turn=turn)), y, x, pitch / 2, math.inf, "deep")
    return layout
