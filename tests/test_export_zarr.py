"""Embeddings as micro-sam reads them."""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from cluster.errors import InvalidInput, InvalidSettings, NotFound
from cluster.settings import Limits
from cluster.storage import Storage, join
from jobs import cli, export, export_zarr
from serve_app import contract, dataset
from serve_app.commit import ShardWriter
from serve_app.contract import Embedding
from serve_app.dataset import EMBEDDINGS
from serve_app.model import preprocess
from tests.s3 import Place, place_fixture, s3_fixture  # noqa: F401

zarr = pytest.importorskip("zarr")
imageio = pytest.importorskip("imageio.v3")
METADATA = {"fingerprint": "f" * 64, "encoder_sha256": "e" * 64, "model": "sam_vit_b", "trained": "true"}


def random(*shape: int, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, 200, shape).astype(dtype)


def file(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    if kind == "tif":
        tifffile.imwrite(content, pixels, **options)
    else:
        Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def palette() -> bytes:
    content = io.BytesIO()
    Image.fromarray(random(16, 16, 3)).convert("P").save(content, "png")
    return content.getvalue()


def embed(place: Place, images: dict[str, bytes], model: str = "sam_vit_b", grid: int = 64) -> dict[str, np.ndarray]:
    """The images in place/in, and embeddings of them in place/out."""
    arrays = {}
    with ShardWriter(place.storage, join(place.uri, "out"), "embed", 0, METADATA) as writer:
        for number, (name, data) in enumerate(images.items()):
            uri = join(place.uri, "in", name)
            place.storage.publish(uri, data)
            image = preprocess.resize(preprocess.decode(data, 1 << 20), 1024)
            arrays[name] = np.random.default_rng(number).standard_normal((256, grid, grid)).astype(np.float16)
            made = Embedding(name, contract.image_id(data), model, "e" * 64, image.original, image.input, arrays[name])
            writer.add(EMBEDDINGS, dataset.embedding_row(made, uri, np.zeros(256, np.float32)))
        writer.commit()
    return arrays


def run(place: Place, to: str, model: str | None = None) -> tuple[int, list[str]]:
    found, problems = dataset.open(join(place.uri, "out"), place.storage), list[str]()
    uris = export_zarr.uris(found)
    calls: list[int] = []
    names = export.Names(uris)
    count = export_zarr.write(found, names, to, model, Limits(), lambda: calls.append(1), problems.append)
    assert len(calls) == len(uris)
    return count, problems


def load(path: Path, image: np.ndarray, name: str) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]:
    """What precompute_image_embeddings of micro-sam 1.8 does where its save_path exists: raises where it does, warns
    where it does, else → (features, input_size, original_size)."""
    group = zarr.open(path, mode="a")
    assert "input_size" in group.attrs, "it would take this for empty, and compute"
    signature = {
        "data_signature": hashlib.sha1(np.asarray(image).tobytes()).hexdigest(),
        "tile_shape": None,
        "halo": None,
        "model_type": name[:5],
        "model_name": name,
        "micro_sam_version": "1.8.10",
        "model_hash": "its own",
    }
    for key, value in signature.items():
        if key not in group.attrs or group.attrs[key] != value:
            if key not in ("micro_sam_version", "model_hash", "model_name"):
                raise RuntimeError(f"{key}: {group.attrs.get(key)} != {value}")
            warnings.warn(key, stacklevel=2)
    features = group["features"][:]
    assert features.ndim == 4
    return features, tuple(group.attrs["input_size"]), tuple(group.attrs["original_size"])


IMAGES = {
    "a.png": file(random(30, 40, 3), "png"),
    "grey.png": file(random(50, 20), "png"),
    "plate 1/deep.tif": file(random(33, 44, dtype="uint16"), "tif"),
    "plate 1/palette.png": palette(),
    "ü.jpg": file(random(24, 31, 3), "jpeg"),
}


@pytest.mark.filterwarnings("ignore:micro_sam_version", "ignore:model_hash")
def test_what_is_written_is_what_micro_sam_would_have_stored(tmp_path: Path) -> None:
    place = Place(Storage(), str(tmp_path))
    arrays = embed(place, IMAGES)
    for _ in range(2):  # the same once more changes nothing
        assert run(place, str(tmp_path / "to")) == (len(IMAGES), [])
    for name, array in arrays.items():
        seen = imageio.imread(tmp_path / "in" / name)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "model_name")
            features, input_size, original = load(tmp_path / "to" / Path(name).with_suffix(".zarr"), seen, "vit_b")
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, array[None].astype(np.float32))
        assert original == seen.shape[:2]
        assert (max(input_size), input_size[0] > input_size[1]) == (1024, original[0] > original[1])


