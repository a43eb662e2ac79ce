"""HTTP, thin, over Service: routes. What comes in is read in `bodies`, what goes out is written in `answers`."""

from __future__ import annotations

import io
import logging
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

from anyio import to_thread
from fastapi import FastAPI, Path, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster import scrape
from cluster.errors import CellrayError, Internal, InvalidInput, NotFound
from serve_app import answers, bodies, contract, journal, oip_http, pages
from serve_app.answers import FOREVER
from serve_app.bodies import NAMED, AutomaskBody, ImageBody, SegmentBody
from serve_app.contract import Embedding, Made, ModelInfo
from serve_app.guard import Guard, Guarded
from serve_app.journal import Journal
from serve_app.model.masks import MaskSet
from serve_app.model.prompts import DecodeRequest
from serve_app.service import Service, Stored

log = logging.getLogger("ray.serve")

UNTRAINED = "untrained: random weights, the numbers mean nothing"
COMPONENTS = "#/components/schemas/{model}"  # where FastAPI keeps its models' schemas
MOST_LISTED = 100
FEW = 8  # masks that are written at once, others in a thread
PREVIEW, MOST_PREVIEW = 1024, 4096  # pixels of the long side
ONNX_TYPE = "application/octet-stream"
SHA256 = {"pattern": "^[0-9a-f]{64}$"}
Identity = Annotated[str, Path(description="sha256 in hex", json_schema_extra=SHA256)]
Pooled = Annotated[bool, Query(description="only the mean over the image, float32")]


def create_app(service: Service, guard: Guard | None) -> FastAPI:
    """The application of one ingress replica, behind the guard where there is one."""
    keys = [Security(HTTPBearer(auto_error=False))] if guard and guard.keys else []  # said here, checked by the guard
    app = FastAPIOffline(
        title="Cellray",
        version=version("cellray"),
        description="Segment Anything embeddings and instance masks.",
        dependencies=keys,
        redoc_url=None,
        static_url="/web/docs",
    )
    app.exception_handler(CellrayError)(_error)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_no_route)
    app.add_middleware(Edge, service=service)
    if guard:
        app.add_middleware(Guarded, guard=guard)
    app.add_middleware(Journal)
    if guard and guard.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=guard.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    limit = service.limits.image_bytes

    pages.add_page(app)

    @app.get("/healthz", summary="This ingress is alive", responses=answers.FEW_ERRORS)
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Every model can be asked; wakes none", responses=answers.FEW_ERRORS)
    async def readyz() -> dict[str, str]:
        await service.ready()
        return {"status": "ready"}

    @app.get(
        "/metrics",
        summary="What Cellray does on the whole cluster, for Prometheus",
        responses=answers.METRICS_ANSWERS,
        response_class=Response,
    )
    async def metrics() -> Response:
        """Replicas report every few seconds."""
        return Response(await scrape.cluster_metrics(), media_type=scrape.CONTENT_TYPE)

    @app.get(
        "/v1/models",
        summary="The models that are served, their hashes, sizes and licences",
        responses=answers.MODELS_ANSWERS,
    )
    async def models() -> list[dict[str, Any]]:
        return [
            {
                **asdict(info),
                "embedding_shape": info.embedding_shape,
                "cells": info.name in service.cellfinders,
                "note": None if info.trained else UNTRAINED,
            }
            for info in await service.models()
        ]

    @app.get(
        "/v1/models/{model}/decoder.onnx",
        summary="A model's decoder, for browsers and other programs that have embeddings",
        responses=answers.ONNX_ANSWERS,
        response_class=Response,
    )
    async def onnx(request: Request, model: str) -> Response:
        """Inputs and outputs have the names of segment_anything's own export."""
        tag = f'"{(await service.info(model)).decoder_sha256}"'
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers={"etag": tag})
        return Response(await service.decoder_onnx(model), media_type=ONNX_TYPE, headers={"etag": tag})

    @app.post(
        "/v1/embed",
        summary="An image's embedding, or those of many",
        responses=answers.EMBEDDING_ANSWERS,
        response_class=Response,
        openapi_extra=bodies.documented(None),
    )
    async def embed(request: Request, model: Annotated[str | None, Query()] = None, pooled: Pooled = False) -> Response:
        """The body is the image file itself, or multipart with one part `image` or several. The answer to one is
        float16, C order, little-endian; its shape and ids stand in `x-…` headers. `Accept: application/x-npz` gives all
        as one npz, as several images are always answered: a row each, with its error in place of one that failed."""
        sent, accept = await bodies.read(request, limit), request.headers.get("accept", "")
        if not sent.images:
            raise InvalidInput("no image: send the file as the body, or as the multipart part 'image'")
        if len(sent.images) > 1:
            names, images = zip(*sent.images, strict=True)
            made = await service.embed_many(images, model)
            info = await service.info(model)
            return await to_thread.run_sync(
                answers.embeddings, list(zip(names, made, strict=True)), info, accept, pooled
            )
        found = await service.embed(sent.images[0][1], model)
        return answers.embedding(found, await service.info(model), accept, pooled)

    @app.get(
        "/v1/embeddings/{embedding_id}",
        summary="An embedding made before",
        responses={**answers.EMBEDDING_ANSWERS, **answers.SAME},
        response_class=Response,
    )
    async def embeddings(request: Request, embedding_id: Identity, pooled: Pooled = False) -> Response:
        """As `/v1/embed` answers; what an id names never changes, so caches may keep it."""
        accept = request.headers.get("accept", "")
        tag = answers.tag(embedding_id, accept, pooled)
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers={"etag": tag, **FOREVER})
        found, info = await service.stored(Stored(embedding_id), None)
        response = answers.embedding(found, info, accept, pooled)
        response.headers.update(FOREVER)
        return response

    async def image_of(body: ImageBody, image: bytes | None) -> tuple[Embedding, ModelInfo]:
        stored = body.stored()
        if stored and image is None:
            return await service.stored(stored, body.model)
        if image is not None and not stored:
            return await service.embed(image, body.model), await service.info(body.model)
        raise InvalidInput(f"send either an image (multipart) or one of {', '.join(NAMED)}, not both, not neither")

    @app.post(
        "/v1/segment",
        summary="Masks from boxes, points and earlier masks",
        responses=answers.MASKS_ANSWERS,
        response_class=Response,
        openapi_extra=bodies.documented(SegmentBody.model_json_schema(ref_template=COMPONENTS)),
    )
    async def segment(request: Request) -> Response:
        """JSON that names an image embedded before, by `embedding_id`, `image_id` or `image_uri`, which never runs the
        encoder; or multipart with parts `image` and `request`. `Accept: image/png` or `application/octet-stream` gives
        one label map of uint16 in place of JSON: object i + 1 for prompt i. With `prompts: cells` every cell is found,
        by a model whose `cells` is true in `/v1/models`; they do not overlap."""
        sent = await bodies.read(request, limit)
        body = SegmentBody.parse(sent.text)
        if options := body.cells():
            data, info, stored = sent.image(), await service.info(body.model), body.stored()
            if data is None and body.image_id:
                data = await service.file(body.image_id)
            elif data is None or stored:
                raise InvalidInput("prompts: cells needs the image (multipart), or the image_id of one in a data set")
            cells = await service.cells(data, info, options)
            made = Made.of(await to_thread.run_sync(contract.image_id, data), info)
            accept = request.headers.get("accept", "")
            return await to_thread.run_sync(answers.cells, cells, made, info, accept, body.encoding)
        prompts = body.asked(service.limits.prompts)
        found, info = await image_of(body, sent.image())
        low = body.resolution == "low"
        asked = DecodeRequest(found.array, found.original, prompts, body.multimask, low, body.logits)
        masks = await service.segment(asked, info.name)
        return await _answered(request, masks, found, info, body.encoding, True)

    @app.post(
        "/v1/automask",
        summary="Masks of every object",
        responses=answers.MASKS_ANSWERS,
        response_class=Response,
        openapi_extra=bodies.documented(AutomaskBody.model_json_schema(ref_template=COMPONENTS)),
    )
    async def automask(request: Request) -> Response:
        """As `/v1/segment`, from a grid of points over the image in place of prompts."""
        sent = await bodies.read(request, limit)
        body, image = AutomaskBody.parse(sent.text), sent.image()
        options = body.options()
        found, info = await image_of(body, image)
        masks = await service.automask(found, info, options, image)
        return await _answered(request, masks, found, info, body.encoding, False)

    @app.get("/v1/images", summary="The images of the service's data sets", responses=answers.IMAGES_ANSWERS)
    async def images(
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 24,
        after: Annotated[str, Query(description="`next` of the answer before")] = "",
    ) -> dict[str, Any]:
        """What can be segmented without being sent. A page may be shorter than `limit`; the last has no `next`."""
        found, following = await service.images(after, limit)
        return {"images": found, "next": following or None}

    @app.get(
        "/v1/images/{image_id}",
        summary="What an image of the data sets looks like",
        responses=answers.PREVIEW_ANSWERS,
        response_class=Response,
    )
    async def preview(
        request: Request, image_id: Identity, size: Annotated[int, Query(ge=16, le=MOST_PREVIEW)] = PREVIEW
    ) -> Response:
        """A JPEG whose long side has at most `size` pixels, with contrast as the model sees it."""
        tag = f'"{image_id}.{size}"'
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers={"etag": tag, **FOREVER})
        pixels = await service.pixels(image_id)
        data = await to_thread.run_sync(_jpeg, pixels, size)
        headers = {"etag": tag, "x-original-size": f"{pixels.shape[0]},{pixels.shape[1]}", **FOREVER}
        return Response(data, media_type="image/jpeg", headers=headers)

    oip_http.add_routes(app, service)
    return app


