"""Training by several processes, a GPU each: every one takes its share of a batch, and their gradients are added up.

Several GPUs were not tried yet, only several processes on CPUs. While they run, torch's rendezvous listens on a free
port of all the node's interfaces and asks nobody for a key: for a cluster's own network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError
from torch import distributed

from cluster.errors import CellrayError, Internal, Unavailable
from serve_app.model.encoder import check_device
from serve_app.model.training import Outcome, Sample, Trainer

GRACE_S = 5.0  # in which a rank's death is told after what it broke in the others


@contextmanager
def plain_errors() -> Iterator[None]:
    """Another process's error as what it was there."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, CellrayError):
            raise error.cause from None
        raise Internal(f"the training failed with {type(error.cause).__name__}: {error.cause}") from error
    except RayError as error:
        raise Unavailable(
            f"the training's worker died: {str(error).splitlines()[0]}; the same command goes on"
        ) from error


class Rank:
    """One of the processes."""

    def join(self, make: Callable[[Any, int], Trainer], host: str, port: int, rank: int, ranks: int) -> None:
        store, backend = distributed.TCPStore(host, port), "gloo" if check_device("auto") == "cpu" else "nccl"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks)
        self.trainer = make(distributed.group.WORLD, ranks)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.trainer, method)(*arguments)


class Ranks:
    """A `Trainer` in several processes; the first of them answers for all. One that fails ends all of them."""

    def __init__(self, make: Callable[[Any, int], Trainer], number: int, gpus: float = 1.0) -> None:
        """make: a trainer of a group and of so many processes. gpus: of each process."""
        actor: Any = ray.remote(num_cpus=0, num_gpus=gpus)(Rank)
        host = ray.util.get_node_ip_address()
        self.store = distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self.step_count, self.ranks = 0, [actor.remote() for _ in range(number)]
        where = host, self.store.port
        self._first([one.join.remote(make, *where, rank, number) for rank, one in enumerate(self.ranks)])
        self.weights, self.snapshot = (partial(self._call, self.ranks[:1], one) for one in ("weights", "snapshot"))

    def step(self, samples: list[Sample], progress: float) -> Outcome:
        outcome: Outcome = self._call(self.ranks, "step", samples, progress)
        self.step_count += not samples or math.isfinite(outcome.loss)
        return outcome

    def restore(self, snapshot: dict[str, Any]) -> None:
        self._call(self.ranks, "restore", snapshot)
        self.step_count = snapshot["step"]

    def evaluate(self, samples: Iterable[Sample]) -> dict[str, float]:
        return cast(dict[str, float], self._call(self.ranks[:1], "evaluate", list(samples)))

    def _call(self, ranks: list[Any], method: str, *arguments: Any) -> Any:
        stored = [ray.put(argument) for argument in arguments]
        return self._first([rank.call.remote(method, *stored) for rank in ranks])

    @plain_errors()
    def _first(self, calls: list[Any]) -> Any:
        """The first call's answer, once all are answered; or their error, and the end of those that wait for it."""
        failed: RayTaskError | None = None
        waiting = calls
        try:
            while waiting and (done := ray.wait(waiting, timeout=GRACE_S if failed else None)[0]):
                waiting = [call for call in waiting if call not in done]
                try:
                    ray.get(done)
                except RayTaskError as error:
                    failed = failed or error
            if failed:
                raise failed
            return ray.get(calls[0])
        except RayError:
            for rank in self.ranks:
                ray.kill(rank)
            raise