def test_to_s3_too(place: Place, tmp_path: Path) -> None:
    embed(place, {"a.png": IMAGES["a.png"]})
    to = join(place.uri, "to")
    assert run(place, to, "vit_b_lm") == (1, [])
    for name in (".zgroup", ".zattrs", "features/.zarray", "features/0.0.0.0"):
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        place.storage.fetch(join(to, "a.zarr", name), path)
    with pytest.warns(UserWarning, match="model_hash"), pytest.warns(UserWarning, match="micro_sam_version"):
        load(tmp_path / "copy", imageio.imread(IMAGES["a.png"]), "vit_b_lm")


def test_micro_sam_would_refuse_another_image_and_another_model(tmp_path: Path) -> None:
    place = Place(Storage(), str(tmp_path))
    embed(place, {"a.png": IMAGES["a.png"]})
    run(place, str(tmp_path / "to"))
    image = imageio.imread(IMAGES["a.png"])
    with pytest.raises(RuntimeError, match="data_signature"):
        load(tmp_path / "to" / "a.zarr", image[::-1], "vit_b")
    with pytest.raises(RuntimeError, match="model_type"):
        load(tmp_path / "to" / "a.zarr", image, "vit_l")


def test_an_image_that_is_not_what_was_embedded_is_named_and_left_out(tmp_path: Path) -> None:
    place = Place(Storage(), str(tmp_path))
    turned = Image.Exif()
    turned[preprocess.ORIENTATION] = 3
    embed(
        place,
        {
            "a.png": IMAGES["a.png"],
            "changed.png": IMAGES["grey.png"],
            "gone.png": IMAGES["grey.png"],
            "stack.tif": file(random(5, 33, 44), "tif", photometric="minisblack"),
            "turned.jpg": file(random(24, 24, 3), "jpeg", exif=turned),
        },
    )
    (tmp_path / "in" / "changed.png").write_bytes(IMAGES["a.png"])
    (tmp_path / "in" / "gone.png").unlink()
    count, problems = run(place, str(tmp_path / "to"))
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["a.zarr"]
    assert count == 1
    reasons = ["has changed since it was embedded", "was not found", "reads it as 5 × 33 × 44", "reads it as 24 × 24"]
    for problem, reason in zip(problems, reasons, strict=True):
        assert reason in problem


def test_embeddings_that_micro_sam_does_not_know(tmp_path: Path) -> None:
    place = Place(Storage(), str(tmp_path))
    embed(place, {"a.png": IMAGES["a.png"]}, "nano", 16)
    with pytest.raises(InvalidInput, match=r"shape \[256, 16, 16\]; micro-sam reads those of SAM models of 1024 px"):
        run(place, str(tmp_path / "to"), "vit_b")
    other = Place(Storage(), str(tmp_path / "other"))
    embed(other, {"a.png": IMAGES["a.png"]}, "my_sam")
    with pytest.raises(InvalidInput, match="'my_sam' is no model of micro-sam: give the one that has this encoder"):
        run(other, str(tmp_path / "to"))
    with pytest.raises(InvalidInput, match="'sam_b' is no model"):
        run(other, str(tmp_path / "to"), "sam_b")
    assert not (tmp_path / "to").exists()
    empty = str(tmp_path / "empty")
    with ShardWriter(Storage(), empty, "embed", 0, METADATA) as writer:
        writer.commit()
    with pytest.raises(NotFound, match=r"run jobs\.embed first"):
        export_zarr.uris(dataset.open(empty))


def test_a_tile_is_not_an_image(tmp_path: Path) -> None:
    with ShardWriter(Storage(), str(tmp_path), "embed", 0, METADATA) as writer:
        made = Embedding("id", "image", "vit_b", "e" * 64, (64, 64), (1024, 1024), np.zeros(export_zarr.SHAPE, "f2"))
        row = dataset.embedding_row(made, "/a.png", np.zeros(256, np.float32), part="xywh=0,0,64,64")
        writer.add(EMBEDDINGS, row)
        writer.commit()
    with pytest.raises(InvalidInput, match=r"1 embeddings of planes, channels or tiles \(like xywh=0,0,64,64\)"):
        export_zarr.uris(dataset.open(str(tmp_path)))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(Storage(), str(tmp_path))
    embed(place, {"a.png": IMAGES["a.png"], "b.png": IMAGES["grey.png"]})
    words = ["export", str(tmp_path / "out"), "--to", "zarr", str(tmp_path / "to")]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"2 images to {tmp_path}/to\n"
    (tmp_path / "in" / "b.png").unlink()
    assert cli.main(words) == 1
    assert "b.png is left out: " in capsys.readouterr().out
    assert cli.main(["export", words[1], "--to", "coco", "x", "--micro-sam-model", "vit_b"]) == 2
    monkeypatch.setattr(export_zarr, "find_spec", lambda name: None if name == "zarr" else 1)
    with pytest.raises(InvalidSettings, match=r"--to zarr needs zarr: pip install 'cellray\[zarr\]'"):
        export_zarr.check()
