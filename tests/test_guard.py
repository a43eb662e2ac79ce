"""Keys, rates, origins: on a small application, and on the service."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from cluster import keys, session
from cluster.errors import Forbidden, InvalidInput, InvalidSettings, RateLimited, Unauthorized
from cluster.keys import Key, KeysFile
from cluster.settings import ServiceSettings, load
from jobs import cli
from serve_app.guard import SECOND, Bucket, Guard, Guarded, is_loopback
from serve_app.journal import Journal
from tests.conftest import App

SECRET = "cellray_CANARY-of-the-tests-0123456789"
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()
BEARER = {"authorization": f"Bearer {SECRET}"}
OTHER = hashlib.sha256(b"other").hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# the team\n\nalice: {DIGEST}\nbob: {OTHER} 2  # a script\n")
    return path


def guard(file: Path | None = None, clock: Any = lambda: 0, **settings: Any) -> Guard:
    return Guard(ServiceSettings(keys=str(file) if file else None, **settings), "127.0.0.1", clock)


def application(made: Guard) -> FastAPI:
    app = FastAPI()
    app.add_middleware(Guarded, guard=made)
    app.add_middleware(Journal)

    @app.get("/healthz")
    @app.get("/readyz")
    @app.get("/")
    @app.get("/web/{path:path}")
    @app.get("/v1/models")
    async def answer() -> str:
        return "ok"

    @app.post("/v1/embed")
    async def embed(request: Request) -> None:
        async for chunk in request.stream():
            request.app.state.steps += ["read"] if chunk else []

    return app


@pytest.fixture
def client(file: Path) -> Iterator[TestClient]:
    with TestClient(application(guard(file))) as made:
        yield made


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/docs", "/openapi.json", "/web/page.js", "/web/"])
def test_the_page_probes_and_docs_need_no_key(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/docs/", "/metrics", "/web", "/healthz/", "/no"])
def test_all_else_needs_one(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error_type"] == "Unauthorized"
    assert client.get(path, headers=BEARER).status_code in (200, 307, 404)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", SECRET)],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", f"Basic {SECRET}")],
        [("authorization", f"Bearer {SECRET}x")],
        [("authorization", f"Bearer {SECRET[:-1]}")],
        [("authorization", f"Bearer {DIGEST}")],
        [("authorization", "Bearer alice")],
        [("authorization", "Bearer \u00e9".encode())],
        [("authorization", f"Bearer {SECRET}"), ("authorization", f"Bearer {SECRET}")],
        [("x-api-key", SECRET)],
        [("cookie", f"authorization=Bearer {SECRET}")],
    ],
)
def test_no_other_header_is_a_key(client: TestClient, headers: Any) -> None:
    answer = client.get("/v1/models", headers=headers)
    assert answer.status_code == 401
    assert SECRET[:-1] not in answer.text + str(answer.headers)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
def test_the_scheme_is_written_as_one_likes(client: TestClient, scheme: str) -> None:
    assert client.get("/v1/models", headers={"authorization": f"{scheme} {SECRET}"}).status_code == 200


@given(st.binary(max_size=200))
def test_no_header_is_more_than_refused(value: bytes) -> None:
    made = Guard(ServiceSettings(), "127.0.0.1")
    made.keys = SimpleNamespace(find=lambda secret: Key("alice", "") if secret == SECRET.encode() else None)  # type: ignore[assignment]
    if value.split() != [b"Bearer", SECRET.encode()]:
        with pytest.raises(Unauthorized):
            made.check([value])
    assert made.check([b"Bearer " + SECRET.encode()]) == "alice"


def test_a_refused_body_is_not_read_and_an_allowed_one_streams(file: Path) -> None:
    app, steps = application(guard(file)), list[str]()
    app.state.steps = steps

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            steps.append("sent")
            yield bytes(1000)

    async def post(headers: dict[str, str]) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            return (await http.post("/v1/embed", content=chunks(), headers=headers)).status_code

    assert anyio.run(post, {}) == 401
    assert not steps
    assert anyio.run(post, BEARER) == 200
    assert steps == ["sent", "read"] * 3


def test_a_websocket_is_refused(client: TestClient) -> None:
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/healthz"):
        pass


def test_rates_are_a_key_s_own_and_retry_after_is_true(file: Path) -> None:
    now = [0]
    with TestClient(application(guard(file, lambda: now[0], requests_per_minute=3))) as client:
        bob = {"authorization": "Bearer other"}
        assert [client.get("/v1/models", headers=bob).status_code for _ in range(3)] == [200, 200, 429]
        assert [client.get("/v1/models", headers=BEARER).status_code for _ in range(4)] == [200, 200, 200, 429]
        assert client.get("/healthz", headers=bob).status_code == 200
        refused = client.get("/v1/models", headers=bob)
        assert refused.json()["error_type"] == "RateLimited"
        seconds = int(refused.headers["retry-after"])
        assert seconds == 30
        now[0] = (seconds - 1) * SECOND
        assert client.get("/v1/models", headers=bob).status_code == 429
        now[0] = seconds * SECOND
        assert [client.get("/v1/models", headers=bob).status_code for _ in range(2)] == [200, 429]


@given(st.integers(1, 10_000), st.lists(st.integers(0, 10 * SECOND), max_size=60), st.integers(0, 10**18))
def test_a_bucket_never_gives_more_than_its_rate_and_says_truly_when(rate: int, pauses: list[int], now: int) -> None:
    bucket, given_at = Bucket(rate), []
    for pause in pauses:
        now += pause
        wait = bucket.take(now)
        if wait:
            assert bucket.take(now + wait - 1) > 0
            now += wait
            assert bucket.take(now) == 0
        given_at.append(now)
    for index, end in enumerate(given_at):
        for start in given_at[: index + 1]:
            count = sum(start <= at <= end for at in given_at)
            assert count <= rate + (end - start) * rate / (60 * SECOND) + 1e-6


def test_the_keys_file_is_read_again(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    made = KeysFile(str(file), lambda: now[0])
    assert made.find(SECRET.encode()) == Key("alice", DIGEST)
    assert made.find(b"other") == Key("bob", OTHER, 2)
    file.write_text(f"bob: {OTHER}")
    assert made.find(SECRET.encode())  # it was looked at just now
    now[0] += keys.CHECK_S
    assert made.find(SECRET.encode()) is None
    assert made.find(b"other") == Key("bob", OTHER)
    for broken in (f"carol: {SECRET}", "", f"a: {OTHER}\na: {OTHER}", "a"):
        file.write_text(broken)
        now[0] += keys.CHECK_S
        assert made.find(b"other")
        assert str(file) in caplog.messages[-1]
    file.unlink()
    now[0] += keys.CHECK_S
    assert made.find(b"other")
    assert SECRET not in caplog.text
    logged = len(caplog.messages)
    now[0] += keys.CHECK_S
    assert made.find(b"other")
    assert len(caplog.messages) == logged
    file.write_text(f"alice: {DIGEST}")
    now[0] += keys.CHECK_S
    assert made.find(SECRET.encode())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no key"),
        (b"# nothing", "no key"),
        (f"alice: {SECRET}".encode(), "line 1"),
        (f"# x\nalice: {DIGEST}\nalice: {OTHER}".encode(), "line 3"),
        (f"alice {DIGEST}".encode(), "line 1"),
        (f"alice: {DIGEST} 0".encode(), "line 1"),
        (f"alice: {DIGEST} many".encode(), "line 1"),
        (f"al ice: {DIGEST}".encode(), "line 1"),
        (b"\xff\xfe", "no text"),
        (b"#" * (keys.MAX_KEYS_BYTES + 1), "over"),
        (None, "No such file"),
    ],
)
def test_a_broken_keys_file_is_refused_by_name_and_line(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidSettings, match=says) as caught:
        guard(path)
    assert str(path) in str(caught.value)
    assert SECRET not in str(caught.value)


LINES = st.lists(st.from_regex(keys.LINE, fullmatch=True) | st.sampled_from(["", "# x"]), min_size=1).map("\n".join)


@given(LINES | st.text())
def test_keys_are_written_as_they_are_read(text: str) -> None:
    try:
        parsed = keys.parse(text)
    except InvalidSettings:
        return
    assert keys.parse("\n".join(map(str, parsed))) == parsed


def test_a_made_key_is_random_and_its_line_lets_it_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = []
    for _ in range(2):
        assert cli.main(["key", "alice"]) == 0
        secret, line = (row.split(":  ", 1)[1].strip() for row in capsys.readouterr().out.splitlines())
        (tmp_path / "keys").write_text(line)
        assert guard(tmp_path / "keys").check([f"Bearer {secret}".encode()]) == "alice"
        assert secret not in line
        made.append(secret)
    assert made[0] != made[1]
    assert min(map(len, made)) > 40
    with pytest.raises(InvalidInput, match="no name"):
        keys.make("a: b")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert Guard(ServiceSettings(), host).check([]) == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "", None, "localhost.example", "127.0.0.1.example"])
def test_elsewhere_a_keys_file_is_a_must(host: str | None, file: Path) -> None:
    with pytest.raises(InvalidSettings, match="cellray key"):
        Guard(ServiceSettings(), host)
    Guard(ServiceSettings(keys=str(file)), host)


def test_a_replica_learns_what_serve_listens_on(app: App) -> None:
    assert is_loopback(session.http_host())


def call(peer: str, *metadata: tuple[str, str | bytes]) -> Any:
    return SimpleNamespace(peer=lambda: peer, invocation_metadata=lambda: metadata)


def test_grpc_asks_for_the_same(file: Path) -> None:
    made, far = guard(file), "ipv4:10.1.2.3:4444"
    assert made.check_grpc(call(far, ("authorization", f"Bearer {SECRET}"))) == "alice"
    assert made.check_grpc(call(far, ("Authorization", b"bearer other"))) == "bob"
    for metadata in ([], [("authorization", SECRET)], [("x", f"Bearer {SECRET}")]):
        with pytest.raises(Unauthorized):
            made.check_grpc(call("ipv4:127.0.0.1:4444", *metadata))
    assert made.check_grpc(call(far, ("authorization", "Bearer other"))) == "bob"
    with pytest.raises(RateLimited) as caught:
        made.check_grpc(call(far, ("authorization", "Bearer other")))
    assert (caught.value.grpc_code, caught.value.retry_after_s) == ("RESOURCE_EXHAUSTED", 30)


@pytest.mark.parametrize("peer", ["ipv4:127.0.0.1:9", "ipv6:%5B::1%5D:9", "ipv6:[::1]:9", "unix:/tmp/s", "unix:"])
def test_grpc_without_keys_answers_this_machine(peer: str) -> None:
    assert guard().check_grpc(call(peer)) == ""


@pytest.mark.parametrize("peer", ["ipv4:10.0.0.1:9", "ipv6:%5B2001:db8::1%5D:9", "ipv6:[::]:9", "", "127.0.0.1:9", "x"])
def test_grpc_without_keys_answers_no_other(peer: str) -> None:
    with pytest.raises(Forbidden):
        guard().check_grpc(call(peer))


@pytest.mark.parametrize("origin", ["example.org", "https://a/b", "ftp://a", "https://a b", ""])
def test_an_origin_is_as_browsers_send_it(origin: str) -> None:
    with pytest.raises(InvalidSettings, match="allow_origins"):
        load(environ={}, service={"allow_origins": [origin]})
    assert load(environ={}, service={"allow_origins": ["https://a.org:8", "*"]}).service.allow_origins
