"""The Python client: images to embeddings and masks by HTTP, typed. It loads neither torch nor Ray.

    from serve_app.client import Client

    with Client("http://127.0.0.1:8000") as cellray:
        cell = cellray.embed("cell.png")
        answer = cellray.segment(embedding_id=cell.embedding_id, boxes=[[120, 80, 310, 260]])
        answer.masks()  # [1, height, width] bool

`AsyncClient` has the same methods, to be awaited. Errors are those of `cluster.errors`, as the service raised them.
Inside a cluster `Client("serve://cellray")` calls the app's replicas by Serve's handles: no proxy between, and no key.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
from anyio.from_thread import BlockingPortal, start_blocking_portal

from cluster import errors
from cluster.errors import CellrayError, DeadlineExceeded, Internal, InvalidInput, NotFound, Unavailable
from serve_app.contract import Embedding, packed, unpacked
from serve_app.model.masks import MaskSet

TIMEOUT_S = 120.0  # of a call, with all that is tried
IN_FLIGHT = 8  # images
BACKOFF_S = 0.5
MOST_ATTEMPTS = 8
AWAY = (429, 500, 502, 503)  # of what lies before the service: Serve answers 500 for an ingress that it lost
SERVE = "serve://"

Image = str | os.PathLike[str] | bytes  # a file's path, or its bytes


@dataclass(frozen=True)
class Masks:
    """An image's masks, and what made them. `found` has their scores, boxes and so on; no object embeddings."""

    model: str
    trained: bool
    embedding_id: str
    image_id: str
    found: MaskSet

    def __len__(self) -> int:
        return len(self.found)

    def masks(self) -> np.ndarray:
        """[N, height, width] bool."""
        return self.found.decode()


