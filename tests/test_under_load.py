"""How the service stands load, faults and updates: the real app, with replicas that a test can hold and kill."""

from __future__ import annotations

import io
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from select import select
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from cluster import serve_config, settings
from cluster.storage import Storage
from serve_app import contract, models
from serve_app.client import Client
from serve_app.contract import Embedding
from serve_app.model import encoder, preprocess
from tests.conftest import DEPLOY, App
from tests.loaded_app import FOLDER, HASTY, NAME
from tests.s3 import ROOT, Place
from tests.test_store import commit

PATIENCE_S = 120.0
IMAGES = 12
DEADLINE_S = 4.0
HUGE, SIDE = 6, 9500  # images of 90 megapixels
# Of ingress, encoder and decoder: requests at work, and waiting.
BOUNDS = {"ingress": (16, 16), "nano-encoder": (4, 4), "nano-decoder": (32, 32)}


def until(done: Callable[[], Any], what: str = "it is so") -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := done()):
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s: {what}"
        time.sleep(0.02)
    return found


def png(number: int, side: int = 64) -> bytes:
    """Other pixels for other numbers."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


class Loaded:
    """The app under test."""

    def __init__(self, app: App, folder: Path) -> None:
        self.folder, self.url, self.hasty = folder, f"{app.http}/{NAME}", f"{app.http}/{HASTY}"
        self.serve = ServeSubmissionClient(app.dashboard)
        self.before = self.serve.get_serve_details()["applications"]
        self.ids: list[str] = []
        self.fresh = itertools.count(10_000)

    def applications(self, **changed: Any) -> list[dict[str, Any]]:
        """`version` of the code, `replicas` of the decoder."""
        config = yaml.safe_load((DEPLOY / "serve.local.yaml").read_text())
        (main,) = config["applications"]
        for one in main["deployments"]:
            one["max_ongoing_requests"], one["max_queued_requests"] = BOUNDS[one["name"]]
        if "replicas" in changed:
            del main["deployments"][2]["autoscaling_config"]
            main["deployments"][2]["num_replicas"] = changed["replicas"]
        environment = {"env_vars": {"PYTHONPATH": str(ROOT), FOLDER: str(self.folder)}}
        main |= {"name": NAME, "route_prefix": f"/{NAME}", "import_path": "tests.loaded_app:build"}
        main |= {"args": {"config": str(self.folder / "cellray.yaml"), "version": changed.get("version", 0)}}
        hasty = {"name": HASTY, "route_prefix": f"/{HASTY}", "import_path": "tests.loaded_app:build_hasty"}
        hasty |= {"args": {"config": str(self.folder / "hasty.yaml")}, "deployments": main["deployments"][:1]}
        made = [{**main, "runtime_env": environment}, {**hasty, "runtime_env": environment}]
        serve_config.check({"applications": made}, "the app under load")
        return made

    def deploy(self, applications: list[dict[str, Any]]) -> None:
        others = [one["deployed_app_config"] for one in self.before.values()]
        self.serve.deploy_applications({"applications": [*others, *applications]})

    def running(self) -> bool:
        found = self.serve.get_serve_details()["applications"]
        assert all(one["status"] != "DEPLOY_FAILED" for one in found.values()), found[NAME]["message"]
        return all(one["status"] == "RUNNING" for one in found.values())

    def log(self, name: str) -> list[tuple[int, int]]:
        """(process id, items) of the batches that were begun."""
        path = self.folder / f"{name}.log"
        return [tuple(map(int, line.split())) for line in path.read_text().splitlines()] if path.exists() else []  # type: ignore[misc]

    def left(self) -> int:
        path = self.folder / "encoder.left"
        return len(path.read_text().splitlines()) if path.exists() else 0

    @contextmanager
    def holding(self, *names: str) -> Iterator[Callable[[], None]]:
        """No batch of theirs ends before the `with` does, or what it gives is called."""
        holds = [self.folder / f"{name}.hold" for name in names]

        def release() -> None:
            for hold in holds:
                hold.unlink(missing_ok=True)

        for hold in holds:
            hold.touch()
        try:
            yield release
        finally:
            release()

    @contextmanager
    def asking(self, ask: Callable[[int], None], clients: int) -> Iterator[Callable[[], int]]:
        """Clients that ask all the time; gives how often they were answered. Raises what a client did."""
        stop, turns = threading.Event(), itertools.count()
        answered: list[int] = []

        def client() -> None:
            while not stop.is_set():
                number = next(turns)
                ask(number)
                answered.append(number)

        with ThreadPoolExecutor(clients) as pool:
            asked = [pool.submit(client) for _ in range(clients)]

            def count() -> int:
                for one in asked:
                    if one.done():
                        one.result()
                return len(answered)

            try:
                yield count
            finally:
                stop.set()
            for one in asked:
                one.result()

    def new(self) -> bytes:
        """An image that nobody has seen."""
        return png(next(self.fresh))


def embed(url: str, image: bytes, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/embed", content=image, timeout=PATIENCE_S, **more)


@contextmanager
def opened(
    url: str, method: str, path: str, length: int = 0, headers: Mapping[str, str] | None = None
) -> Iterator[socket.socket]:
    """A connection on which a request's head was sent; its body of so many bytes may follow, or not."""
    to = urlsplit(url)
    facts = {"host": "a", "content-length": str(length), **(headers or {})}
    lines = [f"{method} {to.path}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in facts.items())]
    with socket.create_connection((to.hostname, to.port), PATIENCE_S) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        yield connection


def click(url: str, identity: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/segment", json={"embedding_id": identity, "points": [[[30, 30]]]}, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def loaded(app: App, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    folder = tmp_path_factory.mktemp("loaded")
    made = {"datasets": [str(folder / "dataset")]}
    (folder / "cellray.yaml").write_text(yaml.safe_dump(made))
    (folder / "hasty.yaml").write_text(yaml.safe_dump({**made, "limits": {"request_timeout_s": DEADLINE_S}}))
    found = Loaded(app, folder)
    found.ids = stored(folder)
    found.deploy(found.applications())
    try:
        until(found.running)
        yield found
    finally:
        found.deploy([])
        until(lambda: {*found.serve.get_serve_details()["applications"]} == {*found.before})


def stored(folder: Path) -> list[str]:
    """Ids of the images of the data set."""
    known = settings.load(str(folder / "cellray.yaml"), {})
    local = encoder.load(models.prepare(known, "nano"), "reference")
    info = models.describe("nano", local.card, "", "cpu", "float32")
    rows = []
    for number in range(IMAGES):
        data = png(number)
        image = preprocess.prepare(data, info.image_size, 10**8)
        (array,) = encoder.embed(local, [image.pixels])
        assert isinstance(array, np.ndarray)
        identity = contract.image_id(data)
        made = contract.embedding_id(identity, info.encoder_sha256, info.dtype)
        one = Embedding(made, identity, "nano", info.encoder_sha256, image.original, image.input, array)
        rows.append((f"{number}.png", "", one))
    commit(Place(Storage(), str(folder / "dataset")), 0, rows, encoder_sha256=info.encoder_sha256)
    return [one.embedding_id for _, _, one in rows]


def test_clicks_of_several_users_share_a_run_of_the_decoder(loaded: Loaded) -> None:
    for identity in loaded.ids:
        assert click(loaded.url, identity).status_code == 200
    begun = len(loaded.log("decoder"))
    with ThreadPoolExecutor(IMAGES) as pool:
        with loaded.holding("decoder"):
            first = pool.submit(click, loaded.url, loaded.ids[0])
            until(lambda: len(loaded.log("decoder")) > begun)
            others = [pool.submit(click, loaded.url, identity) for identity in loaded.ids[1:]]
            until(lambda: all(one.running() for one in others))
            time.sleep(0.5)  # until they are at the replica; those that are not take a run more
        answers = [one.result() for one in (first, *others)]
    assert [one.status_code for one in answers] == [200] * IMAGES
    assert [one.json()["embedding_id"] for one in answers] == loaded.ids
    runs = [items for _, items in loaded.log("decoder")[begun:]]
    assert sum(runs) == IMAGES
    assert len(runs) <= IMAGES / 2


def test_a_full_queue_is_an_answer(loaded: Loaded) -> None:
    work, wait = BOUNDS["nano-encoder"]
    with ThreadPoolExecutor(64) as pool, loaded.holding("encoder", "decoder") as release:
        images = [pool.submit(embed, loaded.url, loaded.new()) for _ in range(2 * (work + wait))]
        until(lambda: any(one.done() for one in images), "the ingress refuses what the encoder's queue has no room for")
        # Clicks fill the ingress too, while the decoder keeps them waiting, until Serve answers in its place.
        clicks = [pool.submit(click, loaded.url, identity) for identity in loaded.ids * 4]
        until(lambda: any(one.done() for one in clicks), "Serve refuses what the ingress's queue has no room for")
        release()
        answers = [one.result() for one in (*images, *clicks)]
    refused = [one for one in answers if one.status_code != 200]
    assert len(answers) - len(refused) >= work
    assert {one.status_code for one in refused} == {503}
    assert all(int(one.headers["retry-after"]) > 0 for one in refused)
    ours = [one for one in refused if one.headers["content-type"] == "application/json"]
    assert {one.json()["error_type"] for one in ours} == {"Overloaded"}
    assert len(ours) < len(refused)


def test_the_clients_of_a_full_service_wait(loaded: Loaded) -> None:
    count = 3 * sum(BOUNDS["nano-encoder"])
    statuses: list[int] = []

    async def see(answer: httpx.Response) -> None:
        statuses.append(answer.status_code)

    with Client(loaded.url, in_flight=count) as cellray, ThreadPoolExecutor(1) as pool:
        cellray._client.http.event_hooks = {"response": [see]}
        with loaded.holding("encoder"):
            wanted = pool.submit(list, cellray.embed_many([loaded.new() for _ in range(count)]))
            until(lambda: 503 in statuses, "some are refused")
        found = [one for _, one in wanted.result()]
    assert all(isinstance(one, Embedding) for one in found), found


def test_the_deadline_ends_a_request_whatever_its_client_says(loaded: Loaded) -> None:
    patient = {"x-request-timeout-seconds": "0", "x-request-disconnect-disabled": "?1"}
    work, _ = BOUNDS["nano-encoder"]
    begun, left = len(loaded.log("encoder")), loaded.left()
    with loaded.holding("encoder"), ThreadPoolExecutor(work) as pool:
        asked = [pool.submit(embed, loaded.hasty, loaded.new(), headers=patient) for _ in range(work)]
        for one in asked:
            answer = one.result()
            assert (answer.status_code, answer.json()["error_type"]) == (504, "DeadlineExceeded")
        under_way = loaded.log("encoder")[begun:]
        until(lambda: loaded.left() - left == work, "the replica knows")
    assert embed(loaded.url, loaded.new()).status_code == 200
    after = loaded.log("encoder")[begun + len(under_way) :]
    assert [items for _, items in after] == [1], "what had not begun by then was run"
    with opened(loaded.hasty, "POST", "/v1/embed", 1 << 20, patient) as connection:
        for _ in range(int(10 * PATIENCE_S)):  # a byte at a time
            connection.send(b"\x89")
            if select([connection], [], [], 0.1)[0]:
                break
        assert connection.recv(1000).startswith(b"HTTP/1.1 504 ")


def test_what_its_client_no_longer_waits_for_is_not_run(loaded: Loaded) -> None:
    work, wait = BOUNDS["nano-encoder"]
    begun, left = len(loaded.log("encoder")), loaded.left()
    with loaded.holding("encoder"):
        with ExitStack() as clients:
            for image in [loaded.new() for _ in range(work + wait)]:
                connection = clients.enter_context(opened(loaded.url, "POST", "/v1/embed", len(image)))
                connection.sendall(image)
            until(lambda: len(loaded.log("encoder")) > begun)
            time.sleep(1)  # until the others are in the queues; those that are not never will be
        under_way = loaded.log("encoder")[begun:]
        until(lambda: loaded.left() - left >= work, "the replica knows")
    assert embed(loaded.url, loaded.new()).status_code == 200
    after = loaded.log("encoder")[begun + len(under_way) :]
    assert [items for _, items in after] == [1], "what nobody waited for was run"


def test_huge_images_do_not_keep_clicks_waiting(loaded: Loaded) -> None:
    with ThreadPoolExecutor(HUGE) as pool:
        huge = [pool.submit(embed, loaded.url, image) for image in map(grey, range(HUGE))]
        start, beside = time.monotonic(), 0
        while not all(one.done() for one in huge):
            assert click(loaded.url, loaded.ids[beside % IMAGES]).status_code == 200
            beside += 1
        assert [one.result().status_code for one in huge] == [200] * HUGE
    end, alone = 2 * time.monotonic() - start, 0
    while time.monotonic() < end:
        assert click(loaded.url, loaded.ids[alone % IMAGES]).status_code == 200
        alone += 1
    print(f"clicks beside {HUGE} images of {SIDE}²: {beside}, alone in as long: {alone}")
    assert beside > alone / 20


def grey(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (SIDE, SIDE), shade).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("name", ["encoder", "decoder", "ingress"])
def test_who_tries_again_notices_no_kill(loaded: Loaded, name: str) -> None:
    with Client(loaded.url) as cellray:

        def ask(number: int) -> None:
            cellray.embed(loaded.new())
            cellray.segment(embedding_id=loaded.ids[number % IMAGES], points=[[[30, 30]]])

        with loaded.asking(ask, 3) as answered:
            until(lambda: answered() > 3)
            known = len(loaded.log(name))
            old = loaded.log(name)[-1][0]
            os.kill(old, signal.SIGKILL)
            start = time.monotonic()
            until(lambda: any(pid != old for pid, _ in loaded.log(name)[known:]), "another replica has started")
            before = answered()
            until(lambda: answered() > before + 3)
            print(f"{name} killed: all well again after {time.monotonic() - start:.1f} s")


def test_an_update_drops_no_request(loaded: Loaded) -> None:
    def ask(number: int) -> None:
        assert embed(loaded.url, loaded.new()).status_code == 200
        assert click(loaded.url, loaded.ids[number % IMAGES]).status_code == 200

    def serving(name: str) -> set[int]:
        known, before = len(loaded.log(name)), answered()
        until(lambda: answered() > before + 10)
        return {pid for pid, _ in loaded.log(name)[known:]}

    hold = loaded.folder / "encoder.first"
    with loaded.asking(ask, 2) as answered:
        encoders, decoders = serving("encoder"), serving("decoder")
        known = len(loaded.log("decoder"))
        hold.touch()
        loaded.deploy(loaded.applications(version=1, replicas=2))
        try:
            until(lambda: loaded.log("encoder")[-1][0] not in encoders, "a new encoder runs its first batch")
            assert serving("encoder") == encoders
            assert not loaded.running(), "it is said to be ready before its first answer"
        finally:
            hold.unlink()
        until(loaded.running)
        assert not encoders & serving("encoder")
        assert not decoders & serving("decoder")
        until(lambda: len({pid for pid, _ in loaded.log("decoder")[known:]} - decoders) == 2)
