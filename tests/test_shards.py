"""Shards whose workers die."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.poison import DEADLY, ENDLESS, ROOT


@pytest.mark.parametrize("content", [DEADLY, ENDLESS])
def test_an_image_that_ends_its_workers_is_left_out_and_the_job_goes_on(tmp_path: Path, content: bytes) -> None:
    for number in range(6):
        Image.fromarray(np.full((8, 9), number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "2b.png").write_bytes(b"no image, which is an error like others")
    (tmp_path / "3b.png").write_bytes(content)  # as the one above in the second shard
    command = [sys.executable, "-m", "tests.poison", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert lines == [[4, 0, 1], [4, 2, 3]]
    assert "3b.png ends its worker" in done.stderr
