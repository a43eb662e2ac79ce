"""What Serve's HTTP proxy does while a service is about to stop: it takes no new request, and says how many it still
has. `session.start` has Serve put it before everything else. Serve's gRPC proxy has no such place: there the ingress
asks whether it `has_begun`."""

from __future__ import annotations

import json
import os
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import Unavailable

FILE = "DRAINING_FILE_OF_CELLRAY"  # of the environment: what exists once the service is about to stop
CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"  # Ray's, for `middlewares` below
UNDER_WAY = "x-requests-under-way"
REASON = "the service is about to stop; ask again in a moment"
BODY = json.dumps({"error": REASON, "error_type": Unavailable.__name__}).encode()


class Draining:
    """ASGI: 503 with Retry-After for what is new once `file` exists. A request is under way until its last byte was
    taken by the server's socket."""

    def __init__(self, app: ASGIApp, file: str) -> None:
        self.app, self.file, self.under_way = app, file, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if os.path.exists(self.file):
            return await self._refuse(scope, send)
        self.under_way += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.under_way -= 1

    async def _refuse(self, scope: Scope, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1012})  # it restarts
        headers = {
            "content-type": "application/json",
            "content-length": str(len(BODY)),
            "retry-after": str(Unavailable.retry_after_s),
            "connection": "close",
            UNDER_WAY: str(self.under_way),
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 503, "headers": raw})
        await send({"type": "http.response.body", "body": BODY})


def has_begun() -> bool:
    """In a process that `session.start`'s Ray started."""
    return os.path.exists(os.environ.get(FILE, ""))


def middlewares() -> list[Any]:
    """For CALLBACK, in the proxy's process."""
    file = os.environ.get(FILE)
    return [Middleware(Draining, file=file)] if file else []
