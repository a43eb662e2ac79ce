"""jobs.embed on a storage that fails and processes that are killed: nothing lost, nothing twice, nothing wrong.

    python -m tests.benchmarks.faults [--seed 0] [--runs 30] [--minutes 20]

A real Ray, a Serve app whose encoder costs nothing (tests.faulty_job), a real S3 server (moto) behind a proxy that
fails (tests.faulty_s3). A run is one job, into an output of its own: the same command until it exits with 0. In a run
with faults each request fails with 5 %, and some faults are placed: until each has struck at each of its points, a
point being before or after one of the operations that a job asks of S3. Every output is compared, row by row, with a
golden one, which is checked against what the encoder computes, and verified as `cellray verify` does.

wasted_encoder_calls: images that the encoder was given beyond one call each, a needed call, in the runs with faults,
whatever the reason. encoded_after_commit: those of them whose shard was committed by then.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import yaml
from PIL import Image

from cluster import serve_config, session
from jobs.verify import verify
from serve_app import contract, dataset
from tests import faulty_job, faulty_s3
from tests.benchmarks.pipeline import say
from tests.faulty_s3 import DRIVER, KILLS, READS, SHARE, WRITES, Fault, Faults, Operation
from tests.s3 import ROOT, client, server

SHARDS, SHARD_IMAGES = 64, 2
FEWER = 16  # shards of a run without faults, and of all runs with --some
BROKEN = 1  # images of every fourth shard that are none: an errors file, and embeddings that go up in one piece
KILLS_A_RUN, OTHERS_A_RUN = 8, 14  # that are placed
ATTEMPTS, ATTEMPT_S = 40, 180.0
LEAST_FAULTS, MOST_WASTED = 300, 0.1
INPUT, FOLDER, OUTPUT = "plates", "day", "results"


@dataclass
class Bench:
    """What all the runs share, and what they came to."""

    folder: Path
    s3: Any
    faults: Faults
    drivers: subprocess.Popen[str]
    rng: random.Random
    numbers: dict[int, int]  # an image's number → its shard
    golden: dict[str, dict[str, Any]] = field(default_factory=dict)
    found: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    requests: int = 0  # of the golden run

    def run(self, name: str, config: Path, limit: int, share: float = 0.0, armed: list[Fault] | None = None) -> None:
        """One job, its output compared with the golden one."""
        placed = [(self._start(fault, limit), fault) for fault in armed or []]
        self.faults.begin(name, share, placed)
        kind = "with" if share else "without"
        before, start = self._calls(), time.monotonic()
        words = [f"s3://{INPUT}/{FOLDER}", f"s3://{OUTPUT}/{name}", "--model", faulty_job.MODEL]
        words += [
            "--config",
            str(config),
            "--shard-images",
            str(SHARD_IMAGES),
            "--batch",
            "1",
            "--max-error-rate",
            "0.9",
        ]
        words += ["--max-error-rate", "0.9", "--limit", str(limit), "--progress-every", "1000"]
        exits = []
        while len(exits) < ATTEMPTS and exits[-1:] != [0]:
            exits.append(self._attempt(words))
        if exits[-1]:
            self.problems.append(f"run {name} did not end well in {len(exits)} attempts")
        rows = self._rows(name)
        if not self.golden:
            self.golden = dict(rows)
            self.requests = self.faults.requests
        for what, count in compare(self.golden, rows, limit).items():
            self.found[what] += count
            if count:
                self.problems.append(f"run {name}: {count} rows {what}")
        calls = self._calls()[len(before) :]
        self.found[f"runs_{kind}"] += 1
        self.found[f"encoder_calls_{kind}"] += len(calls)
        self.found[f"needed_calls_{kind}"] += sum(shard < limit // SHARD_IMAGES for shard in self.numbers.values())
        self.found["encoded_after_commit"] += sum(self._committed(name, *call) for call in calls)
        self.found["attempts"] += len(exits) if share else 0
        self.found["exits_1"] += exits.count(1)
        left = len(self.faults.armed)
        ends = " ".join(f"{end}: {count}" for end, count in Counter(exits).items())
        say(f"{name}: {time.monotonic() - start:.0f} s, exits {ends}, {len(calls)} calls, {left} faults did not strike")

    def _start(self, fault: Fault, limit: int) -> int:
        """From which request of a run on a fault may strike."""
        who, verb, what = fault.operation
        always = who == "worker" and (verb in WRITES or what == "images") and verb != "abort"
        return self.rng.randrange(self.requests * limit // len(self.golden) * 3 // 4) if always else 0

    def _attempt(self, words: list[str]) -> int:
        """A driver's exit code; -9 where it was killed."""
        assert self.drivers.stdin
        assert self.drivers.stdout
        self.drivers.stdin.write(json.dumps(words) + "\n")
        self.drivers.stdin.flush()
        driver = int(self.drivers.stdout.readline())
        if not select.select([self.drivers.stdout], [], [], ATTEMPT_S)[0]:
            self.problems.append(f"a driver of {words[1]} was still there after {ATTEMPT_S:.0f} s")
            os.kill(driver, 9)
        return int(self.drivers.stdout.readline())

    def _calls(self) -> list[tuple[int, int]]:
        """(time.monotonic_ns(), an image's number) of all calls to the encoder."""
        lines = (self.folder / faulty_job.CALLS).read_text().splitlines()
        return [(int(at), int(number)) for at, number in (line.split() for line in lines)]

    def _committed(self, run: str, at: int, number: int) -> bool:
        if number not in self.numbers:
            self.problems.append(f"run {run}: an image came to the encoder that is none of the input's ({number})")
            return False
        uri = dataset.record_uri(f"/{OUTPUT}/{run}", "embed", self.numbers[number])
        return at > self.faults.commits.get(uri, at)

    def _rows(self, run: str) -> list[tuple[str, dict[str, Any]]]:
        """(image URI, row) of all rows of a run's output, which is verified, and deleted from the server."""
        folder, pages = self.folder / run, self.s3.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=OUTPUT, Prefix=f"{run}/"):
            for key in (one["Key"] for one in page.get("Contents", ())):
                path = self.folder / key
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.s3.get_object(Bucket=OUTPUT, Key=key)["Body"].read())
                self.s3.delete_object(Bucket=OUTPUT, Key=key)
        found = dataset.open(str(folder))
        for text in verify(found, lambda _: None):
            if "in no record" not in text:
                self.problems.append(f"run {run}: {text}")
        rows = []
        for name in (dataset.EMBEDDINGS, dataset.ERRORS):
            rows += [(row["image_uri"], {"of": name, **row}) for row in found.table(name).to_pylist()]
        return rows


