"""The image encoder against segment_anything's as shipped and against what else runs its ViT, with random weights.

python -m tests.benchmarks.encoder [--arch sam_vit_b] [--device cpu] [--batch 1] [--pairs 3] [--int8]

CPU: transformers (SDPA), onnxruntime and OpenVINO on the stock graph, in float32 and, where it is fast, bfloat16.
Ours is OpenVINO on that graph too, so the best peer is expected to be as fast. --int8 adds NNCF's quantisation of it
(pip install nncf), calibrated on scikit-image's pictures, with its distance from float32.
GPU: segment_anything in bfloat16, as it is and compiled, and transformers.
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
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from serve_app.model import architectures, checkpoint, encoder, modules
from serve_app.model.encoder import ReferenceEncoder, normalise

GMAC = {"sam_vit_b": 486, "sam_vit_l": 1493, "sam_vit_h": 2981}  # an image, as the stock graph computes it
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
MATMUL_RUNS = 5
CLOSE_ROUNDS = 8
SEED = 7
SHORT = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}
STOCK, OURS = "segment_anything", "ours"

Image = np.ndarray
Encode = Callable[[list[Image]], torch.Tensor]
Contenders = dict[tuple[str, str], Encode]  # by name and dtype

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


def matmul_rate(dtype: str, device: str) -> float:
    """GFLOP/s of torch.matmul on square matrices; the best of some runs."""
    side = MATMUL_SIDE[device]
    one, other = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    torch.matmul(one, other)
    return 2e-9 * side**3 / min(seconds(lambda: torch.matmul(one, other)) for _ in range(MATMUL_RUNS))


def seconds(call: Callable[[], object]) -> float:
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def cosines(ours: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Of each token's 256 channels with the reference's."""
    return functional.cosine_similarity(ours.double(), reference.double(), dim=1)


def peak_gb(folder: Path, dtype: str) -> float:
    """GB that a process with one encoder has held at most, its converted model at hand."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(folder), dtype], check=True, capture_output=True, text=True)
    found = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert found
    return int(found[1]) * 1024 / 1e9


def prepared(encode: Callable[[torch.Tensor], torch.Tensor], card: checkpoint.ModelCard, device: str) -> Encode:
    """A runtime that wants normalised pixels [B, 3, S, S], as one that takes images."""

    @torch.inference_mode()
    def run(images: list[Image]) -> torch.Tensor:
        batch = normalise(images, card.architecture.image_size, card.pixel_mean, card.pixel_std, device)
        return encode(batch).float()

    return run


def transformers_encoder(sizes: architectures.Architecture, device: str, dtype: str) -> Callable[..., torch.Tensor]:
    """Hugging Face's vision encoder of these sizes, with weights of its own: only its time is of interest."""
    from transformers import SamVisionConfig, SamVisionModel

    config = SamVisionConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch,
        mlp_dim=sizes.mlp_width,
        window_size=sizes.window,
        global_attn_indexes=list(sizes.global_blocks),
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    model = SamVisionModel(config).eval().to(device=device, dtype=getattr(torch, dtype))
    return lambda batch: model(batch.to(model.dtype)).last_hidden_state


def onnxruntime_encoder(module: torch.nn.Module, size: int, folder: Path) -> Callable[..., torch.Tensor]:
    import onnxruntime

    path, example = folder / "stock.onnx", torch.zeros(1, 3, size, size)
    torch.onnx.export(module, (example,), path, input_names=["pixels"], dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"pixels": batch.numpy()})[0])


def openvino_encoder(model: Any, dtype: str) -> Callable[..., torch.Tensor]:
    """A converted model as OpenVINO's own tutorials run it."""
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype]}
    compiled = openvino.Core().compile_model(model, "CPU", hints)
    return lambda batch: torch.from_numpy(compiled(batch.numpy())[0])


