"""The replicas that hold weights: encoder, decoder and cellfinder. They forward to plain objects."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio.to_thread
import numpy as np
import ray
import torch
from pydantic import ValidationError

from cluster import memory, telemetry
from cluster.errors import CellrayError, Conflict, Internal, InvalidSettings
from cluster.settings import Frozen, Settings, WeightsSettings
from serve_app import models
from serve_app.batches import Batches
from serve_app.contract import DTYPE, ModelInfo, Timed
from serve_app.model import automask, cellfinder, cells, checkpoint, decoder, encoder, onnx
from serve_app.model.cell_masks import Boxes, Cells, CellsRequest
from serve_app.model.masks import MaskSet
from serve_app.model.paint import paint
from serve_app.model.preprocess import Size
from serve_app.model.prompts import DecodeRequest, GridOptions, Prompts, View

log = logging.getLogger("ray.serve")

BATCH_IMAGES = 8  # past 8, ViT encoders gain little (reference: segment-anything-fast)
BATCH_REQUESTS = 16
WHOLE = 2  # images at once a replica, up to 512 MB each: one is decoded while masks of the other are encoded

Items = list[np.ndarray]
Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Images:
    """A call: images, the dtype that their embeddings are to have, and whether they are CellSAM's pixels."""

    images: Items
    dtype: str
    cells: bool

    def __len__(self) -> int:
        return len(self.images)