async def _answered(
    request: Request, masks: MaskSet, found: Embedding, info: ModelInfo, encoding: str, by_prompt: bool
) -> Response:
    accept = request.headers.get("accept", "")
    made = partial(answers.segmentation, masks, found, info, accept, encoding, by_prompt)
    quick = len(masks) <= FEW and encoding == "rle" and not answers.is_map(accept)
    return made() if quick else await to_thread.run_sync(made)


def _jpeg(pixels: Any, size: int) -> bytes:
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((size, size))
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


async def _error(_: Request, error: Exception) -> Response:
    assert isinstance(error, CellrayError)
    return answers.error(error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return await _error(request, InvalidInput(f"{'.'.join(map(str, first['loc']))}: {first['msg']}"))


async def _no_route(_: Request, error: Exception) -> Response:
    """There is no such path, or not with that method. What was asked for is not repeated: a key may be in it."""
    assert isinstance(error, HTTPException)
    missing = error.status_code == NotFound.http_status
    text = f"{error.detail}: /docs has all that there is"
    response = answers.error(NotFound(text) if missing else InvalidInput(text))
    response.status_code = error.status_code
    response.headers.update(error.headers or {})
    return response


class Edge:
    """Around every request: the deadline, and a defect of ours as JSON without its traceback."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            async with self.service.deadline():
                await self.app(scope, receive, watched)
        except Exception as error:
            if not isinstance(error, CellrayError):
                log.exception(f"{scope['method']} {journal.route(scope)} failed")
                error = Internal("an internal error; the service's log has the cause")
            if not begun:
                await answers.error(error)(scope, receive, send)
