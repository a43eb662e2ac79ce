"""Where checkpoints come from: a path, `https://…` or `s3://…`; checked by sha256 before anything reads them."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from cluster.errors import Forbidden, InvalidCheckpoint, InvalidSettings, NotFound, Unavailable
from cluster.settings import MIB, ModelSettings
from cluster.storage import Storage, absolute, is_s3, mapped

SEEDED = "seeded:"
MAX_CHECKPOINT_BYTES = 16 << 30
DOWNLOAD_TIMEOUT_S = 60  # without a byte
CHUNK = 4 * MIB
LOCK_TIMEOUT_S = 3600.0  # a download of gigabytes over a slow line
LOCK_POLL_S = 0.2
FOLDER_SUFFIXES = (".safetensors", ".bin", ".json")  # of a checkpoint's files, in a folder that may hold more


def is_seeded(source: str) -> bool:
    """Whether a source is `seeded:ARCHITECTURE:SEED`, random weights made on the spot."""
    return source.startswith(SEEDED)


def public_source(source: str) -> str:
    """The source without its query, which may be a presigned secret: for messages and `model.json`."""
    return source.split("?")[0] if "://" in source else source


def seed_of(source: str) -> tuple[str, int]:
    """`seeded:nano:0` → ("nano", 0)."""
    try:
        _, architecture, seed = source.split(":")
        return architecture, int(seed)
    except ValueError:
        raise InvalidSettings(f"{source!r} is no source of weights; expected seeded:ARCHITECTURE:SEED") from None


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """One process a node at a time; the others wait. Released by the system if the holder dies.

    Raises:
        Unavailable: the holder did not end within LOCK_TIMEOUT_S.
    """
    with mapped(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Unavailable(f"another process has held {path} for {LOCK_TIMEOUT_S:.0f} s") from None
                time.sleep(LOCK_POLL_S)
        yield


@contextmanager
def fetched(model: ModelSettings, storage: Storage) -> Iterator[tuple[Path, str]]:
    """(path, sha256) of the checkpoint, for the length of the `with`; a download is removed after it.

    The sha256 of a folder is that of the lines `sha256sum` prints for its `files`, in order.

    Raises:
        NotFound, Forbidden, Unavailable: the source cannot be read.
        InvalidCheckpoint: its sha256 is not the one in the settings; the file was not opened.
        InvalidSettings: plain http without a sha256.
    """
    source = model.source
    if "://" not in source:
        path = Path(absolute(source))
        if not path.exists():
            raise NotFound(f"there is no checkpoint at {path}")
        yield path, _checked(path, model)
        return
    folder = Path(tempfile.mkdtemp(prefix="cellray-weights-"))
    try:
        path = folder / ("checkpoint" + Path(urlsplit(source).path).suffix[:20])  # the rest may be long, or a secret
        with path.open("wb") as target:
            if is_s3(source):
                with storage.open(source) as remote:
                    _copy(remote, target, source)
            else:
                _download(source, target, model)
        yield path, _checked(path, model)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _download(source: str, target: IO[bytes], model: ModelSettings) -> None:
    shown = public_source(source)
    if not source.startswith("https://") and not (source.startswith("http://") and model.sha256):
        raise InvalidSettings(f"{shown}: expected https://, s3://, a path, or http:// with a sha256 in the settings")
    try:
        with urllib.request.urlopen(source, timeout=DOWNLOAD_TIMEOUT_S) as remote:
            if not remote.geturl().startswith("https://") and not model.sha256:
                raise InvalidSettings(f"{shown} was redirected away from https; give its sha256 to allow that")
            expected = int(remote.headers.get("Content-Length") or 0)
            _copy(remote, target, shown)
            if expected and target.tell() != expected:
                raise Unavailable(f"{shown} was cut short: {target.tell()} of {expected} bytes; try again")
    except urllib.error.HTTPError as error:
        busy = error.code >= 500 or error.code in (408, 429)
        kind = Unavailable if busy else Forbidden if error.code in (401, 403) else NotFound
        raise kind(f"{shown} answered {error.code} {error.reason}") from error
    except http.client.InvalidURL as error:
        raise InvalidSettings(f"{shown} is no URL") from error
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"{shown} could not be downloaded: {getattr(error, 'reason', None) or error}") from error


def _copy(remote: IO[bytes], target: IO[bytes], shown: str) -> None:
    while chunk := remote.read(CHUNK):
        target.write(chunk)
        if target.tell() > MAX_CHECKPOINT_BYTES:
            raise InvalidCheckpoint(f"{shown} is over {MAX_CHECKPOINT_BYTES >> 30} GiB: no known checkpoint is")


def files(path: Path) -> list[Path]:
    """A local checkpoint's files, in order: itself, or those in the folder; [] if it is not there."""
    with mapped(str(path)):
        inside = path.iterdir() if path.is_dir() else [path]
        return sorted(one for one in inside if one.is_file() and (one == path or one.suffix in FOLDER_SUFFIXES))


def _checked(path: Path, model: ModelSettings) -> str:
    digests = {}
    with mapped(str(path)):
        for one in files(path):
            with one.open("rb") as file:
                digests[one.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if path.is_dir():
        digest = hashlib.sha256("".join(f"{own}  {name}\n" for name, own in digests.items()).encode()).hexdigest()
    else:
        digest = digests[path.name]
    if model.sha256 and not digest.startswith(model.sha256.lower()):
        raise InvalidCheckpoint(
            f"{public_source(model.source)} has sha256 {digest[:12]}…, the settings expect {model.sha256[:12]}…: "
            "the file is damaged or another one"
        )
    return digest


def cache_folder(weights_dir: str, name: str, identity: str) -> Path:
    """The folder on this node that keeps a split model; another source of the same name gets another folder."""
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return Path(os.path.expanduser(weights_dir)) / f"{name}-{key}"
