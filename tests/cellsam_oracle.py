"""CellSAM's own package beside ours: the same random weights in both, and what it answers.

python -m tests.cellsam_oracle     writes tests/cellsam_golden.json anew

That needs the package, `pip install git+https://github.com/vanvalenlab/cellSAM@35bc6e0`, which is for non-commercial
use and neither a dependency nor copied. The file holds numbers alone: what it answers to real images with SMALL
weights, all of whose parameters are random; `tests/test_model_cellsam.py` compares ours with them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage import data

from serve_app.model import architectures, cellsam_names, masks, modules
from serve_app.model.architectures import SAMS, Architecture, DetectorSizes
from serve_app.model.cellsam import Options
from serve_app.model.checkpoint import State

GOLDEN = Path(__file__).with_name("cellsam_golden.json")
SEED, BOXES, SHOWN = 7, 40, 64
ANSWERED = "two"  # of the images: the one whose boxes and cells are kept, too
TILES, TILE_BOXES, TILED_ROWS = Options(block_size=160, overlap=40, compat=True), 20, 160
FULL = SAMS["sam_vit_b"], architectures.CELLSAMS["cellsam"][1]
NANO = SAMS["nano"], architectures.CELLSAMS["nano_cellsam"][1]
SHALLOW = replace(FULL[0], depth=2, global_blocks=(1,))
SMALL = SHALLOW, replace(FULL[1], backbone=SHALLOW, encoder_layers=2, decoder_layers=2, anchors=400)


def installed() -> bool:
    return find_spec("cellSAM") is not None


def weights(sizes: tuple[Architecture, DetectorSizes], seed: int = SEED) -> State:
    """Random weights by our names; such that boxes are of several sizes, masks have edges, and some are dropped."""
    state = modules.drawn(*sizes, seed)
    state["mask_decoder.iou_prediction_head.layers.2.bias"] += 0.71
    state["mask_decoder.output_hypernetworks_mlps.0.layers.2.weight"] *= 40
    state["detector.transformer.bbox_embed.layers.2.weight"] *= 15
    state["detector.transformer.bbox_embed.layers.2.bias"][2:] -= 2.0
    state["detector.transformer.class_embed.weight"] *= 0.3
    return state


def renamed(state: State, layers: int) -> State:
    """Ours by CellSAM's names, in advanced mode: with another SAM that does not count, and a head for each layer."""
    theirs: State = {}
    for name, tensor in state.items():
        own = f"{cellsam_names.DETECTOR}{name.removeprefix('detector.')}"
        if name == cellsam_names.ADVANCED:
            continue
        if not name.startswith("detector."):
            theirs |= {cellsam_names.COPY + name: tensor, cellsam_names.FIRST + name: tensor + 1}
        elif "_embed." in name and "patch_embed" not in name:
            theirs |= {own.replace("_embed.", f"_embed.{layer}."): tensor for layer in range(layers)}
        else:
            theirs[own] = tensor
    return theirs


def built(state: State, sizes: tuple[Architecture, DetectorSizes]) -> Any:
    """CellSAM's model with these weights. Its sizes are fixed in its code: others are put there for the while."""
    inference: Any = importlib.import_module("cellSAM.sam_inference")
    backbone: Any = importlib.import_module("cellSAM.AnchorDETR.models.backbone")
    sam, detector = sizes

    def vit_b() -> Any:
        return modules.modeling.Sam(modules.build_encoder(sam), *modules.build_decoder(sam))

    def sized(args: Any) -> Any:
        args.enc_layers, args.dec_layers = detector.encoder_layers, detector.decoder_layers
        args.num_query_position = detector.anchors
        return build(args)

    build, registry = inference.build_inference_model, {"vit_b": vit_b}
    before = inference.sam_model_registry, backbone.sam_model_registry
    inference.build_inference_model = sized
    inference.sam_model_registry = backbone.sam_model_registry = registry
    try:
        made = inference.CellSAM(configuration(detector)).eval()
    finally:
        inference.build_inference_model = build
        inference.sam_model_registry, backbone.sam_model_registry = before
    made.load_state_dict(renamed(state, detector.decoder_layers))
    return made


def configuration(sizes: DetectorSizes) -> dict[str, Any]:
    """By the keys of CellSAM's modelconfig.yaml."""
    return {
        "enc_layers": sizes.encoder_layers,
        "dec_layers": sizes.decoder_layers,
        "dim_feedforward": sizes.mlp_width,
        "hidden_dim": sizes.width,
        "dropout": 0.0,
        "nheads": sizes.heads,
        "num_query_position": sizes.anchors,
        "num_query_pattern": sizes.patterns,
        "spatial_prior": "learned",
        "attention_type": "RCDA",
        "num_feature_levels": 1,
        "device": "cpu",
        "seed": 42,
        "num_classes": sizes.classes,
        "lr_backbone": 0,
        "masks": False,
    }


