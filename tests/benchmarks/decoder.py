"""The mask decoder and automatic masks against segment_anything's own, on ViT-B embeddings.

python -m tests.benchmarks.decoder [--arch sam_vit_b] [--device cpu] [--pairs 3]

Boxes: 1, 16, 256 and 1024 on one embedding, and 64 over 8 images; low-resolution logits out. Ours is the runtime that
a replica takes, in float32 and, where the processor has it, in bfloat16. The peer gets the same boxes in one call (at
1024 in calls of 64), and one at a time. Automatic masks: a grid of 32 × 32 points from the embedding to RLE, float32,
thresholds that let masks through, weights whose masks are blobs; the same ones come out of both, or the run fails.

On a CPU the peer runs in a process of its own, as it is shipped: ours also changes how its process keeps memory.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator

from cluster import memory
from serve_app.model import architectures, automask, checkpoint, decoder, masks
from serve_app.model.decoder import Decoder, ReferenceDecoder
from serve_app.model.masks import MaskSet
from serve_app.model.openvino import supports_bfloat16
from serve_app.model.prompts import DecodeRequest, GridOptions, Prompts, crops
from tests.weights_of_sam import build, smooth

SIZE = (768, 1024)
COUNTS = (1, 16, 256, 1024)
MANY = (8, 8)  # images, boxes on each
PEER_CHUNK_AT_1024 = 64
SINGLES = 16  # the peer's one-by-one rate is measured on so many
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def request(count: int, grid: int, seed: int = 0) -> DecodeRequest:
    rng = np.random.default_rng((count, seed))
    corners = rng.uniform(0, 600, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(16, 160, (count, 2))], 1).astype(np.float32)
    return DecodeRequest(blobs(grid, seed), SIZE, Prompts(boxes=boxes))


def blobs(grid: int, seed: int) -> np.ndarray:
    """[256, g, g] float32: an embedding that changes slowly from token to token."""
    coarse = torch.randn(1, 256, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (grid, grid), mode="bicubic")[0].numpy()


class Peer:
    """segment_anything's modules as SamPredictor.predict_torch calls them, and its mask generator."""

    def __init__(self, folder: Path, device: str) -> None:
        self.reference = ReferenceDecoder(folder, device)
        self.card = self.reference.card

    @torch.inference_mode()
    def boxes(self, count: int, chunk: int, seed: int = 0) -> None:
        asked, peer = request(count, self.card.architecture.grid, seed), self.reference
        embedding = peer.image(asked.embedding)
        for start in range(0, count, chunk):
            rows = slice(start, start + chunk)
            sparse = peer.sparse(asked, rows)
            dense = peer.dense(asked, rows).expand(len(sparse), -1, -1, -1)
            peer.mask_decoder(embedding, peer.prompt_encoder.get_dense_pe(), sparse, dense, asked.multimask)
        wait()

    def images(self) -> None:
        for seed in range(MANY[0]):
            self.boxes(MANY[1], MANY[1], seed)

    def automask(self, options: GridOptions) -> list[dict[str, Any]]:
        """From the embedding: its encoder is put in place of the ViT."""
        sam = build(self.card.family)
        sam.prompt_encoder, sam.mask_decoder = self.reference.prompt_encoder, self.reference.mask_decoder
        sam.image_encoder = Ready(self.reference.image(blobs(self.card.architecture.grid, 0)))
        sam.to(self.reference.device)
        generator = SamAutomaticMaskGenerator(
            sam,
            points_per_side=options.points_per_side,
            pred_iou_thresh=options.pred_iou_thresh,
            stability_score_thresh=options.stability_score_thresh,
            box_nms_thresh=options.box_nms_thresh,
            output_mode="coco_rle",
        )
        return generator.generate(np.zeros((*SIZE, 3), np.uint8))


class Ready(torch.nn.Module):
    """An encoder that has answered already."""

    def __init__(self, embedding: torch.Tensor) -> None:
        super().__init__()
        self.embedding, self.img_size = embedding, 16 * embedding.shape[-1]

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.embedding


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[..., Any], *arguments: object) -> tuple[float, Any]:
    start = time.perf_counter()
    answer = call(*arguments)
    wait()
    return time.perf_counter() - start, answer


