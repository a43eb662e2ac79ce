"""How good the small model is on images that it was never trained on, and how fast on a CPU.

python -m tests.benchmarks.nano [--source FILE] [--only synthetic real automask time] [--fields 5] [--picture FILE]

Masks are made as the service makes them: by the runtimes that the settings choose, from float16 embeddings, one mask a
prompt, at the image's own resolution. A box is exact; a click is the pixel of an object that is farthest from its edge.

synthetic: fields of 256² px, as many of each kind that has objects, whose typical object (median area) is at least
ACROSS px wide, as in training; the next seeds take the place of others. The figures are means over all objects.
real: scikit-image's coins and cell, whole, and its immunohistochemistry (ihc) in tiles of 128 px, 64 apart, in which
nuclei are as large as in training; each is asked for in the tile whose centre is nearest to that of its box. The figure
is the mean of the three images' means.
automask: a grid of points (GRID) on the fields of nuclei; mask and object pair up from an IoU of 0.5, the best first.
time: an image of 512² px → 20 boxes' masks as RLE, warm, turn by turn with segment_anything's SamPredictor.

Only objects of fewer than 16 px are left out, four of the decoder's pixels; the table has their number.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco
from scipy import ndimage
from segment_anything import SamPredictor

from cluster import memory, settings
from jobs import labels, show, synthetic
from serve_app import models
from serve_app.model import automask, checkpoint, decoder, encoder, masks, preprocess
from serve_app.model.masks import MaskSet
from serve_app.model.prompts import DecodeRequest, GridOptions, Prompts, crops
from tests.weights_of_sam import filled

MODEL, PARTS = "nano", ("synthetic", "real", "automask", "time")
WANTED = {  # at most for the time, at least for the others
    "iou_box_synthetic": 0.88,
    "iou_click_synthetic": 0.70,
    "iou_correlation": 0.70,
    "iou_box_real": 0.80,
    "automask_f1": 0.75,
    "embed_and_20_boxes_ms": 150.0,
}
GRID = GridOptions(32, pred_iou_thresh=0.5, stability_score_thresh=0.7, box_nms_thresh=0.2)  # by validation
KINDS = [kind for kind in synthetic.NAMES if kind != synthetic.EMPTY]
NUCLEI = ["nuclei", "histology"]
SIDE, ACROSS, LEAST_AREA, MATCH = 256, 16, 16, 0.5
FIRST_SEED = 700_000  # validation takes 900 000 and a few, training 1 000 000 and all above
LABELS = Path(__file__).parent / "labels"
WHOLE, TILED, TILE, STRIDE, TILES_SHOWN = ["coins", "cell"], "ihc", 128, 64, 3
BOXES, RUNS = 20, 20


@dataclass(frozen=True)
class Scene:
    """An image [h, w, 3] uint8, or what is seen of one from `corner` (x, y) on; its N objects as RLE, with boxes [N, 4]
    float32 (x0, y0, x1, y1), and how many were too small."""

    kind: str
    pixels: np.ndarray
    objects: list[str]
    boxes: np.ndarray
    small: int
    corner: tuple[int, int]

    @classmethod
    def of(cls, kind: str, pixels: np.ndarray, plane: np.ndarray, corner: tuple[int, int] = (0, 0)) -> Scene:
        found = labels.of_plane(plane)
        areas, boxes = masks.areas_and_boxes(found, plane.shape)
        kept = np.flatnonzero(areas >= LEAST_AREA)
        boxes[:, 2:] += boxes[:, :2]
        chosen = [found[index] for index in kept]
        return cls(kind, np.ascontiguousarray(pixels), chosen, boxes[kept], len(found) - len(kept), corner)

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[0], self.pixels.shape[1]

    def clicks(self) -> Prompts:
        """What lies beyond the image is no object."""
        planes = np.pad(masks.decode(self.objects, self.size), ((0, 0), (1, 1), (1, 1)))
        depths = [ndimage.distance_transform_edt(plane)[1:-1, 1:-1] for plane in planes]
        points = np.array([np.unravel_index(depth.argmax(), depth.shape)[::-1] for depth in depths], np.float32)
        return Prompts(points=points[:, None], labels=np.ones((len(points), 1), np.int32))

    def iou(self, found: MaskSet) -> np.ndarray:
        """[masks, objects]; there is at least one of each."""
        rles = [[{"size": self.size, "counts": text} for text in texts] for texts in (found.counts, self.objects)]
        return np.asarray(coco.iou(*rles, [0] * len(self.objects)))

    def tile(self, found: MaskSet, facts: str) -> show.Tile:
        pairs = zip(found.counts, found.areas, strict=True)
        rows = [{"segmentation": {"size": self.size, "counts": text}, "area": area} for text, area in pairs]
        return show.Tile(show._draw(self.pixels, rows), self.kind, f"{len(rows)} masks of {len(self.objects)}, {facts}")


@dataclass(frozen=True)
class Answer:
    """A scene's masks from boxes, and `values` [N, 4]: IoU from box and click, predicted IoU from box and click."""

    scene: Scene
    found: MaskSet
    values: np.ndarray

    def tile(self) -> show.Tile:
        return self.scene.tile(self.found, f"IoU {self.values[:, 0].mean():.2f}")


