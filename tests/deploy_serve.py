"""What is wrong with a Serve config of ours."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from functools import cache
from typing import Any

from ray.serve import Application

from cluster import serve_config
from cluster.errors import CellrayError
from serve_app.app import AppArgs, build
from serve_app.contract import APP_NAME


def serve_app(config: Any, where: str) -> Iterator[str]:
    """Strictly Serve's schema, with one entry for each deployment that the app builds."""
    try:
        serve_config.check(config, where)
    except CellrayError as error:
        yield str(error)
        return
    ipaddress.ip_address(config["http_options"]["host"])
    for application in config["applications"]:
        found = application["import_path"], application["name"]
        if found != ("serve_app.app:build", APP_NAME) or application["route_prefix"] != "/":
            yield f"import_path and name are {found}, or the route is not /"
        named = sorted(one["name"] for one in application["deployments"])
        made = built(tuple(AppArgs(**application["args"]).models))
        if named != made:
            yield f"deployments are {named}, the app builds {made}"
        for one in application["deployments"]:
            if one.get("max_queued_requests", 1) < 1:
                yield f"{one['name']}: its queue has no bound"


def room(config: Any, shapes: list[tuple[float, float]], counts: list[int]) -> Iterator[str]:
    """Each replica fits on a machine, by its (CPUs, GPUs), and so many machines carry a deployment at its most."""
    most = sum(gpus * count for (_, gpus), count in zip(shapes, counts, strict=True))
    for one in config["applications"][0]["deployments"]:
        options = one.get("ray_actor_options", {})
        needs, gpus = options.get("num_cpus", 1), options.get("num_gpus", 0)
        if not any(needs <= cpu and gpus <= gpu for cpu, gpu in shapes):
            yield f"{one['name']} fits on no machine"
        if gpus * one["autoscaling_config"]["max_replicas"] > most:
            yield f"{one['name']}: its replicas want more than {most} GPUs"


@cache
def built(models: tuple[str, ...]) -> list[str]:
    """The names of the deployments that the app makes for these models."""
    ingress = build(AppArgs(models=list(models)))._bound_deployment
    return sorted(
        [ingress.name, *(one._bound_deployment.name for one in ingress.init_args if isinstance(one, Application))]
    )
