"""What a job is to do: its images, its prompts, and the plan that freezes both."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.errors import Conflict, InvalidInput, InvalidPrompt, NotFound
from cluster.settings import Limits
from cluster.storage import Storage, join
from jobs import estimate, images, prompts
from jobs import plan as plans
from jobs.images import Entry
from jobs.plan import Listing, Plan
from jobs.prompts import ImagePrompts
from serve_app.dataset import MAX_ROWS_A_FILE, plan_uri
from tests.s3 import Place, place_fixture, s3_fixture  # noqa: F401

FACTS = {
    "input": "s3://in/plates",
    "listing": "1" * 64,
    "images": 3,
    "shard_images": 256,
    "model": "nano",
    "encoder_sha256": "2" * 64,
    "preprocess": "1",
    "grid": None,
    "multimask": False,
}
BASE = "s3://in/plates"


# The plan


def test_a_plan_is_frozen_once_and_found_again(place: Place) -> None:
    assert not Plan("embed", FACTS).freeze(place.storage, place.uri)
    frozen = place.storage.read(plan_uri(place.uri, "embed"), 9999)
    assert Plan("embed", dict(reversed(FACTS.items()))).freeze(place.storage, place.uri)
    assert place.storage.read(plan_uri(place.uri, "embed"), 9999) == frozen
    assert json.loads(frozen)["encoder_sha256"] == FACTS["encoder_sha256"]
    assert not Plan("segment", FACTS).freeze(place.storage, place.uri)  # each job has its own


def test_another_plan_is_refused_with_the_difference(place: Place) -> None:
    Plan("embed", FACTS).freeze(place.storage, place.uri)
    other = FACTS | {"model": "sam_vit_b", "encoder_sha256": "3" * 64, "shard_images": 8}
    with pytest.raises(Conflict) as caught:
        Plan("embed", other).freeze(place.storage, place.uri)
    message = str(caught.value)
    assert "\n" not in message
    assert place.uri in message
    for said in ("model: nano there, sam_vit_b here", "shard_images: 256 there, 8 here", "222222", "333333"):
        assert said in message
    for same in ("listing", "images: ", "grid"):
        assert same not in message.replace("shard_images: ", "")


def test_a_fact_more_or_less_is_another_plan(place: Place) -> None:
    Plan("embed", FACTS).freeze(place.storage, place.uri)
    with pytest.raises(Conflict, match="extra: None there, 1 here"):
        Plan("embed", FACTS | {"extra": 1}).freeze(place.storage, place.uri)
    with pytest.raises(Conflict, match="model: nano there, None here"):
        Plan("embed", {key: value for key, value in FACTS.items() if key != "model"}).freeze(place.storage, place.uri)


def test_the_difference_of_two_long_addresses_is_seen(tmp_path: Path) -> None:
    first, second = (f"s3://in/a/folder/with/a/long/name/plate-{number}" for number in (1, 2))
    Plan("embed", FACTS | {"input": first}).freeze(Storage(), str(tmp_path))
    with pytest.raises(Conflict, match=r"plate-1 there, .*plate-2 here"):
        Plan("embed", FACTS | {"input": second}).freeze(Storage(), str(tmp_path))


def test_another_driver_that_was_faster(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    Plan("embed", FACTS).freeze(place.storage, place.uri)
    monkeypatch.setattr(Storage, "exists", lambda *_: False)  # both looked before either wrote
    Plan("embed", FACTS).freeze(place.storage, place.uri)
    with pytest.raises(Conflict, match="images: 3 there, 4 here"):
        Plan("embed", FACTS | {"images": 4}).freeze(place.storage, place.uri)


def test_a_later_generation_is_about_the_same(place: Place) -> None:
    Plan("embed", FACTS).freeze(place.storage, place.uri)
    own = {"listing": "3" * 64, "images": 1, "shard_images": 8, "mode": "update"}
    assert not Plan("embed", FACTS | own, 1).freeze(place.storage, place.uri)
    assert Plan("embed", FACTS | own, 1).freeze(place.storage, place.uri)
    assert Plan("embed", FACTS).freeze(place.storage, place.uri)
    with pytest.raises(Conflict, match="model: nano there, sam_vit_b here"):
        Plan("embed", FACTS | own | {"model": "sam_vit_b"}, 2).freeze(place.storage, place.uri)
    with pytest.raises(Conflict, match="images: 1 there, 2 here"):
        Plan("embed", FACTS | own | {"images": 2}, 1).freeze(place.storage, place.uri)


@pytest.mark.parametrize("text", [b"", b"[]"])
def test_a_damaged_plan_is_named(tmp_path: Path, text: bytes) -> None:
    Storage().publish(plan_uri(str(tmp_path), "embed"), text)
    with pytest.raises((Conflict, InvalidInput), match="_plan-embed-000"):
        Plan("embed", FACTS).freeze(Storage(), str(tmp_path))


@pytest.mark.parametrize("fact", FACTS)
def test_the_fingerprint_depends_on_every_fact(fact: str) -> None:
    plan = Plan("embed", FACTS)
    assert Plan("embed", FACTS | {fact: "other"}).fingerprint != plan.fingerprint
    assert Plan("embed", {key: value for key, value in FACTS.items() if key != fact}).fingerprint != plan.fingerprint


def test_the_fingerprint_depends_on_the_job_and_not_on_order() -> None:
    plan = Plan("embed", FACTS)
    assert Plan("segment", FACTS).fingerprint != plan.fingerprint
    assert Plan("embed", dict(reversed(FACTS.items()))).fingerprint == plan.fingerprint


def test_the_listings_fingerprint_depends_on_names_sizes_and_order() -> None:
    files = [Entry("s3://in/ü 1.png", 1), Entry("s3://in/2.png", 2)]
    others = (
        files,
        files[::-1],
        files[:1],
        [files[0], Entry(files[1].uri, 3)],
        [files[0], Entry("s3://in/3.png", 2)],
        [],
    )
    assert len({Listing(one, 8).fingerprint for one in others}) == 6
    assert Listing(files, 1).fingerprint == Listing(files, 8).fingerprint


def test_an_image_that_is_named_again_counts_once() -> None:
    one, other, cropped = Entry("/a", 1), Entry("/b", 2), Entry("/a", 1, view="channels=0")
    listing = Listing(iter([one, other, one, cropped, Entry("/b", 2, "a key"), one]), 2)
    assert (listing.images, listing.repeated, listing.bytes) == (3, 3, 4)
    assert [*listing.shard(0), *listing.shard(1)] == [one, other, cropped]
    assert listing.fingerprint == Listing([one, other, cropped], 8).fingerprint


def test_images_whose_numbers_are_the_same_are_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_number", lambda entry: 0)
    listing = Listing([Entry("/a", 1), Entry("/b", 1), Entry("/a", 1)], 8)
    assert (listing.shard(0), listing.repeated) == ([Entry("/a", 1), Entry("/b", 1)], 1)


def test_a_file_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"1")
    listing = Listing(images.find(Storage(), str(tmp_path)), 8)
    assert listing.shard(0) == [Entry(str(tmp_path / os.fsdecode(b"\xff.png")), 1)]


@pytest.mark.parametrize(("count", "size", "expected"), [(0, 4, []), (4, 4, [4]), (9, 4, [4, 4, 1]), (3, 1, [1, 1, 1])])
def test_shards_are_slices_of_the_listing(count: int, size: int, expected: list[int]) -> None:
    files = [Entry(f"s3://in/line\nbreak {number}\udcff.png", number) for number in range(count)]
    made = Listing(iter(files), size)
    shards = [made.shard(index) for index in range(len(made))]
    assert [len(one) for one in shards] == [made.size(index) for index in range(len(made))] == expected
    assert [file for one in shards for file in one] == files
    assert made.images == count
    assert [made.entry(number) for number in range(count)] == files
    assert made.bytes == sum(range(count))
    assert [made.shard(index) for index in reversed(range(len(made)))] == shards[::-1]


def test_a_shard_is_never_more_than_a_file_holds() -> None:
    made = Listing((Entry(str(number), 1) for number in range(1000)), 9999)
    assert [made.size(index) for index in range(len(made))] == [MAX_ROWS_A_FILE, 1000 - MAX_ROWS_A_FILE]


# Prompt tables

ROWS: dict[str, list[dict[str, Any]]] = {
    "box": [
        {"image_uri": "a.png", "box": [1, 2, 3.5, 4]},
        {"image_uri": f"{BASE}/d/b c.png", "box": [5, 6, 7, 8]},
        {"image_uri": f"{BASE}/a.png", "box": [9, 10, 11, 12]},
    ],
    "points": [
        {"image_uri": "a.png", "points": [[1, 2], [3.5, 4]], "labels": [1, 0]},
        {"image_uri": f"{BASE}/d/b c.png", "points": [[5, 6]], "labels": [1]},
        {"image_uri": f"{BASE}/a.png", "points": [[9, 10]], "labels": [0]},
    ],
    "box+points": [
        {"image_uri": "a.png", "box": [1, 2, 3.5, 4], "points": [[1, 2]], "labels": [0]},
        {"image_uri": f"{BASE}/d/b c.png", "box": [5, 6, 7, 8], "points": [[5, 6]], "labels": [1]},
        {"image_uri": f"{BASE}/a.png", "box": [9, 10, 11, 12], "points": [[9, 10], [1, 1]], "labels": [1, 1]},
    ],
}


def table(rows: list[dict[str, Any]], suffix: str) -> bytes:
    """As people write it: Parquet by pyarrow, CSV by Polars, JSONL by Python."""
    if suffix == "parquet":
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), file)
        return file.getvalue()
    if suffix == "csv":
        texts = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
        return pl.DataFrame(texts).write_csv().encode()
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def damaged(parquet: bytes) -> bytes:
    """With a footer that does not parse."""
    return parquet[:-60] + b"\xff" * 52 + parquet[-8:]


def read(folder: Path, content: bytes | str, suffix: str = "jsonl", base: str = BASE) -> dict[str, ImagePrompts]:
    path = folder / f"prompts.{suffix}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return prompts.read(Storage(), str(path), base)


def refused(folder: Path, content: bytes | str, suffix: str = "jsonl") -> str:
    """The message, which is one line and names the table."""
    with pytest.raises(InvalidPrompt) as caught:
        read(folder, content, suffix)
    assert "\n" not in str(caught.value)
    assert f"prompts.{suffix}" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "ndjson"])
@pytest.mark.parametrize("kind", ROWS)
def test_tables_of_every_kind(tmp_path: Path, kind: str, suffix: str) -> None:
    found = read(tmp_path, table(ROWS[kind], suffix), suffix)
    assert [*found] == [f"{BASE}/a.png", f"{BASE}/d/b c.png"]  # relative and full names of one image are one
    first, second = found.values()
    assert (first.type, len(first.prompts), len(second.prompts)) == (kind, 2, 1)
    if "box" in kind:
        assert first.prompts.boxes is not None
        assert first.prompts.boxes.dtype == np.float32
        assert first.prompts.boxes.tolist() == [[1, 2, 3.5, 4], [9, 10, 11, 12]]
    if kind == "points":
        assert first.prompts.points is not None
        assert first.prompts.labels is not None
        assert first.prompts.points.dtype == np.float32
        assert first.prompts.points.tolist() == [[[1, 2], [3.5, 4]], [[9, 10], [0, 0]]]
        assert first.prompts.labels.tolist() == [[1, 0], [0, -1]]  # −1 pads
    expected = [{k: v for k, v in row.items() if k != "image_uri"} for row in (ROWS[kind][0], ROWS[kind][2])]
    assert [json.loads(text) for text in first.texts] == expected
    first.prompts.check((100, 100))


def test_labels_may_be_left_out(tmp_path: Path) -> None:
    (one,) = read(tmp_path, '{"image_uri": "a", "points": [[1, 2], [3, 4]]}').values()
    assert one.prompts.labels is not None
    assert one.prompts.labels.tolist() == [[1, 1]]


def test_kinds_may_differ_between_images(tmp_path: Path) -> None:
    rows = [{"image_uri": "a", "box": [1, 2, 3, 4]}, {"image_uri": "b", "points": [[1, 2]], "labels": [1]}]
    assert [one.type for one in read(tmp_path, table(rows, "jsonl")).values()] == ["box", "points"]
    path = tmp_path / "pandas.parquet"
    pd.DataFrame(rows).to_parquet(path)  # writes nulls where a row has no such key
    assert [one.type for one in prompts.read(Storage(), str(path), BASE).values()] == ["box", "points"]


def test_a_cell_of_csv_may_be_empty(tmp_path: Path) -> None:
    found = read(tmp_path, 'image_uri,box,points\na,"[1,2,3,4]",\nb,,"[[1,2]]"\n', "csv")
    assert [one.type for one in found.values()] == ["box", "points"]


def test_names_are_full_or_relative_to_the_input(tmp_path: Path) -> None:
    text = "\n".join(json.dumps({"image_uri": name, "box": [1, 2, 3, 4]}) for name in ("a", "/b", "s3://c/d", "e/ü f"))
    assert [*read(tmp_path, text, base="/in/")] == ["/in/a", "/b", "s3://c/d", "/in/e/ü f"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"box": [1, 2, 3, 4]}', "no image_uri"),
        ('{"image_uri": 7, "box": [1, 2, 3, 4]}', "no image_uri"),
        ("[1]", "no image_uri"),
        ('{"image_uri": "a"}', "neither box nor points"),
        ('{"image_uri": "a", "box": null}', "neither box nor points"),
        ('{"image_uri": "a", "labels": [1]}', "neither box nor points"),
        ('{"image_uri": "a", "box": [1, 2, 3]}', "4 numbers, found 3"),
        ('{"image_uri": "a", "box": 5}', "row 1"),
        ('{"image_uri": "a", "box": {"x": 1}}', "row 1"),
        ('{"image_uri": "a", "box": [1, 2, 3, "x"]}', "row 1"),
        ('{"image_uri": "a", "box": [1, 2, 3, null]}', "row 1"),
        ('{"image_uri": "a", "box": "1, 2, 3, 4"}', "row 1"),
        ('{"image_uri": "a", "points": []}', "0 points"),
        ('{"image_uri": "a", "points": [[1]]}', "row 1"),
        ('{"image_uri": "a", "points": [[1, 2, 3]]}', "row 1"),
        ('{"image_uri": "a", "points": [1, 2]}', "row 1"),
        ('{"image_uri": "a", "points": [[1, 2]], "labels": [1, 0]}', "1 points with 2 labels"),
        ('{"image_uri": "a", "points": [[1, 2]], "labels": ["x"]}', "row 1"),
        ('{"image_uri": "a", "points": [[1, 2]], "labels": [NaN]}', "row 1"),
        ('{"image_uri": "a", "points": [[1, 2]], "labels": [1e999]}', "row 1"),
        ('{"image_uri": "a", "points": [[1, 2]], "labels": [99999999999]}', "row 1"),
        (f'{{"image_uri": "a", "box": [1, 2, 3, {10**400}]}}', "row 1"),
        ('{"image_uri": "a", "box": [1, 2, NaN, 4]}', "row 1"),
        ('{"image_uri": "a", "box": [1, 2, 1e300, 4]}', "row 1"),
        ('{"image_uri": "a", "points": [[1, 2]], "labels": [0.7]}', "row 1"),
    ],
)
def test_a_wrong_row_is_refused_by_its_number(tmp_path: Path, row: str, said: str) -> None:
    message = refused(tmp_path, '{"image_uri": "a", "box": [1, 2, 3, 4]}\n' + row)
    assert "row 1" in message
    assert said in message


@pytest.mark.parametrize(
    ("suffix", "content", "said"),
    [
        ("txt", "image_uri", "expected .parquet, .csv or .jsonl"),
        ("parquet", b"no parquet", "could not be read"),
        ("parquet", table([{"image_uri": "a", "boxes": 1}], "parquet"), "has columns boxes, image_uri"),
        ("csv", "name,box\na,b\n", "has columns box, name"),
        ("csv", "", "could not be read"),
        ("csv", "image_uri,box\na,[1,2,3,4]\n", "could not be read"),
        ("jsonl", '{"image_uri": ', "could not be read"),
        ("jsonl", b"\xff\xfe", "could not be read"),
        ("parquet", damaged(table(ROWS["box"], "parquet")), "could not be read"),
    ],
)
def test_what_is_no_prompt_table(tmp_path: Path, suffix: str, content: bytes | str, said: str) -> None:
    assert said in refused(tmp_path, content, suffix)


def test_only_a_newline_ends_a_row(tmp_path: Path) -> None:
    rows = [{"image_uri": name, "box": [1, 2, 3, 4]} for name in ("a\u2028b", "c")]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    assert [*read(tmp_path, text)] == [f"{BASE}/a\u2028b", f"{BASE}/c"]


@pytest.mark.parametrize(
    "kinds", [("box", "points"), ("box", "box+points"), ("points", "box+points")], ids=lambda kinds: " ".join(kinds)
)
def test_one_image_has_prompts_of_one_kind(tmp_path: Path, kinds: tuple[str, str]) -> None:
    message = refused(tmp_path, table([ROWS[kind][0] for kind in kinds], "jsonl"))
    assert "of different kinds" in message
    assert f"{BASE}/a.png" in message


@pytest.mark.parametrize(("suffix", "content"), [("jsonl", ""), ("csv", "image_uri,box\n")])
def test_an_empty_table_is_refused(tmp_path: Path, suffix: str, content: str) -> None:
    refused(tmp_path, content, suffix)


def test_a_table_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"none\.csv"):
        prompts.read(Storage(), str(tmp_path / "none.csv"), BASE)


# Estimates


def png(width: int = 20, height: int = 10) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(file, "PNG")
    return file.getvalue()


def test_a_sample_is_spread_over_the_whole() -> None:
    assert [estimate.spread(*each) for each in ((3, 9), (5, 2), (1, 100), (4, 0))] == [[0, 3, 6], [0, 1], [0], []]


@pytest.mark.parametrize(("size", "said"), [(0, "0 bytes"), (999, "999 bytes"), (2_097_152, "2.1 MB"), (2e12, "2 TB")])
def test_amounts_are_in_the_unit_for_them(size: float, said: str) -> None:
    assert estimate.amount(size) == said


def test_an_estimate_in_words() -> None:
    listing = Listing((Entry(f"/x/{number}.png", 1_000_000) for number in range(10_000)), 256)
    rate = estimate.Rate(images=64, errors=1, masks=640, bytes_written=64 * 2_000_000, images_per_second=20.0)
    shapes = [(2000, 1000), (100, 100), (512, 512)]
    assert estimate.lines(listing, shapes, rate, {"nano-encoder": 4}, 3.0) == [
        "images     10,000 in 40 shards of at most 256",
        "input      10 GB",
        "sizes      100 × 100 to 2000 × 1000 px, median 512 × 512, by 3 headers",
        "output     about 20 GB: 2 MB and 10.0 masks an image",
        "rate       20.00 img/s on 64 images, 1 of them errors, with nano-encoder × 4",
        "time       about 8 min at that rate; more replicas take less",
        "cost       $1.67, $0.167 per 1,000 images, at $3 an hour for each replica",
    ]


def test_sizes_are_those_of_the_headers(place: Place) -> None:
    for name, content in (("a.png", png(40, 30)), ("b.png", b"no image"), ("c.png", png(20, 10))):
        place.storage.publish(join(place.uri, name), content)
    entries = [*images.find(place.storage, place.uri), Entry(join(place.uri, "none.png"), 1)]
    assert estimate.sizes(place.storage, entries, Limits()) == [(40, 30), (20, 10)]
