"""Where checkpoints come from: a path, `https://…`, `s3://…`, DeepCell's store; checked before anything reads them."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import logging
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from tqdm import tqdm

from cluster import deepcell
from cluster.errors import Forbidden, InvalidCheckpoint, InvalidSettings, NotFound, Unavailable
from cluster.settings import MIB, ModelSettings
from cluster.storage import Storage, absolute, is_s3, mapped

log = logging.getLogger("ray.serve")  # a replica's, which `cellray up` and `cellray status` show while it starts

SEEDED = "seeded:"
MAX_CHECKPOINT_BYTES = 16 << 30
DOWNLOAD_TIMEOUT_S = 60  # without a byte
CHUNK = 4 * MIB
LOCK_TIMEOUT_S = 3600.0  # a download of gigabytes over a slow line
LOCK_POLL_S = 0.2
LOG_EVERY_S = 5.0
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
        deadline, said = time.monotonic() + LOCK_TIMEOUT_S, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said and time.monotonic() > deadline - LOCK_TIMEOUT_S + LOG_EVERY_S:
                    said = True
                    log.info("waiting for another process of this node, which fetches or splits the same weights")
                if time.monotonic() > deadline:
                    raise Unavailable(f"another process has held {path} for {LOCK_TIMEOUT_S:.0f} s") from None
                time.sleep(LOCK_POLL_S)
        yield


@contextmanager
def fetched(model: ModelSettings, storage: Storage, kept: Path) -> Iterator[tuple[Path, str]]:
    """(path, sha256) of the checkpoint, for the length of the `with`. A download is in the folder `kept`, and removed
    after it; one that was cut short stays there, and the next call goes on with it.

    The sha256 of a folder is that of the lines `sha256sum` prints for its `files`, in order.

    Raises:
        NotFound, Forbidden, Unavailable: the source cannot be read.
        InvalidCheckpoint: its sha256 is not the one in the settings; the file was not opened.
        InvalidSettings: plain http without a sha256.
    """
    source = model.source
    if "://" not in source and not deepcell.is_deepcell(source):
        path = Path(absolute(source))
        if not path.exists():
            raise NotFound(f"there is no checkpoint at {path}")
        yield path, _checked(path, model)
        return
    key = hashlib.sha256(source.encode()).hexdigest()[:12]
    suffix = Path(urlsplit(source).path).suffix[:20]  # the rest may be long, or a secret
    path = kept / f"download-{key}{suffix}"
    with lock(path.with_name(f"download-{key}.lock")):
        if is_s3(source):
            _from_s3(source, path, storage)
        elif deepcell.is_deepcell(source):
            _from_archive(source, path, model)
        else:
            _download(source, path, model)
        try:
            yield path, _checked(path, model)
        finally:
            path.unlink(missing_ok=True)


def _from_s3(source: str, path: Path, storage: Storage) -> None:
    try:
        with storage.open(source) as remote, path.open("wb") as target:
            _copy(remote, target, source)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _from_archive(source: str, path: Path, model: ModelSettings) -> None:
    key, member = deepcell.parsed(source)
    archive = path.with_name(f"{path.name}.archive")
    for again in (True, False):
        address = deepcell.address(key)
        try:
            _download(address, archive, model, key)
            break
        except Forbidden:  # the address expires
            if not again:
                raise
    try:
        deepcell.check(archive, key, model.sha256 is not None)
        with path.open("wb") as target:
            deepcell.extract(archive, member, target, MAX_CHECKPOINT_BYTES)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        archive.unlink(missing_ok=True)


def _download(source: str, path: Path, model: ModelSettings, name: str = "") -> None:
    """To `path`, whole. Where the server names the version (ETag), what is there already is not fetched again."""
    shown, known = name or public_source(source), path.with_name(f"{path.name}.etag")
    checked = bool(model.sha256 or name)
    if not source.startswith("https://") and not (source.startswith("http://") and checked):
        raise InvalidSettings(f"{shown}: expected https://, s3://, a path, or http:// with a sha256 in the settings")
    try:
        while True:
            before = _size(path) if known.exists() else 0
            if _part(source, path, known, before, shown, checked):
                known.unlink(missing_ok=True)
                return
            if not known.exists() or _size(path) <= before:
                raise Unavailable(f"{shown} was cut short: {_size(path)} bytes came; try again")
    except urllib.error.HTTPError as error:
        busy = error.code >= 500 or error.code in (408, 429)
        kind = Unavailable if busy else Forbidden if error.code in (401, 403) else NotFound
        raise kind(f"{shown} answered {error.code} {error.reason}") from None
    except InvalidCheckpoint:  # too large
        known.unlink(missing_ok=True)
        raise
    except http.client.InvalidURL:
        raise InvalidSettings(f"{shown} is no URL") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise Unavailable(f"{shown} could not be downloaded: {reason or type(error).__name__}") from None
    finally:
        if not known.exists() and sys.exc_info()[0] is not None:
            path.unlink(missing_ok=True)


def _part(source: str, path: Path, known: Path, before: int, shown: str, checked: bool) -> bool:
    """Fetch what lies behind the first `before` bytes; → whether the file is whole now."""
    headers = {"Range": f"bytes={before}-", "If-Range": known.read_text()} if before else {}
    try:
        remote = urllib.request.urlopen(urllib.request.Request(source, headers=headers), timeout=DOWNLOAD_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not before:
            raise
        path.unlink()  # it is longer than the source, and so another one
        return _part(source, path, known, 0, shown, checked)
    with remote:
        if not remote.geturl().startswith("https://") and not checked:
            raise InvalidSettings(f"{shown} was redirected away from https; give its sha256 to allow that")
        before = before if remote.status == 206 else 0
        tag = remote.headers.get("ETag", "")
        known.unlink(missing_ok=True)
        if tag.startswith('"'):  # a weak one does not tell versions apart
            known.write_text(tag)
        expected = before + int(remote.headers.get("Content-Length") or 0)
        with path.open("r+b" if before else "wb") as target:
            target.seek(before)
            target.truncate()
            try:
                _copy(remote, target, shown, expected)
            except (OSError, http.client.HTTPException):
                if not known.exists() or target.tell() <= before:
                    raise
                return False
            return expected in (before, target.tell())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _copy(remote: IO[bytes], target: IO[bytes], shown: str, expected: int = 0) -> None:
    first, logged = target.tell(), 0.0
    whole = f" of {expected / MIB:,.0f}" if expected else ""
    with tqdm(total=expected or None, initial=first, desc=shown[-40:], unit="B", unit_scale=True, disable=None) as bar:
        while chunk := remote.read(CHUNK):
            target.write(chunk)
            bar.update(len(chunk))
            if time.monotonic() - logged > LOG_EVERY_S:
                logged = time.monotonic()
                log.info(f"downloading {shown}: {target.tell() / MIB:,.0f}{whole} MiB")
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
