"""What a synthetic field shows: for each kind, how its objects lie and in which of several ways they are lit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jobs.synthetic.camera import Planes, blur, noise
from jobs.synthetic.layout import MOST, Layout, Make, Part, Plane, Size, rod, scatter, star, tessellation, union

Rng = np.random.Generator
GREY = [[1.0, 1.0, 1.0]]
DYES = np.array([[0, 1, 0], [0, 0.3, 1], [1, 0, 0], [0, 1, 1], [1, 0, 1], [1, 0.9, 0], [1, 0.4, 0], [1, 1, 1]])
# Optical densities of haematoxylin, eosin and DAB in R, G, B: Ruifrok & Johnston, Anal Quant Cytol Histol 2001;
# eosin less pure than theirs, as scanners show it.
STAINS = np.array([[0.65, 0.70, 0.29], [0.12, 0.85, 0.45], [0.27, 0.57, 0.78]])


@dataclass(frozen=True)
class Scene:
    """The light of a field, [C, h, w], its channels' colours [C, 3], and whether it is dark on bright."""

    light: Planes
    colours: npt.ArrayLike = tuple(map(tuple, GREY))
    bright: bool = False


def _log_uniform(rng: Rng, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _spread(rng: Rng, layout: Layout, spread: float) -> npt.NDArray[np.float64]:
    """A brightness for each object, around its part's own."""
    own = np.array([item.bright for item in layout.items])
    return np.asarray(own * np.exp(rng.normal(0, spread, len(own))), np.float64)


def _edge(layout: Layout, at: float, width: float) -> Plane:
    """1 where the outline is `at` px away, falling to 1/4 in `width` px."""
    off = (layout.signed - np.float32(at)) / np.float32(width)
    near = 1 + off * off
    return np.asarray(1 / (near * near), np.float32)


def _smooth(layout: Layout, width: float = 1.0) -> Plane:
    """0..1 across the outline within `width` px."""
    return np.clip(layout.signed / width + np.float32(0.5), 0, 1)


# How objects lie


def _nucleus(rng: Rng) -> Make:
    stretch, wobble = rng.uniform(1.0, 1.9), rng.choice([0.0, 0.04, 0.12]) * rng.uniform(0.7, 1.3)
    lobed, dividing = rng.choice([0.0, 0.15, 0.8], p=[0.6, 0.3, 0.1]), rng.choice([0.0, 0.08])

    def make(rng: Rng, radius: float) -> list[Part]:
        chance, turn = rng.random(), rng.uniform(0, 2 * math.pi)
        dy, dx = math.sin(turn), math.cos(turn)
        if chance < dividing / 2:  # metaphase: one bright plate
            return [Part(rod(rng, 0.35 * radius, 1.3 * radius, rng.normal(0, 0.3), 2), bright=1.8)]
        if chance < dividing:  # anaphase: two, apart
            plate = union([Part(star(rng, 0.4 * radius, turn=turn), b * dx, -b * dy) for b in radius * PLATE])
            away = radius * rng.uniform(0.6, 1)
            return [Part(plate, sign * away * dy, sign * away * dx, 1.7) for sign in (-1, 1)]
        if chance < dividing + lobed:
            lobes, small = [], radius * rng.uniform(0.5, 0.65)
            for angle in turn + np.cumsum(rng.uniform(1.2, 2.2, rng.integers(2, 5))):
                lobe = star(rng, small * rng.uniform(0.8, 1.1), rng.uniform(1, 1.5), 0.08)
                lobes.append(Part(lobe, 0.6 * radius * math.sin(angle), 0.6 * radius * math.cos(angle)))
            return [Part(union(lobes))]
        return [Part(star(rng, radius, max(1.0, stretch + rng.normal(0, 0.2)), wobble))]

    return make


PLATE = np.array([-0.4, 0.0, 0.4])


def _cell(rng: Rng) -> Make:
    stretch, wobble = rng.choice([1.1, 1.6, 2.6]), rng.choice([0.04, 0.1, 0.2])
    return lambda rng, radius: [Part(star(rng, radius, max(1, stretch * rng.uniform(0.7, 1.3)), wobble))]


def _disc(rng: Rng) -> Make:
    stretch = rng.choice([1.0, 1.05, 1.4])
    return lambda rng, radius: [Part(star(rng, radius, stretch))]


def _bacterium(rng: Rng) -> Make:
    length, bend = rng.uniform(1.5, 9), rng.choice([0.0, 0.4, 1.5])

    def make(rng: Rng, radius: float) -> list[Part]:
        turns = rng.normal(0, bend) if bend else 0.0
        return [Part(rod(rng, radius, radius * length * rng.uniform(0.5, 1.3), turns, 1 if not bend else 4))]

    return make


def _filament(rng: Rng) -> Make:
    length, kink = rng.uniform(12, 40), rng.uniform(0.03, 0.25)

    def make(rng: Rng, radius: float) -> list[Part]:
        return [Part(rod(rng, radius, radius * length * rng.uniform(0.5, 1.2), rng.normal(0, 1), 12, kink))]

    return make


def _budding(rng: Rng) -> Make:
    stretch, budding = rng.uniform(1.0, 1.4), rng.uniform(0.1, 0.7)

    def make(rng: Rng, radius: float) -> list[Part]:
        mother = Part(star(rng, radius, max(1, stretch + rng.normal(0, 0.08)), 0.03))
        if rng.random() > budding:
            return [mother]
        small, turn = radius * rng.uniform(0.3, 0.75), rng.uniform(0, 2 * math.pi)
        away = 0.92 * (radius + small)
        return [mother, Part(star(rng, small, 1.1), away * math.sin(turn), away * math.cos(turn))]

    return make


def _strewn(
    make: Callable[[Rng], Make], low: float, high: float, rules: Rules, rough: float = 0.0, cross: float = 0.35
) -> Lay:
    """Objects of a radius from `low` px to `high` × the field, loose, crowded or in colonies, with `rough` outlines;
    at most `cross` of one lies under another."""

    def lay(rng: Rng, size: Size) -> Layout:
        radius = _log_uniform(rng, low, max(2 * low, high * min(size)))
        uneven = rough * rng.choice([0.0, 0.0, 0.5, 1.0]) * radius
        layout = Layout(size, radius, noise(rng, size, max(2, radius / 4)) * np.float32(uneven) if uneven else None)
        few = radius > 0.07 * min(size) and rng.random() < 0.2
        scatter(
            rng,
            layout,
            make(rng),
            rng.uniform(0.06, 0.7),
            vary=rng.choice([0.05, 0.2, 0.4]),
            overlap=rng.choice([0.02, 0.4 * cross, cross]),
            rule=rng.choice(["over", "under", "deep"], p=rules),
            colony=rng.choice([0.0, 0.0, 0.6, 0.95]),
            most=int(rng.integers(1, 5)) if few else MOST,
        )
        return layout.finish(rng.choice([0.0, 1.0]))

    return lay


def _sheet(rng: Rng, size: Size) -> Layout:
    radius = _log_uniform(rng, 5, max(6, 0.2 * min(size)))
    layout = Layout(size, radius, noise(rng, size, radius / 2) * np.float32(rng.choice([0, 0.06]) * radius))
    tessellation(rng, layout, rng.choice([1.0, 1.3, 1.8]), rng.uniform(0.12, 0.35))
    return layout.finish(rng.choice([0.0, 1.0, 2.5]))


# How they are lit


def _ghosts(rng: Rng, layout: Layout) -> Plane:
    """Objects far out of focus, dust and debris: seen, and not labelled."""
    field = np.zeros(layout.size, np.float32)
    if rng.random() < 0.35:
        far = Layout(layout.size, layout.radius)
        scatter(rng, far, _disc(rng), rng.uniform(0.02, 0.3), vary=0.3, overlap=1, most=25)
        field += rng.uniform(0.05, 0.4) * blur(far.stack, max(2.0, layout.radius * rng.uniform(0.3, 0.8)))
    if rng.random() < 0.35:
        dirt = Layout(layout.size, rng.uniform(0.8, 2.5))
        shard: Make = lambda rng, radius: [Part(star(rng, radius, rng.uniform(1, 4), 0.3))]  # noqa: E731
        scatter(rng, dirt, shard, 1, vary=0.4, most=int(rng.integers(2, 25)))
        field += rng.uniform(0.1, 0.8) * (dirt.stack if rng.random() < 0.6 else blur(dirt.stack, 2))
    return field


def _body(rng: Rng, layout: Layout) -> Plane:
    """[h, w] how much of a dye each pixel of the objects holds: flat or domed, with grains, holes, foci or a rim."""
    flat, dome = _smooth(layout), np.sqrt(layout.relative * (2 - layout.relative))
    body = flat + np.float32(rng.choice([0, 0.5, 1]) * rng.random()) * (dome - flat)
    fine = noise(rng, layout.size, max(1.0, layout.radius * rng.uniform(0.08, 0.3)))
    body *= np.maximum(1 + np.float32(rng.choice([0.05, 0.2, 0.45])) * fine, np.float32(0.15))
    look, spots = rng.random(), noise(rng, layout.size, max(1.0, layout.radius * rng.uniform(0.08, 0.18)))
    if look < 0.2:  # nucleoli, vacuoles
        body *= 1 - np.float32(rng.uniform(0.3, 0.9)) * np.clip(1.5 * spots - np.float32(1.7), 0, 1)
    elif look < 0.4:  # chromocentres, granules
        body *= 1 + np.float32(rng.uniform(0.5, 2)) * np.clip(2 * spots - np.float32(2.2), 0, 1)
    elif look < 0.55:
        body += np.float32(rng.uniform(0.2, 0.8)) * flat * _edge(layout, 1.5, max(1.0, 0.1 * layout.radius))
    return body * layout.per_object(_spread(rng, layout, rng.choice([0.1, 0.35, 0.7])))


def _glow(rng: Rng, layout: Layout) -> Scene:
    """One dye in the objects: on black, on haze, or on structured autofluorescence."""
    light = _body(rng, layout) + _ghosts(rng, layout)
    if rng.random() < 0.3:  # wide-field: overlapping objects add up
        light += np.float32(0.5) * np.minimum(layout.stack, 2) * _smooth(layout)
    haze = 1 + np.float32(rng.choice([0.05, 0.3])) * noise(rng, layout.size, _log_uniform(rng, 2, 60))
    light += np.float32(rng.choice([0.02, 0.08, 0.25])) * np.maximum(haze, 0)
    tint = GREY if rng.random() < 0.75 else [DYES[rng.integers(len(DYES))]]
    return Scene(light[None], tint)


def _fibres(rng: Rng, size: Size, grain: float) -> Plane:
    return np.clip(1 - np.abs(noise(rng, size, grain, rng.uniform(2, 6))), 0, 1)


def _kernels(rng: Rng, layout: Layout, share: float) -> Layout:
    """A nucleus inside each object, `share` of its radius, not labelled."""
    inner = Layout(layout.size, max(2.0, share * layout.radius))
    for item in layout.items:
        near = rng.normal(0, 0.12 * item.radius, 2)
        shape = star(rng, max(1.5, share * item.radius), rng.uniform(1, 1.5), 0.05)
        inner.place(Part(shape), item.y + near[0], item.x + near[1], inner.radius, 1, "under")
    inner.finish()
    np.minimum(inner.signed, layout.signed, out=inner.signed)
    return inner


def _cytoplasm(rng: Rng, layout: Layout) -> Scene:
    """Whole cells: a dye in the cytoplasm, nuclei, and a third of membranes or granules, or fewer channels."""
    inner = _kernels(rng, layout, rng.uniform(0.3, 0.55))
    cell, kernel = _body(rng, layout), _smooth(inner)
    if rng.random() < 0.5:
        cell *= np.float32(1 - rng.uniform(0, 0.5)) + np.float32(rng.uniform(0.2, 1)) * layout.relative
    if rng.random() < 0.4:
        cell *= np.float32(0.5) + _fibres(rng, layout.size, max(1.5, layout.radius / 8))
    cell *= 1 - np.float32(rng.choice([-0.4, 0.0, 0.6, 0.9])) * kernel
    cell *= 1 - np.float32(rng.uniform(0.2, 0.7)) * _edge(layout, 0, max(1.0, 0.06 * layout.radius))
    cell += _ghosts(rng, layout) * np.float32(0.5) + np.float32(rng.choice([0.02, 0.1, 0.25]))
    nuclei = kernel * inner.per_object(_spread(rng, inner, 0.3), 1) * (
        1 + np.float32(0.2) * noise(rng, layout.size, max(1.2, inner.radius / 4))
    ) + np.float32(0.03)
    granules = np.clip(noise(rng, layout.size, max(1.2, layout.radius / 12)) - 1, 0, 1) * _smooth(layout)
    third = granules if rng.random() < 0.5 else _edge(layout, 1, max(1.0, 0.04 * layout.radius))
    planes = [cell, nuclei, third + np.float32(0.02)][: rng.integers(1, 4)]
    if len(planes) == 1:
        return Scene(np.stack(planes), GREY if rng.random() < 0.7 else [DYES[rng.integers(len(DYES))]])
    return Scene(np.stack(planes), rng.permutation(DYES)[: len(planes)])


def _outline(rng: Rng, layout: Layout) -> Scene:
    """Membranes only, uneven along their length; sometimes with a weak inside."""
    width = max(0.8, layout.radius * rng.uniform(0.02, 0.1))
    light = _edge(layout, rng.uniform(0, 1), width)
    light *= np.maximum(np.float32(1) + np.float32(0.4) * noise(rng, layout.size, max(2, layout.radius / 3)), 0)
    light += np.float32(rng.choice([0.0, 0.1, 0.3])) * _body(rng, layout) + np.float32(0.3) * _ghosts(rng, layout)
    if rng.random() < 0.3:
        nuclei = _smooth(_kernels(rng, layout, rng.uniform(0.3, 0.5))) + np.float32(0.03)
        return Scene(np.stack([light, nuclei]), rng.permutation(DYES)[:2])
    return Scene(light[None], GREY if rng.random() < 0.8 else [DYES[rng.integers(len(DYES))]])


def _ground(rng: Rng, size: Size, level: float) -> Plane:
    """The bright ground of transmitted light, almost even."""
    field = np.full(size, level, np.float32)
    for grain in (rng.uniform(1, 4), rng.uniform(30, 120)):
        field += np.float32(rng.choice([0.0, 0.01, 0.03])) * noise(rng, size, grain)
    return field


def _phase(rng: Rng, layout: Layout) -> Scene:
    """Zernike phase contrast: objects darker than the ground, or brighter, with a halo; or DIC's relief."""
    thick = np.minimum(layout.stack, 1.5) + np.float32(rng.uniform(0, 0.5)) * _smooth(layout, 2)
    inside = np.float32(rng.uniform(0.05, 0.3)) * noise(rng, layout.size, max(1.2, layout.radius / 6))
    thick += inside * _smooth(layout, 3) + np.float32(0.5) * _ghosts(rng, layout)
    deep, level = np.float32(rng.uniform(0.12, 0.5)), rng.uniform(0.35, 0.65)
    if rng.random() < 0.25:
        gy, gx = np.gradient(blur(thick, max(0.8, 0.05 * layout.radius)))
        turn, steep = rng.uniform(0, 2 * math.pi), np.float32(min(6.0, 0.4 * layout.radius))
        relief = (np.float32(math.sin(turn)) * gy + np.float32(math.cos(turn)) * gx) * steep
        light = _ground(rng, layout.size, level) + deep * relief.astype(np.float32)
    else:
        halo = blur(thick, min(max(2.0, layout.radius * rng.uniform(0.25, 0.8)), 25))
        sign = rng.choice([-1.0, 1.0], p=[0.75, 0.25])
        light = _ground(rng, layout.size, level) + np.float32(sign) * deep * (thick - halo * rng.uniform(0.6, 1.1))
        light += np.float32(rng.choice([0, 0.6]) * rng.random()) * _edge(layout, -1, max(1.0, 0.06 * layout.radius))
    return Scene(np.clip(light, 0, 1.2)[None], GREY, bright=True)


def _absorbing(rng: Rng, layout: Layout) -> Scene:
    """Dark on bright without colour, or with that of a dye; a dark or a bright rim as the focus has it."""
    dense = np.float32(rng.uniform(0.2, 1.5)) * _body(rng, layout) * np.float32(rng.choice([0.15, 1.0]))
    rim = np.float32(rng.uniform(0.2, 1.2)) * _edge(layout, rng.uniform(-1, 1.5), max(0.9, 0.06 * layout.radius))
    dense += rim * np.float32(rng.choice([-0.3, 0.0, 1.0], p=[0.15, 0.25, 0.6])) + _ghosts(rng, layout)
    if rng.random() < 0.3:
        dense += np.float32(0.8) * _smooth(_kernels(rng, layout, rng.uniform(0.2, 0.5)))
    ground = _ground(rng, layout.size, rng.uniform(0.6, 0.95))
    if rng.random() < 0.6:
        return Scene((ground * np.exp(-dense.astype(np.float64)))[None].astype(np.float32), GREY, bright=True)
    dye = rng.uniform(0.2, 1.2, 3)
    return Scene(_transmitted(ground, [dense], dye[None]), np.eye(3), bright=True)


def _transmitted(ground: Plane, dense: list[Plane], colours: npt.NDArray[np.float64]) -> Planes:
    """Beer–Lambert: dyes' densities [h, w] and their colours' densities [n, 3] → [3, h, w] light."""
    density = [sum(plane * np.float64(rgb) for plane, rgb in zip(dense, band, strict=True)) for band in colours.T]
    return (ground * np.exp(-np.stack(density))).astype(np.float32)


def _stained(rng: Rng, layout: Layout) -> Scene:
    """A section: blue nuclei, some of them brown, on pink or pale blue tissue with fibres and gaps."""
    size, stains = layout.size, np.abs(STAINS + rng.normal(0, 0.06, (3, 3))) * 2.0
    tissue = np.maximum(1 + np.float32(0.25) * noise(rng, size, _log_uniform(rng, 2, 30), rng.uniform(1, 3)), 0)
    tissue += np.float32(rng.choice([0.0, 0.6]) * rng.random()) * _fibres(rng, size, rng.uniform(3, 10))
    gaps = np.clip(4 * (noise(rng, size, rng.uniform(15, 50)) - np.float32(rng.uniform(0.7, 2.5))), 0, 1)
    tissue *= 1 - gaps
    brown = rng.choice([0.0, 0.4, 0.9]) > rng.random(len(layout.items))
    body, pale = _body(rng, layout), rng.uniform(0.25, 1.0)
    blue = body * layout.per_object(np.where(brown, 0.3, pale)) + np.float32(rng.choice([0.02, 0.12])) * tissue
    blue += np.float32(0.3) * _ghosts(rng, layout)
    blue += np.float32(rng.choice([0.0, 0.4])) * _smooth(layout) * _edge(layout, 1, max(0.9, 0.08 * layout.radius))
    dab = body * layout.per_object(np.where(brown, rng.uniform(0.4, 1.2), 0.0))
    eosin = np.float32(rng.choice([0.02, 0.08, 0.16])) * tissue * (1 - np.float32(0.6) * _smooth(layout))
    if rng.random() < 0.25:  # a stain of membranes, or one that leaks
        dab += np.float32(rng.uniform(0.1, 0.6)) * _edge(layout, -0.3 * layout.radius, 0.3 * layout.radius) * tissue
    ground = _ground(rng, size, rng.uniform(0.8, 0.97))
    return Scene(_transmitted(ground, [blue, eosin, dab], stains), np.eye(3), bright=True)


def _section(rng: Rng, layout: Layout) -> Scene:
    """A section of epithelium: pink or brown cells with pale or dark borders, and blue nuclei."""
    size, stains = layout.size, np.abs(STAINS + rng.normal(0, 0.06, (3, 3))) * 2.0
    inner, width = _kernels(rng, layout, rng.uniform(0.25, 0.5)), max(1.0, 0.06 * layout.radius)
    blue = _smooth(inner) * inner.per_object(_spread(rng, inner, 0.2) * rng.uniform(0.3, 0.9))
    blue *= 1 + np.float32(0.3) * noise(rng, size, max(1.2, inner.radius / 4))
    pink = np.float32(rng.uniform(0.08, 0.3)) * _body(rng, layout) + np.float32(0.03) * _ghosts(rng, layout)
    border, brown = _edge(layout, 0, width), np.float32(rng.choice([0.0, 0.5]))
    pink *= 1 - np.float32(rng.uniform(0.2, 0.9)) * border
    dense = [blue, pink, brown * border * rng.uniform(0.3, 1.5)]
    return Scene(_transmitted(_ground(rng, size, rng.uniform(0.8, 0.97)), dense, stains), np.eye(3), bright=True)


def _relief(rng: Rng, layout: Layout) -> Scene:
    """Coins, beads, seeds: opaque, lit from one side, with a worn relief, on a plain or grained table."""
    size, turn = layout.size, rng.uniform(0, 2 * math.pi)
    height = np.float32(rng.uniform(0.3, 1.5)) * np.sqrt(layout.relative * (2 - layout.relative)) * layout.radius / 3
    height += _edge(layout, 0.1 * layout.radius, max(0.8, 0.05 * layout.radius)) * np.float32(rng.uniform(0, 1.5))
    if rng.random() < 0.5:  # a figure
        height += np.float32(rng.uniform(0.5, 2)) * _smooth(_kernels(rng, layout, rng.uniform(0.3, 0.6)), 2)
    grain = max(1.5, layout.radius / rng.uniform(4, 12))
    worn = np.clip(2 * noise(rng, size, grain), -1, 1) * _smooth(layout, 3)
    height += np.float32(rng.choice([0.0, 0.3, 0.8]) * grain * rng.uniform(0.3, 1)) * worn
    gy, gx = np.gradient(blur(height, 0.7))
    shade = np.float32(math.sin(turn)) * gy + np.float32(math.cos(turn)) * gx
    level, lighter = rng.uniform(0.08, 0.8), rng.random() < 0.75
    level = min(level, 0.5) if lighter else max(level, 0.45)
    face = rng.uniform(0.15, 0.45) if lighter else -rng.uniform(0.15, 0.35)
    weave = noise(rng, size, _log_uniform(rng, 1, 12), rng.choice([1.0, rng.uniform(1, 4)]))
    table = np.float32(level) + np.float32(abs(face) * rng.choice([0.03, 0.1, 0.25])) * weave
    table += np.float32(abs(face) * rng.choice([0.0, 0.4])) * noise(rng, size, min(size) / 3)
    table *= 1 - np.float32(rng.choice([0.0, 0.5])) * blur(_smooth(layout), 0.15 * layout.radius + 1)  # their shadow
    own = layout.per_object(level + face * _spread(rng, layout, rng.choice([0.05, 0.25])))
    own *= 1 + np.float32(rng.choice([0.03, 0.12])) * noise(rng, size, rng.uniform(1, 4))
    light = table + _smooth(layout) * (own * (1 + np.float32(rng.uniform(0.2, 0.7)) * shade) - table)
    tint = GREY if rng.random() < 0.7 else [rng.uniform(0.6, 1, 3)]
    return Scene(np.clip(light, 0.01, 1.3)[None].astype(np.float32), tint, bright=True)


Lay = Callable[[Rng, Size], Layout]
Light = Callable[[Rng, Layout], Scene]
Rules = tuple[float, float, float]
EVENLY: Rules = (0.4, 0.2, 0.4)  # over, under, deep
TOUCHING = (0.0, 0.1, 0.9)
KINDS: dict[str, tuple[list[Lay], list[Light]]] = {
    "nuclei": ([_strewn(_nucleus, 2.5, 0.28, EVENLY, 0.05)], [_glow]),
    "cells": ([_strewn(_cell, 6, 0.4, EVENLY, 0.08)], [_cytoplasm]),
    "phase": ([_strewn(_cell, 4, 0.3, EVENLY, 0.08), _strewn(_disc, 3, 0.25, EVENLY)], [_phase]),
    "brightfield": ([_strewn(_cell, 4, 0.3, EVENLY, 0.08), _strewn(_nucleus, 4, 0.25, EVENLY)], [_absorbing]),
    "histology": ([_strewn(_nucleus, 3.5, 0.15, EVENLY, 0.05)], [_stained]),
    "membranes": ([_sheet, _strewn(_cell, 6, 0.3, TOUCHING)], [_outline]),
    "bacteria": ([_strewn(_bacterium, 1.6, 0.05, EVENLY)], [_glow, _phase, _absorbing]),
    "filaments": ([_strewn(_filament, 1.3, 0.025, (0.5, 0.5, 0.0), cross=0.05)], [_glow, _phase, _absorbing]),
    "discs": ([_strewn(_disc, 4, 0.3, TOUCHING)], [_relief, _relief, _glow]),
    "tissue": ([_sheet], [_cytoplasm, _outline, _section]),
    "yeast": ([_strewn(_budding, 3, 0.18, TOUCHING)], [_phase, _absorbing, _glow, _outline]),
}
