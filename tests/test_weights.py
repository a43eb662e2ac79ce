"""Checkpoints reach a node whole, checked and once, whatever the server does."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import io
import logging
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from cluster import weights
from cluster.errors import (
    CellrayError,
    Conflict,
    Forbidden,
    InvalidCheckpoint,
    InvalidInput,
    InvalidSettings,
    NotFound,
    Unavailable,
)
from cluster.settings import ModelSettings, Settings, StorageSettings, load
from cluster.storage import Storage
from serve_app import model_replicas, models
from serve_app.model import checkpoint, modules
from serve_app.model import state as state_module
from serve_app.model.checkpoint import ModelCard
from serve_app.model.prompts import DecodeRequest, GridOptions, Prompts
from tests.s3 import S3, s3_fixture  # noqa: F401

HALVES = ("encoder.safetensors", "decoder.safetensors")
FILES = {*HALVES, "model.json"}


@pytest.fixture(scope="module")
def state() -> checkpoint.State:
    return modules.seeded("nano", 1)


@pytest.fixture(scope="module")
def trained(state: checkpoint.State) -> bytes:
    """A checkpoint file as torch.save writes it."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def web(trained: bytes, state: checkpoint.State) -> Iterator[str]:
    """A web server that has the checkpoint, and several ways of not giving it."""
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = self.path.partition("?")[0].removeprefix("/")
            if page.isdigit():
                self.send_error(int(page))
                return
            content = save(state) if page.endswith(".safetensors") else trained
            self.send_response(200)
            if page == "chunks-cut.pth":
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"ffff\r\n" + content[:1000])
                return
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2 if page in ("cut.pth", "hangs.pth") else None])
            if page == "hangs.pth":
                over.wait(30)

        def log_message(self, *_: Any) -> None:
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        over.set()
        listening.shutdown()
        thread.join()
        listening.server_close()


