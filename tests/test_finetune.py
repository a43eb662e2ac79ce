"""jobs.finetune: labels of three kinds, the loop with its checkpoints, and the job itself on a real Ray."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from cluster.errors import Diverged, InvalidInput, NotFound, Unavailable
from cluster.settings import Limits, Settings
from cluster.storage import Storage
from jobs import curves, embed, finetune, labels, segment, training_data, training_source
from jobs.training_data import Clock, Generated, Images, held_out
from jobs.training_loop import Request, Told, Training
from serve_app import contract, dataset, models
from serve_app.commit import ShardWriter
from serve_app.contract import Embedding
from serve_app.model import decoder, masks, modules, training_samples
from serve_app.model.checkpoint import ModelCard
from serve_app.model.prompts import DecodeRequest, Prompts
from serve_app.model.training import Plan, Trainer
from serve_app.model.training_samples import Sample
from tests.conftest import App
from tests.weights_of_sam import extracted

SIZE = 48, 64
STATE = modules.seeded("nano", 3)


def plane(seed: int) -> np.ndarray:
    """Three objects, one of a single pixel, and one in two pieces."""
    found = np.zeros(SIZE, np.uint16)
    found[4 + seed : 14 + seed, 6:20] = 3
    found[30:40, 30:44] = found[20:24, 50:60] = 700
    found[0, 63] = 9
    return found


def label_folder(folder: Path, number: int, suffix: str = "png") -> Path:
    folder.mkdir()
    for seed in range(number):
        if suffix == "png":
            Image.fromarray(plane(seed)).save(folder / f"image{seed}_masks.png")
        else:
            tifffile.imwrite(folder / f"image{seed}.tif", plane(seed).astype(np.uint32))
    return folder


def coco_file(path: Path, number: int, objects: Callable[[int], list[object]]) -> Path:
    shown = [{"id": i, "file_name": f"a/image{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in range(number)]
    notes = [{"image_id": i, "segmentation": one, "category_id": 1} for i in range(number) for one in objects(i)]
    path.write_text(json.dumps({"images": shown, "annotations": notes}))
    return path


def read(path: Path) -> labels.Labels:
    return labels.read(Storage(), str(path), Limits())


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_label_images_and_coco_say_the_same(tmp_path: Path, suffix: str) -> None:
    def runs(seed: int) -> list[object]:
        found = [plane(seed) == value for value in (3, 9, 700)]
        return [{"size": list(SIZE), "counts": text} for text in masks.encode(np.stack(found))]

    folder = read(label_folder(tmp_path / "labels", 2, suffix))
    coco = read(coco_file(tmp_path / "coco.json", 2, runs))
    for seed in range(2):
        uri = f"s3://bucket/plate/image{seed}.jpg"
        found = folder.find("", uri)
        assert found == coco.find("", uri)
        assert found is not None
        assert found.skipped == 1
        decoded = masks.decode(list(found.counts), SIZE)
        np.testing.assert_array_equal(decoded, [plane(seed) == 3, plane(seed) == 700])
    assert folder.find("", "image7.png") is None


def test_polygons_and_empty_objects_of_coco(tmp_path: Path) -> None:
    square = [[10.0, 10.0, 20.0, 10.0, 20.0, 30.0, 10.0, 30.0]]
    found = read(coco_file(tmp_path / "coco.json", 1, lambda _: [square, []])).find("", "image0.png")
    assert found is not None
    assert found.skipped == 1
    (mask,) = masks.decode(list(found.counts), SIZE)
    assert mask[10:30, 10:20].all()
    assert mask.sum() == 200


def test_names_in_several_folders(tmp_path: Path) -> None:
    for name, value in (("p1", 1), ("p2", 2)):
        (tmp_path / name).mkdir()
        found = np.zeros(SIZE, np.uint8)
        found[:value, :9] = 1
        Image.fromarray(found).save(tmp_path / name / "a.png")
    there = read(tmp_path)
    areas = [masks.decode(list(there.find("", f"/x/{p}/a.tif").counts), SIZE).sum() for p in ("p1", "p2")]  # type: ignore[union-attr]
    assert areas == [9, 18]
    with pytest.raises(InvalidInput, match="several labels"):
        there.find("", "/x/p3/a.tif")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"images": [{}], "annotations": []}', "no COCO file"),
        ("a.json", b"[", "no COCO file"),
        ("f/a.png", b"not an image", "no label image"),
        ("f/b.tif", None, "whole numbers"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is None:
        tifffile.imwrite(path, np.full(SIZE, 0.5, np.float32))
    else:
        path.write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        read(path if path.suffix == ".json" else path.parent)


def request(out: Path, **changes: object) -> Request:
    plan = Plan(lr=1e-3, loss="bce", rounds=2, seed=1)
    return replace(
        Request(Settings(), "nano", "in", "labels", str(out), plan, 3, math.inf, 2, 0.1, None, "float32"),
        **changes,  # type: ignore[arg-type]
    )


def test_labels_of_another_size_or_of_other_images(tmp_path: Path) -> None:
    there = read(label_folder(tmp_path / "labels", 2))
    asked = request(tmp_path / "out")
    found = training_source.matched(
        there, [("id", "x/image0.png", SIZE, "file", 7), ("no", "x/y.png", SIZE, "f", 8)], asked
    )
    assert [(one.image_id, one.uri, one.row) for one in found] == [("id", "file", 7)]
    with pytest.raises(InvalidInput, match=r"image1.png has 64 × 50 pixels, its labels .* 64 × 48"):
        training_source.matched(there, [("id", "x/image1.png", (50, 64), "file", 7)], asked)
    with pytest.raises(NotFound, match="none of the 1 images"):
        training_source.matched(there, [("id", "x/other.png", SIZE, "file", 7)], asked)


def stored(folder: Path, card: ModelCard, number: int, kept: str = "float16") -> Path:
    """A data set of random embeddings of images that `plane` labels."""
    names = {"fingerprint": "f" * 64, "encoder_sha256": card.encoder_sha256, "dtype": kept}
    dtype, pooled_only = ("float16", True) if kept == "pooled" else (kept, False)
    with ShardWriter(Storage(), str(folder), "embed", 0, names) as writer:
        for seed in range(number):
            image, array = contract.image_id(b"%d" % seed), np.random.default_rng(seed).normal(size=(256, 32, 32))
            own = contract.embedding_id(image, card.encoder_sha256, "float32")
            made = Embedding(own, image, "nano", card.encoder_sha256, SIZE, (192, 256), array.astype(dtype))
            uri = f"/plate/image{seed}.png"
            row = dataset.embedding_row(made, uri, made.pooled(8), pooled_only=pooled_only)
            writer.add(dataset.EMBEDDINGS, row)
        writer.commit()
    return folder


def test_embeddings_and_labels_become_samples(tmp_path: Path, folder: Path) -> None:
    card = ModelCard.read(folder)
    where = {"input": str(stored(tmp_path / "in", card, 3)), "masks": str(label_folder(tmp_path / "labels", 2))}
    found, note = training_source.source(request(tmp_path / "out", **where, validation=0.0), card)
    assert note.startswith("4 objects in 2 of 3 images, 0 of them for validation; 2 empty or one-pixel objects skipped")
    both = found.batch(0, 6, 0.0)
    assert {one.image_id for one in both} == {contract.image_id(b"0"), contract.image_id(b"1")}
    assert all(one.image.shape == (256, 32, 32) and len(one.masks) == len(one.boxes) == 2 for one in both)
    assert all(one.background is None for one in both)  # there may be objects that nobody labelled


def test_float32_embeddings_become_samples_and_pooled_ones_do_not(tmp_path: Path, folder: Path) -> None:
    card, labels = ModelCard.read(folder), str(label_folder(tmp_path / "labels", 2))
    given = str(stored(tmp_path / "in", card, 2, "float32"))
    found, _ = training_source.source(request(tmp_path / "out", input=given, masks=labels, validation=0.0), card)
    assert {one.image.dtype for one in found.batch(0, 2, 0.0)} == {np.dtype(np.float32)}
    given = str(stored(tmp_path / "pooled", card, 2, "pooled"))
    with pytest.raises(InvalidInput, match=r"pooled holds no embeddings: .* need jobs\.embed without it"):
        training_source.source(request(tmp_path / "x", input=given, masks=labels, validation=0.0), card)


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("another encoder", InvalidInput, r"made by another encoder \(abc.*embed the images with nano first"),
        ("another size", InvalidInput, r"image0.png has 64 × 48 pixels, its labels in .* 48 × 64"),
        ("other images", NotFound, r"none of the 3 images of .*/in \(like /plate/image0.png\) is labelled in .*other"),
        ("one pixel", InvalidInput, "hold no object of two pixels or more"),
        ("nothing", InvalidInput, "hold no object of two pixels or more"),
        ("all held out", InvalidInput, "all 1 labelled images are held out"),
    ],
)
def test_nothing_to_train_on(tmp_path: Path, folder: Path, case: str, error: type[Exception], message: str) -> None:
    own = ModelCard.read(folder)
    card = replace(own, encoder_sha256="abc" + own.encoder_sha256[3:]) if case == "another encoder" else own
    shown = plane(0)
    if case in ("one pixel", "nothing"):
        shown[:] = 0
        shown[7, 7] = case == "one pixel"
    name = "other" if case == "other images" else "image0"
    (tmp_path / "labels").mkdir()
    Image.fromarray(shown.T if case == "another size" else shown).save(tmp_path / f"labels/{name}.png")
    where = {"input": str(stored(tmp_path / "in", card, 3)), "masks": str(tmp_path / "labels")}
    with pytest.raises(error, match=message):
        training_source.source(request(tmp_path / "out", **where, validation=float(case == "all held out")), own)


def sample(seed: int, value: float | None = None) -> Sample:
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(256, 32, 32)).astype(np.float16)
    found = np.zeros((2, 60, 60), bool)
    found[0, 5 + seed : 25 + seed, 10:30] = found[1, 30:50, 20:50] = True
    made = training_samples.sample(
        f"image-{seed}", image if value is None else np.full_like(image, value), 256, 8, found
    )
    assert made is not None
    return made


class Made:
    """Batches without Ray; step `bad` holds numbers that are none."""

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad

    def batches(self, first: int, size: int, progress: Callable[[int], float]) -> Iterator[list[Sample]]:
        for step in range(first, 1000):
            yield [sample(step % 4, math.nan if step == self.bad else None)]

    def held(self) -> Iterator[Sample]:
        yield sample(9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extracted(STATE, tmp_path_factory.mktemp("nano"))


def run(folder: Path, asked: Request, made: Made, stop_at: int | None = None) -> list[Told]:
    trainer = Trainer(folder, asked.plan)
    stopping = lambda: stop_at is not None and trainer.step_count >= stop_at  # noqa: E731
    return list(Training(asked, trainer, 4, made, stopping).run(folder))


def without_time(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "curves.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path, folder: Path) -> None:
    whole, parts = request(tmp_path / "whole"), request(tmp_path / "parts")
    told = run(folder, whole, Made())
    assert [one.line["epoch"] for one in told if one.line] == [1, 2, 3]
    assert told[-1].progress == pytest.approx(1, abs=0.2)
    for stop_at in (1, 3, None):
        run(folder, parts, Made(), stop_at)
    assert without_time(tmp_path / "whole") == without_time(tmp_path / "parts")
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "parts/model.safetensors").read_bytes()
    (again,) = run(folder, whole, Made())
    assert "done" in again.note
    assert Image.open(tmp_path / "whole/curves.png").size == (curves.WIDTH, 2 * curves.HEIGHT)


def test_the_result_is_a_model_with_the_same_encoder(tmp_path: Path, folder: Path) -> None:
    run(folder, request(tmp_path / "out", epochs=1), Made())
    settings = Settings.model_validate(
        {
            "weights_dir": str(tmp_path / "cache"),
            "models": {"tuned": {"source": str(tmp_path / "out/model.safetensors")}},
        }
    )
    split = models.prepare(settings, "tuned")
    before, after = ModelCard.read(folder), ModelCard.read(split)
    assert after.encoder_sha256 == before.encoder_sha256
    assert after.decoder_sha256 != before.decoder_sha256
    assert (after.family, after.trained, after.architecture) == ("nano", True, before.architecture)
    asked = DecodeRequest(sample(0).image, (60, 60), Prompts(boxes=np.array([[10, 5, 30, 25]], np.float32)))
    (found,) = decoder.segment(decoder.load(split), [asked])
    assert len(found) == 1  # type: ignore[arg-type]


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tmp_path: Path, folder: Path) -> None:
    asked = request(tmp_path)
    with pytest.raises(Diverged, match=r"step 3, for the images image-3; the last checkpoint"):
        run(folder, asked, Made(bad=3))
    kept = (tmp_path / "_checkpoint.pt").read_bytes()
    with pytest.raises(Diverged, match="step 3"):
        run(folder, asked, Made(bad=3))
    assert (tmp_path / "_checkpoint.pt").read_bytes() == kept
    assert len(run(folder, asked, Made())) == 4


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(tmp_path)
    run(folder, asked, Made(), stop_at=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(Unavailable, match="disk is full"):
            run(folder, asked, Made(), stop_at=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    run(folder, asked, Made(), stop_at=2)


def test_damaged_checkpoints_are_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "_checkpoint.pt").write_bytes(b"\x80\x04damaged")
    with pytest.raises(InvalidInput, match="remove it to start again"):
        run(folder, request(tmp_path), Made())


def test_patience_ends_early(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: {"iou_box": 0.5, "iou_click": 0.5, "correlation": 0.0})
    told = run(folder, request(tmp_path, epochs=50, patience=2), Made())
    assert [one.line["epoch"] for one in told if one.line] == [1, 2, 3]


def test_synthetic_batches_are_a_function_of_seed_and_step() -> None:
    one, other = (Images(Generated(0), 256, 8, 64, 0) for _ in range(2))
    first = one.batch(5, 2, 0.0)
    again = [other.batch(step, 2, 0.0) for step in (4, 5)][1]
    assert [sample.image_id for sample in first] == [sample.image_id for sample in again]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.masks, b.masks)
        assert a.window in (128, 256)
        assert a.masks.shape[1:] == (a.window // 2, a.window // 2)
        assert a.background is not None  # of a generated field all objects are known
        assert (a.background + a.masks.max(0) <= training_samples.SUBSAMPLES**2).all()
    trained = {sample.image_id for step in range(3) for sample in one.batch(step, 2, 1.0)}
    assert not trained & {sample.image_id for sample in one.held(0, 2)}


def test_from_scratch_ever_fewer_fields_are_easy_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_data, "_generated", lambda seed, side, kind=None: kind)
    kinds = [Generated(3, scratch=True).train(number) for number in range(2 * training_data.EASY_FIELDS)]
    shares = [kinds[start : start + 200].count(training_data.EASY) / 200 for start in range(0, 1200, 200)]
    assert shares[0] > 0.75
    assert shares[0] > shares[1] > shares[2] > 0.05
    assert shares[3:] == [0, 0, 0]
    assert not any(Generated(3).train(number) for number in range(200))


def test_a_share_of_the_images_is_held_out_for_good() -> None:
    ids = [f"{index:064x}" for index in range(2000)]
    few, more = ({one for one in ids if held_out(one, share)} for share in (0.1, 0.3))
    assert few < more
    assert 150 < len(few) < 250
    assert not any(held_out(one, 0) for one in ids)


def test_the_clock_ends_with_what_comes_first() -> None:
    assert Clock(10, math.inf).progress(4) == 0.4
    assert Clock(math.inf, 100.0, spent=25.0).progress(10**6) == pytest.approx(0.25, abs=0.01)
    assert Clock(10, 100.0, spent=90.0).progress(4) == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize(
    "paths", [["a"], ["a", "b"], ["a", "b", "c", "--full", "x"], ["a", "b", "--full", "synthetic"]]
)
def test_wrong_numbers_of_paths(paths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune.main([*paths, "--model", "nano"])
    assert "expected" in capsys.readouterr().err


def images(folder: Path, number: int) -> Path:
    folder.mkdir()
    for seed in range(number):
        shown = np.where(plane(seed) > 0, 200, 50).astype(np.uint8) + np.uint8(seed)
        Image.fromarray(shown).save(folder / f"image{seed}.png")
    return folder


def test_the_job_from_images_to_a_model(app: App, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def job(*arguments: object, module: object = finetune) -> tuple[int, str]:
        code = module.main([*map(str, arguments), "--model", "nano", "--config", app.config])  # type: ignore[attr-defined]
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    shown, given = images(tmp_path / "images", 6), label_folder(tmp_path / "labels", 6)
    stored, out = tmp_path / "stored", tmp_path / "out"
    assert job(shown, stored, module=embed)[0] == 0
    command = (stored, given, out, "--epochs", 2, "--batch", 2, "--validation", 0.4)
    code, text = job(*command)
    assert code == 0, text
    assert "12 objects in 6 of 6 images" in text
    assert "6 empty or one-pixel objects skipped" in text
    assert len(without_time(out)) == 2
    assert (out / "model.safetensors").exists()
    assert "nothing is left to do" in job(*command)[1]
    code, text = job(*command, "--seed", 4)
    assert code == 1
    assert "seed" in text
    code, text = job(given, tmp_path / "both", "--full", shown, "--epochs", 1, "--batch", 3)
    assert code == 0, text
    grid = ("--grid", 2, "--pred-iou-thresh=-inf", "--stability-score-thresh", 0)
    assert job(shown, stored, "--embeddings", stored, *grid, module=segment)[0] == 0
    code, text = job(stored, stored, tmp_path / "own", "--epochs", 1)
    assert code == 0, text
    (shown / "config.yaml").write_text(Path(app.config).read_text() + "models: {nano: {source: 'seeded:nano:7'}}\n")
    code = finetune.main(
        [str(stored), str(given), str(tmp_path / "x"), "--model", "nano", "--config", str(shown / "config.yaml")]
    )
    assert code == 2
    assert "made by another encoder" in capsys.readouterr().err
