"""The mask decoder: embeddings and prompts → masks. Stateless; `reference` is segment_anything's own modules."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from cluster.errors import CellrayError, Internal, InvalidEmbedding, InvalidInput, InvalidSettings
from serve_app.model import checkpoint, masks, preprocess
from serve_app.model.masks import MaskSet
from serve_app.model.preprocess import Size
from serve_app.model.prompts import DecodeRequest

log = logging.getLogger(__name__)

PROMPTS_A_CHUNK = 16  # bounds memory, about 20 MB a prompt inside segment_anything's decoder; more is slower on CPUs
PIXELS_A_CHUNK = 64 << 20  # float32 logits held at original resolution: 256 MB
MASK_THRESHOLD = 0.0  # logits
STABILITY_OFFSET = 1.0  # logits; as SamAutomaticMaskGenerator


class Decoder(Protocol):
    """What every runtime offers. Stateless."""

    card: checkpoint.ModelCard
    runtime: str

    def logits(self, request: DecodeRequest) -> tuple[torch.Tensor, torch.Tensor]:
        """N prompts → ([N, M, 4g, 4g] float32 logits of the padded input, [N, M] predicted IoU); M is 1 or 3."""
        ...

    def accepted(self, request: DecodeRequest, above: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `logits`, but only the K masks whose predicted IoU is above `above`: ([K, 4g, 4g], [K], [K] int64, where
        each stands among the N · M)."""
        ...