def quantised(model: Any, card: checkpoint.ModelCard) -> Any:
    """NNCF's post-training quantisation for transformers, to int8 weights and activations."""
    import nncf
    from PIL import Image as Pillow
    from skimage import data

    size, pictures = card.architecture.image_size, ("astronaut", "coffee", "rocket", "chelsea", "cat", "coins", "cell")
    images = [
        np.array(Pillow.fromarray(getattr(data, name)()).convert("RGB").resize((size, size))) for name in pictures
    ]
    batches = [normalise([image], size, card.pixel_mean, card.pixel_std).numpy() for image in images]
    return nncf.quantize(
        model,
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(batches),
    )


def on_cpu(folder: Path, int8: bool) -> Contenders:
    from serve_app.model.openvino import OpenVINOEncoder, convert, supports_bfloat16

    reference = ReferenceEncoder(folder, "cpu")
    card, size = reference.card, reference.card.architecture.image_size
    stock = convert(folder, card, checkpoint.ENCODER)
    found: Contenders = {(STOCK, "float32"): reference.encode}
    for dtype in ("float32", *(["bfloat16"] if supports_bfloat16() else [])):
        found[OURS, dtype] = OpenVINOEncoder(folder, "cpu", dtype).encode
        found["OpenVINO", dtype] = prepared(openvino_encoder(stock, dtype), card, "cpu")
        found["transformers", dtype] = prepared(transformers_encoder(card.architecture, "cpu", dtype), card, "cpu")
    found["onnxruntime", "float32"] = prepared(onnxruntime_encoder(reference.module, size, folder), card, "cpu")
    if int8:
        found[OURS, "int8"] = prepared(openvino_encoder(quantised(stock, card), "bfloat16"), card, "cpu")
    return found


