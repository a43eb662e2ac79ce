"""Batches in which one bad item fails alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from cluster.errors import CellrayError, Internal

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def answers(
    items: Sequence[Item],
    problem: Callable[[Item], CellrayError | None],
    run: Callable[[list[Item]], Sequence[Answer | CellrayError]],
    most: int,
) -> list[Answer | CellrayError]:
    """`run` of the items without a `problem`, at most `most` at a time, in their order; of the others the problem.

    Where a batch fails, for want of memory mostly, its items run one by one; Internal is for those that fail alone.
    """
    found: list[Answer | CellrayError | None] = [problem(item) for item in items]
    good = [index for index, one in enumerate(found) if one is None]
    for start in range(0, len(good), most):
        chosen = good[start : start + most]
        for index, answer in zip(chosen, _run([items[index] for index in chosen], run), strict=True):
            found[index] = answer
    return [one for one in found if one is not None]


def _run(
    items: list[Item], run: Callable[[list[Item]], Sequence[Answer | CellrayError]]
) -> list[Answer | CellrayError]:
    try:
        return list(run(items))
    except RuntimeError:
        log.exception(f"the model failed on a batch of {len(items)}")
    # Here the failed batch's memory is free.
    if len(items) > 1:
        return [answer for item in items for answer in _run([item], run)]
    return [Internal("the model failed on this image; the replica's log has the cause")]
