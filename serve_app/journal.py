"""What each HTTP request came to: a line in the log, the metrics, and headers that say what its time went to. Pure
ASGI; bodies pass through and are only counted."""

from __future__ import annotations

import logging
import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster import telemetry
from serve_app.guard import KEY

log = logging.getLogger("ray.serve")

CLIENT_LEFT = 499  # as nginx calls it: nobody was there to be answered
REJECTIONS = {401: "key", 403: "key", 413: "size", 429: "rate", 503: "busy"}
OTHER = "other"  # what no route has: it is the client's, and no label


class Journal:
    """The ASGI application, with a journal of its requests."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        entry = _Entry(scope, receive, send)
        token = telemetry.spent.set(entry.spent)
        try:
            await self.app(scope, entry.receive, entry.send)
        finally:
            telemetry.spent.reset(token)
            entry.close()


def route(scope: Scope) -> str:
    """The template that the request's path fits, once it is routed; never the path itself."""
    return getattr(scope.get("route"), "path", OTHER)


class _Entry:
    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self.started, self.spent = time.perf_counter(), telemetry.Spent()
        self.status = self.received = self.sent = 0

    async def receive(self) -> Message:
        message = await self._receive()
        self.received += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-total-time"] = _ms(time.perf_counter() - self.started)
            headers["x-queue-time"] = _ms(self.spent.queued_s)
            headers["x-inference-time"] = _ms(self.spent.ran_s)
        await self._send(message)
        self.sent += len(message.get("body", b""))

    def close(self) -> None:
        path, status, seconds = route(self.scope), self.status or CLIENT_LEFT, time.perf_counter() - self.started
        telemetry.observe(telemetry.REQUEST_SECONDS, seconds, route=path, status=str(status))
        telemetry.count(telemetry.BYTES_IN, self.received, route=path)
        telemetry.count(telemetry.BYTES_OUT, self.sent, route=path)
        if status in REJECTIONS:
            telemetry.count(telemetry.REJECTED, reason=REJECTIONS[status])
        facts = {
            "method": self.scope["method"],
            "path": path,
            "status": status,
            "ms": round(1000 * seconds, 1),
            "key": self.scope.get(KEY, ""),
            "received": self.received,
            "sent": self.sent,
        }
        log.info("{method} {path} {status} in {ms} ms".format_map(facts), extra=facts)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"
