"""What can be seen of the running service: times, metrics, logs; and that a key is nowhere among it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from cluster import keys, scrape, serve_config, settings, telemetry
from cluster.errors import Unauthorized
from cluster.storage import Storage
from serve_app import contract
from serve_app.client import Client
from serve_app.contract import Embedding, Timed
from serve_app.deployments import IngressReplica, deployment
from tests.conftest import DEPLOY, App
from tests.s3 import Place
from tests.test_store import commit

SECRET = "cellray_CANARY-in-the-service-0123456789"
WRONG = "cellray_CANARY-of-a-stranger-0123456789"
PATIENCE_S = 60
PAGE = "https://page.example"


@pytest.fixture(scope="module")
def image(sample_images: Path) -> bytes:
    return (sample_images / "coffee_rgb.png").read_bytes()


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guarded") / "keys"
    path.write_text(f"alice: {hashlib.sha256(SECRET.encode()).hexdigest()}")
    return path


@pytest.fixture(scope="module")
def guarded(app: App, keys_file: Path) -> Iterator[httpx.Client]:
    """A second ingress over the app's replicas, which asks for keys and has a data set of its own; as alice."""
    dataset = str(keys_file.parent / "dataset")
    made = settings.load(environ={}, datasets=[dataset], service={"keys": str(keys_file), "allow_origins": [PAGE]})
    handles = [
        serve.get_deployment_handle(name("nano"), app_name=contract.APP_NAME)
        for name in (contract.encoder_deployment, contract.decoder_deployment)
    ]
    ingress = deployment(IngressReplica, contract.INGRESS).options(ray_actor_options={"num_cpus": 0})
    serve.run(ingress.bind(made, ["nano"], *handles, None), name="guarded", route_prefix="/guarded")
    try:
        headers = {"authorization": f"Bearer {SECRET}"}
        with httpx.Client(base_url=f"{app.http}/guarded", timeout=60, headers=headers) as client:
            yield client
    finally:
        serve.delete("guarded")


def committed(client: httpx.Client, keys_file: Path) -> str:
    """The id of an embedding that only the data set has."""
    (model,) = client.get("/v1/models").json()
    shape = model["embedding_shape"]
    one = Embedding("a" * 64, "b" * 64, "nano", model["encoder_sha256"], (60, 80), (192, 256), np.ones(shape, "f2"))
    commit(Place(Storage(), str(keys_file.parent / "dataset")), 0, [("image.png", "", one)])
    return one.embedding_id


def test_a_replica_s_answer_is_a_list_that_travels() -> None:
    import ray.cloudpickle

    made = Timed([np.ones(3), "b"], "nano", 0.25)
    got = ray.cloudpickle.loads(ray.cloudpickle.dumps(made))
    assert (type(got), got.model, got.ran_s) == (Timed, "nano", 0.25)
    assert (len(got), got[0].sum(), got[1]) == (2, 3, "b")


def test_answers_say_what_their_time_went_to(app: App, image: bytes) -> None:
    def times(answer: httpx.Response) -> tuple[float, float, float]:
        assert answer.status_code == 200, answer.text
        total, queue, inference = (float(answer.headers[f"x-{name}-time"]) for name in ("total", "queue", "inference"))
        return total, queue, inference

    fresh = image + b"\0" * 7  # not in the cache
    with httpx.Client(base_url=app.http, timeout=60) as http:
        embedded = http.post("/v1/embed", content=fresh)
        total, queue, inference = times(embedded)
        assert queue > 0
        assert inference > 0
        assert queue + inference <= total
        assert times(http.post("/v1/embed", content=fresh))[1:] == (0, 0)
        asked = {"embedding_id": embedded.headers["x-embedding-id"], "boxes": [[20, 30, 300, 200]]}
        total, queue, inference = times(http.post("/v1/segment", json=asked))
        assert queue > 0
        assert inference > 0
        assert queue + inference <= total


