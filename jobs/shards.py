"""Run the shards of a plan: Ray tasks that read ahead within a byte budget, call the replicas, and commit."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Generic, TypeVar, cast

import ray
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import RayServeException

from cluster.errors import CellrayError, Conflict, Internal, InvalidImage, Unavailable
from cluster.memory import private_mb
from cluster.settings import MIB, Settings
from cluster.storage import Storage
from jobs import images
from jobs.images import Entry
from jobs.parts import name_of, parts
from serve_app.commit import ShardWriter
from serve_app.dataset import ERRORS, error_row
from serve_app.service import foreign

Source = TypeVar("Source")
Item = TypeVar("Item")
Result = TypeVar("Result")

log = logging.getLogger(__name__)

IN_FLIGHT_BYTES = 256 * MIB  # read and waiting for a replica, a task
READERS = 4
AHEAD = 2  # images that are opened while another's tiles are read
CALLS = 3  # handle calls a task keeps open: one runs, one waits at the replica, one is on its way
ATTEMPTS = 6  # of a read or a call whose other end was away or busy: about half a minute in all
TASK_CPUS = 0.5  # a core, half the time: while a task publishes its shard, the next one's reads
SHARD_ATTEMPTS = 3  # of a task whose worker died; before the last its images are tried one by one
PROBE_ATTEMPTS = 2  # of an image: one that ends so many workers that do nothing else is left out
BACKOFF_S = 1.0
PROBE_PX = 64
FIRST_WORD_S, WORDS_S = 1.0, 10.0  # a task tells its driver how far it is: first so soon, later this far apart
REPORT_SHARE = 0.05  # of the driver's time, at most: a report looks at all shards, of which there may be very many


@dataclass
class Progress:
    """What a shard's task tells its driver, for this shard so far. `seconds` add up over threads."""

    shard: int
    images: int = 0
    errors: int = 0
    unchanged: int = 0
    masks: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    encoder_calls: int = 0
    retries: int = 0
    written: bool = False  # all of its rows; what is left is to publish them
    memory_mb: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Done(Generic[Source, Item, Result]):
    """A source's way through the pipeline: what was read, and what the replicas answered; either may be an error."""

    source: Source
    item: Item | CellrayError
    result: Result | CellrayError | None