class AsyncClient:
    """A connection to a service, kept open between calls. Use it in an `async with`.

    A call that finds the service busy, away or unreachable is tried again, as it says when (Retry-After) or after a
    growing pause, until `timeout_s` have passed.

    url: `http://…`, `https://…`, or `serve://APP` for an app of the cluster that this program runs in.
    key: what the service knows its caller by, where it asks for one.
    """

    def __init__(
        self, url: str, key: str | None = None, timeout_s: float = TIMEOUT_S, in_flight: int = IN_FLIGHT
    ) -> None:
        self.url, self.timeout_s, self.in_flight = url.rstrip("/"), timeout_s, in_flight
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.AsyncClient(
            base_url=url.replace(SERVE, "http://"),
            timeout=timeout_s,
            headers=headers,
            transport=_transport(url, in_flight),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """The models that are served, the default first."""
        return list((await self._call("GET", "/v1/models")).json())

    async def embed(self, image: Image, model: str | None = None) -> Embedding:
        """An image's embedding.

        Raises:
            NotFound: no such file, or model. InvalidImage and its kinds. Unavailable, DeadlineExceeded.
        """
        given = {"model": model} if model else {}
        headers = {"content-type": "application/octet-stream"}
        data = await asyncio.to_thread(_bytes, image)
        return _embedding(await self._call("POST", "/v1/embed", params=given, content=data, headers=headers))

    async def embed_many(
        self, images: Iterable[Image], model: str | None = None
    ) -> AsyncGenerator[tuple[Image, Embedding | CellrayError]]:
        """Each image with its embedding, or with its error, in their order; `in_flight` at a time."""
        waiting: deque[tuple[Image, asyncio.Task[Embedding]]] = deque()
        coming = iter(images)
        try:
            while True:
                while len(waiting) < self.in_flight and (image := next(coming, None)) is not None:
                    waiting.append((image, asyncio.create_task(self.embed(image, model))))
                if not waiting:
                    return
                image, task = waiting[0]
                try:
                    yield image, await task
                except CellrayError as error:
                    yield image, error
                waiting.popleft()
        finally:
            for _, task in waiting:
                task.cancel()

    async def embedding(self, embedding_id: str) -> Embedding:
        """One made before. Raises NotFound."""
        return _embedding(await self._call("GET", f"/v1/embeddings/{embedding_id}"))

    async def segment(self, image: Image | None = None, **request: Any) -> Masks:
        """Masks of an image, or of one embedded before, named by `embedding_id`, `image_id` or `image_uri`.

        request: as the service's `/docs` has it: `boxes`, `points` and `labels`, `masks`; `multimask`, `model`, …;
        arrays or lists, in pixels of the original image. With `logits=True` the answer's `found.logits` are what
        `masks` takes, to refine a mask with a next click.

        Raises:
            NotFound, InvalidInput and its kinds, Unavailable, DeadlineExceeded
        """
        if request.get("masks") is not None:
            request["masks"] = [packed(mask) for mask in request["masks"]]
        return await self._masks("/v1/segment", image, request)

    async def automask(self, image: Image | None = None, **request: Any) -> Masks:
        """Masks of every object, found from a grid of points: `points_per_side`, `pred_iou_thresh` and so on, as
        segment_anything's SamAutomaticMaskGenerator has them. Raises as `segment`."""
        return await self._masks("/v1/automask", image, request)

    async def _masks(self, path: str, image: Image | None, request: dict[str, Any]) -> Masks:
        body = json.dumps({name: value for name, value in request.items() if value is not None}, default=_plain)
        if image is None:
            sent: dict[str, Any] = {"content": body, "headers": {"content-type": "application/json"}}
        else:
            sent = {"files": {"image": ("image", await asyncio.to_thread(_bytes, image))}, "data": {"request": body}}
        return _masks((await self._call("POST", path, **sent)).json())

    async def _call(self, method: str, path: str, **sent: Any) -> httpx.Response:
        end = time.monotonic() + self.timeout_s
        for attempt in range(MOST_ATTEMPTS):
            try:
                answer = await self.http.request(method, path, timeout=max(0.1, end - time.monotonic()), **sent)
                if answer.status_code < 400:
                    return answer
                error, after = _error(answer), _after(answer)
                if not error.retry or isinstance(error, DeadlineExceeded):
                    raise error
            except httpx.TimeoutException:
                raise DeadlineExceeded(f"{self.url}{path} did not answer within {self.timeout_s:g} s") from None
            except httpx.TransportError as lost:
                error, after = Unavailable(f"{self.url} could not be reached: {lost or type(lost).__name__}"), 0.0
            pause = max(after, BACKOFF_S * 2**attempt) * random.uniform(1, 1.5)
            if attempt + 1 == MOST_ATTEMPTS or time.monotonic() + pause > end:
                raise error
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")


class Client:
    """`AsyncClient` for programs that do not await. Use it in a `with`, or `close` it; threads may share it."""

    def __init__(
        self, url: str, key: str | None = None, timeout_s: float = TIMEOUT_S, in_flight: int = IN_FLIGHT
    ) -> None:
        self._context: AbstractContextManager[BlockingPortal] = start_blocking_portal()
        self._portal = self._context.__enter__()
        self._client = self._portal.call(AsyncClient, url, key, timeout_s, in_flight)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._portal.call(self._client.__aexit__)
        self._context.__exit__(None, None, None)

    def models(self) -> list[dict[str, Any]]:
        """As `AsyncClient.models`."""
        return self._portal.call(self._client.models)

    def embed(self, image: Image, model: str | None = None) -> Embedding:
        """As `AsyncClient.embed`."""
        return self._portal.call(self._client.embed, image, model)

    def embed_many(
        self, images: Iterable[Image], model: str | None = None
    ) -> Iterator[tuple[Image, Embedding | CellrayError]]:
        """As `AsyncClient.embed_many`."""
        with self._portal.wrap_async_context_manager(aclosing(self._client.embed_many(images, model))) as found:
            while True:
                try:
                    yield self._portal.call(found.__anext__)
                except StopAsyncIteration:
                    return

    def embedding(self, embedding_id: str) -> Embedding:
        """As `AsyncClient.embedding`."""
        return self._portal.call(self._client.embedding, embedding_id)

    def segment(self, image: Image | None = None, **request: Any) -> Masks:
        """As `AsyncClient.segment`."""

        return self._portal.call(partial(self._client.segment, image, **request))

    def automask(self, image: Image | None = None, **request: Any) -> Masks:
        """As `AsyncClient.automask`."""
        return self._portal.call(partial(self._client.automask, image, **request))


def _transport(url: str, connections: int) -> httpx.AsyncBaseTransport:
    if url.startswith(SERVE):
        from serve_app.handle import HandleTransport

        return HandleTransport(url.removeprefix(SERVE).strip("/"))
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncHTTPTransport(limits=limits)


def _bytes(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"{os.fspath(image)} was not found") from error
    except OSError as error:
        raise InvalidInput(f"{os.fspath(image)} cannot be read: {error.strerror}") from error


def _plain(value: Any) -> Any:
    """Arrays as lists, numpy's numbers as Python's. Raises TypeError for what is neither."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} in a request: expected numbers, lists or arrays")


def _embedding(answer: httpx.Response) -> Embedding:
    facts = answer.headers
    shape, original, read = (
        tuple(map(int, facts[name].split(","))) for name in ("x-shape", "x-original-size", "x-input-size")
    )
    return Embedding(
        embedding_id=facts["x-embedding-id"],
        image_id=facts["x-image-id"],
        model=facts["x-model"],
        encoder_sha256=facts["x-encoder-sha256"],
        original=(original[0], original[1]),
        input=(read[0], read[1]),
        array=np.frombuffer(answer.content, np.dtype(facts["x-dtype"]).newbyteorder("<")).reshape(shape),
    )


def _masks(answer: dict[str, Any]) -> Masks:
    found = answer["masks"]

    def column(name: str, dtype: str, *shape: int) -> np.ndarray:
        return np.array([mask[name] for mask in found], dtype).reshape(len(found), *shape)

    masks = MaskSet(
        size=tuple(found[0]["segmentation"]["size"]) if found else (answer["height"], answer["width"]),
        counts=[mask["segmentation"]["counts"] for mask in found],
        boxes=column("bbox", "f4", 4),
        areas=column("area", "i8"),
        predicted_iou=column("predicted_iou", "f4"),
        stability=column("stability_score", "f4"),
        prompt_index=column("prompt_index", "i4"),
        object_embeddings=np.zeros((len(found), 0), np.float32),
        logits=np.stack([unpacked(**mask["logits"]) for mask in found]) if found and "logits" in found[0] else None,
    )
    return Masks(answer["model"], answer["trained"], answer["embedding_id"], answer["image_id"], masks)


def _after(answer: httpx.Response) -> float:
    """Seconds to wait, where it says so; a date is not looked at."""
    said = answer.headers.get("retry-after", "")
    return float(said) if said.isascii() and said.isdigit() else 0.0


def _error(answer: httpx.Response) -> CellrayError:
    """As the service raised it; of what lies before the service, by status."""
    try:
        body = answer.json()
        kind, message = getattr(errors, body["error_type"]), body["error"]
        if issubclass(kind, CellrayError):
            return kind(message)
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    text = f"{answer.request.url} answered {answer.status_code}: {answer.text[:200]}"
    if answer.status_code in AWAY:
        return Unavailable(text)
    if answer.status_code == DeadlineExceeded.http_status:
        return DeadlineExceeded(text)
    return InvalidInput(text) if answer.status_code < 500 else Internal(text)
