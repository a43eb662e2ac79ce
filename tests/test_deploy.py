"""deploy/*.yaml: strictly Serve's schema, and the deployments that the app really builds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import serve_config
from cluster.errors import InvalidSettings
from serve_app.app import AppArgs
from serve_app.contract import INGRESS, decoder_deployment, encoder_deployment

FILES = sorted((Path(__file__).parent.parent / "deploy").glob("serve.*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_names_every_deployment_of_the_app_and_no_other(path: Path) -> None:
    (application,) = serve_config.read(path)["applications"]
    models = AppArgs(**application["args"]).models
    built = {INGRESS} | {name(model) for model in models for name in (encoder_deployment, decoder_deployment)}
    named = [one["name"] for one in application["deployments"]]
    assert sorted(named) == sorted(built)
    assert all(one["autoscaling_config"] for one in application["deployments"])
    assert all(one["max_queued_requests"] > 0 for one in application["deployments"])


def test_gpu_replicas_where_the_yaml_says_so() -> None:
    (application,) = serve_config.read(FILES[0].with_name("serve.gpu.yaml"))["applications"]
    gpus = {one["name"]: one["ray_actor_options"].get("num_gpus", 0) for one in application["deployments"]}
    assert gpus.pop(INGRESS) == 0
    assert all(gpus.values())


def _set(config: Any, path: list[Any], value: Any) -> Any:
    config = copy.deepcopy(config)
    node = config
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return config


ENCODER = ["applications", 0, "deployments", 1]


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (["aplications"], [], "aplications is no key"),
        (["http_options", "prot"], 1, "http_options.prot is no key"),
        (["applications", 0, "import_pth"], "x", "import_pth is no key"),
        ([*ENCODER, "max_ongoing_request"], 3, "max_ongoing_request is no key"),
        ([*ENCODER, "ray_actor_options", "num_gpu"], 1, "num_gpu is no key"),
        ([*ENCODER, "autoscaling_config", "max_replica"], 1, "max_replica is no key"),
        ([*ENCODER, "autoscaling_config", "min_replicas"], 99, "min_replicas"),
        ([*ENCODER, "autoscaling_config", "target_ongoing_requests"], -1, "greater than 0"),
        ([*ENCODER, "num_replicas"], 2, "num_replicas"),
        ([*ENCODER, "max_queued_requests"], "many", "max_queued_requests"),
        (["applications"], [], "no applications"),
    ],
)
def test_refuses_what_serve_lets_through(path: list[Any], value: Any, says: str) -> None:
    config = yaml.safe_load(FILES[0].with_name("serve.gpu.yaml").read_text())
    serve_config.check(config, "before")
    with pytest.raises(InvalidSettings, match=says):
        serve_config.check(_set(config, path, value), "serve.gpu.yaml")


def test_the_app_refuses_unknown_args() -> None:
    with pytest.raises(ValueError, match="extra"):
        AppArgs(modles=["nano"])
