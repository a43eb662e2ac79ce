"""The whole thing on one machine: start Ray and the app, submit the two jobs on real images, draw what came out."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cluster import session
from cluster.errors import InvalidInput, Unavailable
from cluster.settings import Settings
from jobs import samples, show

MODEL = "nano"
GRID = "--grid 16 --pred-iou-thresh 0.5 --stability-score-thresh 0.7 --box-nms-thresh 0.2"  # as nano's card says
JOB_TIMEOUT_S = 900.0
POLL_S = 0.3
PROGRESS = re.compile(r"^\w+: (\d+)/(\d+) images, (\d+) errors", re.MULTILINE)
COLUMNS = ("job", "images", "errors", "seconds", "img/s", "bytes written", "replicas")


def say(text: str) -> None:
    print(f"  {text} …", flush=True)


def run(settings: Settings, config: dict[str, Any], folder: Path) -> int:
    """Everything under `folder`: images/, dataset/, index.html, contact.png. Returns 0, or 1 if a job failed."""
    images, out = folder / "images", folder / "dataset"
    _remove_dataset(out)
    samples.write_samples(images)
    with session.local(config, say) as started:
        common = [str(images.absolute()), str(out.absolute()), "--model", MODEL, "--max-error-rate", "0.5"]
        code = _submit(started.dashboard, "embed", common)
        if code == 0:
            stored = ["--embeddings", str(out.absolute())]
            code = _submit(started.dashboard, "segment", [*common, *stored, *GRID.split()])
        say("stopping")
    if code:
        return 1
    page, picture = show.write(settings, str(out.absolute()), folder, limit=120)
    _print_table([json.loads((out / f"_report-{name}.json").read_text()) for name in ("embed", "segment")])
    print(f"\ndata set       {out}\ncontact sheet  {page}\n               {picture}")
    return 0


def _remove_dataset(out: Path) -> None:
    """Only what a demo wrote before: a folder of someone else's is not touched."""
    if out.exists() and not (out / "_plan-embed-000.json").exists():
        raise InvalidInput(f"{out} exists and is no data set of a demo; move it away")
    shutil.rmtree(out, ignore_errors=True)


def _submit(dashboard: str, name: str, arguments: list[str]) -> int:
    """Run one job as `ray job submit` does, with a bar; its other output is printed as it comes. Returns 0 or 1."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = JobSubmissionClient(dashboard)
    words = [sys.executable, "-m", f"jobs.{name}", *arguments, "--progress-every", "0.5"]
    job = client.submit_job(entrypoint=shlex.join(words))
    deadline = time.monotonic() + JOB_TIMEOUT_S
    bar = tqdm(total=0, desc=name, unit="img", bar_format="  {desc:8} {bar:30} {n_fmt}/{total_fmt} {elapsed}{postfix}")
    try:
        while not (status := client.get_job_status(job)).is_terminal():
            if time.monotonic() > deadline:
                raise Unavailable(f"the job {name} did not end within {JOB_TIMEOUT_S:.0f} s")
            _update(bar, client.get_job_logs(job))
            time.sleep(POLL_S)
        text = client.get_job_logs(job)
        if status == JobStatus.SUCCEEDED:
            bar.update((bar.total or 0) - bar.n)
    except BaseException:
        client.stop_job(job)
        raise
    finally:
        bar.close()
    lines = [line for line in text.splitlines() if line.startswith(f"{name}:") and not PROGRESS.match(line)]
    print("\n".join(f"  {line}" for line in lines or text.splitlines()[-20:]), flush=True)
    return 0 if status == JobStatus.SUCCEEDED else 1


def _update(bar: Any, text: str) -> None:
    found = PROGRESS.findall(text)
    if found:
        done, total, errors = map(int, found[-1])
        bar.total = total
        bar.set_postfix_str(f"{errors} errors", refresh=False)
        bar.update(done - bar.n)


def _print_table(reports: list[dict[str, Any]]) -> None:
    rows = [
        (
            report["job"],
            str(report["images"]),
            str(report["errors"]),
            f"{report['seconds']:.1f}",
            f"{report['images_per_second']:.2f}",
            f"{report['bytes_written']:,}",
            ", ".join(f"{name} {count}" for name, count in report["replicas"].items()),
        )
        for report in reports
    ]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    print()
    for row in (COLUMNS, *rows):
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
