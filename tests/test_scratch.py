"""Temporary folders of processes that live, ended, and were killed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster.scratch import Scratch
from tests.s3 import ROOT

HELD = """
import time
from cluster.scratch import Scratch
one = Scratch()
print(one.path, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def test_a_killed_process_leaves_nothing_for_long(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HELD], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        (theirs / "rows").write_bytes(b"many")
        Scratch().close()
        assert (theirs / "rows").exists(), "a folder in use was taken away"
        other.kill()
    ours = Scratch()
    assert list(tmp_path.iterdir()) == [ours.path]
    ours.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_being_made_stays(tmp_path: Path) -> None:
    (tmp_path / "cellray-scratch-new").mkdir()
    (tmp_path / "cellray-scratch-new" / ".lock").touch()
    Scratch().close()
    assert (tmp_path / "cellray-scratch-new").exists()