def on_gpu(folder: Path, device: str) -> Contenders:
    """All in bfloat16."""
    reference = ReferenceEncoder(folder, device)
    card = reference.card

    def autocast(module: Callable[[torch.Tensor], torch.Tensor]) -> Encode:
        def run(batch: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device, torch.bfloat16):
                return module(batch)

        return prepared(run, card, device)

    found: Contenders = {
        (STOCK, "float32"): reference.encode,
        (STOCK, "bfloat16"): autocast(reference.module),
        ("compiled", "bfloat16"): autocast(torch.compile(reference.module, dynamic=False)),
        (OURS, "bfloat16"): encoder.load(folder, "flash", device, "bfloat16").encode,
    }
    try:
        found["transformers", "bfloat16"] = prepared(
            transformers_encoder(card.architecture, device, "bfloat16"), card, device
        )
    except ImportError:
        print("transformers is not installed: left out", file=sys.stderr)
    return found


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    arch, device = arguments.arch, arguments.device
    state = modules.seeded(arch, SEED)
    checkpoint.extract(state, folder, source="seeded", source_sha256="0" * 64, trained=False)
    del state
    size = architectures.SAMS[arch].image_size
    noise = np.random.default_rng(SEED).integers(0, 256, (arguments.batch, size // 16, size // 16, 3), np.uint8)
    images = list(noise.repeat(16, 1).repeat(16, 2))

    figures: dict[str, float] = {}
    if device == "cpu":
        figures["encoder_cold_start_s"] = seconds(lambda: encoder.load(folder, "openvino"))
        figures["encoder_warm_start_s"] = seconds(lambda: encoder.load(folder, "openvino"))
    contenders = on_cpu(folder, arguments.int8) if device == "cpu" else on_gpu(folder, device)
    roofs = {dtype: [] for _, dtype in contenders if dtype != "int8"}  # type: dict[str, list[float]]
    answers = {key: encode(images) for key, encode in contenders.items()}  # the first run also compiles and allocates
    times: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
    for pair in range(arguments.pairs):
        for dtype, rates in roofs.items():
            rates.append(matmul_rate(dtype, device))
        for key in list(contenders)[:: (-1) ** pair]:  # there and back: none always follows the same one
            times[key].append(seconds(lambda: contenders[key](images)) / len(images))  # noqa: B023
        said = ", ".join(f"{name} {SHORT[dtype]} {taken[-1]:.3g} s" for (name, dtype), taken in times.items())
        print(f"pair {pair + 1}: {said}", file=sys.stderr)

    print(f"\n{arch} on {device}, {torch.get_num_threads()} threads, batches of {len(images)}, medians of {pair + 1}")
    print(f"{'':24} {'s/image':>9} {'img/s':>9} {'GFLOP/s':>9} {'of matmul':>9}")
    flop = 2 * GMAC.get(arch, float("nan"))
    for (name, dtype), taken in times.items():
        roof = median(roofs.get(dtype, roofs["bfloat16"] if "bfloat16" in roofs else roofs["float32"]))
        rate, each = flop / median(taken), median(taken)
        print(f"{name:17} {SHORT[dtype]:6} {each:9.3f} {1 / each:9.2f} {rate:9.0f} {rate / roof:9.2f}")
        if name != OURS:
            continue
        short = SHORT[dtype]
        figures[f"encoder_{short}_s"] = each
        figures[f"encoder_{short}_speedup"] = median(map(np.divide, times[STOCK, "float32"], taken))
    for dtype in roofs:
        if (OURS, dtype) in times:
            figures |= closely(contenders, times, dtype, images, device, flop)
    best = "bfloat16" if (OURS, "bfloat16") in times else "float32"
    figures["encoder_vs_best_peer"] = figures[f"encoder_{SHORT[best]}_vs_best_peer"]
    if (OURS, "int8") in times:
        figures["encoder_int8_speedup"] = median(map(np.divide, times[OURS, best], times[OURS, "int8"]))
    true = answers[STOCK, "float32"]
    if (OURS, "float32") in answers:
        figures["encoder_fp32_relative_error"] = relative(answers[OURS, "float32"], true)
    with torch.autocast(device, torch.bfloat16):
        answers["torch_autocast", "bfloat16"] = contenders[STOCK, "float32"](images)
    for (name, dtype), answer in answers.items():
        if name in (OURS, "torch_autocast") and dtype != "float32":
            prefix = f"encoder_{SHORT[dtype]}" if name == OURS else name
            found = cosines(answer, true)
            figures |= {f"{prefix}_cosine": float(found.mean()), f"{prefix}_cosine_min": float(found.min())}
    if device == "cpu":
        figures["encoder_peak_gb"] = peak_gb(folder, best)
    return figures


def closely(
    contenders: Contenders,
    times: dict[tuple[str, str], list[float]],
    dtype: str,
    images: list[Image],
    device: str,
    flop: float,
) -> dict[str, float]:
    """Ours beside the best peer of that dtype and torch's matmul, in short rounds: their times lie near each other."""
    best = min((key for key in times if key[0] != OURS and key[1] == dtype), key=lambda key: median(times[key]))
    ratios, shares, rates, short = [], [], [], SHORT[dtype]
    for turn in range(CLOSE_ROUNDS):
        pair = [(OURS, dtype), best][:: (-1) ** turn]
        taken = {key: seconds(lambda: contenders[key](images)) / len(images) for key in pair}  # noqa: B023
        rates.append(matmul_rate(dtype, device))
        ratios.append(taken[best] / taken[OURS, dtype])
        shares.append(flop / taken[OURS, dtype] / rates[-1])
    figures = {f"encoder_{short}_vs_best_peer": median(ratios), f"matmul_{short}_gflops": median(rates)}
    print(f"best peer in {short}: {best[0]}")
    return figures if np.isnan(flop) else figures | {f"encoder_{short}_roofline": median(shares)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sam_vit_b", choices=architectures.SAMS, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images a call (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument("--int8", action="store_true", help="also quantised by NNCF, on a CPU")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cellray-bench-") as folder:
        figures = measure(arguments, Path(folder))
    for name, value in figures.items():
        print(f"{name:32} {value:12.4g}")
    where = {"arch": arguments.arch, "device": arguments.device, "batch": arguments.batch}
    print(json.dumps({"benchmark": "encoder", "figures": figures, **where}))


if __name__ == "__main__":
    main()
