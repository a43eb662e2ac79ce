"""CellSAM: an image in, every cell out. The detector's boxes, a mask for each, and one label image of all of them.

    model = cells.load(folder)                       # of a split CellSAM checkpoint
    found = model.segment(pixels)                    # [h, w] or [h, w, 1 to 3], of any number type
    found.labels                                     # [h, w] int32: 0, or the cell a pixel belongs to

Steps and thresholds are CellSAM's, see `cellsam`. What is different, on purpose:
- Large images are cut into tiles that end where the image does; CellSAM's see the opposite edge beyond it. An image
  that fits a tile is done as a whole. Without tiles bbox_threshold counts. (`compat` does these as CellSAM.)
- Grey images, images without light and images without cells are answered; CellSAM's pipeline fails on them.
- gauge_cell_size prepares pixels as usual; CellSAM leaves its normalisation out there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cluster.errors import CellrayError, InvalidImage
from serve_app.model import batched, cellfinder, cellsam_inputs, checkpoint, decoder, encoder, seams
from serve_app.model.cell_masks import Boxes, Cells
from serve_app.model.cellfinder import Detector
from serve_app.model.cellsam import CHANNELS, Options, Pixels
from serve_app.model.decoder import Decoder
from serve_app.model.encoder import Encoder
from serve_app.model.paint import paint

MAX_BATCH = 8  # images at once; past it ViT encoders gain little


def find(
    detector: Detector, images: Sequence[np.ndarray], device: str = "cpu", max_batch: int = MAX_BATCH
) -> list[Boxes | CellrayError]:
    """Images [h, w, 3] float32 of `cellsam.normalise` → all the boxes that the detector has for each; InvalidImage in
    place of one that is none."""
    size, advanced = detector.card.architecture.image_size, detector.card.advanced

    def run(some: list[np.ndarray]) -> list[Boxes]:
        inputs = [cellsam_inputs.detector_input(cellsam_inputs.square(one, size, device), advanced) for one in some]
        scores, boxes = cellfinder.boxes(*detector.forward(torch.stack(inputs)), size)
        return [Boxes(*pair) for pair in zip(boxes.cpu().numpy(), scores.cpu().numpy(), strict=True)]

    return batched.answers(images, _problem, run, max_batch)


def embed(
    model: Encoder,
    images: Sequence[np.ndarray],
    device: str = "cpu",
    max_batch: int = MAX_BATCH,
    dtype: str = "float32",
) -> list[np.ndarray | CellrayError]:
    """Images [h, w, 3] float32 of `cellsam.normalise` → [C, g, g] of `dtype` each, over the whole square; an error in
    place of one that is none, or whose embedding `dtype` cannot hold."""
    size, advanced = model.card.architecture.image_size, model.card.advanced

    def run(some: list[np.ndarray]) -> list[np.ndarray | CellrayError]:
        inputs = [cellsam_inputs.encoder_input(cellsam_inputs.square(one, size, device), advanced) for one in some]
        return encoder.held(model.forward(torch.stack(inputs)), dtype)

    return batched.answers(images, _problem, run, max_batch)


def _problem(image: np.ndarray) -> InvalidImage | None:
    if image.dtype == np.float32 and image.ndim == CHANNELS == image.shape[-1] and image.size:
        return None
    return InvalidImage(f"expected [h, w, 3] float32 of cellsam.normalise, found {list(image.shape)} {image.dtype}")


@dataclass(frozen=True)
class CellSAM:
    """A split CellSAM's three parts, loaded."""

    encoder: Encoder
    detector: Detector
    decoder: Decoder
    device: str

    def segment(self, image: np.ndarray, options: Options | None = None) -> Cells:
        """[h, w] or [h, w, 1 to 3] of any number type, as `cellsam.channels` has it → its cells.

        Raises:
            InvalidImage: of another shape, or not finite. InvalidInput: an option is out of its range.
        """
        options = options or Options()
        pixels = Pixels(image, options)
        places = seams.tiles(pixels.size, options)
        parts = (self.segment_tile(pixels.tile(place.seen), pixels.bbox_threshold) for place in places)
        found = seams.joined(parts, places, pixels.size, options)
        if len(places) > 1 and seams.too_large(found.areas(), pixels.size, options):
            return self.segment_tile(pixels.tile(pixels.whole), pixels.bbox_threshold)
        return found

    def segment_tile(self, ready: np.ndarray, bbox_threshold: float) -> Cells:
        """[h, w, 3] float32 of `cellsam.normalise` → its cells, without tiles."""
        (found,) = find(self.detector, [ready], self.device)
        (embedding,) = embed(self.encoder, [ready], self.device)
        for one in (found, embedding):
            if isinstance(one, CellrayError):
                raise one
        assert isinstance(found, Boxes)
        assert isinstance(embedding, np.ndarray)
        return paint(self.decoder, embedding, found.above(bbox_threshold), (ready.shape[0], ready.shape[1]))


def load(folder: Path, device: str = "auto", dtype: str = "float32") -> CellSAM:
    """The three parts of a split CellSAM by the fastest runtimes at hand; products are computed in `dtype`.

    Raises:
        InvalidCheckpoint: the folder holds no CellSAM, or other weights than its card says.
        InvalidSettings: a dtype or device that is not there.
    """
    device = encoder.check_device(device)
    if checkpoint.ModelCard.read(folder).detector is None:
        raise checkpoint.no_detector(folder)
    parts = (
        encoder.load(folder, "auto", device, dtype),
        cellfinder.load(folder, "auto", device, dtype),
        decoder.load(folder, "auto", device, dtype),
    )
    return CellSAM(*parts, device)
