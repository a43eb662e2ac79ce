"""What an INPUT may be, on a disk and on S3."""

from __future__ import annotations

import io
import json
import tarfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.errors import InvalidImage, InvalidInput, NotFound, TooLarge
from cluster.settings import MIB
from cluster.storage import File, Storage, join
from jobs import images
from jobs.images import Entry
from tests.s3 import Place, place_fixture, s3_fixture  # noqa: F401


def png(width: int = 20, height: int = 10, level: int = 100) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, level, 50)).save(file, "PNG")
    return file.getvalue()


PNGS = [png(level=level) for level in range(7)]


def put(place: Place, name: str, content: bytes | str) -> str:
    uri = join(place.uri, name)
    place.storage.publish(uri, content.encode() if isinstance(content, str) else content)
    return uri


def names(place: Place, uri: str) -> list[str]:
    return [entry.uri.removeprefix(place.uri + "/") for entry in images.find(place.storage, uri)]


def contents(place: Place, uri: str) -> list[bytes]:
    return [images.content(place.storage, entry, MIB) for entry in images.find(place.storage, uri)]


def table(columns: dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, **options)
    return file.getvalue()


def tar(members: dict[str, bytes], mode: Any = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as made:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return file.getvalue()


# Folders and globs


def test_a_folder_holds_images_by_their_suffix(place: Place) -> None:
    shown = ["a.png", "b.JPG", "c.d.tiff", "d/e.webp", "d/f g.Tif"]
    for name in [*shown, "readme.txt", "list.csv", "x.tar", "x.parquet", "png", "a.png.bak", ".h.png", "_x/i.png"]:
        put(place, name, b"1")
    assert sorted(names(place, place.uri)) == shown
    assert list(images.find(place.storage, join(place.uri, "a.png"))) == [Entry(join(place.uri, "a.png"), 1)]


def test_a_place_without_images_says_what_was_looked_for(place: Place) -> None:
    for name in ("d/readme.md", "d/notes.md"):
        put(place, name, b"1")
    for uri, others in ((place.uri, 2), (join(place.uri, "d", "notes.md"), 1)):
        with pytest.raises(NotFound, match=rf"no images under .*\({others} files with other names\).*\.png, \.jpg"):
            list(images.find(place.storage, uri))
    for name in ("none", "none/*.png", "d/*.png"):
        with pytest.raises(NotFound):
            list(images.find(place.storage, join(place.uri, name)))


def test_a_glob(place: Place) -> None:
    for name in ("a/1.png", "a/2.png", "a/3.tif", "a/b/4.png", "c1/5.png", "c2/6.png", "c[1]/7.png"):
        put(place, name, b"1")
    assert names(place, join(place.uri, "a", "*.png")) == ["a/1.png", "a/2.png"]
    assert names(place, join(place.uri, "**", "*.png"))[:3] == ["a/1.png", "a/2.png", "a/b/4.png"]
    assert names(place, join(place.uri, "a", "?.tif")) == ["a/3.tif"]
    assert sorted(names(place, join(place.uri, "c[12]", "*"))) == ["c1/5.png", "c2/6.png"]
    assert names(place, join(place.uri, "c[1]")) == ["c[1]/7.png"]  # a folder of that very name


# Lists


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "ndjson", "parquet"])
def test_a_list(place: Place, suffix: str) -> None:
    first, second = put(place, "x/ü 1.png", PNGS[0]), put(place, "2.png", PNGS[1])
    rows = [{"uri": first, "key": "well A1"}, {"uri": "../2.png" if not first.startswith("s3") else second, "key": "B"}]
    rows.append({"uri": "ü 1.png", "key": "C"})
    if suffix == "csv":
        text = "key,uri\n" + "\n".join(f"{row['key']},{row['uri']}" for row in rows)
        uri = put(place, "x/list.csv", "\ufeff" + text.replace("\n", "\r\n"))
    elif suffix == "parquet":
        uri = put(place, "x/list.parquet", table({name: [row[name] for row in rows] for name in ("uri", "key")}))
    else:
        uri = put(place, f"x/list.{suffix}", "\n\n".join(map(json.dumps, rows)) + "\n")
    assert list(images.find(place.storage, uri)) == [
        Entry(first, 0, "well A1"),
        Entry(second, 0, "B"),
        Entry(first, 0, "C"),
    ]
    assert contents(place, uri) == [PNGS[0], PNGS[1], PNGS[0]]


def test_a_text_file_of_names(place: Place) -> None:
    first = put(place, "a b.png", PNGS[0])
    uri = put(place, "names.txt", f"{first}\n\na b.png\r\n")
    assert contents(place, uri) == [PNGS[0]] * 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "path\nx.png\n", "row 0: expected a column uri .*found path"),
        ("a.csv", 'uri\nx.png\n""\n', "row 1"),
        ("a.jsonl", '{"uri": "x.png"}\n{"uri": 5}\n', "row 1"),
        ("a.jsonl", '["x.png"]\n', "row 0.*found nothing"),
        ("a.jsonl", '{"uri": \n', "could not be read as a list"),
        ("a.txt", b"\xff\xfe", "could not be read as a list"),
        ("a.csv", 'uri\n"x' + "y" * 200_000, "could not be read as a list"),
        ("a.parquet", b"PAR1", "is no Parquet file"),
        ("a.parquet", table({"path": ["x.png"]}), "has columns path; expected uri"),
        ("a.parquet", table({"image": ["text"]}), "expected uri, or an image's bytes"),
        ("a.parquet", table({"uri": [3]}), "row 0"),
        ("a.tar", b"no tar" * 1000, "no plain tar"),
        ("a.tar", tar({"a.png": PNGS[0]}, "w:gz"), "compressed ones are not read"),
    ],
)
def test_what_is_no_list(place: Place, name: str, content: str | bytes, said: str) -> None:
    uri = put(place, name, content)
    with pytest.raises(InvalidInput, match=said) as caught:
        list(images.find(place.storage, uri))
    assert uri in str(caught.value)