def test_a_request_is_found_by_its_id_in_the_logs_of_all_that_worked_for_it(app: App, image: bytes) -> None:
    headers = {"x-request-id": "find-me-0123", "content-type": "image/png"}
    answer = httpx.post(f"{app.http}/v1/embed", content=image + b"\0" * 9, headers=headers, timeout=60)
    assert answer.headers["x-request-id"] == "find-me-0123"
    found: dict[str, dict[str, Any]] = {}
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and len(found) < 2:
        for path in logs().glob("replica_cellray_*.log"):
            for line in path.read_text().splitlines():
                if "find-me-0123" in line:
                    found[path.name.split("_")[2]] = json.loads(line)
    assert {*found} == {"ingress", "nano-encoder"}
    assert all(one["request_id"] == "find-me-0123" for one in found.values())
    line = found["ingress"]
    assert (line["method"], line["path"], line["status"], line["key"]) == ("POST", "/v1/embed", 200, "")
    assert (line["received"], line["sent"]) == (len(image) + 9, len(answer.content))
    assert line["ms"] > 0


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("serve.*.yaml")), ids=lambda path: path.name)
def test_serve_logs_in_json_and_no_paths(path: Path) -> None:
    """Serve's own line for a request has its path, and there people put what is secret."""
    assert serve_config.read(path)["logging_config"] == {"encoding": "JSON", "enable_access_log": False}


def logs() -> Path:
    return Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"  # type: ignore[attr-defined]


def test_keys_are_asked_for_on_serve_too(guarded: httpx.Client, image: bytes) -> None:
    assert guarded.get("/v1/models").json()[0]["name"] == "nano"
    bare = httpx.Client(base_url=guarded.base_url, timeout=60)
    assert bare.get("/healthz").status_code == 200
    assert bare.get("/").status_code in (200, 307)
    assert bare.get("/readyz").json() == {"status": "ready"}
    assert bare.get("/openapi.json").json()["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert bare.get("/v1/images").status_code == 401
    for path in ("/v1/models", "/metrics"):
        assert bare.get(path).status_code == 401, path
        assert guarded.get(path).status_code == 200, path
    assert bare.post("/v1/embed", content=image).status_code == 401
    assert bare.get("/v1/models", headers={"authorization": f"Bearer {WRONG}"}).status_code == 401
    with Client(str(guarded.base_url), key=SECRET) as client:
        assert client.models()[0]["name"] == "nano"
    with Client(str(guarded.base_url)) as client, pytest.raises(Unauthorized):
        client.models()


def test_pages_of_the_named_origins_alone_may_call(app: App, guarded: httpx.Client) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    bare = {"authorization": ""}
    preflight = guarded.options("/v1/embed", headers={**bare, **asked, "origin": PAGE})
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, PAGE)
    answer = guarded.get("/v1/models", headers={"origin": PAGE})
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["access-control-expose-headers"] == "*"
    assert guarded.get("/v1/models", headers={**bare, "origin": PAGE}).headers["access-control-allow-origin"] == PAGE
    for url, origin in ((guarded.base_url, "https://other.example"), (app.http, PAGE)):
        for method in ("OPTIONS", "GET"):
            got = httpx.request(method, f"{str(url).rstrip('/')}/v1/models", headers={**asked, "origin": origin})
            assert "access-control-allow-origin" not in got.headers


def test_metrics_have_all_that_is_named_and_the_dashboard_asks_for_no_other(
    guarded: httpx.Client, keys_file: Path, image: bytes
) -> None:
    embedded = guarded.post("/v1/embed", content=image + b"\0" * 11)
    asked = {"embedding_id": embedded.headers["x-embedding-id"]}
    assert guarded.post("/v1/segment", json={**asked, "boxes": [[20, 30, 300, 200]]}).status_code == 200
    assert guarded.post("/v1/automask", json={**asked, "points_per_side": 2}).status_code == 200
    assert guarded.get(f"/v1/embeddings/{committed(guarded, keys_file)}").status_code == 200
    assert guarded.get("/v1/models", headers={"authorization": ""}).status_code == 401
    assert guarded.get("/v1/nothing-here").status_code == 404

    board = json.loads((DEPLOY / "grafana" / "cellray.json").read_text())
    queries = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    wanted = {*re.findall(r"ray_\w+", queries)}
    assert {f"ray_{name}" for name in telemetry.METRICS} == {
        re.sub("_(bucket|count|total)$", "", name) for name in wanted
    }
    ours, wanted = wanted, {name for name in wanted if not re.search("_(cells|cellfinder)_", name)}  # of a CellSAM
    lines = (  # other apps of this Ray have metrics too: these are of the requests above
        r'request_seconds_count{.*route="/v1/embed".*status="200"',
        r'rejected_total{.*reason="key"',
        r'batch_items_count{.*model="nano".*part="encoder"',
    )
    end, names, text = time.monotonic() + PATIENCE_S, set[str](), ""
    while time.monotonic() < end and (wanted - names or not all(re.search(line, text) for line in lines)):
        answer = guarded.get("/metrics")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == scrape.CONTENT_TYPE
        text = answer.text
        names = {line.split("{")[0] for line in text.splitlines() if not line.startswith("#")}
        time.sleep(1)
    assert not wanted - names
    assert {one.name for one in text_string_to_metric_families(text)} >= {
        re.sub("_(bucket|count|total)$", "", name) for name in wanted
    }
    assert len(ours) > len(wanted)
    assert all(name.startswith(scrape.PREFIX) for name in names)
    assert [line for line in lines if not re.search(line, text)] == []
    assert "nothing-here" not in text


