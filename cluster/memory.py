"""What a process does with freed memory (glibc's malloc), and how much it holds."""

from __future__ import annotations

import ctypes
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
LARGE = (1 << 31) - 1  # bytes: the largest int
KEPT = 1 << 29  # bytes, at most, of a tensor that is kept: a ViT's attention leaves holes of 0.8 GB that nothing fits


def share() -> None:
    """Threads take image buffers that others freed. Left alone, malloc keeps an arena a thread, and the memory of a
    process that reads in threads creeps up for hundreds of images before it levels off."""
    _mallopt(M_ARENA_MAX, 1)


def keep() -> None:
    """Freed tensors of up to KEPT bytes stay with the process. Left alone, malloc maps and unmaps every large one, and
    filling fresh pages takes a decoder longer than its arithmetic. The process then holds the most it ever needed."""
    _mallopt(M_MMAP_THRESHOLD, KEPT)
    _mallopt(M_TRIM_THRESHOLD, LARGE)
    _mallopt(M_ARENA_MAX, 1)


def _mallopt(option: int, value: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc only
        libc.mallopt(option, value)


def private_mb() -> float:
    """Memory that this process alone holds now, in MB: without Ray's shared object store, which has its own bound."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024  # KiB
    return 0.0
