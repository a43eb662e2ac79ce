"""The files of deploy/, parsed, and what others of the repository say of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
AWS, PROMETHEUS, RULES = "ray-cluster.aws.yaml", "prometheus/prometheus.yml", "prometheus/rules.yml"
SERVICE, SETTINGS, ALONE = "kuberay/rayservice.yaml", "kuberay/settings.yaml", "kuberay/rayjob-embed-alone.yaml"
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


def user() -> str:
    """Whom the image runs as."""
    return re.findall(r"^USER (\S+)$", (DEPLOY / "Dockerfile").read_text(), re.M)[-1]
