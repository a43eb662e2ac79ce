"""`cellray doctor`: what keeps Cellray from starting or a job from running, and how to mend it.

Each check looks for itself, in a thread of its own and for CHECK_S at most; none needs the others to pass. What is said
holds no secret: names and passwords in URLs, their queries, and the values of secret variables are cut out.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

from cluster import checks_cluster, checks_data, checks_here
from cluster.errors import CellrayError
from cluster.findings import OK, PROBLEM, WARNING, Finding, Setup, Unseen

__all__ = ["OK", "PROBLEM", "WARNING", "Finding", "Setup", "as_json", "report", "run"]

CHECK_S = 30.0
Check = Callable[[Setup], Iterator[Finding]]
ALWAYS: dict[str, Check] = {
    "Serve config": checks_data.serve_file,
    "settings": checks_data.settings_file,
    "packages": checks_here.packages,
    "Ray's folder": checks_here.ray_folder,
    "weights": checks_data.model_weights,
    "places": checks_data.places,
}
HERE: dict[str, Check] = {
    "GPUs": checks_here.gpus,
    "CPUs": checks_here.cpus,
    "memory": checks_here.memory,
    "shared memory": checks_here.shared_memory,
    "ports": checks_here.ports,
    "Ray token": checks_here.token,
}
THERE: dict[str, Check] = {
    "cluster": checks_cluster.reached,
    "Ray token": checks_cluster.token,
    "versions": checks_cluster.versions,
    "resources": checks_cluster.resources,
    "app": checks_cluster.app,
}
USER = re.compile(r"(?<=://)[^/@\s]+@")
QUERY = re.compile(r"(?<=\w)\?[^\s'\"]*=[^\s'\"]*")  # of a URL: it may be a signature
SECRET = re.compile(r"SECRET|TOKEN$|PASSWORD|_KEY$|ACCESS_KEY_ID")
MARKS = {OK: "ok", WARNING: "warning", PROBLEM: "problem"}


def run(setup: Setup, timeout_s: float = CHECK_S) -> list[Finding]:
    """All findings, in the checks' order."""

    _ = setup.read_serve  # nor does Serve's check of a file
    checks = ALWAYS | (THERE if setup.address else HERE)
    if setup.output:
        checks["output"] = checks_data.output
    found: dict[str, list[Finding]] = {}

    def look(name: str, check: Check) -> None:
        found[name] = _look(name, check, setup)

    threads = {name: threading.Thread(target=look, args=(name, check), daemon=True) for name, check in checks.items()}
    for thread in threads.values():
        thread.start()
    deadline = time.monotonic() + timeout_s
    for name, thread in threads.items():
        thread.join(max(0.0, deadline - time.monotonic()))
        if name not in found:
            late = f"did not end within {timeout_s:.0f} s"
            found[name] = [
                Finding(name, PROBLEM, late, "an answer", "something it asks does not answer; try it by hand")
            ]
    return [_clean(one) for name in checks for one in found[name]]


def _look(name: str, check: Check, setup: Setup) -> list[Finding]:
    found = []
    try:
        for one in check(setup):
            found.append(one)
    except Unseen as error:
        found.append(Finding(name, WARNING, f"not looked at: {error}", "that it can", "see the problem that says so"))
    except CellrayError as error:
        found.append(Finding(name, PROBLEM, str(error), "no error", "see the message"))
    except Exception as error:
        said = f"the check itself failed: {type(error).__name__}: {error}"
        found.append(Finding(name, WARNING, said, "an answer", "it is a defect of ours; the others hold"))
    return found


def report(findings: list[Finding]) -> str:
    """For people: a line a check, problems last, with how to mend them."""
    width = max(len(one.check) for one in findings)
    lines = []
    for verdict in (OK, WARNING, PROBLEM):
        for one in findings:
            if one.verdict != verdict:
                continue
            lines.append(f"{MARKS[verdict]:8} {one.check:{width}}  {one.found}")
            if verdict != OK:
                lines.append(f"{'':{width + 10}} expected: {one.expected}")
                lines.append(f"{'':{width + 10}} mend:     {one.mend}")
    counts = [sum(one.verdict == verdict for one in findings) for verdict in (PROBLEM, WARNING)]
    return "\n".join([*lines, "", f"{_plural(counts[0], 'problem')}, {_plural(counts[1], 'warning')}"])


def as_json(findings: list[Finding]) -> str:
    return json.dumps([asdict(one) for one in findings], ensure_ascii=False)


def _plural(count: int, word: str) -> str:
    return f"{count or 'no'} {word}{'' if count == 1 else 's'}"


def _clean(finding: Finding) -> Finding:
    secrets = [value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= 6]
    texts = {}
    for field in ("found", "expected", "mend"):
        text = QUERY.sub("?…", USER.sub("", " ".join(getattr(finding, field).split())))
        for secret in secrets:
            text = text.replace(secret, "…")
        texts[field] = text
    return replace(finding, **texts)