class DecoderOptions(Frozen):
    """`user_config:` of a decoder's deployment. Empty: the model's own decoder."""

    decoder: WeightsSettings | None = None

    @classmethod
    def read(cls, user_config: Any) -> WeightsSettings | None:
        """Raises InvalidSettings, naming the first key that does not fit."""
        try:
            return cls.model_validate(user_config).decoder
        except ValidationError as error:
            first = error.errors()[0]
            raise InvalidSettings(f"user_config: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _log_call(did: str, answer: Timed[Any]) -> None:
    """With the id of the request that asked: Serve's logger adds it."""
    log.info(f"{did} {len(answer)} in {1000 * answer.ran_s:.1f} ms", extra={"ms": round(1000 * answer.ran_s, 1)})


def _use_cores() -> None:
    """Ray gives a replica without reserved CPUs one thread; such a one may use the whole node. Memory stays with it."""
    reserved = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
    torch.set_num_threads(reserved or len(os.sched_getaffinity(0)))
    memory.keep()


class EncoderReplica:
    """Images → embeddings. Holds the encoder's half of the checkpoint and nothing of the decoder's."""

    def __init__(self, settings: Settings, name: str) -> None:
        started = time.perf_counter()
        _use_cores()
        self.batches = Batches(self._encode, BATCH_IMAGES)
        model = models.find(settings, name)
        device = encoder.check_device("auto")
        self.encoder = encoder.load(models.prepare(settings, name), model.runtime, device, model.dtype)
        self.model_info = models.describe(name, self.encoder.card, self.encoder.runtime, device, model.dtype)
        size = self.encoder.card.architecture.image_size
        encoder.embed(self.encoder, [np.zeros((size, size, 3), np.uint8)])  # ready means: has answered once
        seconds = time.perf_counter() - started
        _, why = encoder.choose(model.runtime, device, model.dtype)
        log.info(f"encoder {name}: {self.encoder.runtime} ({why}), ready in {seconds:.1f} s")

    def info(self) -> ModelInfo:
        return self.model_info

    async def encode(self, images: Items, dtype: str = DTYPE, cells: bool = False) -> Timed[np.ndarray | CellrayError]:
        """[h, w, 3] uint8 images with long side S → [C, g, g] of `dtype`, one of DTYPES, each, or an error in its
        place. With `cells` they are [h, w, 3] float32 of `cellsam.normalise`, of any size."""
        answer = await self.batches(_Images(images, dtype, cells))
        _log_call("encoded", answer)
        return answer

    async def _encode(self, calls: list[_Images]) -> list[Timed[np.ndarray | CellrayError]]:
        answers: dict[tuple[str, bool], Iterator[np.ndarray | CellrayError]] = {}
        name, started = self.model_info.name, time.perf_counter()
        telemetry.observe(telemetry.BATCH_ITEMS, sum(map(len, calls)), model=name, part="encoder")
        for dtype, whole in {(call.dtype, call.cells) for call in calls}:
            images = [image for call in calls if (call.dtype, call.cells) == (dtype, whole) for image in call.images]
            if whole:
                embed = partial(cells.embed, self.encoder, images, self.model_info.device, dtype=dtype)
            else:
                embed = partial(encoder.embed, self.encoder, images, dtype=dtype)
            answers[dtype, whole] = iter(await anyio.to_thread.run_sync(embed))
        ran_s = time.perf_counter() - started
        telemetry.observe(telemetry.ENCODER_SECONDS, ran_s, model=name)
        return [Timed((next(answers[call.dtype, call.cells]) for _ in call.images), name, ran_s) for call in calls]


class CellFinderReplica:
    """CellSAM's pixels → boxes of cells. Holds the detector and nothing of the encoder and the decoder."""

    def __init__(self, settings: Settings, name: str) -> None:
        _use_cores()
        self.batches = Batches(self._find, BATCH_IMAGES)
        self.name, model, device = name, models.find(settings, name), encoder.check_device("auto")
        folder = models.prepare(settings, name)
        self.detector = cellfinder.load(folder, "auto", device, model.dtype)
        self.model_info = models.describe(name, self.detector.card, self.detector.runtime, device, model.dtype)
        cells.find(self.detector, [np.zeros((64, 64, 3), np.float32)], device)  # ready means: has answered once
        log.info(f"cellfinder {name}: {self.detector.runtime}, ready")

    def info(self) -> ModelInfo:
        return self.model_info

    async def find(self, images: Items) -> Timed[Boxes | CellrayError]:
        """[h, w, 3] float32 of `cellsam.normalise` → all the boxes that the detector has for each, or an error in its
        place."""
        answer = await self.batches(images)
        _log_call("found the cells of", answer)
        return answer

    async def _find(self, calls: list[Items]) -> list[Timed[Boxes | CellrayError]]:
        started, images = time.perf_counter(), [image for call in calls for image in call]
        telemetry.observe(telemetry.BATCH_ITEMS, len(images), model=self.name, part="cellfinder")
        found = iter(await anyio.to_thread.run_sync(cells.find, self.detector, images, self.model_info.device))
        ran_s = time.perf_counter() - started
        telemetry.observe(telemetry.CELLFINDER_SECONDS, ran_s, model=self.name)
        return [Timed((next(found) for _ in call), self.name, ran_s) for call in calls]


@dataclass(frozen=True)
class LoadedDecoder:
    """A decoder that has answered once. `decoder` is None where the checkpoint has none: embeddings are served then,
    and whoever asks for masks is told."""

    decoder: decoder.Decoder | None
    info: ModelInfo
    folder: Path

    @classmethod
    def load(cls, settings: Settings, name: str, chosen: WeightsSettings | None) -> LoadedDecoder:
        model, device = models.find(settings, name), encoder.check_device("auto")
        runtime = "reference" if model.runtime == "reference" else "auto"  # the other names are the encoder's
        folder = models.prepare_decoder(settings, name, chosen)
        card = checkpoint.ModelCard.read(folder)
        if not card.decoder_sha256:
            return cls(None, models.describe(name, card, "no decoder", device, model.dtype), folder)
        found = decoder.load(folder, runtime, device, model.dtype)
        info = models.describe(name, card, found.runtime, device, model.dtype)
        warm_up = Prompts(boxes=np.array([[0, 0, 8, 8]], np.float32))
        decoder.segment(found, [DecodeRequest(np.zeros(info.embedding_shape, np.float16), (16, 16), warm_up)])
        log.info(f"decoder {name}: {found.runtime}, ready; {card.decoder_sha256[:12]}…")
        return cls(found, info, folder)

    def check(self, decoder_sha256: str | None) -> None:
        """Raises Conflict where another decoder was asked for."""
        if decoder_sha256 not in (None, self.info.decoder_sha256):
            raise Conflict(
                f"the decoder of {self.info.name} was exchanged: {self.info.decoder_sha256[:12]}… answers, "
                f"{(decoder_sha256 or '')[:12]}… was asked for; masks of both do not go into one data set"
            )


class DecoderReplica:
    """Embeddings and prompts → masks. Holds the decoder's half of the checkpoint and nothing of the encoder's.

    `decoder_sha256`, where a caller gives it, is the decoder that its masks must come from.
    """

    def __init__(self, settings: Settings, name: str) -> None:
        _use_cores()
        self.batches = Batches(self._segment, BATCH_REQUESTS)
        self.whole, self.exporting = asyncio.Semaphore(WHOLE), asyncio.Lock()
        self.exported: tuple[str, bytes] | None = None  # the ONNX file, and whose
        self.settings, self.name, self.serving = settings, name, False
        self.loaded = LoadedDecoder.load(settings, name, None)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Exchange the decoder: `user_config: {decoder: {source: …, sha256: …}}`, or null for the model's own.

        Requests go on meanwhile. One that cannot be had leaves a serving replica as it is, with a warning in its info;
        a replica that starts with it fails, so that the deployment does.
        """
        try:
            chosen = DecoderOptions.read(user_config)
            self.loaded = await anyio.to_thread.run_sync(LoadedDecoder.load, self.settings, self.name, chosen)
        except CellrayError as error:
            if not self.serving:
                raise
            log.exception(f"decoder {self.name}: the former one stays")
            warning = f"user_config was refused, the former decoder stays: {error}"
            self.loaded = replace(self.loaded, info=replace(self.loaded.info, warning=warning))

    def check_health(self) -> None:
        self.serving = True  # the first check comes when the replica has started

    def info(self) -> ModelInfo:
        return self.loaded.info

    async def onnx(self) -> bytes:
        """The decoder that answers now, as an ONNX file. Raises NotFound, InvalidSettings."""
        loaded = self.loaded
        if loaded.decoder is None:
            raise checkpoint.no_decoder()
        async with self.exporting:
            if self.exported is None or self.exported[0] != loaded.info.decoder_sha256:
                data, _ = await anyio.to_thread.run_sync(onnx.exported, loaded.folder, self.name)
                self.exported = loaded.info.decoder_sha256, data
        return self.exported[1]

    async def segment(
        self, requests: list[DecodeRequest], decoder_sha256: str | None = None
    ) -> Timed[MaskSet | CellrayError]:
        """One MaskSet a request, or an error in its place. Raises Conflict."""
        if self.loaded.decoder is None:
            return Timed([checkpoint.no_decoder()] * len(requests), self.name, 0.0)
        found, loaded = await self.batches(requests)
        loaded.check(decoder_sha256)
        _log_call("segmented", found)
        return found

    async def _segment(
        self, calls: list[list[DecodeRequest]]
    ) -> list[tuple[Timed[MaskSet | CellrayError], LoadedDecoder]]:
        loaded, started = self.loaded, time.perf_counter()
        requests = [request for call in calls for request in call]
        assert loaded.decoder is not None
        telemetry.observe(telemetry.BATCH_ITEMS, len(requests), model=self.name, part="decoder")
        answers = iter(await anyio.to_thread.run_sync(decoder.segment, loaded.decoder, requests))
        ran_s = time.perf_counter() - started
        telemetry.observe(telemetry.DECODER_SECONDS, ran_s, model=self.name)
        return [(Timed((next(answers) for _ in call), self.name, ran_s), loaded) for call in calls]

    async def automask(
        self, images: list[tuple[Sequence[View], Size]], options: GridOptions, decoder_sha256: str | None = None
    ) -> Timed[MaskSet | CellrayError]:
        """(views, original size) pairs → all their masks. Raises Conflict."""
        return await self._whole(
            images,
            lambda found, one: automask.generate(found, *one, options),
            telemetry.AUTOMASK_SECONDS,
            decoder_sha256,
        )

    async def cells(
        self, requests: list[CellsRequest], decoder_sha256: str | None = None
    ) -> Timed[Cells | CellrayError]:
        """An image's embedding and boxes → its cells. Raises Conflict."""
        return await self._whole(
            requests,
            lambda found, one: paint(found, one.embedding, one.found, one.size),
            telemetry.CELLS_SECONDS,
            decoder_sha256,
        )

    async def _whole(
        self, images: list[Item], run: Callable[[decoder.Decoder, Item], Answer], metric: str, sha256: str | None
    ) -> Timed[Answer | CellrayError]:
        """Everything on an image: WHOLE images at a time, beside the batched requests."""
        async with self.whole:
            loaded, started = self.loaded, time.perf_counter()
            loaded.check(sha256)
            found = [await anyio.to_thread.run_sync(self._one, loaded.decoder, one, run, metric) for one in images]
        answer = Timed(found, self.name, time.perf_counter() - started)
        _log_call("segmented whole", answer)
        return answer

    def _one(
        self,
        found: decoder.Decoder | None,
        image: Item,
        run: Callable[[decoder.Decoder, Item], Answer],
        metric: str,
    ) -> Answer | CellrayError:
        if found is None:
            return checkpoint.no_decoder()
        try:
            with telemetry.timing(metric, model=self.name):
                return run(found, image)
        except CellrayError as error:
            return error
        except Exception:
            log.exception("segmenting a whole image failed")
            return Internal("segmenting the whole image failed; the replica's log has the cause")
