"""What a cluster runs and what is pending, and why: from Serve's and Ray's own words, said shortly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.dashboard import Dashboard, Node
from cluster.errors import Unavailable

POLL_S = 0.5
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
GOOD = ("HEALTHY", "UPSCALING", "DOWNSCALING")
SERVES_OWN = ("initializing replica", "Initialized DeploymentHandle")  # of its log, which say no more than `starting`
GIB = 1 << 30


@dataclass(frozen=True)
class Deployment:
    """`why` says what is wrong or waited for; "" where nothing is."""

    name: str
    running: int
    wanted: int
    state: str
    why: str

    def __str__(self) -> str:
        some = f"{self.name}: {self.running} of {self.wanted} replica{'' if self.wanted == 1 else 's'}"
        return f"{some}, {self.why}" if self.why else some


@dataclass(frozen=True)
class App:
    name: str
    state: str
    why: str
    deployments: tuple[Deployment, ...]

    @property
    def healthy(self) -> bool:
        return self.state == "RUNNING" and all(one.state in GOOD for one in self.deployments)


@dataclass(frozen=True)
class Status:
    address: str
    ray: str
    python: str | None
    nodes: tuple[Node, ...]
    http: str  # Serve's URL; "" where Serve does not run
    proxies: tuple[tuple[str, str], ...]  # node, state
    apps: tuple[App, ...]

    @property
    def healthy(self) -> bool:
        """There is an app, and all there are can answer. Replicas that autoscaling waits for do not count."""
        return bool(self.apps) and all(one.healthy for one in self.apps) and not self.sick_proxies

    @property
    def sick_proxies(self) -> list[str]:
        return [f"{node} {state}" for node, state in self.proxies if state not in ("HEALTHY", "DRAINING")]


def read(dashboard: Dashboard) -> Status:
    """Raises as `Dashboard`."""
    versions, nodes, details = dashboard.versions(), dashboard.nodes(), dashboard.serve()
    return Status(
        dashboard.shown,
        versions.ray,
        versions.python,
        tuple(sorted(nodes, key=lambda node: (not node.head, node.name))),
        dashboard.http(details.get("http_options")),
        tuple((one.get("node_ip") or "", one["status"]) for one in (details.get("proxies") or {}).values()),
        tuple(_app(dashboard, name, app, nodes) for name, app in (details.get("applications") or {}).items()),
    )


def wait(dashboard: Dashboard, names: list[str], say: Callable[[str], None], timeout_s: float) -> None:
    """Until these apps run; says what is waited for as it changes.

    Raises:
        Unavailable: one failed, with the reason that its replica gave; or they are not ready after `timeout_s`.
    """
    deadline, said = time.monotonic() + timeout_s, {""}
    while True:
        apps, waiting = [], []
        try:
            found = dashboard.serve().get("applications") or {}
            nodes = dashboard.nodes() if found else []
            apps = [_app(dashboard, name, found[name], nodes) for name in names if name in found]
        except Unavailable as error:  # a busy one may miss a time-out
            waiting = [f"the dashboard: {error}"]
        for app in apps:
            if app.state in FAILED:
                raise Unavailable(f"the app {app.name} did not start: {app.why}")
        if not waiting and len(apps) == len(names) and all(app.healthy for app in apps):
            return
        waiting = (
            waiting or [str(one) for app in apps for one in app.deployments if one.why] or ["Serve to start the app"]
        )
        for text in waiting:
            if text not in said:
                say(f"waiting for {text}")
        said = set(waiting)
        if time.monotonic() > deadline:
            raise Unavailable(f"not ready after {timeout_s:.0f} s, still waiting for {'; '.join(waiting)}")
        time.sleep(POLL_S)


def lines(status: Status) -> Iterator[str]:
    """For people."""
    python = f", Python {status.python}" if status.python else ""
    yield f"cluster      {status.address}  Ray {status.ray}{python}"
    for node in status.nodes:
        yield f"node         {node.name}  {'head' if node.head else 'worker'}  {_resources(node.resources)}"
    yield f"gpus         {sum(node.resources.get('GPU', 0) for node in status.nodes):g}"
    yield f"service      {status.http or 'Serve does not run'}"
    for sick in status.sick_proxies:
        yield f"proxy        {sick}"
    for app in status.apps:
        yield f"app          {app.name}  {app.state}" + (f": {app.why}" if app.why else "")
        for one in app.deployments:
            yield f"  {one.name:28} {one.running} of {one.wanted}  {one.state}" + (f": {one.why}" if one.why else "")
    if not status.apps:
        yield "app          none: `cellray up` deploys one"


def ingress_replicas(details: Mapping[str, Any]) -> list[str]:
    """The names of the actors that take the apps' requests."""
    found = []
    for app in (details.get("applications") or {}).values():
        first = (app.get("deployment_topology") or {}).get("ingress_deployment")
        replicas = (app["deployments"].get(first) or {}).get("replicas") or []
        found += [one["actor_name"] for one in replicas if one["state"] == "RUNNING" and one.get("actor_name")]
    return found


