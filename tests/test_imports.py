"""Imports run jobs → serve_app → cluster; the model runs without Ray, HTTP or S3; importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = {"cluster": 0, "serve_app": 1, "jobs": 2}
FILES = sorted(path for top in ORDER for path in (ROOT / top).rglob("*.py"))
NOT_IN_MODEL = {"ray", "fastapi", "starlette", "s3fs", "fsspec", "boto3", "botocore", "pydantic", "yaml", "pyarrow"}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    here = ORDER[path.relative_to(ROOT).parts[0]]
    for name in imported(path):
        assert ORDER.get(name.split(".")[0], here) <= here, f"imports {name}"
        if (ROOT / "serve_app/model") in path.parents:
            assert name.split(".")[0] not in NOT_IN_MODEL, f"imports {name}"


def test_the_model_imports_where_ray_is_not_installed() -> None:
    """In a fresh process in which none of them can be imported."""
    blocked = "\n".join(
        f"sys.modules[{name!r}] = None" for name in NOT_IN_MODEL | {"openvino", "tifffile", "torchvision"}
    )
    modules = ", ".join(path.stem for path in (ROOT / "serve_app/model").glob("[!_]*.py"))
    code = f"import sys\n{blocked}\nfrom serve_app.model import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_jobs_and_their_tasks_do_not_load_torch() -> None:
    code = "import sys, jobs.embed, jobs.segment, jobs.show; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_the_ingress_does_not_load_torch() -> None:
    code = "import sys, serve_app.deployments; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_the_client_loads_neither_torch_nor_ray() -> None:
    code = "import sys, serve_app.client; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_models_load_without_torchvision_and_torchs_compiler(tmp_path: Path) -> None:
    """Each of them would be seconds of a replica's start."""
    code = """
import sys
from pathlib import Path
from serve_app.model import cellfinder, checkpoint, decoder, encoder
from tests import cellsam_oracle
folder = Path(sys.argv[1], "split")
checkpoint.extract(cellsam_oracle.weights(cellsam_oracle.NANO), folder, source="drawn", source_sha256="")
for part in encoder, decoder, cellfinder:
    part.load(folder)
sys.exit(bool({"torchvision", "torch._dynamo"} & set(sys.modules)))
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT, timeout=120)
