"""A real S3 server (moto) in a process of its own, on loopback, and fixtures to import where a test needs them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cluster.settings import StorageSettings
from cluster.storage import Storage

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 60.0
# Of the server: large bodies in memory that is kept. Else it gives each back to the system and gets it anew, which is
# three quarters of its CPU.
KEPT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(1 << 30),
}
EVERYTHING = {"Effect": "Allow", "Action": "*", "Resource": "*"}


class S3(NamedTuple):
    """How to reach the server, and `make_bucket(name)` → "s3://name"."""

    settings: StorageSettings
    make_bucket: Callable[[str], str]


class Place(NamedTuple):
    """An empty folder or bucket, and the storage that reaches it."""

    storage: Storage
    uri: str


@pytest.fixture(scope="session", name="s3")
def s3_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """One server for all the tests of a run; each makes buckets of its own."""
    with pytest.MonkeyPatch.context() as patch, server(tmp_path_factory.mktemp("s3")) as url:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")

        def make_bucket(name: str) -> str:
            client(url, "s3").create_bucket(Bucket=name)
            return f"s3://{name}"

        yield S3(StorageSettings(endpoint_url=url), make_bucket)


@pytest.fixture(params=["local", "s3"], name="place")
def place_fixture(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """The test runs twice: on a folder, and on a bucket."""
    if request.param == "local":
        return Place(Storage(), str(tmp_path / "place"))
    s3: S3 = request.getfixturevalue("s3")
    return Place(Storage(s3.settings), s3.make_bucket(f"test-{time.monotonic_ns()}"))


@contextmanager
def server(tmp_path: Path, check_keys: bool = False) -> Iterator[str]:
    """The endpoint's URL; with `check_keys` the server refuses keys that `make_user` did not make."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, **KEPT, **({"INITIAL_NO_AUTH_ACTION_COUNT": "0"} if check_keys else {})}
    with (tmp_path / "moto.log").open("wb") as log:
        command = [sys.executable, "-m", "tests.s3", str(port)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            _wait(port, process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=10)


def client(url: str, service: str, **keys: str) -> Any:
    """Amazon's own client, to look at the server past our code."""
    from boto3.session import Session  # one of its own: the default one keeps the first keys it saw

    return Session().client(service, endpoint_url=url, region_name="us-east-1", **keys)


def make_user(url: str, name: str, statement: dict[str, str]) -> dict[str, str]:
    """The environment of a new user with this one permission, on a server that checks keys."""
    _check_keys_after(url, "inf")
    try:
        iam = client(url, "iam", aws_access_key_id="setup", aws_secret_access_key="setup")
        iam.create_user(UserName=name)
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.put_user_policy(UserName=name, PolicyName="only", PolicyDocument=policy)
        key = iam.create_access_key(UserName=name)["AccessKey"]
    finally:
        _check_keys_after(url, "0")
    return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}


def _check_keys_after(url: str, calls: str) -> None:
    body = urllib.request.Request(f"{url}/moto-api/reset-auth", calls.encode(), {"Content-Type": "text/plain"})
    urllib.request.urlopen(body, timeout=10).close()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"moto_server did not start (exit code {process.poll()})")


def main(port: int) -> None:
    """moto_server, one create-only write at a time: it looks first and writes later, where S3 does both at once."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import run_simple

    moto, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def answer(environ: Any, start_response: Any) -> Any:
        with lock if "HTTP_IF_NONE_MATCH" in environ else nullcontext():
            return moto(environ, start_response)

    os.environ.setdefault("MOTO_PORT", str(port))
    run_simple("127.0.0.1", port, answer, threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    main(int(sys.argv[1]))
