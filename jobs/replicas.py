"""The app's replicas as a job calls them: by model name, whole batches, with a time-out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster import session
from cluster.errors import CellrayError, NotFound
from serve_app import contract
from serve_app.contract import ModelInfo
from serve_app.model.cell_masks import Cells, CellsRequest
from serve_app.model.masks import MaskSet
from serve_app.model.preprocess import Size
from serve_app.model.prompts import DecodeRequest, GridOptions, View

INFO_TIMEOUT_S = 120.0  # a model that was scaled to zero starts first


def connect(model: str) -> ModelInfo:
    """Join the cluster and ask the model's decoder what it is.

    Raises:
        Unavailable: no cluster. NotFound: the app, or the model in it, is not there.
    """
    session.connect()
    deployed = session.replicas(contract.APP_NAME)
    if contract.encoder_deployment(model) not in deployed:
        suffix = contract.encoder_deployment("")
        served = sorted(name.removesuffix(suffix) for name in deployed if name.endswith(suffix))
        raise NotFound(f"model {model!r} is not served; there are {', '.join(served)}: add it to args.models")
    return _handle(contract.decoder_deployment(model)).info.remote().result(timeout_s=INFO_TIMEOUT_S)


def running(model: str) -> dict[str, int]:
    """Running replicas of the model's encoder and decoder, and of its cellfinder where it has one."""
    made = (contract.encoder_deployment, contract.decoder_deployment, contract.cellfinder_deployment)
    found = session.replicas(contract.APP_NAME)
    return {name: found[name] for name in (one(model) for one in made) if name in found}


def finds_cells(model: str) -> bool:
    """Whether its cellfinder is deployed."""
    return contract.cellfinder_deployment(model) in session.replicas(contract.APP_NAME)


def encoder(
    model: str, timeout_s: float, dtype: str = contract.DTYPE
) -> Callable[[list[np.ndarray]], list[np.ndarray | CellrayError]]:
    """`dtype` is what the embeddings come in."""
    handle = _handle(contract.encoder_deployment(model))
    return lambda pixels: handle.encode.remote(pixels, dtype).result(timeout_s=timeout_s)


def decoder(info: ModelInfo, timeout_s: float) -> Callable[[list[DecodeRequest]], list[MaskSet | CellrayError]]:
    """Raises Conflict where the model has another decoder now than `info` says."""
    call = _handle(contract.decoder_deployment(info.name)).segment.remote
    return lambda requests: call(requests, info.decoder_sha256).result(timeout_s=timeout_s)


def automask(
    info: ModelInfo, options: GridOptions, timeout_s: float
) -> Callable[[list[tuple[list[View], Size]]], list[MaskSet | CellrayError]]:
    """One call an image: each may take long. Raises as `decoder`."""
    call = _handle(contract.decoder_deployment(info.name)).automask.remote
    return lambda images: [
        call([image], options, info.decoder_sha256).result(timeout_s=timeout_s)[0] for image in images
    ]


def cells(info: ModelInfo, timeout_s: float) -> Callable[[list[tuple[np.ndarray, float]]], list[Cells | CellrayError]]:
    """(pixels [h, w, 3] float32 of `cellsam.normalise`, threshold for boxes) each → its cells. Encoder and cellfinder
    run side by side; then a call an image, so that they spread over the decoders. Raises as `decoder`."""
    encode = _handle(contract.encoder_deployment(info.name)).encode
    find = _handle(contract.cellfinder_deployment(info.name)).find
    paint = _handle(contract.decoder_deployment(info.name)).cells

    def segment(tiles: list[tuple[np.ndarray, float]]) -> list[Cells | CellrayError]:
        pixels = [one for one, _ in tiles]
        calls = encode.remote(pixels, cells=True), find.remote(pixels)
        arrays, boxes = (call.result(timeout_s=timeout_s) for call in calls)
        coming: list[Any] = []
        for array, found, (one, threshold) in zip(arrays, boxes, tiles, strict=True):
            failed = next((part for part in (array, found) if isinstance(part, CellrayError)), None)
            request = None if failed else CellsRequest(array, found.above(threshold), (one.shape[0], one.shape[1]))
            coming.append(failed or paint.remote([request], info.decoder_sha256))
        return [one if isinstance(one, CellrayError) else one.result(timeout_s=timeout_s)[0] for one in coming]

    return segment


def _handle(deployment: str) -> DeploymentHandle:
    return serve.get_deployment_handle(deployment, app_name=contract.APP_NAME)
