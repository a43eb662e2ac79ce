"""`cellray up|serve|status|down|doctor`: the cluster from the shell."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster import background, serve_config, session
from cluster import status as status_module
from cluster.background import Record
from cluster.dashboard import ADDRESS, EXPECTED, Dashboard
from cluster.errors import CellrayError, Unavailable

DEFAULT_SERVE_CONFIG = Path("deploy/serve.local.yaml")
UP = f"""Start Ray on this machine, or use the one that --address names, deploy the app of a Serve config there, and
wait until it is ready. It stays up in the background when this command is done, until `cellray down`. Run again with a
changed file, it deploys that: what has not changed keeps running, and no request is dropped.

The address is {EXPECTED}. A Ray that is started here listens
on loopback only, with a token (~/.ray/auth_token); ports that are taken are replaced by free ones, and said."""
UP_EXAMPLE = """examples:
  cellray up                                          # the demo's model, on this machine
  cellray up --serve-config deploy/serve.gpu.yaml --address http://head:8265
  cellray status && cellray down"""
SERVE = """`cellray up` in the foreground, for containers and terminals: it ends at SIGTERM or Ctrl-C. From then on no
new request is taken (503, with Retry-After), those under way end within a minute, and the exit code is 0. A second
signal ends it at once."""
STATUS = """Print the cluster's nodes and GPUs, the apps, their deployments and replicas, and for what is pending, why.
The exit code is 0 where there is an app and all can answer, else 1. Without --address or RAY_ADDRESS it is about what
`cellray up` or `cellray serve` has started here."""
DOWN = """End what `cellray up` or `cellray serve` has started here, the app and Ray, once the requests under way have
ended. With the address of another Ray its Serve ends, with the apps of the Serve config and at once; that Ray goes on.
Nothing else is ever stopped."""
DOCTOR = """Look for what keeps Cellray from starting or a job from running, and say how to mend it: a line a check,
problems last. Every check ends within half a minute, whatever the others find. Exit code: 0, or 1 where there is a
problem.

Without --address or RAY_ADDRESS it looks at this machine as `cellray up` would use it; with one, or once Cellray is up
here, at that cluster. INPUT and OUTPUT are those of a job: INPUT is listed, and in OUTPUT a file is created and deleted
again."""
DOCTOR_EXAMPLE = """examples:
  cellray doctor
  cellray doctor --serve-config deploy/serve.gpu.yaml --address http://head:8265
  cellray doctor s3://plates/raw s3://plates/out --config cellray.yaml"""

Command = Callable[[str, Callable[[Any], int], str, str, str], argparse.ArgumentParser]


def add_commands(command: Command) -> None:
    up = command("up", _up, "start Ray and the app, and leave them running", UP, UP_EXAMPLE)
    serve = command("serve", _serve, "the same in the foreground", SERVE, "")
    status = command("status", _status, "what runs, and what is pending and why", STATUS, "")
    down = command("down", _down, "end what `up` started", DOWN, "")
    doctor = command("doctor", _doctor, "say what is wrong, and how to mend it", DOCTOR, DOCTOR_EXAMPLE)
    for one in (up, serve, down, doctor):
        one.add_argument("--serve-config", type=Path, default=DEFAULT_SERVE_CONFIG, help="(default: %(default)s)")
    for one in (up, status, down, doctor):
        one.add_argument("--address", help=f"{EXPECTED} (default: {ADDRESS} of the environment)")
    for one in (up, serve):
        one.add_argument(
            "--timeout",
            type=float,
            default=session.READY_TIMEOUT_S,
            metavar="SECONDS",
            help="longest wait for the app; large weights on a slow line take longer (default: %(default)s)",
        )
        one.add_argument(
            "--dashboard-port",
            type=int,
            default=session.DASHBOARD_PORT,
            metavar="PORT",
            help="of a Ray that is started here (default: %(default)s, or a free one)",
        )
    for one in (status, doctor):
        one.add_argument("--json", action="store_true", help="JSON instead")
    doctor.add_argument("input", metavar="INPUT", nargs="?", help="a job's images: a folder, a list, s3://…")
    doctor.add_argument("output", metavar="OUTPUT", nargs="?", help="the data set it shall write: a folder or s3://…")
    doctor.add_argument("--config", help="settings YAML (default: that of the Serve config, else CELLRAY_CONFIG)")


def say(text: str) -> None:
    print(f"  {text} …", flush=True)


