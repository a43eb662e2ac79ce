"""The Python client, against the real service and against servers that misbehave."""

from __future__ import annotations

import asyncio
import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from cluster.errors import DeadlineExceeded, Internal, InvalidImage, InvalidInput, InvalidPrompt, NotFound, Unavailable
from jobs import cli
from serve_app import client
from serve_app.client import AsyncClient, Client
from serve_app.model.masks import decode
from tests.conftest import App


@pytest.fixture(scope="module")
def cellray(app: App) -> Iterator[Client]:
    with Client(app.http) as made:
        yield made


@pytest.fixture(scope="module")
def coins(sample_images: Path) -> Path:
    return next(sample_images.rglob("coins_grey8.png"))


def test_an_image_becomes_an_embedding_and_masks(cellray: Client, coins: Path) -> None:
    assert cellray.models()[0]["name"] == "nano"
    made = cellray.embed(coins)
    assert (made.array.dtype, made.array.shape, made.model) == (np.float16, (256, 32, 32), "nano")
    again = cellray.embedding(made.embedding_id)
    assert again.original == made.original
    np.testing.assert_array_equal(again.array, made.array)
    boxes = np.array([[20, 30, 120, 130], [0, 0, 300, 300]], np.float32)
    found = cellray.segment(embedding_id=made.embedding_id, boxes=boxes)
    assert (len(found), found.masks().shape, found.found.boxes.shape) == (2, (2, *made.original), (2, 4))
    assert found.masks().sum(axis=(1, 2)).tolist() == found.found.areas.tolist()
    sent = cellray.segment(coins.read_bytes(), boxes=boxes, model="nano")
    assert (sent.found.counts, sent.image_id) == (found.found.counts, made.image_id)
    assert len(cellray.segment(image_id=made.image_id, points=[[[60, 60]]], multimask=True)) == 3


def test_nothing_found_is_no_mask(cellray: Client, coins: Path) -> None:
    found = cellray.automask(coins, points_per_side=1, pred_iou_thresh=1e9)
    assert (len(found), found.masks().shape[0], found.found.boxes.shape) == (0, 0, (0, 4))


def test_many_images_come_in_their_order_each_with_its_own_error(cellray: Client, sample_images: Path) -> None:
    bad = next(sample_images.rglob("not_an_image.png"))
    paths = [*sorted(sample_images.rglob("*_grey8.png")), bad, "/no/such.png"] * 3
    answers = list(cellray.embed_many(iter(paths)))
    assert [path for path, _ in answers] == paths
    for path, answer in answers:
        kind = {str(bad): InvalidImage, "/no/such.png": NotFound}.get(str(path), client.Embedding)
        assert isinstance(answer, kind), (path, answer)
    for _ in cellray.embed_many(paths):
        break  # whoever stops early leaves nothing behind
    assert cellray.models()


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        (InvalidPrompt, {"image_id": "0" * 64, "boxes": [[0, 0, 1]]}),
        (InvalidInput, {"boxes": [[0, 0, 9, 9]]}),
        (NotFound, {"embedding_id": "none", "boxes": [[0, 0, 9, 9]]}),
        (NotFound, {"embedding_id": "none", "boxes": [[0, 0, 9, 9]], "model": "no such"}),
    ],
)
def test_errors_are_those_of_the_service(cellray: Client, kind: type[Exception], asked: dict[str, Any]) -> None:
    with pytest.raises(kind):
        cellray.segment(**asked)


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any]]]:
    """(URL, what it will answer: (status, headers, body), or None: it hangs up); then it answers `[]`."""
    plan: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer = plan.pop(0) if plan else (200, {}, b"[]")
            if answer is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, headers, body = answer
            time.sleep(float(headers.pop("wait", 0)))
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}", plan
    made.shutdown()
    thread.join()
    made.server_close()


BUSY = json.dumps({"error": "all replicas are busy", "error_type": "Overloaded"}).encode()


