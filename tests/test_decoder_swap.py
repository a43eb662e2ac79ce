"""The decoder of a running app is exchanged by `user_config`, and no request notices but by its masks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.exceptions import RayTaskError
from safetensors.torch import save_file

from cluster import settings
from cluster.errors import CellrayError, Conflict, InvalidSettings
from cluster.settings import WeightsSettings
from jobs import replicas
from jobs.shards import Pipeline, Progress
from serve_app import model_replicas, models
from serve_app.contract import ModelInfo
from serve_app.model import checkpoint, modules
from serve_app.model.prompts import DecodeRequest, Prompts
from serve_app.service import foreign
from tests.conftest import App

DECODER = "nano-decoder"
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def tuned(app: App, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app's nano with another decoder, in one file as jobs.finetune writes it."""
    made = settings.load(app.config)
    state, _, _ = models.read(models.find(made, "nano"), made)
    other = modules.seeded("nano", 5)
    path = tmp_path_factory.mktemp("tuned") / "model.safetensors"
    save_file({name: (state if name.startswith("image_encoder.") else other)[name] for name in other}, path)
    return path


@pytest.fixture
def configure(app: App) -> Iterator[Callable[[Any], None]]:
    """Sets the decoder's user_config as `serve deploy` does; the model's own decoder is back afterwards."""
    client = ServeSubmissionClient(app.dashboard)
    before = client.get_serve_details()["applications"]["cellray"]["deployed_app_config"]

    def deploy(user_config: Any) -> None:
        changed = [
            {**one, "user_config": user_config} if one["name"] == DECODER else one for one in before["deployments"]
        ]
        client.deploy_applications({"applications": [{**before, "deployments": changed}]})

    yield deploy
    deploy({"decoder": None})
    _until(lambda: not _info(app)["warning"] and _running(client))


def _running(client: ServeSubmissionClient) -> bool:
    return client.get_serve_details()["applications"]["cellray"]["status"] == "RUNNING"


def _info(app: App) -> dict[str, Any]:
    (found,) = [one for one in httpx.get(f"{app.http}/v1/models", timeout=60).json() if one["name"] == "nano"]
    return dict(found)


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s"
        time.sleep(0.1)


def test_no_request_is_dropped_and_none_is_mixed(
    app: App, tuned: Path, configure: Callable[[Any], None], sample_images: Path
) -> None:
    data = (sample_images / "coins_grey8.png").read_bytes()
    answers: list[tuple[int, str]] = []
    stop = threading.Event()

    def ask(client: httpx.Client) -> tuple[int, str]:
        files, form = {"image": data}, {"request": '{"boxes": [[20, 30, 70, 80], [100, 40, 150, 90]]}'}
        answer = client.post("/v1/segment", files=files, data=form)
        return answer.status_code, str(answer.json().get("masks"))

    def keep_asking() -> None:
        with httpx.Client(base_url=app.http, timeout=60) as client:
            while not stop.is_set():
                answers.append(ask(client))

    with httpx.Client(base_url=app.http, timeout=60) as client:
        own, before = ask(client), _info(app)
        threads = [threading.Thread(target=keep_asking) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            _until(lambda: len(answers) > 3)
            configure({"decoder": {"source": str(tuned)}})
            _until(lambda: _info(app)["decoder_sha256"] != before["decoder_sha256"])
            asked = len(answers)
            _until(lambda: len(answers) > asked + 6)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        after, new = _info(app), ask(client)
    assert after["encoder_sha256"] == before["encoder_sha256"]
    assert own[0] == new[0] == 200
    assert own != new
    assert set(answers) == {own, new}
    stale = ModelInfo(**{one.name: before[one.name] for one in fields(ModelInfo)})
    request = DecodeRequest(
        np.zeros(stale.embedding_shape, np.float16), (16, 16), Prompts(boxes=np.array([[1, 1, 9, 9]], np.float32))
    )
    with pytest.raises(RayTaskError) as caught:
        replicas.decoder(stale, 60)([request])
    assert isinstance(foreign(caught.value), Conflict)
    assert f"{after['decoder_sha256'][:12]}… answers" in str(foreign(caught.value))


def test_a_job_whose_decoder_was_exchanged_stops_and_writes_no_error_rows() -> None:
    def call(_: list[int]) -> list[int | CellrayError]:
        raise Conflict("the decoder was exchanged")

    pipeline = Pipeline[int, int, int](lambda one: one, call, lambda _: 1, 2, Progress(0))
    with pytest.raises(Conflict, match="exchanged"):
        list(pipeline.run([1, 2, 3]))


@pytest.mark.parametrize(
    ("user_config", "says"),
    [
        ({"decoder": {"source": "seeded:nano:5"}}, "another encoder"),
        ({"decoder": {"source": "/nowhere/model.safetensors"}}, "there is no checkpoint"),
        ({"decodr": {}}, "decodr"),
    ],
)
def test_a_decoder_that_cannot_be_had_leaves_the_former_one(
    app: App, configure: Callable[[Any], None], user_config: Any, says: str
) -> None:
    before = _info(app)
    configure(user_config)
    _until(lambda: bool(_info(app)["warning"]))
    after = _info(app)
    assert says in after["warning"]
    assert {**after, "warning": ""} == before


def test_a_replica_does_not_start_with_it(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_replicas, "_use_cores", lambda: None)
    replica = model_replicas.DecoderReplica(settings.load(app.config), "nano")
    with pytest.raises(InvalidSettings, match="another encoder"):
        asyncio.run(replica.reconfigure({"decoder": {"source": "seeded:nano:5"}}))


def test_a_model_s_own_halves_where_nothing_is_chosen(app: App, tuned: Path) -> None:
    made = settings.load(app.config)
    own = models.prepare_decoder(made, "nano", None)
    assert own == models.prepare(made, "nano")
    other = models.prepare_decoder(made, "nano", WeightsSettings(source=str(tuned)))
    cards = [checkpoint.ModelCard.read(folder) for folder in (own, other)]
    assert cards[0].encoder_sha256 == cards[1].encoder_sha256
    assert cards[0].decoder_sha256 != cards[1].decoder_sha256
