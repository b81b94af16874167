"""The cluster: tasks on the worker processes of a Dask scheduler. The only file that knows `distributed`.

The driver decides which process works on which block, one block per process at a time, and submits a task only when a
process is free for it: scheduler and client hold as many tasks as there are processes. Each attempt is a task of its
own, bound to its process. So Dask never runs one again by itself, and the block that a dead process worked on is known.

```text
  Run --submit--> waiting --free process--> in flight --result--> Run
                     ^                          |
                     +---- again, elsewhere <---+ process died | a fault that may pass
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
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import cloudpickle  # type: ignore[import-untyped]  # it has no types of its own
import dask
import distributed
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker
from zarr.storage import LocalStore

from oocpatch.engine.stages import TaskResult
from oocpatch.errors import ClusterLost, OocpatchError
from oocpatch.execution.devices import place_of
from oocpatch.execution.scheduler import Stopped, Task
from oocpatch.execution.versions import MUST_AGREE, SHOULD_AGREE, asking, disagreement
from oocpatch.storage.retries import ATTEMPTS, hopeless, transient

logger = logging.getLogger("oocpatch")

DEATHS = 3
"""How often a process may die while it works on a block before the block counts as the reason."""

LOOK_SECONDS = 0.5
"""How often the driver looks which processes there are."""

GATHER_SECONDS, LAST_SECONDS, GOODBYE_SECONDS = 5.0, 60.0, 5.0
"""How long a result may travel, how long processes may take for what each has to do at the end, and to let go."""

RESUME = "what is finished is kept, the same call goes on where this one stopped"


class WorkerDied(OocpatchError, RuntimeError):
    """The process that worked on a block died, and did so again when nothing else was running."""


class RunHandle(Protocol):
    """What every task of one call carries; see `oocpatch.execution.worker`."""

    @property
    def token(self) -> str: ...

    @property
    def versions(self) -> dict[str, str | None]: ...


class Supply(Protocol):
    """What brings worker processes to a scheduler; see `oocpatch.execution.slurm`."""

    def ask(self) -> None:
        """Ask for the processes: a run begins."""

    def keep(self, processes: int) -> str | None:
        """Ask for those that were lost, of which so many are left; why none will come any more, if that is so."""


SUPPLIES: weakref.WeakKeyDictionary[distributed.Client, Supply] = weakref.WeakKeyDictionary()
"""By client; most have none, their processes are there, or come by themselves."""


@dataclass
class _Attempt:
    """A task on its way to a result."""

    task: Task
    result: Future[TaskResult]
    tries: int = 0
    deaths: int = 0
    alone: bool = False
    due: float = 0.0
    address: str = ""
    remote: Any = None


@dataclass
class Cluster:
    """An executor on the worker processes of a Dask scheduler.

    Attributes:
        client: the user's client; it stays open.
        call: what every task of this call carries.
        work: does a task in a worker process, which is told its number among those of its host.
        drop: makes a worker process let go of a call, by its token.
        most: processes to use at most; None: all.
        on_done: told the tasks that are done, and what they did.
    """

    client: distributed.Client
    call: RunHandle
    work: Callable[[Any, Task, int], TaskResult]
    drop: Callable[[str], None]
    most: int | None = None
    on_done: Callable[[Task, TaskResult], None] = lambda *_: None
    _inbox: queue.SimpleQueue[_Attempt | None] = field(default_factory=queue.SimpleQueue)
    _waiting: deque[_Attempt] = field(default_factory=deque)
    _flying: list[_Attempt] = field(default_factory=list)
    _processes: set[str] = field(default_factory=set)
    _places: dict[str, int] = field(default_factory=dict)
    _looked_at: float = 0.0
    _seen_at: float = field(default_factory=time.monotonic)
    _stopping: bool = False
    _lost: ClusterLost | None = None
    _numbers: int = 0
    _supply: Supply | None = None

    def __enter__(self) -> Self:
        self._supply = SUPPLIES.get(self.client)
        if self._supply is not None:
            self._supply.ask()
        self._look()
        self._thread = threading.Thread(target=self._serve, name="oocpatch-cluster", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(GATHER_SECONDS + GOODBYE_SECONDS)
        if self.client.status == "running":
            # Bounded: a frozen process does not answer, and the scheduler waits for it.
            _bounded(lambda: self.client.run(self.drop, self.call.token, on_error="ignore"))

    @property
    def window(self) -> int:
        """Tasks to keep submitted at a time: one per process."""
        return max(1, min(len(self._processes), self.most or len(self._processes)))

    def everywhere(self, function: Callable[[], None]) -> None:
        """RunHandle a function in every process.

        Raises:
            OSError: what it raises in one of them.
        """
        found = _bounded(lambda: self.client.run(function, on_error="return"), LAST_SECONDS)
        if found is None:
            logger.warning("not all workers answered within %.0f s: the disk may not have all of it yet", LAST_SECONDS)
        for error in (found or {}).values():
            if isinstance(error, OSError) and not isinstance(error, CommClosedError):
                raise error

    def submit(self, task: Task) -> Future[TaskResult]:
        """Begin a task."""
        attempt = _Attempt(task, Future())
        self._inbox.put(attempt)
        return attempt.result

    def stop(self) -> None:
        """Drop the tasks under way; processes give theirs up at the next patch."""
        self._stopping = True
        self._inbox.put(None)

    def _serve(self) -> None:
        try:
            while not self._stopping:
                with contextlib.suppress(queue.Empty):
                    event = self._inbox.get(timeout=LOOK_SECONDS)
                    while True:
                        self._waiting.extend([event] if event is not None else [])
                        event = self._inbox.get_nowait()
                self._collect()
                if time.monotonic() - self._looked_at >= LOOK_SECONDS:
                    self._look()
                self._dispatch()
        except ClusterLost as lost:
            self._end(lost)
        except Exception as error:  # noqa: BLE001 - whatever Dask raises when its scheduler goes away
            self._end(ClusterLost(f"the scheduler is lost ({type(error).__name__}: {error}); {RESUME}"))
        self._forget()

    def _end(self, lost: ClusterLost) -> None:
        """Fail everything, what is still to be submitted included."""
        while not self._stopping:
            for attempt in (*self._flying, *self._waiting):
                if not attempt.result.done():
                    attempt.result.set_exception(lost)
            self._waiting.clear()
            event = self._inbox.get()
            self._waiting.extend([event] if event is not None else [])

    def _forget(self) -> None:
        for attempt in self._flying:
            with contextlib.suppress(Exception):  # the scheduler may be gone
                attempt.remote.release()
        self._flying.clear()

    def _look(self) -> None:
        """Find out which processes there are, and give up those tasks whose process is gone."""
        if self.client.status != "running":
            raise ClusterLost(f"the scheduler is lost (the client is {self.client.status}); {RESUME}")
        self._processes = set(self.client.nthreads())  # type: ignore[no-untyped-call]  # so has distributed, in places
        self._places = {address: place for address, place in self._places.items() if address in self._processes}
        self._looked_at = now = time.monotonic()
        gone = None if self._supply is None else self._supply.keep(len(self._processes))
        if gone is not None:
            raise ClusterLost(f"{gone}; {RESUME}")
        if self._processes or self._supply is not None:  # it knows how long to wait
            self._seen_at = now
        elif now - self._seen_at > (patience := _patience()):
            raise ClusterLost(
                f"there were no workers for {patience:.0f} s; {RESUME}; start workers, or set the time to wait "
                "(dask.config: oocpatch.wait-for-workers)"
            )
        for attempt in [a for a in self._flying if a.address not in self._processes]:
            self._died(attempt)

    def _collect(self) -> None:
        """Take in what is done."""
        for attempt in list(self._flying):
            status = attempt.remote.status
            if status == "cancelled":
                raise ClusterLost(f"the scheduler is lost, or tasks were cancelled there; {RESUME}")
            with contextlib.suppress(TimeoutError, InvalidStateError):  # see below
                if status == "finished":
                    done = attempt.remote.result(timeout=GATHER_SECONDS)
                    self._land(attempt)
                    self.on_done(attempt.task, done)
                    attempt.result.set_result(done)
                elif status == "error":
                    self._failed(attempt, attempt.remote.exception(timeout=GATHER_SECONDS))
            # Too late: the process may have died with the result, and the next look will tell. Invalid: the run was
            # interrupted, and nobody waits for it.

    def _failed(self, attempt: _Attempt, error: BaseException) -> None:
        if isinstance(error, KilledWorker):
            self._died(attempt)
            return
        if isinstance(error, Stopped):
            error = ClusterLost(f"the worker at {attempt.address} does not see the run's workspace; {RESUME}")
        self._land(attempt)
        attempt.tries += 1
        if transient(error) and not hopeless(error) and attempt.tries < ATTEMPTS:
            pause = random.uniform(0.5, 1.0) * min(5.0, 0.2 * 2**attempt.tries)  # noqa: S311 - not a secret
            attempt.due = time.monotonic() + pause
            self._waiting.append(attempt)
        else:
            attempt.result.set_exception(error)

    def _died(self, attempt: _Attempt) -> None:
        """The process that worked on a task is gone: again elsewhere, then alone, then it is the task that kills it."""
        index, alone = attempt.task.index, attempt.alone
        self._land(attempt)
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

    def _land(self, attempt: _Attempt) -> None:
        self._flying.remove(attempt)
        attempt.remote.release()

    def _dispatch(self) -> None:
        """Give waiting tasks to free processes; a suspect runs when nothing else does."""
        now = time.monotonic()
        for attempt in [a for a in self._waiting if a.result.cancelled()]:
            self._waiting.remove(attempt)
        suspects = [a for a in self._waiting if a.alone]
        if any(a.alone for a in self._flying) or (suspects and self._flying):
            return
        busy = {a.address for a in self._flying}
        free = sorted(self._processes - busy)
        random.shuffle(free)  # one that is about to fail is not always the first choice
        ready = suspects[:1] or [a for a in self._waiting if a.due <= now]
        room = (self.most or len(self._processes)) - len(self._flying)
        for attempt, address in zip(ready[: max(0, room)], free, strict=False):
            self._waiting.remove(attempt)
            self._launch(attempt, address)

    def _launch(self, attempt: _Attempt, address: str) -> None:
        task, self._numbers = attempt.task, self._numbers + 1
        attempt.address = address
        if address not in self._places:
            self._places[address] = place_of(address, self._places)
        attempt.remote = self.client.submit(
            self.work,
            self.call,
            task,
            self._places[address],
            key=f"oocpatch-{task.stage}-{self.call.token}-{self._numbers}",
            workers=[address],
            allow_other_workers=False,  # a dead process is noticed here, and blamed on the right block
            retries=0,
            pure=False,
        )
        self._flying.append(attempt)
        attempt.remote.add_done_callback(lambda _: self._inbox.put(None))


def _patience() -> float:
    """Seconds that a run waits for the first worker, or for another one when all are gone."""
    return float(dask.utils.parse_timedelta(dask.config.get("oocpatch.wait-for-workers", "60s")))


def _bounded(function: Callable[[], Any], seconds: float = GOODBYE_SECONDS) -> Any:
    """What a call gives, if it does so in time; else None."""
    found: list[Any] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            found.append(function())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def checked_client(client: Any) -> Any:
    """A client that can be used.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if not isinstance(client, distributed.Client):
        raise TypeError(f"client must be a dask.distributed.Client, got {type(client).__name__}")
    if client.asynchronous:
        raise ValueError("client must not be asynchronous; make it with Client(..., asynchronous=False)")
    if client.status != "running":
        raise ValueError(f"client must be connected to its scheduler, but it is {client.status}")
    return client


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Makes paths of arrays on disk absolute: where nothing lies, Zarr reads the fill value."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is LocalStore and not obj.root.is_absolute():
            return functools.partial(LocalStore, read_only=obj.read_only), (obj.root.absolute(),)
        return super().reducer_override(obj)


def pickled(value: Any) -> bytes:
    """A value as bytes that another process can read, wherever its working directory is."""
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


def check_versions(client: distributed.Client, here: dict[str, str | None]) -> None:
    """Compare the versions of the workers with those of the client.

    Raises:
        ValueError: when they would compute something else.
    """
    found = _bounded(lambda: client.run(asking(), on_error="return"))
    for address, there in (found or {}).items():
        if not isinstance(there, dict):
            continue  # it did not answer; if it takes part, it compares by itself
        wrong = disagreement(here, there, MUST_AGREE)
        if wrong:
            raise ValueError(f"workers must have the client's versions, but the one at {address} differs: {wrong}")
        told = disagreement(here, there, SHOULD_AGREE)
        if told:
            logger.warning("the worker at %s has other versions, and may round differently: %s", address, told)


def log_dashboard(client: distributed.Client) -> str:
    """The dashboard's address, which is also logged."""
    link = str(client.dashboard_link)
    logger.info("dashboard: %s", link)
    return link
