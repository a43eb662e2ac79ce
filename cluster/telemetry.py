"""Logging set up once a process, and what a process says of its memory."""

from __future__ import annotations

import ctypes
import logging
import sys
from pathlib import Path

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # malloc.h
MMAP_BYTES = 256 << 10


def configure_logging(level: int = logging.INFO) -> None:
    """Times, level and name on stderr. For commands; replicas log through Serve."""
    logging.getLogger("ray.serve").setLevel(level)  # it has a handler of its own
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def private_mb() -> float:
    """Memory that this process alone holds now, in MB: without Ray's shared object store, which has its own bound."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024  # KiB
    return 0.0


def steady_memory() -> None:
    """Make glibc give freed image buffers back at once. Left alone, it keeps them in an arena a thread, and the memory
    of a process that reads in threads creeps up for hundreds of images before it levels off."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc only
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        libc.mallopt(M_ARENA_MAX, 2)