def test_a_list_names_an_address_that_cannot_be_read(place: Place) -> None:
    with pytest.raises(InvalidInput, match="http://example"):
        list(images.find(place.storage, put(place, "a.txt", "http://example.com/a.png\n")))


# Images in other files


def test_a_tar(place: Place) -> None:
    members = {"a/0001.rgb.png": PNGS[0], "a/0001.json": b"{}", "2.png": PNGS[1], "._2.png": b"mac", "3.PNG": PNGS[2]}
    uri = put(place, "x.tar", tar(members))
    found = list(images.find(place.storage, uri))
    assert [(entry.uri, entry.key, entry.size) for entry in found] == [
        (f"{uri}#a/0001.rgb.png", "a/0001", len(PNGS[0])),
        (f"{uri}#2.png", "2", len(PNGS[1])),
        (f"{uri}#3.PNG", "3", len(PNGS[2])),
    ]
    assert contents(place, uri) == PNGS[:3]
    with pytest.raises(TooLarge, match=r"x\.tar#2\.png"):
        images.content(place.storage, found[1], 10)
    with pytest.raises(InvalidImage, match="ends before"):
        images.content(place.storage, Entry(f"{uri}#9.png", MIB, None, uri, 0), 2 * MIB)
    put(place, "y.tar", tar({"9.png": PNGS[3]}))
    assert contents(place, join(place.uri, "*.tar")) == PNGS[:4]


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
def test_parquet_with_images(place: Place, kind: str) -> None:
    values: Any = pa.array([*PNGS[:4], None], pa.large_binary() if kind == "large_binary" else pa.binary())
    if kind == "struct":
        values = pa.array([{"bytes": one, "path": "x"} for one in values.to_pylist()])
    uri = put(place, "x.parquet", table({"key": list("abcde"), "image": values, "label": range(5)}, row_group_size=2))
    found = list(images.find(place.storage, uri))
    assert [(entry.uri, entry.key, entry.at) for entry in found] == [(f"{uri}#{n}", "abcde"[n], n) for n in range(5)]
    assert all(0 < entry.size < 1000 for entry in found)
    assert [images.content(place.storage, found[row], MIB) for row in (2, 0, 3, 1)] == [
        PNGS[2],
        PNGS[0],
        PNGS[3],
        PNGS[1],
    ]
    with pytest.raises(InvalidImage, match="#4 has no bytes"):
        images.content(place.storage, found[4], MIB)
    with pytest.raises(TooLarge, match="#1 is larger"):
        images.content(place.storage, found[1], 10)
    with pytest.raises(InvalidImage, match="none of number 5"):
        images.content(place.storage, Entry(f"{uri}#5", 1, None, uri, 5), MIB)


def test_images_are_found_again_by_their_names(place: Place) -> None:
    packed = put(place, "x.tar", tar({"a.png": PNGS[0], "b/c.png": PNGS[1]}))
    rows = put(place, "x.parquet", table({"image": PNGS[2:5]}))
    plain = put(place, "a#b.png", PNGS[5])
    names = [f"{packed}#b/c.png", f"{rows}#2", plain, f"{packed}#none.png", join(place.uri, "gone.tar") + "#a.png"]
    found = images.by_name(place.storage, names)
    assert list(found) == names
    assert [images.content(place.storage, found[name], MIB) for name in names[:3]] == [PNGS[1], PNGS[4], PNGS[5]]
    for name in names[3:]:
        with pytest.raises(NotFound):
            images.content(place.storage, found[name], MIB)


def test_row_groups_that_no_memory_holds_are_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_GROUP_BYTES", 100)
    uri = put(place, "x.parquet", table({"image": PNGS}))
    with pytest.raises(InvalidInput, match="row group 0 is over"):
        list(images.find(place.storage, uri))


def test_images_that_are_no_files_of_their_own(place: Place) -> None:
    with pytest.raises(InvalidInput, match="expected a folder of images"):
        list(images.files(place.storage, put(place, "x.tar", tar({"a.png": PNGS[0]}))))


def test_a_million_files_are_listed_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is listed is never held: the first is there while the rest is not."""
    taken = 0

    def listed(self: Storage, uri: str) -> Any:
        nonlocal taken
        for taken in range(1, 1_000_001):
            yield File(f"{uri}/{taken}.png", 1)

    monkeypatch.setattr(Storage, "list", listed)
    assert next(images.find(Storage(), "/x")).uri == "/x/1.png"
    assert taken == 1
