"""jobs.embed against the bare encoder in the same run, and the memory it takes at 50 and at 500 images.

python -m tests.benchmarks.job [--images 500]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster import serve_config, session, settings
from jobs import samples
from serve_app import models
from serve_app.model import encoder, preprocess

MODEL = "nano"
SIDE = 512
FEW = 50
BARE_IMAGES = 64
BATCH = 8
SERVE_CONFIG = Path("deploy/serve.local.yaml")


def write_images(folder: Path, count: int) -> None:
    """`count` different JPEGs of SIDE² pixels: crops of real images, turned and shifted."""
    real = folder.parent / "real"
    names = ("retina_rgb.jpg", "hubble_deep_field_rgb.jpg", "ihc_rgb.png", "astronaut_rgb8.tif", "grass_grey8.tif")
    samples.write_samples(real, broken=False)
    sources = [preprocess.decode((real / name).read_bytes(), 10**8) for name in names]
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        source = sources[index % len(sources)]
        y, x = (int(rng.integers(0, side - SIDE + 1)) for side in source.shape[:2])
        crop = np.rot90(source[y : y + SIDE, x : x + SIDE], index // len(sources) % 4)
        Image.fromarray(np.ascontiguousarray(crop)).save(folder / f"{index:05d}.jpg", quality=90)


def bare_rate(folder: Path) -> float:
    """Images a second of the encoder alone, in this process, pixels at hand."""
    bare = encoder.load(models.prepare(settings.load(), MODEL), "auto")
    size = bare.card.architecture.image_size
    paths = sorted(folder.iterdir())[:BARE_IMAGES]
    pixels = [preprocess.resize(preprocess.decode(path.read_bytes(), 10**8), size).pixels for path in paths]
    encoder.embed(bare, pixels[:BATCH])
    start = time.perf_counter()
    encoder.embed(bare, pixels, BATCH)
    return len(pixels) / (time.perf_counter() - start)


def job(folder: Path, out: Path, limit: int) -> dict[str, Any]:
    """The report of one jobs.embed, driver in a process of its own."""
    words = [sys.executable, "-m", "jobs.embed", str(folder), str(out), "--model", MODEL, "--limit", str(limit)]
    subprocess.run([*words, "--shard-images", "64"], check=True, timeout=600, stdout=sys.stderr)
    return json.loads((out / "_report-embed.json").read_text())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--images", type=int, default=500, help="(default: %(default)s)")
    many = arguments.parse_args().images
    with tempfile.TemporaryDirectory(prefix="cellray-bench-") as temporary:
        folder = Path(temporary) / "images"
        write_images(folder, many)
        bare = [bare_rate(folder)]
        with session.local(serve_config.read(SERVE_CONFIG), lambda text: print(text, file=sys.stderr)):
            reports = {limit: job(folder, Path(temporary) / f"out-{limit}", limit) for limit in (FEW, many)}
        bare.append(bare_rate(folder))
    figures = {
        "bare_img_s": sum(bare) / len(bare),
        "job_img_s": reports[many]["images_per_second"],
        "job_efficiency": reports[many]["images_per_second"] * len(bare) / sum(bare),
    }
    for limit, report in reports.items():
        figures[f"driver_mb_{limit}"] = report["driver_memory_mb"]
        figures[f"task_mb_{limit}"] = report["task_memory_mb"]
    for name, value in figures.items():
        print(f"{name:24} {value:10.2f}")
    print(json.dumps({"benchmark": "job", "figures": figures, "model": MODEL, "images": many}))


if __name__ == "__main__":
    main()
