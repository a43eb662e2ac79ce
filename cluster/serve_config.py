"""Serve configs (as of `serve deploy`) read strictly: Serve's own schema drops keys that it does not know."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cluster.errors import InvalidSettings

FREE_FORM = {"args", "user_config", "policy_kwargs", "env_vars", "runtime_env", "resources"}  # the app's own to check


def read(path: Path) -> dict[str, Any]:
    """The config as a dict.

    Raises:
        InvalidSettings: no such file, not YAML, a key that Serve does not know, a value that it refuses, or
            min_replicas above max_replicas. Names the key.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidSettings(f"{path} is not a readable Serve config: {error}") from error
    check(config, str(path))
    return config


def check(config: Any, where: str) -> None:
    """Raises InvalidSettings as `read`."""
    from ray.serve.schema import ServeDeploySchema

    if not isinstance(config, dict) or not config.get("applications"):
        raise InvalidSettings(f"{where} has no applications: expected a config as of `serve deploy`")
    for key, known in _unknown(config, ServeDeploySchema, ""):
        raise InvalidSettings(f"{where}: {key} is no key of Serve's; there are {', '.join(sorted(known))}")
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidSettings(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    for application in config["applications"]:
        for deployment in application.get("deployments") or []:
            _check_scaling(deployment, where)


def _check_scaling(deployment: Mapping[str, Any], where: str) -> None:
    from ray.serve.config import AutoscalingConfig

    scaling = deployment.get("autoscaling_config")
    if not isinstance(scaling, dict):
        return
    name = f"{where}: {deployment['name']}.autoscaling_config"
    try:
        checked = AutoscalingConfig.model_validate(scaling)
    except ValidationError as error:
        raise InvalidSettings(f"{name}: {error.errors()[0]['msg']}") from error
    if checked.min_replicas > checked.max_replicas:
        raise InvalidSettings(f"{name}: min_replicas {checked.min_replicas} is above {checked.max_replicas}")
    if deployment.get("num_replicas") not in (None, "auto"):
        raise InvalidSettings(f"{where}: {deployment['name']} has both num_replicas and autoscaling_config")


def _unknown(value: Any, annotation: Any, path: str) -> Iterator[tuple[str, set[str]]]:
    """(path, known keys) of every key that no pydantic model in `annotation` has."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown(item, annotation, f"{path}[{index}]")
    models = list(_models(annotation))
    if not isinstance(value, dict) or not models:
        return
    fields = {name: field.annotation for model in models for name, field in model.model_fields.items()}
    for key, inner in value.items():
        if key not in fields:
            yield f"{path}.{key}".lstrip("."), set(fields)
        elif key not in FREE_FORM:
            yield from _unknown(inner, fields[key], f"{path}.{key}")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models inside `Optional[...]`, `Union[...]`, `List[...]` and so on."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models(inner)
