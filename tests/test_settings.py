"""Settings: where a value comes from, and what is said of one that does not fit."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from cluster import errors, settings
from cluster.errors import CellrayError, InvalidInput, InvalidSettings, NotFound, TooLarge
from cluster.settings import Settings, load
from cluster.storage import Storage
from tests.s3 import S3, s3_fixture  # noqa: F401

CANARY = "hf_CANARY"


def write(folder: Path, content: str | bytes) -> str:
    path = folder / "cellray.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refused(kind: type[CellrayError], config: str | None = None, environ: dict[str, str] | None = None) -> str:
    """The message, which is one line."""
    with pytest.raises(kind) as caught:
        load(config, environ or {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults() -> None:
    made = load(environ={})
    assert {*settings.DEFAULT_MODELS} == {*made.models}
    assert made.storage.endpoint_url is None
    assert made.datasets == ()
    assert made.model_copy(update={"models": {}}) == Settings()


@pytest.mark.parametrize(
    ("file", "environment", "argument", "expected"),
    [
        (False, False, False, None),
        (True, False, False, "file"),
        (True, True, False, "environment"),
        (True, True, True, "argument"),
        (False, True, True, "argument"),
        (True, False, True, "argument"),
    ],
)
def test_precedence_key_by_key(
    tmp_path: Path, file: bool, environment: bool, argument: bool, expected: str | None
) -> None:
    config = write(tmp_path, "storage: {region: file, attempts: 7}" if file else "storage: {attempts: 7}")
    environ = {"CELLRAY_STORAGE__REGION": "environment"} if environment else {}
    made = load(config, environ, storage={"region": "argument"} if argument else None)
    assert made.storage.region == expected
    assert made.storage.attempts == 7  # its neighbours stay


def test_the_file_is_named_by_argument_or_environment(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("weights_dir: first")
    second.write_text("weights_dir: second")
    environ = {"CELLRAY_CONFIG": str(second)}
    assert load(environ=environ).weights_dir == "second"
    assert load(str(first), environ).weights_dir == "first"
    assert load(environ={"CELLRAY_CONFIG": ""}) == load(environ={})


def test_the_environment_is_that_of_the_process_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLRAY_LIMITS__PROMPTS", "5")
    assert load().limits.prompts == 5
    assert load(environ={}).limits.prompts == 4096


def test_models_are_added_to_the_table_and_changed_key_by_key(tmp_path: Path) -> None:
    made = load(write(tmp_path, "models: {mine: {source: /w.pth}, nano: {licence: MIT}}"), {})
    assert made.models["mine"].source == "/w.pth"
    assert (made.models["nano"].source, made.models["nano"].licence) == ("packaged:nano", "MIT")
    assert {*settings.DEFAULT_MODELS} < {*made.models}


def test_lists_and_numbers_in_the_environment() -> None:
    made = load(environ={"CELLRAY_DATASETS": "[s3://a, /b]", "CELLRAY_STORAGE__READ_TIMEOUT_S": "1.5", "HOME": "/"})
    assert made.datasets == ("s3://a", "/b")
    assert made.storage.read_timeout_s == 1.5


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, ""), {}) == load(environ={})
    assert load(write(tmp_path, "models:"), {}) == load(environ={})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("storage: [", "is not valid YAML"),
        ("storage: {region: a: b}", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"weights_dir: \xe9", "is not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("- a", "found a list"),
        ("text", "found a str"),
        ("limits: {prompts: many}", "limits.prompts"),
        ("limits: {prompts: 0}", "limits.prompts"),
        ("storage: {read_timeout_s: -1}", "storage.read_timeout_s"),
        ("storage:", "storage"),
        ("datasets: out", "datasets"),
        ("models: {mine: {licence: MIT}}", "models.mine.source"),
        ("models: {mine: {source: 3}}", "models.mine.source"),
        ("1: x", "1"),
        ("bogus: x", "bogus is no setting"),
        ("storage: {bogus: x}", "storage.bogus is no setting"),
        ("models: {nano: {bogus: x}}", "models.nano.bogus is no setting"),
        ("models: [nano]", "models"),
        ("models: nano", "models"),
        ("models: {nano: {sha256: a}}", "models.nano.sha256"),
        ("models: {nano: {sha256: zzzzzz}}", "models.nano.sha256"),
    ],
)
def test_a_wrong_file_is_refused_by_its_name_and_key(tmp_path: Path, content: str | bytes, named: str) -> None:
    config = write(tmp_path, content)
    message = refused(InvalidSettings, config)
    assert message.startswith(config)
    assert named in message


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"CELLRAY_BOGUS": "x"}, "bogus is no setting"),
        ({"CELLRAY_STORAGE__BOGUS": "x"}, "storage.bogus is no setting"),
        ({"CELLRAY_LIMITS__PROMPTS": "many"}, "limits.prompts"),
        ({"CELLRAY_DATASETS": "[a"}, "CELLRAY_DATASETS"),
        ({"CELLRAY_STORAGE": "a", "CELLRAY_STORAGE__REGION": "b"}, "CELLRAY_STORAGE"),
        ({"CELLRAY_STORAGE__REGION": "a", "CELLRAY_STORAGE__REGION__X": "b"}, "CELLRAY_STORAGE__REGION"),
    ],
)
def test_a_wrong_variable_is_refused(environ: dict[str, str], named: str) -> None:
    assert named in refused(InvalidSettings, environ=environ)


def test_the_file_is_not_blamed_for_a_variable(tmp_path: Path) -> None:
    assert "CELLRAY_" in refused(InvalidSettings, write(tmp_path, "weights_dir: a"), {"CELLRAY_BOGUS": "x"})


@pytest.mark.parametrize("text", ["012345", "123456"])
def test_a_hash_of_digits_stays_text_in_the_environment(text: str) -> None:
    assert load(environ={"CELLRAY_MODELS__NANO__SHA256": text}).models["nano"].sha256 == text


@pytest.mark.parametrize(
    ("content", "environ"),
    [
        (f"token: {CANARY}", {}),
        (f"storage: {{aws_secret_access_key: {CANARY}}}", {}),
        (f"models: {{nano: {{token: {CANARY}}}}}", {}),
        ("", {"CELLRAY_TOKEN": CANARY}),
        ("", {"CELLRAY_STORAGE__AWS_SECRET_ACCESS_KEY": CANARY}),
        (f"models: {{mine: {{token: {CANARY}}}}}", {}),
        (f"models: {{mine: {CANARY}}}", {}),
        (f"storage: {CANARY}", {}),
        (f"token: {CANARY}: x", {}),
        ("", {"CELLRAY_TOKEN": f"[{CANARY}"}),
    ],
)
def test_a_secret_in_the_wrong_place_is_not_shown(tmp_path: Path, content: str, environ: dict[str, str]) -> None:
    assert CANARY not in refused(InvalidSettings, write(tmp_path, content), environ)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.yaml")
    assert missing in refused(NotFound, missing)
    assert str(tmp_path) in refused(InvalidInput, str(tmp_path))


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    assert "larger than" in refused(TooLarge, write(tmp_path, b"#" * (settings.MAX_CONFIG_BYTES + 1)))


@pytest.mark.parametrize(
    "config",
    [
        "http://127.0.0.1/cellray.yaml",
        "gs://bucket/cellray.yaml",
        "s3://",
    ],
)
def test_another_scheme_is_refused(config: str) -> None:
    assert config in refused(InvalidInput, config)


def test_the_file_may_lie_on_s3(s3: S3) -> None:
    config = s3.make_bucket("test-settings") + "/cellray.yaml"
    environ = {"CELLRAY_STORAGE__ENDPOINT_URL": s3.settings.endpoint_url or ""}
    assert config in refused(NotFound, config, environ)
    Storage(s3.settings).publish(config, yaml.safe_dump({"weights_dir": "/weights", "limits": {"prompts": 7}}).encode())
    made = load(config, environ)
    assert (made.weights_dir, made.limits.prompts) == ("/weights", 7)
    assert made.storage.endpoint_url == s3.settings.endpoint_url
    assert load(environ={**environ, "CELLRAY_CONFIG": config}) == made


def test_frozen_and_travels_by_pickle() -> None:
    made = load(environ={}, datasets=("a",))
    with pytest.raises(ValidationError):
        made.weights_dir = "elsewhere"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        made.storage.region = "elsewhere"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(made)) == made


def kinds(root: type[CellrayError] = CellrayError) -> list[type[CellrayError]]:
    return [root] + [found for below in root.__subclasses__() for found in kinds(below)]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_error_is_one_line_and_travels_by_pickle(kind: type[CellrayError]) -> None:
    error = pickle.loads(pickle.dumps(kind("first\n  second\t third")))
    assert type(error) is kind
    assert str(error) == "first second third"
    assert kind.__doc__
    assert 400 <= kind.http_status < 600
    assert kind.retry == issubclass(kind, errors.Unavailable)


def test_kubernetes_service_links_are_no_settings() -> None:
    links = ("SERVE_SVC_SERVICE_HOST", "SERVE_SVC_SERVICE_PORT_HTTP", "HEAD_PORT", "HEAD_PORT_8000_TCP_ADDR")
    assert load(environ={f"CELLRAY_{name}": "tcp://10.0.0.1:8000" for name in links}) == load(environ={})


def test_a_pixel_limit_above_pillows_own_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="image_pixels"):
        load(environ={"CELLRAY_LIMITS__IMAGE_PIXELS": "200000000"})
