"""The image encoder by OpenVINO, for CPUs: segment_anything's own module, converted once, then compiled; and CellSAM's
detector, which is ours.

The converted model is kept beside the split weights, named by their sha256 and OpenVINO's version, so that a second
process neither reads the torch weights nor converts. One file serves both precisions; compiling takes seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.errors import InvalidSettings
from serve_app.model import cellfinder, checkpoint, modules
from serve_app.model.encoder import normalise

log = logging.getLogger(__name__)

MODEL = "model.xml"  # its numbers are in model.bin
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


class _Part:
    """A part of a split model, compiled; on as many threads as torch has when it is made.

    Raises:
        InvalidSettings: OpenVINO is not installed, the device is no CPU, or the CPU has no bfloat16 arithmetic.
    """

    name: str  # as of `ModelCard.sha256`

    def __init__(self, folder: Path, device: str, dtype: str = "float32") -> None:
        if device != "cpu":
            raise InvalidSettings(f"runtime 'openvino' runs on a CPU, not on {device!r}")
        core = make_core(dtype)
        self.card = checkpoint.ModelCard.read(folder)
        self.runtime = f"openvino {dtype} on cpu"
        self.request = request(core, _converted(core, folder, self.card, self.name), dtype)
        self.lock = threading.Lock()  # a request holds one image's buffers

    def each(self, pixels: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """The outputs for one image of a batch [B, 3, S, S] float32 after the other."""
        for one in pixels.split(1):
            with self.lock:  # outputs are the request's own memory: copied before the next run
                found = self.request.infer([one.numpy()], share_inputs=True, share_outputs=True)
                yield [torch.from_numpy(found[index].copy()) for index in range(len(found))]


class OpenVINOEncoder(_Part):
    """ImageEncoderViT in float32, or with its products in bfloat16.

    Images go through one at a time: larger batches are no faster on a CPU, and a batch of one bounds memory. An answer
    does not depend on its neighbours, not in the last bit.
    """

    name = checkpoint.ENCODER

    def encode(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """B images [h, w, 3] uint8 RGB, long side = input size S → [B, 256, S/patch, S/patch] float32."""
        card, sizes = self.card, self.card.architecture
        answers = torch.empty(len(images), sizes.channels, sizes.grid, sizes.grid)
        for image, answer in zip(images, answers, strict=True):
            pixels = normalise([image], sizes.image_size, card.pixel_mean, card.pixel_std)
            answer.copy_(self.forward(pixels)[0])
        return answers

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] float32, normalised and padded → as `encode`."""
        return torch.cat([found for (found,) in self.each(pixels)])


class OpenVINODetector(_Part):
    """As OpenVINOEncoder, for `cellfinder.CellFinder`."""

    name = checkpoint.DETECTOR

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, 3, S, S] float32 → ([B, Q, classes] logits, [B, Q, 4] boxes) float32, as `cellfinder.Detector`."""
        logits, boxes = zip(*self.each(pixels), strict=True)
        return torch.cat(logits), torch.cat(boxes)


def request(core: Any, model: Any, dtype: str) -> Any:
    """A compiled model to run, on as many threads as torch has now."""
    hints = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    return core.compile_model(model, "CPU", hints).create_infer_request()


def make_core(dtype: str) -> Any:
    """OpenVINO, for products in `dtype`.

    Raises:
        InvalidSettings: it is not installed, or the processor is many times slower in bfloat16 than in float32.
    """
    core = _core()
    if dtype == "bfloat16" and not supports_bfloat16(core):
        raise InvalidSettings("dtype 'bfloat16' needs a processor with AVX512-BF16 or AMX; use 'float32' here")
    return core


def supports_bfloat16(core: Any = None) -> bool:
    """Whether the processor multiplies in bfloat16; without that it is many times slower than float32."""
    return "BF16" in (core or _core()).get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _core() -> Any:
    silent = "openvino_telemetry" not in sys.modules
    if silent:  # the converter would send usage statistics unasked; where the package is missing it does not
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise InvalidSettings("runtime 'openvino' is not installed: pip install 'cellray[cpu]'") from error
    finally:
        if silent:
            del sys.modules["openvino_telemetry"]
    return openvino.Core()


def _converted(core: Any, folder: Path, card: checkpoint.ModelCard, part: str) -> Any:
    """The model [1, 3, S, S] float32 → what its module gives, kept in `folder` where that is writable."""
    kept = folder / f"openvino-{version('openvino')}-{card.sha256(part)[:16]}"
    if (kept / "sha256").exists():
        with contextlib.suppress(OSError, RuntimeError):
            if (kept / "sha256").read_text() == _digest(kept):
                return core.read_model(kept / MODEL)
        log.warning(f"{kept} is damaged: converting again")
        shutil.rmtree(kept, ignore_errors=True)
    model = convert(folder, card, part)
    try:
        _keep(model, kept)
    except (OSError, RuntimeError) as error:
        log.warning(f"the converted {part} is not kept, each start converts again: {error}")
        return model
    return core.read_model(kept / MODEL)  # maps the file; torch's weights are freed


def convert(folder: Path, card: checkpoint.ModelCard, part: str) -> Any:
    """The module of ENCODER or DETECTOR with the split weights → an OpenVINO model of static shape."""
    pixels = torch.zeros(1, 3, card.architecture.image_size, card.architecture.image_size)
    module = cellfinder.module(folder, card).prepare() if part == checkpoint.DETECTOR else _encoder(folder, card)
    return traced(module, (pixels,), [list(pixels.shape)])


def _encoder(folder: Path, card: checkpoint.ModelCard) -> torch.nn.Module:
    with torch.device("meta"):
        module = modules.build_encoder(card.architecture)
    state = checkpoint.load_half(folder, checkpoint.ENCODER, card)
    module.load_state_dict({k.removeprefix("image_encoder."): v for k, v in state.items()}, assign=True)
    return module.float().eval()


def traced(module: torch.nn.Module, example: tuple[torch.Tensor, ...], shapes: list[list[int]]) -> Any:
    """A torch module → an OpenVINO model of these input shapes; −1 is any size."""
    import openvino

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of tracing: what branches on a shape branches on a static one
        made = torch.jit.trace(module, example, check_trace=False)  # checking runs it four times more
        return openvino.convert_model(made, example_input=example, input=shapes)


def _keep(model: Any, kept: Path) -> None:
    """Publish whole, as a folder that is renamed; where another process was first, its copy stands."""
    import openvino

    temporary = Path(tempfile.mkdtemp(prefix=".openvino-", dir=kept.parent))
    try:
        openvino.save_model(model, temporary / MODEL, compress_to_fp16=False)
        (temporary / "sha256").write_text(_digest(temporary))
        temporary.chmod(0o755)
        with contextlib.suppress(OSError):
            os.rename(temporary, kept)
        if not (kept / "sha256").exists():
            raise OSError(f"{kept} cannot be written")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _digest(folder: Path) -> str:
    digests = []
    for name in (MODEL, MODEL.replace("xml", "bin")):
        with (folder / name).open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return "\n".join(digests)
