"""The image encoder: pixels → embeddings. One interface; `reference` is segment_anything's own module, faster runtimes
stand beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cluster.errors import CellrayError, InvalidEmbedding, InvalidImage, InvalidSettings
from serve_app.model import batched, checkpoint, modules
from serve_app.model.preprocess import PIXEL_MEAN, PIXEL_STD


class Encoder(Protocol):
    """What every runtime offers. Stateless: an answer depends on the call's images and the weights alone."""

    card: checkpoint.ModelCard
    runtime: str  # what runs, for people: "openvino float32 on cpu"

    def encode(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """B images [h, w, 3] uint8 RGB, long side = input size S → [B, 256, S/patch, S/patch] float32."""
        ...

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] float32, normalised and padded → as `encode`."""
        ...


class ReferenceEncoder:
    """segment_anything's ImageEncoderViT in float32, fed one batch at a time."""

    def __init__(self, folder: Path, device: str, dtype: str = "float32") -> None:
        if dtype != "float32":
            raise InvalidSettings(
                f"runtime 'reference' computes in float32, not in {dtype}: set dtype to 'float32', or take 'auto', "
                "which needs OpenVINO on a CPU (pip install 'cellray[cpu]')"
            )
        self.card = checkpoint.ModelCard.read(folder)
        self.runtime = f"reference float32 on {device}"
        self.device = device
        with torch.device("meta"):
            module = modules.build_encoder(self.card.architecture)
        state = checkpoint.load_half(folder, checkpoint.ENCODER, self.card)
        module.load_state_dict({k.removeprefix("image_encoder."): v for k, v in state.items()}, assign=True)
        self.module: Any = module.float().eval().to(device)
        torch.backends.cudnn.allow_tf32 = False  # float32 is meant: TF32 convolutions keep ten bits

    def encode(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        card = self.card
        size = card.architecture.image_size
        return self.forward(normalise(list(images), size, card.pixel_mean, card.pixel_std, self.device))

    @torch.inference_mode()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.module(pixels.to(self.device))


def _openvino(folder: Path, device: str, dtype: str) -> Encoder:
    from serve_app.model.openvino import OpenVINOEncoder  # it imports this module

    return OpenVINOEncoder(folder, device, dtype)


def _flash(folder: Path, device: str, dtype: str) -> Encoder:
    from serve_app.model.flash_encoder import FlashEncoder

    if dtype != "float32" and device == "cpu":
        raise InvalidSettings(f"runtime 'flash' computes in float32 on a CPU, not in {dtype}: take 'auto'")
    return FlashEncoder(folder, device, dtype)


RUNTIMES: dict[str, Callable[[Path, str, str], Encoder]] = {
    "reference": ReferenceEncoder,
    "openvino": _openvino,
    "flash": _flash,
}
DTYPES = ("float32", "bfloat16")
BFLOAT16_CAPABILITY = 8, 0  # of CUDA devices: Ampere


def load(folder: Path, runtime: str = "reference", device: str = "cpu", dtype: str = "float32") -> Encoder:
    """The encoder of a split model; the decoder's weights are never read. `dtype` is what products are computed in.

    Raises:
        InvalidSettings: no such runtime or dtype, a device that is not there, or a runtime that cannot use them.
    """
    device = check_device(device)
    check_dtype(dtype, device)
    name, _ = choose(runtime, device, dtype)
    return RUNTIMES[name](folder, device, dtype)


def choose(runtime: str, device: str, dtype: str = "float32") -> tuple[str, str]:
    """(name of a runtime, why that one) for `auto`, or as set.

    Raises:
        InvalidSettings: no such runtime.
    """
    if runtime in RUNTIMES:
        return runtime, "as set"
    if runtime != "auto":
        raise InvalidSettings(f"no runtime {runtime!r}; there are auto, {', '.join(RUNTIMES)}")
    if device != "cpu":
        if dtype == "float32":
            return "reference", "auto: float32 on a GPU"
        return "flash", f"auto: {dtype} on a GPU"
    if find_spec("openvino") is None:
        return "reference", "auto: OpenVINO is not installed"
    return "openvino", "auto: OpenVINO is the fastest on a CPU"


def check_device(device: str) -> str:
    """`auto` → `cuda` where there is a GPU, else `cpu`. Raises InvalidSettings for a device that is not there."""
    gpus = torch.cuda.device_count()
    if device == "auto":
        return "cuda" if gpus else "cpu"
    there = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if device not in there:
        raise InvalidSettings(f"no device {device!r} here; there are {', '.join(there)}")
    return device


def check_dtype(dtype: str, device: str) -> None:
    """Raises InvalidSettings for a dtype that is none of ours, or that a GPU only emulates. CPUs are for their runtime
    to judge."""
    if dtype not in DTYPES:
        raise InvalidSettings(f"no dtype {dtype!r}; there are {', '.join(DTYPES)}")
    if dtype == "bfloat16" and device != "cpu" and torch.cuda.get_device_capability(device) < BFLOAT16_CAPABILITY:
        raise InvalidSettings(f"dtype 'bfloat16' needs a GPU of the Ampere generation or newer; {device} is older")


def normalise(
    images: list[np.ndarray],
    image_size: int,
    mean: tuple[float, ...] = PIXEL_MEAN,
    std: tuple[float, ...] = PIXEL_STD,
    device: str = "cpu",
) -> torch.Tensor:
    """Images [h, w, 3] uint8, long side ≤ `image_size` → [B, 3, S, S] float32, normalised, then padded with zeros
    on the right and at the bottom."""
    batch = torch.zeros(len(images), 3, image_size, image_size, device=device)
    centre = torch.tensor(mean, device=device).view(3, 1, 1)
    spread = torch.tensor(std, device=device).view(3, 1, 1)
    for padded, pixels in zip(batch, images, strict=True):
        image = torch.tensor(pixels, device=device).permute(2, 0, 1)
        padded[:, : image.shape[1], : image.shape[2]] = (image - centre) / spread
    return batch


def embed(
    encoder: Encoder, images: Sequence[np.ndarray], max_batch: int = 8, dtype: str = "float16"
) -> list[np.ndarray | CellrayError]:
    """Images → embeddings [256, S/patch, S/patch] of `dtype`, float16 or float32, in order; a bad image is an error
    beside its neighbours.

    Errors:
        InvalidImage: not [h, w, 3] uint8 with long side S.
        InvalidEmbedding: the encoder answered with numbers that `dtype` cannot hold.
    """
    size = encoder.card.architecture.image_size
    return batched.answers(
        images, lambda image: _problem(image, size), lambda some: held(encoder.encode(some), dtype), max_batch
    )


def held(embeddings: torch.Tensor, dtype: str) -> list[np.ndarray | CellrayError]:
    """[B, C, g, g] → [C, g, g] of `dtype` each, or InvalidEmbedding where it cannot hold the numbers."""
    embeddings = embeddings.to(getattr(torch, dtype))
    finite = torch.isfinite(embeddings).flatten(1).all(1).tolist()
    return [
        array.copy() if ok else InvalidEmbedding(f"the encoder's output is not finite in {dtype}")
        for array, ok in zip(embeddings.cpu().numpy(), finite, strict=True)
    ]


def _problem(image: np.ndarray, size: int) -> InvalidImage | None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        return InvalidImage(f"expected [h, w, 3] uint8 pixels, found {list(image.shape)} {image.dtype}")
    if max(image.shape[:2]) != size or 0 in image.shape:
        return InvalidImage(f"expected a long side of {size} pixels, found {image.shape[0]} × {image.shape[1]}")
    return None
