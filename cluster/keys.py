"""The keys file: who may use the service. It holds hashes of keys, never a key."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InvalidInput, InvalidSettings
from cluster.settings import MIB

log = logging.getLogger("ray.serve")

CHECK_S = 2.0  # how often the file is looked at
MAX_KEYS_BYTES = MIB
KEY_BYTES = 32  # as many as its hash has
PREFIX = "cellray_"  # so that scanners for secrets find it
NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
LINE = re.compile(rf"({NAME.pattern}):\s+([0-9a-fA-F]{{64}})(?:\s+([1-9]\d{{0,6}}))?(?:\s+#.*)?")


@dataclass(frozen=True)
class Key:
    """One line of the file; `per_minute` is None where it has no number."""

    name: str
    sha256: str
    per_minute: int | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.sha256}" + (f" {self.per_minute}" if self.per_minute else "")


def make(name: str) -> tuple[str, Key]:
    """A new random key, and its line.

    Raises:
        InvalidInput: the name is no name.
    """
    if not NAME.fullmatch(name):
        raise InvalidInput(f"{name!r} is no name for a key: expected up to 64 letters, digits, _ . @ -")
    secret = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    return secret, Key(name, hashlib.sha256(secret.encode()).hexdigest())


def parse(text: str) -> tuple[Key, ...]:
    """Raises InvalidSettings: a line does not fit, a name is there twice, or there is no key. Says which line, and
    never what is in it: a key may have been put in the place of its hash."""
    found: dict[str, Key] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        fits = LINE.fullmatch(line.rstrip())
        if not fits:
            raise InvalidSettings(f"line {number} is not `name: sha256 in hex [requests a minute]`")
        name, digest, rate = fits.groups()
        if name in found:
            raise InvalidSettings(f"line {number} names a key a second time")
        found[name] = Key(name, digest.lower(), int(rate) if rate else None)
    if not found:
        raise InvalidSettings("it has no key")
    return tuple(found.values())


class KeysFile:
    """The keys as the file has them, looked at again every CHECK_S at most; one that is broken or gone leaves the last
    good ones, and a line in the log."""

    def __init__(self, path: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.clock = Path(path), clock
        self.looked, self.stamp = clock(), self._stamp()
        self.keys = self._read()

    def find(self, secret: bytes) -> Key | None:
        """The key that this is. Takes as long for every wrong one."""
        self._look()
        digest, found = hashlib.sha256(secret).hexdigest(), None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _look(self) -> None:
        now = self.clock()
        if now - self.looked < CHECK_S:
            return
        self.looked, before = now, self.stamp
        self.stamp = self._stamp()
        if self.stamp == before:
            return
        try:
            self.keys = self._read()
            log.info(f"keys file {self.path} was read again: {len(self.keys)} keys")
        except InvalidSettings as error:
            log.error(f"the former {len(self.keys)} keys stay: {error}")

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size, found.st_ino)

    def _read(self) -> tuple[Key, ...]:
        try:
            with self.path.open("rb") as file:
                text = file.read(MAX_KEYS_BYTES + 1)
            if len(text) > MAX_KEYS_BYTES:
                raise InvalidSettings(f"it is over {MAX_KEYS_BYTES} bytes")
            return parse(text.decode())
        except OSError as error:
            raise InvalidSettings(f"keys file {self.path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InvalidSettings(f"keys file {self.path} is no text") from None
        except InvalidSettings as error:
            raise InvalidSettings(f"keys file {self.path}: {error}") from None
