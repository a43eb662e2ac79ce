"""What a synthetic field shows: for each kind, how its objects lie and in which of several ways they are lit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jobs.synthetic.camera import Planes, blur, noise
from jobs.synthetic.layout import MOST, Layout, Make, Part, Plane, Rule, Size, rod, scatter, star, tessellation, union

Rng = np.random.Generator
GREY = np.ones((1, 3))
DYES = np.array([[0, 1, 0], [0, 0.3, 1], [1, 0, 0], [0, 1, 1], [1, 0, 1], [1, 0.9, 0], [1, 0.4, 0], [1, 1, 1]])
# Optical densities of haematoxylin, eosin and DAB in R, G, B: Ruifrok & Johnston, Anal Quant Cytol Histol 2001;
# eosin less pure than theirs, as scanners show it.
STAINS = np.array([[0.65, 0.70, 0.29], [0.12, 0.85, 0.45], [0.27, 0.57, 0.78]])


class Scene(NamedTuple):
    """The light of a field, [C, h, w], its channels' colours [C, 3], and whether it is dark on bright."""

    light: Planes
    colours: npt.NDArray[np.float64]
    bright: bool


Lay = Callable[[Rng, Size], Layout]
Light = Callable[[Rng, Layout], Scene]


def _pick(rng: Rng, *values: float) -> float:
    return values[rng.integers(len(values))]


def _log_uniform(rng: Rng, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(max(low, high))))


def _nucleus(rng: Rng) -> Make:
    stretch, wobble = rng.uniform(1.0, 1.9), _pick(rng, 0.0, 0.04, 0.12)
    lobed, dividing = _pick(rng, 0, 0, 0, 0.15, 0.15, 0.8), _pick(rng, 0, 0.08)

    def make(rng: Rng, radius: float) -> list[Part]:
        chance, turn = rng.random(), rng.uniform(0, 2 * math.pi)
        dy, dx = radius * math.sin(turn), radius * math.cos(turn)
        if chance < dividing / 2:  # metaphase: one bright plate
            return [Part(rod(rng, 0.35 * radius, 1.3 * radius, rng.normal(0, 0.3), 2), bright=1.8)]
        if chance < dividing:  # anaphase: two, apart
            plates = [star(rng, 0.55 * radius, 2.2, 0.04, turn + math.pi / 2) for _ in range(2)]
            return [Part(plates[0], 0.7 * dy, 0.7 * dx, 1.7), Part(plates[1], -0.7 * dy, -0.7 * dx, 1.7)]
        if chance > 1 - lobed:
            lobes = []
            for angle in (turn + np.cumsum(rng.uniform(1.2, 2.2, rng.integers(2, 5)))).tolist():
                lobe = star(rng, radius * rng.uniform(0.45, 0.7), rng.uniform(1, 1.5), 0.08)
                lobes.append(Part(lobe, 0.6 * radius * math.sin(angle), 0.6 * radius * math.cos(angle)))
            return [Part(union(lobes))]
        return [Part(star(rng, radius, max(1.0, stretch + rng.normal(0, 0.2)), wobble))]

    return make


def _oval(*stretches: float, wobbles: tuple[float, ...] = (0.0,)) -> Callable[[Rng], Make]:
    def draw(rng: Rng) -> Make:
        stretch, wobble = _pick(rng, *stretches), _pick(rng, *wobbles)
        return lambda rng, radius: [Part(star(rng, radius, max(1, stretch * rng.uniform(0.8, 1.2)), wobble))]

    return draw


def _rods(shortest: float, longest: float, segments: int) -> Callable[[Rng], Make]:
    """Lengths are in radii."""

    def draw(rng: Rng) -> Make:
        length, bend = rng.uniform(shortest, longest), _pick(rng, 0, 0.4, 1.2)
        pieces = segments if bend else 1
        return lambda rng, radius: [
            Part(rod(rng, radius, radius * length * rng.uniform(0.5, 1.3), rng.normal(0, bend), pieces))
        ]

    return draw