def serve(folder: Path, device: str, calls: Connection) -> None:
    """Answers each (method, arguments) of a Peer with (seconds, answer)."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    peer = Peer(folder, device)
    while (call := calls.recv()) is not None:
        method, *arguments = call
        calls.send(timed(getattr(peer, method), *arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sam_vit_b", choices=architectures.SAMS, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="timed pairs; ratios are their medians")
    chosen = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    memory.keep()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint.extract(smooth(chosen.arch, 3), folder, source="seeded", source_sha256="0" * 64, trained=False)
        spawn = multiprocessing.get_context("spawn")
        calls, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(folder, chosen.device, theirs))
        process.start()
        try:
            figures = measure(folder, chosen.device, calls, chosen.pairs)
        finally:
            calls.send(None)
            process.join(60)
    print(json.dumps({"benchmark": "decoder", "figures": figures, "arch": chosen.arch, "device": chosen.device}))


def measure(folder: Path, device: str, calls: Connection, pairs: int) -> dict[str, float]:
    def peer(*call: object) -> tuple[float, Any]:
        calls.send(call)
        return calls.recv()

    bfloat16 = device != "cpu" or supports_bfloat16()
    ours = {
        dtype: decoder.load(folder, "auto", device, dtype) for dtype in ("float32", *(["bfloat16"] if bfloat16 else []))
    }
    best = list(ours)[-1]
    grid = next(iter(ours.values())).card.architecture.grid
    figures: dict[str, float] = {}
    print(f"ms a prompt     {'':9}" + "".join(f"{SHORT[d]:>9}" for d in ours) + f"{'batched':>10}{'single':>9}")
    for count in COUNTS:
        asked, few = request(count, grid), min(count, SINGLES)
        chunk = PEER_CHUNK_AT_1024 if count == 1024 else count
        for one in ours.values():
            one.logits(request(few, grid))  # warm
        peer("boxes", few, 1)
        rows = []
        for _ in range(pairs if count <= 256 else 1):
            taken = {dtype: timed(one.logits, asked)[0] / count for dtype, one in ours.items()}
            rows.append((taken, peer("boxes", count, chunk)[0] / count, peer("boxes", few, 1)[0] / few))
        line = [1000 * median(taken[dtype] for taken, *_ in rows) for dtype in ours]
        line += [1000 * median(row[place] for row in rows) for place in (1, 2)]
        print(f"{count:7} boxes on one image {line[0]:6.1f}" + "".join(f"{value:9.1f}" for value in line[1:]))
        for dtype in ours:
            name = "decoder" if dtype == best else f"decoder_{SHORT[dtype]}"
            figures[f"{name}_{count}_ms"] = 1000 * median(taken[dtype] for taken, *_ in rows)
            figures[f"{name}_{count}_vs_batched"] = median(batched / taken[dtype] for taken, batched, _ in rows)
            figures[f"{name}_{count}_vs_single"] = median(single / taken[dtype] for taken, _, single in rows)
    many = [request(MANY[1], grid, seed) for seed in range(MANY[0])]
    ratios = []
    for _ in range(pairs):
        taken_s = timed(ours[best].decode, many)[0]
        ratios.append(peer("images")[0] / taken_s)
        figures["decoder_8_images_ms"] = 1000 * taken_s / MANY[0] / MANY[1]
    figures["decoder_8_images_vs_batched"] = median(ratios)
    print(f"{MANY[0]} images, {MANY[1]} boxes each, {SHORT[best]}: {figures['decoder_8_images_ms']:.1f} ms a box")
    return figures | automatic(ours["float32"], peer)


def automatic(ours: Decoder, peer: Callable[..., tuple[float, Any]]) -> dict[str, float]:
    """A grid of 32 × 32 points on one embedding. Thresholds from the scores of a coarse grid: a tenth of the masks."""
    embedding = blobs(ours.card.architecture.grid, 0)
    generate = functools.partial(automask.generate, ours, original=SIZE)
    whole = crops(SIZE, GridOptions(8))[0]
    all_of_them = generate([(embedding, whole)], options=GridOptions(8, -1e9, -1.0, 1.0))
    options = GridOptions(
        32,
        pred_iou_thresh=float(np.quantile(all_of_them.predicted_iou, 0.5)),
        stability_score_thresh=float(np.quantile(all_of_them.stability, 0.5)),
        box_nms_thresh=0.95,
    )
    views = [(embedding, crops(SIZE, options)[0])]
    seconds, found = timed(functools.partial(generate, views, options=options))
    theirs_s, theirs = peer("automask", options)
    least = agreement(found, theirs)
    print(
        f"automatic masks, float32: {seconds:.1f} s, peer {theirs_s:.1f} s, {len(found)} masks, least IoU {least:.4f}"
    )
    if len(found) < 100 or least < 0.99:
        raise SystemExit(
            f"expected at least 100 masks, the same ones: {len(found)} and {len(theirs)}, least IoU {least}"
        )
    return {"automask_speedup": theirs_s / seconds, "automask_s": seconds, "automask_masks": len(found)}


def agreement(found: MaskSet, theirs: list[dict[str, Any]]) -> float:
    """The least IoU of masks matched one to one; 0 where their numbers differ."""
    if len(found) != len(theirs):
        return 0.0
    planes = found.decode()
    others = masks.decode([one["segmentation"]["counts"] for one in theirs], found.size)
    return min(masks.iou(one, other) for one, other in zip(planes, others, strict=True))


if __name__ == "__main__":
    main()