def compare(golden: dict[str, dict[str, Any]], rows: list[tuple[str, dict[str, Any]]], limit: int) -> dict[str, int]:
    """How many of the first `limit` images have no row, have more than one, or have another than the golden one."""
    uris = [uri for uri, _ in rows]
    return {
        "lost": len(set(sorted(golden)[:limit]) - set(uris)),
        "duplicated": len(uris) - len(set(uris)),
        "wrong": sum(golden.get(uri) != row for uri, row in rows),
    }


def write_images(s3: Any, images: int) -> tuple[dict[str, np.ndarray | None], dict[int, int]]:
    """Small PNGs in the input, some of them none: URI → what the encoder makes of it; an image's number → its shard."""
    expected: dict[str, np.ndarray | None] = {}
    numbers = {}
    rng, path = np.random.default_rng(0), Path(tempfile.mkdtemp()) / "image.png"
    for index in range(images):
        key, shard = f"{FOLDER}/{index:04d}.png", index // SHARD_IMAGES
        pixels = rng.integers(0, 256, (faulty_job.SIDE * 3 // 4, faulty_job.SIDE, 3), np.uint8)
        broken = shard % 4 == 3 and index % SHARD_IMAGES < BROKEN
        Image.fromarray(pixels).save(path)
        s3.put_object(Bucket=INPUT, Key=key, Body=b"no image" if broken else path.read_bytes())
        expected[f"s3://{INPUT}/{key}"] = None if broken else faulty_job.embedding(pixels)
        if not broken:
            numbers[faulty_job.number(pixels)] = shard
    return expected, numbers


def check_golden(golden: dict[str, dict[str, Any]], expected: dict[str, np.ndarray | None]) -> None:
    assert sorted(golden) == sorted(expected)
    for uri, array in expected.items():
        row = golden[uri]
        assert row["of"] == (dataset.ERRORS if array is None else dataset.EMBEDDINGS), uri
        assert array is None or row["embedding"] == array.tobytes(), uri


def app(folder: Path) -> dict[str, Any]:
    names = [
        contract.INGRESS,
        contract.encoder_deployment(faulty_job.MODEL),
        contract.decoder_deployment(faulty_job.MODEL),
    ]
    one = {"ray_actor_options": {"num_cpus": 0}, "health_check_period_s": 1}
    made = {
        "applications": [
            {
                "name": contract.APP_NAME,
                "import_path": "tests.faulty_job:build",
                "args": {"folder": str(folder)},
                "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
                "deployments": [{**one, "name": name} for name in names],
            }
        ],
        "http_options": {"host": "127.0.0.1", "port": 8000},
    }
    serve_config.check(made, "the benchmark's app")
    return made


def placed(pending: list[Fault], rng: random.Random) -> list[Fault]:
    """Some of those that did not strike yet, and what leads to them: an object that is there already is looked at."""
    kills = [fault for fault in pending if fault.kind in KILLS]
    others = [fault for fault in pending if fault.kind not in KILLS]
    chosen = kills[:KILLS_A_RUN] + others[:OTHERS_A_RUN]
    if not any(fault.kind == DRIVER for fault in chosen):  # a job that goes on reads its plan and records
        chosen.append(Fault(DRIVER, Operation("worker", "get", "images"), "after"))
    for _, (who, verb, what), _ in list(chosen):
        if who == "worker" and what != "images" and (verb in READS or verb == "abort"):
            put = "put" if what != "embeddings" else "complete"
            chosen.append(Fault("412", Operation(who, put, what), "after"))
    return chosen


def histogram(wanted: set[Fault], fired: Counter[Fault]) -> Iterator[str]:
    """A line an operation, a column a kind; `0` was wanted and never reached, `·` is nowhere to be had."""
    columns = [*faulty_s3.SIDES.items(), *itertools.product(KILLS, (faulty_s3.BEFORE, faulty_s3.AFTER))]
    yield " " * 26 + "".join(f"{kind.split()[-1]:>8}" for kind, _ in columns)
    yield " " * 26 + "".join(f"{side:>8}" for _, side in columns)
    for operation in dict.fromkeys(fault.operation for fault in faulty_s3.everything()):
        cells = [Fault(kind, operation, side) for kind, side in columns]
        counts = [str(fired[one]) if fired[one] or one in wanted else "·" for one in cells]
        yield f"{operation!s:26}" + "".join(f"{count:>8}" for count in counts)
    yield "all: " + ", ".join(
        f"{kind} {sum(n for f, n in fired.items() if f.kind == kind)}" for kind in [*faulty_s3.SIDES, *KILLS]
    )


def run(arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> tuple[Bench, set[Fault]]:
    deadline = time.monotonic() + arguments.minutes * 60 - 60
    rng = random.Random(arguments.seed)
    pending = faulty_s3.everything()
    rng.shuffle(pending)
    pending = pending[: arguments.some]
    wanted, small = set(pending), FEWER * SHARD_IMAGES
    size = small if arguments.some else SHARDS * SHARD_IMAGES
    endpoint = stack.enter_context(server(folder))
    faults = Faults(arguments.seed, folder / faulty_job.REPLICA)
    url = stack.enter_context(faulty_s3.proxy(endpoint, faults))
    s3 = client(endpoint, "s3")
    for bucket in (INPUT, OUTPUT):
        s3.create_bucket(Bucket=bucket)
    expected, numbers = write_images(s3, size)
    config = folder / "cellray.yaml"
    config.write_text(yaml.safe_dump({"storage": {"endpoint_url": url, "read_timeout_s": faulty_s3.READ_TIMEOUT_S}}))
    stack.enter_context(session.local(app(folder), say))
    command = [sys.executable, "-m", "tests.faulty_job", ray.get_runtime_context().gcs_address, str(folder / "log")]
    pipe = subprocess.PIPE
    drivers = stack.enter_context(subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True))
    assert drivers.stdout
    assert drivers.stdout.readline() == "ready\n"
    bench = Bench(folder, s3, faults, drivers, rng, numbers)
    bench.run("golden", config, size)
    check_golden(bench.golden, expected)
    for number in itertools.count():
        pending = [fault for fault in pending if not faults.fired[fault]]
        enough = not pending and sum(faults.fired.values()) >= arguments.faults
        if time.monotonic() > deadline or (enough and number >= arguments.runs):
            break
        if number < arguments.runs:
            bench.run(f"plain-{number}", config, small)
        if not enough:
            rng.shuffle(pending)
            bench.run(f"faulty-{number}", config, size, SHARE, placed(pending, rng))
    return bench, wanted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--runs", type=int, default=30, help="without faults (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=20, help="at most (default: %(default)s)")
    parser.add_argument("--faults", type=int, default=LEAST_FAULTS, help="at least (default: %(default)s)")
    parser.add_argument(
        "--some", type=int, help="only so many faults and points that must be reached, and smaller jobs"
    )
    arguments = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    os.environ["S3_UPLOAD_PART_MIN_SIZE"] = "1"  # moto's, for parts of PART_BYTES
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="cellray-bench-") as temporary, ExitStack() as stack:
        bench, wanted = run(arguments, Path(temporary), stack)
    fired, found = bench.faults.fired, bench.found
    print(*histogram(wanted, fired), sep="\n")
    known = {fault.operation for fault in faulty_s3.everything()}
    missed = sorted(str(fault) for fault in wanted if not fired[fault])
    found["runs_without"] -= 1  # the golden one
    needed = found["needed_calls_with"]
    figures = {
        "faults_fired": sum(fired.values()),
        "points_never_reached": len(missed),
        "runs_with": found["runs_with"],
        "runs_without": found["runs_without"],
        **{name: found[name] for name in ("lost", "duplicated", "wrong")},
        "wasted_encoder_calls": (found["encoder_calls_with"] - needed) / max(needed, 1),
        "encoded_after_commit": found["encoded_after_commit"] / max(needed, 1),
        "attempts_a_run": found["attempts"] / max(found["runs_with"], 1),
        "failed_attempts": found["exits_1"],
    }
    problems = list(bench.problems)
    if missed:
        problems.append(f"never reached, {len(missed)} of {len(wanted)}: {', '.join(missed[:10])}")
    problems += [f"{one} is not in OPERATIONS" for one in bench.faults.seen if one not in known]
    if found["encoder_calls_without"] != found["needed_calls_without"]:
        problems.append(f"without faults, {found['encoder_calls_without']} calls for {found['needed_calls_without']}")
    for name, least in {"faults_fired": arguments.faults, "runs_without": arguments.runs}.items():
        if figures[name] < least:
            problems.append(f"{name} is {figures[name]}, below {least}")
    if figures["wasted_encoder_calls"] >= MOST_WASTED and not arguments.some:
        problems.append(f"wasted_encoder_calls is not below {MOST_WASTED}")
    for name, value in figures.items():
        print(f"{name:34} {value:10.3f}")
    for problem in problems:
        print(f"FAILED {problem}")
    print(json.dumps({"benchmark": "faults", "figures": figures, "seed": arguments.seed}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
