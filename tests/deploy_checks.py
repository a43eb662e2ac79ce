"""What is wrong with deploy/: checks over its parsed files, so that a test can spoil one and look again."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cluster import settings, telemetry
from cluster.errors import CellrayError
from serve_app import journal
from tests import deploy_commands as commands
from tests.deploy_files import AWS, PROMETHEUS, RULES, SERVICE, Files, parsed
from tests.deploy_pods import KEEPALIVE, kubernetes, together
from tests.deploy_serve import room, serve_app

SCRAPE = {
    "job_name", "metrics_path", "authorization", "static_configs", "kubernetes_sd_configs", "relabel_configs",
    "metric_relabel_configs",
}  # fmt: skip
LABELS = re.compile(r"__name__|__meta_kubernetes_pod_(ip|container_name|label_ray_io_(is_ray_node|group))")
SECONDS = re.compile(r"\d+s")
RELABEL = {"source_labels", "regex", "replacement", "target_label", "action"}
RULE = {"alert", "expr", "for", "labels", "annotations"}
METRIC = re.compile(r"ray_(cellray_\w+?)(?:_(bucket|count|sum|total))?(?:\{([^}]*)\})?\[")


def problems(files: Files, changed: str = "") -> Iterator[str]:
    """Everything that is wrong, or what may be once one file has `changed`; the CRDs are asked where they are."""
    for name in [changed] if changed else files:
        for doc in files[name]:
            yield from _of(name, _alone(doc, name))
    if changed in ("", "serve.gpu.yaml", AWS):
        yield from _of(AWS, on_ec2(files))
    if changed in ("", "serve.gpu.yaml") or changed.startswith("kuberay/"):
        yield from _of(
            "kuberay", together([doc for name in files if name.startswith("kuberay/") for doc in files[name]])
        )
        yield from _of(SERVICE, same_app(files))


def _alone(doc: Any, name: str) -> Iterator[str]:
    if name.startswith("serve."):
        return serve_app(doc, name)
    if name.startswith("kuberay/"):
        return kubernetes(doc, name)
    return {AWS: aws, PROMETHEUS: prometheus, RULES: rules}[name](doc)


def _of(name: str, found: Iterator[str]) -> Iterator[str]:
    """A check that trips over what it reads has found something, too."""
    try:
        for one in found:
            yield f"{name}: {one}"
    except (
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        IndexError,
        re.error,
        yaml.YAMLError,
        CellrayError,
    ) as error:
        yield f"{name}: {type(error).__name__}: {error}"


def on_ec2(files: Files) -> Iterator[str]:
    nodes = list(files[AWS][0]["available_node_types"].values())
    shapes = [(float(node["resources"].get("CPU", 0)), float(node["resources"].get("GPU", 0))) for node in nodes]
    yield from room(files["serve.gpu.yaml"][0], shapes, [node["max_workers"] for node in nodes])


def same_app(files: Files) -> Iterator[str]:
    """The RayService runs deploy/serve.gpu.yaml; only where the settings are differs."""
    (text,) = (doc["spec"]["serveConfigV2"] for doc in files[SERVICE])
    here, there = parsed(text), copy.deepcopy(files["serve.gpu.yaml"][0])
    yield from serve_app(here, "serveConfigV2")
    there["applications"][0]["args"]["config"] = here["applications"][0]["args"]["config"]
    if here != there:
        yield "serveConfigV2 is another app than serve.gpu.yaml"


def aws(config: Any) -> Iterator[str]:
    """`ray up`'s own validation, and the keys of EC2's `run_instances`."""
    import jsonschema
    from botocore.validate import ParamValidator
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except (jsonschema.ValidationError, RuntimeError, AssertionError) as error:
        yield str(error).splitlines()[0]
        return
    for name, node in config["available_node_types"].items():
        report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node["node_config"]}, _run_instances())
        if report.has_errors():
            yield f"{name}: {report.generate_report()}"
        yield from (f"{name}: {one}" for one in _enums(node["node_config"], _run_instances()))
        if (
            set(node["resources"]) - {"CPU", "GPU"}
            or not 0 <= node.get("min_workers", 0) <= node["max_workers"] <= config["max_workers"]
        ):
            yield f"{name}: its resources, or min_workers above max_workers, or that above the cluster's"
    known = {"type", "region", "availability_zone", "cache_stopped_nodes"}  # Ray's schema takes any
    if set(config["provider"]) - known:
        yield f"provider has {sorted(config['provider'])}"
    options = dict(
        one.removeprefix("--env ").split("=", 1) for one in config["docker"]["run_options"] if "--env" in one
    )
    if options.pop("RAY_AUTH_MODE", "") != "token" or "/home/cellray/.ray" not in config["file_mounts"]:
        yield "nodes have no token"
    if {key: options.pop(key, "") for key in KEEPALIVE} != KEEPALIVE:
        yield "a silent node is not noticed"
    paths = {value for value in options.values() if value.startswith("/")}
    if not all(path.startswith(tuple(config["file_mounts"])) for path in paths) or set(options) != {
        settings.CONFIG_VARIABLE, "DEEPCELL_ACCESS_TOKEN_FILE", "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE",
    }:  # fmt: skip
        yield f"variables {options}"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in config[key]:
            yield from (f"{key}: {why}" for _, why in commands.wrong(command))


def _enums(value: Any, shape: Any) -> Iterator[str]:
    """Words that EC2 does not know."""
    if shape.type_name == "structure":
        for key, inner in value.items():
            if key in shape.members:
                yield from _enums(inner, shape.members[key])
    elif shape.type_name == "list":
        for inner in value:
            yield from _enums(inner, shape.member)
    elif getattr(shape, "enum", None) and value not in shape.enum:
        yield f"{value} is no {shape.name}"


@cache
def _run_instances() -> Any:
    from botocore.session import Session

    return Session().get_service_model("ec2").operation_model("RunInstances").input_shape


def prometheus(config: Any) -> Iterator[str]:
    """Keys, and the few words, that Prometheus knows."""
    if set(config) != {"global", "rule_files", "scrape_configs"} or config["rule_files"] != [Path(RULES).name]:
        yield f"keys {sorted(config)}, rule_files {config.get('rule_files')}"
    times = config["global"]
    if set(times) != {"scrape_interval", "evaluation_interval"} or not all(map(SECONDS.fullmatch, times.values())):
        yield f"global {times}"
    service, nodes = config["scrape_configs"]
    if (service["job_name"], nodes["job_name"]) != ("cellray", "ray"):
        yield "jobs have other names than the rules"
    for one in (service, nodes):
        if unknown := set(one) - SCRAPE:
            yield f"unknown {unknown}"
        for step in [*one.get("relabel_configs", []), *one.get("metric_relabel_configs", [])]:
            re.compile(step.get("regex", ""))
            if set(step) - RELABEL or not all(map(LABELS.fullmatch, step["source_labels"])):
                yield f"relabelling {step}"
            if step.get("action") not in ("keep", "drop") and step["target_label"] not in ("__address__", "group"):
                yield f"relabelling {step}"
    how = service["authorization"]
    if service["metrics_path"] != "/metrics" or how != {"type": "Bearer", "credentials_file": how["credentials_file"]}:
        yield "the service's metrics are at /metrics, for a key in a file"
    (target,) = service["static_configs"]
    if set(target) != {"targets"} or not all(one.endswith(":8000") for one in target["targets"]):
        yield f"targets {target}"
    if nodes["kubernetes_sd_configs"] != [{"role": "pod"}]:
        yield f"pods are found by {nodes['kubernetes_sd_configs']}"


def rules(config: Any) -> Iterator[str]:
    """Metrics and labels that telemetry has."""
    (group,) = config["groups"]
    if set(config) != {"groups"} or set(group) != {"name", "rules"}:
        yield f"keys {sorted(group)}"
    for rule in group["rules"]:
        if (
            set(rule) != RULE
            or set(rule["annotations"]) != {"summary"}
            or rule["labels"].get("severity") not in ("page", "ticket")
        ):
            yield f"{rule.get('alert')}: {rule}"
        if not re.fullmatch(r"\d+[smh]", rule["for"]) or rule["expr"].count("(") != rule["expr"].count(")"):
            yield f"{rule['alert']}: for, or brackets"
        found = METRIC.findall(rule["expr"])
        if len(found) != len(re.findall(r"\bray_", rule["expr"])) or not (found or 'up{job="cellray"}' in rule["expr"]):
            yield f"{rule['alert']}: its metrics are not read: {rule['expr']}"
        for name, suffix, labels in found:
            yield from (f"{rule['alert']}: {one}" for one in _metric(name, suffix, labels, rule["expr"]))


def _metric(name: str, suffix: str, labels: str, expression: str) -> Iterator[str]:
    if name not in telemetry.METRICS:
        yield f"there is no metric {name}"
        return
    _, own, buckets = telemetry.METRICS[name]
    if suffix not in (("bucket", "count", "sum") if buckets else ("total",)):
        yield f"{name} has no _{suffix}"
    asked = re.findall(r'(\w+)=~?"([^"]*)"', labels)
    grouped = {one for by in re.findall(r"by \(([^)]*)\)", expression) for one in by.split(", ")} - {"le"}
    if not {key for key, _ in asked} | grouped <= set(own):
        yield f"{name} has the labels {own}, not {asked}, {grouped}"
    if "histogram_quantile" in expression and "by (le" not in expression:
        yield "a quantile without le"
    for key, value in asked:
        if key == "reason" and value not in journal.REJECTIONS.values():
            yield f"no reason {value}"
        if key == "status" and not re.fullmatch(r"[1-5]\d\d(\|[1-5]\d\d)*", value):
            yield f"status {value}"
