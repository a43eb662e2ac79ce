"""An end for what may have none: a decoder's C code in an endless loop, which holds the GIL perhaps."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

DECODE_S = 300.0  # in which a decoder of any image within the limits is done, also on a busy machine
STDERR = 2

_begun: list[float] = []  # when each `ending` that is open began, the first first
_changing = threading.Lock()


@contextmanager
def ending() -> Iterator[None]:
    """Ends this process, with its threads' tracebacks on stderr, where what is inside takes longer than DECODE_S:
    nothing else stops it. To a job, and to Serve, that is a crash like others."""
    begun = time.monotonic()
    with _changing:
        _begun.append(begun)
        _set()
    try:
        yield
    finally:
        with _changing:
            _begun.remove(begun)
            _set()


def _set() -> None:
    faulthandler.cancel_dump_traceback_later()
    if _begun:
        left = DECODE_S - (time.monotonic() - _begun[0])
        faulthandler.dump_traceback_later(max(left, 0.001), exit=True, file=STDERR)
