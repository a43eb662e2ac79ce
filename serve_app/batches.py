"""Calls that come while a model is busy go together in its next run."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence, Sized
from contextvars import Context
from typing import Generic, TypeVar

Call = TypeVar("Call", bound=Sized)
Answer = TypeVar("Answer")


class Batches(Generic[Call, Answer]):
    """`run` answers several calls at once, in their order; one run at a time, of at most `most` items. A call with more
    runs alone. A model that is free begins at once, and what its caller gave up before its run is left out.

    (Serve's batches are closed before they wait for the model: what comes meanwhile runs in many small ones.)
    """

    def __init__(self, run: Callable[[list[Call]], Awaitable[Sequence[Answer]]], most: int) -> None:
        self.run, self.most = run, most
        self.waiting: deque[tuple[Call, asyncio.Future[Answer]]] = deque()
        self.running: asyncio.Task[None] | None = None

    async def __call__(self, call: Call) -> Answer:
        """Raises what the run did."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.waiting.append((call, answer))
        if self.running is None or self.running.done():
            self.running = asyncio.create_task(self._run_all(), context=Context())
        return await answer

    async def _run_all(self) -> None:
        while taken := self._take():
            try:
                answers = await self.run([call for call, _ in taken])
                for (_, answer), value in zip(taken, answers, strict=True):
                    if not answer.done():
                        answer.set_result(value)
            except Exception as error:
                for _, answer in taken:
                    if not answer.done():
                        answer.set_exception(error)

    def _take(self) -> list[tuple[Call, asyncio.Future[Answer]]]:
        taken: list[tuple[Call, asyncio.Future[Answer]]] = []
        items = 0
        while self.waiting:
            call, answer = self.waiting[0]
            if not answer.done():
                items += len(call)
                if taken and items > self.most:
                    break
                taken.append((call, answer))
            self.waiting.popleft()
        return taken