def _budding(rng: Rng) -> Make:
    stretch, budding = rng.uniform(1.0, 1.4), rng.uniform(0.1, 0.7)

    def make(rng: Rng, radius: float) -> list[Part]:
        small, turn = radius * rng.uniform(0.3, 0.75), rng.uniform(0, 2 * math.pi)
        away = 0.92 * (radius + small)
        mother = Part(star(rng, radius, max(1, stretch + rng.normal(0, 0.08)), 0.03))
        bud = Part(star(rng, small, 1.1), away * math.sin(turn), away * math.cos(turn))
        return [mother, bud] if rng.random() < budding else [mother]

    return make


def _strewn(draw: Callable[[Rng], Make], low: float, high: float, rough: float = 0, cross: float = 0.35) -> Lay:
    """Objects of a radius from `low` px to `high` × the field, loose, crowded or in colonies, with `rough` outlines;
    at most `cross` of one lies under another."""

    def lay(rng: Rng, size: Size) -> Layout:
        radius = _log_uniform(rng, low, high * min(size))
        uneven = rough * _pick(rng, 0, 0, 0.5, 1) * radius
        layout = Layout(size, radius, uneven * noise(rng, size, max(2, radius / 4)) if uneven else None)
        most = int(rng.integers(1, 5)) if radius > 0.07 * min(size) and rng.random() < 0.2 else MOST
        overlap, colony = _pick(rng, 0.02, 0.4 * cross, cross), _pick(rng, 0, 0, 0.6, 0.95)
        rules: list[Rule] = ["over", "under", "deep", "deep"]
        rule = rules[rng.integers(len(rules))]
        scatter(rng, layout, draw(rng), rng.uniform(0.06, 0.7), _pick(rng, 0.05, 0.2, 0.4), overlap, rule, colony, most)
        return layout.finish(_pick(rng, 0, 1))

    return lay


def _sheet(rng: Rng, size: Size) -> Layout:
    radius = _log_uniform(rng, 5, 0.2 * min(size))
    layout = Layout(size, radius, _pick(rng, 0, 0.06) * radius * noise(rng, size, radius / 2))
    tessellation(rng, layout, _pick(rng, 1, 1.3, 1.8), rng.uniform(0.12, 0.35))
    return layout.finish(_pick(rng, 0, 1, 2.5))


def _ghosts(rng: Rng, layout: Layout) -> Plane:
    """Objects far out of focus, dust and debris: seen, and not labelled."""
    field = np.zeros(layout.size, np.float32)
    if rng.random() < 0.35:
        far = Layout(layout.size, layout.radius)
        scatter(rng, far, _oval(1, 1.4)(rng), rng.uniform(0.02, 0.3), 0.3, 1, most=25)
        field += rng.uniform(0.05, 0.4) * blur(far.stack, max(2.0, layout.radius * rng.uniform(0.3, 0.8)))
    if rng.random() < 0.35:
        dirt = Layout(layout.size, rng.uniform(0.8, 2.5))
        scatter(rng, dirt, _oval(1, 2, 4, wobbles=(0, 0.3))(rng), 1, 0.4, most=int(rng.integers(2, 25)))
        field += rng.uniform(0.1, 0.8) * blur(dirt.stack, _pick(rng, 0.4, 2))
    return field


def _body(rng: Rng, layout: Layout) -> Plane:
    """[h, w] how much of a dye each pixel of the objects holds: flat or domed, with grains, holes, foci or a rim."""
    flat, dome = layout.inside(), np.sqrt(layout.relative * (2 - layout.relative))
    body = flat + _pick(rng, 0, 0.5, 1) * rng.random() * (dome - flat)
    fine = noise(rng, layout.size, layout.radius * rng.uniform(0.08, 0.3))
    body *= np.maximum(1 + _pick(rng, 0.05, 0.2, 0.45) * fine, 0.15)
    look, spots = rng.random(), noise(rng, layout.size, layout.radius * rng.uniform(0.08, 0.18))
    if look < 0.2:  # nucleoli, vacuoles
        body *= 1 - rng.uniform(0.3, 0.9) * np.clip(1.5 * spots - 1.7, 0, 1)
    elif look < 0.4:  # chromocentres, granules
        body *= 1 + rng.uniform(0.5, 2) * np.clip(2 * spots - 2.2, 0, 1)
    elif look < 0.55:
        body += rng.uniform(0.2, 0.8) * flat * layout.edge(1.5, 0.1)
    return np.asarray(body * layout.per_object(rng, _pick(rng, 0.1, 0.35, 0.7)))