class Model:
    """Both halves as their replicas load them, on the CPU."""

    def __init__(self, folder: Path, chosen: settings.ModelSettings) -> None:
        runtime = "reference" if chosen.runtime == "reference" else "auto"
        self.encoder = encoder.load(folder, chosen.runtime, "cpu", chosen.dtype)
        self.decoder = decoder.load(folder, runtime, "cpu", chosen.dtype)
        self.sizes = self.encoder.card.architecture

    def segment(self, scene: Scene, *prompts: Prompts) -> list[MaskSet]:
        embedding = self.embed(scene)
        requests = [DecodeRequest(embedding, scene.size, each) for each in prompts]
        return [good(found) for found in decoder.segment(self.decoder, requests)]

    def embed(self, scene: Scene) -> np.ndarray:
        return good(encoder.embed(self.encoder, [preprocess.resize(scene.pixels, self.sizes.image_size).pixels])[0])

    def answer(self, scene: Scene) -> Answer:
        found = self.segment(scene, Prompts(scene.boxes), scene.clicks())
        values = [*(scene.iou(one).diagonal() for one in found), *(one.predicted_iou for one in found)]
        return Answer(scene, found[0], np.stack(values, axis=1))


def good(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


@lru_cache(None)
def fields_of(kind: str, count: int) -> list[Scene]:
    seeds, made = itertools.count(FIRST_SEED + 1000 * KINDS.index(kind)), list[Scene]()
    while len(made) < count:
        one = synthetic.field(next(seeds), (SIDE, SIDE), kind)
        areas = np.bincount(one.labels.ravel())[1:]
        if np.median(areas[areas > 0]) >= ACROSS**2:
            made.append(Scene.of(kind, one.image, one.labels))
    return made


def real(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(pixels [h, w, 3], outlines' labels [h, w])."""
    limit, data = settings.Limits().image_pixels, (files("skimage.data") / f"{name}.png").read_bytes()
    return preprocess.decode(data, limit), labels.label_image((LABELS / f"{name}.png").read_bytes(), limit)


def tiles(name: str) -> list[Scene]:
    """Those with objects to ask for."""
    pixels, plane = real(name)
    numbers, ends, made = np.unique(plane[plane > 0]), Scene.of(name, pixels, plane).boxes, []
    high, wide = (range(0, side - TILE + 1, STRIDE) for side in plane.shape)
    places = np.array([(x, y) for y in high for x in wide])
    centres = (ends[:, None, :2] + ends[:, None, 2:]) / 2
    chosen = np.linalg.norm(centres - (places + TILE / 2), axis=2).argmin(1)
    for index in np.unique(chosen):
        (x, y), own = places[index].tolist(), np.where(np.isin(plane, numbers[chosen == index]), plane, 0)
        part = slice(y, y + TILE), slice(x, x + TILE)
        assert np.count_nonzero(own[part]) == np.count_nonzero(own), "a tile cuts an object"
        made.append(Scene.of(name, pixels[part], own[part], (x, y)))
    return made


def table(answers: list[Answer]) -> tuple[dict[str, list[Answer]], np.ndarray]:
    """Prints a line a kind → the answers by kind, and the mean [4] of the kinds' means."""
    groups: dict[str, list[Answer]] = {}
    for one in answers:
        groups.setdefault(one.scene.kind, []).append(one)
    print(f"{'mean IoU':14}{'images':>8}{'objects':>9}{'left out':>10}{'box':>8}{'click':>8}")
    for kind, own in [*groups.items(), ("all objects", answers)]:
        values, small = joined(own), sum(one.scene.small for one in own)
        print(f"{kind:14}{len(own):8}{len(values):9}{small:10}{values[:, 0].mean():8.3f}{values[:, 1].mean():8.3f}")
    means = np.mean([joined(own).mean(0) for own in groups.values()], axis=0)
    print(f"{'mean of these':41}{means[0]:8.3f}{means[1]:8.3f}\n", flush=True)
    return groups, means


def joined(answers: list[Answer]) -> np.ndarray:
    return np.concatenate([one.values for one in answers])


def on_synthetic(model: Model, fields: int, sheet: list[show.Tile]) -> dict[str, float]:
    answers = [model.answer(scene) for kind in KINDS for scene in fields_of(kind, fields)]
    sheet += [own[0].tile() for own in table(answers)[0].values()]
    box, click, predicted_box, predicted_click = joined(answers).T
    both = np.concatenate([box, click]), np.concatenate([predicted_box, predicted_click])
    return {
        "iou_box_synthetic": box.mean(),
        "iou_click_synthetic": click.mean(),
        "iou_correlation": np.corrcoef(*both)[0, 1],
        "iou_correlation_box": np.corrcoef(box, predicted_box)[0, 1],
        "iou_correlation_click": np.corrcoef(click, predicted_click)[0, 1],
    }


def on_real(model: Model, sheet: list[show.Tile]) -> dict[str, float]:
    answers = [model.answer(scene) for scene in (*(Scene.of(name, *real(name)) for name in WHOLE), *tiles(TILED))]
    groups, means = table(answers)
    tiled, scene = groups[TILED], Scene.of(TILED, *real(TILED))
    placed = [masks.place(one.found, one.scene.corner, scene.size) for one in tiled]
    together = Answer(scene, MaskSet.join(scene.size, placed, model.sizes.channels), joined(tiled))
    fullest = sorted(tiled, key=lambda one: -len(one.values))[:TILES_SHOWN]
    sheet += [one.tile() for one in (*answers[: len(WHOLE)], together, *fullest)]
    return {"iou_box_real": means[0], "iou_click_real": means[1]}


def on_automask(model: Model, fields: int, sheet: list[show.Tile]) -> dict[str, float]:
    counts = []  # objects, masks, pairs
    for scene in (scene for kind in NUCLEI for scene in fields_of(kind, fields)):
        (view,) = crops(scene.size, GRID)
        found = automask.generate(model.decoder, [(model.embed(scene), view)], scene.size, GRID)
        counts.append((len(scene.objects), len(found), pairs(scene.iou(found)) if len(found) else 0))
        print("{:12}{:8} objects{:8} masks{:8} pairs".format(scene.kind, *counts[-1]))
        sheet.append(scene.tile(found, f"{counts[-1][2]} pairs"))
    objects, number, both = np.array(counts).reshape(len(NUCLEI), fields, 3).sum(1).T
    each = dict(zip(NUCLEI, 2 * both / (objects + number), strict=True))
    total = 2 * both.sum() / (objects.sum() + number.sum())
    return {"automask_f1": total, **{f"automask_f1_{kind}": value for kind, value in each.items()}}


def pairs(iou: np.ndarray) -> int:
    """[masks, objects] → how many belong together, one to one."""
    both = 0
    while iou.max() >= MATCH:
        mask, thing = np.unravel_index(iou.argmax(), iou.shape)
        iou[mask], iou[:, thing], both = 0, 0, both + 1
    return both


def on_time(model: Model, folder: Path) -> dict[str, float]:
    scene, card = Scene.of(TILED, *real(TILED)), model.encoder.card
    boxes, state = scene.boxes[:BOXES], checkpoint.load_half(folder, checkpoint.ENCODER, card)
    predictor = SamPredictor(filled(card.family, state | checkpoint.load_half(folder, checkpoint.DECODER, card)))

    def ours() -> list[str]:
        return model.segment(scene, Prompts(boxes))[0].counts

    def peer() -> list[str]:
        predictor.set_image(scene.pixels)
        asked = torch.as_tensor(predictor.transform.apply_boxes(boxes, scene.size), dtype=torch.float)
        return masks.encode(predictor.predict_torch(None, None, asked, multimask_output=False)[0][:, 0].numpy())

    ours(), peer()  # warm
    mine, theirs = 1000 * np.array([(seconds(ours), seconds(peer)) for _ in range(RUNS)]).T
    return {
        "embed_and_20_boxes_ms": np.median(mine),
        "embed_and_20_boxes_peer_ms": np.median(theirs),
        "embed_and_20_boxes_vs_peer": np.median(theirs / mine),
    }


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=MODEL, help="another checkpoint than that of the settings' nano")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="(default: all of them)")
    parser.add_argument("--fields", type=int, default=5, help="synthetic ones of each kind (default: %(default)s)")
    parser.add_argument("--picture", type=Path, help="a PNG to draw some of the masks into")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    memory.keep()
    known, figures, sheet = settings.load(), dict[str, float](), list[show.Tile]()
    with models.opened(known, arguments.source) as folder:
        model = Model(folder, models.find(known, MODEL))
        print(f"{model.encoder.runtime}; {model.decoder.runtime}; {torch.get_num_threads()} threads", flush=True)
        if not model.encoder.card.trained:
            print(f"{arguments.source} is random weights: only its times mean something", flush=True)
        if "synthetic" in arguments.only:
            figures |= on_synthetic(model, arguments.fields, sheet)
        if "real" in arguments.only:
            figures |= on_real(model, sheet)
        if "automask" in arguments.only:
            figures |= on_automask(model, arguments.fields, sheet)
        if "time" in arguments.only:
            figures |= on_time(model, folder)
    if arguments.picture:
        show._sheet(sheet, "Masks from boxes, then automatic ones", "").save(arguments.picture)
    report("nano", figures, WANTED)


LESS_IS_BETTER = re.compile(r"(?<!img)_(s|ms|mb|us|bytes|error|faults|lost|twice)(_|$)|^peak_ratio$")  # not of a rate


def report(benchmark: str, figures: dict[str, float], wanted: dict[str, float]) -> None:
    """A line a figure, with what is wanted: at most of a time or a loss, at least of another; then all as JSON."""
    for name, value in figures.items():
        sign = "≤" if LESS_IS_BETTER.search(name) else "≥"
        print(f"{name:34} {value:10.3f}  {f'{sign} {wanted[name]:g}' if name in wanted else ''}")
    print(json.dumps({"benchmark": benchmark, "figures": {name: float(value) for name, value in figures.items()}}))


if __name__ == "__main__":
    main()
