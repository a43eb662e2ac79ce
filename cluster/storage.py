"""The one seam to files: a local path or an `s3://` URI, same calls, our errors.

`publish` is create-only and whole: a reader sees all of the file or none, and nothing is ever overwritten. The lost
reply (our PUT landed, the retry is told "exists") is told from a conflict by reading back and comparing sha256.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

from cluster.errors import CellrayError, Conflict, Forbidden, InvalidInput, NotFound, TooLarge, Unavailable
from cluster.settings import MIB, StorageSettings

S3 = "s3://"
CHUNK = 8 * MIB
PART_BYTES, PARTS_AT_ONCE = 16 * MIB, 4
# Met another write; or the upload is over, as after a reply that was lost: whoever tries again sees what is there.
AGAIN = ("ConditionalRequestConflict", "NoSuchUpload")
CUT = ("ClientPayloadError", "IncompleteReadError", "ResponseStreamingError")  # a body that ended early


@dataclass(frozen=True, slots=True)
class File:
    """A listed file: its URI, and its size in bytes."""

    uri: str
    size: int


def is_s3(uri: str) -> bool:
    return uri.startswith(S3)


def absolute(uri: str) -> str:
    """The URI as data sets record it: `s3://bucket/key`, or an absolute local path.

    Raises:
        InvalidInput: the scheme is neither, e.g. `http://`, `gs://`.
    """
    if is_s3(uri):
        if not uri.removeprefix(S3).split("/")[0]:
            raise InvalidInput(f"{uri!r} names no bucket; expected s3://BUCKET/PREFIX")
        return uri.rstrip("/")
    if "://" in uri:
        raise InvalidInput(f"{uri!r} is neither a local path nor s3://…; no other scheme is read")
    if not uri or "\0" in uri:
        raise InvalidInput(f"{uri!r} is not a path")
    return os.path.abspath(os.path.expanduser(uri))


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


class Storage:
    """Reads and publishes files. Holds settings only until first use, so it travels to workers by pickle."""

    def __init__(self, settings: StorageSettings | None = None) -> None:
        self.settings = settings or StorageSettings()

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings}

    @cached_property
    def _s3(self) -> Any:
        import s3fs

        filesystem = s3fs.S3FileSystem(
            anon=self.settings.anonymous,
            endpoint_url=self.settings.endpoint_url,
            use_listings_cache=False,
            client_kwargs={"region_name": self.settings.region} if self.settings.region else {},
            config_kwargs={
                "connect_timeout": self.settings.connect_timeout_s,
                "read_timeout": self.settings.read_timeout_s,
                "retries": {"mode": "standard", "total_max_attempts": self.settings.attempts},
            },
        )
        filesystem.retries = 1  # botocore's attempts are all there are; s3fs would multiply them by 5, by 25 for ranges
        return filesystem

    def list(self, uri: str) -> Iterator[File]:
        """Files at or below `uri` in a fixed order; hidden ones (a dot or underscore first) are passed over.

        Raises:
            NotFound: nothing is there.
        """
        uri = absolute(uri)
        with mapped(uri):
            yield from self._objects(uri) if is_s3(uri) else _walk(uri)

    def _objects(self, uri: str) -> Iterator[File]:
        """A page of 1,000 at a time: there may be more than fit in memory. Keys come in the order of their UTF-8."""
        bucket, _, key = uri.removeprefix(S3).partition("/")
        found = bool(key) and self.exists(uri)
        if found:
            yield File(uri, self.size(uri))
        below = f"{key}/" if key else ""
        at: dict[str, str] | None = {}
        while at is not None:
            page = self._s3.call_s3("list_objects_v2", Bucket=bucket, Prefix=below, **at)
            for entry in page.get("Contents", ()):
                found, name = True, entry["Key"].removeprefix(below)
                if name and not name.endswith("/") and not any(part[:1] in "._" for part in name.split("/") if part):
                    yield File(f"{S3}{bucket}/{entry['Key']}", entry["Size"])
            at = {"ContinuationToken": page["NextContinuationToken"]} if page.get("IsTruncated") else None
        if not found:
            raise NotFound(f"{uri} holds no objects: check the bucket and the prefix")

    def size(self, uri: str) -> int:
        """Bytes of one file. Raises NotFound where there is none."""
        absolute(uri)
        with mapped(uri):
            if is_s3(uri):
                info = self._s3.info(uri)
                if info["type"] != "file":
                    raise NotFound(f"{uri} is a prefix, expected an object")
                return int(info["size"])
            if os.path.isdir(uri):
                raise NotFound(f"{uri} is a folder, expected a file")
            return os.stat(uri).st_size

    def exists(self, uri: str) -> bool:
        try:
            self.size(uri)
        except NotFound:
            return False
        return True

    def read(self, uri: str, limit: int) -> bytes:
        """The whole file, refused if it is over `limit` bytes.

        Raises:
            TooLarge, NotFound, Forbidden, Unavailable
        """
        absolute(uri)  # no other scheme, no bucket alone
        for left in reversed(range(self.settings.attempts)):
            try:
                with mapped(uri):
                    return self._get(uri, limit) if is_s3(uri) else _local(uri, limit)
            except Unavailable as error:
                if type(error.__cause__).__name__ not in CUT or not left:
                    raise
        raise AssertionError("unreachable")

    def _get(self, uri: str, limit: int) -> bytes:
        """One request an object, where opening it takes two."""
        from fsspec.asyn import sync

        bucket, _, key = uri.removeprefix(S3).partition("/")

        async def get() -> bytes:
            found = await self._s3._call_s3("get_object", Bucket=bucket, Key=key)
            async with found["Body"] as body:
                if found["ContentLength"] > limit:
                    body.close()  # without what is left of it
                    raise _over(uri, limit)
                return bytes(await body.read())

        return cast(bytes, sync(self._s3.loop, get))

    def open(self, uri: str, block_bytes: int = 4 * MIB) -> IO[bytes]:
        """A seekable file, for readers that fetch ranges. S3 fetches nothing ahead of what is asked for."""
        absolute(uri)  # no other scheme, no bucket alone
        with mapped(uri):
            if not is_s3(uri):
                return open(uri, "rb")
            file = self._s3.open(uri, "rb", block_size=block_bytes, cache_type="none")
            if file.details["type"] != "file":
                raise NotFound(f"{uri} is a prefix, expected an object")
            return cast(IO[bytes], _Remote(uri, file, self.settings.attempts))

    def publish(self, uri: str, content: bytes | Path, ours: bool = False) -> None:
        """Create `uri` with `content` (bytes, or a local file), whole or not at all; never overwrites. A file that is
        `ours` nobody writes to any more: on the same disk it becomes `uri` without a copy.

        Succeeds if `uri` exists with the very same bytes: that is our own earlier write.

        Raises:
            Conflict: `uri` exists with other bytes, which are kept.
        """
        absolute(uri)
        with mapped(uri):
            try:
                if not is_s3(uri):
                    _link(Path(uri), content, ours)
                else:
                    self._create(uri, content)
                return
            except OSError as error:
                if not _says_exists(error):
                    raise
        if self.sha256(uri) != _sha256(content):
            raise Conflict(f"{uri} exists with other content; it is kept. Choose another output")

    def _create(self, uri: str, content: bytes | Path) -> None:
        for left in reversed(range(self.settings.attempts)):
            try:
                if isinstance(content, bytes):
                    return self._s3.pipe_file(uri, content, mode="create")
                return self._s3.put_file(
                    str(content), uri, mode="create", chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE
                )
            except OSError as error:
                if _code(error) not in AGAIN or not left:
                    raise
                time.sleep(0.1)

    def overwrite(self, uri: str, content: bytes) -> None:
        """Write `uri`, replacing what is there: for reports, never for data."""
        absolute(uri)
        with mapped(uri):
            if is_s3(uri):
                self._s3.pipe_file(uri, content)
                return
            temporary = _temporary_beside(Path(uri), content)
            try:
                os.replace(temporary, uri)
            except BaseException:
                os.unlink(temporary)
                raise

    def delete(self, uri: str) -> None:
        """Delete one file; it may be gone already."""
        absolute(uri)
        with mapped(uri):
            if is_s3(uri):
                bucket, _, key = uri.removeprefix(S3).partition("/")
                self._s3.call_s3("delete_object", Bucket=bucket, Key=key)
                return
            with suppress(FileNotFoundError):
                os.unlink(uri)

    def fetch(self, uri: str, path: Path, limit: int | None = None) -> str:
        """Copy one file to a local `path`, whole; → its sha256. Raises TooLarge: it has more than `limit` bytes."""
        digest, left = hashlib.sha256(), limit
        with self.open(uri) as source, mapped(str(path)), path.open("wb") as target:
            while chunk := source.read(CHUNK):
                if left is not None and (left := left - len(chunk)) < 0:
                    raise _over(uri, limit or 0)
                digest.update(chunk)
                target.write(chunk)
        return digest.hexdigest()

    def sha256(self, uri: str) -> str:
        digest = hashlib.sha256()
        with self.open(uri) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()


def _over(uri: str, limit: int) -> TooLarge:
    return TooLarge(f"{uri} is larger than the limit of {limit} bytes")


def _local(uri: str, limit: int) -> bytes:
    with open(uri, "rb") as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise _over(uri, limit)
        return file.read()


def _walk(uri: str) -> Iterator[File]:
    if os.path.isfile(uri):
        yield File(uri, os.path.getsize(uri))
        return
    if not os.path.isdir(uri):
        raise NotFound(f"{uri} does not exist; expected a folder of images, one image, or s3://…")

    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(uri, onerror=refuse):
        folders[:] = sorted(name for name in folders if name[0] not in "._")
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name[0] not in "._" and os.path.isfile(path):
                yield File(path, os.path.getsize(path))


def _temporary_beside(path: Path, content: bytes | Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as target:
            if isinstance(content, bytes):
                target.write(content)
            else:
                with content.open("rb") as source:
                    while chunk := source.read(CHUNK):
                        target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
        os.chmod(temporary, 0o644)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return temporary


def _link(path: Path, content: bytes | Path, ours: bool) -> None:
    if ours and isinstance(content, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with content.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(content, 0o644)
        try:
            return os.link(content, path)
        except FileExistsError:
            raise
        except OSError:  # on another disk, or one that has no links
            pass
    temporary = _temporary_beside(path, content)
    try:
        os.link(temporary, path)  # fails where the name exists, unlike rename
    finally:
        os.unlink(temporary)


def _sha256(content: bytes | Path) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _says_exists(error: OSError) -> bool:
    """Servers differ in how they refuse a create-only PUT: 412 as "exists", or as a bare EINVAL (see s3fs)."""
    return isinstance(error, FileExistsError) or _code(error) in ("PreconditionFailed", "412")


def _code(error: OSError) -> str:
    """What the server called the error, e.g. "PreconditionFailed"."""
    return str(getattr(error.__cause__, "response", {}).get("Error", {}).get("Code", ""))


class _Remote(io.RawIOBase):
    """An open S3 file whose errors are ours. A read that was cut short is tried again, and then is an error: botocore
    repeats a request that failed, but not one whose body did."""

    def __init__(self, uri: str, file: Any, attempts: int) -> None:
        self.uri, self.file, self.attempts = uri, file, attempts

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self.file.tell())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self.file.seek(offset, whence))

    def read(self, size: int | None = -1) -> bytes:
        start = self.file.tell()
        left = max(self.file.size - start, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        for _ in range(self.attempts):
            self.file.seek(start)
            try:
                with mapped(self.uri):
                    data = self.file.read(wanted) if wanted else b""
            except Unavailable as error:
                if type(error.__cause__).__name__ not in CUT:
                    raise
                data = b""
            if len(data) == wanted:
                return bytes(data)
        raise Unavailable(f"{self.uri} was cut short: {len(data)} of {wanted} bytes came")

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


@contextmanager
def mapped(uri: str) -> Iterator[None]:
    """The only place where the errors of operating system, s3fs and botocore become ours."""
    try:
        yield
    except CellrayError:
        raise
    except FileNotFoundError as error:
        raise NotFound(f"{uri} was not found") from error
    except PermissionError as error:
        advice = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and the policy" if is_s3(uri) else "check its mode"
        raise Forbidden(f"no permission for {uri}: {advice}") from error
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise InvalidInput(f"{uri} cannot be used: {error.strerror or error}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise Unavailable(f"{uri} was not written: the disk is full") from error
        if error.errno in (errno.EINVAL, errno.ENAMETOOLONG):
            raise InvalidInput(f"{uri} was refused: {error}") from error
        raise Unavailable(f"{uri} could not be reached: {str(error) or type(error).__name__}") from error
    except ValueError as error:  # a bucket alone, an endpoint without a scheme, a name that is no UTF-8
        raise InvalidInput(f"{uri} cannot be used: {error}") from error
    except Exception as error:
        name = type(error).__name__
        if name in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
            raise Forbidden(f"no credentials for {uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
        if name == "ParamValidationError":
            raise InvalidInput(f"{uri} is not a valid S3 address") from error
        if type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp")) or isinstance(error, TimeoutError):
            raise Unavailable(f"{uri} could not be reached: {error}") from error
        raise