def _app(dashboard: Dashboard, name: str, app: Mapping[str, Any], nodes: list[Node]) -> App:
    deployments = tuple(_deployment(dashboard, one, nodes) for one in app["deployments"].values())
    reasons = [app["message"], *(one["message"] for one in app["deployments"].values())]
    return App(name, app["status"], _last_line(reasons) if app["status"] in FAILED else "", deployments)


def _deployment(dashboard: Dashboard, one: Mapping[str, Any], nodes: list[Node]) -> Deployment:
    replicas, wanted = one["replicas"], int(one["target_num_replicas"])
    running = sum(replica["state"] == "RUNNING" for replica in replicas)
    why = ""
    if one["status"] in FAILED:
        why = _last_line([one["message"]])
    elif one["status"] != "HEALTHY" or running < wanted:
        starting = [replica for replica in replicas if replica["state"] not in ("RUNNING", "STOPPING")]
        placed = [replica for replica in starting if replica.get("node_id")]
        if starting and not placed:
            why = _lacking(one["required_resources"], nodes)
        elif placed:
            why = _saying(dashboard, placed[0])
        elif running < wanted:
            why = "Serve to start it"
        else:
            why = one["status"].lower()
    return Deployment(one["name"], running, wanted, one["status"], why)


def _saying(dashboard: Dashboard, replica: Mapping[str, Any]) -> str:
    """What a replica that starts does, by its log."""
    log = replica.get("log_file_path")
    said = dashboard.last_message(replica["node_id"], log) if log else ""
    if any(phrase in said for phrase in SERVES_OWN):
        said = ""
    return f"starting on {replica.get('node_ip')}" + (f": {said[:200]}" if said else "")


def _lacking(required: Mapping[str, float], nodes: list[Node]) -> str:
    """Why a replica is on no node, as far as the nodes' sizes say."""
    needs = {name: value for name, value in required.items() if value}
    for name, value in needs.items():
        most = max((node.resources.get(name, 0) for node in nodes), default=0)
        if most < value:
            has = f"the largest has {amount(name, most)}" if most else "none has any"
            return f"no node with {amount(name, value)}: {has}, so that one has to be added"
    return f"a node with {_resources(needs)} free" if needs else "Ray to start its process"


def _resources(resources: Mapping[str, float]) -> str:
    shown = [name for name in resources if ":" not in name and name != "object_store_memory"]
    order = {"CPU": 0, "GPU": 1, "memory": 2}
    return ", ".join(
        amount(name, resources[name]) for name in sorted(shown, key=lambda name: (order.get(name, 9), name))
    )


def amount(name: str, value: float) -> str:
    return f"{value / GIB:.1f} GiB memory" if name == "memory" else f"{value:g} {name}"


def _last_line(reasons: list[str]) -> str:
    """The line of a replica's traceback that says what went wrong."""
    found = [line.strip() for reason in reasons for line in reason.splitlines() if line.strip()]
    ours = [line for line in found if line.startswith("cluster.errors.")]
    return (ours or found or ["no reason given"])[-1].removeprefix("cluster.errors.")
