"""What never ends is ended, also where other work goes on beside it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.errors import DeadlineExceeded
from cluster.settings import Limits, Settings
from serve_app.service import Service

PROGRAM = """
import itertools, sys, threading, time
from cluster import watch
watch.DECODE_S = 1.0

def endless():
    with watch.ending():
        sum(itertools.repeat(0)) if sys.argv[1] == "holding the GIL" else threading.Event().wait()

def short(seconds):
    with watch.ending():
        time.sleep(0.1)

for _ in range(20):
    short(0.1)
print("well so far", flush=True)
if sys.argv[1] != "none":
    threading.Thread(target=endless, daemon=True).start()
for _ in range(20):
    short(0.1)
print("survived")
"""


@pytest.mark.parametrize("endless", ["holding the GIL", "waiting", "none"])
def test_only_what_never_ends_ends_the_process(endless: str) -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", PROGRAM, endless]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=root)
    if endless == "none":
        assert (done.returncode, done.stdout) == (0, "well so far\nsurvived\n")
    else:
        assert (done.returncode, done.stdout) == (1, "well so far\n")
        assert "endless" in done.stderr


def test_a_request_does_not_wait_for_a_decoder_longer_than_its_deadline() -> None:
    service = Service(Settings(limits=Limits(request_timeout_s=0.2)), [], [])
    start = time.monotonic()

    async def ask() -> None:
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.2 s"):
            async with service.deadline():
                await service._decode(lambda: time.sleep(2))
        assert time.monotonic() - start < 1.5

    asyncio.run(ask())