def test_a_key_is_nowhere(app: App, guarded: httpx.Client, keys_file: Path) -> None:
    """Not in an answer, a log, or any file of Ray's session; wherever people put it."""
    answers = [
        guarded.get("/v1/models"),
        guarded.get("/v1/models", headers={"authorization": f"Bearer {WRONG}"}),
        guarded.get(f"/v1/models?key={SECRET}"),
        guarded.get(f"/v1/{SECRET}"),
        guarded.get(f"/v1/embeddings/{SECRET}"[:60]),
        guarded.post("/v1/segment", content=b"{", headers={"content-type": "application/json"}),
        httpx.get(f"{app.http}/guarded/v1/models", headers={"authorization": SECRET}),
    ]
    before = keys_file.read_text()
    keys_file.write_text(f"alice: {SECRET}")  # a key in the place of its hash
    time.sleep(keys.CHECK_S)
    answers.append(guarded.get("/v1/models"))
    assert answers[-1].status_code == 200  # the last good file stays
    keys_file.write_text(before)
    answers.append(guarded.get("/metrics"))
    for answer in answers:
        assert SECRET not in answer.text + str(answer.headers)
    written = {
        path: path.read_bytes()
        for path in Path(ray._private.worker._global_node.get_session_dir_path()).rglob("*")  # type: ignore[attr-defined]
        if path.is_file() and not path.is_symlink()
    }
    assert any(b"GET other 401 in" in content for content in written.values())  # what should be there is
    for path, content in written.items():
        assert SECRET.encode() not in content, path
        assert WRONG.encode() not in content, path


def test_scraping_merges_nodes_and_leaves_out_what_is_not_ours() -> None:
    node = '# HELP ray_x a\n# TYPE ray_x gauge\nray_x 1\n# HELP {0} b\n# TYPE {0} counter\n{0}{{node="{1}"}} {1}\n'
    merged = scrape.merge(
        [node.format("ray_cellray_a_total", 1), "", node.format("ray_cellray_a_total", 2), "#\nray_cellray_"]
    )
    assert merged == (
        "# HELP ray_cellray_a_total b\n# TYPE ray_cellray_a_total counter\n"
        'ray_cellray_a_total{node="1"} 1\nray_cellray_a_total{node="2"} 2\n'
    )


@pytest.mark.parametrize("how", ["silent", "endless", "failing", "closing", "away"])
def test_a_node_that_does_not_answer_is_left_out(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def good(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = b"# TYPE ray_cellray_a_total counter\nray_cellray_a_total 1\n"
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))

    async def bad(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if how == "failing":
            writer.write(b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n")
        if how == "closing":
            writer.close()
        if how == "endless":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            with suppress(ConnectionError):
                while not writer.is_closing():
                    writer.write(b"ray_cellray_a_total 2\n" * 1000)
                    await writer.drain()

    async def main() -> str:
        servers = [await asyncio.start_server(one, "127.0.0.1", 0) for one in (bad, good)]
        urls = ["http://{}:{}/metrics".format(*one.sockets[0].getsockname()) for one in servers]
        if how == "away":
            servers[0].close()
        monkeypatch.setattr(scrape, "agents", lambda: urls)
        return await scrape.cluster_metrics()

    monkeypatch.setattr(scrape, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(scrape, "MAX_NODE_BYTES", 100_000)
    assert asyncio.run(main()) == "# TYPE ray_cellray_a_total counter\nray_cellray_a_total 1\n"
