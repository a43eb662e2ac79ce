"""The Ray cluster and the Serve app in it: connect, start here, deploy, wait until ready, stop."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

from cluster.errors import InvalidSettings, NotFound, Unavailable
from cluster.settings import MIB

LOCAL_OBJECT_STORE_BYTES = 512 * MIB
DASHBOARD_PORT = 8265
AGENT_PORT = 52365  # of Ray's agent, who starts submitted jobs
READY_TIMEOUT_S = 300.0
POLL_S = 0.5
UNHEALTHY = ("DEPLOY_FAILED", "UNHEALTHY")


def connect() -> None:
    """Join the running cluster: that of the Ray job this runs in, else RAY_ADDRESS, else one on this machine.

    Raises:
        Unavailable: there is none.
    """
    import ray

    if ray.is_initialized():
        return
    try:
        with keeping_sigterm():
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise Unavailable(
            "no Ray cluster answers: start one with `make serve`, or submit this with `ray job submit` "
            f"({type(error).__name__}: {error})"
        ) from error


@contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Ray's start takes SIGTERM for itself: the process would abort, and leave its Ray behind."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def replicas(app: str) -> dict[str, int]:
    """Running replicas by deployment. Raises NotFound if the app is not deployed."""
    from ray import serve

    application = serve.status().applications.get(app)
    if application is None:
        raise NotFound(f"the Serve app {app!r} is not deployed on this cluster: `serve deploy deploy/serve.local.yaml`")
    return {name: _running(one) for name, one in application.deployments.items()}


def http_host() -> str | None:
    """What Serve listens on for HTTP, for a replica to know. None and "" are all addresses."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None  # else it raises
    return client.http_config.host


def _running(deployment: Any) -> int:
    return sum(count for state, count in deployment.replica_states.items() if state == "RUNNING")


@dataclass(frozen=True)
class Session:
    """A cluster that was started here."""

    dashboard: str
    http: str


@contextmanager
def local(
    config: Mapping[str, Any], say: Callable[[str], None], dashboard_port: int = DASHBOARD_PORT
) -> Iterator[Session]:
    """A Ray cluster on this machine with the Serve config (as of `serve deploy`) running in it, for the length of the
    `with`. Listens on loopback only. Ports that are taken are replaced by free ones.

    Raises:
        InvalidSettings: Serve refused the config. Unavailable: the app did not become ready.
    """
    import ray
    from ray import serve

    # `ray job submit -- python …` shall find this Python, whether or not its environment is activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    folder = tempfile.mkdtemp(prefix="cellray-", dir="/tmp")  # short: Ray's socket paths may have 107 bytes
    http: dict[str, Any] = {"host": "127.0.0.1", "port": 8000, **(config.get("http_options") or {})}
    http["port"] = _free_port(http["port"])
    try:
        say("starting Ray")
        with keeping_sigterm(), _agent_port(_free_port(AGENT_PORT, "")):
            context = ray.init(
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=_free_port(dashboard_port),
                _temp_dir=folder,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        # As `ray start` does: Ray tells submitted jobs this cluster's address, else that of any on this machine.
        Path(folder, "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
        dashboard = f"http://{context.dashboard_url}"
        say("deploying")
        _deploy(dashboard, {**config, "http_options": http})
        _wait_until_ready([app["name"] for app in config["applications"]], say)
        yield Session(dashboard, f"http://{http['host']}:{http['port']}")
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _agent_port(port: int) -> Iterator[None]:
    """What is started within has its agent there: `ray.init` has no argument for it, only `ray start` does."""
    from ray._private import parameter

    params: Any = parameter.RayParams
    made = params.__init__
    params.__init__ = partialmethod(made, dashboard_agent_listen_port=port)
    try:
        yield
    finally:
        params.__init__ = made


def _deploy(dashboard: str, config: Mapping[str, Any]) -> None:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    try:
        ServeSubmissionClient(dashboard).deploy_applications(dict(config))
    except RuntimeError as error:
        raise InvalidSettings(f"Serve refused the configuration: {error}") from error


def _wait_until_ready(names: list[str], say: Callable[[str], None]) -> None:
    from ray import serve

    deadline, said = time.monotonic() + READY_TIMEOUT_S, ""
    while time.monotonic() < deadline:
        found = serve.status().applications
        for name in names:
            if name in found and found[name].status in UNHEALTHY:
                reasons = [found[name].message, *(one.message for one in found[name].deployments.values())]
                raise Unavailable(f"the app {name} did not start: {_last_line(reasons)}")
        if all(name in found and found[name].status == "RUNNING" for name in names):
            return
        missing = [
            deployment
            for name in names
            if name in found
            for deployment, one in found[name].deployments.items()
            if one.status != "HEALTHY"
        ]
        text = "waiting for " + (", ".join(missing) or "the app")
        if text != said:
            say(text)
            said = text
        time.sleep(POLL_S)
    raise Unavailable(f"not ready after {READY_TIMEOUT_S:.0f} s: still {said}")


def _last_line(reasons: list[str]) -> str:
    """The line of a replica's traceback that says what went wrong."""
    lines = [line.strip() for reason in reasons for line in reason.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("cluster.errors.")]
    return (ours or lines or ["no reason given"])[-1].removeprefix("cluster.errors.")


def _free_port(wanted: int, host: str = "127.0.0.1") -> int:
    """`host` "" is all addresses."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return int(probe.getsockname()[1])
            except OSError:
                continue
    raise Unavailable(f"no free port on {host or 'this machine'}")
