"""Executor on the worker processes of a Dask scheduler.

The driver decides which process works on which block, one block per process at a time, and submits a task only when a
process is free for it: scheduler and client hold as many tasks as there are processes. Each attempt is a separate Dask
task bound to its process. So Dask never repeats a task by itself, and the block that a dead process worked on is known.

```text
  Run --submit--> waiting --free process--> in flight --result--> Run
                     ^                          |
                     +---- again, elsewhere <---+ process died | transient error
                     +---- again, alone     <---+ process died, for the second time
                                                +--> WorkerDied: for the third time, alone
```
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import queue
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import cloudpickle  # type: ignore[import-untyped]  # it has no types of its own
import dask
import distributed
from distributed import KilledWorker
from distributed.comm.core import CommClosedError  # not documented; `run(on_error="return")` returns it
from zarr.storage import LocalStore

from oocpatch.engine.stages import TaskResult
from oocpatch.errors import ClusterLost, OocpatchError
from oocpatch.execution.scheduler import Stopped, Task
from oocpatch.storage.retries import ATTEMPTS, hopeless, transient

logger = logging.getLogger("oocpatch")

DEATHS = 3
"""Number of processes that may die while they work on a block before the block counts as the cause."""

REFRESH_SECONDS = 0.5
"""Interval at which the driver updates its set of worker processes."""

GATHER_SECONDS, FLUSH_SECONDS, CLOSE_SECONDS = 5.0, 60.0, 5.0
"""Time limits: for the transfer of a result, for a function that every process runs, for a call at the end of a run."""

WAIT = "oocpatch.wait-for-workers"
"""Setting of Dask: how long a run waits for the first worker, or for another one when all are gone."""

RESUME = "finished blocks are kept, and the same call continues"


class WorkerDied(OocpatchError, RuntimeError):
    """The processes that worked on a block died, the last one while nothing else was running."""


class RunHandle(Protocol):
    """Reference to a run that every task carries; see `oocpatch.execution.payload`."""

    @property
    def token(self) -> str:
        """Name of the call of `predict`."""


NO_MORE_WORKERS: weakref.WeakKeyDictionary[distributed.Client, Callable[[], str]] = weakref.WeakKeyDictionary()
"""By client of a batch system: a function that returns why no worker will come any more, an empty text if one may.