def _kernels(rng: Rng, layout: Layout, share: float) -> Layout:
    """A nucleus inside each object, `share` of its radius, not labelled."""
    inner = Layout(layout.size, max(2.0, share * layout.radius))
    for item in layout.items:
        y, x = rng.normal(item.y, 0.12 * item.radius), rng.normal(item.x, 0.12 * item.radius)
        inner.place(Part(star(rng, max(1.5, share * item.radius), rng.uniform(1, 1.5), 0.05)), y, x, inner.radius)
    inner.finish()
    np.minimum(inner.signed, layout.signed, out=inner.signed)
    return inner


def _glowing(rng: Rng, *planes: Plane) -> Scene:
    """Channels on black: one is grey, or has its dye's colour."""
    grey = len(planes) == 1 and rng.random() < 0.75
    return Scene(np.stack(planes), GREY if grey else rng.permutation(DYES)[: len(planes)], False)


def _glow(rng: Rng, layout: Layout) -> Scene:
    """One dye in the objects: on black, on haze, or on structured autofluorescence."""
    light = _body(rng, layout) + _ghosts(rng, layout)
    if rng.random() < 0.3:  # wide-field: overlapping objects add up
        light += 0.5 * np.minimum(layout.stack, 2) * layout.inside()
    haze = 1 + _pick(rng, 0.05, 0.3) * noise(rng, layout.size, _log_uniform(rng, 2, 60))
    return _glowing(rng, light + _pick(rng, 0.02, 0.08, 0.25) * np.maximum(haze, 0))


def _cytoplasm(rng: Rng, layout: Layout) -> Scene:
    """Whole cells: a dye in the cytoplasm, nuclei, and a third of membranes or granules, or fewer channels."""
    inner, size, radius = _kernels(rng, layout, rng.uniform(0.3, 0.55)), layout.size, layout.radius
    cell, kernel = _body(rng, layout), inner.inside()
    if rng.random() < 0.5:
        cell *= 1 - rng.uniform(0, 0.5) + rng.uniform(0.2, 1) * layout.relative
    if rng.random() < 0.4:  # fibres
        cell *= 0.5 + np.clip(1 - np.abs(noise(rng, size, radius / 8, rng.uniform(2, 6))), 0, 1)
    cell *= 1 - _pick(rng, -0.4, 0, 0.6, 0.9) * kernel
    cell *= 1 - rng.uniform(0.2, 0.7) * layout.edge(0, 0.06)
    cell += 0.5 * _ghosts(rng, layout) + _pick(rng, 0.02, 0.1, 0.25)
    nuclei: Plane = np.maximum(kernel * inner.per_object(rng, 0.3), 0.03)
    nuclei *= 1 + 0.2 * noise(rng, size, inner.radius / 4)
    granules = np.clip(noise(rng, size, radius / 12) - 1, 0, 1) * layout.inside()
    planes: list[Plane] = [cell, nuclei, granules if rng.random() < 0.5 else layout.edge(1, 0.04)]
    return _glowing(rng, *planes[: rng.integers(1, 4)])


def _outline(rng: Rng, layout: Layout) -> Scene:
    """Membranes only, uneven along their length; sometimes with a weak inside, or nuclei."""
    light = layout.edge(rng.uniform(0, 1), rng.uniform(0.02, 0.1))
    light *= np.maximum(1 + 0.4 * noise(rng, layout.size, layout.radius / 3), 0)
    light += _pick(rng, 0, 0.1, 0.3) * _body(rng, layout) + 0.3 * _ghosts(rng, layout)
    if rng.random() < 0.7:
        return _glowing(rng, light)
    return _glowing(rng, light, _kernels(rng, layout, rng.uniform(0.3, 0.5)).inside() + 0.03)


def _ground(rng: Rng, size: Size, darkest: float, brightest: float) -> Plane:
    """The bright ground of transmitted light, almost even."""
    field = np.full(size, rng.uniform(darkest, brightest), np.float32)
    for grain in (rng.uniform(1, 4), rng.uniform(30, 120)):
        field += _pick(rng, 0, 0.01, 0.03) * noise(rng, size, grain)
    return field


