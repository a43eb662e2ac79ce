"""The mask decoder: embeddings and prompts → masks. Stateless; `reference` is segment_anything's own modules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from cluster.errors import CellrayError, Internal, InvalidEmbedding, InvalidInput, InvalidPrompt, InvalidSettings
from serve_app.model import architectures, checkpoint, masks, modules, preprocess
from serve_app.model.masks import MaskSet
from serve_app.model.preprocess import Size
from serve_app.model.prompts import DecodeRequest

log = logging.getLogger(__name__)

PIXELS_A_CHUNK = 64 << 20  # float32 logits held at original resolution: 256 MB
MASK_THRESHOLD = 0.0  # logits
STABILITY_OFFSET = 1.0  # logits; as SamAutomaticMaskGenerator


Decoded = tuple[torch.Tensor, torch.Tensor]
"""N prompts' ([N, M, 4g, 4g] float32 logits of the padded input, [N, M] float32 predicted IoU); M is 1 or 3."""


class Decoder(Protocol):
    """What every runtime offers. Stateless."""

    card: checkpoint.ModelCard
    runtime: str  # what runs, for people: "fast float32 on cpu"
    chunk: int  # prompts that it likes to have at a time

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        """One answer a request, in order."""
        ...

    def logits(self, request: DecodeRequest) -> Decoded:
        """The answer to one request."""
        ...

    def accepted(self, request: DecodeRequest, above: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Only the K masks whose predicted IoU is above `above`: ([K, 4g, 4g] logits, [K] predicted IoU, [K] int64,
        where each stands among the N · M). Others are not made where the runtime can leave them out."""
        ...


class ReferenceDecoder:
    """segment_anything's PromptEncoder and MaskDecoder in float32."""

    chunk = 16  # about 20 MB a prompt; more is slower on CPUs

    def __init__(self, folder: Path, device: str) -> None:
        self.card = checkpoint.ModelCard.read(folder)
        self.runtime = f"reference float32 on {device}"
        self.device = device
        with torch.device("meta"):
            halves = modules.build_decoder(self.card.architecture)
        state = checkpoint.load_half(folder, checkpoint.DECODER, self.card)
        for prefix, module in zip(architectures.DECODERS, halves, strict=True):
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            module.load_state_dict(own, assign=True)
        self.prompt_encoder: Any
        self.mask_decoder: Any
        self.prompt_encoder, self.mask_decoder = (
            module.float().eval().requires_grad_(False).to(device) for module in halves
        )
        self.dense_pe: torch.Tensor = self.prompt_encoder.get_dense_pe()

    @torch.inference_mode()
    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        return [self._decode(request) for request in requests]

    def _decode(self, request: DecodeRequest) -> Decoded:
        embedding, parts = self.image(request.embedding), [self.nothing(request)]
        for rows in chunks(len(request.prompts), self.chunk):
            sparse, dense = self.sparse(request, rows), self.dense(request, rows)
            found = self.mask_decoder(
                image_embeddings=embedding,
                image_pe=self.dense_pe,
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense.expand(len(sparse), *embedding.shape[1:]),
                multimask_output=request.multimask,
            )
            parts.append(found)
        logits, scores = (torch.cat(column) for column in zip(*parts, strict=True))
        return logits, scores

    def logits(self, request: DecodeRequest) -> Decoded:
        return self.decode([request])[0]

    def accepted(self, request: DecodeRequest, above: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, scores = self.logits(request)
        kept = torch.nonzero(scores.flatten() > above)[:, 0]
        return logits.flatten(0, 1)[kept], scores.flatten()[kept], kept

    def nothing(self, request: DecodeRequest) -> Decoded:
        """The answer to no prompts, to which those to some are joined."""
        sizes = self.card.architecture
        outputs, side = sizes.mask_outputs if request.multimask else 1, 4 * sizes.grid
        return torch.zeros(0, outputs, side, side, device=self.device), torch.zeros(0, outputs, device=self.device)

    def wanted(self, multimask: bool) -> slice:
        """Which of the outputs: the first is meant for clear prompts, the others are whole, part and subpart."""
        return slice(1, None) if multimask else slice(0, 1)

    def image(self, embedding: np.ndarray) -> torch.Tensor:
        """[C, g, g] → [1, C, g, g] float32 on the device."""
        return _tensor(embedding, self.device)[None]

    def dense(self, request: DecodeRequest, rows: slice) -> torch.Tensor:
        """The mask prompts, or their absence → [N or 1, C, g, g] float32, by segment_anything's prompt encoder."""
        if request.prompts.masks is None:
            return self.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand(-1, -1, *self.dense_pe.shape[2:])
        given = torch.tensor(request.prompts.masks[rows], dtype=torch.float32, device=self.device)
        return self.prompt_encoder(points=None, boxes=None, masks=given[:, None])[1]

    def sparse(self, request: DecodeRequest, rows: slice) -> torch.Tensor:
        """Some of a request's boxes and points → [N, tokens, C] float32, by segment_anything's prompt encoder."""
        prompts = request.prompts.take(rows)

        def scaled(coordinates: np.ndarray) -> torch.Tensor:
            size = self.card.architecture.image_size
            inside = preprocess.to_input_coordinates(coordinates, request.original, size)
            return torch.from_numpy(inside).to(self.device)

        boxes = None if prompts.boxes is None else scaled(prompts.boxes.reshape(-1, 2, 2)).reshape(-1, 4)
        points = None
        if prompts.points is not None and prompts.labels is not None:
            points = scaled(prompts.points), torch.tensor(prompts.labels, device=self.device)
        if boxes is None and points is None:
            return torch.zeros(len(prompts), 0, self.card.architecture.channels, device=self.device)
        return self.prompt_encoder(points=points, boxes=boxes, masks=None)[0]


def chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def pack(counts: Sequence[int], sizes: Sequence[int], limit: int) -> Iterator[list[tuple[int, slice]]]:
    """Lists of `counts` rows, each cut to its size, then joined in order while they hold `limit` rows or fewer."""
    batch: list[tuple[int, slice]] = []
    held = 0
    for which, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        for rows in chunks(count, size):
            if batch and held + rows.stop - rows.start > limit:
                yield batch
                batch, held = [], 0
            batch.append((which, rows))
            held += rows.stop - rows.start
    if batch:
        yield batch


def _openvino(folder: Path, device: str, dtype: str) -> Decoder:
    from serve_app.model.openvino_decoder import OpenVINODecoder

    return OpenVINODecoder(folder, device, dtype)


def _fast(folder: Path, device: str, dtype: str) -> Decoder:
    from serve_app.model.fast_decoder import FastDecoder

    if dtype != "float32" and device == "cpu":
        raise InvalidSettings(
            f"decoder runtime 'fast' computes in float32 on a CPU, not {dtype}: install 'cellray[cpu]'"
        )
    return FastDecoder(folder, device, dtype)


def _reference(folder: Path, device: str, dtype: str) -> Decoder:
    if dtype != "float32":
        raise InvalidSettings(f"decoder runtime 'reference' computes in float32, not {dtype}")
    return ReferenceDecoder(folder, device)


RUNTIMES: dict[str, Callable[[Path, str, str], Decoder]] = {
    "reference": _reference,
    "fast": _fast,
    "openvino": _openvino,
}


def load(folder: Path, runtime: str = "reference", device: str = "cpu", dtype: str = "float32") -> Decoder:
    """The decoder of a split model; the encoder's weights are never read. `dtype` is what products are computed in.

    runtime: `reference`; `fast`, the same numbers, reordered; `openvino`, the same on a CPU by OpenVINO; or `auto`, the
    fastest of them that is at hand.

    Raises:
        InvalidSettings: no such runtime or dtype, a device that is not there, or a runtime that cannot use them.
        InvalidCheckpoint: the folder holds no split model, or another one than its card says.
    """
    from serve_app.model.encoder import check_device, check_dtype

    device = check_device(device)
    check_dtype(dtype, device)
    if runtime == "auto":
        two = checkpoint.ModelCard.read(folder).architecture.decoder_depth == 2  # as every published model has
        runtime = "reference" if not two else "openvino" if device == "cpu" and find_spec("openvino") else "fast"
    if runtime not in RUNTIMES:
        raise InvalidSettings(f"no decoder runtime {runtime!r}; there are auto, {', '.join(RUNTIMES)}")
    return RUNTIMES[runtime](folder, device, dtype)


def segment(decoder: Decoder, requests: Sequence[DecodeRequest]) -> list[MaskSet | CellrayError]:
    """Requests → masks at original resolution, in order; a bad request is an error beside its neighbours.

    Masks come prompt by prompt, and within a prompt in the decoder's order. No prompts give an empty set.

    Errors:
        InvalidPrompt, InvalidEmbedding
    """
    errors = [_problem(decoder, request) for request in requests]
    parts: list[list[MaskSet]] = [[] for _ in requests]
    counts = [0 if error else len(request.prompts) for request, error in zip(requests, errors, strict=True)]
    outputs = decoder.card.architecture.mask_outputs
    sizes = [
        1 if error else step(decoder, request.original, outputs if request.multimask else 1)
        for request, error in zip(requests, errors, strict=True)
    ]
    for batch in pack(counts, sizes, decoder.chunk):
        asked = [replace(requests[which], prompts=requests[which].prompts.take(rows)) for which, rows in batch]
        for (which, rows), request, answer in zip(batch, asked, _decode(decoder, asked), strict=True):
            if isinstance(answer, CellrayError):
                errors[which] = answer
                continue
            logits, scores = answer
            index = np.repeat(np.arange(rows.start, rows.stop, dtype=np.int32), scores.shape[1])
            parts[which].append(to_masks(decoder, request, logits.flatten(0, 1), scores.flatten(), index))
    channels = decoder.card.architecture.channels
    return [
        error or MaskSet.join(found[0].size if found else request.original, found, channels)
        for request, found, error in zip(requests, parts, errors, strict=True)
    ]


def _decode(decoder: Decoder, requests: list[DecodeRequest]) -> Sequence[Decoded | CellrayError]:
    """All at once, and one by one if that fails, so that good neighbours are answered."""
    try:
        return decoder.decode(requests)
    except RuntimeError:  # out of memory, mostly
        log.exception(f"the decoder failed on {len(requests)} requests")
    if len(requests) > 1:
        return [answer for request in requests for answer in _decode(decoder, [request])]
    return [Internal("the decoder failed on this request; the replica's log has the cause")]


def _problem(decoder: Decoder, request: DecodeRequest) -> CellrayError | None:
    try:
        check(decoder, request)
    except CellrayError as error:
        return error
    return None


def check(decoder: Decoder, request: DecodeRequest) -> None:
    sizes = decoder.card.architecture
    expected, embedding = (sizes.channels, sizes.grid, sizes.grid), request.embedding
    if embedding.shape != expected:
        raise InvalidEmbedding(
            f"expected an embedding of shape {list(expected)}, found {list(embedding.shape)}: "
            "was it made by another model?"
        )
    if embedding.dtype not in (np.float16, np.float32) or not embedding.dtype.isnative:
        raise InvalidEmbedding(f"expected a float16 or float32 embedding, found {embedding.dtype}")
    if not np.isfinite(embedding).all():
        raise InvalidEmbedding("the embedding has values that are not finite")
    if not all(isinstance(side, int) and side > 0 for side in request.original):
        raise InvalidInput(f"expected an image size (height, width) in pixels, found {request.original}")
    request.prompts.check(request.original)
    if request.prompts.masks is not None and request.prompts.masks.shape[1:] != (4 * sizes.grid, 4 * sizes.grid):
        side = 4 * sizes.grid
        raise InvalidPrompt(f"masks must be [N, {side}, {side}] logits, found {list(request.prompts.masks.shape)}")


def step(decoder: Decoder, original: Size, outputs: int) -> int:
    """Prompts decoded at a time, so that their masks at both resolutions on the way stay within PIXELS_A_CHUNK."""
    pixels = max(original[0] * original[1], decoder.card.architecture.image_size**2)
    return max(1, min(decoder.chunk, PIXELS_A_CHUNK // (outputs * pixels)))


@torch.inference_mode()
def to_masks(
    decoder: Decoder, request: DecodeRequest, logits: torch.Tensor, scores: torch.Tensor, prompt_index: np.ndarray
) -> MaskSet:
    """[N, 4g, 4g] logits and [N] predicted IoU → masks at original resolution, as segment_anything's
    `postprocess_masks` makes them; or at that of the logits, without their padding."""
    sizes = decoder.card.architecture
    if request.low_resolution:
        full = unpadded(logits, request.original, sizes.image_size)
    else:
        full = upscale(logits, request.original, sizes.image_size)
    height, width = full.shape[1:]
    counts = masks.encode((full > MASK_THRESHOLD).cpu().numpy())
    areas, boxes = masks.areas_and_boxes(counts, (height, width))
    return MaskSet(
        size=(height, width),
        counts=counts,
        boxes=boxes,
        areas=areas,
        predicted_iou=scores.float().cpu().numpy(),
        stability=stability(full).cpu().numpy(),
        prompt_index=prompt_index,
        object_embeddings=_object_embeddings(request, logits, sizes),
        logits=logits.half().cpu().numpy() if request.logits else None,
    )


def stability(logits: torch.Tensor, offset: float = STABILITY_OFFSET) -> torch.Tensor:
    """[N, h, w] logits → [N]: the IoU of the masks cut at +offset and −offset (as segment_anything's
    `calculate_stability_score`); 0 where both are empty."""
    inside, around = (_areas(logits > threshold) for threshold in (offset, -offset))
    return inside / around.clamp(min=1)


def _areas(planes: torch.Tensor) -> torch.Tensor:
    """[N, h, w] bool → [N] int64."""
    if planes.device.type == "cpu":  # thirty times as fast as torch's sum of booleans
        return torch.tensor([np.count_nonzero(plane) for plane in planes.numpy()], dtype=torch.int64)
    return planes.flatten(1).sum(1)


def upscale(logits: torch.Tensor, original: Size, image_size: int) -> torch.Tensor:
    """[N, 4g, 4g] logits of the padded input → [N, height, width] at original resolution."""
    height, width = preprocess.input_size(original, image_size)
    padded = functional.interpolate(logits[None], (image_size, image_size), mode="bilinear", align_corners=False)
    inner = padded[..., :height, :width]
    if original == (height, width):
        return inner[0]
    return functional.interpolate(inner, original, mode="bilinear", align_corners=False)[0]


def unpadded(logits: torch.Tensor, original: Size, image_size: int) -> torch.Tensor:
    """[N, 4g, 4g] logits of the padded input → [N, h, w] of those that hold image."""
    pixels = image_size // logits.shape[-1]
    height, width = (-(-side // pixels) for side in preprocess.input_size(original, image_size))
    return logits[..., :height, :width]


def _tensor(embedding: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(embedding), dtype=torch.float32, device=device)


def _object_embeddings(request: DecodeRequest, logits: torch.Tensor, sizes: architectures.Architecture) -> np.ndarray:
    """[N, C] float32: the embedding's tokens weighed by the share of each that the mask covers, without padding."""
    embedding = _tensor(request.embedding, logits.device)
    covered = torch.zeros_like(logits, dtype=torch.float32)
    held = unpadded(logits, request.original, sizes.image_size)
    covered[:, : held.shape[1], : held.shape[2]] = held > MASK_THRESHOLD
    share = functional.avg_pool2d(covered[:, None], logits.shape[-1] // sizes.grid)[:, 0].flatten(1)
    sums = share @ embedding.flatten(1).T
    return (sums / share.sum(1, keepdim=True).clamp(min=1e-6)).cpu().numpy()
