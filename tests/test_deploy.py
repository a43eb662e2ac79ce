"""deploy/ and the READMEs, read strictly where nothing of it can run: and a typo in any of them is found."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import serve_config
from cluster.errors import InvalidSettings
from serve_app.app import AppArgs
from serve_app.contract import INGRESS
from tests import deploy_checks as checks
from tests import deploy_commands as commands
from tests import deploy_files as deploy
from tests import kuberay
from tests.deploy_serve import serve_app

FILES = deploy.load()
SERVE = [name for name in FILES if name.startswith("serve.")]
IMAGE = (deploy.DEPLOY / "Dockerfile").read_text()
READMES = {name: (deploy.ROOT / name).read_text() for name in ("README.md", "deploy/README.md")}
OTHERS = {"aws", "export", "openssl", "pip", "python", "tr"}  # of deploy/README.md, and nobody's to check
FREE = {"annotations", "nodeSelector", "available_node_types"}  # whose keys are names
NESTED = ("serveConfigV2", "serve.yaml", "cellray.yaml")


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_wrong(name: str) -> None:
    assert [*checks.problems(FILES, name)] == []


@pytest.mark.skipif(bool(kuberay.absent()), reason=kuberay.absent() or "-")
def test_kubernetes_objects_fit_the_published_crds() -> None:
    docs = [doc for name in FILES if name.startswith("kuberay/") for doc in FILES[name]]
    assert {doc["kind"] for doc in docs} >= {"RayService", "RayJob", "NetworkPolicy", "PodDisruptionBudget"}
    assert [one for doc in docs for one in kuberay.against_schema(doc)] == []


def test_the_example_of_cellsam_once_it_is_no_comment() -> None:
    text = (deploy.DEPLOY / "serve.gpu.yaml").read_text().replace("models: [sam", "models: [cellsam_general, sam", 1)
    config = deploy.parsed(re.sub(r"^      # (?=- name: cellsam|  \w+: )", "      ", text, flags=re.M))
    assert [one["name"] for one in config["applications"][0]["deployments"]][-1] == "cellsam_general-cellfinder"
    assert [*serve_app(config, "serve.gpu.yaml")] == []


def test_the_rayservice_has_the_gpu_app_word_for_word() -> None:
    """Its comments, too: the example in them."""
    there = (deploy.DEPLOY / "serve.gpu.yaml").read_text().split("applications:\n")[1].splitlines()
    here = FILES[deploy.SERVICE][0]["spec"]["serveConfigV2"].split("applications:\n")[1].splitlines()
    other = [pair for pair in zip(here, there, strict=True) if pair[0] != pair[1]]
    assert len(other) == 1, other
    assert other[0][0].startswith("      config: null")


@pytest.mark.parametrize("name", SERVE)
def test_every_deployment_scales_and_its_queue_has_a_bound(name: str) -> None:
    (application,) = serve_config.read(deploy.DEPLOY / name)["applications"]
    assert all(one["autoscaling_config"] for one in application["deployments"])
    assert all(one["max_queued_requests"] > 0 for one in application["deployments"])


def test_what_asks_for_gpus() -> None:
    (application,) = FILES["serve.gpu.yaml"][0]["applications"]
    gpus = {one["name"]: one["ray_actor_options"].get("num_gpus", 0) for one in application["deployments"]}
    assert gpus.pop(INGRESS) == 0
    assert all(gpus.values())
    (cluster,) = kuberay.clusters(FILES[deploy.SERVICE][0])
    kinds = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert kinds["gpu-spot"]["priority"] > kinds["gpu"]["priority"]
    shapes = [kinds[name]["template"]["spec"]["containers"][0]["resources"] for name in ("gpu-spot", "gpu")]
    assert shapes[0] == shapes[1]  # else the autoscaler goes by what fits best, not by priority


def _set(document: Any, path: list[Any], value: Any) -> Any:
    document = copy.deepcopy(document)
    node = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return document


ENCODER = ["applications", 0, "deployments", 1]


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (["aplications"], [], "aplications is no key"),
        (["http_options", "prot"], 1, "http_options.prot is no key"),
        (["applications", 0, "import_pth"], "x", "import_pth is no key"),
        ([*ENCODER, "max_ongoing_request"], 3, "max_ongoing_request is no key"),
        ([*ENCODER, "ray_actor_options", "num_gpu"], 1, "num_gpu is no key"),
        ([*ENCODER, "autoscaling_config", "max_replica"], 1, "max_replica is no key"),
        ([*ENCODER, "autoscaling_config", "min_replicas"], 99, "min_replicas"),
        ([*ENCODER, "autoscaling_config", "target_ongoing_requests"], -1, "greater than 0"),
        ([*ENCODER, "num_replicas"], 2, "num_replicas"),
        ([*ENCODER, "max_queued_requests"], "many", "max_queued_requests"),
        (["applications"], [], "no applications"),
    ],
)
def test_refuses_what_serve_lets_through(path: list[Any], value: Any, says: str) -> None:
    config = FILES["serve.gpu.yaml"][0]
    serve_config.check(config, "before")
    with pytest.raises(InvalidSettings, match=says):
        serve_config.check(_set(config, path, value), "serve.gpu.yaml")


def test_the_app_refuses_unknown_args() -> None:
    with pytest.raises(ValueError, match="extra"):
        AppArgs(modles=["nano"])  # type: ignore[call-arg]


CLUSTER = ["spec", "rayClusterConfig"]
HEAD = [*CLUSTER, "headGroupSpec", "template", "spec"]
GROUP = [*CLUSTER, "workerGroupSpecs", 0]
NODES = ["available_node_types", "gpu"]
RULE = ["groups", 0, "rules", 1]


@pytest.mark.parametrize(
    ("name", "index", "path", "value"),
    [
        ("serve.gpu.yaml", 0, [*ENCODER, "name"], "sam_vit_b-encodr"),
        ("serve.local.yaml", 0, ["applications", 0, "args", "models"], ["nanno"]),
        ("serve.local.yaml", 0, ["applications", 0, "name"], "cellrey"),
        (deploy.SERVICE, 0, ["metadata", "name"], "cellray2"),  # the proxy and Prometheus ask cellray-serve-svc
        (deploy.SERVICE, 0, ["metadata", "annotations", "ray.io/ft-enabled"], "true"),
        (deploy.SERVICE, 0, [*CLUSTER, "rayVersion"], "2.59.0"),
        (deploy.SERVICE, 0, [*CLUSTER, "authOptions", "mode"], "disabled"),
        (deploy.SERVICE, 0, [*CLUSTER, "authOptions", "secretName"], "cellray-ray-tokn"),
        (deploy.SERVICE, 0, [*CLUSTER, "gcsFaultToleranceOptions", "redisAddress"], "redis:6379"),
        (deploy.SERVICE, 0, [*CLUSTER, "gcsFaultToleranceOptions", "backend"], "rocksdb"),
        (deploy.SERVICE, 0, [*CLUSTER, "networkPolicy"], {"mode": "DenyAll"}),
        (deploy.SERVICE, 0, [*CLUSTER, "autoscalerOptions", "version"], "v1"),  # priorities need v2
        (deploy.SERVICE, 0, [*CLUSTER, "headGroupSpec", "rayStartParams", "num-cpu"], "0"),
        (deploy.SERVICE, 0, [*HEAD, "securityContext", "runAsUser"], 0),
        (deploy.SERVICE, 0, [*HEAD, "containers", 0, "image"], "CHANGE-ME/cellray:latest"),
        (deploy.SERVICE, 0, [*HEAD, "containers", 0, "env", 0, "name"], "CELLRAY_CONFG"),
        (deploy.SERVICE, 0, [*HEAD, "containers", 0, "ports", 2, "name"], "http"),
        (deploy.SERVICE, 0, [*HEAD, "containers", 0, "volumeMounts", 1, "name"], "secret"),
        (deploy.SERVICE, 0, [*HEAD, "volumes", 1, "secret", "secretName"], "cellrey"),
        (deploy.SERVICE, 0, [*HEAD, "restartPolicy"], "Always"),
        (deploy.SERVICE, 0, [*GROUP, "minReplicas"], 99),
        (deploy.SERVICE, 0, [*GROUP, "maxReplicas"], 2),  # fewer GPUs than replicas
        (deploy.SERVICE, 0, [*GROUP, "groupName"], "gpu"),
        (deploy.SERVICE, 0, [*GROUP, "template", "metadata", "labels", "app"], "celray"),
        (deploy.SERVICE, 0, [*GROUP, "template", "spec", "terminationGracePeriodSeconds"], 30),
        (deploy.SERVICE, 0, ["spec", "serveConfigV2"], "applications: ["),
        ("kuberay/rayjob-embed.yaml", 0, ["spec", "backoffLimit"], 2),
        ("kuberay/rayjob-embed.yaml", 0, ["spec", "suspend"], True),
        ("kuberay/rayjob-embed.yaml", 0, ["spec", "submissionMode"], "SidecarMode"),
        ("kuberay/rayjob-embed.yaml", 0, ["spec", "entrypoint"], "python -m jobs.embed s3://a s3://b --modle nano"),
        ("kuberay/rayjob-embed.yaml", 0, ["metadata", "generateName"], "cellray-" * 6),
        (deploy.ALONE, 1, ["spec", "shutdownAfterJobFinishes"], False),
        (deploy.ALONE, 1, ["spec", "rayClusterSpec"], None),
        (deploy.ALONE, 1, ["spec", "entrypoint"], "bash -c 'python -m jobs.embd a b --model nano'"),
        (deploy.ALONE, 1, ["spec", "entrypoint"], "timeout 9 bash -c 'until serve state | grep x; do sleep 1; done'"),
        ("kuberay/policies.yaml", 0, ["spec", "podSelector", "matchLabels", "app"], "cellrey"),
        ("kuberay/policies.yaml", 1, ["spec", "minAvailable"], "50%"),
        ("kuberay/policies.yaml", 2, ["spec", "selector", "matchLabels", "part"], "workers"),
        ("kuberay/proxy.yaml", 0, ["spec", "ports", 0, "targetPort"], "http"),
        ("kuberay/proxy.yaml", 1, ["spec", "template", "spec", "containers", 0, "image"], "haproxy:2.8.1"),
        ("kuberay/redis.yaml", 0, ["spec", "serviceName"], "redis"),
        (deploy.SETTINGS, 0, ["data", "cellray.yaml"], "dataset: [s3://a/b]"),
        (deploy.SETTINGS, 0, ["data", "cellray.yaml"], "service: {keys: /run/secrets/keys}"),
        (deploy.AWS, 0, [*NODES, "min_workers"], 99),
        (deploy.AWS, 0, [*NODES, "priorty"], 1),
        (deploy.AWS, 0, [*NODES, "node_config", "InstanceTyp"], "g6e.2xlarge"),
        (deploy.AWS, 0, [*NODES, "node_config", "InstanceType"], "g6e.2xlrge"),
        (deploy.AWS, 0, ["head_node_type"], "haed"),
        (deploy.AWS, 0, ["head_start_ray_commands"], ["ray start --head --prot=6379"]),
        (deploy.AWS, 0, ["docker", "run_options"], []),
        (deploy.PROMETHEUS, 0, ["scrape_configs", 0, "job_name"], "cellrey"),
        (deploy.RULES, 0, [*RULE, "expr"], "sum(rate(ray_cellray_request_second_count[5m])) > 1"),
        (deploy.RULES, 0, [*RULE, "expr"], 'sum(rate(ray_cellray_request_seconds_count{code="500"}[5m])) > 1'),
        (deploy.RULES, 0, [*RULE, "expr"], "sum(rate(ray_cellray_request_seconds_total[5m])) > 1"),
        (deploy.RULES, 0, [*RULE, "expr"], 'sum(rate(ray_cellray_rejected_total{reason="bussy"}[5m])) > 1'),
    ],
)
def test_a_wrong_value_is_found(name: str, index: int, path: list[Any], value: Any) -> None:
    docs = copy.deepcopy(FILES[name])
    docs[index] = _set(docs[index], path, value)
    assert [*checks.problems({**FILES, name: docs}, name)]


def keys(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key in a document, and in the YAML that some of its strings are."""
    if isinstance(node, dict):
        for key, value in node.items():
            if not (path and path[-1] in FREE):
                yield (*path, key)
            inner = deploy.parsed(value) if key in NESTED else value
            yield from keys(inner, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from keys(value, (*path, index))


def misspell(node: Any, path: tuple[Any, ...]) -> None:
    key, *rest = path
    if rest and key in NESTED:
        inner = deploy.parsed(node[key])
        misspell(inner, tuple(rest))
        node[key] = yaml.safe_dump(inner)
    elif rest:
        misspell(node[key], tuple(rest))
    else:
        node[f"{key}x"] = node.pop(key)


@pytest.mark.skipif(bool(kuberay.absent()), reason=kuberay.absent() or "-")
@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
@settings(max_examples=8)
def test_a_misspelt_key_is_found(name: str, data: st.DataObject) -> None:
    docs = copy.deepcopy(FILES[name])
    misspell(docs, data.draw(st.sampled_from([*keys(docs)])))
    assert [*checks.problems({**FILES, name: docs}, name)]


def test_a_key_that_is_there_twice_is_no_yaml() -> None:
    with pytest.raises(yaml.YAMLError, match="twice"):
        deploy.parsed("a: 1\nb: 2\na: 3\n")


def test_the_image_is_of_pinned_parts_and_files_that_there_are() -> None:
    stages = [line.split() for line in IMAGE.splitlines() if line.startswith("FROM ")]
    names = [words[3] for words in stages if len(words) == 4]
    assert all(re.fullmatch(r"[a-z]+:\d+\.\d+\.\d+-[a-z-]+", words[1]) for words in stages)
    assert len(stages) == 2, "one to build, one to run"
    project = tomllib.loads((deploy.ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", IMAGE, re.M)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    ignored = [line for line in (deploy.ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignored[0] == "*"
    for words in re.findall(r"^COPY (.+)$", IMAGE, re.M):
        *sources, _ = words.split()
        if sources[0].startswith("--from="):
            assert sources[0].removeprefix("--from=") in names
            continue
        for source in sources:
            assert (deploy.ROOT / source).exists(), source
            assert f"!{source}" in ignored, source
    packages = tomllib.loads((deploy.ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {f"COPY {name.split('.')[0]} {name.split('.')[0]}" for name in packages} <= set(IMAGE.splitlines())
    assert "--constraint constraints.txt" in IMAGE
    assert deploy.constraint("boto3")
    users = re.findall(r"useradd --uid (\d+)", IMAGE)
    assert users == [deploy.user()] != ["0"]
    assert not any(fnmatch(name, line) for name in (".git", ".venv", "deploy", "keys") for line in ignored[1:])


@pytest.mark.parametrize("name", READMES)
def test_commands_of_the_readmes(name: str) -> None:
    found = [*commands.lines(READMES[name])]
    assert len(found) > 20
    assert [one for line in found for one in commands.wrong(line)] == []
    for file in re.findall(r"`((?:deploy|tests|serve_app|cluster|jobs)/[\w/.-]+\.\w+)`", READMES[name]):
        assert (deploy.ROOT / file).exists(), file


def test_the_deploy_readme_has_no_line_that_is_no_command() -> None:
    for line in commands.blocks(READMES["deploy/README.md"]):
        assert commands.wrong(line, None, OTHERS) == [], line
    for file in re.findall(r"`((?:kuberay|proxy|prometheus|grafana)/[\w/.-]*)`", READMES["deploy/README.md"]):
        assert (deploy.DEPLOY / file).exists(), file


@pytest.mark.parametrize(
    "line",
    [
        "cellray clinet models",
        "cellray key",
        "python -m jobs.embed a b --modle nano",
        "python -m jobs.embd a b --model nano",
        "python -m jobs.finetune a b c --model nano --minute x",
        "serve deploy",
        "serve deploy deploy/serve.gpus.yaml",
        "ray up deploy/ray-cluster.gcp.yaml",
        "ray job submit -- python -m jobs.embed ~/plates ~/out",
        "ray jobs submit -- python -m jobs.embed a b --model nano",
        "ray drain-node --reason BECAUSE --reason-message x",
        "kubectl aply -f deploy/kuberay/redis.yaml",
        "kubectl apply -f deploy/kuberay/readis.yaml",
        "kubectl get rayservices.x cellray",
        "kubectl create secret generic x --from-fil=a",
        "make demos",
        "true && cellray weights fetsh nano && true",
        "docker bild .",
        "cellray 'unclosed",
    ],
)
def test_a_typo_in_a_command_is_found(line: str) -> None:
    assert commands.wrong(line)
