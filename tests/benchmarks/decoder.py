"""The mask decoder against segment_anything's own, float32, boxes on one ViT-B embedding, low-resolution logits out.

The peer runs in a process of its own, as it is shipped: ours also changes how its process keeps memory.

python -m tests.benchmarks.decoder [--arch sam_vit_b] [--pairs 3]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from cluster import memory
from serve_app.model import checkpoint
from serve_app.model.decoder import ReferenceDecoder
from serve_app.model.fast_decoder import FastDecoder
from serve_app.model.prompts import DecodeRequest, Prompts

SIZE = (768, 1024)
COUNTS = (1, 16, 256, 1024)
PEER_CHUNK_AT_1024 = 64
SINGLES = 16  # the peer's one-by-one rate is measured on so many


def request(count: int, grid: int) -> DecodeRequest:
    rng = np.random.default_rng(count)
    corners = rng.uniform(0, 600, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(16, 160, (count, 2))], 1).astype(np.float32)
    embedding = rng.normal(0, 1, (256, grid, grid)).astype(np.float32)
    return DecodeRequest(embedding, SIZE, Prompts(boxes=boxes))


@torch.inference_mode()
def theirs(peer: ReferenceDecoder, asked: DecodeRequest, chunk: int) -> None:
    """segment_anything's modules as SamPredictor.predict_torch calls them, `chunk` boxes a call."""
    embedding = peer.image(asked.embedding)
    for start in range(0, len(asked.prompts), chunk):
        sparse = peer.sparse(asked, slice(start, start + chunk))
        dense = peer.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand(len(sparse), *embedding.shape[1:])
        peer.mask_decoder(embedding, peer.prompt_encoder.get_dense_pe(), sparse, dense, asked.multimask)


def timed(call: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def peer_process(folder: Path, calls: Connection) -> None:
    """Answers each (prompts, chunk) with the seconds that it took."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    peer = ReferenceDecoder(folder, "cpu")
    while (call := calls.recv()) is not None:
        count, chunk = call
        calls.send(timed(theirs, peer, request(count, peer.card.architecture.grid), chunk))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument(
        "--arch", default="sam_vit_b", choices=checkpoint.ARCHITECTURES, help="(default: %(default)s)"
    )
    arguments.add_argument("--pairs", type=int, default=3, help="timed pairs; ratios are their medians")
    chosen = arguments.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint.extract(
            checkpoint.seeded(chosen.arch, 0), folder, source="seeded", source_sha256="0" * 64, trained=False
        )
        memory.keep()
        ours = FastDecoder(folder, "cpu")
        calls, theirs_end = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=peer_process, args=(folder, theirs_end))
        process.start()
        try:
            figures = measure(ours, calls, chosen.pairs)
        finally:
            calls.send(None)
            process.join(60)
    print(json.dumps({"benchmark": "decoder", "figures": figures, "arch": chosen.arch, "dtype": "float32"}))


def measure(ours: FastDecoder, calls: Connection, pairs: int) -> dict[str, float]:
    def peer(count: int, chunk: int) -> float:
        calls.send((count, chunk))
        return float(calls.recv()) / count

    figures: dict[str, float] = {}
    print(f"{'prompts':>8} {'ours ms':>9} {'batched ms':>11} {'single ms':>10} {'vs batched':>11} {'vs single':>10}")
    for count in COUNTS:
        asked, few = request(count, ours.card.architecture.grid), min(count, SINGLES)
        chunk = PEER_CHUNK_AT_1024 if count == 1024 else count
        ours.logits(request(few, ours.card.architecture.grid))  # both warm
        peer(few, 1)
        rows = []
        for _ in range(pairs if count <= 256 else 1):
            rows.append((timed(ours.logits, asked) / count, peer(count, chunk), peer(few, 1)))
        vs_batched = statistics.median(batched / own for own, batched, _ in rows)
        vs_single = statistics.median(single / own for own, _, single in rows)
        milliseconds = [1000 * statistics.median(column) for column in zip(*rows, strict=True)]
        print("{:8} {:9.1f} {:11.1f} {:10.1f} {:10.2f}x {:9.2f}x".format(count, *milliseconds, vs_batched, vs_single))
        figures |= {
            f"decoder_{count}_ms": milliseconds[0],
            f"decoder_{count}_vs_batched": vs_batched,
            f"decoder_{count}_vs_single": vs_single,
        }
    return figures


if __name__ == "__main__":
    main()