class Pipeline(Generic[Source, Item, Result]):
    """sources → read (threads) → call (a batch at a time, threads) → `Done`, in the order of the sources.

    read(source) and call(items) run in threads; `call` returns one result or error an item.
    cost(source) is the bytes it holds while in flight; at most IN_FLIGHT_BYTES are, but always at least one source.
    An error of a source stays with it; one that would hit all of them (no storage, no replicas, another decoder than
    the plan's) is raised.
    """

    def __init__(
        self,
        read: Callable[[Source], Item],
        call: Callable[[list[Item]], list[Result | CellrayError]],
        cost: Callable[[Source], int],
        batch: int,
        progress: Progress,
    ) -> None:
        self.read, self.call, self.cost, self.batch, self.progress = read, call, cost, batch, progress
        self.lock = threading.Lock()

    def run(self, sources: Iterable[Source]) -> Iterator[Done[Source, Item, Result]]:
        coming = iter(sources)
        waiting = deque(islice(coming, 1))
        reading: deque[tuple[Source, Future[Item | CellrayError]]] = deque()
        calling: deque[Future[list[Done[Source, Item, Result]]]] = deque()
        held = 0
        readers, callers = ThreadPoolExecutor(READERS, "read"), ThreadPoolExecutor(CALLS, "call")
        try:
            while waiting or reading or calling:
                while waiting and (not held or held + self.cost(waiting[0]) <= IN_FLIGHT_BYTES):
                    held += self.cost(waiting[0])
                    reading.append((waiting[0], readers.submit(self._read, waiting.popleft())))
                    waiting += islice(coming, 1)
                if reading and len(calling) < CALLS:
                    chosen = [reading.popleft() for _ in range(min(self.batch, len(reading)))]
                    items = [(source, future.result()) for source, future in chosen]
                    calling.append(callers.submit(self._call, items))
                    continue
                for done in calling.popleft().result():
                    held -= self.cost(done.source)
                    yield done
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            callers.shutdown(wait=False, cancel_futures=True)

    def _read(self, source: Source) -> Item | CellrayError:
        start = time.perf_counter()
        try:
            return self.persist(lambda: self.read(source))
        except CellrayError as error:
            if error.retry:
                raise
            return error
        finally:
            self._took("read", start)

    def _call(self, items: list[tuple[Source, Item | CellrayError]]) -> list[Done[Source, Item, Result]]:
        start = time.perf_counter()
        good = [item for _, item in items if not isinstance(item, CellrayError)]
        results: Iterator[Result | CellrayError] = iter(self._answers(good) if good else [])
        self._took("call", start)
        return [Done(source, item, None if isinstance(item, CellrayError) else next(results)) for source, item in items]

    def _answers(self, items: list[Item]) -> list[Result | CellrayError]:
        try:
            return self.persist(lambda: self.call(items))
        except CellrayError as error:
            if error.retry or isinstance(error, Conflict):
                raise
            return [error] * len(items)

    def persist(self, attempt: Callable[[], Any]) -> Any:
        """Try until it answers; an error of its own that will not go away is raised at once."""
        for left in reversed(range(ATTEMPTS)):
            try:
                return attempt()
            except (CellrayError, RayError, RayServeException, TimeoutError) as error:
                ours = foreign(error)
                if not ours.retry or not left:
                    log.warning(f"{ours}: {error}")
                    raise ours from error
            with self.lock:
                self.progress.retries += 1
            time.sleep(BACKOFF_S * 2 ** (ATTEMPTS - 1 - left) * random.uniform(0.5, 1))
        raise AssertionError("unreachable")

    def _took(self, stage: str, start: float) -> None:
        with self.lock:
            self.progress.seconds[stage] = self.progress.seconds.get(stage, 0) + time.perf_counter() - start


def ahead(items: Iterable[Source], prepare: Callable[[Source], Result]) -> Iterator[Result]:
    """`prepare` of each, in their order; AHEAD of them in threads while one is used."""
    coming, threads = iter(items), ThreadPoolExecutor(AHEAD, "open")
    try:
        waiting = deque(threads.submit(prepare, item) for item in islice(coming, AHEAD))
        while waiting:
            found = waiting.popleft().result()
            waiting += [threads.submit(prepare, item) for item in islice(coming, 1)]
            yield found
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def written(
    pipeline: Pipeline[Any, Any, Any],
    sources: Iterable[Any],
    writer: ShardWriter,
    stage: str,
    add: Callable[[Done[Any, Any, Any]], int],
) -> Iterator[Progress]:
    """A shard's sources through its pipeline into rows, then its commit; → how far it is, now and then: one driver
    listens to all tasks, and takes a word in 0.4 ms.

    `add` writes what one became, and says how many error rows it wrote. Those of what failed on the way, in `read` or
    in `stage`, are written here.
    """
    progress, failures = pipeline.progress, 0
    started = time.monotonic()
    due = started + FIRST_WORD_S
    for rows, done in enumerate(pipeline.run(sources), 1):
        entry, part = done.source.entry, done.source.part
        for where, found in (("read", done.item), (stage, done.result)):
            if isinstance(found, CellrayError):
                writer.add(ERRORS, error_row(entry.uri, where, found, name_of(done.source)))
                failures += 1
        failures += add(done)
        if part is None or part.ends:
            progress.images += 1
            progress.errors += failures > 0
            failures = 0
        if rows % pipeline.batch == 0 and (now := time.monotonic()) >= due:
            due = now + min(now - started, WORDS_S)
            yield measured(progress)
    progress.written = True
    yield measured(progress)
    record = writer.commit()
    progress.bytes_written = sum(file.bytes for file in record.files)
    yield measured(progress)