def _slope(rng: Rng, height: Plane) -> Plane:
    """How much each pixel leans towards one direction."""
    (gy, gx), turn = np.gradient(height), rng.uniform(0, 2 * math.pi)
    return np.asarray(math.sin(turn) * gy + math.cos(turn) * gx)


def _phase(rng: Rng, layout: Layout) -> Scene:
    """Zernike phase contrast: objects darker than the ground, or brighter, with a halo; or DIC's relief."""
    thick = np.minimum(layout.stack, 1.5) + rng.uniform(0, 0.5) * layout.inside(2) + 0.5 * _ghosts(rng, layout)
    thick += rng.uniform(0.05, 0.3) * noise(rng, layout.size, layout.radius / 6) * layout.inside(3)
    deep, light = rng.uniform(0.12, 0.5), _ground(rng, layout.size, 0.35, 0.65)
    if rng.random() < 0.25:
        light += deep * min(6.0, 0.4 * layout.radius) * _slope(rng, blur(thick, max(0.8, 0.05 * layout.radius)))
    else:
        halo = blur(thick, min(max(2.0, layout.radius * rng.uniform(0.25, 0.8)), 25))
        light += _pick(rng, -deep, -deep, -deep, deep) * (thick - halo * rng.uniform(0.6, 1.1))
        light += _pick(rng, 0, 0.6) * rng.random() * layout.edge(-1, 0.06)
    return Scene(np.clip(light, 0, 1.2)[None], GREY, True)


def _transmitted(ground: Plane, dense: list[Plane], colours: npt.NDArray[np.float64]) -> Planes:
    """Beer–Lambert: dyes' densities [h, w] and their colours' densities [n, 3] → [3, h, w] light."""
    density = [sum(plane * np.float64(rgb) for plane, rgb in zip(dense, band, strict=True)) for band in colours.T]
    return (ground * np.exp(-np.stack(density))).astype(np.float32)


def _absorbing(rng: Rng, layout: Layout) -> Scene:
    """Dark on bright without colour, or with that of a dye; a dark or a bright rim as the focus has it."""
    dense = rng.uniform(0.2, 1.5) * _pick(rng, 0.15, 1) * _body(rng, layout) + _ghosts(rng, layout)
    dense += rng.uniform(0.2, 1.2) * _pick(rng, -0.3, 0, 0, 1, 1, 1) * layout.edge(rng.uniform(-1, 1.5), 0.06)
    if rng.random() < 0.3:
        dense += 0.8 * _kernels(rng, layout, rng.uniform(0.2, 0.5)).inside()
    ground, grey = _ground(rng, layout.size, 0.6, 0.95), rng.random() < 0.6
    light = _transmitted(ground, [dense], np.ones((1, 1)) if grey else rng.uniform(0.2, 1.2, (1, 3)))
    return Scene(light, GREY if grey else np.eye(3), True)


def _section(rng: Rng, size: Size, blue: Plane, pink: Plane, brown: Plane) -> Scene:
    stains = 2 * np.abs(STAINS + rng.normal(0, 0.06, STAINS.shape))  # every laboratory's differ
    return Scene(_transmitted(_ground(rng, size, 0.8, 0.97), [blue, pink, brown], stains), np.eye(3), True)


def _stroma(rng: Rng, layout: Layout) -> Scene:
    """A section: blue nuclei, some of them brown, on pink or pale blue tissue with gaps."""
    size, body, inside = layout.size, _body(rng, layout), layout.inside()
    tissue = np.maximum(1 + 0.25 * noise(rng, size, _log_uniform(rng, 2, 30), rng.uniform(1, 4)), 0)
    tissue *= 1 - np.clip(4 * (noise(rng, size, rng.uniform(15, 50)) - rng.uniform(0.7, 2.5)), 0, 1)
    brown = layout.spread(rng.random(len(layout.items)) < _pick(rng, 0, 0.4, 0.9))
    blue = body * (rng.uniform(0.25, 1) * (1 - brown) + 0.3 * brown) + _pick(rng, 0.02, 0.12) * tissue
    blue += 0.3 * _ghosts(rng, layout) + _pick(rng, 0, 0.4) * inside * layout.edge(1, 0.08)
    pink = _pick(rng, 0.02, 0.08, 0.16) * tissue * (1 - 0.6 * inside)
    leak = _pick(rng, 0, 0, 0, rng.uniform(0.1, 0.6)) * tissue * layout.edge(-0.3 * layout.radius, 0.3)
    return _section(rng, size, blue, pink, rng.uniform(0.4, 1.2) * body * brown + leak)


