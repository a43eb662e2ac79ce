"""Folders for large temporary files, which do not stay on the disk of a process that was killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX, LOCK = "cellray-scratch-", "lock"


class Scratch:
    """A new folder `path` below the system's for temporary files, until `close`, or until the next one is made after
    its process has ended: the kernel holds a lock in it for as long as that runs, in whatever container."""

    def __init__(self) -> None:
        _sweep(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self.lock = (self.path / f".{LOCK}").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        os.rename(self.lock.name, self.path / LOCK)  # from here on others look whether it is held

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.lock.close()


def _sweep(base: Path) -> None:
    for folder in base.glob(f"{PREFIX}*"):
        with suppress(OSError), (folder / LOCK).open() as lock:  # OSError: it is held, another's, or gone
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
