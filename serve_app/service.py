"""The operations over handles and the store: embed, segment, automask, models. Knows no protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar, get_args

import numpy as np
from anyio import CapacityLimiter, to_thread
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from cluster import status, telemetry, watch
from cluster.errors import (
    CellrayError,
    Conflict,
    DeadlineExceeded,
    Internal,
    InvalidInput,
    InvalidPrompt,
    NotFound,
    Overloaded,
    Unavailable,
)
from cluster.settings import ComputeDtype, Settings
from serve_app import contract
from serve_app.contract import Embedding, ModelInfo, Timed
from serve_app.model import preprocess, seams
from serve_app.model.cell_masks import Cells, CellsRequest
from serve_app.model.cellsam import Options, Pixels
from serve_app.model.masks import MaskSet
from serve_app.model.preprocess import ModelImage
from serve_app.model.prompts import DecodeRequest, GridOptions, crops
from serve_app.store import EmbeddingStore, Facts

Result = TypeVar("Result")
Place = tuple[slice, slice]

CROPS_A_CALL = 8  # of one image to an encoder
EMBEDS_AT_ONCE = 8  # of one request's images
DECODES_AT_ONCE = 4  # images, whatever their size; stored embeddings are read beside them, so that clicks do not wait
READS_AT_ONCE = 16
TILES_AT_ONCE = 8  # of one image
LOOK_S = 1.0  # how long what Serve said of the replicas is taken for true
ASLEEP_S = 60.0  # without a request, after which a model's replicas may be gone
LOGITS = 64  # masks of one request with their logits: 128 KB each


@dataclass(frozen=True)
class Stored:
    """What names an embedding that was made before: one of the three. `image_uri` and `part` as in its data set."""

    embedding_id: str | None = None
    image_id: str | None = None
    image_uri: str | None = None
    part: str = ""


class Service:
    """One an ingress replica. `handles` are (encoder, decoder, cellfinder or None) of each named model in turn."""

    def __init__(self, settings: Settings, names: list[str], handles: Sequence[Any]) -> None:
        self.limits = settings.limits
        self.names = names
        self.encoders: dict[str, DeploymentHandle] = dict(zip(names, handles[::3], strict=True))
        self.decoders: dict[str, DeploymentHandle] = dict(zip(names, handles[1::3], strict=True))
        self.cellfinders = {name: one for name, one in zip(names, handles[2::3], strict=True) if one is not None}
        self.store = EmbeddingStore(settings)
        self.infos: dict[str, ModelInfo] = {}
        self.asked: dict[str, float] = {}  # when a model's halves last answered that they are there
        self.looking, self.looked, self.missing = asyncio.Lock(), -LOOK_S, list[str]()
        self.decoding, self.reading = CapacityLimiter(DECODES_AT_ONCE), CapacityLimiter(READS_AT_ONCE)

    @asynccontextmanager
    async def deadline(self) -> AsyncIterator[None]:
        """What is done within takes no longer than the limit. Raises DeadlineExceeded; what was asked of replicas is
        given up."""
        try:
            async with asyncio.timeout(self.limits.request_timeout_s):
                yield
        except TimeoutError as error:
            raise DeadlineExceeded(f"no answer within {self.limits.request_timeout_s:g} s") from error

    async def models(self) -> list[ModelInfo]:
        """As they are now: decoders can change while the app runs."""
        self.infos.clear()
        return [await self.info(name) for name in self.names]

    async def info(self, model: str | None) -> ModelInfo:
        """Of a model by name; the first one if None. Raises NotFound for a model that is not served."""
        name = model or self.names[0]
        if name not in self.encoders:
            raise NotFound(f"model {name!r} is not served here; there are {', '.join(self.names)}")
        if name not in self.infos:
            self.infos[name] = await self._call(self.decoders[name].info.remote())
        return self.infos[name]

    async def _awake(self, model: str | None) -> ModelInfo:
        """As `info`. A model that nobody asked for a while may have no replicas: they start at the same time, where one
        after the other a request would wait for two nodes."""
        name = model or self.names[0]
        if name not in self.encoders or time.monotonic() - self.asked.get(name, -ASLEEP_S) < ASLEEP_S:
            return await self.info(name)
        halves = [handles[name].info.remote() for handles in (self.encoders, self.decoders)]
        info, *_ = await asyncio.gather(self.info(name), *map(self._call, halves))
        self.asked[name] = time.monotonic()
        return info

    async def embed(self, data: bytes, model: str | None) -> Embedding:
        """Image file bytes → embedding; one whose embedding is in memory does not run the encoder.

        Raises:
            InvalidImage and its kinds, NotFound, Unavailable, DeadlineExceeded
        """
        info = await self._awake(model)
        image_id = await self._thread(contract.image_id, data)
        embedding_id = contract.embedding_id(image_id, info.encoder_sha256, info.dtype)
        known = self.store.recall(embedding_id)
        if known:
            return known
        telemetry.count(telemetry.CACHE, result="miss")
        image: ModelImage = await self._decode(preprocess.prepare, data, info.image_size, self.limits.image_pixels)
        (array,) = await self._call(self.encoders[info.name].encode.remote([image.pixels]))
        embedding = Embedding(
            embedding_id=embedding_id,
            image_id=image_id,
            model=info.name,
            encoder_sha256=info.encoder_sha256,
            original=image.original,
            input=image.input,
            array=_value(array),
        )
        self.store.put(embedding)
        return embedding

    async def embed_many(self, images: Sequence[bytes], model: str | None) -> list[Embedding | CellrayError]:
        """In their order; one that fails has its error there. Raises NotFound."""
        await self.info(model)
        turn = asyncio.Semaphore(EMBEDS_AT_ONCE)

        async def one(data: bytes) -> Embedding | CellrayError:
            async with turn:
                try:
                    return await self.embed(data, model)
                except CellrayError as error:
                    return error

        return await asyncio.gather(*map(one, images))

    async def _decode(self, call: Callable[..., Result], *arguments: object) -> Result:
        """In a thread. A decoder that never ends is ended with this replica, in the end."""

        def watched() -> Result:
            with watch.ending():
                return call(*arguments)

        return await to_thread.run_sync(watched, abandon_on_cancel=True, limiter=self.decoding)

    async def _thread(self, call: Callable[..., Result], *arguments: object) -> Result:
        return await to_thread.run_sync(call, *arguments, abandon_on_cancel=True, limiter=self.reading)

    async def stored(self, what: Stored, model: str | None) -> tuple[Embedding, ModelInfo]:
        """An embedding made before and the model to decode it with: the one named, or the first whose encoder made it.

        Raises:
            NotFound: there is none, or none of the served models has its encoder.
        """
        infos = [await self.info(model)] if model else await self._infos()
        found = self.store.recall(what.embedding_id) if what.embedding_id else None
        if found is None:
            found = await self._thread(self._stored, what, infos)
        for info in infos:
            if info.encoder_sha256 == found.encoder_sha256:
                return found, info
        names = model or ", ".join(self.names)
        raise NotFound(f"the embedding was made by another encoder ({found.model}) than that of {names}")

    def _stored(self, what: Stored, infos: list[ModelInfo]) -> Embedding:
        if what.embedding_id:
            return self.store.get(what.embedding_id)
        if what.image_id:
            return self.store.get(*_made(what.image_id, infos))
        encoders = [info.encoder_sha256 for info in infos]
        return self.store.of_image(what.image_uri or "", what.part, encoders)

    async def images(self, after: str, most: int) -> tuple[list[Facts], str]:
        """As `EmbeddingStore.images`, of all served models."""
        encoders = [info.encoder_sha256 for info in await self._infos()]
        return await self._thread(self.store.images, encoders, after, most)

    async def pixels(self, image_id: str) -> np.ndarray:
        """An image of the data sets, read from where it was embedded → [height, width, 3] uint8.

        Raises:
            NotFound: it is in no data set, or not whole, or no longer there.
            Conflict: its file is another one now.
        """
        return await self._decode(preprocess.decode, await self.file(image_id), self.limits.image_pixels)

    async def file(self, image_id: str) -> bytes:
        """As `pixels`, undecoded."""
        facts = await self._thread(self.store.facts, *_made(image_id, await self._infos()))
        if facts["part"]:
            raise NotFound(f"{facts['image_uri']} is there in parts ({facts['part']}); only whole images are read")
        data = await self._thread(self.store.storage.read, facts["image_uri"], self.limits.image_bytes)
        if await self._thread(contract.image_id, data) != image_id:
            raise Conflict(f"{facts['image_uri']} is not what was embedded any more")
        return data

    async def decoder_onnx(self, model: str) -> bytes:
        """As segment_anything exports it; `serve_app.model.onnx` names its inputs. Raises NotFound, InvalidSettings."""
        return await self._call(self.decoders[(await self.info(model)).name].onnx.remote())

    async def _infos(self) -> list[ModelInfo]:
        return [await self.info(name) for name in self.names]

    async def segment(self, request: DecodeRequest, model: str) -> MaskSet:
        """Raises InvalidPrompt, InvalidEmbedding, Unavailable."""
        prompts, outputs = request.prompts, 3 if request.multimask else 1
        if len(prompts) > self.limits.prompts:
            raise InvalidPrompt(f"{len(prompts)} prompts for one image; the limit is {self.limits.prompts}")
        if request.logits and len(prompts) * outputs > LOGITS:
            raise InvalidPrompt(f"logits of {len(prompts) * outputs} masks; the limit is {LOGITS} in one request")
        prompts.check(request.original)
        (found,) = await self._call(self.decoders[model].segment.remote([request]))
        return _value(found)

    async def automask(
        self, embedding: Embedding, info: ModelInfo, options: GridOptions, data: bytes | None = None
    ) -> MaskSet:
        """All masks of an image; its file `data` is needed only for crops, which are embedded first.

        Raises:
            InvalidInput, InvalidEmbedding, Unavailable, DeadlineExceeded
        """
        options.check()
        whole, *parts = crops(embedding.original, options)
        views = [(embedding.array, whole)]
        if parts:
            if data is None:
                raise InvalidInput("crop_n_layers needs the image itself: an embedding is of the whole image")
            pixels = await self._decode(preprocess.decode, data, self.limits.image_pixels)
            for start in range(0, len(parts), CROPS_A_CALL):
                some = parts[start : start + CROPS_A_CALL]
                cut = [await self._decode(crop.cut, pixels, info.image_size) for crop in some]
                arrays = await self._call(self.encoders[info.name].encode.remote(cut))
                views += zip(map(_value, arrays), some, strict=True)
        handle = self.decoders[info.name].automask
        (found,) = await self._call(handle.remote([(views, embedding.original)], options))
        return _value(found)

    async def cells(self, data: bytes, info: ModelInfo, options: Options) -> Cells:
        """Every cell of an image, from its file's bytes; large ones in tiles, some of them at a time.

        Raises:
            InvalidInput: an option is out of its range, or the model finds no cells. InvalidImage and its kinds,
            Unavailable, DeadlineExceeded
        """
        if info.name not in self.cellfinders:
            able = ", ".join(self.cellfinders) or "none of those that are served"
            raise InvalidInput(f"model {info.name} finds no cells; models that do: {able}")
        samples: np.ndarray = await self._decode(preprocess.samples, data, self.limits.image_pixels)
        pixels: Pixels = await self._decode(Pixels, samples, options)
        turn = asyncio.Semaphore(TILES_AT_ONCE)

        async def one(place: Place) -> Cells:
            async with turn:
                ready: np.ndarray = await self._decode(pixels.tile, place)
                return await self._cells(ready, info, pixels.bbox_threshold)

        places = seams.tiles(pixels.size, options)
        try:
            async with asyncio.TaskGroup() as group:
                parts = [group.create_task(one(place.seen)) for place in places]
        except* CellrayError as several:
            raise several.exceptions[0] from several
        cells = [part.result() for part in parts]
        found: Cells = await to_thread.run_sync(seams.joined, cells, places, pixels.size, options)
        if len(places) > 1 and seams.too_large(found.areas(), pixels.size, options):
            return await one(pixels.whole)
        return found

    async def _cells(self, ready: np.ndarray, info: ModelInfo, bbox_threshold: float) -> Cells:
        """Of one tile: encoder and cellfinder side by side, then the decoder."""
        array, found = await asyncio.gather(
            self._call(self.encoders[info.name].encode.remote([ready], cells=True)),
            self._call(self.cellfinders[info.name].find.remote([ready])),
        )
        boxes, size = _value(found[0]).above(bbox_threshold), (ready.shape[0], ready.shape[1])
        request = CellsRequest(_value(array[0]), boxes, size)
        (made,) = await self._call(self.decoders[info.name].cells.remote([request]))
        return _value(made)

    async def ready(self) -> None:
        """Every encoder, decoder and cellfinder has a replica, or none for want of work; raises Unavailable otherwise.

        Asks Serve, at most every LOOK_S, and no replica: probes would keep a model awake that nobody uses.
        """
        async with self.looking:
            if time.monotonic() - self.looked > LOOK_S:
                handles = [*self.encoders.values(), *self.decoders.values(), *self.cellfinders.values()]
                try:
                    self.missing = await to_thread.run_sync(_missing, handles, abandon_on_cancel=True)
                except Exception as error:
                    raise foreign(error) from error
                self.looked = time.monotonic()
        if self.missing:
            raise Unavailable(f"no replica yet of {', '.join(self.missing)}")

    async def _call(self, response: Any) -> Any:
        """A replica's answer; Ray's errors become ours. What nobody waits for any more is not begun."""
        started = time.perf_counter()
        try:
            answer = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            raise foreign(error) from error
        if isinstance(answer, Timed):
            telemetry.called(answer.model, time.perf_counter() - started, answer.ran_s)
        return answer


def _missing(handles: Sequence[DeploymentHandle]) -> list[str]:
    """Those deployments that have no replica though they should, by name."""
    apps = serve.status().applications
    found = {one.deployment_name: apps[one.app_name].deployments[one.deployment_name] for one in handles}
    idle = {name: one for name, one in found.items() if "RUNNING" not in one.replica_states}
    return [name for name, one in idle.items() if one.status not in status.GOOD]


def _made(image_id: str, infos: Sequence[ModelInfo]) -> list[str]:
    """The embeddings that there may be of an image."""
    kinds = product(infos, get_args(ComputeDtype), contract.DTYPES)
    return [contract.embedding_id(image_id, info.encoder_sha256, dtype, kept) for info, dtype, kept in kinds]


def foreign(error: Exception) -> CellrayError:
    """What a handle raised, as one of our errors: a full queue, a lost replica, or a defect."""
    from ray.exceptions import RayActorError, RayTaskError

    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, CellrayError):
        return cause
    if isinstance(error, TimeoutError):  # Ray's GetTimeoutError is one
        return DeadlineExceeded("a replica did not answer in time")
    if isinstance(error, BackPressureError):
        return Overloaded("all replicas are busy and their queue is full")
    if isinstance(error, RayActorError) or "DeploymentUnavailable" in type(error).__name__:
        return Unavailable("a replica went away before it answered")
    return Internal(f"a replica failed with {type(cause).__name__}; its log has the cause")


def _value(answer: Any) -> Any:
    if isinstance(answer, CellrayError):
        raise answer
    return answer