def _up(arguments: argparse.Namespace) -> int:
    config = serve_config.read(arguments.serve_config)
    address = _address(arguments)
    record = background.running()
    if address:
        dashboard = Dashboard(address)
        _reach(arguments, dashboard)
        record = record if record and _same(dashboard, record) else None
    else:
        record = record or background.start(say, arguments.dashboard_port)
        dashboard = Dashboard(_started(record))
    try:
        http = session.deploy(dashboard, config, say, arguments.timeout)
    except CellrayError as error:
        logs = f", its logs are in {record.folder}/session_latest/logs/serve" if record else ""
        hint = f"`cellray status` shows what runs{logs}; `cellray up` deploys a mended file, `cellray down` ends it"
        raise type(error)(f"{error}. {hint}") from error
    print(f"\n{_where(config, dashboard, http)}\n\nIt stays up: `cellray status` shows it, `cellray down` ends it.")
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    config = serve_config.read(arguments.serve_config)
    with background.kept(say, arguments.dashboard_port) as started:
        dashboard = Dashboard(started.dashboard)
        http = session.deploy(dashboard, config, say, arguments.timeout)
        print(f"\n{_where(config, dashboard, http)}\n\nCtrl-C stops it.", flush=True)
        session.until_told()
        session.drain(started, say)
        say("stopping")
    return 0


def _where(config: dict[str, Any], dashboard: Dashboard, http: str) -> str:
    model = ((config["applications"][0].get("args") or {}).get("models") or ["MODEL"])[0]
    return (
        f"page        {http}   click, and there is a mask\n"
        f"API docs    {http}/docs\n"
        f"dashboard   {dashboard.shown}\n\n"
        f"submit      export RAY_AUTH_MODE=token RAY_ADDRESS={dashboard.shown}\n"
        f"            ray job submit -- python -m jobs.embed IMAGES OUT --model {model}\n"
        f"ask         curl {http}/v1/segment -F image=@IMAGE "
        "-F 'request={\"points\": [[[100, 100]]]}'"
    )


def _status(arguments: argparse.Namespace) -> int:
    address = _address(arguments)
    record = None if address else background.running()
    if not address and record is None:
        print("nothing that `cellray up` started runs here; --address names another Ray")
        return 1
    dashboard = Dashboard(address or _started(record))
    _reach(arguments, dashboard)
    found = status_module.read(dashboard)
    if arguments.json:
        print(json.dumps({**asdict(found), "healthy": found.healthy}))
    else:
        print("\n".join(status_module.lines(found)))
    return 0 if found.healthy else 1


def _down(arguments: argparse.Namespace) -> int:
    address, record = _address(arguments), background.running()
    dashboard = Dashboard(address) if address else None
    if record and (dashboard is None or _same(dashboard, record)):
        background.stop(record, say)
        print("Ray and the app are down")
    elif dashboard:
        _reach(arguments, dashboard)
        names = [one.get("name", "default") for one in serve_config.read(arguments.serve_config)["applications"]]
        say(f"taking {', '.join(names)} away")
        dashboard.remove(names)
        print(f"Serve is down on {dashboard.shown}; its Ray goes on, since it was not started by `cellray up` here")
    else:
        print("nothing that `cellray up` started runs here; --address names another Ray")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from cluster import doctor
    from serve_app import models  # noqa: F401  before the checks' threads want it at once

    record = background.running()
    address = _address(arguments) or (record.dashboard if record else None) or None
    setup = doctor.Setup(
        arguments.serve_config,
        arguments.config,
        address,
        arguments.input,
        arguments.output,
        Path.cwd(),
        _kept_weights,
    )
    findings = doctor.run(setup)
    print(doctor.as_json(findings) if arguments.json else doctor.report(findings))
    return 1 if any(one.verdict == doctor.PROBLEM for one in findings) else 0


def _kept_weights(settings: Any, name: str) -> dict[Path, str]:
    """The files of a model that this node has split, with the sha256 they were written with; {} if it has none."""
    from serve_app import models
    from serve_app.model.checkpoint import ModelCard

    folder = models.folder(settings, name)
    if not (folder / models.CARD).exists():
        return {}
    return {folder / file: sha256 for file, sha256 in ModelCard.read(folder).files().items()}


def _address(arguments: argparse.Namespace) -> str | None:
    return arguments.address or os.environ.get(ADDRESS) or None


def _reach(arguments: argparse.Namespace, dashboard: Dashboard) -> None:
    """Raises Unavailable, with what to do about an address that is a leftover."""
    try:
        dashboard.versions()
    except Unavailable as error:
        raise Unavailable(
            f"{error}. "
            + ("Is --address right?" if arguments.address else f"{ADDRESS} names it: unset it to use Ray here")
        ) from error


def _started(record: Record | None) -> str:
    if record is None or not record.dashboard:
        raise Unavailable("another command is starting Ray right now: try again in a moment")
    return record.dashboard


def _same(dashboard: Dashboard, record: Record) -> bool:
    """Whether both are one: of 127.0.0.1 and localhost the ports are compared."""
    port = dashboard.url.rpartition(":")[2]
    return dashboard.loopback and record.dashboard.rpartition(":")[2] == port
