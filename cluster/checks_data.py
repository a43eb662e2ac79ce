"""What `cellray doctor` looks at in files: the YAMLs, the weights, and where images come from and results go."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from cluster import deepcell, weights
from cluster import settings as settings_module
from cluster.errors import CellrayError, Conflict, Forbidden, InvalidCheckpoint, InvalidInput, NotFound, Unavailable
from cluster.findings import OK, PROBLEM, WARNING, Finding, Setup
from cluster.settings import MIB, ModelSettings, Settings, StorageSettings
from cluster.storage import Storage, absolute, is_s3, join

PROBE = "_cellray-doctor-"  # hidden from readers by its first letter
CONNECT_S, READ_S = 4.0, 10.0
GLOB = re.compile(r"[*?\[]")


def serve_file(setup: Setup) -> Iterator[Finding]:
    if isinstance(setup.read_serve, CellrayError):
        mend = "correct it; deploy/serve.local.yaml and deploy/serve.gpu.yaml are examples"
        yield Finding("Serve config", PROBLEM, str(setup.read_serve), "a file as of `serve deploy`", mend)
        return
    count = sum(len(one.get("deployments") or []) for one in setup.serve["applications"])
    yield Finding("Serve config", OK, f"{setup.serve_config}: {count} deployments")


def settings_file(setup: Setup) -> Iterator[Finding]:
    where = setup.settings_file or os.environ.get(settings_module.CONFIG_VARIABLE)
    try:
        settings_module.load(setup.settings_file)
    except CellrayError as error:
        mend = "correct the file, or what names it: --config, args.config of the Serve config, CELLRAY_CONFIG"
        yield Finding("settings", PROBLEM, str(error), 'a settings file (README, "Meta\'s weights")', mend)
        return
    yield Finding("settings", OK, where or "the defaults")


def model_weights(setup: Setup) -> Iterator[Finding]:
    """Of each model that is served: what this node has is read and compared; else whether it could be fetched."""
    for name in setup.models:
        if name not in setup.settings.models:
            yield Finding(
                "weights",
                PROBLEM,
                f"no model {name!r} in the settings",
                f"one of {', '.join(sorted(setup.settings.models))}",
                f"add it to models: of the settings, or correct args.models of {setup.serve_config.name}",
            )
            continue
        try:
            yield _weights(setup, setup.settings, name)
        except CellrayError as error:
            yield _no_weights(name, error)


def _no_weights(name: str, error: CellrayError) -> Finding:
    mends: dict[type[CellrayError], str] = {
        InvalidCheckpoint: "fetch the file anew, or correct sha256 in the settings if this one is meant",
        Forbidden: "see the message: a token or credentials on every node that fetches",
        NotFound: "correct source in the settings; a path has to be there on every node that serves it",
        Unavailable: "check the network and the proxy, or set weights_mirror to a bucket that the nodes reach",
    }
    mend = next((text for kind, text in mends.items() if isinstance(error, kind)), "correct the model in the settings")
    return Finding("weights", PROBLEM, f"{name}: {error}", "its checkpoint", mend)


def _weights(setup: Setup, settings: Settings, name: str) -> Finding:
    model = settings.models[name]
    local = "://" not in model.source and not deepcell.is_deepcell(model.source)
    if local and not model.source.startswith(("packaged:", weights.SEEDED)):
        with weights.fetched(model, Storage(settings.storage), Path(os.devnull)):
            pass  # it is there, and has the settings' sha256
    kept = setup.kept_weights(settings, name)
    for path, sha256 in kept.items():
        found = _sha256(path)
        if found != sha256:
            return Finding(
                "weights",
                PROBLEM,
                f"{name}: {path} has sha256 {found[:12]}…",
                f"{sha256[:12]}…, as it was written: it is damaged",
                f"delete {path.parent}: it is fetched and split anew",
            )
    if kept:
        return Finding("weights", OK, f"{name}: here, as they were written, in {next(iter(kept)).parent}")
    if local:
        return Finding("weights", OK, f"{name}: {model.source}; split when the first replica starts")
    return Finding("weights", OK, f"{name}: not here yet; {_fetchable(model, settings)} when the first replica starts")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"(none: {error.strerror})"


def _fetchable(model: ModelSettings, settings: Settings) -> str:
    """What there is to fetch. Raises NotFound, Forbidden, Unavailable."""
    shown = weights.public_source(model.source)
    if deepcell.is_deepcell(model.source):
        deepcell.token()
        return f"fetched from DeepCell with the token, which only DeepCell can check ({shown})"
    if is_s3(model.source):
        return f"{Storage(_quick(settings.storage)).size(model.source) / MIB:,.0f} MiB from {shown}"
    try:
        answer = httpx.head(model.source, follow_redirects=True, timeout=httpx.Timeout(READ_S, connect=CONNECT_S))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unavailable(f"{shown} does not answer: {type(error).__name__}") from None
    if answer.status_code in (401, 403):
        raise Forbidden(f"{shown} answers {answer.status_code}")
    if answer.status_code >= 400 and answer.status_code not in (405, 501):  # those do not know HEAD
        raise (NotFound if answer.status_code < 500 else Unavailable)(f"{shown} answers {answer.status_code}")
    size = int(answer.headers.get("content-length") or 0)
    return f"{size / MIB:,.0f} MiB from {shown}" if size else f"from {shown}"


def places(setup: Setup) -> Iterator[Finding]:
    """Where images and stored embeddings are read from. `output` has its own check."""
    storage = Storage(_quick(setup.settings.storage))
    wanted = [("input", setup.input)] if setup.input else []
    wanted += [("data set", one) for one in setup.settings.datasets]
    wanted += [("weights mirror", one) for one in (setup.settings.weights_mirror,) if one]
    for what, uri in wanted:
        try:
            yield _read(what, uri, storage)
        except CellrayError as error:
            # without a mirror every node fetches for itself; a data set may come yet
            bearable = what == "weights mirror" or (what == "data set" and isinstance(error, NotFound))
            yield Finding(what, WARNING if bearable else PROBLEM, str(error), "readable", _mend(error, uri, storage))


def _read(what: str, uri: str, storage: Storage) -> Finding:
    fixed = uri
    if glob := GLOB.search(uri):
        fixed = uri[: glob.start()].rpartition("/")[0] or "."
    try:
        first = next(storage.list(fixed), None)
    except NotFound:
        if what == "weights mirror":  # the first node fills it
            return Finding(what, OK, f"{uri} is reached, and empty")
        raise
    if first is None:
        return Finding(what, PROBLEM, f"{uri} is empty", "files", "is it the right folder?")
    return Finding(what, OK, f"{uri} is read; the first is {first.uri}, {first.size:,} bytes")


def output(setup: Setup) -> Iterator[Finding]:
    """A file is created, must not be overwritten by another of that name, and is deleted."""
    assert setup.output
    storage = Storage(_quick(setup.settings.storage))
    try:
        uri = join(_existing(absolute(setup.output)), PROBE + secrets.token_hex(8))
        storage.publish(uri, b"cellray doctor was here; this may be deleted\n")
    except CellrayError as error:
        yield Finding(
            "output",
            PROBLEM,
            f"not writable: {error}",
            "a new file",
            _mend(error, setup.output, storage, "s3:PutObject"),
        )
        return
    try:
        storage.publish(uri, b"again\n")
        overwritten = True
    except Conflict:
        overwritten = False
    except CellrayError as error:
        advice = _mend(error, setup.output, storage, "s3:GetObject")
        yield Finding("output", PROBLEM, f"written, but not read back: {error}", "readable, too", advice)
        return
    finally:
        try:
            storage.delete(uri)
            kept = ""
        except CellrayError as error:
            kept = str(error)
    if overwritten:
        yield Finding(
            "output",
            PROBLEM,
            f"{setup.output}: a second file of the same name took the first one's place",
            "If-None-Match: * is kept, on which a job's commits rest",
            "a storage or version that keeps it: AWS S3, MinIO of 2024-11 or newer, a local disk",
        )
    elif kept:
        yield Finding(
            "output",
            WARNING,
            f"{setup.output} is written create-only, but nothing can be deleted: {uri} stays ({kept})",
            "jobs need no more; `cellray compact --delete-old` does",
            f"{_allow('s3:DeleteObject')}, or delete that file by hand",
        )
    else:
        yield Finding("output", OK, f"{setup.output} is written create-only, and deleted from")


def _existing(uri: str) -> str:
    """The folder itself, or the nearest above it that is there: none is made."""
    path = Path(uri)
    while not is_s3(uri) and not path.is_dir() and path != path.parent:
        path = path.parent
        uri = str(path)
    return uri


def _quick(storage: StorageSettings) -> StorageSettings:
    """One try, and soon over."""
    return storage.model_copy(
        update={
            "attempts": 1,
            "connect_timeout_s": min(storage.connect_timeout_s, CONNECT_S),
            "read_timeout_s": min(storage.read_timeout_s, READ_S),
        }
    )


def _mend(error: CellrayError, uri: str, storage: Storage, action: str = "s3:ListBucket, s3:GetObject") -> str:
    if not is_s3(uri):
        return "correct the path, or its mode" if not isinstance(error, InvalidInput) else "correct the address"
    named = storage.settings.endpoint_url or os.environ.get("AWS_ENDPOINT_URL")
    endpoint = (
        f"{urlsplit(named).scheme}://{urlsplit(named).netloc}" if named else "AWS (no storage.endpoint_url is set)"
    )
    if isinstance(error, Unavailable):
        return f"S3 is expected at {endpoint}: is that right, does it run, and do network and proxy let it through?"
    if isinstance(error, Forbidden):
        return f"{_allow(action)}; credentials come from this node's environment or files"
    if isinstance(error, NotFound):
        return f"make the bucket, or correct its name; S3 is expected at {endpoint}"
    return "correct the address"


def _allow(action: str) -> str:
    return f"allow {action} on the bucket to these credentials"