def images() -> dict[str, np.ndarray]:
    """Grey, RGB and two channels (nuclei, whole cells); 8 and 16 bit, of several aspects."""
    section = data.immunohistochemistry()
    two = (255 - section[100:340, 50:350, :2]).astype(np.uint16) * 37
    return {"grey": data.coins()[:200, :300], "rgb": section[:256, :256], "two": two}


def inputs(oracle: Any, image: np.ndarray) -> dict[str, np.ndarray]:
    """What CellSAM prepares: `image` [h, w, 3], then the two models' inputs [3, 1024, 1024]."""
    pipeline, utils = (importlib.import_module(f"cellSAM.{name}") for name in ("cellsam_pipeline", "utils"))
    planes = utils.format_image_shape(image).astype(np.float32)
    ready = utils.normalize_image(pipeline.normalize_image(planes))
    batch = torch.from_numpy(ready.transpose(2, 0, 1)).float()[None]
    square, _ = oracle.prep_2(batch, percentile=True)
    detector = oracle.sam_bbox_preprocessing(batch, percentile=False)
    encoder = torch.stack([oracle.sam_preprocess(one, div_255=True) for one in square])
    return {"image": ready, "encoder": encoder[0].numpy(), "detector": detector[0].numpy()}


def boxes(oracle: Any, detector_input: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All scores [Q], the best first, and boxes [Q, 4] in the 1024 px square."""
    (found,) = oracle.cellfinder.forward_inference(torch.from_numpy(detector_input)[None])
    return found["scores"].numpy(), found["boxes"].numpy()


def labels(oracle: Any, image: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """[h, w]: its whole pipeline, with these boxes [N, 4] in the square as the detector's."""
    pipeline, model, utils = (importlib.import_module(f"cellSAM.{n}") for n in ("cellsam_pipeline", "model", "utils"))
    planes = pipeline.normalize_image(utils.format_image_shape(image).astype(np.float32))
    oracle.generate_bounding_boxes = lambda *_, **__: [torch.from_numpy(chosen)]
    return model.segment_cellular_image(planes, oracle, normalize=True)[0]


def tiled(oracle: Any, image: np.ndarray) -> np.ndarray:
    """[h, w]: its pipeline in TILES, with the TILE_BOXES best boxes of each."""
    pipeline, utils, wsi = (importlib.import_module(f"cellSAM.{name}") for name in ("cellsam_pipeline", "utils", "wsi"))
    planes = pipeline.normalize_image(utils.format_image_shape(image).astype(np.float32))

    def best(batch: torch.Tensor, **_: Any) -> list[torch.Tensor]:
        (found,) = oracle.cellfinder.forward_inference(oracle.sam_bbox_preprocessing(batch, percentile=False))
        return [found["boxes"][:TILE_BOXES]]

    oracle.generate_bounding_boxes = best
    depth = TILES.overlap
    made = wsi.segment_wsi(planes, TILES.block_size, depth, depth, TILES.iou_threshold, model=oracle, device="cpu")
    return made.compute()


def places(shape: tuple[int, ...]) -> np.ndarray:
    """Where a tensor's values are compared: everywhere alike."""
    return np.random.default_rng(0).integers(0, int(np.prod(shape)), SHOWN)


def shown(values: np.ndarray) -> list[float]:
    return [round(float(value), 7) for value in values.ravel()[places(values.shape)]]


def golden() -> dict[str, Any]:
    oracle, found = built(weights(SMALL), SMALL), {}
    for name, image in images().items():
        made = inputs(oracle, image)
        found[name] = {key: shown(value) for key, value in made.items()}
        if name == ANSWERED:
            scores, all_boxes = boxes(oracle, made["detector"])
            plane = labels(oracle, image, all_boxes[:BOXES])
            numbers = np.unique(plane)[1:]
            found[name]["scores"] = np.round(scores[:BOXES].astype(float), 7).tolist()
            found[name]["boxes"] = np.round(all_boxes[:BOXES].astype(float), 4).tolist()
            found[name]["cells"] = [text for number in numbers for text in masks.encode(plane[None] == number)]
            plane = tiled(oracle, image[:TILED_ROWS])
            found[name]["tiled"] = [
                text for number in np.unique(plane)[1:] for text in masks.encode(plane[None] == number)
            ]
    return found


def versions() -> dict[str, str]:
    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "a checkout"

    packages = ("cellSAM", "torch", "torchvision", "scikit-image", "kornia", "scikit-learn", "numpy")
    return {"python": platform.python_version(), **{name: of(name) for name in packages}}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(SEED)
    content = {"seed": SEED, "versions": versions(), "images": golden()}
    GOLDEN.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
