"""HTTP requests over a Serve handle, for clients inside the cluster: no proxy, no port, no key."""

from __future__ import annotations

import asyncio

import httpx
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.types import ASGIApp

from cluster import session
from serve_app.contract import INGRESS

Answer = tuple[int, list[tuple[bytes, bytes]], bytes]  # status, headers, body


class HandleTransport(httpx.AsyncBaseTransport):
    """To the app of that name on this cluster. Whole bodies, both ways.

    Raises:
        Unavailable: no cluster. NotFound: the app is not deployed.
    """

    def __init__(self, app: str) -> None:
        session.connect()
        session.replicas(app)
        self.handle = serve.get_deployment_handle(INGRESS, app_name=app)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        timeout = request.extensions.get("timeout", {}).get("read")
        call = self.handle.http.remote(request.method, str(request.url), request.headers.raw, body)
        try:
            async with asyncio.timeout(timeout):
                status, headers, content = await call
        except asyncio.CancelledError:
            call.cancel()
            raise
        except TimeoutError as error:
            call.cancel()
            raise httpx.ReadTimeout(f"no answer within {timeout} s") from error
        except (BackPressureError, RayActorError, DeploymentUnavailableError) as error:
            raise httpx.ConnectError(f"{type(error).__name__}: all replicas are busy, or one went away") from error
        return httpx.Response(status, headers=headers, content=content)


async def answer(app: ASGIApp, method: str, url: str, headers: list[tuple[bytes, bytes]], body: bytes) -> Answer:
    """The other end: what an ASGI application says to such a request."""
    request = httpx.Request(method, url, headers=headers, content=body)
    answer = await httpx.ASGITransport(app, raise_app_exceptions=False).handle_async_request(request)
    return answer.status_code, answer.headers.raw, await answer.aread()
