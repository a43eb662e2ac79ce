"""Whatever is sent to the documented operations, by schemathesis from the app's own OpenAPI: no 5xx, and answers as
documented."""

from __future__ import annotations

import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.generation.feedback import FeedbackSources
from schemathesis.pytest._test_builder import build_operation_test  # its plugin's names of tests are not unique
from schemathesis.specs.openapi import checks

from cluster.settings import Limits
from serve_app import ingress
from serve_app.model.prompts import MAX_CROP_LAYERS, MAX_GRID
from tests.conftest import App

SETTINGS = settings(  # of the random ones of an operation, beside those at the edges of its schema
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
)
CHEAP = {"points_per_side": (4, MAX_GRID), "crop_n_layers": (1, MAX_CROP_LAYERS)}  # in place of up to so many
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]
specification = ingress.create_app(SimpleNamespace(limits=Limits()), None).openapi()  # type: ignore[arg-type]
api = schemathesis.openapi.from_dict(specification)
operations = {found.ok().label: found.ok() for found in api.get_all_operations()}


@pytest.fixture(scope="module")
def known(app: App, shown: str, sample_images: Path) -> dict[str, str]:
    """What is there to be asked for."""
    image = (sample_images / "coins_grey8.png").read_bytes()
    made = httpx.post(f"{app.http}/v1/embed", content=image, timeout=60).headers
    uri = httpx.get(f"{app.http}/v1/images", timeout=60).json()["images"][0]["image_uri"]
    names = {"embedding_id": made["x-embedding-id"], "image_id": made["x-image-id"]}
    return {**names, "image_uri": uri, "model": made["x-model"], "name": made["x-model"]}


def test_the_app_says_what_is_tested_here(app: App) -> None:
    assert httpx.get(f"{app.http}/openapi.json").json() == specification


@pytest.mark.parametrize("label", operations)
def test_every_answer_is_a_documented_one(label: str, app: App, known: dict[str, str]) -> None:
    def check(case: Any) -> None:
        aimed(case, known).call_and_validate(base_url=app.http, checks=CHECKS, timeout=120)

    build_operation_test(
        config=api.config,
        operation=operations[label],
        test_func=check,
        given_kwargs={},
        feedback=FeedbackSources(),
        explicit_settings=SETTINGS,
    )()


def aimed(case: Any, known: dict[str, str]) -> Any:
    """Half of the valid ones find what they name, and no grid is larger than it must be."""
    request = case.body.get("request", case.body) if isinstance(case.body, dict) else {}
    valid = case.meta.generation.mode is schemathesis.GenerationMode.POSITIVE
    for asked in (case.path_parameters, request):
        if valid and isinstance(asked, dict) and zlib.crc32(repr(asked).encode()) % 2:
            asked |= {name: known[name] for name in asked.keys() & known.keys() if isinstance(asked[name], str)}
    if case.operation.path == "/v1/automask" and isinstance(request, dict):
        if request.get("points_per_side") is None:
            request["points_per_side"] = 2
        for name, (enough, most) in CHEAP.items():
            if isinstance(request.get(name), int) and enough < request[name] <= most:
                request[name] = enough
    return case