def run(
    task: Any,
    arguments: tuple[Any, ...],
    shards: Sequence[int],
    sources: Callable[[int], Sequence[Any]],
    parallel: int,
    report: Callable[[list[Progress]], bool],
) -> list[Progress]:
    """Run `task.remote(*arguments, index, sources(index), poisoned)` for each index of `shards`, at most `parallel` at
    a time, and as many again that only publish what they wrote: that costs time, not CPU. `arguments` begin with the
    settings; `poisoned` are the URIs of images that no worker survives.

    `task` is a Ray remote function that yields Progress. `report` is called first, and then whenever there is something
    new and its last call was long enough ago; once it answers False no more shards are begun, and those that are come
    to their end.
    A shard whose worker died is run again; a CellrayError from a shard stops all of them, and so does Ctrl-C.
    """
    waiting = deque(shards)
    latest: dict[int, Progress] = {}
    attempts: dict[int, int] = {}
    running: dict[Any, int] = {}
    poisoned: dict[int, frozenset[str]] = {}

    due = 0.0
    try:
        while waiting or running:
            if (begun := time.monotonic()) >= due:
                if not report(list(latest.values())):
                    waiting.clear()
                now = time.monotonic()
                due = now + (now - begun) / REPORT_SHARE
            working = sum(index not in latest or not latest[index].written for index in running.values())
            while waiting and len(running) < 2 * parallel and working < parallel:
                index, working = waiting.popleft(), working + 1
                attempts[index] = attempts.get(index, 0) + 1
                own = index, sources(index), poisoned.get(index, frozenset())
                stream = task.options(num_returns="streaming").remote(*arguments, *own)
                running[stream] = index
            ready: list[Any] = ray.wait(list(running), timeout=1.0)[0] if running else []
            if ready and len(running) > 1:  # all that have something by now: to look costs as much for all as for one
                ready = ray.wait(list(running), num_returns=len(running), timeout=0)[0]
            for stream in ready:
                index = running[stream]
                try:
                    latest[index] = cast(Progress, ray.get(next(stream)))
                except StopIteration:
                    del running[stream]
                except RayTaskError as error:
                    cause = error.cause
                    if isinstance(cause, CellrayError):
                        raise cause from None
                    raise Internal(f"shard {index} failed with {type(cause).__name__}: {cause}") from error
                except RayError as error:
                    if attempts[index] == SHARD_ATTEMPTS or isinstance(error, TaskCancelledError):
                        raise Unavailable(f"shard {index} gave up after {attempts[index]} attempts: {error}") from error
                    log.warning(f"the worker of shard {index} died; the shard starts again")
                    del running[stream]
                    latest.pop(index, None)
                    waiting.append(index)
                    if attempts[index] == SHARD_ATTEMPTS - 1:
                        poisoned[index] = _deadly(arguments[0], [source.entry for source in sources(index)])
        report(list(latest.values()))
        return list(latest.values())
    finally:
        for stream in running:
            ray.cancel(stream)


def _deadly(settings: Settings, entries: Iterable[Entry]) -> frozenset[str]:
    """The URIs of those whose reading ends its worker; other errors are for the shard to find."""
    found = set()
    for entry in entries:
        for left in reversed(range(PROBE_ATTEMPTS)):
            try:
                ray.get(_read_alone.remote(settings, entry))
                break
            except RayTaskError:
                break
            except RayError:
                if not left:
                    log.warning(f"reading {entry.uri} ends its worker: it is left out")
                    found.add(entry.uri)
    return frozenset(found)


@ray.remote(num_cpus=1, max_retries=0)
def _read_alone(settings: Settings, entry: Entry) -> None:
    data = images.content(Storage(settings.storage), entry, settings.limits.image_bytes)
    for part in parts(entry, data, settings.limits):
        with suppress(CellrayError):
            part.read(PROBE_PX)


def sound(entry: Entry, poisoned: frozenset[str]) -> None:
    """Raises InvalidImage for one that no worker survives."""
    if entry.uri in poisoned:
        raise InvalidImage(f"reading it ended {PROBE_ATTEMPTS} workers that did nothing else: it is left out")


def measured(progress: Progress) -> Progress:
    """A copy to send, with this process's memory: the most it held whenever this was called."""
    progress.memory_mb = max(progress.memory_mb, private_mb())
    return replace(progress)
