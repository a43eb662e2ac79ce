"""What `cellray doctor` looks at, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster import serve_config
from cluster import settings as settings_module
from cluster.dashboard import Dashboard, Node
from cluster.errors import CellrayError
from cluster.settings import Settings

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """`found` in one line; where it is not fine, what was expected and how to mend it."""

    check: str
    verdict: str
    found: str
    expected: str = ""
    mend: str = ""


class Unseen(Exception):
    """What a check needs cannot be had; another check says why."""


@dataclass(frozen=True)
class Demand:
    """What a deployment asks for: its replicas at the start, and the resources of each as Ray counts them."""

    deployment: str
    replicas: int
    each: dict[str, float]


@dataclass(frozen=True)
class Setup:
    """What the user would run. `config` is the settings' file, `address` a Ray's, None for one that is started here.

    `kept_weights` gives the files of a model that are on this node, with their sha256.
    """

    serve_config: Path
    config: str | None
    address: str | None
    input: str | None
    output: str | None
    folder: Path  # where jobs are submitted
    kept_weights: Callable[[Settings, str], dict[Path, str]]

    @cached_property
    def read_serve(self) -> dict[str, Any] | CellrayError:
        try:
            return serve_config.read(self.serve_config)
        except CellrayError as error:
            return error

    @property
    def serve(self) -> dict[str, Any]:
        if isinstance(self.read_serve, CellrayError):
            raise Unseen("the Serve config cannot be used")
        return self.read_serve

    @property
    def settings_file(self) -> str | None:
        """Raises Unseen."""
        return self.config or next((args["config"] for args in self.args if args.get("config")), None)

    @property
    def args(self) -> list[dict[str, Any]]:
        """Of the apps. Raises Unseen."""
        return [one.get("args") or {} for one in self.serve["applications"]]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(name for args in self.args for name in args.get("models") or ["nano"]))

    @cached_property
    def settings(self) -> Settings:
        try:
            return settings_module.load(self.settings_file)
        except CellrayError:
            raise Unseen("the settings cannot be read") from None

    @cached_property
    def dashboard(self) -> Dashboard:
        assert self.address
        try:
            return Dashboard(self.address)
        except CellrayError:
            raise Unseen("the cluster does not answer") from None

    @cached_property
    def nodes(self) -> list[Node]:
        try:
            return self.dashboard.nodes()
        except CellrayError:
            raise Unseen("the cluster does not answer") from None

    @property
    def demands(self) -> list[Demand]:
        """Of all deployments that the Serve config names."""
        return [_demand(one) for app in self.serve["applications"] for one in app.get("deployments") or []]


def _demand(deployment: dict[str, Any]) -> Demand:
    scaling = deployment.get("autoscaling_config") or {}
    number = deployment.get("num_replicas")
    replicas = number if isinstance(number, int) else scaling.get("initial_replicas") or scaling.get("min_replicas", 1)
    options = deployment.get("ray_actor_options") or {}
    each = {"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus", 0), "memory": options.get("memory", 0)}
    return Demand(deployment["name"], int(replicas), {name: float(value or 0) for name, value in each.items()})
