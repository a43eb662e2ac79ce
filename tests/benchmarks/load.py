"""Load on an HTTP server, from a process of its own: reads a plan as JSON from stdin, prints what came of it as JSON.

    {"url": …, "requests": [{"path", "method", "headers", "file" | "text" | "form": {"image": file, "request": text}}],
     "clients": 8, "count": 1000, "seconds": 60}                    clients that each wait for their answer
    {…, "rate": 5.0, "seconds": 60}                                 so many a second, whoever has been answered

Requests are taken in turn. A client stops at `count` in all, or after `seconds`. `results`: for each its start and
length in seconds, status (0: no answer), bytes out and in, and the milliseconds that the server says were its model's.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

MOST_OPEN = 2000
TIMEOUT_S = 700  # longer than the service keeps anybody waiting


def run(plan: dict[str, Any]) -> list[dict[str, float]]:
    """The results, from such a process."""
    words = [sys.executable, "-m", "tests.benchmarks.load"]
    done = subprocess.run(words, input=json.dumps(plan), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the load failed: {done.stderr[-2000:]}")
    return list(json.loads(done.stdout))


def _body(request: dict[str, Any]) -> Any:
    if "form" in request:
        form = aiohttp.FormData()
        form.add_field("image", Path(request["form"]["image"]).read_bytes(), filename="image")
        form.add_field("request", request["form"]["request"])
        return form
    return Path(request["file"]).read_bytes() if "file" in request else request.get("text", "").encode()


async def _one(session: aiohttp.ClientSession, url: str, request: dict[str, Any]) -> dict[str, float]:
    start, status, got, inference = time.perf_counter(), 0, 0, 0.0
    body = _body(request)
    sent = len(body) if isinstance(body, bytes) else Path(request["form"]["image"]).stat().st_size
    try:
        method, headers = request.get("method", "POST"), request.get("headers", {})
        async with session.request(method, url + request["path"], data=body, headers=headers) as answer:
            got, status = len(await answer.read()), answer.status
            inference = float(answer.headers.get("x-inference-time", 0))
            got += sum(len(name) + len(value) + 4 for name, value in answer.headers.items())
    except (aiohttp.ClientError, TimeoutError):
        pass
    seconds = time.perf_counter() - start
    return {"start": start, "s": seconds, "status": status, "sent": sent, "got": got, "inference_ms": inference}


async def _closed(session: aiohttp.ClientSession, plan: dict[str, Any]) -> list[dict[str, float]]:
    coming: Iterator[dict[str, Any]] = itertools.islice(itertools.cycle(plan["requests"]), plan.get("count"))
    end, results = time.perf_counter() + plan.get("seconds", TIMEOUT_S), []

    async def client() -> None:
        for request in coming:
            if time.perf_counter() > end:
                return
            results.append(await _one(session, plan["url"], request))

    await asyncio.gather(*(client() for _ in range(plan["clients"])))
    return results


async def _open(session: aiohttp.ClientSession, plan: dict[str, Any]) -> list[dict[str, float]]:
    start, tasks = time.perf_counter(), []
    requests = itertools.cycle(plan["requests"])
    for number in range(min(MOST_OPEN, int(plan["rate"] * plan["seconds"]))):
        await asyncio.sleep(max(0.0, start + number / plan["rate"] - time.perf_counter()))
        tasks.append(asyncio.create_task(_one(session, plan["url"], next(requests))))
    return list(await asyncio.gather(*tasks))


async def _main() -> None:
    plan = json.load(sys.stdin)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        results = await (_open(session, plan) if "rate" in plan else _closed(session, plan))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    asyncio.run(_main())
