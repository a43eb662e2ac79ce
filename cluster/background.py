"""The Ray that `cellray up` leaves running: a process of its own keeps it, and a record says which. One a user and
folder for temporary files, whether in the background (`up`) or the foreground (`serve`).

The keeper holds a lock on the record for as long as it lives. Nothing else is ever stopped: no other Ray, and no other
process that got the same number since.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster import session
from cluster.errors import InvalidInput, InvalidSettings, Unavailable
from cluster.session import DRAIN_S, Session

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0  # Serve's and Ray's own end, after the requests'
LOCK_TIMEOUT_S = 2.0  # others look whether it is held, for a moment
POLL_S = 0.2
MAX_RECORD_BYTES = 65536


@dataclass(frozen=True)
class Record:
    """Who keeps a Ray, and where that is; `dashboard` and `folder` are "" while it starts."""

    pid: int
    dashboard: str = ""
    folder: str = ""


def path(suffix: str = ".json") -> Path:
    return Path(tempfile.gettempdir()) / f"cellray-up-{os.getuid()}{suffix}"


def running() -> Record | None:
    """The Ray that `up` or `serve` keeps here, if one does."""
    try:
        handle = _opened(os.O_RDONLY)
    except FileNotFoundError:
        return None
    with os.fdopen(handle) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            pass
        try:
            return Record(**json.loads(file.read(MAX_RECORD_BYTES)))
        except (ValueError, TypeError):  # between lock and line
            return Record(0)


@contextmanager
def kept(say: Callable[[str], None], dashboard_port: int = session.DASHBOARD_PORT) -> Iterator[Session]:
    """A Ray here with its record, for the length of the `with`.

    Raises:
        InvalidInput: one is kept already.
    """
    with os.fdopen(_opened(os.O_RDWR | os.O_CREAT), "r+") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InvalidInput(
                        "it is up already: `cellray status` shows what runs, `cellray up` changes it, and "
                        "`cellray down` ends it"
                    ) from None
                time.sleep(POLL_S)
        _write(file.fileno(), Record(os.getpid()))
        try:
            with session.start(say, dashboard_port) as started:
                _write(file.fileno(), Record(os.getpid(), started.dashboard, str(started.folder)))
                yield started
        finally:
            os.ftruncate(file.fileno(), 0)


def start(say: Callable[[str], None], dashboard_port: int = session.DASHBOARD_PORT) -> Record:
    """Ray here, in a process that outlives this one.

    Raises:
        Unavailable: it did not start; its log says why.
    """
    log = path(".log")
    with os.fdopen(_opened(os.O_WRONLY | os.O_CREAT | os.O_TRUNC, log), "wb") as output:
        keeper = subprocess.Popen(  # -P: not what lies in this folder under the same name
            [sys.executable, "-P", "-m", "cluster.background", str(dashboard_port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    say("starting Ray")
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while time.monotonic() < deadline and keeper.poll() is None:
            found = running()
            if found and found.pid == keeper.pid and found.dashboard:
                return found
            time.sleep(POLL_S)
    except BaseException:
        keeper.terminate()
        raise
    if keeper.poll() is None:
        keeper.terminate()
        raise Unavailable(f"Ray did not start within {START_TIMEOUT_S:.0f} s; {log} has its output")
    lines = log.read_text(errors="replace").strip().splitlines()
    raise Unavailable(f"Ray did not start: {lines[-1] if lines else 'it said nothing'}; {log} has all of its output")


def stop(found: Record, say: Callable[[str], None]) -> None:
    """End the kept Ray: requests under way end first, within DRAIN_S; what does not end in time is killed."""
    say(f"stopping what runs on {found.dashboard or 'this machine'}")
    with suppress(ProcessLookupError):
        os.kill(found.pid, signal.SIGTERM)
    if _gone(found, DRAIN_S + STOP_TIMEOUT_S):
        return
    say(f"process {found.pid} did not end in time and is killed")
    with suppress(ProcessLookupError):
        os.kill(found.pid, signal.SIGKILL)  # the kernel ends its Ray with it
    if not _gone(found, STOP_TIMEOUT_S):
        raise Unavailable(f"process {found.pid}, which keeps Ray, cannot be ended")
    shutil.rmtree(found.folder, ignore_errors=True)


def _gone(found: Record, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        now = running()
        if now is None or now.pid != found.pid:
            return True
        time.sleep(POLL_S)
    return False


def _write(handle: int, record: Record) -> None:
    """At once, for those who read meanwhile."""
    text = json.dumps(asdict(record)).encode()
    os.pwrite(handle, text, 0)
    os.ftruncate(handle, len(text))


def _opened(flags: int, file: Path | None = None) -> int:
    """Raises InvalidSettings: another user's file, or a link, is in its place."""
    file = file or path()
    try:
        handle = os.open(file, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InvalidSettings(f"{file} cannot be used: {error.strerror}; set TMPDIR to a folder of yours") from None
    if os.fstat(handle).st_uid != os.getuid():
        os.close(handle)
        raise InvalidSettings(f"{file} is another user's: set TMPDIR to a folder of yours")
    return handle


def main(dashboard_port: int) -> None:
    """The keeper."""

    def say(text: str) -> None:
        print(text, flush=True)

    with kept(say, dashboard_port) as started:
        session.until_told()
        session.drain(started, say)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main(int(sys.argv[1]))