def test_a_busy_service_is_asked_again_when_it_says(server: tuple[str, list[Any]]) -> None:
    url, plan = server
    lost = (500, {}, b"Internal Server Error")  # as Serve has it
    dated = (503, {"retry-after": "Sun, 22 Nov 2026 22:00:00 GMT"}, b"")
    plan += [(503, {"retry-after": "1"}, BUSY), None, (429, {}, b"slow down"), lost, dated]
    start = time.monotonic()
    with Client(url) as made:
        assert made.models() == []
    assert (plan, time.monotonic() - start > 1) == ([], True)


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        ((503, {"retry-after": "60"}, BUSY), Unavailable, "all replicas are busy"),
        ((502, {}, b"<html>no upstream"), Unavailable, "answered 502: <html>no upstream"),
        ((404, {}, b"not here"), InvalidInput, "answered 404: not here"),
        ((500, {}, json.dumps({"error": "x", "error_type": "SystemExit"}).encode()), Unavailable, "answered 500"),
        ((500, {}, json.dumps({"error": "a defect", "error_type": "Internal"}).encode()), Internal, "a defect"),
        ((504, {}, b"upstream"), DeadlineExceeded, "answered 504"),
        ((200, {"wait": "3"}, b"[]"), DeadlineExceeded, "did not answer within 2 s"),
    ],
)
def test_what_cannot_be_had_in_time_is_an_error(
    server: tuple[str, list[Any]], answer: Any, kind: type[Exception], said: str
) -> None:
    url, plan = server
    status, headers, body = answer
    plan += [(status, {**headers}, body) for _ in range(8)]
    with Client(url, timeout_s=2) as made, pytest.raises(kind, match=said):
        made.models()


def test_nobody_there_is_an_error_that_names_the_address() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with Client(url, timeout_s=2) as made, pytest.raises(Unavailable, match=url):
        made.models()


def test_the_same_awaited(server: tuple[str, list[Any]]) -> None:
    async def both() -> list[Any]:
        async with AsyncClient(server[0]) as made:
            return await asyncio.gather(made.models(), made.models())

    assert asyncio.run(both()) == [[], []]


def test_the_same_by_serves_handle(app: App, coins: Path, cellray: Client) -> None:
    with Client("serve://cellray") as made:
        found = made.embed(coins)
        same = cellray.embedding(found.embedding_id)
        np.testing.assert_array_equal(found.array, same.array)
        masks = made.segment(embedding_id=found.embedding_id, boxes=[[20, 30, 120, 130]])
        again = cellray.segment(embedding_id=found.embedding_id, boxes=[[20, 30, 120, 130]])
        assert masks.found.counts == again.found.counts
        with pytest.raises(InvalidPrompt, match="leaves the image"):
            made.segment(embedding_id=found.embedding_id, boxes=[[20, 30, 12000, 130]])
    with pytest.raises(NotFound, match="'nowhere' is not deployed"):
        Client("serve://nowhere")


def test_from_the_shell(app: App, coins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service = ["client", "--url", app.http]
    bad = coins.parent / "broken" / "not_an_image.png"
    assert cli.main([*service, "models"]) == 0
    assert capsys.readouterr().out.startswith("nano\t256 px\tApache-2.0\ttrained")
    assert cli.main([*service, "embed", str(coins), str(bad), "--out", str(tmp_path / "e")]) == 1
    printed = capsys.readouterr()
    assert f"{bad}: UnsupportedImage" in printed.err
    made = np.load(tmp_path / "e" / "coins_grey8.png.npz")
    assert made["embedding"].shape == (256, 32, 32)
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["coins_grey8.png.npz"]
    identity = str(made["embedding_id"])
    assert identity in printed.out

    box, labels, rows = "20,30,120,130", tmp_path / "m.png", tmp_path / "m.json"
    assert cli.main([*service, "segment", identity, "--box", box, "--box", "0,0,50,50", "--out", str(labels)]) == 0
    assert set(np.unique(np.array(PIL.Image.open(labels)))) <= {0, 1, 2}
    assert cli.main([*service, "segment", str(coins), "--box", box, "--off", "25,35", "--out", str(rows)]) == 0
    (mask,) = json.loads(rows.read_text())["masks"]
    assert mask["area"] == decode([mask["segmentation"]["counts"]], (303, 384)).sum()
    assert cli.main([*service, "automask", str(made["image_id"]), "--option", "points_per_side=4"]) == 0

    for wrong, code, says in (
        (["segment", str(coins)], 2, "give --box or --point"),
        (["segment", str(coins), "--box", box, "--out", "x.jpg"], 2, "ends in .json"),
        (["segment", "/no/such.png", "--box", box], 1, "no embedding of /no/such.png"),
        (["automask", str(coins), "--option", "points"], 2, "expected NAME=NUMBER"),
        (["automask", str(coins), "--option", "points=3"], 2, "points"),
        (["--key-file", "/no/key", "models"], 1, "key file /no/key"),
    ):
        capsys.readouterr()
        assert cli.main([*service, *wrong]) == code
        assert says in capsys.readouterr().err
