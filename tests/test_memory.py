"""What a process does with memory that was freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.s3 import ROOT

CODE = """
import numpy as np
from cluster import memory
memory.keep()
small = []
for _ in range(4):
    large = np.ones({mb} << 20, np.uint8)
    small.append(np.ones(1 << 16, np.uint8))  # lands in the hole that the last one left
    del large
print(memory.private_mb())
"""


@pytest.mark.parametrize(("mb", "least", "most"), [(200, 200, 320), (700, 0, 120)])
def test_what_is_kept(mb: int, least: int, most: int) -> None:
    """Tensors as large as a decoder's are; larger ones would leave holes that nothing of their size fits into again."""
    made = subprocess.run(
        [sys.executable, "-c", CODE.format(mb=mb)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert least < float(made.stdout) < most
