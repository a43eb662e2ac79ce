"""DeepCell's token-gated store of weights, as CellSAM's: `deepcell:KEY#MEMBER`, a file in an archive.

A POST with the token in a header answers with a presigned address; the archive is fetched from there, without the
token. That is read where it is needed, on the node that fetches, and is kept in no setting, message, log or file.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import httpx

from cluster.errors import Forbidden, InvalidCheckpoint, InvalidSettings, NotFound, Unavailable

SCHEME = "deepcell:"
ENDPOINT = "https://users.deepcell.org/api/getData/"
ADVICE = "create one at https://users.deepcell.org"
TOKEN_FILE, TOKEN = "DEEPCELL_ACCESS_TOKEN_FILE", "DEEPCELL_ACCESS_TOKEN"
MOUNTED = Path("/run/secrets/deepcell_access_token")
MAX_TOKEN_BYTES, MAX_ANSWER_BYTES, TIMEOUT_S = 4096, 65536, 60.0
MD5 = {"models/cellsam-models_v1.2.tar.gz": "f41e6899c49fc8ce12f77a8d25594604"}  # as CellSAM's own downloader checks
CHUNK = 4 << 20


def is_deepcell(source: str) -> bool:
    return source.startswith(SCHEME)


def parsed(source: str) -> tuple[str, str]:
    """`deepcell:models/A.tar.gz#folder/B.pt` → (the archive's key, the member's name)."""
    key, _, member = source.removeprefix(SCHEME).partition("#")
    if not key or not member:
        raise InvalidSettings(f"{source} is no source of weights; expected deepcell:ARCHIVE#FILE")
    return key, member


def token() -> str:
    """From the file that DEEPCELL_ACCESS_TOKEN_FILE names, a mounted secret, or DEEPCELL_ACCESS_TOKEN, in this order.

    Raises:
        Forbidden: there is none. InvalidSettings: the file cannot be read, or holds no token.
    """
    named = os.environ.get(TOKEN_FILE)
    path = Path(named) if named else MOUNTED
    if named or path.exists():
        try:
            with path.open("rb") as file:
                found = file.read(MAX_TOKEN_BYTES).decode("ascii", "replace").strip()
        except OSError as error:
            raise InvalidSettings(f"{TOKEN_FILE}: {path} cannot be read: {error.strerror}") from None
        where = str(path)
    else:
        found, where = os.environ.get(TOKEN, "").strip(), TOKEN
    if not found:
        raise Forbidden(
            f"these weights need a DeepCell access token: put it into a file and its path into {TOKEN_FILE} on this "
            f"node, mount it as {MOUNTED}, or run `cellray weights fetch` and type it in; {ADVICE}"
        )
    if not found.isprintable() or not found.isascii() or " " in found:
        raise InvalidSettings(f"{where} holds no token: expected one line of printable characters")
    return found


def address(key: str) -> str:
    """The presigned address of an archive.

    Raises:
        Forbidden: there is no token, or it was refused. NotFound: no such archive. Unavailable: no answer, or none
        that makes sense.
    """
    secret = token()
    try:
        with httpx.Client(timeout=TIMEOUT_S, follow_redirects=False) as client:
            request = client.build_request("POST", ENDPOINT, data={"s3_key": key}, headers={"X-Api-Key": secret})
            answer = client.send(request, stream=True)
            content = b""
            for chunk in answer.iter_bytes():
                content += chunk
                if len(content) > MAX_ANSWER_BYTES:
                    raise Unavailable(f"DeepCell's answer about {key} is over {MAX_ANSWER_BYTES} bytes")
            answer.close()
    except httpx.HTTPError as error:
        raise Unavailable(f"DeepCell did not answer about {key}: {type(error).__name__}") from None
    if answer.is_redirect:
        raise Unavailable("DeepCell redirected elsewhere: not followed, since the token would go with it")
    if answer.status_code in (401, 403):
        raise Forbidden(f"DeepCell refused the access token: it may have expired; {ADVICE}")
    if answer.status_code == 404:
        raise NotFound(f"DeepCell has no {key}")
    if answer.status_code != 200:
        raise Unavailable(f"DeepCell answered {answer.status_code} about {key}; try again later")
    try:
        found = httpx.Response(200, content=content).json()["url"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, str) or urlsplit(found).scheme != urlsplit(ENDPOINT).scheme:
        raise Unavailable(f"DeepCell's answer about {key} has no https address")
    return found


def check(archive: Path, key: str, sha256: bool) -> None:
    """Before anything reads it. `sha256`: the settings have one for the member, which then need not come from a known
    archive. Raises InvalidCheckpoint: it is another one; InvalidSettings: nobody knows what it should be."""
    expected = MD5.get(key)
    if expected is None:
        if not sha256:
            raise InvalidSettings(f"the archive {key} is not known here: give the checkpoint's sha256 in the settings")
        return
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != expected:
        raise InvalidCheckpoint(f"the archive {key} has md5 {found}, expected {expected}: it is damaged or another one")


def extract(archive: Path, member: str, target: IO[bytes], most: int) -> None:
    """One regular file of a tar archive, by its exact name; nothing else is written.

    Raises:
        NotFound: no such member. InvalidCheckpoint: no archive, no regular file, or over `most` bytes.
    """
    try:
        with tarfile.open(archive) as opened:
            names = []
            for info in opened:
                names.append(info.name)
                if info.name.removeprefix("./") != member:
                    continue
                source = opened.extractfile(info) if info.isreg() else None
                if source is None or info.size > most:
                    raise InvalidCheckpoint(f"{member} in the archive is no file of at most {most >> 30} GiB")
                while chunk := source.read(CHUNK):
                    target.write(chunk)
                return
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InvalidCheckpoint(f"the archive with {member} is damaged: {type(error).__name__}") from None
    raise NotFound(f"the archive has no {member}; it has {', '.join(names[:8]) or 'nothing'}")
