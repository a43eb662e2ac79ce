"""A Ray cluster by its dashboard's HTTP, the door that `ray job submit` and `serve deploy` use: whoever asks joins no
cluster, and needs neither its Ray nor its network."""

from __future__ import annotations

import ipaddress
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from cluster.errors import CellrayError, Conflict, Forbidden, InvalidInput, InvalidSettings, Unauthorized, Unavailable

ADDRESS, MODE = "RAY_ADDRESS", "RAY_AUTH_MODE"
TOKEN, TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
TIMEOUT_S = 15.0
DEPLOY_TIMEOUT_S = 90.0  # the first one starts Serve
GONE_TIMEOUT_S, POLL_S = 120.0, 0.5
MAX_TOKEN_BYTES = 4096
EVERYWHERE = (None, "", "0.0.0.0", "::")
APPLICATIONS = "/api/serve/applications/"


@dataclass(frozen=True)
class Node:
    """A living node; `resources` are in Ray's units: CPUs, GPUs, bytes of memory."""

    name: str
    head: bool
    resources: dict[str, float]


@dataclass(frozen=True)
class Versions:
    ray: str
    python: str | None  # a cluster may not say


class Dashboard:
    """Each call raises Unavailable where nothing (or something else) answers in time, Unauthorized where the cluster
    asks for a token and none is to be had, Forbidden where it refuses this one."""

    def __init__(self, address: str) -> None:
        """`address`: `http://HOST:8265`, `HOST:6379` or `auto`, the cluster that runs on this machine."""
        self.url = _url(address)
        self.shown = _without_user(self.url)

    @cached_property
    def loopback(self) -> bool:
        host = urlsplit(self.url).hostname or ""
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def versions(self) -> Versions:
        ray = self._get("/api/version").get("ray_version", "")
        try:
            data = self._get("/api/v0/cluster_metadata").get("data") or {}
        except CellrayError:
            data = {}
        return Versions(str(ray), data.get("pythonVersion"))

    def nodes(self) -> list[Node]:
        answer = self._get("/api/v0/nodes?detail=1")
        try:
            listed = answer["data"]["result"]["result"]
            return [
                Node(str(one["node_ip"]), bool(one["is_head_node"]), dict(one.get("resources_total") or {}))
                for one in listed
                if one["state"] == "ALIVE"
            ]
        except (KeyError, TypeError) as error:
            raise Unavailable(f"{self.shown} lists its nodes in a way that is not known here") from error

    def serve(self) -> dict[str, Any]:
        """Serve's details of itself: `applications` by name, and so on; {} where Serve does not run."""
        return self._get(APPLICATIONS)

    def http(self, options: Mapping[str, Any] | None) -> str:
        """The URL of Serve's HTTP by its `http_options`, "" without any. All addresses are shown as the cluster's."""
        if not options:
            return ""
        host = options["host"] if options["host"] not in EVERYWHERE else urlsplit(self.url).hostname
        return f"http://{host}:{options['port']}"

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Serve starts where it does not run yet. What the config does not change keeps running.

        Raises:
            InvalidSettings: Serve refused the config. Conflict: Serve has other applications, which this would remove.
        """
        self._check_alone([one.get("name", "default") for one in config["applications"]], "deploy")
        self._send("PUT", APPLICATIONS, DEPLOY_TIMEOUT_S, json=dict(config))

    def remove(self, names: list[str]) -> None:
        """These applications, and Serve with them; returns once they are gone.

        Raises:
            Conflict: Serve has others, too. Unavailable: they are not gone within GONE_TIMEOUT_S.
        """
        self._check_alone(names, "remove")
        self._send("DELETE", APPLICATIONS, DEPLOY_TIMEOUT_S)
        deadline = time.monotonic() + GONE_TIMEOUT_S
        while left := self._left():
            if time.monotonic() > deadline:
                raise Unavailable(f"{', '.join(left)} on {self.shown} did not end within {GONE_TIMEOUT_S:.0f} s")
            time.sleep(POLL_S)

    def _left(self) -> list[str]:
        try:
            return sorted(self.serve().get("applications") or {})
        except Unavailable:
            return ["what the dashboard does not say"]

    def last_message(self, node_id: str, log: str) -> str:
        """The last line that a replica logged; "" where it cannot be had. `log` is below the node's logs folder."""
        query = {"node_id": node_id, "filename": log.lstrip("/"), "lines": "1", "timeout": str(int(TIMEOUT_S))}
        try:
            text = self._send("GET", "/api/v0/logs/file", params=query).text
        except CellrayError:
            return ""
        lines = text.strip().splitlines()
        try:
            return str(json.loads(lines[-1][lines[-1].index("{") :])["message"]) if lines else ""
        except (ValueError, KeyError, TypeError):
            return lines[-1]

    def open(self) -> bool:
        """Whether the cluster answers who has no token."""
        return self._answer("GET", "/api/version", {}, TIMEOUT_S).status_code not in (401, 403)

    def _check_alone(self, names: list[str], what: str) -> None:
        others = sorted(set(self.serve().get("applications") or {}) - set(names))
        if others:
            raise Conflict(
                f"Serve on {self.shown} has other applications, too: {', '.join(others)}. To {what} here would end "
                "them: put all of them into one file and `serve deploy` it"
            )

    def _get(self, path: str) -> dict[str, Any]:
        try:
            found = self._send("GET", path).json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Unavailable(f"what answers on {self.shown} is no Ray dashboard")
        return found

    def _send(self, method: str, path: str, timeout_s: float = TIMEOUT_S, **options: Any) -> httpx.Response:
        token, where = ("", "") if os.environ.get(MODE) != "token" and not self.loopback else find_token()
        headers = {"authorization": f"Bearer {token}"} if token else {}
        answer = self._answer(method, path, headers, timeout_s, **options)
        if answer.status_code == 401:
            raise Unauthorized(
                f"{self.shown} asks for a Ray token and was sent none: export {MODE}=token, with the cluster's token "
                f"in {TOKEN}, in the file that {TOKEN_PATH} names, or in ~/.ray/auth_token"
            )
        if answer.status_code == 403:
            raise Forbidden(f"{self.shown} refuses the Ray token of {where or 'nobody'}: it is another cluster's")
        if answer.status_code == 400:
            raise InvalidSettings(f"Serve refused the configuration: {answer.text[:1000]}")
        if answer.status_code == 404:
            raise Unavailable(f"what answers on {self.shown} is no Ray dashboard: it has no {path}")
        if answer.status_code >= 300:
            raise Unavailable(f"{self.shown} answered {answer.status_code} to {path}: {answer.text[-300:]}")
        return answer

    def _answer(
        self, method: str, path: str, headers: dict[str, str], timeout_s: float, **options: Any
    ) -> httpx.Response:
        try:
            with httpx.Client(timeout=timeout_s, trust_env=not self.loopback) as client:
                return client.request(method, self.url + path, headers=headers, **options)
        except httpx.TimeoutException:
            raise Unavailable(f"{self.shown} did not answer within {timeout_s:.0f} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(f"no Ray dashboard answers on {self.shown}: {error or type(error).__name__}") from None


def find_token() -> tuple[str, str]:
    """(Ray's token, where it was found), ("", "") where there is none. In the order that Ray looks.

    Raises:
        InvalidSettings: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    if token := os.environ.get(TOKEN, "").strip():
        return token, TOKEN
    named = os.environ.get(TOKEN_PATH)
    path = Path(named) if named else Path("~/.ray/auth_token").expanduser()
    try:
        with path.open("rb") as file:
            return file.read(MAX_TOKEN_BYTES).decode("ascii", "replace").strip(), str(path)
    except OSError as error:
        if named:
            raise InvalidSettings(f"{TOKEN_PATH}: {path} cannot be read: {error.strerror}") from None
        return "", ""


def _url(address: str) -> str:
    scheme, split, _ = address.partition("://")
    if split:
        if scheme not in ("http", "https") or not urlsplit(address).hostname:
            raise InvalidInput(f"{_without_user(address)} is no address of Ray's; expected {EXPECTED}")
        return address.rstrip("/")
    from ray.dashboard.utils import ray_address_to_api_server_url

    try:
        return str(ray_address_to_api_server_url(address))
    except ValueError as error:
        raise InvalidInput(f"{address!r} is no address of Ray's ({error}); expected {EXPECTED}") from None
    except Exception as error:  # Ray's own have no common root
        raise Unavailable(f"no Ray cluster answers on {address}: {type(error).__name__}: {error}") from None


EXPECTED = "http://HOST:8265 (its dashboard), HOST:6379, or auto for the one on this machine"


def _without_user(url: str) -> str:
    """Without name and password, which may stand before the host."""
    scheme, split, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{split}{host.rpartition('@')[2]}{slash}{path}"
