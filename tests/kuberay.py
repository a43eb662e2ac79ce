"""What the Kubernetes API and KubeRay's operator refuse, said without a cluster: the published CRDs as strict JSON
schemas, and the operator's own rules beyond them (ray-operator/controllers/ray/utils/validation.go of KubeRay 1.7)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

CRDS = Path(os.environ.get("KUBERAY_CRDS") or Path(__file__).parents[1] / ".." / "shared" / "data" / "kuberay")
KINDS = {"RayService": "ray.io_rayservices.yaml", "RayJob": "ray.io_rayjobs.yaml"}
ALPHA = ("networkPolicy", "tlsOptions", "historyServerOptions")  # the operator's feature gates are off as it comes
MAX_NAME, SUFFIX = 47, 5  # of a RayService or RayJob; what generateName appends
METADATA = {"name", "generateName", "namespace", "labels", "annotations"}

# Kinds that no CRD is at hand for: what may stand in `spec`, and where in the RayService's CRD its parts are described.
CLUSTER = "spec.rayClusterConfig"
POD = f"{CLUSTER}.headGroupSpec.template"
SERVICE = f"{CLUSTER}.headGroupSpec.headService.spec"
INGRESS = f"{CLUSTER}.networkPolicy.head.ingressRules"
CLAIM = f"{POD}.spec.volumes[].ephemeral.volumeClaimTemplate.spec"
SELECTOR = f"{POD}.spec.topologySpreadConstraints[].labelSelector"
CORE: dict[tuple[str, str], dict[str, str | None]] = {
    ("apps/v1", "Deployment"): {"replicas": None, "selector": SELECTOR, "template": POD},
    ("apps/v1", "StatefulSet"): {
        "replicas": None, "serviceName": None, "selector": SELECTOR, "template": POD, "volumeClaimTemplates": "claims",
    },
    ("v1", "Service"): {"": SERVICE},
    ("networking.k8s.io/v1", "NetworkPolicy"): {"podSelector": SELECTOR, "policyTypes": None, "ingress": INGRESS},
    ("policy/v1", "PodDisruptionBudget"): {"minAvailable": None, "maxUnavailable": None, "selector": SELECTOR},
}  # fmt: skip


def absent() -> str:
    """Why the CRDs cannot be asked, or ""."""
    missing = [name for name in KINDS.values() if not (CRDS / name).exists()]
    return f"no {missing[0]} in {CRDS}: name its folder in KUBERAY_CRDS" if missing else ""


@cache
def _crd(kind: str) -> dict[str, Any]:
    found = yaml.load((CRDS / KINDS[kind]).read_text(), yaml.CSafeLoader)
    (version,) = (one for one in found["spec"]["versions"] if one["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    _close(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _close(schema: Any) -> None:
    """As `kubectl --validate=strict`: a key that the schema does not have is an error."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for inner in schema.values():
            _close(inner)
    elif isinstance(schema, list):
        for inner in schema:
            _close(inner)