Other clients have no entry; they wait for workers for a limited time."""


@dataclass
class _Attempt:
    """A task that is waiting or in flight, and its history.

    Attributes:
        result: completed with the task's result or error.
        failures, deaths: number of times that it failed, and that a process died while it worked on it.
        alone: run it only while nothing else is in flight.
        due: earliest time of the next try.
        address, future: of the process that works on it, and of Dask.
    """

    task: Task
    result: Future[TaskResult]
    failures: int = 0
    deaths: int = 0
    alone: bool = False
    due: float = 0.0
    address: str = ""
    future: Any = None


@dataclass
class ClusterExecutor:
    """An executor on the worker processes of a Dask scheduler.

    Attributes:
        client: the user's client; it stays open.
        handle: reference to the run, passed to `work`.
        work: runs a task in a worker process; its third argument is the rank of the process on its host.
        drop: closes a run in a worker process, by its token.
        max_processes: number of processes to use; None: all.
        on_done: called with each finished task and its result.
    """

    client: distributed.Client
    handle: RunHandle
    work: Callable[[Any, Task, int], TaskResult]
    drop: Callable[[str], None]
    max_processes: int | None = None
    on_done: Callable[[Task, TaskResult], None] = lambda *_: None
    _inbox: queue.SimpleQueue[_Attempt | None] = field(default_factory=queue.SimpleQueue)
    _waiting: deque[_Attempt] = field(default_factory=deque)
    _in_flight: list[_Attempt] = field(default_factory=list)
    _processes: set[str] = field(default_factory=set)
    _ranks: dict[str, int] = field(default_factory=dict)
    _refreshed_at: float = 0.0
    _workers_seen_at: float = field(default_factory=time.monotonic)
    _stopping: bool = False
    _attempts: int = 0

    def __enter__(self) -> Self:
        self._refresh_workers()
        self._thread = threading.Thread(target=self._serve, name="oocpatch-cluster", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(GATHER_SECONDS + CLOSE_SECONDS)
        if self.client.status == "running":
            # Bounded: a frozen process does not answer, and the scheduler waits for it.
            call_bounded(lambda: self.client.run(self.drop, self.handle.token, on_error="ignore"))

    @property
    def max_in_flight(self) -> int:
        """Number of tasks to keep submitted: one per process."""
        return max(1, min(len(self._processes), self.max_processes or len(self._processes)))

    @property
    def normalize_slots(self) -> int:
        """A process works on one block at a time, whatever its stage."""
        return 0

    def run_on_all_workers(self, function: Callable[[], None]) -> None:
        """Run a function in every process; raise the `OSError` of one where it fails."""
        answers = call_bounded(lambda: self.client.run(function, on_error="return"), FLUSH_SECONDS)
        if answers is None:
            logger.warning("not all workers answered within %.0f s: the disk may not have all of it yet", FLUSH_SECONDS)
        for error in (answers or {}).values():
            if isinstance(error, OSError) and not isinstance(error, CommClosedError):
                raise error

    def submit(self, task: Task) -> Future[TaskResult]:
        """Begin a task."""
        attempt = _Attempt(task, Future())
        self._inbox.put(attempt)
        return attempt.result

    def stop(self) -> None:
        """Drop the tasks in flight; processes stop at the next patch."""
        self._stopping = True
        self._inbox.put(None)

    def _serve(self) -> None:
        try:
            while not self._stopping:
                with contextlib.suppress(queue.Empty):
                    event = self._inbox.get(timeout=REFRESH_SECONDS)
                    while True:
                        self._waiting.extend([event] if event is not None else [])
                        event = self._inbox.get_nowait()
                self._collect()
                if time.monotonic() - self._refreshed_at >= REFRESH_SECONDS:
                    self._refresh_workers()
                self._dispatch()
        except ClusterLost as lost:
            self._fail_all(lost)
        except Exception as error:  # noqa: BLE001 - whatever Dask raises when its scheduler goes away
            self._fail_all(ClusterLost(f"the scheduler is lost ({type(error).__name__}: {error}); {RESUME}"))
        for attempt in self._in_flight:
            with contextlib.suppress(Exception):  # the scheduler may be gone
                attempt.future.release()
        self._in_flight.clear()

    def _fail_all(self, lost: ClusterLost) -> None:
        """Fail all tasks, also those that are submitted from now on, until the run stops."""
        while not self._stopping:
            for attempt in (*self._in_flight, *self._waiting):
                if not attempt.result.done():
                    attempt.result.set_exception(lost)
            self._waiting.clear()
            event = self._inbox.get()
            self._waiting.extend([event] if event is not None else [])

    def _refresh_workers(self) -> None:
        """Update the set of processes, and retry tasks whose process is gone; refuse a cluster that is lost."""
        if self.client.status != "running":
            raise ClusterLost(f"the scheduler is lost (the client is {self.client.status}); {RESUME}")
        self._processes = set(self.client.nthreads())  # type: ignore[no-untyped-call]  # so has distributed, in places
        self._ranks = {address: rank for address, rank in self._ranks.items() if address in self._processes}
        self._refreshed_at = now = time.monotonic()
        if self._processes:
            self._workers_seen_at = now
        elif now - self._workers_seen_at > (seconds := float(dask.utils.parse_timedelta(dask.config.get(WAIT, "60s")))):
            advice = f"start workers, or set the time to wait (dask.config: {WAIT})"
            timed_out = f"there were no workers for {seconds:.0f} s; {advice}"
            if reason := NO_MORE_WORKERS.get(self.client, lambda: timed_out)():
                raise ClusterLost(f"{reason}; {RESUME}")
            self._workers_seen_at = now
        for attempt in [a for a in self._in_flight if a.address not in self._processes]:
            self._died(attempt)

    def _collect(self) -> None:
        """Pass on results and errors of finished tasks."""
        for attempt in list(self._in_flight):
            status = attempt.future.status
            if status == "cancelled":
                raise ClusterLost(f"the scheduler is lost, or tasks were cancelled there; {RESUME}")
            with contextlib.suppress(TimeoutError, InvalidStateError):
                if status == "finished":
                    result = attempt.future.result(timeout=GATHER_SECONDS)
                    self._remove(attempt)
                    self.on_done(attempt.task, result)
                    attempt.result.set_result(result)
                elif status == "error":
                    self._failed(attempt, attempt.future.exception(timeout=GATHER_SECONDS))
            # TimeoutError: the process may have died with the result, which the next refresh will show.
            # InvalidStateError: the run was interrupted, and nobody waits for the result.

    def _failed(self, attempt: _Attempt, error: BaseException) -> None:
        if isinstance(error, KilledWorker):
            self._died(attempt)
            return
        if isinstance(error, Stopped):
            error = ClusterLost(f"the worker at {attempt.address} does not see the run's workspace; {RESUME}")
        self._remove(attempt)
        attempt.failures += 1
        if transient(error) and not hopeless(error) and attempt.failures < ATTEMPTS:
            pause = random.uniform(0.5, 1.0) * min(5.0, 0.2 * 2**attempt.failures)  # noqa: S311 - not a secret
            attempt.due = time.monotonic() + pause
            self._waiting.append(attempt)
        else:
            attempt.result.set_exception(error)

    def _died(self, attempt: _Attempt) -> None:
        """Retry a task whose process is gone: elsewhere, then alone; after that, its block counts as the cause."""
        index, alone = attempt.task.index, attempt.alone
        self._remove(attempt)
        attempt.deaths += 1
        logger.warning("the worker at %s died while it worked on block %d", attempt.address, index)
        if alone and attempt.deaths >= DEATHS:
            attempt.result.set_exception(
                WorkerDied(
                    f"{attempt.deaths} worker processes died while they worked on it, the last one while nothing else "
                    "was running: out of memory, or a crash in the model's own code?"
                )
            )
        else:
            attempt.alone = attempt.deaths >= DEATHS - 1
            self._waiting.append(attempt)

    def _remove(self, attempt: _Attempt) -> None:
        self._in_flight.remove(attempt)
        attempt.future.release()

    def _dispatch(self) -> None:
        """Submit waiting tasks to free processes; a suspect runs only while nothing else does."""
        now = time.monotonic()
        for attempt in [a for a in self._waiting if a.result.cancelled()]:
            self._waiting.remove(attempt)
        suspects = [a for a in self._waiting if a.alone]
        if any(a.alone for a in self._in_flight) or (suspects and self._in_flight):
            return
        busy = {a.address for a in self._in_flight}
        free = sorted(self._processes - busy)
        random.shuffle(free)  # one that is about to fail is not always the first choice
        ready = suspects[:1] or [a for a in self._waiting if a.due <= now]
        room = (self.max_processes or len(self._processes)) - len(self._in_flight)
        for attempt, address in zip(ready[: max(0, room)], free, strict=False):
            self._waiting.remove(attempt)
            self._submit_to(attempt, address)

    def _submit_to(self, attempt: _Attempt, address: str) -> None:
        task, self._attempts = attempt.task, self._attempts + 1
        attempt.address = address
        if address not in self._ranks:
            self._ranks[address] = host_rank(address, self._ranks)
        attempt.future = self.client.submit(
            self.work,
            self.handle,
            task,
            self._ranks[address],
            key=f"oocpatch-{task.stage}-{self.handle.token}-{self._attempts}",
            workers=[address],
            allow_other_workers=False,  # a dead process is noticed here, and blamed on the right block
            retries=0,
            pure=False,
        )
        self._in_flight.append(attempt)
        attempt.future.add_done_callback(lambda _: self._inbox.put(None))


def call_bounded(function: Callable[[], Any], seconds: float = CLOSE_SECONDS) -> Any:
    """Return the result of a call; None if it fails or takes longer."""
    results: list[Any] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            results.append(function())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def host_rank(address: str, ranks: Mapping[str, int]) -> int:
    """Return the rank of a worker process on its host: the smallest number that no other process there has.

    >>> host_rank("tcp://b:3", {"tcp://a:1": 0, "tcp://b:1": 0, "tcp://b:2": 2})
    1
    """
    host = address.rpartition(":")[0]
    used = {rank for other, rank in ranks.items() if other.rpartition(":")[0] == host}
    return min(set(range(len(used) + 1)) - used)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Makes paths of arrays absolute: at a path where nothing exists, Zarr would read the fill value."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is LocalStore and not obj.root.is_absolute():
            return functools.partial(LocalStore, read_only=obj.read_only), (obj.root.absolute(),)
        return super().reducer_override(obj)


def pickled(value: Any) -> bytes:
    """Pickle a value for processes with other working directories."""
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()
