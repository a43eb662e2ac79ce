"""A discrete-event model of jobs.embed on many replicas: tasks that read, their routers, replicas, the one driver."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from dataclasses import dataclass, field

from jobs.shards import CALLS

AHEAD = 8  # batches that a task has read and not passed on: IN_FLIGHT_BYTES over a batch's bytes


@dataclass(frozen=True)
class Cluster:
    """All times in seconds; a batch is what one call carries."""

    replicas: int
    tasks: int
    batch_s: float  # of the encoder
    replica_s: float = 0.0  # between two batches of a replica
    wire_s: float = 0.0  # a call's way to the replica and back
    blind: float = 0.0  # share of calls whose router knows no queue's length and takes any replica
    cores: int = 0  # that all calls share, where they do: half of `cpu_s` before a call reaches its replica, half after
    cpu_s: float = 0.0
    read_s: float = 0.0  # of a task, until it has read a batch
    shard_batches: int = 0  # 0: shards do not end
    shard_s: float = 0.0  # from the driver's word to the first call of a task's next shard
    message_s: float = 0.0  # of the driver, which takes one after another, for what a task tells it
    messages_a_batch: float = 0.0
    end_s: float = 0.0  # of the driver, for a shard's end and the next one's begin


@dataclass
class _Task:
    left: int
    open: deque[list[bool]] = field(default_factory=deque)  # calls in their order: answered?
    read: float = 0.0  # when its next batch is there
    taken: deque[float] = field(default_factory=lambda: deque(maxlen=AHEAD))


def batches_a_second(cluster: Cluster, seconds: float, seed: int = 0) -> float:
    """In a run of `seconds`, of which the first fifth does not count."""
    rng, order = random.Random(seed), itertools.count()
    lengths = [0] * cluster.replicas  # calls at each replica, and on the way to it
    queues: list[deque[tuple[_Task, list[bool]]]] = [deque() for _ in lengths]
    events: list[tuple[float, int, int, object]] = []
    ISSUE, ARRIVE, DONE, BACK = range(4)
    driver, done = 0.0, 0
    cores = [0.0] * cluster.cores  # when each is free

    def travelled(now: float) -> float:
        """When what leaves now is there."""
        if cores:
            now = max(now, heapq.heappop(cores)) + cluster.cpu_s / 2
            heapq.heappush(cores, now)
        return now + cluster.wire_s / 2

    def at(time: float, kind: int, what: object) -> None:
        heapq.heappush(events, (time, next(order), kind, what))

    def issue(task: _Task, now: float) -> None:
        while len(task.open) < CALLS and (task.left or not cluster.shard_batches):
            if task.read > now:
                at(task.read, ISSUE, task)
                return
            task.left -= 1
            task.taken.append(now)
            begun = task.taken[0] if len(task.taken) == AHEAD else 0.0
            task.read = max(task.read, begun) + cluster.read_s
            call = [False]
            task.open.append(call)
            some = rng.randrange(cluster.replicas), rng.randrange(cluster.replicas)
            chosen = some[0] if rng.random() < cluster.blind else min(some, key=lengths.__getitem__)
            lengths[chosen] += 1
            at(travelled(now), ARRIVE, (chosen, task, call))

    for _ in range(cluster.tasks):
        first = rng.randint(1, cluster.shard_batches) if cluster.shard_batches else 0
        at(rng.uniform(0, cluster.batch_s), ISSUE, _Task(first))
    while events:
        now, _, kind, what = heapq.heappop(events)
        if now > seconds:
            break
        if kind == ISSUE:
            issue(what, now)
        elif kind == ARRIVE:
            replica, task, call = what
            queues[replica].append((task, call))
            if len(queues[replica]) == 1:
                at(now + cluster.batch_s, DONE, replica)
        elif kind == DONE:
            task, call = queues[what].popleft()
            lengths[what] -= 1
            done += now >= seconds / 5
            at(travelled(now), BACK, (task, call))
            if queues[what]:
                at(now + cluster.replica_s + cluster.batch_s, DONE, what)
        else:
            task, call = what
            call[0] = True
            while task.open and task.open[0][0]:
                task.open.popleft()
                driver = max(driver, now) + cluster.messages_a_batch * cluster.message_s
            if cluster.shard_batches and not task.left and not task.open:
                driver = max(driver, now) + cluster.end_s
                task.left = cluster.shard_batches
                at(driver + cluster.shard_s, ISSUE, task)
            else:
                issue(task, now)
    return done / (0.8 * seconds)
