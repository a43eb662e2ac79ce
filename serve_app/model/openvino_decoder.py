"""The fast decoder by OpenVINO, for CPUs: the same two functions, `look` and `upscale`, compiled, so that what lies
between their products is fused and, in bfloat16, half as large."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.errors import InvalidSettings
from serve_app.model import openvino as runtime
from serve_app.model.decoder import Decoded
from serve_app.model.fast_decoder import FastDecoder
from serve_app.model.prompts import DecodeRequest

CHUNK = 32  # prompts at a time, some 20 MB each


class OpenVINODecoder(FastDecoder):
    """FastDecoder in float32, or with its products in bfloat16, on as many threads as torch has when it is made.

    Raises:
        InvalidSettings: OpenVINO is not installed, the device is no CPU, or the CPU has no bfloat16 arithmetic.
    """

    joins = False  # a prompt of another image gains nothing from being in the same batch

    def __init__(self, folder: Path, device: str, dtype: str = "float32") -> None:
        if device != "cpu":
            raise InvalidSettings(f"decoder runtime 'openvino' runs on a CPU, not on {device!r}")
        core = runtime.make_core(dtype)
        import openvino

        super().__init__(folder, device)
        self.runtime, self.chunk = f"openvino {dtype} on cpu", CHUNK
        look, upscale = self._models()
        if dtype == "bfloat16":  # the image stays so between the two
            for model, port in ((look, "output"), (upscale, "input")):
                steps = openvino.preprocess.PrePostProcessor(model)
                getattr(steps, port)(0).tensor().set_element_type(openvino.Type.bf16)
                steps.build()
        self.look_request, self.upscale_request = (runtime.request(core, model, dtype) for model in (look, upscale))
        self.lock = threading.Lock()  # the requests hold one call's buffers, and from `look` to `upscale` its image

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        with self.lock:
            return super().decode(requests)

    def accepted(self, request: DecodeRequest, above: float) -> tuple[Tensor, Tensor, Tensor]:
        with self.lock:
            return super().accepted(request, above)

    def _models(self) -> tuple[Any, Any]:
        sizes = self.card.architecture
        tokens, channels, count = sizes.grid**2, sizes.channels, 2
        image, sparse = torch.zeros(count, tokens, channels), torch.zeros(count, 3, channels)
        weights, rows = torch.zeros(count, channels // 8, 3), torch.arange(count)
        look = _Call(lambda image, sparse: FastDecoder.look(self, image, sparse, None))
        upscale = _Call(lambda image, weights, rows: FastDecoder.upscale(self, image, weights, rows))
        return (
            runtime.traced(look, (image[:1], sparse), [[1, tokens, channels], [-1, -1, channels]]),
            runtime.traced(upscale, (image, weights, rows), [[-1, tokens, channels], [-1, channels // 8, -1], [-1]]),
        )

    def look(self, images: Tensor, sparse: Tensor, owner: Tensor | None) -> tuple[Any, Tensor, Tensor]:
        self.look_request.infer([images.numpy(), np.ascontiguousarray(sparse.numpy())])
        image, weights, scores = (self.look_request.get_output_tensor(index) for index in range(3))
        return image, torch.tensor(weights.data), torch.tensor(scores.data)

    def upscale(self, image: Any, weights: Tensor, prompts: Tensor | None) -> Tensor:
        rows = torch.arange(len(weights)) if prompts is None else prompts
        found = self.upscale_request.infer([image, weights.contiguous().numpy(), rows.numpy()])
        return torch.from_numpy(found[0])


class _Call(torch.nn.Module):
    """A function as a module, which is what tracing takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> Any:
        return self.function(*arguments)
