"""What `cellray doctor` looks at on this machine."""

from __future__ import annotations

import contextlib
import errno
import importlib.machinery
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from cluster import dashboard, session
from cluster.errors import CellrayError
from cluster.findings import OK, PROBLEM, WARNING, Finding, Setup, Unseen
from cluster.settings import MIB

ROOT = Path(__file__).parent.parent
PACKAGES = ("cluster", "serve_app", "jobs")
GIB = 1 << 30
RAY_BYTES = 3 * GIB // 2  # Ray's own processes and Serve's, beside the object store
REPLICA_BYTES = 1 * GIB  # Python with PyTorch and a small model; weights come on top
SESSION = "session_2026-01-01_00-00-00_000000_4194304/sockets/dash_MetricsHead"  # Ray's longest
SOCKET_BYTES = 103 if sys.platform == "darwin" else 107  # sun_path of unix(7), without its end
SHM = Path("/dev/shm")
CGROUP = Path("/sys/fs/cgroup")


def packages(setup: Setup) -> Iterator[Finding]:
    """`python -m jobs.embed` takes `jobs` from the folder it runs in, or from sys.path, before an editable install."""
    places = [str(setup.folder), *(os.environ.get("PYTHONPATH") or "").split(os.pathsep), *sys.path[1:]]
    for name in PACKAGES:
        spec = importlib.machinery.PathFinder.find_spec(name, [place for place in places if place])
        found = Path(spec.origin).resolve().parent if spec and spec.origin else ROOT / name
        if spec and spec.origin and Path(spec.origin).name != "__init__.py":
            found = Path(spec.origin).resolve()
        if found == (ROOT / name).resolve():
            continue
        yield Finding(
            "packages",
            PROBLEM,
            f"{found} would be imported as `{name}` in {setup.folder}",
            f"Cellray's own, {ROOT / name}",
            "submit from another folder, or rename it",
        )
        return
    yield Finding("packages", OK, f"jobs, serve_app and cluster are those of {ROOT}")


def ray_folder(_: Setup) -> Iterator[Finding]:
    from ray._common.utils import get_default_ray_temp_dir

    folder = get_default_ray_temp_dir()
    length = len(os.fsencode(os.path.join(folder, SESSION)))
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "")
    if length > SOCKET_BYTES:
        yield Finding(
            "Ray's folder",
            PROBLEM,
            f"Ray's sockets below {folder} have paths of {length} bytes",
            f"at most {SOCKET_BYTES}, as AF_UNIX has: Ray refuses to start",
            f"set RAY_TMPDIR to a shorter folder, e.g. /tmp{f'; it follows {variable} now' if variable else ''}",
        )
        return
    for base in {os.path.dirname(folder), session.RAY_FOLDERS}:
        if not os.access(base, os.W_OK | os.X_OK):
            yield Finding(
                "Ray's folder",
                PROBLEM,
                f"{base} {'cannot be written to' if os.path.isdir(base) else 'does not exist'}",
                "a folder for Ray's logs, sockets and spilled objects",
                "make it, or mount one there" + (f"; {variable} names it" if variable else ""),
            )
            return
    yield Finding("Ray's folder", OK, f"{folder}; the longest socket path has {length} of {SOCKET_BYTES} bytes")


def memory(setup: Setup) -> Iterator[Finding]:
    """Of what is free now, or left of the container's limit: what replicas ask for, or an estimate."""
    free, where = free_memory()
    weights = 0
    with contextlib.suppress(CellrayError, OSError, Unseen):
        weights = sum(path.stat().st_size for name in setup.models for path in setup.kept_weights(setup.settings, name))
    replicas = sum(one.replicas for one in setup.demands)
    asked = sum(one.replicas * max(one.each["memory"], REPLICA_BYTES) for one in setup.demands)
    need = RAY_BYTES + session.LOCAL_OBJECT_STORE_BYTES + asked + weights
    found = f"{free / GIB:.1f} GiB {where}"
    if free >= need:
        yield Finding("memory", OK, f"{found}; about {need / GIB:.1f} are needed")
        return
    yield Finding(
        "memory",
        PROBLEM,
        found,
        f"about {need / GIB:.1f} GiB for Ray and {replicas} replicas: with less, Ray ends replicas and tasks at random",
        "fewer models or replicas in the Serve config, a smaller model, or a machine or container with more",
    )


