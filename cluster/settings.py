"""Settings: one YAML file, read here and nowhere else, frozen once read.

Precedence, lowest first: the defaults below, the file (`--config`, else `CELLRAY_CONFIG`), `CELLRAY_*` environment
variables (`CELLRAY_STORAGE__ENDPOINT_URL` sets `storage.endpoint_url`), arguments. Unknown keys are refused, in the
environment too. Credentials are no settings: the S3 client takes them from the node's environment or mounted files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from cluster.errors import InvalidSettings

MIB = 1 << 20
ENV_PREFIX = "CELLRAY_"
CONFIG_VARIABLE = "CELLRAY_CONFIG"
MAX_CONFIG_BYTES = MIB
PUBLIC_WEIGHTS = "https://dl.fbaipublicfiles.com/segment_anything/"


SECRETIVE = ("model_type", "model_attributes_type", "dict_type")
# Kubernetes sets these in every pod beside a Service named `cellray…`; they are no settings.
SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT|PORT_\d+_(TCP|UDP)(_\w+)?)$")


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StorageSettings(Frozen):
    """How `s3://` is reached. Times are in seconds."""

    endpoint_url: str | None = Field(None, description="S3 endpoint; empty means AWS or AWS_ENDPOINT_URL")
    region: str | None = None
    anonymous: bool = Field(False, description="read public buckets without credentials")
    connect_timeout_s: PositiveFloat = 5
    read_timeout_s: PositiveFloat = 60
    attempts: PositiveInt = Field(4, description="tries of one S3 call, the first included")


class WeightsSettings(Frozen):
    """Where a checkpoint comes from."""

    source: str = Field(
        description="a path, https://…, s3://…, packaged:nano, or seeded:ARCHITECTURE:SEED (random weights)"
    )
    sha256: str | None = Field(
        None, pattern="^[0-9a-fA-F]{6,64}$", description="start of the file's sha256, at least 6 hex digits"
    )
    licence: str = "unknown"


ComputeDtype = Literal["float32", "bfloat16"]


class ModelSettings(WeightsSettings):
    """One named model: where its checkpoint comes from and how it is run."""

    runtime: Literal["auto", "reference", "openvino", "flash"] = Field(
        "auto", description="auto: the fastest that is installed; reference: segment_anything's own modules"
    )
    dtype: ComputeDtype = Field(
        "float32",
        description="what products are computed in; bfloat16 is about twice as fast, and `cellray gate` checks it",
    )
    modelconfig: str | None = Field(
        None, description="a CellSAM's own YAML, which says what its detector's sizes are; a path or s3://…"
    )
    cells: bool = Field(False, description="it is a CellSAM: serve its detector too, which finds every cell")


DEFAULT_MODELS: dict[str, dict[str, str | bool]] = {
    "nano": {"source": "packaged:nano", "licence": "Apache-2.0"},
    "sam_vit_b": {
        "source": PUBLIC_WEIGHTS + "sam_vit_b_01ec64.pth",
        "sha256": "01ec64",
        "licence": "Apache-2.0",
    },
    "sam_vit_l": {
        "source": PUBLIC_WEIGHTS + "sam_vit_l_0b3195.pth",
        "sha256": "0b3195",
        "licence": "Apache-2.0",
    },
    "sam_vit_h": {
        "source": PUBLIC_WEIGHTS + "sam_vit_h_4b8939.pth",
        "sha256": "4b8939",
        "licence": "Apache-2.0",
    },
    **{
        name: {
            "source": f"deepcell:models/cellsam-models_v1.2.tar.gz#cellsam_v1.2/{name}.pt",
            "licence": "CellSAM's modified Apache-2.0, not for commercial use: github.com/vanvalenlab/cellSAM",
            "cells": True,
        }
        for name in ("cellsam_general", "cellsam_extra")
    },
}


class Limits(Frozen):
    """Bounds on what one input may cost. Each refuses with a clear error; none truncates."""

    image_bytes: PositiveInt = Field(256 * MIB, description="largest image file, and largest HTTP body")
    image_pixels: PositiveInt = Field(
        100_000_000, le=178_956_970, description="largest width × height, checked first; Pillow refuses more"
    )
    slide_bytes: PositiveInt = Field(64 << 30, description="largest file of those read by windows, as CellSAM's are")
    slide_pixels: PositiveInt = Field((1 << 32) - 1, le=(1 << 32) - 1, description="largest width × height of those")
    prompts: PositiveInt = Field(4096, description="most prompts for one image in one request")
    request_timeout_s: PositiveFloat = Field(600, description="longest wait for one answer of a replica")
    cache_bytes: PositiveInt = Field(512 * MIB, description="embeddings that one ingress replica keeps in memory")


Origin = Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]  # as browsers send it, or any


class ServiceSettings(Frozen):
    """Who may use the service, and how much."""

    keys: str | None = Field(
        None,
        description="a file of every ingress node with a line `name: sha256 of the key [requests a minute]` a key, as "
        "`cellray key` prints it; without one the service starts on loopback only",
    )
    requests_per_minute: PositiveInt | None = Field(
        None, description="of one key to one ingress replica, where its line has no number; so many at once, too"
    )
    allow_origins: tuple[Origin, ...] = Field((), description="whose pages may call the service (CORS)")


class Settings(Frozen):
    """Everything that driver, workers and replicas must agree on."""

    storage: StorageSettings = StorageSettings()
    weights_dir: str = Field("~/.cache/cellray/weights", description="where checkpoints are kept, split, on a node")
    weights_mirror: str | None = Field(
        None, description="s3://… or a shared folder: what one node has fetched and split, the others take from there"
    )
    models: dict[str, ModelSettings] = Field(default_factory=dict, description="by name; added to the built-in table")
    datasets: tuple[str, ...] = Field((), description="outputs of jobs.embed whose embeddings the service answers from")
    limits: Limits = Limits()
    service: ServiceSettings = ServiceSettings()


def load(config: str | None = None, environ: Mapping[str, str] | None = None, **arguments: Any) -> Settings:
    """Read the settings; `config` is a path or an `s3://` URI, `arguments` are top-level keys that win over all.

    Raises:
        InvalidSettings: the file is no YAML mapping, or a key or value does not fit.
        NotFound, Forbidden, Unavailable: the file cannot be read.
    """
    environ = os.environ if environ is None else environ
    from_environment = _environment(environ)
    config = config or environ.get(CONFIG_VARIABLE) or None
    values = _merge(_read(config, from_environment) if config else {}, from_environment)
    values = _merge(values, {key: value for key, value in arguments.items() if value is not None})
    models = values.get("models") or {}
    if isinstance(models, Mapping):
        values["models"] = _merge(DEFAULT_MODELS, models)
    return _validate(values, f"{config}, CELLRAY_* variables" if config else "the defaults and CELLRAY_* variables")


def _read(config: str, from_environment: dict[str, Any]) -> dict[str, Any]:
    bootstrap = _validate({"storage": from_environment.get("storage", {})}, "CELLRAY_STORAGE__*")
    return read_mapping(config, bootstrap.storage)


def read_mapping(config: str, storage: StorageSettings) -> dict[str, Any]:
    """A YAML file of keys and values. Raises InvalidSettings, and as `Storage.read`."""
    from cluster.storage import Storage  # storage needs StorageSettings: the import runs back only here

    text = Storage(storage).read(config, MAX_CONFIG_BYTES)
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"{config} is not valid YAML: {_problem(error)}") from None
    if not isinstance(values or {}, dict):
        raise InvalidSettings(f"{config} must be a YAML mapping of settings, found a {type(values).__name__}")
    return values or {}


def _problem(error: Exception) -> str:
    """What and where, without the line itself: it may hold a secret."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}" if mark else what


def _environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in sorted(environ.items()):
        if not variable.startswith(ENV_PREFIX) or variable == CONFIG_VARIABLE or SERVICE_LINK.search(variable):
            continue
        *parents, leaf = variable.removeprefix(ENV_PREFIX).lower().split("__")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InvalidSettings(f"{variable} sets a part of what another variable sets whole")
        try:
            node[leaf] = yaml.safe_load(text) if text.lstrip()[:1] in ("[", "{") else text or None
        except yaml.YAMLError as error:
            raise InvalidSettings(f"{variable} is not a valid YAML value: {_problem(error)}") from None
    return values


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _validate(values: dict[str, Any], where: str) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":  # the value may be a secret put in the wrong place: not shown
            raise InvalidSettings(f"{where}: {key} is no setting; see cluster/settings.py for all of them") from None
        value = first["input"]  # text in place of a mapping, or a whole mapping, may be or hold a secret
        shown = isinstance(value, (int, float, str)) and first["type"] not in SECRETIVE
        found = f" (found {value!r})" if shown else f" (found a {type(value).__name__})"
        raise InvalidSettings(f"{where}: {key}: {first['msg']}{found}") from None
