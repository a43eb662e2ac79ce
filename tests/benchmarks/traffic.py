"""HTTP clients of a running app, as many as wanted at a time, in a thread of this process; each call is counted."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from dataclasses import dataclass
from typing import Any, Self

import httpx
import numpy as np
from PIL import Image

from cluster.errors import CellrayError
from serve_app.client import AsyncClient

SIDE = 64  # px: of the images sent, each a new one
TIMEOUT_S = 240.0


@dataclass(frozen=True)
class Call:
    model: str
    start: float  # of time.monotonic()
    seconds: float
    error: str  # what the caller saw; "" for none


class Traffic:
    """`want(model, count)` clients of the product's own, which tries again where it may; each embeds a new image and
    asks for a mask in it, waits for the answer, and goes on. Use it in a `with`; at the end all have their answers.

    calls: those that were answered, one way or another. refused: answers ≥ 400 and lost connections below the client.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.wanted: dict[str, int] = {}
        self.running: dict[str, int] = {}
        self.begun = 0
        self.calls: list[Call] = []
        self.refused: list[tuple[float, str]] = []
        self.open: dict[str, int] = {}
        self.ending = False
        self.rng = np.random.default_rng(0)
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="traffic")

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending = True
        self.thread.join()

    def want(self, model: str, count: int) -> None:
        self.wanted[model] = count

    async def _run(self) -> None:
        tasks: set[asyncio.Task[None]] = set()
        async with AsyncClient(self.url, timeout_s=TIMEOUT_S, in_flight=256) as client:
            client.http.event_hooks = {"response": [self._answered]}
            while not self.ending:
                for model, count in list(self.wanted.items()):
                    while self.running.get(model, 0) < count:
                        self.running[model] = self.running.get(model, 0) + 1
                        task = asyncio.create_task(self._client(client, model))
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
                await asyncio.sleep(0.1)
            await asyncio.gather(*tasks)

    async def _answered(self, answer: httpx.Response) -> None:
        if answer.status_code >= 400:
            self.refused.append((time.monotonic(), str(answer.status_code)))

    async def _client(self, client: AsyncClient, model: str) -> None:
        while not self.ending and self.running[model] <= self.wanted[model]:
            start, error = time.monotonic(), ""
            self.begun += 1
            self.open[model] = self.open.get(model, 0) + 1
            try:
                found = await client.segment(self._image(), boxes=[[8, 8, 40, 40]], model=model)
                assert len(found) == 1, found
            except CellrayError as failed:
                error = f"{type(failed).__name__}: {failed}"
            self.open[model] -= 1
            self.calls.append(Call(model, start, time.monotonic() - start, error))
        self.running[model] -= 1

    def _image(self) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self.rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(file, "png")
        return file.getvalue()

    def figures(self) -> dict[str, float]:
        lost = [call for call in self.calls if call.error]
        seconds = sorted(call.seconds for call in self.calls)
        return {
            "http_requests": self.begun,
            "http_lost": self.begun - len(self.calls) + len(lost),
            "http_tried_again": len(self.refused),
            "http_p50_s": seconds[len(seconds) // 2],
            "http_max_s": seconds[-1],
        }


def write_images(folder: Any, count: int) -> None:
    """Different PNGs of SIDE pixels."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / f"{index:05d}.png")
