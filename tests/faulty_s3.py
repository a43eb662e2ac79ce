"""An S3 server that fails: a proxy before a real one (tests.s3) that answers 503, stalls, resets, cuts short, loses
replies and refuses, and that kills who asks, or who computes, before and after a request.

Which random fault falls on which request is a function of the seed, the run, the request, and how often it came before;
faults that are armed hit the first fitting request from some number of requests on.
"""

from __future__ import annotations

import http.client
import os
import random
import re
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

STALL_S, READ_TIMEOUT_S = 3.0, 2.0  # who waits gives up, tries again, and the first request is done all the same
SHARE, SLOW_SHARE = 0.05, 0.25  # of the requests of a run with faults; of the stalls among them, which take long
BEFORE, AFTER = "before", "after"
READS, WRITES = ("head", "list", "get"), ("put", "create", "part", "complete", "abort")
DRIVER, WORKER, REPLICA = "kill driver", "kill worker", "kill replica"
KILLS = (DRIVER, WORKER, REPLICA)
SIDES = {"503": BEFORE, "slow": BEFORE, "reset": BEFORE, "short": AFTER, "lost": AFTER, "412": AFTER, "409": BEFORE}

# What a job asks of S3. Drivers: at first `exists` and `list`, when they go on `get` too. Workers: a large file goes up
# in parts; what is there already (412) is looked at. The benchmark fails at an operation that is missing here.
OPERATIONS = {
    "driver": {
        "images": ("head", "list"),
        "plan": ("head", "list", "put", "get"),
        "records": ("head", "list", "get"),
        "report": ("put",),
    },
    "worker": {
        "images": ("get",),
        "embeddings": ("put", "create", "part", "complete", "abort", "head", "get"),
        "errors": ("put", "head", "get"),
        "records": ("put", "head", "get"),
    },
}
CREATE_ONLY = {"plan": ("put",), "embeddings": ("put", "complete"), "errors": ("put",), "records": ("put",)}


class Operation(NamedTuple):
    """Who asks (driver or worker), what for, and of which files."""

    who: str
    verb: str
    what: str

    def __str__(self) -> str:
        return " ".join(self)


class Fault(NamedTuple):
    kind: str
    operation: Operation
    side: str

    def __str__(self) -> str:
        return f"{self.kind} {self.side} {self.operation}"


def everything() -> list[Fault]:
    """Every fault at every point where it can happen."""
    made = []
    for who, files in OPERATIONS.items():
        for what, verbs in files.items():
            for operation in (Operation(who, verb, what) for verb in verbs):
                made += [Fault(kind, operation, SIDES[kind]) for kind in fitting(operation)]
                kills = (DRIVER,) if who == "driver" else KILLS
                made += [Fault(kind, operation, side) for kind in kills for side in (BEFORE, AFTER)]
    return made


def fitting(operation: Operation) -> list[str]:
    """The faults, but for kills, that S3 can have there."""
    _, verb, what = operation
    kinds = ["503", "slow", "reset"]
    kinds += ["short"] if verb in ("get", "list") else []
    kinds += ["lost"] if verb in WRITES else []
    return kinds + (["412", "409"] if verb in CREATE_ONLY.get(what, ()) else [])


@dataclass
class Faults:
    """What shall go wrong in the run at hand, and all that did. `replica` is a file with the replica's process id."""

    seed: int
    replica: Path
    share: float = 0.0
    run: str = ""
    armed: list[tuple[int, Fault]] = field(default_factory=list)  # (from which request of the run on, what)
    fired: Counter[Fault] = field(default_factory=Counter)
    seen: Counter[Operation] = field(default_factory=Counter)
    commits: dict[str, int] = field(default_factory=dict)  # path of a record: time.monotonic_ns() when it was there
    lock: threading.Lock = field(default_factory=threading.Lock)
    asked: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    driver: int = 0

    def begin(self, run: str, share: float, armed: list[tuple[int, Fault]]) -> None:
        with self.lock:
            self.run, self.share, self.armed, self.requests = run, share, list(armed), 0
            self.asked.clear()

    def choose(self, operation: Operation, request: str) -> Fault | None:
        """What is to happen to a request, `request` being what it shares with its repetitions."""
        with self.lock:
            self.seen[operation] += 1
            self.requests += 1
            self.asked[request] += 1
            for number, (start, fault) in enumerate(self.armed):
                if fault.operation == operation and self.requests >= start and self._possible(fault):
                    del self.armed[number]
                    return fault
            rng = random.Random(f"{self.seed} {self.run} {request} {self.asked[request]}")
            if rng.random() >= self.share:
                return None
            kind = rng.choice([one for one in fitting(operation) if one != "slow" or rng.random() < SLOW_SHARE])
            return Fault(kind, operation, SIDES[kind])

    def _possible(self, fault: Fault) -> bool:
        return fault.kind != REPLICA or self._replica() is not None

    def _replica(self) -> int | None:
        """Its process id, if it is alive."""
        number = int(self.replica.read_text())
        with open_or_none(f"/proc/{number}/stat") as stat:
            return number if stat and stat.read().rpartition(")")[2].split()[0] != "Z" else None

    def kill(self, kind: str, requester: int) -> int | None:
        number = {DRIVER: self.driver, WORKER: requester, REPLICA: self._replica()}[kind]
        try:
            if number:
                os.kill(number, signal.SIGKILL)
            return number
        except ProcessLookupError:
            return None

    def happened(self, fault: Fault) -> None:
        with self.lock:
            self.fired[fault] += 1

    def again(self, fault: Fault) -> None:
        """It could not happen this time."""
        with self.lock:
            self.armed.append((0, fault))


