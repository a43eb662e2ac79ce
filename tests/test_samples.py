"""The sample images are what their names say, the same at every run, and the broken ones are broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError

from jobs import samples

pytest.importorskip("skimage")

PILLOW = {  # what a name ends with → the format and mode in which Pillow opens it
    "_grey8.png": ("PNG", "L"),
    "_grey16.png": ("PNG", "I;16"),
    "_palette.png": ("PNG", "P"),
    "_rgb.png": ("PNG", "RGB"),
    "_rgba.png": ("PNG", "RGBA"),
    "_grey8.jpg": ("JPEG", "L"),
    "_rgb.jpg": ("JPEG", "RGB"),
    "_cmyk.jpg": ("JPEG", "CMYK"),
    "_exif6.jpg": ("JPEG", "RGB"),
}
TIFF = {  # what a name ends with → dtype, channels, pages, the largest value there can be
    "_grey8.tif": ("uint8", 1, 1, 255),
    "_rgb8.tif": ("uint8", 3, 1, 255),
    "_grey12.tif": ("uint16", 1, 1, 4095),
    "_rgb16.tif": ("uint16", 3, 1, 65535),
    "_float32.tif": ("float32", 1, 1, 1),
    "cell_pages.tif": ("uint8", 1, 3, 255),
    "ihc_pages.tif": ("uint8", 3, 3, 255),
    "multipage.tif": ("uint8", 1, 2, 255),
    "multipage_rgb.tif": ("float64", 3, 2, 1),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    samples.write_samples(folder)
    return folder


def good(out: Path) -> list[Path]:
    return sorted(path for path in out.iterdir() if path.is_file())


def read(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_same_names_and_bytes_every_time(out: Path, tmp_path: Path) -> None:
    first = samples.write_samples(tmp_path / "again")
    once = read(tmp_path / "again")
    assert samples.write_samples(tmp_path / "again") == first
    assert read(tmp_path / "again") == once == read(out)
    assert sorted(once) == sorted(str(path.relative_to(tmp_path / "again")) for path in first)
    assert len(good(out)) == 35


def test_every_image_is_what_its_name_says(out: Path) -> None:
    for path in good(out):
        if path.suffix == ".tif":
            dtype, channels, pages, top = next(TIFF[end] for end in TIFF if path.name.endswith(end))
            with tifffile.TiffFile(path) as tiff:
                arrays = [page.asarray() for page in tiff.pages]
                assert tiff.pages.first.samplesperpixel == channels, path.name
            assert [str(array.dtype) for array in arrays] == [dtype] * pages, path.name
            assert top / 2 <= max(array.max() for array in arrays) <= top, path.name  # used, and not left
            assert max(arrays[0].shape) <= 1500
        else:
            claim = next(PILLOW[end] for end in PILLOW if path.name.endswith(end))
            with Image.open(path) as image:
                image.load()
                assert (image.format, image.mode) == claim, path.name
                assert max(image.size) <= 1500


def test_lossless_variants_hold_the_same_picture(out: Path) -> None:
    cell = np.asarray(Image.open(out / "cell_grey8.png"))
    assert np.array_equal(np.asarray(Image.open(out / "cell_grey16.png")) // 257, cell)
    assert np.array_equal(np.asarray(Image.open(out / "cell_palette.png").convert("L")), cell)
    assert np.array_equal(tifffile.imread(out / "cell_grey12.tif") >> 4, cell)
    assert np.array_equal(np.rint(tifffile.imread(out / "cell_float32.tif") * 255), cell)
    assert np.array_equal(tifffile.imread(out / "cell_pages.tif")[0], cell)
    ihc = np.asarray(Image.open(out / "ihc_rgb.png"))
    assert np.array_equal(tifffile.imread(out / "ihc_rgb16.tif") // 257, ihc)
    assert np.array_equal(np.asarray(Image.open(out / "ihc_rgb8.tif")), ihc)
    assert np.array_equal(tifffile.imread(out / "ihc_pages.tif")[0], ihc)


def test_the_phone_jpeg_stands_up_when_the_tag_is_obeyed(out: Path) -> None:
    with Image.open(out / "chelsea_exif6.jpg") as image:
        assert image.getexif()[samples.EXIF_ORIENTATION] == 6
        upright = np.asarray(ImageOps.exif_transpose(image), dtype=int)
    original = np.asarray(Image.open(str(files("skimage.data") / "chelsea.png")), dtype=int)
    assert upright.shape == original.shape
    assert np.abs(upright - original).mean() < 5  # JPEG loses a little; a wrong turn would cost tens


def test_broken_ones_are_broken(out: Path) -> None:
    broken = out / "broken"
    for name in ("empty.png", "not_an_image.png"):
        with pytest.raises(UnidentifiedImageError):
            Image.open(broken / name)
    with Image.open(broken / "truncated.jpg") as image, pytest.raises(OSError, match="truncated"):
        image.load()
    with pytest.raises(Image.DecompressionBombError):  # raised on the header alone
        Image.open(broken / "bomb.png")
    assert (broken / "bomb.png").stat().st_size < 100_000
    nan = tifffile.imread(broken / "nan.tif")
    assert nan.dtype == np.float32
    assert 0 < np.isnan(nan).sum() < nan.size
    assert {f"broken/{path.name}" for path in broken.iterdir()} == set(samples.BROKEN)


def test_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert samples.main([str(tmp_path / "all")]) == 0
    said = re.escape(f"35 images and 5 broken ones in {tmp_path / 'all'}") + r" \(1\d\.\d MB\)\n"
    assert re.fullmatch(said, capsys.readouterr().out)
    assert samples.main([str(tmp_path / "good"), "--no-broken"]) == 0
    assert capsys.readouterr().out.startswith(f"35 images in {tmp_path / 'good'} (")
    assert not (tmp_path / "good" / "broken").exists()


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a run that must answer 2."""
    assert samples.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    return err


def test_out_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert "it is a file, not a folder" in error_of([str(file)], capsys)
    assert "Not a directory" in error_of([str(file / "sub")], capsys)
    assert "local folder is expected" in error_of(["s3://bucket/samples"], capsys)
    assert file.read_text() == "mine"

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(os, "replace", refuse)
    assert "Permission denied" in error_of([str(tmp_path / "closed")], capsys)
    assert read(tmp_path / "closed") == {}  # nothing half-written is left


def test_without_scikit_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("skimage", "skimage.data"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'cellray[samples]'" in error_of([str(tmp_path / "none")], capsys)
    assert not (tmp_path / "none").exists()


def test_nothing_heavy_at_import() -> None:
    code = "import jobs.samples, sys; assert not {'skimage', 'ray', 'torch'} & set(sys.modules)"
    root = Path(samples.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=root)
