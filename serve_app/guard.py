"""Who may: keys and their rates, for HTTP and gRPC. As ASGI middleware it neither reads nor holds a body."""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Callable, Iterable
from math import ceil
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import CellrayError, Forbidden, InvalidSettings, RateLimited, Unauthorized
from cluster.keys import KeysFile
from cluster.settings import ServiceSettings
from serve_app import answers

KEY = "cellray.key"  # in a request's scope: the name of its key, "" where none is asked for
OPEN_PATHS = ("", "/", "/docs", "/openapi.json", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
OPEN_BELOW = "/web/"
HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"  # in Ray's environment: Serve's proxies are HAProxy
SECOND = 1_000_000_000  # ns
POLICY = 1008  # websocket: refused


class Bucket:
    """So many requests a minute, and as many at once after a rest."""

    def __init__(self, per_minute: int) -> None:
        self.interval = -(-60 * SECOND // per_minute)  # ns
        self.burst = (per_minute - 1) * self.interval
        self.paid_until = 0  # ns: what was taken ends here, at one an interval

    def take(self, now: int) -> int:
        """0 if there was one at `now` (ns), else the ns until there is."""
        start = max(self.paid_until, now)
        wait = start - now - self.burst
        if wait > 0:
            return wait
        self.paid_until = start + self.interval
        return 0


class Guard:
    """The settings' keys and rates, in one ingress replica; `host` is what its Serve listens on for HTTP.

    Raises:
        InvalidSettings: the keys file is broken; or there is none, and the host is not loopback.
    """

    def __init__(
        self, settings: ServiceSettings, host: str | None, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        if settings.keys is None and not is_loopback(host):
            raise InvalidSettings(
                f"Serve listens on {host or 'all addresses'} and the settings have no service.keys: make a keys file "
                "with `cellray key NAME`, or set http_options.host to 127.0.0.1"
            )
        self.keys = KeysFile(settings.keys) if settings.keys else None
        self.per_minute, self.origins, self.clock = settings.requests_per_minute, settings.allow_origins, clock
        self.proxied = os.environ.get(HAPROXY) == "1"
        self.buckets: dict[tuple[str, int], Bucket] = {}

    def check(self, authorization: Iterable[bytes]) -> str:
        """The values of a request's authorization headers → its key's name, "" without a keys file.

        Raises:
            Unauthorized, RateLimited
        """
        name, rate = "", self.per_minute
        if self.keys:
            key = self.keys.find(_bearer(authorization))
            if key is None:
                raise Unauthorized("this key is not known here")
            name, rate = key.name, key.per_minute or rate
        if rate:
            wait = self.buckets.setdefault((name, rate), Bucket(rate)).take(self.clock())
            if wait:
                error = RateLimited(f"more than {rate} requests a minute; the next may come in {wait / SECOND:.3g} s")
                error.retry_after_s = ceil(wait / SECOND)
                raise error
        return name

    def check_grpc(self, context: Any) -> str:
        """Of a gRPC call, by its context: metadata `authorization: Bearer KEY` → the key's name.

        Raises:
            Unauthorized, RateLimited. Forbidden: there is no keys file, and the caller is on another machine, or
            may be: HAProxy in the place of Serve's proxy calls for everybody.
        """
        if self.keys is None and self.proxied:
            raise Forbidden(f"the service has no keys file, and with {HAPROXY} nobody knows who calls by gRPC")
        if self.keys is None and not _is_loopback_peer(context.peer()):
            raise Forbidden("the service has no keys file and answers this machine only")
        pairs = ((key.lower(), value) for key, value in context.invocation_metadata())
        given = (value for key, value in pairs if key == "authorization")
        return self.check(value if isinstance(value, bytes) else value.encode() for value in given)


class Guarded:
    """The ASGI application behind a guard."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self.app, self.guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # none is served here
            await send({"type": "websocket.close", "code": POLICY})
            return
        if scope["type"] == "http" and not is_open(scope):
            try:
                scope[KEY] = self.guard.check(value for name, value in scope["headers"] if name == b"authorization")
            except CellrayError as error:
                await answers.error(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def is_open(scope: Scope) -> bool:
    """Whether the request needs no key."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path in OPEN_PATHS or path.startswith(OPEN_BELOW)


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches that host; None and "" are all addresses."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _is_loopback_peer(peer: str) -> bool:
    """`ipv4:127.0.0.1:50412`, `ipv6:%5B::1%5D:50412` or `unix:…`, as gRPC names who calls."""
    kind, _, address = peer.partition(":")
    return kind == "unix" or is_loopback(unquote(address).rpartition(":")[0].strip("[]"))


def _bearer(authorization: Iterable[bytes]) -> bytes:
    given = list(authorization)
    if not given:
        raise Unauthorized("no key: send the header `authorization: Bearer KEY`")
    scheme, _, secret = given[0].strip().partition(b" ")
    if len(given) > 1 or scheme.lower() != b"bearer" or not secret.strip():
        raise Unauthorized("the header authorization is not `Bearer KEY`")
    return secret.strip()