@contextmanager
def open_or_none(path: str) -> Iterator[Any]:
    try:
        file = open(path)  # noqa: SIM115
    except OSError:
        yield None
        return
    with file:
        yield file


class Reply(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes


@contextmanager
def proxy(upstream: str, faults: Faults) -> Iterator[str]:
    """The URL of a proxy before the server at `upstream`."""
    address = urlsplit(upstream).netloc
    done: dict[str, str] = {}  # uploads that ended here: what their server says when asked again

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            who, _, number = (re.findall(r"app/(\w+-\d+)", self.headers["User-Agent"] or "") or ["other-0"])[
                0
            ].partition("-")
            operation = Operation(who, *_asked(self.command, self.path))
            if who == "driver":
                faults.driver = int(number)
            upload = parse_qs(urlsplit(self.path).query).get("uploadId", [""])[0]
            name = f"{who} {self.command} {self.path.replace(upload, '') if upload else self.path}"
            fault = faults.choose(operation, name) if who in OPERATIONS else None
            try:
                self._serve(fault, int(number), body, upload, operation)
            except OSError:
                self.close_connection = True

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

        def _serve(self, fault: Fault | None, requester: int, body: bytes, upload: str, operation: Operation) -> None:
            kind, side = (fault.kind, fault.side) if fault else ("", "")
            if fault and kind not in KILLS and side == BEFORE:
                faults.happened(fault)
                if kind == "slow":
                    time.sleep(STALL_S)
                elif kind == "reset":
                    return self._reset()
                else:
                    return self._answer(_refusal(503, "SlowDown") if kind == "503" else _refusal(409, CONFLICT))
            if fault and kind in KILLS and side == BEFORE and self._kill(fault, requester):
                return None
            reply = self._forward(body, upload, operation)
            if fault and side == AFTER:
                if kind in KILLS:
                    if self._kill(fault, requester):
                        return None
                elif reply.status >= 300 or (kind == "short" and len(reply.body) < 2):
                    faults.again(fault)
                else:
                    faults.happened(fault)
                    if kind == "lost":
                        done[upload] = "NoSuchUpload" if operation.verb in ("complete", "abort") else ""
                        return self._reset()
                    if kind == "412":  # as if another had written it: the upload of this one is still there
                        done[upload] = "there"
                        return self._answer(_refusal(412, "PreconditionFailed"))
                    return self._answer(reply, len(reply.body) // 2)
            return self._answer(reply)

        def _kill(self, fault: Fault, requester: int) -> bool:
            """Whether it was who asked."""
            number = faults.kill(fault.kind, requester)
            if number is None:
                faults.again(fault)
                return False
            faults.happened(fault)
            if number == requester:
                self._reset()
            return number == requester

        def _forward(self, body: bytes, upload: str, operation: Operation) -> Reply:
            if upload and done.get(upload) == "NoSuchUpload":
                return _refusal(404, "NoSuchUpload")
            if upload and done.get(upload) == "there" and operation.verb == "abort":
                return Reply(204, [], b"")
            connection = http.client.HTTPConnection(address, timeout=60)
            headers = {key: value for key, value in self.headers.items() if key.lower() not in HOP_BY_HOP}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            reply = Reply(answer.status, answer.getheaders(), answer.read())
            connection.close()
            if operation.verb == "put" and operation.what == "records" and reply.status < 300:
                faults.commits.setdefault(self.path, time.monotonic_ns())
            return reply

        def _answer(self, reply: Reply, cut: int | None = None) -> None:
            self.send_response_only(reply.status)
            for key, value in reply.headers:
                if key.lower() not in HOP_BY_HOP and (key.lower() != "content-length" or self.command == "HEAD"):
                    self.send_header(key, value)
            if self.command != "HEAD" and reply.status != 204:
                self.send_header("Content-Length", str(len(reply.body)))
            self._headers_buffer.append(b"\r\n")  # type: ignore[attr-defined]
            whole = b"".join(self._headers_buffer)  # type: ignore[attr-defined]
            self._headers_buffer = []
            self.wfile.write(whole + (b"" if self.command == "HEAD" else reply.body[:cut]))
            self.close_connection = cut is not None or self.close_connection

        def _reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

        def handle_error(self, *_: Any) -> None:
            """Whoever was there is gone."""

    listening = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


CONFLICT = "ConditionalRequestConflict"
HOP_BY_HOP = ("connection", "transfer-encoding", "expect", "keep-alive")


def _refusal(status: int, code: str) -> Reply:
    text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>a fault</Message></Error>'
    return Reply(status, [("Content-Type", "application/xml")], text.encode())


def _asked(method: str, path: str) -> tuple[str, str]:
    """(verb, what) of a request, for instance ("part", "embeddings")."""
    parts = urlsplit(path)
    query = parse_qs(parts.query, keep_blank_values=True)
    verb = {"GET": "get", "HEAD": "head", "PUT": "put", "POST": "complete", "DELETE": "abort"}[method]
    verb = "list" if "list-type" in query else "part" if "partNumber" in query else verb
    verb = "create" if "uploads" in query else verb
    name = parts.path + query.get("prefix", [""])[0]
    for what, part in {"plan": "_plan", "records": "_records", "report": "_report"}.items():
        if part in name:
            return verb, what
    kinds = [kind for kind in ("embeddings", "errors") if f"/{kind}" in name]
    return verb, kinds[0] if kinds else "images"