def _epithelium(rng: Rng, layout: Layout) -> Scene:
    """A section: pink cells with pale or brown borders, and blue nuclei."""
    size, inner, border = layout.size, _kernels(rng, layout, rng.uniform(0.25, 0.5)), layout.edge(0, 0.06)
    blue = rng.uniform(0.3, 0.9) * inner.inside() * inner.per_object(rng, 0.2)
    blue *= 1 + 0.3 * noise(rng, size, inner.radius / 4)
    pink = rng.uniform(0.08, 0.3) * _body(rng, layout) * (1 - rng.uniform(0.2, 0.9) * border)
    return _section(rng, size, blue, pink + 0.03 * _ghosts(rng, layout), _pick(rng, 0, 0.15, 0.6) * border)


def _relief(rng: Rng, layout: Layout) -> Scene:
    """Coins, beads, seeds: opaque, lit from one side, with a worn relief, on a plain or grained table."""
    size, radius, inside = layout.size, layout.radius, layout.inside()
    height = rng.uniform(0.1, 0.5) * radius * np.sqrt(layout.relative * (2 - layout.relative))
    height += rng.uniform(0, 1.5) * layout.edge(0.1 * radius, 0.05)
    if rng.random() < 0.5:  # a figure
        height += rng.uniform(0.5, 2) * _kernels(rng, layout, rng.uniform(0.3, 0.6)).inside(2)
    grain = max(1.5, radius / rng.uniform(4, 12))
    height += _pick(rng, 0, 0.3, 0.8) * grain * np.clip(2 * noise(rng, size, grain), -1, 1) * layout.inside(3)
    level, face = rng.uniform(0.08, 0.5), rng.uniform(0.15, 0.45)
    if rng.random() < 0.25:  # darker than the table
        level, face = rng.uniform(0.45, 0.8), -0.8 * face
    weave = noise(rng, size, _log_uniform(rng, 1, 12), max(1, rng.uniform(-2, 4)))
    table = level + abs(face) * (_pick(rng, 0.03, 0.1, 0.25) * weave + _pick(rng, 0, 0.4) * noise(rng, size, 80))
    table *= 1 - _pick(rng, 0, 0.5) * blur(inside, 0.15 * radius + 1)  # their shadow
    own = (level + face * layout.per_object(rng, _pick(rng, 0.05, 0.25))) * (1 + 0.08 * noise(rng, size, 2))
    light = table + inside * (own * (1 + rng.uniform(0.2, 0.7) * _slope(rng, blur(height, 0.7))) - table)
    return Scene(np.clip(light, 0.01, 1.3)[None], GREY if rng.random() < 0.7 else rng.uniform(0.6, 1, (1, 3)), True)


_cell = _oval(1.1, 1.6, 2.6, wobbles=(0.04, 0.1, 0.2))
_disc = _oval(1, 1.05, 1.4)
KINDS: dict[str, tuple[list[Lay], list[Light]]] = {
    "nuclei": ([_strewn(_nucleus, 2.5, 0.28, 0.05)], [_glow]),
    "cells": ([_strewn(_cell, 6, 0.4, 0.08)], [_cytoplasm]),
    "phase": ([_strewn(_cell, 4, 0.3, 0.08), _strewn(_disc, 3, 0.25)], [_phase]),
    "brightfield": ([_strewn(_cell, 4, 0.3, 0.08), _strewn(_nucleus, 4, 0.25)], [_absorbing]),
    "histology": ([_strewn(_nucleus, 3.5, 0.15, 0.05)], [_stroma]),
    "membranes": ([_sheet, _strewn(_cell, 6, 0.3)], [_outline]),
    "bacteria": ([_strewn(_rods(1.5, 9, 4), 1.6, 0.05)], [_glow, _phase, _absorbing]),
    "discs": ([_strewn(_disc, 4, 0.3, cross=0.1)], [_relief, _relief, _glow]),
    "tissue": ([_sheet], [_cytoplasm, _outline, _epithelium]),
    "yeast": ([_strewn(_budding, 3, 0.18, cross=0.1)], [_phase, _absorbing, _glow, _outline]),
}