class ReferenceDecoder:
    """segment_anything's PromptEncoder and MaskDecoder in float32."""

    runtime = "reference float32"

    def __init__(self, folder: Path, device: str) -> None:
        self.card = checkpoint.ModelCard.read(folder)
        self.device = device
        with torch.device("meta"):
            modules = checkpoint.build_decoder(self.card.architecture)
        state = checkpoint.load_half(folder, checkpoint.DECODER, self.card)
        for prefix, module in zip(("prompt_encoder.", "mask_decoder."), modules, strict=True):
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            module.load_state_dict(own, assign=True)
        self.prompt_encoder: Any
        self.mask_decoder: Any
        self.prompt_encoder, self.mask_decoder = (module.float().eval().to(device) for module in modules)
        self.dense_pe: torch.Tensor = self.prompt_encoder.get_dense_pe()

    @torch.inference_mode()
    def logits(self, request: DecodeRequest) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = self.image(request.embedding)
        parts = []
        for rows in chunks(len(request.prompts), PROMPTS_A_CHUNK):
            sparse = self.sparse(request, rows)
            dense = self.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand(len(sparse), *embedding.shape[1:])
            logits, scores = self.mask_decoder(
                image_embeddings=embedding,
                image_pe=self.dense_pe,
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=request.multimask,
            )
            parts.append((logits, scores))
        return torch.cat([logits for logits, _ in parts]), torch.cat([scores for _, scores in parts])

    def accepted(self, request: DecodeRequest, above: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, scores = self.logits(request)
        kept = torch.nonzero(scores.flatten() > above)[:, 0]
        return logits.flatten(0, 1)[kept], scores.flatten()[kept], kept

    def image(self, embedding: np.ndarray) -> torch.Tensor:
        """[C, g, g] → [1, C, g, g] float32 on the device."""
        return _tensor(embedding, self.device)[None]

    def sparse(self, request: DecodeRequest, rows: slice) -> torch.Tensor:
        """Some of a request's prompts → [N, tokens, C] float32, by segment_anything's prompt encoder."""
        prompts = request.prompts.take(rows)

        def scaled(coordinates: np.ndarray) -> torch.Tensor:
            size = self.card.architecture.image_size
            inside = preprocess.to_input_coordinates(coordinates, request.original, size)
            return torch.from_numpy(inside).to(self.device)

        boxes = None if prompts.boxes is None else scaled(prompts.boxes.reshape(-1, 2, 2)).reshape(-1, 4)
        points = None
        if prompts.points is not None and prompts.labels is not None:
            points = scaled(prompts.points), torch.tensor(prompts.labels, device=self.device)
        return self.prompt_encoder(points=points, boxes=boxes, masks=None)[0]


def chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def load(folder: Path, runtime: str = "reference", device: str = "cpu") -> Decoder:
    """The decoder of a split model; the encoder's weights are never read.

    runtime: `reference`, `fast` (the same numbers, reordered), or `auto`: fast where the decoder has the two layers of
    every published model.

    Raises:
        InvalidSettings: no such runtime, or a device that is not there.
        InvalidCheckpoint: the folder holds no split model, or another one than its card says.
    """
    from serve_app.model.encoder import check_device
    from serve_app.model.fast_decoder import FastDecoder

    runtimes: dict[str, type[ReferenceDecoder]] = {"reference": ReferenceDecoder, "fast": FastDecoder}
    if runtime == "auto":
        runtime = "fast" if checkpoint.ModelCard.read(folder).architecture.decoder_depth == 2 else "reference"
    if runtime not in runtimes:
        raise InvalidSettings(f"no decoder runtime {runtime!r}; there are {', '.join(runtimes)}")
    return runtimes[runtime](folder, check_device(device))


def segment(decoder: Decoder, requests: list[DecodeRequest]) -> list[MaskSet | CellrayError]:
    """Requests → masks at original resolution, in order; a bad request is an error beside its neighbours.

    Masks come prompt by prompt, and within a prompt in the decoder's order. No prompts give an empty set.

    Errors:
        InvalidPrompt, InvalidEmbedding
    """
    results: list[MaskSet | CellrayError] = []
    for request in requests:
        try:
            check(decoder, request)
            results.append(_segment_one(decoder, request))
        except CellrayError as error:
            results.append(error)
        except RuntimeError:
            log.exception("the decoder failed")
            results.append(Internal("the decoder failed on this request; the replica's log has the cause"))
    return results


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


def step(decoder: Decoder, original: Size, outputs: int) -> int:
    """Prompts decoded at a time, so that their masks at both resolutions on the way stay within PIXELS_A_CHUNK."""
    pixels = max(original[0] * original[1], decoder.card.architecture.image_size**2)
    return max(1, min(PROMPTS_A_CHUNK, PIXELS_A_CHUNK // (outputs * pixels)))


def _segment_one(decoder: Decoder, request: DecodeRequest) -> MaskSet:
    channels = decoder.card.architecture.channels
    parts = []
    outputs = decoder.card.architecture.mask_outputs if request.multimask else 1
    size = step(decoder, request.original, outputs)
    for start in range(0, len(request.prompts), size):
        prompts = request.prompts.take(slice(start, start + size))
        logits, scores = decoder.logits(DecodeRequest(request.embedding, request.original, prompts, request.multimask))
        index = np.repeat(np.arange(start, start + len(prompts), dtype=np.int32), outputs)
        parts.append(to_masks(decoder, request, logits.flatten(0, 1), scores.flatten(), index))
    return MaskSet.join(request.original, parts, channels)


@torch.inference_mode()
def to_masks(
    decoder: Decoder, request: DecodeRequest, logits: torch.Tensor, scores: torch.Tensor, prompt_index: np.ndarray
) -> MaskSet:
    """[N, 4g, 4g] logits and [N] predicted IoU → masks at original resolution, as segment_anything's
    `postprocess_masks` makes them."""
    sizes = decoder.card.architecture
    full = upscale(logits, request.original, sizes.image_size)
    binary = (full > MASK_THRESHOLD).cpu().numpy()
    counts = masks.encode(binary)
    areas, boxes = masks.areas_and_boxes(counts, request.original)
    return MaskSet(
        size=request.original,
        counts=counts,
        boxes=boxes,
        areas=areas,
        predicted_iou=scores.float().cpu().numpy(),
        stability=stability(full).cpu().numpy(),
        prompt_index=prompt_index,
        object_embeddings=_object_embeddings(request, logits, sizes),
    )


def stability(logits: torch.Tensor, offset: float = STABILITY_OFFSET) -> torch.Tensor:
    """[N, h, w] logits → [N]: the IoU of the masks cut at +offset and −offset (as segment_anything's
    `calculate_stability_score`); 0 where both are empty."""
    inside = (logits > offset).flatten(1).sum(1)
    around = (logits > -offset).flatten(1).sum(1)
    return inside / around.clamp(min=1)


def upscale(logits: torch.Tensor, original: Size, image_size: int) -> torch.Tensor:
    """[N, 4g, 4g] logits of the padded input → [N, height, width] at original resolution."""
    height, width = preprocess.input_size(original, image_size)
    padded = functional.interpolate(logits[None], (image_size, image_size), mode="bilinear", align_corners=False)
    inner = padded[..., :height, :width]
    return functional.interpolate(inner, original, mode="bilinear", align_corners=False)[0]


def _tensor(embedding: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(embedding), dtype=torch.float32, device=device)


def _object_embeddings(request: DecodeRequest, logits: torch.Tensor, sizes: checkpoint.Architecture) -> np.ndarray:
    """[N, C] float32: the embedding's tokens weighed by the share of each that the mask covers, without padding."""
    embedding = _tensor(request.embedding, logits.device)
    height, width = preprocess.input_size(request.original, sizes.image_size)
    side = sizes.image_size // logits.shape[-1]  # input pixels a logit
    covered = (logits > MASK_THRESHOLD).float()
    covered[:, -(-height // side) :] = 0
    covered[:, :, -(-width // side) :] = 0
    share = functional.avg_pool2d(covered[:, None], logits.shape[-1] // sizes.grid)[:, 0].flatten(1)
    sums = share @ embedding.flatten(1).T
    return (sums / share.sum(1, keepdim=True).clamp(min=1e-6)).cpu().numpy()
