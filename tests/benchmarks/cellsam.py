"""CellSAM beside its own package, on two cores: the same weights, the same image, first compared and then timed.

python -m tests.benchmarks.cellsam [--dtype bfloat16] [--runs 2]

Where the package is not installed (see tests/cellsam_oracle.py) only ours is timed, and no ratio is printed.

Both segment an image of 512² px whole, turn by turn, each in a process of its own, which is where its memory is
counted; the 300 boxes that score best are cells on both sides. Weights are random, every parameter of them: boxes and
masks mean nothing, and cost what they cost.

image_speedup: the whole image, pixels in, label image out. decode_speedup: of that, from boxes and the embedding to the
label image. peak_ratio: peak memory of the processes, ours / theirs, each with what it imports and the weights.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster import memory
from serve_app.model import cellfinder, cells, cellsam, cellsam_inputs, checkpoint, paint
from serve_app.model.cell_masks import Boxes
from tests import cellsam_oracle
from tests.benchmarks.nano import report

WANTED = {"image_speedup": 6.0, "decode_speedup": 6.0, "peak_ratio": 1.0}
BOXES, SIDE = 300, 512
Answer = dict[str, Any]


def picture() -> np.ndarray:
    return np.ascontiguousarray(cellsam_oracle.data.immunohistochemistry()[:SIDE, :SIDE])


def ours(connection: Connection, folder: Path, dtype: str) -> None:
    memory.keep()  # as replicas do
    model = cells.load(folder, "cpu", dtype)

    def segment() -> Answer:
        started = time.perf_counter()
        ready = cellsam.normalise(cellsam.channels(picture()))
        (found,) = cells.find(model.detector, [ready])
        (embedding,) = cells.embed(model.encoder, [ready])
        boxed = time.perf_counter()
        chosen = Boxes(found.boxes[:BOXES], found.scores[:BOXES])
        made = paint.paint(model.decoder, embedding, chosen, (SIDE, SIDE))
        return answer(started, boxed, found.scores, chosen.boxes, embedding, made.labels)

    serve(connection, segment, f"{model.encoder.runtime}; {model.detector.runtime}; {model.decoder.runtime}")


def theirs(connection: Connection, folder: Path, dtype: str) -> None:
    oracle = cellsam_oracle.built(cellsam_oracle.weights(cellsam_oracle.FULL), cellsam_oracle.FULL)
    seen: dict[str, Any] = {}
    detect, embed = oracle.cellfinder.forward_inference, oracle.generate_embeddings

    def boxes(images: Any, device: Any = None) -> Any:
        (found,) = detect(oracle.sam_bbox_preprocessing(images, percentile=False))
        seen["boxes"], seen["scores"] = found["boxes"][:BOXES], found["scores"].numpy()
        seen["boxed"] = time.perf_counter()
        return [seen["boxes"]]

    def embedding(*arguments: Any, **named: Any) -> Any:
        seen["embedding"], paddings = embed(*arguments, **named)
        return seen["embedding"], paddings

    oracle.generate_bounding_boxes, oracle.generate_embeddings = boxes, embedding
    from cellSAM import cellsam_pipeline, model  # noqa: F401

    pipeline, functions = sys.modules["cellSAM.cellsam_pipeline"], sys.modules["cellSAM.model"]

    def segment() -> Answer:
        started = time.perf_counter()
        planes = pipeline.normalize_image(picture().astype(np.float32))
        labels = functions.segment_cellular_image(planes, oracle, normalize=True)[0]
        embedded = seen["embedding"][0].numpy()
        return answer(started, seen["boxed"], seen["scores"], seen["boxes"].numpy(), embedded, labels)

    serve(connection, segment, "cellSAM")


def answer(started: float, boxed: float, *arrays: np.ndarray) -> Answer:
    now = time.perf_counter()
    names = ("scores", "boxes", "embedding", "labels")
    return {"image_s": now - started, "decode_s": now - boxed, **dict(zip(names, arrays, strict=True))}


def serve(connection: Connection, segment: Any, name: str) -> None:
    connection.send(name)
    while connection.recv():
        made = segment()
        connection.send(made | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})


@contextmanager
def running(side: Any, folder: Path, dtype: str) -> Iterator[Connection]:
    """A process that segments the image whenever it is told True."""
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=quietly, args=(side, there, folder, dtype), daemon=True)
    process.start()
    there.close()
    try:
        print(here.recv(), flush=True)
        yield here
    finally:
        here.send(False)
        process.join(30)
        process.kill()


def quietly(side: Any, connection: Connection, folder: Path, dtype: str) -> None:
    import warnings

    warnings.simplefilter("ignore")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    side(connection, folder, dtype)


def once(connection: Connection) -> Answer:
    connection.send(True)
    made: Answer = connection.recv()
    print(f"  {made['image_s']:7.2f} s, of which {made['decode_s']:.2f} s from boxes to labels", flush=True)
    return made


def compare(mine: Answer, peer: Answer) -> dict[str, float]:
    """How far apart the two sides are, both in float32."""
    inside = np.abs(mine["embedding"] - peer["embedding"]).max() / np.abs(peer["embedding"]).max()
    same = (np.abs(mine["boxes"] - peer["boxes"]).max(1) <= 1e-3 * 1024).sum()
    return {
        "scores_apart": np.abs(mine["scores"] - peer["scores"]).max(),
        "boxes_alike": float(same) / len(peer["boxes"]),
        "embeddings_apart": inside,
        "pixels_labelled_alike": np.mean(mine["labels"] == peer["labels"]),
    }


def gate(folder: Path, dtype: str) -> dict[str, float]:
    """Detector in `dtype` against float32: how far boxes move, beside torch's own bfloat16 of the same modules."""
    pixels = cellsam_inputs.square(cellsam.normalise(cellsam.channels(picture())), 1024)
    batch = cellsam_inputs.detector_input(pixels, True)[None]
    module = cellfinder.module(folder, checkpoint.ModelCard.read(folder)).prepare()
    with torch.inference_mode():
        exact = module(batch)
        with torch.autocast("cpu", torch.bfloat16):
            peer = module(batch)
    found = cellfinder.load(folder, "auto", "cpu", dtype).forward(batch)
    apart = [
        [(one - true).abs().mean().item() for one, true in zip(each, exact, strict=True)] for each in (found, peer)
    ]
    (scores, places), (peer_scores, peer_places) = apart
    return {"detector_scores_vs_torch": scores / peer_scores, "detector_boxes_vs_torch": places / peer_places}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", help="ours when timed (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=2, help="timed pairs (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cellray-bench-") as folder:
        figures = measured(Path(folder), arguments.dtype, arguments.runs)
    report("cellsam", figures, WANTED)


