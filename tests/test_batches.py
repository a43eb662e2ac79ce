"""What comes while a model is busy runs together, each call gets its own answer, and what was given up is left out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from serve_app.batches import Batches

Runs = list[list[str]]


def batches(runs: Runs, gate: asyncio.Event) -> Batches[str, str]:
    async def run(calls: list[str]) -> Sequence[str]:
        runs.append(calls)
        await gate.wait()
        if "bad" in calls:
            raise ValueError("bad")
        return [call.upper() for call in calls]

    return Batches(run, 6)


def played(play: Callable[[Batches[str, str], asyncio.Event], Awaitable[None]]) -> Runs:
    runs: Runs = []

    async def main() -> None:
        gate = asyncio.Event()
        await asyncio.wait_for(play(batches(runs, gate), gate), 10)

    asyncio.run(main())
    return runs


async def asked(made: Batches[str, str], *calls: str) -> list[asyncio.Task[str]]:
    tasks = [asyncio.create_task(made(call)) for call in calls]
    await asyncio.sleep(0.01)
    return tasks


def test_what_comes_while_it_is_busy_runs_together_within_its_bound() -> None:
    async def play(made: Batches[str, str], gate: asyncio.Event) -> None:
        tasks = await asked(made, "a")
        tasks += await asked(made, "bb", "cc", "dd", "e")
        tasks += await asked(made, "longest")
        gate.set()
        assert [await task for task in tasks] == ["A", "BB", "CC", "DD", "E", "LONGEST"]
        assert await made("f") == "F"

    assert played(play) == [["a"], ["bb", "cc", "dd"], ["e"], ["longest"], ["f"]]


def test_what_was_given_up_is_left_out() -> None:
    async def play(made: Batches[str, str], gate: asyncio.Event) -> None:
        tasks = [*await asked(made, "a"), *await asked(made, "b", "c")]
        tasks[0].cancel()
        tasks[1].cancel()
        await asyncio.sleep(0.01)
        gate.set()
        assert await tasks[2] == "C"
        assert (tasks[0].cancelled(), tasks[1].cancelled()) == (True, True)

    assert played(play) == [["a"], ["c"]]


def test_an_error_is_that_of_its_run_alone() -> None:
    async def play(made: Batches[str, str], gate: asyncio.Event) -> None:
        gate.set()
        tasks = await asked(made, "bad", "ok")
        for task in tasks:
            with pytest.raises(ValueError, match="bad"):
                await task
        assert await made("more") == "MORE"

    assert played(play) == [["bad", "ok"], ["more"]]


def test_answers_that_are_too_few_are_an_error() -> None:
    async def main() -> None:
        async def run(calls: list[str]) -> list[str]:
            return calls[:1]

        made = Batches(run, 6)
        tasks = await asked(made, "a", "b")
        assert await tasks[0] == "a"
        with pytest.raises(ValueError, match="shorter"):
            await tasks[1]

    asyncio.run(asyncio.wait_for(main(), 10))
