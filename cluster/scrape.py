"""Cellray's metrics of the whole cluster as one Prometheus text: from every node's agent, within bounds."""

from __future__ import annotations

import asyncio
import logging
import re

import anyio.to_thread
import httpx

from cluster.settings import MIB

log = logging.getLogger("ray.serve")

PREFIX = "ray_cellray_"  # as Ray's agents call what telemetry names cellray_…
NODES_AT_ONCE = 16
MAX_NODES = 1024
TIMEOUT_S = 5.0  # of all nodes together
MAX_NODE_BYTES = 16 * MIB
NOISE = re.compile(r',otel_scope_\w+="[^"]*"')  # the same in every line
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def cluster_metrics() -> str:
    """What the nodes' agents have, which replicas report to every few seconds. A node that does not answer in time is
    left out, and named in the log."""
    urls = await anyio.to_thread.run_sync(agents)
    at_once = asyncio.Semaphore(NODES_AT_ONCE)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:

        async def fetch(url: str) -> str:
            async with at_once:
                return await _fetch(client, url)

        tasks = [asyncio.create_task(fetch(url)) for url in urls[:MAX_NODES]]
        done, late = await asyncio.wait(tasks, timeout=TIMEOUT_S) if tasks else (set(), set())
        for task in late:
            task.cancel()
    texts = []
    for url, task in zip(urls, tasks, strict=False):
        if task in done and task.exception() is None:
            texts.append(task.result())
        else:
            why = "too late" if task in late else type(task.exception()).__name__
            log.warning(f"no metrics from {url}: {why}")
    return merge(texts)


def agents() -> list[str]:
    """The URL of every living node's metrics."""
    import ray
    from ray._common.network_utils import build_address

    return [
        f"http://{build_address(node['NodeManagerAddress'], node['MetricsExportPort'])}/metrics"
        for node in ray.nodes()
        if node["Alive"] and node["MetricsExportPort"]
    ]


async def _fetch(client: httpx.AsyncClient, url: str) -> str:
    found = bytearray()
    async with client.stream("GET", url) as answer:
        answer.raise_for_status()
        async for chunk in answer.aiter_bytes():
            found += chunk
            if len(found) > MAX_NODE_BYTES:
                raise ValueError("too long")
    return found.decode(errors="replace")


def merge(texts: list[str]) -> str:
    """Prometheus texts → one, of PREFIX's metrics alone, each under one HELP and TYPE."""
    comments: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        family = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                _, kind, family, _ = [*line.split(" ", 3), ""][:4]
                comments.setdefault(family, {}).setdefault(kind, line)
            elif line.startswith(PREFIX) and family.startswith(PREFIX):
                samples.setdefault(family, []).append(NOISE.sub("", line))
    lines = [line for family, found in samples.items() for line in (*comments[family].values(), *found)]
    return "\n".join([*lines, ""])