def _unique(_: Any, keys: list[str], value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    names = [tuple(str(item.get(key)) for key in keys) for item in value if isinstance(item, dict)]
    for name in names:
        if names.count(name) > 1:
            yield jsonschema.ValidationError(f"{name} is there twice")


Strict = jsonschema.validators.extend(jsonschema.Draft7Validator, {"x-kubernetes-list-map-keys": _unique})


@cache
def _validator(path: str, kind: str = "RayService") -> Any:
    schema = _crd(kind)
    for step in path.split(".") if path else []:
        schema = schema["properties"][step.removesuffix("[]")]
        schema = schema["items"] if step.endswith("[]") else schema
    return Strict(schema)


def against_schema(doc: Any) -> Iterator[str]:
    """One object against the CRDs, and what of core objects they describe."""
    api, kind = str(doc.get("apiVersion")), str(doc.get("kind"))
    if kind in KINDS and api == "ray.io/v1":
        yield from _errors(doc, "", kind)
    elif (api, kind) == ("v1", "ConfigMap"):
        if unknown := set(doc) - {"apiVersion", "kind", "metadata", "data"}:
            yield f"{kind}: unknown {sorted(unknown)}"
    elif (api, kind) in CORE:
        yield from _core(doc, kind, CORE[api, kind])
    else:
        yield f"{api} {kind} is no kind that is known here"
    metadata = doc.get("metadata") or {}
    if set(metadata) - METADATA or not {"name", "generateName"} & set(metadata):
        yield f"{kind}: metadata has {sorted(metadata)}"


def _core(doc: Any, kind: str, parts: dict[str, str | None]) -> Iterator[str]:
    if set(doc) != {"apiVersion", "kind", "metadata", "spec"}:
        yield f"{kind} has {sorted(doc)}"
    spec = doc.get("spec") or {}
    if "" in parts:
        yield from _errors(spec, str(parts[""]))
        return
    if unknown := set(spec) - set(parts):
        yield f"{kind}: unknown {sorted(unknown)}"
    for key, path in parts.items():
        if key in spec and path == "claims":
            for claim in spec[key]:
                yield from _errors(claim.get("spec"), CLAIM)
        elif key in spec and path:
            yield from _errors(spec[key], path)


def _errors(value: Any, path: str, kind: str = "RayService") -> Iterator[str]:
    for error in _validator(path, kind).iter_errors(value):
        yield f"{path}.{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"


def operator(doc: Any) -> Iterator[str]:
    """What the operator answers to a RayService or RayJob that its CRD lets through."""
    metadata, spec = doc["metadata"], doc["spec"]
    name = metadata.get("name") or metadata.get("generateName", "") + "x" * SUFFIX
    if len(name) > MAX_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"the name {name} is over {MAX_NAME} characters, or no DNS label"
    if doc["kind"] == "RayService":
        yield from _service(spec)
        cluster = spec.get("rayClusterConfig")
    else:
        yield from _job(spec)
        cluster = spec.get("rayClusterSpec")
    if cluster:
        yield from _cluster(cluster, metadata.get("annotations") or {})


def _service(spec: Any) -> Iterator[str]:
    upgrade = (spec.get("upgradeStrategy") or {}).get("type", "NewCluster")
    if upgrade not in ("NewCluster", "None"):  # the incremental one needs a gateway, which is not here
        yield f"upgradeStrategy.type {upgrade}"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds is negative"
    head = spec["rayClusterConfig"]["headGroupSpec"]
    if (head.get("headService") or {}).get("metadata", {}).get("name"):
        yield "headService has a name"
    if not any(port.get("name") == "serve" for port in _containers(head)[0].get("ports", [])):
        yield "the head's container has no port `serve`: the operator makes no service then"


def _job(spec: Any) -> Iterator[str]:
    selector, mode, backoff = spec.get("clusterSelector"), spec.get("submissionMode"), spec.get("backoffLimit", 0)
    ends = bool(spec.get("shutdownAfterJobFinishes"))
    if bool(selector) == bool(spec.get("rayClusterSpec")):
        yield "expected one of clusterSelector and rayClusterSpec"
    if selector and not selector.get("ray.io/cluster"):
        yield "clusterSelector names no ray.io/cluster"
    if selector and (spec.get("suspend") or backoff or mode == "SidecarMode"):
        yield "clusterSelector goes with neither suspend, backoffLimit nor SidecarMode"
    if mode == "SidecarMode" and (spec.get("submitterPodTemplate") or spec.get("submitterConfig")):
        yield "SidecarMode has no submitter of its own"
    if spec.get("suspend") and not ends:
        yield "suspend needs shutdownAfterJobFinishes"
    if (spec.get("ttlSecondsAfterFinished", 0) and not ends) or spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttlSecondsAfterFinished is negative, or without shutdownAfterJobFinishes"
    if backoff < 0 or any(spec.get(key, 1) <= 0 for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds")):
        yield "backoffLimit or a deadline is not positive"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is no mapping"


def _cluster(spec: Any, annotations: Any) -> Iterator[str]:
    head, groups = spec["headGroupSpec"], spec.get("workerGroupSpecs") or []
    scaled, options = spec.get("enableInTreeAutoscaling"), spec.get("autoscalerOptions") or {}
    second = scaled and options.get("version") == "v2"
    version = tuple(int(one) for one in re.findall(r"\d+", spec.get("rayVersion", "0"))[:2])
    names = [group["groupName"] for group in groups]
    if len(set(names)) < len(names) or not all(re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name) for name in names):
        yield f"group names are not unique, or no labels: {names}"
    for group in [head, *groups]:
        name, params = group.get("groupName", "head"), group.get("rayStartParams") or {}
        if not _containers(group):
            yield f"{name} has no container"
        if "labels" in params or (
            set(params) & {"num-cpus", "num-gpus", "memory", "resources"} and group.get("resources")
        ):
            yield f"{name}: rayStartParams say what labels or resources say"
        if second and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{name}: restartPolicy must be Never with autoscaler v2"
        if group.get("suspend"):
            yield f"{name} is suspended: not with an autoscaler"
        if not 0 <= group.get("minReplicas", 0) <= group.get("maxReplicas", 1 << 30):
            yield f"{name}: minReplicas {group['minReplicas']} and maxReplicas {group['maxReplicas']}"
        if (group.get("idleTimeoutSeconds") is not None or group.get("priority")) and not second:
            yield f"{name}: idleTimeoutSeconds and priority need autoscaler v2"
        if group.get("priority") and version < (2, 56):
            yield f"{name}: priority needs Ray 2.56, found {version}"
        if group.get("idleTimeoutSeconds", 0) < 0:
            yield f"{name}: idleTimeoutSeconds is negative"
    env, params = {one["name"] for one in _containers(head)[0].get("env") or []}, head.get("rayStartParams") or {}
    kept = spec.get("gcsFaultToleranceOptions")
    if kept is not None:
        if annotations.keys() & {"ray.io/ft-enabled", "ray.io/external-storage-namespace"}:
            yield "gcsFaultToleranceOptions and its annotations exclude each other"
        if env & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"} or "redis-password" in params:
            yield "gcsFaultToleranceOptions has Redis's address and password, the head has them, too"
        if kept.get("backend", "redis") != "redis" or "storage" in kept:
            yield "the RocksDB backend is behind a feature gate"
        if not kept.get("redisAddress"):
            yield "gcsFaultToleranceOptions has no redisAddress"
    elif "RAY_REDIS_ADDRESS" in env:
        yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
    if "REDIS_USERNAME" in env or "redis-username" in params:
        yield "Redis's user belongs into gcsFaultToleranceOptions"
    if "RAY_enable_autoscaler_v2" in env:
        yield "autoscalerOptions.version says which autoscaler"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds is negative"
    if "KUBERAY_GEN_AUTOSCALER_START_CMD" in {one["name"] for one in options.get("env") or []}:
        yield "KUBERAY_GEN_AUTOSCALER_START_CMD is the operator's"
    auth = spec.get("authOptions") or {}
    if auth.get("mode") == "token" and version < (2, 52):
        yield f"token authentication needs Ray 2.52, found {version}"
    if auth.get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is for a RayCluster alone"
    if refused := {*ALPHA, "upgradeStrategy"} & set(spec):
        yield f"{refused}: behind a feature gate, or for a RayCluster alone"


def _containers(group: Any) -> list[Any]:
    return group["template"]["spec"].get("containers") or []


def clusters(doc: Any) -> list[Any]:
    """The Ray clusters that an object makes."""
    spec = doc.get("spec") or {}
    return [spec[key] for key in ("rayClusterConfig", "rayClusterSpec") if key in spec]
