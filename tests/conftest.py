"""One Ray with the app, and one S3 server, for all the tests that need them."""

from __future__ import annotations

import faulthandler
import os
import random
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before anything imports Ray: it keeps its auth token, and we our weights, under HOME.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # many processes share few cores here: none shall wait by spinning
os.environ["HOME"] = tempfile.mkdtemp(prefix="cellray-test-home-")
os.environ["AWS_ACCESS_KEY_ID"] = os.environ["AWS_SECRET_ACCESS_KEY"] = "testing"
os.environ["AWS_DEFAULT_REGION"] = "us-east-1"

import hypothesis
import pytest
import yaml
from _pytest.faulthandler import fault_handler_stderr_fd_key
from safetensors.torch import save_file
from xdist.scheduler import LoadFileScheduling

from cluster import memory
from jobs import samples
from tests import cellsam_oracle
from tests.s3 import server

memory.keep()  # as replicas do
hypothesis.settings.register_profile("untimed", deadline=None)  # no test asserts a time
hypothesis.settings.load_profile("untimed")

DEPLOY = Path(__file__).parent.parent / "deploy"
CELLS, LICENCE = "cells", "CellSAM's own, for the tests"  # a model that is served beside nano
LONG = ("under_load", "faults", "cells", "jobs", "shards", "finetune", "nodes", "up", "session", "canary", "page")
GRPC = "serve_app.oip_messages.add_to_server"


@dataclass(frozen=True)
class App:
    """The running app: its URLs, the settings file it reads, the S3 server, and two data sets of the settings."""

    http: str
    grpc: str
    dashboard: str
    config: str
    endpoint: str
    dataset: str
    shown: str


def free_port() -> int:
    """Below those that the system gives to whoever asks for any, as the many processes of Ray do."""
    while True:
        port = random.randrange(20_000, 30_000)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


@pytest.fixture(scope="session")
def sample_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    samples.write_samples(folder)
    return folder


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[App]:
    """The app of deploy/serve.local.yaml, and a small CellSAM in it, on a Ray of this session."""
    from cluster import session

    folder = tmp_path_factory.mktemp("app")
    with server(folder) as endpoint:
        dataset, shown = str(folder / "dataset"), str(folder / "shown")
        weights = folder / f"{CELLS}.safetensors"
        save_file(cellsam_oracle.weights(cellsam_oracle.NANO), weights)
        settings = {
            "storage": {"endpoint_url": endpoint, "attempts": 2},
            "datasets": [dataset, shown],
            "limits": {"image_bytes": 8 << 20},
            "models": {CELLS: {"source": str(weights), "licence": LICENCE, "cells": True}},
        }
        config = folder / "cellray.yaml"
        config.write_text(yaml.safe_dump(settings))
        serve_config = yaml.safe_load((DEPLOY / "serve.local.yaml").read_text())
        (served,) = serve_config["applications"]
        served["args"] = {"models": ["nano", CELLS], "config": str(config)}
        scaled = {"ray_actor_options": {"num_cpus": 0}, "num_replicas": 1}
        served["deployments"] += [
            {"name": f"{CELLS}-{part}", **scaled} for part in ("encoder", "decoder", "cellfinder")
        ]
        port = free_port()
        serve_config["http_options"]["port"] = free_port()
        serve_config["grpc_options"] = {"port": port, "grpc_servicer_functions": [GRPC], "enable_reflection": False}
        session.AGENT_PORT = free_port()  # tests run in several processes, which start at the same time
        with session.local(serve_config, print, free_port()) as started:
            # Ray has put handlers of its own in the place of pytest's, and what they write is captured and lost.
            faulthandler.enable(pytestconfig.stash[fault_handler_stderr_fd_key])
            yield App(started.http, f"127.0.0.1:{port}", started.dashboard, str(config), endpoint, dataset, shown)


@pytest.fixture(scope="session")
def shown(app: App, sample_images: Path) -> str:
    """The data set `app.shown`, with embeddings of the sample images whose size is no trap."""
    from jobs import embed

    assert embed.main([str(sample_images / "*.png"), app.shown, "--model", "nano", "--config", app.config]) == 0
    return app.shown


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long first, so that no process waits for one at the end."""
    place = {f"test_{name}.py": index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


class OneApp(LoadFileScheduling):
    """A file goes to one of the processes, and all that need the app to the same: an app is never idle."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "app" if re.search(r"\bApp\b", (self.config.rootpath / file).read_text()) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneApp:
    return OneApp(config, log)
