"""The service under real HTTP load from a second process.

    python -m tests.benchmarks.serving [--only nano clicks overload peers]

nano: one client at a time, with the packaged model. segment_…: a click on an embedding in memory; embed_…: a new image
of 512². overhead_ms: the median of a click's time that is not the decoder's, on the wire and all; beside it a bare
Serve app behind HTTP, a bare handle call, and the same click by Serve's handle. memory_growth_mb: of all replicas over
SOAK clicks, after WARM.
clicks: vit_b (random weights that draw blobs), CLIENTS clients, each clicking on one of as many images of a data set.
decode_mean_batch: clicks a run of the decoder. decode_throughput_share: clicks a second, of those that the bare decoder
does with batches of CLIENTS, in turns. click_bytes: a click's bytes on the wire, both ways.
overload: vit_b in bfloat16 on /v1/embed. First what CLIENTS waiting clients get (peak), then five times that rate,
whoever has been answered. goodput_5x: images a second then, of peak. reject_p99_ms: until a refused request is told so.
peers: 90 % clicks, 10 % new images, vit_b, CLIENTS clients, against tests/benchmarks/plain_server.py with the same
weights, in float32 and in bfloat16. vs_plain_server: requests a second, of the better of its two rows.
…_click_…, …_image_…: of both kinds apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import ray
import torch
import yaml
from PIL import Image
from ray import serve
from ray.serve import Application

from cluster import session, settings
from serve_app import contract, models
from serve_app.client import Client
from serve_app.model import decoder
from serve_app.model.prompts import DecodeRequest, Prompts
from tests import weights_of_sam
from tests.benchmarks import load, pipeline
from tests.benchmarks.nano import report
from tests.s3 import ROOT

PARTS = ("nano", "clicks", "overload", "peers")
WANTED = {
    "overhead_ms": 20.0,
    "decode_mean_batch": 4.0,
    "decode_throughput_share": 0.8,
    "click_bytes": 20000.0,
    "goodput_5x": 0.9,
    "reject_p99_ms": 100.0,
    "vs_plain_server": 2.0,
}
CLIENTS, TURNS = 8, 3
CLICK_BYTES = 1000  # a click's body, at most; a new image's is larger
WARM, SOAK = 1000, 10_000
JSON = {"content-type": "application/json"}
DTYPES = ("float32", "bfloat16")
PLAIN_PORT, START_S = 8123, 120
BATCHES = "ray_cellray_batch_items_count"
say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731


class Bare:
    """What Serve alone costs: answers at once."""

    async def __call__(self, request: Any = None) -> str:
        return "{}"


def bare(_: dict[str, Any]) -> Application:
    return serve.deployment(name="bare")(Bare).bind()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="cellray-serving-", dir="/tmp") as name:
        bench = Bench(Path(name))
        for part in arguments.only:
            say(f"{part} …")
            figures |= {"nano": bench.nano, "clicks": bench.clicks, "overload": bench.overload, "peers": bench.peers}[
                part
            ]()
    report("serving", figures, WANTED)


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pipeline.write_images(folder / "images", 24)
        self.images = sorted((folder / "images").glob("*.jpg"))
        self.checkpoint = folder / "vit_b.pth"
        torch.save(weights_of_sam.smooth("sam_vit_b", 0), self.checkpoint)

    @contextmanager
    def app(self, model: str, dtype: str = "float32", also: Mapping[str, Any] | None = None) -> Iterator[str]:
        """The laptop's app with one model; → its address."""
        config = self.folder / f"{model}-{dtype}.yaml"
        made: dict[str, Any] = {"datasets": [str(self.folder / "stored")], "weights_dir": str(self.folder / "weights")}
        if model != "nano":
            made["models"] = {model: {"source": str(self.checkpoint), "sha256": None, "dtype": dtype}}
        config.write_text(yaml.safe_dump(made))
        self.config = str(config)
        serve_config = pipeline.app(model, self.config)
        serve_config["applications"] += [also] if also else []
        with session.local(serve_config, say) as started:
            yield started.http

    def nano(self) -> dict[str, float]:
        other = {"name": "bare", "route_prefix": "/bare", "import_path": "tests.benchmarks.serving:bare"}
        other |= {"args": {}, "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}}}
        squares = [self._square(index) for index in range(60)]
        with self.app("nano", also=other) as url, httpx.Client(base_url=url, timeout=60) as http:
            identity = http.post("/v1/embed", content=squares[0].read_bytes()).headers["x-embedding-id"]
            click = self._click(identity)
            one = {"url": url, "clients": 1, "requests": [click]}
            load.run({**one, "count": 50})
            clicks = load.run({**one, "count": 400})
            empty = load.run({**one, "requests": [{"path": "/bare"}], "count": 400})
            embeds = load.run(
                {**one, "requests": [{"path": "/v1/embed", "file": str(path)} for path in squares[1:]], "count": 59}
            )
            by_handle = self._by_handle(identity)
            load.run({"url": url, "clients": CLIENTS, "requests": [click], "count": WARM})
            before = self._memory()
            soaked = load.run({"url": url, "clients": CLIENTS, "requests": [click], "count": SOAK})
            growth = self._memory() - before
        self._check(clicks + embeds + soaked)
        return {
            "segment_p50_ms": _percentile(clicks, 50),
            "segment_p99_ms": _percentile(clicks, 99),
            "embed_p50_ms": _percentile(embeds, 50),
            "overhead_ms": float(np.median([1000 * one["s"] - one["inference_ms"] for one in clicks])),
            "bare_http_ms": _percentile(empty, 50),
            **by_handle,
            "soak_clicks_s": len(soaked) / _span(soaked),
            "memory_growth_mb": growth / 1e6,
        }

    def _by_handle(self, identity: str) -> dict[str, float]:
        handle = serve.get_app_handle("bare")
        times = []
        for _ in range(200):
            start = time.perf_counter()
            handle.remote().result()
            times.append(time.perf_counter() - start)
        clicks = []
        with Client(f"serve://{contract.APP_NAME}") as client:
            for _ in range(200):
                start = time.perf_counter()
                client.segment(embedding_id=identity, points=[[[200, 200]]])
                clicks.append(time.perf_counter() - start)
        return {"bare_handle_ms": 1000 * float(np.median(times)), "handle_click_ms": 1000 * float(np.median(clicks))}

    def clicks(self) -> dict[str, float]:
        with self.app("sam_vit_b") as url:
            some = self.folder / "some"
            some.mkdir(exist_ok=True)
            for path in self.images[:CLIENTS]:
                (some / path.name).write_bytes(path.read_bytes())
            pipeline.job(str(some), str(self.folder / "stored"), "sam_vit_b", CLIENTS, self.config)
            requests = [self._click(str(some / path.name), "image_uri") for path in self.images[:CLIENTS]]
            plan = {"url": url, "clients": CLIENTS, "requests": requests}
            self._check(load.run({**plan, "count": 4 * CLIENTS}))
            folder = models.prepare(settings.load(self.config), "sam_vit_b")
            alone = decoder.load(folder, "auto")
            with Client(url) as client:
                asked = [
                    DecodeRequest(
                        (one := client.embedding(found.embedding_id)).array,
                        one.original,
                        Prompts(points=np.array([[[200, 200]]], np.float32), labels=np.ones((1, 1), np.int32)),
                    )
                    for found in (
                        client.segment(image_uri=str(some / p.name), points=[[[200, 200]]])
                        for p in self.images[:CLIENTS]
                    )
                ]
            decoder.segment(alone, asked)
            shares, served, wire, before = [], [], [], _batches(url)
            for _ in range(TURNS):
                start, runs = time.perf_counter(), 0
                while time.perf_counter() < start + 8:
                    decoder.segment(alone, asked)
                    runs += 1
                bare_rate = runs * CLIENTS / (time.perf_counter() - start)
                results = load.run({**plan, "seconds": 15})
                self._check(results)
                served.append(len(results) / _span(results))
                shares.append(served[-1] / bare_rate)
                wire += [one["sent"] + one["got"] for one in results]
                say(f"{bare_rate:.1f} clicks/s by the bare decoder, {served[-1]:.1f} served")
            batches = _batches(url) - before
        return {
            "decode_mean_batch": len(wire) / batches,
            "decode_throughput_share": float(np.median(shares)),
            "clicks_s": float(np.median(served)),
            "click_bytes": float(np.mean(wire)),
        }

    def overload(self) -> dict[str, float]:
        with self.app("sam_vit_b", "bfloat16") as url:
            requests = self._new_images("/v1/embed?pooled=true")
            self._check(load.run({"url": url, "clients": 2, "requests": requests, "count": 4}))
            peak = load.run({"url": url, "clients": CLIENTS, "requests": requests[4:], "seconds": 40})
            self._check(peak)
            rate = len(peak) / _span(peak)
            say(f"{rate:.2f} images/s at most; {5 * rate:.2f} are sent")
            flood = load.run({"url": url, "requests": requests[200:], "rate": 5 * rate, "seconds": 90})
            with httpx.Client(base_url=url, timeout=60) as http:
                assert http.get("/healthz").status_code == 200
        good = [one for one in flood if one["status"] == 200]
        refused = [one for one in flood if one["status"] in (429, 503)]
        assert len(good) + len(refused) == len(flood), {one["status"] for one in flood}
        return {
            "embed_peak_img_s": rate,
            "goodput_5x": len(good) / _span(good) / rate,
            "rejected_share": len(refused) / len(flood),
            "reject_p99_ms": _percentile(refused, 99),
        }

    def peers(self) -> dict[str, float]:
        rates: dict[str, float] = {}
        figures: dict[str, float] = {}
        for dtype in DTYPES:
            with self.app("sam_vit_b", dtype) as url:
                ours = self._mixed(url, "/v1/segment")
            with self._plain(dtype) as url:
                plain = self._mixed(url, "/segment")
            for name, results in (("cellray", ours), ("plain", plain)):
                rates[f"{name}_{dtype}"] = len(results) / _span(results)
                figures[f"{name}_{dtype}_p99_ms"] = _percentile(results, 99)
                images = [one for one in results if one["sent"] > CLICK_BYTES]
                clicks = [one for one in results if one["sent"] <= CLICK_BYTES]
                figures[f"{name}_{dtype}_click_p50_ms"] = _percentile(clicks, 50)
                figures[f"{name}_{dtype}_image_p50_ms"] = _percentile(images, 50)
        best = max(DTYPES, key=lambda dtype: rates[f"plain_{dtype}"])
        figures |= {f"{name}_requests_s": rate for name, rate in rates.items()}
        return {**figures, "vs_plain_server": rates[f"cellray_{best}"] / rates[f"plain_{best}"]}

    def _mixed(self, url: str, path: str) -> list[dict[str, float]]:
        """Nine clicks on images that are known, then a new image with its click."""
        known = [self._new_image(path, index) for index in range(CLIENTS)]
        with httpx.Client(base_url=url, timeout=120) as http:
            ids = []
            for request in known:
                form = request["form"]
                sent = {"image": ("image", Path(form["image"]).read_bytes())}
                ids.append(http.post(path, files=sent, data={"request": form["request"]}).json()["embedding_id"])
        requests = []
        for index in range(400):
            new = index % 10 == 9
            requests.append(
                self._new_image(path, 1000 + index) if new else self._click(ids[index % CLIENTS], path=path)
            )
        results = load.run({"url": url, "clients": CLIENTS, "requests": requests, "seconds": 45})
        self._check(results)
        return results

    @contextmanager
    def _plain(self, dtype: str) -> Iterator[str]:
        words = [sys.executable, "-m", "tests.benchmarks.plain_server", "--checkpoint", str(self.checkpoint)]
        words += ["--dtype", dtype, "--port", str(PLAIN_PORT)]
        process, url = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}), ""
        try:
            url, end = f"http://127.0.0.1:{PLAIN_PORT}", time.monotonic() + START_S
            while True:
                try:
                    httpx.get(f"{url}/docs", timeout=5)
                    break
                except httpx.TransportError:
                    if time.monotonic() > end or process.poll() is not None:
                        raise
                    time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait()

    def _click(self, identity: str, name: str = "embedding_id", path: str = "/v1/segment") -> dict[str, Any]:
        return {"path": path, "headers": JSON, "text": json.dumps({name: identity, "points": [[[200, 200]]]})}

    def _new_images(self, path: str) -> list[dict[str, Any]]:
        return [{"path": path, "file": str(self._unique(index))} for index in range(1500)]

    def _new_image(self, path: str, index: int) -> dict[str, Any]:
        request = json.dumps({"points": [[[200, 200]]]})
        return {"path": path, "form": {"image": str(self._unique(index)), "request": request}}

    def _unique(self, index: int) -> Path:
        """A file that no cache has seen: one of the images with bytes after its end."""
        path = self.folder / "unique" / f"{index}.jpg"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(self.images[index % len(self.images)].read_bytes() + b"%d" % index)
        return path

    def _square(self, index: int) -> Path:
        path = self.folder / f"square{index}.png"
        with Image.open(self.images[index % len(self.images)]) as image:
            image.rotate(index).resize((512, 512)).save(path)
        return path

    def _memory(self) -> int:
        """Bytes that all replicas have to themselves, without what they see of Ray's object store."""
        children = psutil.Process().children(recursive=True)
        return sum(one.memory_full_info().uss for one in children if "ServeReplica" in " ".join(one.cmdline()))

    def _check(self, results: list[dict[str, float]]) -> None:
        bad = [one["status"] for one in results if one["status"] != 200]
        if bad or not results:
            raise RuntimeError(f"{len(bad)} of {len(results)} requests failed, with status {sorted(set(bad))}")


def _percentile(results: list[dict[str, float]], share: float) -> float:
    """Milliseconds."""
    return 1000 * float(np.percentile([one["s"] for one in results], share)) if results else float("nan")


def _span(results: list[dict[str, float]]) -> float:
    """Seconds from the first request to the last answer."""
    return max(one["start"] + one["s"] for one in results) - min(one["start"] for one in results)


def _batches(url: str) -> float:
    """Runs of the decoder so far, once the metrics have come to rest."""
    seen = -1.0
    while True:
        lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
        found = sum(
            float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(BATCHES) and 'part="decoder"' in line
        )
        if found == seen:
            return found
        seen = found
        time.sleep(12)


if __name__ == "__main__":
    try:
        main()
    finally:
        if ray.is_initialized():
            ray.shutdown()
