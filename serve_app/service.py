"""The operations over handles and the store: embed, segment, automask, models. Knows no protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar, get_args

import anyio.to_thread
import numpy as np
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from cluster import watch
from cluster.errors import (
    CellrayError,
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
from serve_app.contract import Embedding, ModelInfo
from serve_app.model import preprocess
from serve_app.model.masks import MaskSet
from serve_app.model.preprocess import ModelImage
from serve_app.model.prompts import DecodeRequest, GridOptions, Prompts, crops
from serve_app.store import EmbeddingStore

Result = TypeVar("Result")

CROPS_A_CALL = 8  # of one image to an encoder


@dataclass(frozen=True)
class Stored:
    """What names an embedding that was made before: one of the three. `image_uri` and `part` as in its data set."""

    embedding_id: str | None = None
    image_id: str | None = None
    image_uri: str | None = None
    part: str = ""


class Service:
    """One an ingress replica. `handles` are (encoder, decoder) of each named model in turn."""

    def __init__(self, settings: Settings, names: list[str], handles: Sequence[DeploymentHandle]) -> None:
        self.limits = settings.limits
        self.names = names
        self.encoders = dict(zip(names, handles[::2], strict=True))
        self.decoders = dict(zip(names, handles[1::2], strict=True))
        self.store = EmbeddingStore(settings)
        self.infos: dict[str, ModelInfo] = {}

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

    async def embed(self, data: bytes, model: str | None) -> Embedding:
        """Image file bytes → embedding; one whose embedding is in memory does not run the encoder.

        Raises:
            InvalidImage and its kinds, NotFound, Unavailable, DeadlineExceeded
        """
        info = await self.info(model)
        image_id = contract.image_id(data)
        embedding_id = contract.embedding_id(image_id, info.encoder_sha256, info.dtype)
        known = self.store.recall(embedding_id)
        if known:
            return known
        image: ModelImage = await self._decode(self._prepare, data, info.image_size)
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

    def _prepare(self, data: bytes, image_size: int) -> ModelImage:
        return preprocess.prepare(data, image_size, self.limits.image_pixels)

    async def _decode(self, call: Callable[..., Result], *arguments: object) -> Result:
        """In a thread, and within the deadline. A decoder that never ends is ended with this replica, in the end."""

        def watched() -> Result:
            with watch.ending():
                return call(*arguments)

        try:
            async with asyncio.timeout(self.limits.request_timeout_s):
                return await anyio.to_thread.run_sync(watched, abandon_on_cancel=True)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the image was not read within {self.limits.request_timeout_s:g} s") from error

    async def stored(self, what: Stored, model: str | None) -> tuple[Embedding, ModelInfo]:
        """An embedding made before and the model to decode it with: the one named, or the first whose encoder made it.

        Raises:
            NotFound: there is none, or none of the served models has its encoder.
        """
        infos = [await self.info(name) for name in ([model] if model else self.names)]
        found = await anyio.to_thread.run_sync(self._stored, what, infos)
        for info in infos:
            if info.encoder_sha256 == found.encoder_sha256:
                return found, info
        names = model or ", ".join(self.names)
        raise NotFound(f"the embedding was made by another encoder ({found.model}) than that of {names}")

    def _stored(self, what: Stored, infos: list[ModelInfo]) -> Embedding:
        if what.embedding_id:
            return self.store.get(what.embedding_id)
        if what.image_id:
            made = product(infos, get_args(ComputeDtype), contract.DTYPES)
            return self.store.get(
                *(contract.embedding_id(what.image_id, info.encoder_sha256, dtype, kept) for info, dtype, kept in made)
            )
        encoders = [info.encoder_sha256 for info in infos]
        return self.store.of_image(what.image_uri or "", what.part, encoders)

    async def segment(self, embedding: Embedding, model: str, prompts: Prompts, multimask: bool) -> MaskSet:
        """Raises InvalidPrompt, InvalidEmbedding, Unavailable, DeadlineExceeded."""
        if len(prompts) > self.limits.prompts:
            raise InvalidPrompt(f"{len(prompts)} prompts for one image; the limit is {self.limits.prompts}")
        prompts.check(embedding.original)
        request = DecodeRequest(embedding.array, embedding.original, prompts, multimask)
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

    async def ready(self) -> None:
        """Every encoder and decoder has answered once; raises Unavailable otherwise."""
        for handle in (*self.encoders.values(), *self.decoders.values()):
            await self._call(handle.info.remote())

    async def _call(self, response: Any) -> Any:
        """A replica's answer within the deadline; Ray's errors become ours."""
        try:
            return await asyncio.wait_for(response, self.limits.request_timeout_s)
        except TimeoutError as error:
            raise DeadlineExceeded(f"no answer within {self.limits.request_timeout_s:g} s") from error
        except Exception as error:
            raise foreign(error) from error


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


def _value(answer: np.ndarray | MaskSet | CellrayError) -> Any:
    if isinstance(answer, CellrayError):
        raise answer
    return answer
