"""Run the two stages over all blocks on an executor, and record in the ledger what is done.

One thread, the driver, is the only writer of the ledger. It keeps a bounded number of tasks submitted: first the blocks
whose seams are all present (their partials can then be deleted), else the next block to predict. The partials of a
block are deleted only when every block that reads them is recorded and the records are durable.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Protocol

from dask.delayed import delayed
from dask.local import get_sync

from oocpatch.engine.stages import TaskResult
from oocpatch.errors import BlockFailed, CorruptData, CorruptPartial
from oocpatch.planning.blocks import BlockGrid, Neighbours
from oocpatch.storage.retries import hopeless, with_retries
from oocpatch.workspace.ledger import Kind, Ledger, LedgerTail, PartialsRef, Record
from oocpatch.workspace.run_progress import BlockSet, RunProgress

logger = logging.getLogger("oocpatch")

REPAIRS = 3
"""Number of times that a block is computed again because its partials were damaged."""


@dataclass(frozen=True, slots=True)
class Task:
    """One stage of one block.

    Attributes:
        stage: `predict` or `normalize`; of a `MergeRun` also `merge`, of all blocks.
        index: the block.
        partials_refs: the partials that the normalize stage, or the merge, reads, by block.
    """

    stage: str
    index: int
    partials_refs: Mapping[int, PartialsRef] = field(default_factory=dict)


class Executor(Protocol):
    """Runs tasks, in threads of this process or elsewhere."""

    @property
    def max_in_flight(self) -> int:
        """Number of tasks to keep submitted."""

    @property
    def normalize_slots(self) -> int:
        """Number of these that are for normalize tasks, so that a device does not wait for them; 0: any is for all."""

    def submit(self, task: Task) -> Future[TaskResult]:
        """Begin a task."""

    def stop(self) -> None:
        """Make the tasks in flight raise `Stopped`."""


class Stopped(Exception):
    """The run was interrupted, and the block in flight is dropped."""


@dataclass(frozen=True, slots=True)
class ThreadExecutor:
    """Dask on the threads of this process; each task is a separate Dask task.

    Attributes:
        pool: the threads.
        max_in_flight: their number.
        run_task: runs a task.
        stopped: set to make tasks raise `Stopped`.
        normalize_slots: how many of the threads are for normalize tasks.
    """

    pool: ThreadPoolExecutor
    max_in_flight: int
    run_task: Callable[[Task], TaskResult]
    stopped: threading.Event
    normalize_slots: int = 0

    def submit(self, task: Task) -> Future[TaskResult]:
        """Begin a task."""
        # The task is bound: as an argument, Dask would look through it for collections.
        run = functools.partial(with_retries(self.run_task), task)
        delayed_task = delayed(run, pure=False, traverse=False)()
        # The scheduler itself: given its name, Dask imports all of distributed to look for a client.
        return self.pool.submit(delayed_task.compute, scheduler=get_sync, optimize_graph=False)

    def stop(self) -> None:
        """Make the tasks in flight raise `Stopped`."""
        self.stopped.set()


@dataclass
class Run:
    """One execution of the stages.

    Attributes:
        blocks: the block grid.
        progress: the stages that the ledger records as done.
        ledger: receives a record of each task.
        delete_partials: deletes the partials of blocks.
        to_predict: the blocks whose predict stage is to run.
        delete_outputs: deletes the stored outputs of blocks, which their records replace.
        order: these in another order; None: as they come.
        to_normalize: the blocks whose normalize stage is to run.
        ledger_tail: reads what drivers of other parts have recorded; None when there are no parts.
    """

    blocks: BlockGrid
    progress: RunProgress
    ledger: Ledger
    delete_partials: Callable[[list[int]], None]
    to_predict: Sequence[int]
    to_normalize: Collection[int]
    delete_outputs: Callable[[list[int]], None] = lambda _: None
    order: Iterable[int] | None = None
    ledger_tail: LedgerTail | None = None
    _ready: deque[tuple[str, int]] = field(default_factory=deque)
    _queued: BlockSet = field(init=False)
    _failed: dict[int, str] = field(default_factory=dict)
    _repairs: dict[int, int] = field(default_factory=dict)
    _earlier_digests: dict[int, int] = field(default_factory=dict)
    _unneeded: list[int] = field(default_factory=list)
    _recorded: list[int] = field(default_factory=list)
    _may_predict: bool = True
    _postpones: bool = False
    _tail_read_at: float = field(default_factory=time.monotonic)
    _neighbours: Neighbours = field(init=False)

    def __post_init__(self) -> None:
        self._neighbours = Neighbours(self.blocks)
        self._queued = BlockSet(self.blocks.num_blocks)

    def execute(self, executor: Executor) -> None:
        """Run all tasks that are not done yet.

        Raises:
            BlockFailed: when blocks failed; the others are done.
            ClusterLost: when the executor has lost its workers.
        """
        upcoming = iter(self.to_predict if self.order is None else self.order)
        pending: dict[Future[TaskResult], Task] = {}
        self._read_tail()
        for index in [i for i in self.progress.partials if i not in self.to_predict]:
            self._queue_readers(index)
        try:
            while True:
                while (task := self._next_in_slots(upcoming, executor, pending.values())) is not None:
                    pending[executor.submit(task)] = task
                if not pending:
                    break
                done, _ = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    self._take_result(pending.pop(future), future)
                if self.ledger_tail and time.monotonic() - self._tail_read_at >= self.ledger_tail.seconds:
                    self._read_tail()
                self._commit_and_delete()
        except BaseException:
            executor.stop()
            for future in pending:
                future.cancel()
            wait([f for f in pending if not f.cancelled()])
            for future, task in pending.items():
                if not future.cancelled() and future.exception() is None:
                    self._take_result(task, future)
            self.ledger.commit()
            raise
        self._commit_and_delete(force=True)
        if self._failed:
            raise BlockFailed(_failure_message(self._failed), self._failed)

    def _next_in_slots(self, upcoming: Iterator[int], executor: Executor, in_flight: Collection[Task]) -> Task | None:
        """Return a task for which the executor has a slot.

        Where slots are for normalize tasks, no others are, as long as there are blocks to predict and no more wait to
        be normalized than there are slots: the disk is projected for so many.
        """
        slots, most = executor.normalize_slots, executor.max_in_flight
        if len(in_flight) >= most:
            return None
        if slots:
            normalizing = sum(task.stage == "normalize" for task in in_flight)
            self._may_predict = len(in_flight) - normalizing < most - slots
            self._postpones = self._may_predict and slots <= normalizing and len(self._ready) < most
        return self._next(upcoming)

    def _next(self, upcoming: Iterator[int]) -> Task | None:
        while True:
            while self._ready and not self._postpones:
                stage, index = self._ready.popleft()
                if stage == "predict":
                    if self._may_predict:
                        return Task(stage, index)
                    self._ready.append((stage, index))
                    return None
                if self._is_ready(index) and index not in self.progress.normalized:
                    return Task(stage, index, {i: self.progress.partials[i] for i in self._read_by(index)})
                self._queued.discard(index)  # one of its partials was damaged meanwhile, or another part was first
            index = next(upcoming, -1) if self._may_predict else -1
            if index < 0:
                if not self._ready:
                    return None
                self._postpones = False
            elif index not in self.progress.partials:
                return Task("predict", index)
            else:
                self._queue_readers(index)

    def _read_by(self, index: int) -> list[int]:
        """Return the blocks whose partials the normalize stage of a block reads: itself, and its neighbours."""
        return self._neighbours.read_by(index)

    def _is_ready(self, index: int) -> bool:
        """Return True if all partials that the normalize stage of a block reads are present."""
        return all(i in self.progress.partials for i in self._read_by(index))

    def _take_result(self, task: Task, future: Future[TaskResult]) -> None:
        index, error = task.index, future.exception()
        if error is None and task.stage == "predict":
            self._record_predicted(index, future.result())
        elif error is None:
            self._record(_record_of("normalize", index, future.result()))
            self._mark_unneeded(index)
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
            self.delete_outputs([index])  # among them may be the one that the block failed for

    def _record_predicted(self, index: int, result: TaskResult) -> None:
        partials = result.partials_ref
        before = self._earlier_digests.pop(index, partials.digest)
        self._record(replace(_record_of("predict", index, result), digest=partials.digest, note=partials.attempt))
        self._recorded.append(index)
        if before != partials.digest:
            raise CorruptData(
                f"block {index} gave other bytes when it was computed again: the model is not deterministic here; "
                "make it so, or start afresh with overwrite=True"
            )
        self._queue_readers(index)

    def _queue_readers(self, index: int) -> None:
        """Queue the blocks that can be normalized now that the partials of this one are present."""
        for reader in self._neighbours.readers(index):
            if reader in self._queued or reader in self.progress.normalized or reader not in self.to_normalize:
                continue
            self._queue_if_ready(reader)
        self._mark_unneeded(index)

    def _queue_if_ready(self, index: int) -> None:
        if self._is_ready(index):
            self._queued.add(index)
            self._ready.append(("normalize", index))

    def _repair(self, task: Task, error: CorruptPartial) -> None:
        """Compute a block again whose partials are damaged; its reader is queued again when they are present."""
        self._read_tail()
        self._queued.discard(task.index)
        if task.index in self.progress.normalized:
            return  # another part was first, and has deleted the partials
        if self.progress.partials.get(error.block) != task.partials_refs.get(error.block):
            self._queue_if_ready(task.index)  # another reader found the damage first, and it may be repaired by now
            return
        count = self._repairs[error.block] = self._repairs.get(error.block, 0) + 1
        if count > REPAIRS:
            raise CorruptData(f"{error}; it was computed again {REPAIRS} times and damaged each time") from error
        logger.warning("%s; computing block %d again", error, error.block)
        self._earlier_digests[error.block], attempt = self.progress.partials[error.block]
        self._record(Record("undone", error.block, note=attempt))
        self._ready.append(("predict", error.block))

    def _record(self, record: Record) -> None:
        self.ledger.append(record)
        self.progress.add(record)

    def _read_tail(self) -> None:
        """Add the records of other parts to the progress."""
        for record in self.ledger_tail() if self.ledger_tail else ():
            self.progress.add(record)
            if record.kind == "predict" and record.block in self.progress.partials:
                self._queue_readers(record.block)
            elif record.kind == "normalize":
                self._mark_unneeded(record.block)
        self._tail_read_at = time.monotonic()

    def _mark_unneeded(self, index: int) -> None:
        """Mark the blocks whose partials are not needed any more, now that this one is normalized."""
        for i in self._read_by(index):
            readers = self._neighbours.readers(i)
            is_there = i in self.progress.partials  # else a task may be writing them again, after a repair
            if is_there and readers and all(r in self.progress.normalized for r in readers):
                self._unneeded.append(i)

    def _commit_and_delete(self, *, force: bool = False) -> None:
        """Commit the ledger when it is due, and then delete the partials that are not needed any more."""
        if force or self.ledger.due or len(self._unneeded) >= self.blocks.num_blocks // 4 + 1:
            self.ledger.commit()
            released, self._unneeded = self._unneeded, []
            self.delete_partials(released)
            self.delete_outputs(self._recorded)
            self._recorded = []


def _record_of(kind: Kind, index: int, result: TaskResult) -> Record:
    return Record(
        kind,
        index,
        uncovered=result.uncovered,
        nonfinite=result.nonfinite,
        units=result.unit_checksums,
        stamps=result.input_stamps,
    )


def _failure_message(failed: dict[int, str]) -> str:
    shown = "; ".join(f"block {i}: {message}" for i, message in sorted(failed.items())[:5])
    more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
    return f"{len(failed)} block(s) failed, the others are done, the same call retries them: {shown}{more}"
