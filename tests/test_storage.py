"""Storage: the same on a folder and on S3; create-only whatever the server replies; every foreign error is ours."""

from __future__ import annotations

import errno
import hashlib
import http.server
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import s3fs
from botocore.exceptions import ClientError, ReadTimeoutError
from s3fs.errors import translate_boto_error

from cluster import storage as storage_module
from cluster.errors import (
    CellrayError,
    Conflict,
    Forbidden,
    InvalidInput,
    NotFound,
    TooLarge,
    Unavailable,
)
from cluster.settings import MIB, StorageSettings
from cluster.storage import File, Storage, absolute, join
from tests.s3 import EVERYTHING, S3, Place, client, make_user, place_fixture, s3_fixture, server  # noqa: F401

HOSTILE = ["a b", "a%20b", "a#b", "a?b=c", "ü—日本.png", "[x]*", "a\\b", "a:b", "+&=", "~", "'\"", " edges ", "x" * 200]
RACERS = 16


def raised(kind: type[CellrayError], call: Callable[[], Any]) -> str:
    """The message, which is one line and shows no key."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "\n") not in message
    return message


def listed(place: Place, below: str = "") -> list[str]:
    files = list(place.storage.list(join(place.uri, below) if below else place.uri))
    assert all(file.size == len(place.storage.read(file.uri, MIB)) for file in files)
    return [file.uri.removeprefix(place.uri + "/") for file in files]


# Listing


def test_lists_in_a_fixed_order_and_passes_over_hidden_files(place: Place) -> None:
    shown = ["b.png", "a.png", "C.png", "d/2.png", "d/1.png", "d/e/3.png", "d2/4.png"]
    hidden = [".h.png", "_plan.json", "_records/0.json", ".git/x.png", "d/.h.png", "d/_e/x.png"]
    for name in shown + hidden:
        place.storage.publish(join(place.uri, name), name.encode())
    assert sorted(listed(place)) == sorted(shown)
    assert listed(place) == listed(place)
    assert listed(place, "d") == (["d/1.png", "d/2.png", "d/e/3.png"])  # not d2: a folder, no prefix
    assert listed(place, "d/") == listed(place, "d")
    assert listed(place, "_records") == ["_records/0.json"]  # hidden is what is below, not what was asked for
    flat = [name for name in listed(place) if "/" not in name]
    assert flat == sorted(flat)


def test_lists_a_single_file(place: Place) -> None:
    uri = join(place.uri, "d", "a.png")
    place.storage.publish(uri, b"123")
    assert list(place.storage.list(uri)) == [File(uri, 3)]


def test_what_is_not_there_cannot_be_listed(place: Place) -> None:
    for uri in (join(place.uri, "none"), place.uri + "none/x"):
        assert uri in raised(NotFound, lambda uri=uri: list(place.storage.list(uri)))


def test_an_empty_folder_and_an_empty_bucket(s3: S3, tmp_path: Path) -> None:
    assert list(Storage().list(str(tmp_path))) == []
    bucket = s3.make_bucket("test-empty")
    assert "holds no objects" in raised(NotFound, lambda: list(Storage(s3.settings).list(bucket)))


def test_an_empty_file_is_listed_and_a_folder_marker_is_not(place: Place, s3: S3) -> None:
    if place.uri.startswith("s3:"):
        direct = client(str(s3.settings.endpoint_url), "s3")
        direct.put_object(Bucket=place.uri.removeprefix("s3://"), Key="folder/", Body=b"")
    place.storage.publish(join(place.uri, "a.png"), b"1")
    place.storage.publish(join(place.uri, "empty.png"), b"")
    assert listed(place) == ["a.png", "empty.png"]


# Reading


def test_reads_up_to_the_limit(place: Place) -> None:
    uri = join(place.uri, "a")
    place.storage.publish(uri, b"0123456789")
    assert place.storage.read(uri, 10) == b"0123456789"
    assert uri in raised(TooLarge, lambda: place.storage.read(uri, 9))
    assert place.storage.size(uri) == 10
    assert place.storage.exists(uri)


def test_reads_ranges_and_fetches_no_more(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, content = join(place.uri, "a"), os.urandom(3 * MIB)
    place.storage.publish(uri, content)
    fetched = []
    real = s3fs.core._fetch_range
    monkeypatch.setattr(
        s3fs.core, "_fetch_range", lambda *a, **k: (fetched.append((a[4], a[5])), real(*a, **k))[1], raising=True
    )
    with place.storage.open(uri) as file:
        file.seek(-5, os.SEEK_END)
        assert file.read() == content[-5:]
        file.seek(MIB)
        assert file.read(100) == content[MIB : MIB + 100]
        assert file.tell() == MIB + 100
        assert file.read(50) == content[MIB + 100 : MIB + 150]
    assert sum(end - start for start, end in fetched) == (155 if place.uri.startswith("s3:") else 0)


def test_what_is_not_there_cannot_be_read(place: Place) -> None:
    place.storage.publish(join(place.uri, "d", "a"), b"1")
    for uri in (join(place.uri, "none"), place.uri + "none/x"):
        assert uri in raised(NotFound, lambda uri=uri: place.storage.read(uri, 9))
        assert uri in raised(NotFound, lambda uri=uri: place.storage.size(uri))
        assert not place.storage.exists(uri)
    assert not place.storage.exists(join(place.uri, "d"))


def test_a_folder_cannot_be_read(place: Place) -> None:
    place.storage.publish(join(place.uri, "d", "a"), b"1")
    with pytest.raises((NotFound, InvalidInput)):
        place.storage.read(join(place.uri, "d"), 9)


# Publishing


@pytest.fixture(params=["bytes", "path"])
def content(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[bytes], bytes | Path]:
    """What `publish` is given: bytes, or a local file that holds them."""

    def given(data: bytes) -> bytes | Path:
        if request.param == "bytes":
            return data
        path = tmp_path / f"content-{time.monotonic_ns()}"
        path.write_bytes(data)
        return path

    return given


def test_the_first_to_publish_wins(place: Place, content: Callable[[bytes], bytes | Path]) -> None:
    uri = join(place.uri, "d", "a")
    place.storage.publish(uri, content(b"first"))
    place.storage.publish(uri, content(b"first"))  # the same bytes: our own earlier write
    for other in (b"other", b"", b"first and more"):
        assert uri in raised(Conflict, lambda other=other: place.storage.publish(uri, content(other)))
    assert place.storage.read(uri, MIB) == b"first"
    assert everything(place) == ["d/a"]


def everything(place: Place) -> list[str]:
    """All names that exist, hidden ones too."""
    if not place.uri.startswith("s3:"):
        return sorted(str(path.relative_to(place.uri)) for path in Path(place.uri).rglob("*") if path.is_file())
    bucket = place.uri.removeprefix("s3://")
    direct = client(str(place.storage.settings.endpoint_url), "s3")
    assert "Uploads" not in direct.list_multipart_uploads(Bucket=bucket)
    return sorted(found["Key"] for found in direct.list_objects_v2(Bucket=bucket).get("Contents", []))


def test_of_many_at_once_exactly_one_succeeds(place: Place) -> None:
    uri, start = join(place.uri, "d", "race"), threading.Barrier(RACERS)

    def race(number: int) -> int | None:
        mine = pickle.loads(pickle.dumps(place.storage))
        start.wait()
        try:
            mine.publish(uri, f"{number}".encode() * 1000)
        except Conflict:
            return None
        return number

    with ThreadPoolExecutor(RACERS) as pool:
        winners = [number for number in pool.map(race, range(RACERS)) if number is not None]
    assert len(winners) == 1
    assert place.storage.read(uri, MIB) == f"{winners[0]}".encode() * 1000
    assert everything(place) == ["d/race"]


def test_an_upload_in_parts_is_create_only_too(s3: S3, tmp_path: Path) -> None:
    place = Place(Storage(s3.settings), s3.make_bucket("test-parts"))
    for name, size in (("first", 100 * MIB), ("other", 100 * MIB + 1)):  # from 100 MiB s3fs uploads in parts
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    uri = join(place.uri, "a")
    place.storage.publish(uri, tmp_path / "first")
    raised(Conflict, lambda: place.storage.publish(uri, tmp_path / "other"))
    assert place.storage.size(uri) == 100 * MIB
    assert everything(place) == ["a"]


def test_overwrites(place: Place) -> None:
    uri = join(place.uri, "_report.json")
    for data in (b"first", b"second, longer", b""):
        place.storage.overwrite(uri, data)
        assert place.storage.read(uri, MIB) == data
    assert everything(place) == ["_report.json"]


def test_deletes_one_file_and_what_is_gone_is_gone(place: Place) -> None:
    for name in ("a", "b/c"):
        place.storage.publish(join(place.uri, name), b"1")
    for _ in range(2):
        place.storage.delete(join(place.uri, "a"))
    assert [file.uri for file in place.storage.list(place.uri)] == [join(place.uri, "b/c")]


def test_fetches_a_file_whole_and_says_its_hash(place: Place, tmp_path: Path) -> None:
    content = bytes(range(256)) * (1 << 16)  # two chunks
    place.storage.publish(join(place.uri, "a"), content)
    assert place.storage.fetch(join(place.uri, "a"), tmp_path / "copy") == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "copy").read_bytes() == content
    raised(NotFound, lambda: place.storage.fetch(join(place.uri, "none"), tmp_path / "none"))


def test_a_failed_overwrite_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder" / "a").mkdir(parents=True)
    raised(InvalidInput, lambda: Storage().overwrite(str(tmp_path / "folder" / "a"), b"1"))
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a"]


def test_a_file_of_ours_becomes_the_published_one(tmp_path: Path) -> None:
    ours, uri = tmp_path / "ours", tmp_path / "out" / "there"
    ours.write_bytes(b"rows")
    Storage().publish(str(uri), ours, ours=True)
    assert uri.samefile(ours)
    Storage().publish(str(uri), ours, ours=True)  # our own earlier write
    ours.unlink()
    assert uri.read_bytes() == b"rows"
    other = tmp_path / "other"
    other.write_bytes(b"other")
    with pytest.raises(Conflict):
        Storage().publish(str(uri), other, ours=True)
    assert uri.read_bytes() == b"rows"


def test_a_file_of_ours_on_another_disk_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def from_here(source: str | Path, target: str | Path) -> None:
        if Path(source).name == "ours":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        link(source, target)

    monkeypatch.setattr(os, "link", from_here)
    ours, uri = tmp_path / "ours", tmp_path / "out" / "there"
    ours.write_bytes(b"rows")
    Storage().publish(str(uri), ours, ours=True)
    assert uri.read_bytes() == b"rows"
    assert not uri.samefile(ours)


def test_a_failed_publish_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "disk is full" in raised(Unavailable, lambda: Storage().publish(str(tmp_path / "a"), b"1"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_go_round(place: Place, name: str) -> None:
    uri = join(place.uri, "d", name)
    place.storage.publish(uri, name.encode())
    assert place.storage.read(uri, MIB) == name.encode()
    assert place.storage.size(uri) == len(name.encode())
    assert listed(place, "d") == [f"d/{name}"]
    assert [file.uri for file in place.storage.list(uri)] == [uri]
    raised(Conflict, lambda: place.storage.publish(uri, b"other"))


def test_dots_in_a_name_stay_below(place: Place) -> None:
    uri = join(place.uri, "d", "..", "a")
    place.storage.publish(uri, b"1")
    assert place.storage.read(uri, 9) == b"1"
    assert everything(place) in (["a"], ["d/../a"])  # a key of S3 is no path


# What servers reply


def s3_error(code: str, message: str, status: int) -> OSError:
    """As s3fs raises it for this reply."""
    reply = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = translate_boto_error(ClientError(reply, "PutObject"))
    assert isinstance(error, OSError)
    return error


def put_replies(monkeypatch: pytest.MonkeyPatch, error: OSError, lands: bool, times: int = 1) -> None:
    """The next PUTs end in `error`, written or not."""
    real, left = s3fs.S3FileSystem._call_s3, [times]

    async def call(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        if method != "put_object" or not left[0]:
            return await real(self, method, *arguments, **options)
        left[0] -= 1
        if lands:
            await real(self, method, *arguments, **options)
        raise error

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call)


PRECONDITION = "At least one of the pre-conditions you specified did not hold"


def test_a_lost_reply_is_a_success(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = s3.make_bucket("test-lost-reply") + "/a"
    put_replies(monkeypatch, FileExistsError(PRECONDITION), lands=True)
    Storage(s3.settings).publish(uri, b"1")
    assert Storage(s3.settings).read(uri, 9) == b"1"


def test_a_server_that_does_not_say_which_condition_failed(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, uri = Storage(s3.settings), s3.make_bucket("test-412") + "/a"
    storage.publish(uri, b"1")
    put_replies(monkeypatch, s3_error("PreconditionFailed", PRECONDITION, 412), lands=False, times=2)
    storage.publish(uri, b"1")
    raised(Conflict, lambda: storage.publish(uri, b"2"))


def test_a_put_that_met_another_one_is_sent_again(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, uri = Storage(s3.settings), s3.make_bucket("test-409") + "/a"
    put_replies(monkeypatch, s3_error("ConditionalRequestConflict", "conflicting operation", 409), lands=False)
    storage.publish(uri, b"1")
    assert storage.read(uri, 9) == b"1"


def test_a_server_that_goes_away_while_a_file_is_open(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, uri = Storage(s3.settings), s3.make_bucket("test-outage") + "/a"
    storage.publish(uri, b"1")
    file = storage.open(uri)

    def gone(*_: Any, **__: Any) -> bytes:
        raise ReadTimeoutError(endpoint_url="http://127.0.0.1")

    monkeypatch.setattr(s3fs.core, "_fetch_range", gone)
    raised(Unavailable, lambda: storage.sha256(uri))
    raised(Unavailable, file.read)


def test_a_short_body_is_not_taken_for_the_file(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, uri = Storage(s3.settings), s3.make_bucket("test-short") + "/a"
    storage.publish(uri, b"0123456789")
    monkeypatch.setattr(s3fs.core, "_fetch_range", lambda *_, **__: b"01234")
    raised(Unavailable, lambda: storage.sha256(uri))


def test_a_closed_port_is_unavailable_soon() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        storage = Storage(StorageSettings(endpoint_url=f"http://127.0.0.1:{probe.getsockname()[1]}", attempts=1))
    start = time.monotonic()
    for call in calls(storage, "s3://bucket/a"):
        assert "s3://bucket/a" in raised(Unavailable, call)
    assert time.monotonic() - start < 10


def calls(storage: Storage, uri: str) -> list[Callable[[], Any]]:
    """Every way to touch a file."""
    return [
        lambda: list(storage.list(uri)),
        lambda: storage.size(uri),
        lambda: storage.exists(uri),
        lambda: storage.read(uri, 9),
        lambda: storage.publish(uri, b"1"),
        lambda: storage.overwrite(uri, b"1"),
    ]


@pytest.fixture
def silent() -> Iterator[tuple[str, list[str]]]:
    """(URL, methods it was asked for) of a server that never answers."""
    asked: list[str] = []
    over = threading.Event()

    class Silent(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.command)
            over.wait(10)

        do_GET = do_HEAD

        def log_message(self, *_: Any) -> None:
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}", asked
    finally:
        over.set()
        listening.shutdown()
        thread.join()
        listening.server_close()


def test_a_silent_server_is_asked_as_often_as_the_settings_say(silent: tuple[str, list[str]]) -> None:
    url, asked = silent
    storage = Storage(StorageSettings(endpoint_url=url, attempts=1, read_timeout_s=0.1))
    raised(Unavailable, lambda: storage.size("s3://bucket/a"))
    assert asked == ["HEAD"]
    raised(Unavailable, lambda: storage.read("s3://bucket/a", 9))
    assert asked == ["HEAD", "GET"]  # one request an object


# Who may


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("guarded"), check_keys=True) as url:
        yield url


def become(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # else s3fs goes on with the keys of the last test


def test_only_the_right_keys_open_a_bucket(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = StorageSettings(endpoint_url=guarded, attempts=1)
    owner = make_user(guarded, "owner", EVERYTHING)
    become(monkeypatch, owner)
    client(guarded, "s3").create_bucket(Bucket="guarded")
    Storage(settings).publish("s3://guarded/a", b"1")
    assert Storage(settings).read("s3://guarded/a", 9) == b"1"

    stranger = {"AWS_ACCESS_KEY_ID": "AKIASTRANGER", "AWS_SECRET_ACCESS_KEY": "stranger's secret"}
    wrong_secret = {**owner, "AWS_SECRET_ACCESS_KEY": "wrong secret"}
    bystander = make_user(guarded, "bystander", {"Effect": "Allow", "Action": "iam:ListUsers", "Resource": "*"})
    for keys in (stranger, wrong_secret, bystander):
        become(monkeypatch, keys)
        for call in calls(Storage(settings), "s3://guarded/a"):
            assert "no permission for s3://guarded/a" in raised(Forbidden, call)


def test_a_reader_may_read_but_not_write(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = StorageSettings(endpoint_url=guarded, attempts=1)
    become(monkeypatch, make_user(guarded, "author", EVERYTHING))
    client(guarded, "s3").create_bucket(Bucket="published")
    Storage(settings).publish("s3://published/a", b"1")
    become(monkeypatch, make_user(guarded, "reader", {"Effect": "Allow", "Action": "s3:GetObject", "Resource": "*"}))
    assert Storage(settings).read("s3://published/a", 9) == b"1"
    raised(Forbidden, lambda: Storage(settings).publish("s3://published/b", b"1"))
    raised(Forbidden, lambda: Storage(settings).publish("s3://published/a", b"1"))


def test_no_keys_at_all(guarded: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    become(monkeypatch, {})
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage = Storage(StorageSettings(endpoint_url=guarded, attempts=1))
    assert "no credentials for s3://guarded/a" in raised(Forbidden, lambda: storage.read("s3://guarded/a", 9))


def test_a_local_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "a")
    Path(uri).write_bytes(b"1")

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(storage_module, "open", denied, raising=False)
    monkeypatch.setattr("tempfile.mkstemp", denied)
    monkeypatch.setattr(os, "scandir", denied)
    storage = Storage()
    raised(Forbidden, lambda: storage.read(uri, 9))
    raised(Forbidden, lambda: storage.publish(uri, b"1"))
    raised(Forbidden, lambda: storage.overwrite(uri, b"1"))
    assert str(tmp_path) in raised(Forbidden, lambda: list(storage.list(str(tmp_path))))


# Addresses


@pytest.mark.parametrize("uri", ["http://host/a", "https://host/a", "gs://bucket/a", "file:///a", "S3://bucket/a"])
def test_another_scheme_is_refused(uri: str) -> None:
    assert uri in raised(InvalidInput, lambda: absolute(uri))
    assert uri in raised(InvalidInput, lambda: list(Storage().list(uri)))


@pytest.mark.parametrize("uri", ["http://host/a", "gs://bucket/a"])
def test_another_scheme_is_not_taken_for_a_path(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for call in calls(Storage(), uri):
        assert uri in raised(InvalidInput, call)


@pytest.mark.parametrize("uri", ["s3://", "s3:///", "", "a\0b", "s3:///key"])
def test_an_address_of_nothing_is_refused(uri: str) -> None:
    raised(InvalidInput, lambda: absolute(uri))


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://"])
def test_a_bucket_is_no_file(s3: S3, uri: str) -> None:
    for call in calls(Storage(s3.settings), uri)[3:]:
        with pytest.raises((InvalidInput, NotFound)):
            call()


def test_an_endpoint_without_a_scheme_is_refused() -> None:
    storage = Storage(StorageSettings(endpoint_url="127.0.0.1:9000", attempts=1))
    assert "127.0.0.1:9000" in raised(InvalidInput, lambda: storage.read("s3://bucket/a", 9))


def test_a_path_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    for uri in (str(tmp_path / "file" / "a"), str(tmp_path / "file" / "b" / "a")):
        for call in calls(Storage(), uri)[1:]:
            assert uri in raised(InvalidInput, call)
        raised(NotFound, lambda uri=uri: list(Storage().list(uri)))


def test_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert absolute("a/../b/") == str(tmp_path / "b")
    assert absolute("~/a") == "/home/someone/a"
    assert absolute("s3://bucket/a/") == "s3://bucket/a"
    assert absolute("s3://bucket/a/../b") == "s3://bucket/a/../b"  # a key is no path


def test_travels_by_pickle_before_and_after_use(place: Place) -> None:
    uri = join(place.uri, "a")
    pickle.loads(pickle.dumps(place.storage)).publish(uri, b"1")
    place.storage.read(uri, 9)
    assert pickle.loads(pickle.dumps(place.storage)).read(uri, 9) == b"1"