def measured(folder: Path, dtype: str, runs: int) -> dict[str, float]:
    state = cellsam_oracle.weights(cellsam_oracle.FULL)
    checkpoint.extract(state, folder, source="random", source_sha256="", trained=False)
    del state
    figures, there = dict[str, float](), cellsam_oracle.installed()
    if not there:
        print("cellSAM is not installed here: ours alone, without a ratio")
    with running(ours, folder, "float32") as exact:
        first = once(exact)
    if not there:
        with running(ours, folder, dtype) as fast:
            figures["image_ours_s"] = np.median([once(fast)["image_s"] for _ in range(runs + 1)][1:])
        return figures
    with running(theirs, folder, dtype) as peer, running(ours, folder, dtype) as fast:
        figures |= compare(first, once(peer))
        once(fast)  # warm
        pairs = [(once(peer), once(fast)) for _ in range(runs)]
    for name in ("image", "decode"):
        taken = np.array([[side[f"{name}_s"] for side in pair] for pair in pairs])
        figures |= {f"{name}_theirs_s": np.median(taken[:, 0]), f"{name}_ours_s": np.median(taken[:, 1])}
        figures[f"{name}_speedup"] = np.median(taken[:, 0] / taken[:, 1])
    figures["peak_ratio"] = pairs[-1][1]["peak_mb"] / pairs[-1][0]["peak_mb"]
    figures |= {f"peak_{name}_mb": side["peak_mb"] for name, side in zip(("theirs", "ours"), pairs[-1], strict=True)}
    return figures | (gate(folder, dtype) if dtype != "float32" else {})


if __name__ == "__main__":
    main()
