"""DeepCell's token, where replicas that fetch with it fail: it is in nothing that Ray, Serve or a job leaves behind."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
import ray
import yaml
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from cluster import deepcell
from jobs import embed
from tests.conftest import App
from tests.gated_app import NAME
from tests.test_deepcell import CANARY, KEY, SOURCE, Store, archive, content, store  # noqa: F401  # fixtures

PATIENCE_S = 180.0
# Of a replica's first start, of the second, which asks for another address once, and of the third.
REFUSALS = ("bad token", "expired for good", "expired for good", "no json")


def test_a_token_is_seen_nowhere(
    app: App,
    store: Store,  # noqa: F811
    sample_images: Path,
    tmp_path: Path,
) -> None:
    secret = tmp_path / "token"
    secret.write_text(CANARY)
    settings = yaml.safe_load(Path(app.config).read_text())
    settings["models"][NAME] = {"source": SOURCE}
    settings["weights_dir"] = str(tmp_path / "weights")
    config = tmp_path / "gated.yaml"
    config.write_text(yaml.safe_dump(settings))
    environment = {"env_vars": {deepcell.TOKEN_FILE: str(secret)}}
    encoder = {"name": f"{NAME}-encoder", "ray_actor_options": {"num_cpus": 0, "runtime_env": environment}}
    args = {"config": str(config), "endpoint": deepcell.ENDPOINT, "md5": deepcell.MD5}
    application = {"name": NAME, "route_prefix": f"/{NAME}", "import_path": "tests.gated_app:build", "args": args}
    client = ServeSubmissionClient(app.dashboard)
    before = client.get_serve_details()["applications"]["cellray"]["deployed_app_config"]
    store.plan = REFUSALS
    client.deploy_applications({"applications": [before, {**application, "deployments": [encoder]}]})
    try:
        said = _refusals(client, store)
    finally:
        client.deploy_applications({"applications": [before]})
    assert "DeepCell" in said

    out = tmp_path / "out"  # a job, whose driver and tasks know the token too
    image = str(sample_images / "coins_grey8.png")
    assert embed.main([image, str(out), "--model", "nano", "--config", str(config)]) == 0

    assert {post["token"] for post in store.posts} == {CANARY}
    session = Path(ray._private.worker._global_node.get_session_dir_path())  # type: ignore[attr-defined]
    jobs = httpx.get(f"{app.dashboard}/api/jobs/", timeout=60).text
    told = [said, jobs, json.dumps(client.get_serve_details(), default=str)]
    assert not [text[:200] for text in told if CANARY in text]
    left = [path for folder in (session, out, tmp_path / "weights") for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".parquet" for path in left)
    assert any("ServeReplica" in path.name or "replica" in path.name for path in left)
    assert [path for path in left if CANARY.encode() in path.read_bytes()] == []


def _refusals(client: ServeSubmissionClient, store: Store) -> str:  # noqa: F811
    """What Serve says once the replica was refused in each way."""
    deadline, said = time.monotonic() + PATIENCE_S, ""
    while time.monotonic() < deadline:
        found = client.get_serve_details()["applications"].get(NAME, {})
        said = json.dumps(found, default=str)
        if len(store.posts) >= len(REFUSALS) and "DEPLOY_FAILED" in said:
            return said
        time.sleep(0.1)
    raise AssertionError(f"{len(store.posts)} of {len(REFUSALS)} refusals: {said}")
