"""jobs.embed around its encoder: what reading, decoding, passing on and writing cost, and how much of an encoder's own
rate is left.

    python -m tests.benchmarks.pipeline [--only null s3 efficiency] [--images 1200]

null: the encoder answers at once with a fresh array of 2 MiB an image. JPEGs of about a megapixel, none of them 1024²,
from a folder into a folder; and the memory of driver and tasks at a tenth of the images and at all of them.
s3: the same from and to a real S3 server (moto), whose CPU time is on the same cores and stands beside.
efficiency: vit_b (random weights), job and bare encoder in turn.

cpu_…: CPU milliseconds an image, by process. stage_…: milliseconds an image that a thread was in that stage.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import yaml
from PIL import Image
from ray import serve
from ray.serve import Application

from cluster import memory, serve_config, session, settings
from cluster.errors import CellrayError
from jobs import samples
from serve_app import contract, models
from serve_app.contract import ModelInfo
from serve_app.model import encoder, preprocess
from tests.benchmarks.nano import report
from tests.s3 import ROOT, client, server

PARTS = ("null", "s3", "efficiency")
WANTED = {"null_img_s": 50.0, "null_img_s_s3": 30.0, "job_efficiency": 0.95}
NULL, INPUT, PATCH, CHANNELS = "null", 1024, 16, 256
SIDES = (880, 1180)  # px, of the JPEGs
SLOW, SLOW_IMAGES, TURNS = "sam_vit_b", 64, 2
TIMEOUT_S = 900
LOCAL = ROOT / "deploy" / "serve.local.yaml"
say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731


class NullEncoder:
    """Answers as an encoder does, without the work."""

    def __init__(self, side: int) -> None:
        memory.keep()
        shape = CHANNELS, side // PATCH, side // PATCH
        self.array = np.random.default_rng(0).standard_normal(shape).astype(np.float16)

    def encode(self, images: list[np.ndarray], dtype: str) -> list[np.ndarray | CellrayError]:
        return [self.array.astype(dtype) for _ in images]


class NullDecoder:
    def __init__(self, side: int) -> None:
        self.side = side

    def info(self) -> ModelInfo:
        digest = "0" * 64
        return ModelInfo(NULL, NULL, self.side, PATCH, CHANNELS, digest, digest, "CC0", True, NULL, "cpu", "float32")


class Front:
    def __init__(self, *_: Any) -> None: ...


def build(arguments: dict[str, Any]) -> Application:
    """The app of LOCAL with a model of which nothing is computed, for images whose long side is `input` pixels."""
    bound = serve.deployment(name=contract.encoder_deployment(NULL))(NullEncoder).bind(arguments["input"])
    other = serve.deployment(name=contract.decoder_deployment(NULL))(NullDecoder).bind(arguments["input"])
    return serve.deployment(name=contract.INGRESS)(Front).bind(bound, other)


def app(model: str, config: str | None = None, side: int = INPUT) -> dict[str, Any]:
    """A Serve config for one model, like LOCAL's; `side` is the null model's input."""
    text = LOCAL.read_text().replace("nano", model)
    made: dict[str, Any] = yaml.safe_load(text)
    (one,) = made["applications"]
    if model == NULL:
        one |= {"import_path": "tests.benchmarks.pipeline:build", "args": {"input": side}}
    else:
        one["args"] |= {"config": config}
    one["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    serve_config.check(made, "the benchmark's app")
    return made


def write_images(folder: Path, count: int) -> None:
    """Different JPEGs: parts of real images, enlarged, turned and shifted, of sides within SIDES."""
    real = folder.parent / "real"
    names = ("retina_rgb.jpg", "hubble_deep_field_rgb.jpg", "ihc_rgb.png", "astronaut_rgb8.tif", "grass_grey8.tif")
    samples.write_samples(real, broken=False)
    sources = [preprocess.decode((real / name).read_bytes(), 10**8) for name in names]
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        source = sources[index % len(sources)]
        side = int(min(source.shape[:2]) * 0.9)
        y, x = (int(rng.integers(0, length - side + 1)) for length in source.shape[:2])
        width, height = (int(rng.integers(*SIDES)) for _ in range(2))
        part = Image.fromarray(np.ascontiguousarray(np.rot90(source[y : y + side, x : x + side], index % 4)))
        part.resize((width, height + (height == width))).save(folder / f"{index:05d}.jpg", quality=90)


def job(
    folder: str, out: str, model: str, images: int, config: str, shard_images: int = 64, timeout_s: float = TIMEOUT_S
) -> tuple[dict[str, Any], float]:
    """One jobs.embed, its driver in a process of its own: (report, CPU seconds of it and of all of Ray)."""
    words = [sys.executable, "-m", "jobs.embed", folder, out, "--model", model, "--limit", str(images)]
    words += ["--shard-images", str(shard_images), "--config", config]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}  # others may run here too
    before = cpu_seconds()
    subprocess.run(words, check=True, timeout=timeout_s, stdout=sys.stderr, env=environment)
    spent = cpu_seconds() - before
    from cluster.storage import Storage

    content = Storage(settings.load(config).storage).read(f"{out}/_report-embed.json", 1 << 20)
    return json.loads(content), spent


def cpu_seconds(process: psutil.Process | None = None) -> float:
    """Of this process and all below it, those that ended too."""
    own = process or psutil.Process()
    total = 0.0
    for one in [own, *own.children(recursive=True)]:
        try:
            times = one.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
        except psutil.NoSuchProcess:
            continue
    return total


def on_null(temporary: Path, images: int) -> dict[str, float]:
    config = temporary / "plain.yaml"
    config.write_text("{}")
    folder = str(temporary / "images")
    with session.local(app(NULL), say):
        job(folder, str(temporary / "warm"), NULL, 16, str(config))
        few, _ = job(folder, str(temporary / "few"), NULL, images // 10, str(config))
        found, spent = job(folder, str(temporary / "many"), NULL, images, str(config))
    figures = {"null_img_s": found["images_per_second"], "cpu_ms_image": 1000 * spent / images}
    figures |= {f"stage_{name}_ms_image": 1000 * s / images for name, s in found["stage_seconds"].items()}
    for name, one in (("few", few), ("many", found)):
        figures |= {f"{process}_mb_{name}": one[f"{process}_memory_mb"] for process in ("driver", "task")}
    return figures


def on_s3(temporary: Path, images: int) -> dict[str, float]:
    os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    with ExitStack() as stack:
        endpoint = stack.enter_context(server(temporary))
        (process,) = [one for one in psutil.Process().children() if "tests.s3" in one.cmdline()]
        config = temporary / "s3.yaml"
        config.write_text(yaml.safe_dump({"storage": {"endpoint_url": endpoint}}))
        s3 = client(endpoint, "s3")
        for bucket in ("plates", "results"):
            s3.create_bucket(Bucket=bucket)
        for path in sorted((temporary / "images").iterdir()):
            s3.put_object(Bucket="plates", Key=path.name, Body=path.read_bytes())
        stack.enter_context(session.local(app(NULL), say))
        job("s3://plates", "s3://results/warm", NULL, 16, str(config))
        before = cpu_seconds(process)
        found, spent = job("s3://plates", "s3://results/many", NULL, images, str(config))
        server_s = cpu_seconds(process) - before
    return {
        "null_img_s_s3": found["images_per_second"],
        "cpu_ms_image_s3": 1000 * (spent - server_s) / images,
        "cpu_ms_image_of_s3_server": 1000 * server_s / images,
    }


def on_efficiency(temporary: Path, _: int) -> dict[str, float]:
    config = temporary / "slow.yaml"
    config.write_text(yaml.safe_dump({"models": {SLOW: {"source": "seeded:sam_vit_b:0", "sha256": None}}}))
    known = settings.load(str(config))
    bare = encoder.load(models.prepare(known, SLOW), "auto")
    paths = sorted((temporary / "images").iterdir())[:SLOW_IMAGES]
    pixels = [preprocess.resize(preprocess.decode(path.read_bytes(), 10**8), INPUT).pixels for path in paths]
    rates = []
    with session.local(app(SLOW, str(config)), say):
        for turn in range(TURNS):
            start = time.perf_counter()
            encoder.embed(bare, pixels)
            alone = len(pixels) / (time.perf_counter() - start)
            out = str(temporary / f"slow-{turn}")
            found, _ = job(str(temporary / "images"), out, SLOW, SLOW_IMAGES, str(config))
            rates.append((found["images_per_second"], alone))
    ours, theirs = np.array(rates).T
    return {
        "job_img_s": np.median(ours),
        "bare_img_s": np.median(theirs),
        "job_efficiency": np.median(ours / theirs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="(default: all of them)")
    parser.add_argument("--images", type=int, default=1200, help="(default: %(default)s)")
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="cellray-bench-") as temporary:
        write_images(Path(temporary) / "images", arguments.images)
        for name, part in zip(PARTS, (on_null, on_s3, on_efficiency), strict=True):
            if name in arguments.only:
                figures |= part(Path(temporary), arguments.images)
    report("pipeline", figures, WANTED)


if __name__ == "__main__":
    main()
