"""The decoder as an ONNX file, under the names that segment_anything's own export gives it: for browsers and other
programs that have embeddings and want masks.

Inputs, all float32; g is the embedding's side, 64 for B, L and H:
    image_embeddings  [1, C, g, g]
    point_coords      [N, K, 2] (x, y) in pixels of the resized image, whose long side is the model's input size
    point_labels      [N, K] 1 foreground, 0 background, 2 and 3 a box's first and second corner, −1 padding; prompts
                      without a box end with one padding point, as segment_anything's predictor gives them
    mask_input        [1, 1, 4g, 4g] logits of an earlier answer, or zeros
    has_mask_input    [1] 1 or 0
    orig_im_size      [2] height and width of the original image
Outputs, float32; M is 1 + 3: the mask for one answer, then those for multimask:
    masks             [N, M, height, width] logits; above 0 is inside
    iou_predictions   [N, M]
    low_res_masks     [N, M, 4g, 4g] logits, the next click's mask_input
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

from cluster.errors import InvalidInput, InvalidSettings
from serve_app.model import checkpoint
from serve_app.model.decoder import MASK_THRESHOLD, ReferenceDecoder

OUTPUTS = ("masks", "iou_predictions", "low_res_masks")


def check(out: Path, overwrite: bool) -> None:
    """Raises InvalidInput where `out` is a folder or is there already, InvalidSettings where a package is missing."""
    if out.is_dir():
        raise InvalidInput(f"{out} is a folder; expected the name of a file to write")
    if out.exists() and not overwrite:
        raise InvalidInput(f"{out} exists; give --overwrite to replace it")
    check_packages()


def check_packages() -> None:
    """Raises InvalidSettings."""
    absent = [package for package in ("onnx", "onnxscript") if find_spec(package) is None]
    if absent:
        raise InvalidSettings(f"ONNX files need {' and '.join(absent)}: pip install 'cellray[onnx]'")


def export(folder: Path, out: Path, name: str) -> dict[str, str]:
    """Write a split model's decoder to the file `out`, whole or not at all → its metadata: model, hash, licence.

    Raises:
        InvalidCheckpoint: the folder holds no split model, or one without a decoder.
    """
    data, metadata = exported(folder, name)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_whole(out, data)
    return metadata


def exported(folder: Path, name: str) -> tuple[bytes, dict[str, str]]:
    """The file, and its metadata. Raises as `export`, and as `check_packages`."""
    check_packages()
    decoder = ReferenceDecoder(folder, "cpu")
    program = _program(decoder)
    metadata = {
        "model": name,
        "decoder_sha256": decoder.card.decoder_sha256,
        "licence": decoder.card.licence,
        "trained": str(decoder.card.trained).lower(),
    }
    program.model.metadata_props.update(metadata)
    return program.model_proto.SerializeToString(), metadata


def _program(decoder: ReferenceDecoder) -> Any:
    import onnx_ir

    sizes = decoder.card.architecture
    side = 4 * sizes.grid
    inputs = {
        "image_embeddings": torch.zeros(1, sizes.channels, sizes.grid, sizes.grid),
        "point_coords": torch.zeros(2, 3, 2),
        "point_labels": torch.zeros(2, 3),
        "mask_input": torch.zeros(1, 1, side, side),
        "has_mask_input": torch.zeros(1),
        "orig_im_size": torch.tensor([sizes.image_size, sizes.image_size]).float(),
    }
    many = {0: torch.export.Dim("prompts"), 1: torch.export.Dim("points")}
    shapes = {name: many if name.startswith("point") else None for name in inputs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that two inputs share
        exported = torch.export.export(_module(decoder), tuple(inputs.values()), dynamic_shapes=shapes, strict=False)
        program: Any = torch.onnx.export(
            exported, input_names=list(inputs), output_names=OUTPUTS, dynamic_shapes=shapes, dynamo=True, verbose=False
        )
    masks = program.model.graph.outputs[0]
    masks.shape = onnx_ir.Shape(["prompts", sizes.mask_outputs + 1, "height", "width"])
    return program


def _module(decoder: ReferenceDecoder) -> torch.nn.Module:
    from segment_anything.utils.onnx import SamOnnxModel

    class Exportable(SamOnnxModel):
        """With the sizes of the last step as numbers of which torch.export knows that they are no less than 1."""

        def mask_postprocessing(self, masks: torch.Tensor, orig_im_size: torch.Tensor) -> torch.Tensor:
            size = self.img_size
            height, width = self.resize_longest_image_size(orig_im_size, size).tolist()
            full_height, full_width = orig_im_size.to(torch.int64).tolist()
            for side in (height, width, full_height, full_width):
                torch._check(side > 0)
            torch._check(height <= size)
            torch._check(width <= size)
            padded = functional.interpolate(masks, (size, size), mode="bilinear", align_corners=False)
            inner = padded[..., :height, :width]
            return functional.interpolate(inner, (full_height, full_width), mode="bilinear", align_corners=False)

    sam = SimpleNamespace(  # the parts of a Sam that it looks at
        image_encoder=SimpleNamespace(img_size=decoder.card.architecture.image_size),
        prompt_encoder=decoder.prompt_encoder,
        mask_decoder=decoder.mask_decoder,
        mask_threshold=MASK_THRESHOLD,
    )
    module: torch.nn.Module = Exportable(sam, return_single_mask=False)
    return module.eval()
