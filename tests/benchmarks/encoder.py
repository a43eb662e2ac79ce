"""The image encoder against segment_anything's as shipped, on one image with random weights, in one process.

python -m tests.benchmarks.encoder [--arch sam_vit_b] [--pairs 3] [--mild]

Ours is OpenVINO on segment_anything's own graph, so that a peer of that kind would be ours again. Every parameter of
the weights is random. Attention is then so sharp that segment_anything itself, in float32, is away from float64: that
distance is measured too, and --mild divides the weights of q, k and v by three, so that 1e-5 can be asked for.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn import functional

from serve_app.model import checkpoint, encoder
from serve_app.model.encoder import ReferenceEncoder, normalise
from serve_app.model.openvino import OpenVINOEncoder, supports_bfloat16

GMAC = {"sam_vit_b": 486, "sam_vit_l": 1493, "sam_vit_h": 2981}  # an image, as the stock graph computes it
MATMUL_SIDE = 2048
MATMUL_RUNS = 5
SEED = 7

PEAK = """
import sys
from pathlib import Path
import numpy as np
from serve_app.model import encoder
ours = encoder.load(Path(sys.argv[1]), "openvino", "cpu", sys.argv[2])
size = ours.card.architecture.image_size
ours.encode([np.zeros((size, size, 3), np.uint8)])
print(Path("/proc/self/status").read_text())
"""


def matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of torch.matmul on square matrices; the best of some runs."""
    one, other = (torch.randn(MATMUL_SIDE, MATMUL_SIDE).to(dtype) for _ in range(2))
    torch.matmul(one, other)
    return 2e-9 * MATMUL_SIDE**3 / min(seconds(lambda: torch.matmul(one, other)) for _ in range(MATMUL_RUNS))


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def worst_token(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The least cosine of a token's 256 channels with the reference's."""
    return float(functional.cosine_similarity(ours.double(), reference.double(), dim=1).min())


def peak_gb(folder: Path, dtype: str) -> float:
    """GB that a process with one encoder has held at most, its converted model at hand."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(folder), dtype], check=True, capture_output=True, text=True)
    found = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert found
    return int(found[1]) * 1024 / 1e9


def measure(arch: str, pairs: int, mild: bool, folder: Path) -> dict[str, float]:
    state = checkpoint.seeded(arch, SEED)
    if mild:
        state = {name: x / 3 if ".attn.qkv.weight" in name else x for name, x in state.items()}
    checkpoint.extract(state, folder, source="seeded", source_sha256="0" * 64, trained=False)
    del state
    size = checkpoint.ARCHITECTURES[arch].image_size
    image = np.random.default_rng(SEED).integers(0, 256, (size, size, 3), np.uint8)
    say = lambda text: print(text, file=sys.stderr)  # noqa: E731

    dtypes = ["float32", *(["bfloat16"] if supports_bfloat16() else [])]
    cold = seconds(lambda: OpenVINOEncoder(folder, "cpu"))
    say(f"converted and compiled in {cold:.0f} s")
    reference = ReferenceEncoder(folder, "cpu")
    ours = {dtype: OpenVINOEncoder(folder, "cpu", dtype) for dtype in dtypes}
    calls: dict[str, encoder.Encoder] = {"segment_anything": reference, **ours}
    answers: dict[str, torch.Tensor] = {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    rates: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
    for name in ours:
        answers[name] = ours[name].encode([image])  # the first run also allocates
    for pair in range(pairs):
        for dtype in dtypes:
            rates[dtype].append(matmul_rate(getattr(torch, dtype)))
        for name, one in calls.items():
            start = time.perf_counter()
            answers[name] = one.encode([image])
            times[name].append(time.perf_counter() - start)
        say(f"pair {pair + 1}: " + ", ".join(f"{name} {taken[-1]:.2f} s" for name, taken in times.items()))

    stock = answers["segment_anything"]
    figures = {"encoder_fp32_relative_error": relative(answers["float32"], stock)}
    if "bfloat16" in ours:
        with torch.autocast("cpu", torch.bfloat16):
            figures["torch_bf16_token_cosine_min"] = worst_token(reference.encode([image]), stock)
        figures["encoder_bf16_token_cosine_min"] = worst_token(answers["bfloat16"], stock)
    with torch.inference_mode():
        true = reference.module.double()(normalise([image], size).double())
    figures["encoder_fp32_error_to_float64"] = relative(answers["float32"], true)
    figures["torch_fp32_error_to_float64"] = relative(stock, true)
    del reference, calls
    figures["encoder_peak_gb"] = peak_gb(folder, dtypes[-1])
    figures["encoder_cold_start_s"] = cold
    figures["encoder_warm_start_s"] = seconds(lambda: OpenVINOEncoder(folder, "cpu", dtypes[-1]))

    flop = 2 * GMAC.get(arch, float("nan"))
    print(f"\n{arch}, {torch.get_num_threads()} threads, medians of {pairs}")
    print(f"{'':20} {'s/image':>9} {'GFLOP/s':>9} {'of matmul':>9}")
    for name, taken in times.items():
        dtype = name if name in rates else "float32"
        rate, roof = flop / median(taken), median(rates[dtype])
        print(f"{name:20} {median(taken):9.3f} {rate:9.0f} {rate / roof:9.2f}")
        if name in rates:
            short = {"float32": "fp32", "bfloat16": "bf16"}[name]
            ratios = [stock_s / ours_s for stock_s, ours_s in zip(times["segment_anything"], taken, strict=True)]
            figures[f"encoder_{short}_speedup"] = median(ratios)
            figures[f"encoder_{short}_s"] = median(taken)
            figures[f"matmul_{short}_gflops"] = roof
            if arch in GMAC:
                figures[f"encoder_{short}_roofline"] = rate / roof
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sam_vit_b", choices=checkpoint.ARCHITECTURES, help="(default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--mild", action="store_true", help="weights whose attention is less sharp")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cellray-bench-") as folder:
        figures = measure(arguments.arch, arguments.pairs, arguments.mild, Path(folder))
    for name, value in figures.items():
        print(f"{name:32} {value:12.4g}")
    print(json.dumps({"benchmark": "encoder", "figures": figures, "arch": arguments.arch, "mild": arguments.mild}))


if __name__ == "__main__":
    main()
