"""Synthetic fields are the same everywhere, their labels are valid, and the picture shows what the labels say."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from cluster.errors import InvalidInput
from jobs import cli, synthetic

ROOT = Path(__file__).parent.parent
SEEDS, SIZE = range(24), (96, 112)
DIGEST = (
    "import hashlib, sys\nfrom jobs import synthetic\nfor seed in range(24):\n"
    "    made = synthetic.field(seed, (96, 112))\n"
    "    print(made.kind, hashlib.sha256(made.image.tobytes() + made.labels.tobytes()).hexdigest())"
)


def digests() -> list[str]:
    fields = [synthetic.field(seed, SIZE) for seed in SEEDS]
    return [f"{f.kind} {hashlib.sha256(f.image.tobytes() + f.labels.tobytes()).hexdigest()}" for f in fields]


def test_the_same_bytes_again_whatever_came_between() -> None:
    first = digests()
    assert digests()[::-1] == first[::-1]
    assert len(set(first)) == len(first)


def test_the_same_bytes_in_another_process_without_the_processor_s_vector_units() -> None:
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(found), "OMP_NUM_THREADS": "3"}
    printed = subprocess.run(
        [sys.executable, "-c", DIGEST],
        check=True,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert printed.stdout.splitlines() == digests()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**40),
    size=st.tuples(st.integers(16, 160), st.integers(16, 160)),
    kind=st.sampled_from([None, *synthetic.NAMES]),
    dtype=st.sampled_from(["uint8", "uint16"]),
)
def test_labels_are_whole_numbered_and_of_the_image_s_size(
    seed: int, size: tuple[int, int], kind: str | None, dtype: str
) -> None:
    made = synthetic.field(seed, size, kind, dtype)
    assert made.kind == kind or (kind is None and made.kind in synthetic.NAMES)
    assert made.image.dtype == dtype
    assert made.image.shape[:2] == made.labels.shape == size
    assert made.image.shape[2] == 3 if dtype == "uint8" else made.image.shape[2] in (1, 2, 3)
    assert made.image.flags.c_contiguous
    assert made.labels.dtype == np.int32
    numbers, areas = np.unique(made.labels, return_counts=True)
    assert numbers[numbers > 0].tolist() == list(range(1, made.labels.max() + 1))
    assert (areas[numbers > 0] >= 9).all()
    for index, box in enumerate(ndimage.find_objects(made.labels), 1):
        assert ndimage.label(made.labels[box] == index)[1] == 1
    assert (made.labels.max() == 0) == (made.kind == synthetic.EMPTY)


@pytest.mark.parametrize("kind", [name for name in synthetic.NAMES if name != synthetic.EMPTY])
def test_the_picture_changes_where_the_labels_do(kind: str) -> None:
    """Outlines are darker or brighter than their surroundings, or grey varies more there, beside the same outlines
    moved across the field."""
    contrast = []
    for seed in range(12):
        made = synthetic.field(seed, (128, 128), kind)
        grey, labels = ndimage.gaussian_filter(made.image.astype(float).mean(-1), 0.7), made.labels
        mean, square = (ndimage.uniform_filter(values, 5) for values in (grey, grey * grey))
        varies = np.sqrt(np.maximum(square - mean * mean, 0))[8:-8, 8:-8]
        stands_out = (grey - ndimage.uniform_filter(grey, 15))[8:-8, 8:-8]
        outline = (ndimage.maximum_filter(labels, 3) != ndimage.minimum_filter(labels, 3))[8:-8, 8:-8]
        moved = np.roll(outline, (37, 53), (0, 1))
        if outline.any() and not outline.all():
            line = (abs(stands_out[outline].mean()) - abs(stands_out[moved].mean())) / stands_out.std()
            contrast.append(max(varies[outline].mean() / varies[moved].mean(), 1 + line))
    assert len(contrast) >= 8
    assert np.median(contrast) > 1.3, contrast


def test_the_suite_has_small_and_large_few_and_many() -> None:
    made = [synthetic.field(seed, (128, 128)) for seed in range(150)]
    counts = [int(field.labels.max()) for field in made]
    across = [max(b.stop - b.start for b in box) for f in made for box in ndimage.find_objects(f.labels)]
    assert {field.kind for field in made} == set(synthetic.NAMES)
    assert 0 in counts
    assert 1 in counts
    assert max(counts) > 100
    assert min(across) <= 4
    assert max(across) > 0.6 * 128
    colour = [np.ptp(field.image, axis=-1).max() > 30 for field in made]
    assert 0.2 < np.mean(colour) < 0.8
    level = [field.image.mean() for field in made]
    assert min(level) < 40
    assert max(level) > 200


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"seed": -1}, "seed -1"),
        ({"seed": 1.5}, "seed 1.5"),
        ({"size": (8, 64)}, "size (8, 64)"),
        ({"size": (64, 64, 3)}, "size (64, 64, 3)"),
        ({"size": (64.0, 64)}, "size (64.0, 64)"),
        ({"kind": "nuclie"}, "nuclei, cells"),
        ({"dtype": "float"}, "uint16"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidInput, match=says.replace("(", r"\(").replace(")", r"\)")):
        synthetic.field(**{"seed": 0, **arguments})  # type: ignore[arg-type]


def test_the_command_writes_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cells"
    assert cli.main(["synthetic", str(out), "--images", "5", "--seed", "7", "--size", "64"]) == 0
    pairs = [sorted(path.name for path in (out / name).iterdir()) for name in ("images", "labels")]
    assert pairs[0] == pairs[1]
    assert len(pairs[0]) == 5
    assert {path.name for path in out.iterdir()} == {"images", "labels"}
    instances = 0
    for name in pairs[0]:
        kind, seed = name.removesuffix(".png").split("_")
        made = synthetic.field(int(seed), (64, 64))
        image, labels = (np.asarray(Image.open(out / folder / name)) for folder in ("images", "labels"))
        assert labels.dtype == np.uint16
        np.testing.assert_array_equal(image, made.image)
        np.testing.assert_array_equal(labels, made.labels)
        assert kind == made.kind
        instances += made.labels.max()
    assert f"5 images, {instances} instances" in capsys.readouterr().out


def test_the_camera_s_channels_as_tiff(tmp_path: Path) -> None:
    assert (
        cli.main(["synthetic", str(tmp_path), "--images", "6", "--size", "48", "--kind", "cells", "--dtype", "uint16"])
        == 0
    )
    planes = {tifffile.imread(path).shape for path in (tmp_path / "images").glob("cells_*.tif")}
    assert planes <= {(48, 48), (1, 48, 48), (2, 48, 48), (3, 48, 48)}
    assert len(planes) > 1
    stored = tifffile.imread(tmp_path / "images" / "cells_000003.tif").reshape(-1, 48, 48)
    made = synthetic.field(3, (48, 48), "cells", "uint16")
    np.testing.assert_array_equal(np.moveaxis(stored, 0, -1), made.image)


@pytest.mark.parametrize("wrong", [["--images", "0"], ["--size", "4"], ["--kind", "dogs"], ["--seed", "-3"]])
def test_a_wrong_option_leaves_nothing(tmp_path: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["synthetic", str(tmp_path / "out"), *wrong]) == 2
    assert wrong[1] in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))
    assert cli.main(["synthetic", str(tmp_path / "out"), "--images", "1", "--size", "32"]) == 0


def test_what_is_there_is_never_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("x")
    for out in (tmp_path, tmp_path / "mine"):
        assert cli.main(["synthetic", str(out), "--images", "1", "--size", "32"]) == 2
        assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_interrupted_it_leaves_an_empty_folder(tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "synthetic", str(tmp_path / "out"), "--images", "100000", "--size", "64"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not list(tmp_path.rglob("*.png")):
            assert program.poll() is None
        program.send_signal(signal.SIGINT)
        assert program.wait(60) == 130
    finally:
        program.kill()
    assert not list((tmp_path / "out").iterdir())
