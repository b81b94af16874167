"""The scheduler: runs the two stages over all blocks, wherever tasks are executed, and keeps the ledger.

The driver, one thread, is the ledger's only writer. It keeps a bounded window of tasks submitted: first the blocks
whose seams are all there (their partials can then be deleted), else the next block to predict. A block's partials are
deleted only when everything that reads them is recorded, and the records are durable.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from dask.delayed import delayed
from dask.local import get_sync

from oocpatch.engine.stages import TaskResult
from oocpatch.errors import BlockFailed, CorruptData, CorruptPartial
from oocpatch.models.predictor import use_threads
from oocpatch.planning.blocks import BlockGrid, Neighbours
from oocpatch.storage.retries import hopeless, with_retries
from oocpatch.workspace.ledger import Ledger, LedgerTail, PartialsRef, Record
from oocpatch.workspace.run_progress import BlockSet, RunProgress

logger = logging.getLogger("oocpatch")


REPAIRS = 3
"""How often a block is computed anew because its partials were damaged."""


@dataclass(frozen=True, slots=True)
class Task:
    """One stage of one block.

    Attributes:
        stage: `predict` or `normalize`.
        index: the block.
        partials_refs: the partials that the normalize stage reads, by block.
    """

    stage: str
    index: int
    partials_refs: Mapping[int, PartialsRef] = field(default_factory=dict)


class Executor(Protocol):
    """Where tasks run."""

    @property
    def window(self) -> int:
        """Tasks to keep submitted at a time."""

    def submit(self, task: Task) -> Future[TaskResult]:
        """Begin a task."""

    def stop(self) -> None:
        """Make the tasks under way give up."""


class Stopped(Exception):
    """The run was interrupted; the block in flight is dropped."""


class Threads:
    """Dask on the threads of this process: each task is a Dask task of its own, at most `window` at a time.

    Args:
        pool: the threads.
        window: how many there are.
        perform: does a task.
        stopped: set to make tasks give up.
    """

    def __init__(
        self, pool: ThreadPoolExecutor, window: int, perform: Callable[[Task], TaskResult], stopped: threading.Event
    ) -> None:
        self._pool = pool
        self.window = window
        self._perform = with_retries(perform)
        self._stopped = stopped

    def submit(self, task: Task) -> Future[TaskResult]:
        """Begin a task."""
        one = delayed(self._perform, pure=False, traverse=False)(task)
        # The scheduler itself: given its name, Dask imports all of distributed to look for a client.
        return self._pool.submit(one.compute, scheduler=get_sync, optimize_graph=False)

    def stop(self) -> None:
        """Make the tasks under way give up."""
        self._stopped.set()


@contextmanager
def dask_threads(
    concurrency: int, perform: Callable[[Task], TaskResult], stopped: threading.Event
) -> Iterator[Threads]:
    """An executor of this process."""
    with ThreadPoolExecutor(
        concurrency, thread_name_prefix="oocpatch-block", initializer=use_threads, initargs=(1,)
    ) as pool:
        yield Threads(pool, concurrency, perform, stopped)


@dataclass
class Run:
    """One execution of the stages.

    Attributes:
        blocks: the block grid.
        progress: what the ledger says is done.
        ledger: where what gets done is recorded.
        delete: deletes the partials of blocks.
        own: the blocks whose predict stage is to run.
        finishes: those whose normalize stage is.
        news: what drivers of other parts recorded since it was last asked.
    """

    blocks: BlockGrid
    progress: RunProgress
    ledger: Ledger
    delete: Callable[[list[int]], None]
    own: range
    finishes: Container[int]
    news: LedgerTail | None = None
    _ready: deque[tuple[str, int]] = field(default_factory=deque)
    _queued: BlockSet = field(init=False)
    _failed: dict[int, str] = field(default_factory=dict)
    _repairs: dict[int, int] = field(default_factory=dict)
    _earlier: dict[int, int] = field(default_factory=dict)
    _released: list[int] = field(default_factory=list)
    _heard_at: float = field(default_factory=time.monotonic)
    _neighbours: Neighbours = field(init=False)

    def __post_init__(self) -> None:
        self._neighbours = Neighbours(self.blocks)
        self._queued = BlockSet(self.blocks.num_blocks)

    def execute(self, executor: Executor) -> None:
        """Run all that is not done yet.

        Raises:
            BlockFailed: when blocks failed; the others are done.
            ClusterLost: when there is nobody left to do it.
        """
        upcoming = iter(self.own)
        pending: dict[Future[TaskResult], Task] = {}
        self._hear()
        for index in [i for i in self.progress.predicted if i not in self.own]:
            self._predicted(index)
        try:
            while True:
                while len(pending) < executor.window and (task := self._next(upcoming)) is not None:
                    pending[executor.submit(task)] = task
                if not pending:
                    break
                done, _ = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    self._finished(pending.pop(future), future)
                if self.news and time.monotonic() - self._heard_at >= self.news.seconds:
                    self._hear()
                self._tidy()
        except BaseException:
            executor.stop()
            for future in pending:
                future.cancel()
            wait([f for f in pending if not f.cancelled()])
            for future, task in pending.items():
                if not future.cancelled() and future.exception() is None:
                    self._finished(task, future)
            self.ledger.commit()
            raise
        self._tidy(force=True)
        if self._failed:
            raise BlockFailed(_report(self._failed), self._failed)

    def _next(self, upcoming: Iterator[int]) -> Task | None:
        while True:
            while self._ready:
                stage, index = self._ready.popleft()
                if stage == "predict":
                    return Task(stage, index)
                if self._complete(index) and index not in self.progress.normalized:
                    return Task(stage, index, {i: self.progress.predicted[i] for i in self._read_by(index)})
                self._queued.discard(index)  # a partial it needs was found damaged meanwhile, or another part was first
            index = next(upcoming, -1)
            if index < 0:
                return None
            if index not in self.progress.predicted:
                return Task("predict", index)
            self._predicted(index)

    def _read_by(self, index: int) -> list[int]:
        """The blocks whose partials the normalize stage of a block reads: its own, and those whose seams enter it."""
        return [index, *self._neighbours.sources(index)]

    def _complete(self, index: int) -> bool:
        """Whether everything that the normalize stage of a block reads is there."""
        return all(i in self.progress.predicted for i in self._read_by(index))

    def _finished(self, task: Task, future: Future[TaskResult]) -> None:
        index, error = task.index, future.exception()
        if error is None and task.stage == "predict":
            self._record_predicted(index, future.result())
        elif error is None:
            done = future.result()
            self._record(
                Record(
                    "normalize", index, uncovered=done.uncovered, nonfinite=done.nonfinite, units=done.unit_checksums
                )
            )
            self._release(index)
        elif isinstance(error, CorruptPartial):
            self._repair(task, error)
        elif isinstance(error, Stopped):
            return
        elif not isinstance(error, Exception) or hopeless(error):
            raise error
        else:
            logger.debug("block %d failed", index, exc_info=error)
            message = f"{type(error).__name__}: {error}"
            self._failed[index] = message
            self._record(Record("failed", index, note=message[:500]))

    def _record_predicted(self, index: int, done: TaskResult) -> None:
        partials, nonfinite = done.partials_ref, done.nonfinite
        before = self._earlier.pop(index, partials.digest)
        self._record(
            Record(
                "predict",
                index,
                partials.digest,
                done.uncovered,
                partials.attempt,
                done.unit_checksums,
                nonfinite=nonfinite,
            )
        )
        if before != partials.digest:
            raise CorruptData(
                f"block {index} gave other bytes when it was computed again: the model is not deterministic here; "
                "make it so, or start afresh with overwrite=True"
            )
        self._predicted(index)

    def _predicted(self, index: int) -> None:
        """Queue what became possible because the partials of a block are there."""
        for reader in self._neighbours.readers(index):
            if reader in self._queued or reader in self.progress.normalized or reader not in self.finishes:
                continue
            if self._complete(reader):
                self._queued.add(reader)
                self._ready.append(("normalize", reader))
        self._release(index)

    def _repair(self, task: Task, error: CorruptPartial) -> None:
        """Compute a block anew whose partials are damaged; its reader is queued again when they are there."""
        self._hear()
        self._queued.discard(task.index)
        if task.index in self.progress.normalized:
            return  # another part was first, and has deleted what nobody needs any more
        if self.progress.predicted.get(error.block) != task.partials_refs.get(error.block):
            if self._complete(task.index):  # it was computed anew meanwhile: another reader found the damage first
                self._queued.add(task.index)
                self._ready.append(("normalize", task.index))
            return
        count = self._repairs[error.block] = self._repairs.get(error.block, 0) + 1
        if count > REPAIRS:
            raise CorruptData(f"{error}; it was computed anew {REPAIRS} times and damaged each time") from error
        logger.warning("%s; computing block %d anew", error, error.block)
        self._earlier[error.block] = self.progress.predicted[error.block].digest
        self._record(Record("undone", error.block, note=self.progress.predicted[error.block].attempt))
        self._ready.append(("predict", error.block))

    def _record(self, record: Record) -> None:
        self.ledger.append(record)
        self.progress.add(record)

    def _hear(self) -> None:
        """Take in what other parts recorded."""
        for record in self.news() if self.news else ():
            self.progress.add(record)
            if record.kind == "predict" and record.block in self.progress.predicted:
                self._predicted(record.block)
            elif record.kind == "normalize":
                self._release(record.block)
        self._heard_at = time.monotonic()

    def _release(self, index: int) -> None:
        """Note the blocks whose partials nobody will read any more."""
        for i in self._read_by(index):
            readers = self._neighbours.readers(i)
            if readers and all(r in self.progress.normalized for r in readers):
                self._released.append(i)

    def _tidy(self, *, force: bool = False) -> None:
        """Commit when it is time, and delete what the committed records say nobody needs."""
        if force or self.ledger.due or len(self._released) >= self.blocks.num_blocks // 4 + 1:
            self.ledger.commit()
            released, self._released = self._released, []
            self.delete(released)


def _report(failed: dict[int, str]) -> str:
    shown = "; ".join(f"block {i}: {message}" for i, message in sorted(failed.items())[:5])
    more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
    return f"{len(failed)} block(s) failed, the others are done, the same call retries them: {shown}{more}"
