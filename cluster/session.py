"""The Ray cluster and the Serve app in it: connect, start here, deploy, drain, stop."""

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
from dataclasses import dataclass, replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import httpx

from cluster import draining, status
from cluster.dashboard import Dashboard
from cluster.errors import CellrayError, NotFound, Unavailable
from cluster.settings import MIB

LOCAL_OBJECT_STORE_BYTES = 512 * MIB
DASHBOARD_PORT = 8265
AGENT_PORT = 52365  # of Ray's agent, who starts submitted jobs
READY_TIMEOUT_S = 300.0
RAY_FOLDERS = "/tmp"  # short: the paths of Ray's sockets may have 107 bytes
DEPLOY_TRIES = 3  # Serve's own start gives its proxy few seconds, on a busy machine too few
DRAIN_S = 60.0  # as long as a replica has, which Serve stops
QUIET_S, QUIET_LOOKS, QUIET_TIMEOUT_S = 0.2, 2, 5.0  # one look may fall between proxy and replica


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
            "no Ray cluster answers: start one with `cellray up`, or submit this with `ray job submit` "
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
        raise NotFound(f"the Serve app {app!r} is not deployed on this cluster: `cellray up`")
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
    folder: Path  # Ray's: logs, sockets, spilled objects
    http: str = ""  # of the app, once there is one


@contextmanager
def local(
    config: Mapping[str, Any], say: Callable[[str], None], dashboard_port: int = DASHBOARD_PORT
) -> Iterator[Session]:
    """A Ray cluster on this machine with the Serve config (as of `serve deploy`) running in it, for the length of the
    `with`. Listens on loopback only. Ports that are taken are replaced by free ones.

    Raises:
        InvalidSettings: Serve refused the config. Unavailable: the app did not become ready.
    """
    with start(say, dashboard_port) as started:
        yield replace(started, http=deploy(Dashboard(started.dashboard), config, say))


@contextmanager
def start(say: Callable[[str], None], dashboard_port: int = DASHBOARD_PORT) -> Iterator[Session]:
    """A Ray cluster on this machine without an app, for the length of the `with`; else as `local`."""
    import ray
    from ray import serve

    # `ray job submit -- python …` shall find this Python, whether or not its environment is activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    folder = tempfile.mkdtemp(prefix="cellray-", dir=RAY_FOLDERS)
    try:
        say("starting Ray")
        # What Ray starts has this environment, Serve's proxy too.
        os.environ[draining.FILE] = str(Path(folder, "draining"))
        os.environ.setdefault(draining.CALLBACK, f"{draining.__name__}:{draining.middlewares.__name__}")
        with keeping_sigterm(), _agent_port(free_port(AGENT_PORT, "")):
            context = ray.init(
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=free_port(dashboard_port),
                _temp_dir=folder,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        # As `ray start` does: Ray tells submitted jobs this cluster's address, else that of any on this machine.
        Path(folder, "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
        yield Session(f"http://{context.dashboard_url}", Path(folder))
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def deploy(
    dashboard: Dashboard, config: Mapping[str, Any], say: Callable[[str], None], timeout_s: float = READY_TIMEOUT_S
) -> str:
    """Deploy the Serve config on a cluster, and wait until its apps are ready → the URL of Serve's HTTP. Where Serve
    does not run yet on this machine's loopback, a port that is taken is replaced by a free one.

    Raises:
        InvalidSettings, Conflict: as `Dashboard.deploy`. Unavailable: an app failed, or is not ready after `timeout_s`.
    """
    running = dashboard.serve().get("http_options")
    http: dict[str, Any] = {"host": "127.0.0.1", "port": 8000, **(config.get("http_options") or {})}
    if running:
        http |= {key: running[key] for key in ("host", "port")}  # Serve's for as long as it runs
    elif dashboard.loopback:
        http["port"] = free_port(http["port"])
    say("deploying")
    for left in reversed(range(DEPLOY_TRIES)):
        try:
            dashboard.deploy({**config, "http_options": http})
            break
        except Unavailable as error:
            if not left:
                raise
            say(f"again, since {error}")
    status.wait(dashboard, [app.get("name", "default") for app in config["applications"]], say, timeout_s)
    return dashboard.http(http)


def drain(started: Session, say: Callable[[str], None], timeout_s: float = DRAIN_S) -> None:
    """No new request is taken from here on (503 with Retry-After; UNAVAILABLE over gRPC); returns once those under way
    have ended, at the latest after `timeout_s`."""
    (started.folder / "draining").touch()
    deadline, quiet, said = time.monotonic() + timeout_s, 0, -1
    while quiet < QUIET_LOOKS:
        left = _under_way(Dashboard(started.dashboard))
        quiet = 0 if left else quiet + 1
        if time.monotonic() > deadline:
            return say(f"{left} requests under way are given up after {timeout_s:.0f} s")
        if left and left != said:
            say(f"waiting for {left} request{'s' if left > 1 else ''} under way to end")
            said = left
        time.sleep(QUIET_S)


def _under_way(dashboard: Dashboard) -> int:
    """By what Serve's HTTP proxy says, or by what the apps' first deployments have, if that is more: gRPC has another
    proxy, and what waits for a replica is with the proxy alone. Who is too busy to say counts as one."""
    import ray
    from ray.serve._private.constants import SERVE_NAMESPACE

    try:
        details = dashboard.serve()
    except CellrayError:
        return 1
    replicas = 0
    for actor in status.ingress_replicas(details):
        try:
            handle: Any = ray.get_actor(actor, namespace=SERVE_NAMESPACE)
            replicas += ray.get(handle.get_num_ongoing_requests.remote(), timeout=QUIET_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            replicas += 1
        except (ValueError, ray.exceptions.RayError):  # it is gone
            pass
    if not (url := dashboard.http(details.get("http_options"))):
        return replicas
    try:
        answer = httpx.get(f"{url}/-/healthz", timeout=QUIET_TIMEOUT_S, trust_env=False)
        return max(replicas, int(answer.headers.get(draining.UNDER_WAY, 0)))
    except httpx.TimeoutException:
        return max(replicas, 1)
    except httpx.HTTPError:  # no proxy
        return replicas


def until_told() -> None:
    """Returns at SIGTERM or SIGINT. Those that come later interrupt."""
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    told.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)


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


def free_port(wanted: int, host: str = "127.0.0.1") -> int:
    """The wanted one, else any. `host` "" is all addresses."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return int(probe.getsockname()[1])
            except OSError:
                continue
    raise Unavailable(f"no free port on {host or 'this machine'}")