def free_memory() -> tuple[int, str]:
    """Bytes, and whose: the machine's, or what is left of this container's limit if that is less."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) << 10
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            left = int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text())
            if left < free:
                return max(left, 0), "left of the container's limit"
    return free, "free"


def shared_memory(_: Setup) -> Iterator[Finding]:
    if not SHM.is_dir():  # Ray uses files elsewhere
        return
    stats = os.statvfs(SHM)
    free, need = stats.f_bavail * stats.f_frsize, session.LOCAL_OBJECT_STORE_BYTES
    if free >= need:
        yield Finding("shared memory", OK, f"{free / MIB:,.0f} MiB free in {SHM}")
        return
    yield Finding(
        "shared memory",
        PROBLEM,
        f"{free / MIB:,.0f} MiB free in {SHM}",
        f"{need / MIB:,.0f} MiB for Ray's object store: with less, images and embeddings go over the disk",
        f"`docker run --shm-size={2 * need / GIB:g}g`, in Kubernetes an emptyDir with medium: Memory at {SHM}; or "
        f"delete what is in {SHM}",
    )


def gpus(setup: Setup) -> Iterator[Finding]:
    from ray._private.accelerators import NvidiaGPUAcceleratorManager as Nvidia

    seen = Nvidia.get_current_node_num_accelerators()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        seen = min(seen, len([one for one in visible.split(",") if one.strip() not in ("", "-1", "NoDevFiles")]))
    wanted = sum(one.replicas * one.each["GPU"] for one in setup.demands)
    at_all = [one.deployment for one in setup.demands if one.each["GPU"]]
    if seen >= wanted and (seen or not at_all):
        yield Finding("GPUs", OK, f"{seen} seen, {wanted:g} asked for")
        return
    there = len(list(Path("/dev").glob("nvidia[0-9]*")))
    mend = "install NVIDIA's driver; in a container, its toolkit and `docker run --gpus all`"
    if visible is not None and there:
        mend = f"unset CUDA_VISIBLE_DEVICES, which is {visible!r}"
    elif seen or not there:
        mend += "; without GPUs, use deploy/serve.local.yaml or set num_gpus to 0"
    yield Finding(
        "GPUs", PROBLEM, f"{seen} seen", f"{wanted:g} for {', '.join(at_all)} of {setup.serve_config.name}", mend
    )


def cpus(setup: Setup) -> Iterator[Finding]:
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = sum(one.replicas * one.each["CPU"] for one in setup.demands)
    if seen >= wanted:
        yield Finding("CPUs", OK, f"{seen} here, {wanted:g} reserved by replicas")
        return
    yield Finding(
        "CPUs",
        PROBLEM,
        f"{seen} here",
        f"{wanted:g}, which the replicas of {setup.serve_config.name} reserve: some would wait for ever",
        "ray_actor_options: {num_cpus: 0} in the Serve config lets replicas share what there is (1 is the default)",
    )


def ports(setup: Setup) -> Iterator[Finding]:
    """Those of the Serve config, and of Ray."""
    http = {"host": "127.0.0.1", "port": 8000, **(setup.serve.get("http_options") or {})}
    grpc = setup.serve.get("grpc_options") or {}
    wanted = [("Serve's HTTP", http["host"] or "", int(http["port"]), PROBLEM, "http_options.port")]
    if grpc.get("grpc_servicer_functions"):
        wanted.append(("Serve's gRPC", "", int(grpc.get("port", 9000)), PROBLEM, "grpc_options.port"))
    wanted.append(("Ray's dashboard", "127.0.0.1", session.DASHBOARD_PORT, WARNING, "--dashboard-port"))
    wanted.append(("Ray's agent", "", session.AGENT_PORT, WARNING, ""))
    taken = False
    for whose, host, port, verdict, where in wanted:
        why = _refusal(host, port)
        if not why:
            continue
        taken = True
        yield Finding(
            "ports",
            verdict,
            f"{port}, {whose}, {why}",
            "a free port"
            + ("; `cellray up` takes another one" if verdict == WARNING else f", as {setup.serve_config.name} says"),
            f"end what has it (`ss -ltnp 'sport = :{port}'` shows that)" + (f", or change {where}" if where else ""),
        )
    if not taken:
        yield Finding("ports", OK, f"{', '.join(str(port) for _, _, port, _, _ in wanted)} are free")


def _refusal(host: str, port: int) -> str:
    """Why nothing can listen there; "" if it can. `host` "" is all addresses."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return ""
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "is taken"
        return f"cannot be listened on: {error.strerror or error}"


def token(_: Setup) -> Iterator[Finding]:
    """Of the Ray that would be started here."""
    mode = os.environ.get(dashboard.MODE)
    if mode not in (None, "token"):
        yield Finding(
            "Ray token",
            WARNING,
            f"{dashboard.MODE} is {mode!r}: who reaches Ray's ports can run any code here",
            "token",
            f"unset {dashboard.MODE}",
        )
        return
    try:
        found, where = dashboard.find_token()
    except CellrayError as error:
        yield Finding(
            "Ray token",
            PROBLEM,
            str(error),
            "a file that holds the token",
            f"unset {dashboard.TOKEN_PATH}, or make the file with `ray get-auth-token --generate`",
        )
        return
    yield Finding(
        "Ray token", OK, f"in {where}" if found else "none yet; the first start makes one in ~/.ray/auth_token"
    )
