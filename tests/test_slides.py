"""Images copied to a disk and read by windows, from where images are."""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from cluster.errors import InvalidImage, NotFound, TooLarge, UnsupportedImage
from cluster.settings import Limits
from cluster.storage import Storage, join
from jobs import images
from jobs.images import Entry
from jobs.slides import Copy
from jobs.views import View
from serve_app import contract
from serve_app.model.slides import Held, Slide
from tests.s3 import Place, place_fixture, s3_fixture  # noqa: F401

PIXELS = np.random.default_rng(0).integers(0, 1 << 16, (2, 60, 80)).astype(np.uint16)  # two channels
ALL = slice(None), slice(None)
SMALL = Limits(image_pixels=1000)


def tiff() -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, PIXELS, tile=(32, 32), compression="zlib", ome=True, metadata={"axes": "CYX"})
    return file.getvalue()


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("limits", [Limits(), SMALL, Limits(image_bytes=1000)], ids=["held", "pixels", "bytes"])
def test_windows_are_the_same_however_large(place: Place, limits: Limits, temporary: Path) -> None:
    data, uri = tiff(), join(place.uri, "a.tif")
    place.storage.publish(uri, data)
    with Copy(place.storage, Entry(uri, 0), limits) as copy:
        assert copy.large == (limits != Limits())
        assert copy.image_id() == contract.image_id(data)
        assert copy.image_id("z=1") == contract.image_id(data, "z=1")
        for text, expected in {
            "": PIXELS[:1],
            "channels=grey=1": PIXELS[1:],
            "channels=nuclear=0,membrane=1": np.stack([np.zeros_like(PIXELS[0]), *PIXELS]),
            "z=0": PIXELS,
        }.items():
            windows = copy.windows(View.parse(text))
            assert isinstance(windows, Slide if copy.large else Held)
            assert windows.size == (60, 80)
            np.testing.assert_array_equal(windows.read(slice(20, 40), ALL[1]), np.moveaxis(expected[:, 20:40], 0, -1))
            windows.close()
        windows = copy.windows(View(crop="10,20,30,35"))
        assert windows.size == (35, 30)
        np.testing.assert_array_equal(windows.read(*ALL)[..., 0], PIXELS[0, 20:55, 10:40])
        np.testing.assert_array_equal(windows.read(slice(5, 7), slice(28, 90))[..., 0], PIXELS[0, 25:27, 38:40])
        with pytest.raises(InvalidImage, match=r"the crop 60,0,30,60 .* is empty or leaves .* 80 × 60 pixels"):
            copy.windows(View(crop="60,0,30,60"))
        windows.close()
    assert not [*temporary.iterdir()]


def test_depths_are_those_of_the_stack(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.ome.tif", np.zeros((2, 3, 60, 80), np.uint8), metadata={"axes": "TZYX"})
    for limits in (Limits(), SMALL):
        with Copy(Storage(), Entry(str(tmp_path / "a.ome.tif"), 0), limits) as copy:
            assert copy.depths == (3, 2)


def test_images_in_other_files(tmp_path: Path) -> None:
    data = tiff()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("in it/a.tif")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    pq.write_table(pa.table({"image": [b"other", data]}), tmp_path / "a.parquet")
    (inside,) = images.find(Storage(), str(tmp_path / "a.tar"))
    for entry in (inside, [*images.find(Storage(), str(tmp_path / "a.parquet"))][1]):
        with Copy(Storage(), entry, SMALL) as copy:
            assert copy.image_id() == contract.image_id(data)
            np.testing.assert_array_equal(copy.windows(View()).read(*ALL)[..., 0], PIXELS[0])


def test_what_is_refused(tmp_path: Path, temporary: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff())
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    storage = Storage()
    with pytest.raises(TooLarge, match=r"a\.tif is larger than the limit of 1000 bytes"):
        Copy(storage, Entry(str(tmp_path / "a.tif"), 0), Limits(slide_bytes=1000))
    with pytest.raises(NotFound):
        Copy(storage, Entry(str(tmp_path / "none.tif"), 0), Limits())
    assert not [*temporary.iterdir()]
    for limits, name, error in [
        (Limits(image_pixels=1000, slide_pixels=4799), "a.tif", TooLarge),
        (Limits(image_pixels=1000), "a.png", TooLarge),
        (Limits(image_bytes=1000), "a.png", UnsupportedImage),
    ]:
        with Copy(storage, Entry(str(tmp_path / name), 0), limits) as copy, pytest.raises(error):
            copy.windows(View())
