"""What `cellray doctor` looks at on a cluster that runs: of that at --address or RAY_ADDRESS."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import suppress

from cluster import dashboard, status
from cluster.dashboard import MODE, TOKEN, TOKEN_PATH
from cluster.errors import CellrayError, Forbidden, InvalidSettings, Unauthorized, Unavailable
from cluster.findings import OK, PROBLEM, WARNING, Finding, Setup, Unseen

SET_TOKEN = (
    f"put the cluster's token (its head's ~/.ray/auth_token, or its secret) into a file, and that into {TOKEN_PATH}"
)


def reached(setup: Setup) -> Iterator[Finding]:
    try:
        found = dashboard.Dashboard(setup.address or "")
        found.open()
        answer = "answers"
        with suppress(Unauthorized, Forbidden, InvalidSettings):  # the token's check says it
            answer = f"answers, with {len(found.nodes())} nodes"
        yield Finding("cluster", OK, f"{found.shown} {answer}")
    except CellrayError as error:
        yield Finding(
            "cluster",
            PROBLEM,
            str(error),
            "a Ray dashboard that answers",
            "start Ray there, or forward its port (`kubectl port-forward svc/…-head-svc 8265`); is "
            f"{dashboard.ADDRESS} a leftover, unset it: `cellray up` then starts Ray here",
        )


def token(setup: Setup) -> Iterator[Finding]:
    found = setup.dashboard
    mode = os.environ.get(MODE)
    try:
        if found.open():
            verdict = OK if found.loopback else WARNING
            asks = f"{found.shown} asks for none: who reaches it can run any code there"
            yield Finding("Ray token", verdict, asks, "token", f"{MODE}=token for `ray start` on every node")
            return
        _, where = dashboard.find_token()
        found.versions()
    except Unauthorized:
        mend = f"export {MODE}=token and {SET_TOKEN}"
        yield Finding("Ray token", PROBLEM, f"{found.shown} asks for one, and there is none here", "a token", mend)
        return
    except Forbidden:
        said = f"{found.shown} refuses the one of {where}"
        yield Finding("Ray token", PROBLEM, said, "this cluster's", f"{SET_TOKEN}; unset {TOKEN} if it is older")
        return
    except Unavailable:
        raise Unseen("the cluster does not answer") from None
    except CellrayError as error:
        yield Finding("Ray token", PROBLEM, str(error), "a file with the token", SET_TOKEN)
        return
    if mode != "token":
        said = f"the token of {where} is right, but {MODE} is {mode or 'not set'}: `ray job submit` would send none"
        yield Finding("Ray token", WARNING, said, "token", f"export {MODE}=token")
        return
    yield Finding("Ray token", OK, f"the one of {where} is accepted")


def versions(setup: Setup) -> Iterator[Finding]:
    import ray

    try:
        found = setup.dashboard.versions()
    except CellrayError:
        raise Unseen("the cluster does not answer") from None
    here = platform.python_version()
    if found.ray == ray.__version__:
        yield Finding("Ray version", OK, f"{found.ray}, here and there")
    else:
        yield Finding(
            "Ray version",
            PROBLEM,
            f"{ray.__version__} here, {found.ray} on the cluster",
            "one version: Ray refuses to connect others",
            f"pip install 'ray[serve]=={found.ray}' here, or the cluster's image of {ray.__version__}",
        )
    if found.python is None or found.python == here:
        yield Finding("Python version", OK, f"{here} here, {found.python or 'unknown'} on the cluster")
        return
    same = found.python.split(".")[:2] == here.split(".")[:2]
    yield Finding(
        "Python version",
        WARNING if same else PROBLEM,
        f"{here} here, {found.python} on the cluster",
        "one version: Ray refuses to connect others" + ("; `ray job submit` works" if same else ""),
        f"make the environment here with Python {found.python}",
    )


def resources(setup: Setup) -> Iterator[Finding]:
    """GPUs and memory: whether any node is large enough for one replica, and all together for all."""
    for name, title in (("GPU", "GPUs"), ("CPU", "CPUs"), ("memory", "memory")):
        asking = [one for one in setup.demands if one.each[name]]
        sizes = [node.resources.get(name, 0) for node in setup.nodes]
        largest = max((one.each[name] for one in asking), default=0)
        wanted = sum(one.replicas * one.each[name] for one in asking)
        shown = [status.amount(name, value) for value in (sum(sizes), wanted, largest)]
        if not asking or (max(sizes, default=0) >= largest and sum(sizes) >= wanted):
            yield Finding(title, OK, f"{shown[0]} on {len(sizes)} nodes, {shown[1]} asked for")
            continue
        yield Finding(
            title,
            WARNING,
            f"{shown[0]} on {len(sizes)} nodes now, the largest has {status.amount(name, max(sizes, default=0))}",
            f"{shown[1]} in all, {shown[2]} for one replica: {', '.join(one.deployment for one in asking)}",
            "nothing, where an autoscaler has node types that are large enough: it adds nodes; else add one by hand, "
            f"or ask for less in {setup.serve_config.name}",
        )


def app(setup: Setup) -> Iterator[Finding]:
    try:
        found = status.read(setup.dashboard)
    except CellrayError:
        raise Unseen("the cluster does not answer") from None
    names = {one.get("name", "default") for one in setup.serve["applications"]}
    ours = [one for one in found.apps if one.name in names]
    if found.sick_proxies:
        yield Finding(
            "Serve's proxies",
            PROBLEM,
            ", ".join(found.sick_proxies),
            "HEALTHY",
            "the node's logs/serve/proxy_*.log says why; most often its port is taken there",
        )
    if not ours:
        yield Finding("app", WARNING, f"{', '.join(names)} is not deployed", "it runs", "`cellray up`")
    for one in ours:
        bad = [str(deployment) for deployment in one.deployments if deployment.why]
        if one.healthy:
            yield Finding("app", OK, f"{one.name} runs" + (f"; {'; '.join(bad)}" if bad else ""))
            continue
        yield Finding(
            "app",
            PROBLEM,
            f"{one.name} is {one.state}: {one.why or '; '.join(bad) or 'no reason given'}",
            "RUNNING",
            "mend what it says and `cellray up` again; the replicas' logs are in /tmp/ray/session_latest/logs/serve",
        )