@pytest.fixture(autouse=True)
def temporary(state: checkpoint.State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing may be left in the folder for temporary files, success or not; torch's own is made with `state`."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


def settings(
    tmp_path: Path, source: str, sha256: str | None = None, storage: StorageSettings | None = None
) -> Settings:
    model = ModelSettings(source=source, sha256=sha256, licence="MIT")
    folder = str(tmp_path / "weights")
    return Settings(weights_dir=folder, models={"mine": model}, storage=storage or StorageSettings())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def refused(kind: type[CellrayError], made: Settings) -> str:
    """The message, which is one line; no half of a model was written."""
    with pytest.raises(kind) as caught:
        models.prepare(made, "mine")
    assert "\n" not in str(caught.value)
    assert not list(Path(made.weights_dir).glob("*/*"))
    return str(caught.value)


def is_the_checkpoint(folder: Path, state: checkpoint.State) -> ModelCard:
    assert {path.name for path in folder.iterdir()} == FILES
    card = ModelCard.read(folder)
    loaded = checkpoint.load_half(folder, "encoder", card) | checkpoint.load_half(folder, "decoder", card)
    assert {*loaded} == {*state}
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    return card


@pytest.mark.parametrize("length", [6, 64])
def test_downloads_checks_and_splits(
    web: str, trained: bytes, state: checkpoint.State, tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(weights.log, "info", said.append)  # of a replica that starts: `cellray status` shows it
    made = settings(tmp_path, f"{web}/good.pth", digest(trained)[:length].upper())
    folder = models.prepare(made, "mine")
    card = is_the_checkpoint(folder, state)
    assert (card.source_sha256, card.licence, card.trained) == (digest(trained), "MIT", True)
    assert (card.family, card.source) == ("nano", f"{web}/good.pth")
    size = f"{len(trained) / weights.MIB:,.0f} MiB"
    assert [line for line in said if line.startswith(f"downloading {web}/good.pth: ") and line.endswith(f" of {size}")]


def test_the_second_time_nothing_is_fetched(
    web: str, trained: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings(tmp_path, f"{web}/good.pth", digest(trained))
    folder = models.prepare(made, "mine")
    monkeypatch.setattr(models, "read", lambda *_: pytest.fail("fetched again"))
    assert models.prepare(made, "mine") == folder


def test_a_wrong_hash_is_refused_before_the_file_is_opened(
    web: str, trained: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "read", lambda *_: pytest.fail("opened"))
    (tmp_path / "w.pth").write_bytes(trained)
    for source in (f"{web}/good.pth", str(tmp_path / "w.pth")):
        message = refused(InvalidCheckpoint, settings(tmp_path, source, "0" * 64))
        assert source in message
        assert digest(trained)[:12] in message


@pytest.mark.parametrize(
    ("page", "kind", "said"),
    [
        ("cut.pth", Unavailable, "was cut short"),
        ("404", NotFound, "answered 404"),
        ("410", NotFound, "answered 410"),
        ("500", Unavailable, "answered 500"),
        ("503", Unavailable, "answered 503"),
    ],
)
def test_a_server_that_does_not_give_it(
    web: str, tmp_path: Path, page: str, kind: type[CellrayError], said: str
) -> None:
    message = refused(kind, settings(tmp_path, f"{web}/{page}", "0" * 64))
    assert f"{web}/{page}" in message
    assert said in message


@pytest.mark.parametrize(
    ("page", "kind"), [("401", Forbidden), ("403", Forbidden), ("408", Unavailable), ("429", Unavailable)]
)
def test_other_answers_keep_their_meaning(web: str, tmp_path: Path, page: str, kind: type[CellrayError]) -> None:
    refused(kind, settings(tmp_path, f"{web}/{page}", "0" * 64))


@pytest.mark.parametrize(("page", "kind"), [("chunks-cut.pth", Unavailable), ("a name.pth", InvalidInput)])
def test_no_foreign_error_comes_through(web: str, tmp_path: Path, page: str, kind: type[CellrayError]) -> None:
    refused(kind, settings(tmp_path, f"{web}/{page}", "0" * 64))


@pytest.mark.parametrize("page", ["good.safetensors?download=true", "good.pth?signature=" + "0" * 300])
def test_the_query_of_an_address_is_not_in_the_way(
    web: str, trained: bytes, state: checkpoint.State, tmp_path: Path, page: str
) -> None:
    sha256 = digest(save(state) if ".safetensors" in page else trained)
    is_the_checkpoint(models.prepare(settings(tmp_path, f"{web}/{page}", sha256), "mine"), state)


def test_a_server_that_hangs_is_unavailable(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "DOWNLOAD_TIMEOUT_S", 0.3)
    assert "timed out" in refused(Unavailable, settings(tmp_path, f"{web}/hangs.pth", "0" * 64))


def test_nobody_listens(tmp_path: Path) -> None:
    refused(Unavailable, settings(tmp_path, "http://127.0.0.1:9/w.pth", "0" * 64))


@pytest.mark.parametrize("source", ["http://127.0.0.1:9/w.pth", "ftp://host/w.pth", "gs://bucket/w.pth"])
def test_plain_http_needs_a_hash_and_other_schemes_are_refused(tmp_path: Path, source: str) -> None:
    assert source in refused(InvalidSettings, settings(tmp_path, source))


def test_a_checkpoint_on_s3(s3: S3, trained: bytes, state: checkpoint.State, tmp_path: Path) -> None:
    uri = s3.make_bucket("test-weights") + "/w.pth"
    assert uri in refused(NotFound, settings(tmp_path, uri, storage=s3.settings))
    Storage(s3.settings).publish(uri, trained)
    is_the_checkpoint(models.prepare(settings(tmp_path, uri, digest(trained), s3.settings), "mine"), state)


def test_a_file_that_was_replaced_is_another_model(trained: bytes, state: checkpoint.State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(trained)
    made = settings(tmp_path, str(path))
    first = models.prepare(made, "mine")
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save(other, path)
    second = models.prepare(made, "mine")
    assert first != second
    hashes = [is_the_checkpoint(first, state).encoder_sha256, is_the_checkpoint(second, other).encoder_sha256]
    assert len({*hashes}) == 2


def test_a_file_that_is_missing_or_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    assert str(path) in refused(NotFound, settings(tmp_path, str(path)))
    path.write_bytes(b"no checkpoint")
    assert "w.pth" in refused(InvalidCheckpoint, settings(tmp_path, str(path)))


def test_random_weights_are_the_same_everywhere(state: checkpoint.State, tmp_path: Path) -> None:
    card = is_the_checkpoint(models.prepare(settings(tmp_path, "seeded:nano:1"), "mine"), state)
    assert not card.trained
    other = models.prepare(settings(tmp_path / "other", "seeded:nano:1"), "mine")
    assert ModelCard.read(other) == card


@pytest.mark.parametrize("source", ["seeded:nano", "seeded:nano:x", "seeded:nano:1:2", "seeded:huge:1"])
def test_random_weights_of_nothing(tmp_path: Path, source: str) -> None:
    refused(InvalidInput, settings(tmp_path, source))


def test_an_unknown_model_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no model 'other' in the settings; there are mine"):
        models.prepare(settings(tmp_path, "seeded:nano:1"), "other")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"a file")
    with pytest.raises((InvalidInput, Forbidden, Conflict)):
        models.prepare(settings(tmp_path, "seeded:nano:1"), "mine")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(b"")

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(hashlib, "file_digest", denied)
    refused(Forbidden, settings(tmp_path, str(path)))


def prepare_at(start: Any, made: Settings, found: Any) -> None:
    start.wait()
    found.put(str(models.prepare(made, "mine")))


def test_two_processes_at_once_make_one_folder(
    web: str, trained: bytes, state: checkpoint.State, tmp_path: Path
) -> None:
    made = settings(tmp_path, f"{web}/good.pth", digest(trained))
    spawn = multiprocessing.get_context("spawn")
    start, found = spawn.Barrier(2), spawn.Queue()
    processes = [spawn.Process(target=prepare_at, args=(start, made, found)) for _ in range(2)]
    for process in processes:
        process.start()
    try:
        folders = {found.get(timeout=120) for _ in processes}
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    assert len(folders) == 1
    is_the_checkpoint(Path(folders.pop()), state)
    assert len([name for name in os.listdir(made.weights_dir) if not name.endswith(".lock")]) == 1


@pytest.mark.parametrize("kind", ["s3", "folder"])
def test_one_node_fetches_for_all(
    kind: str,
    s3: S3,
    web: str,
    trained: bytes,
    state: checkpoint.State,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mirror = s3.make_bucket("test-mirror") + "/weights" if kind == "s3" else str(tmp_path / "shared")
    made = [
        settings(tmp_path / node, f"{web}/good.pth", digest(trained), s3.settings).model_copy(
            update={"weights_mirror": mirror}
        )
        for node in ("one", "two", "three")
    ]
    first = models.prepare(made[0], "mine")
    monkeypatch.setattr(models, "read", lambda *_: pytest.fail("fetched again"))
    second = models.prepare(made[1], "mine")
    assert first != second
    assert is_the_checkpoint(second, state) == ModelCard.read(first)
    assert [path.name for path in (tmp_path / "two" / "weights").iterdir() if path.name.startswith(".")] == []

    storage = Storage(s3.settings)
    uri = f"{mirror}/{first.name}/decoder.safetensors"
    storage.overwrite(uri, b"damaged")
    message = refused(InvalidCheckpoint, made[2])
    assert "decoder.safetensors has sha256" in message
    assert f"delete {mirror}/{first.name}" in message


def test_a_mirror_that_cannot_be_written(
    web: str, trained: bytes, state: checkpoint.State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    made = settings(tmp_path, f"{web}/good.pth", digest(trained))
    with caplog.at_level(logging.WARNING):
        folder = models.prepare(made.model_copy(update={"weights_mirror": str(tmp_path / "file" / "in")}), "mine")
    is_the_checkpoint(folder, state)
    assert "the other nodes fetch them too" in caplog.text


def test_an_encoder_alone_is_served_and_says_why_it_makes_no_masks(
    state: checkpoint.State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({name: state[name] for name in state if name.startswith("image_encoder.")}, tmp_path / "encoder.pth")
    made = settings(tmp_path, str(tmp_path / "encoder.pth"))
    monkeypatch.setattr(model_replicas, "_use_cores", lambda: None)
    assert model_replicas.EncoderReplica(made, "mine").info().family == "nano"
    replica = model_replicas.DecoderReplica(made, "mine")
    assert replica.info().decoder_sha256 == ""
    size, embedding = (10, 10), np.zeros((256, 32, 32), np.float16)
    request = DecodeRequest(embedding, size, Prompts(boxes=np.array([[1, 1, 5, 5]], np.float32)))
    answers = [*asyncio.run(replica.segment([request, request]))]
    answers += asyncio.run(replica.automask([([], size)], GridOptions()))
    assert [type(answer) for answer in answers] == [InvalidCheckpoint] * 3
    assert "give the whole checkpoint" in str(answers[0])


def test_a_folder_is_a_source_and_any_of_its_files_makes_another_model(state: checkpoint.State, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(save(state))
    (folder / "config.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"not read")
    made = settings(tmp_path, str(folder))
    first = models.prepare(made, "mine")
    card = is_the_checkpoint(first, state)
    lines = f"{digest(b'{}')}  config.json\n{digest(save(state))}  model.safetensors\n"
    assert card.source_sha256 == digest(lines.encode())
    (folder / "optimizer.pt").write_bytes(b"another")
    assert models.prepare(made, "mine") == first
    assert models.prepare(settings(tmp_path, str(folder), digest(lines.encode())), "mine") != first
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    second = models.prepare(made, "mine")
    assert second != first
    assert ModelCard.read(second).pixel_mean == (127.5, 127.5, 127.5)
    assert "sha256" in refused(InvalidCheckpoint, settings(tmp_path / "other", str(folder), digest(lines.encode())))


def test_a_model_kept_in_float16_is_half_as_large(tmp_path: Path) -> None:
    made = settings(tmp_path, "seeded:nano:1")
    for float16 in (False, True):
        models.split(made, made.models["mine"], tmp_path / str(float16), float16)
    sizes = [(tmp_path / name / "encoder.safetensors").stat().st_size for name in ("True", "False")]
    assert 0.49 < sizes[0] / sizes[1] < 0.52


def test_the_packaged_model(tmp_path: Path) -> None:
    made = load(environ={}, weights_dir=str(tmp_path))
    folder, packaged = models.prepare(made, "nano"), models.PACKAGE / "nano"
    card, shipped = ModelCard.read(folder), ModelCard.read(packaged)
    assert (card.encoder_sha256, card.decoder_sha256) == (shipped.encoder_sha256, shipped.decoder_sha256)
    assert (card.source, card.source_sha256) == ("packaged:nano", shipped.source_sha256)
    assert (card.trained, card.licence, card.family) == (True, "Apache-2.0", "nano")
    assert sum(path.stat().st_size for path in packaged.iterdir()) < 12 << 20
    assert models.prepare(made, "nano") == folder
    for name in ("packaged:other", "packaged:", "packaged:../nano", "packaged:nano/x"):
        assert "packaged:nano" in refused(NotFound, settings(tmp_path / "other", name))


def test_a_damaged_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(models.PACKAGE / "nano", tmp_path / "nano")
    with (tmp_path / "nano" / "decoder.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    monkeypatch.setattr(models, "PACKAGE", tmp_path)
    assert "decoder.safetensors has sha256" in refused(InvalidCheckpoint, settings(tmp_path, "packaged:nano"))
