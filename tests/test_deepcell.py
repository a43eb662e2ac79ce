"""DeepCell's token-gated weights, by a server that plays its API with all its refusals; the token is seen nowhere."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import logging
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import torch

from cluster import deepcell, weights
from cluster.errors import CellrayError, Forbidden, InvalidCheckpoint, InvalidSettings, NotFound, Unavailable
from cluster.settings import ModelSettings, Settings
from jobs import cli
from serve_app import models
from serve_app.model import modules
from serve_app.model.checkpoint import ModelCard

KEY, MEMBER = "models/cellsam-models_v1.2.tar.gz", "cellsam_v1.2/cellsam_general.pt"
SOURCE = f"deepcell:{KEY}#{MEMBER}"
CANARY = "canary-7f3a-do-not-print"


@dataclass
class Store:
    """What the server is to do, and what it was asked."""

    archive: bytes
    url: str = ""
    how: str = "well"
    plan: tuple[str, ...] = ()  # `how` from each post on, the last for good
    posts: list[dict[str, Any]] = field(default_factory=list)
    gets: list[dict[str, str]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)


def archive_of(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz", compresslevel=1) as opened:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return made.getvalue()


@pytest.fixture(scope="module")
def content() -> bytes:
    saved = io.BytesIO()
    torch.save(modules.seeded("nano", 1), saved)
    return saved.getvalue()


@pytest.fixture(scope="module")
def archive(content: bytes) -> bytes:
    return archive_of({"../evil": b"x", "cellsam_v1.2/other.pt": b"y", MEMBER: content})


@pytest.fixture
def store(archive: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    made = Store(archive)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            made.posts.append({"token": self.headers["X-Api-Key"], **parse_qs(body)})
            if made.plan:
                made.how, made.plan = made.plan[0], made.plan[1:] or made.plan
            status, answer = (
                200,
                json.dumps({"url": f"{made.url}/archive?signature=s{len(made.posts)}", "size": "1 MB"}),
            )
            if self.headers["X-Api-Key"] != CANARY or made.how == "bad token":
                status, answer = 403, json.dumps({"detail": "Authentication credentials were not provided."})
            elif parse_qs(body)["s3_key"] != [KEY] or made.how == "no key":
                status, answer = 404, json.dumps({"error": "Key not found"})
            elif made.how == "redirects":
                self.send_response(302)
                self.send_header("Location", f"{made.url}/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            elif made.how in ("no address", "other scheme", "no json", "endless"):
                answer = {
                    "no address": "{}",
                    "other scheme": '{"url": "file:///etc/passwd"}',
                    "no json": "<html>",
                    "endless": "x" * 100_000,
                }[made.how]
            elif made.how.isdigit():
                status = int(made.how)
            elif made.how == "slow":
                made.over.wait(30)
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer.encode())

        def do_GET(self) -> None:
            made.gets.append({**self.headers})
            assert self.path.startswith("/archive")
            if made.how == "expired for good" or (made.how == "expired" and len(made.gets) == 1):
                self.send_error(403)
                return
            first = 0
            if "Range" in self.headers and self.headers["If-Range"] == '"v1"':
                first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            rest = made.archive[first:]
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(rest)))
            if made.how != "no tag":
                self.send_header("ETag", '"v1"')
            self.end_headers()
            if made.how in ("cut", "cut for good", "no tag") and len(made.gets) < 3:
                rest = rest[: len(rest) // 2]
            if made.how == "cut for good" and len(made.gets) > 1:
                rest = b""
            self.wfile.write(rest)
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{listening.server_port}"
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    monkeypatch.setattr(deepcell, "ENDPOINT", f"{made.url}/api/getData/")
    monkeypatch.setattr(deepcell, "MD5", {KEY: hashlib.md5(made.archive).hexdigest()})
    monkeypatch.setattr(deepcell, "MOUNTED", Path("/nonexistent"))
    monkeypatch.delenv(deepcell.TOKEN_FILE, raising=False)
    monkeypatch.setenv(deepcell.TOKEN, CANARY)
    try:
        yield made
    finally:
        made.over.set()
        listening.shutdown()
        thread.join()
        listening.server_close()


def settings(tmp_path: Path, source: str = SOURCE) -> Settings:
    made = ModelSettings(source=source, licence="not for sale")
    return Settings(weights_dir=str(tmp_path / "weights"), models={"mine": made})


def refused(kind: type[CellrayError], made: Settings) -> str:
    with pytest.raises(kind) as caught:
        models.prepare(made, "mine")
    error: BaseException | None = caught.value
    while error is not None:  # nor in what it came from
        assert CANARY not in f"{error!r} {error.args}"
        error = error.__cause__ or error.__context__
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_fetched_with_a_token_and_split(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = settings(tmp_path)
    with caplog.at_level(logging.DEBUG):
        folder = models.prepare(made, "mine")
    card = ModelCard.read(folder)
    assert (card.licence, card.source, card.trained) == ("not for sale", SOURCE, True)
    assert store.posts == [{"token": CANARY, "s3_key": [KEY]}]
    assert not any("X-Api-Key" in headers for headers in store.gets)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in written if path.suffix not in (".lock", ".safetensors")} == {"model.json"}
    assert not any(CANARY.encode() in path.read_bytes() for path in written)
    assert CANARY not in caplog.text


def test_where_the_token_comes_from(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(f"{CANARY}\n")
    monkeypatch.setenv(deepcell.TOKEN, "another")
    monkeypatch.setenv(deepcell.TOKEN_FILE, str(tmp_path / "token"))
    assert deepcell.token() == CANARY
    monkeypatch.delenv(deepcell.TOKEN_FILE)
    assert deepcell.token() == "another"
    monkeypatch.setattr(deepcell, "MOUNTED", tmp_path / "token")
    assert deepcell.token() == CANARY
    (tmp_path / "token").write_text("two words")
    with pytest.raises(InvalidSettings, match="holds no token"):
        deepcell.token()
    monkeypatch.setenv(deepcell.TOKEN_FILE, str(tmp_path / "gone"))
    with pytest.raises(InvalidSettings, match="gone cannot be read"):
        deepcell.token()
    monkeypatch.delenv(deepcell.TOKEN_FILE)
    monkeypatch.delenv(deepcell.TOKEN)
    monkeypatch.setattr(deepcell, "MOUNTED", tmp_path / "gone")
    message = refused(Forbidden, settings(tmp_path))
    assert "need a DeepCell access token" in message
    assert "cellray weights fetch" in message
    assert store.posts == []


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("bad token", Forbidden, "refused the access token: it may have expired"),
        ("no key", NotFound, f"DeepCell has no {KEY}"),
        ("redirects", Unavailable, "redirected elsewhere: not followed"),
        ("no address", Unavailable, "has no https address"),
        ("other scheme", Unavailable, "has no https address"),
        ("no json", Unavailable, "has no https address"),
        ("endless", Unavailable, "is over 65536 bytes"),
        ("500", Unavailable, "answered 500"),
        ("429", Unavailable, "answered 429"),
    ],
)
def test_refusals(store: Store, tmp_path: Path, how: str, kind: type[CellrayError], said: str) -> None:
    store.how = how
    assert said in refused(kind, settings(tmp_path))
    assert len(store.posts) == 1
    assert store.gets == []


def test_a_server_that_is_slow(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.how = "slow"
    monkeypatch.setattr(deepcell, "TIMEOUT_S", 0.3)
    assert "did not answer" in refused(Unavailable, settings(tmp_path))


def test_an_address_that_expired_is_asked_for_again(store: Store, tmp_path: Path) -> None:
    store.how = "expired"
    models.prepare(settings(tmp_path), "mine")
    assert len(store.posts) == len(store.gets) == 2


def test_a_cut_download_goes_on_where_it_was(store: Store, tmp_path: Path) -> None:
    store.how = "cut"
    models.prepare(settings(tmp_path), "mine")
    assert [headers.get("If-Range") for headers in store.gets] == [None, '"v1"', '"v1"']
    first, second = (int(headers["Range"][6:-1]) for headers in store.gets[1:])
    assert 0 < first < second < len(store.archive)


def test_the_next_call_goes_on_with_what_is_there(store: Store, tmp_path: Path) -> None:
    store.how = "cut for good"
    made = settings(tmp_path)
    assert "was cut short" in refused(Unavailable, made)
    store.how, before = "well", len(store.gets)
    models.prepare(made, "mine")
    assert int(store.gets[before]["Range"][6:-1]) > 0
    assert len(store.gets) == before + 1


def test_without_a_version_it_begins_anew(store: Store, tmp_path: Path) -> None:
    store.how = "no tag"
    assert "was cut short" in refused(Unavailable, settings(tmp_path))
    assert not list((tmp_path / "weights").glob("*.archive*"))


def test_another_archive_is_refused_before_it_is_read(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepcell, "extract", lambda *_: pytest.fail("read"))
    store.archive = store.archive[:-1] + b"!"
    assert "it is damaged or another one" in refused(InvalidCheckpoint, settings(tmp_path))
    monkeypatch.setattr(deepcell, "MD5", {})
    assert "give the checkpoint's sha256" in refused(InvalidSettings, settings(tmp_path))
    assert not list((tmp_path / "weights").glob("download-*.archive"))


def test_archives_are_read_member_by_member(
    store: Store, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings(tmp_path, f"deepcell:{KEY}#nothing.pt")
    assert "the archive has no nothing.pt; it has ../evil, cellsam_v1.2/other.pt" in refused(NotFound, made)
    assert not (tmp_path / "evil").exists()
    store.archive = b"no archive"
    monkeypatch.setattr(deepcell, "MD5", {KEY: hashlib.md5(store.archive).hexdigest()})
    assert "is damaged" in refused(InvalidCheckpoint, settings(tmp_path))
    link = io.BytesIO()
    with tarfile.open(fileobj=link, mode="w:gz") as opened:
        info = tarfile.TarInfo(MEMBER)
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        opened.addfile(info)
    store.archive = link.getvalue()
    monkeypatch.setattr(deepcell, "MD5", {KEY: hashlib.md5(store.archive).hexdigest()})
    assert "is no file" in refused(InvalidCheckpoint, settings(tmp_path))
    monkeypatch.setattr(weights, "MAX_CHECKPOINT_BYTES", 1000)
    store.archive = archive_of({MEMBER: content})
    refused(InvalidCheckpoint, settings(tmp_path))


@pytest.mark.parametrize("source", ["deepcell:", "deepcell:a.tar.gz", "deepcell:#b"])
def test_sources_that_name_nothing(source: str, tmp_path: Path) -> None:
    assert "expected deepcell:ARCHIVE#FILE" in refused(InvalidSettings, settings(tmp_path, source))


def test_the_command(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "cellray.yaml"
    config.write_text(f"weights_dir: {tmp_path}/w\nmodels:\n  mine: {{source: '{SOURCE}', licence: not for sale}}\n")

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(["weights", *words, "--config", str(config)])
        return code, *capsys.readouterr()

    code, said, _ = run("list", "mine", "cellsam_general", "nano")
    rows = [line.split() for line in said.splitlines()[1:]]
    assert [row[:2] for row in rows] == [["mine", "no"], ["cellsam_general", "no"], ["nano", "no"]]
    assert run("where", "mine")[0] == 1
    monkeypatch.delenv(deepcell.TOKEN)
    code, _, error = run("fetch", "mine")
    assert (code, "need a DeepCell access token" in error) == (1, True)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", lambda _: CANARY)
    code, said, error = run("fetch", "mine")
    assert (code, CANARY in said + error) == (0, False)
    assert "mine: licence not for sale" in said
    code, said, _ = run("where", "mine")
    folder = Path(said.strip())
    assert (code, (folder / "model.json").exists()) == (0, True)
    assert run("verify")[0] == 0
    with (folder / "decoder.safetensors").open("r+b") as file:
        file.seek(2000)
        file.write(b"damage")
    code, _, error = run("verify", "mine")
    assert (code, "decoder.safetensors has sha256" in error) == (1, True)
    assert run("fetch")[0] == 2
