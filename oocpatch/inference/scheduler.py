"""The scheduler: runs the two stages over all blocks, in Dask's threads, and keeps the ledger.

The driver, one thread, is the ledger's only writer. It keeps a bounded window of tasks submitted: first the blocks
whose seams are all there (their partials can then be deleted), else the next block to predict. A block's partials are
deleted only when everything that reads them is recorded, and the records are durable.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import tenacity
from dask.delayed import delayed

from oocpatch.errors import BlockFailed, CorruptData, CorruptPartial
from oocpatch.inference.predictor import use_threads
from oocpatch.inference.stages import Done
from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.neighbours import Neighbours
from oocpatch.storage.ledger import Ledger, Progress, Record

logger = logging.getLogger("oocpatch")

ATTEMPTS = 4
"""How often a task is tried when reading or writing fails in a way that may pass."""

REPAIRS = 3
"""How often a block is computed anew because its partials were damaged."""

HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
"""Faults of the storage that no retry mends, and that every other block would meet: the run stops."""


class Submit(Protocol):
    """Hands one task to an executor."""

    def __call__(self, function: Callable[..., Any], /, *args: Any) -> Future[Any]: ...


class Stopped(Exception):
    """The run was interrupted; the block in flight is dropped."""


@contextmanager
def dask_threads(concurrency: int) -> Iterator[Submit]:
    """Dask on the threads of this process: each task is a Dask task of its own, at most `concurrency` at a time."""
    with ThreadPoolExecutor(
        concurrency, thread_name_prefix="oocpatch-block", initializer=use_threads, initargs=(1,)
    ) as pool:

        def submit(function: Callable[..., Any], /, *args: Any) -> Future[Any]:
            task = delayed(function, pure=False, traverse=False)(*args)
            return pool.submit(task.compute, scheduler="synchronous", optimize_graph=False)

        yield submit


def transient(error: BaseException) -> bool:
    """Whether trying again may help."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return isinstance(error, OSError) and error.errno is not None and error.errno not in HOPELESS | {errno.ENOENT}


def hopeless(error: BaseException) -> bool:
    """Whether every block would fail like this one."""
    return isinstance(error, OSError) and error.errno in HOPELESS


def with_retries(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, tried again with exponential back-off while its faults are transient."""
    return tenacity.retry(
        retry=tenacity.retry_if_exception(transient),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=5.0),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        reraise=True,
    )(function)


@dataclass
class Run:
    """One execution of the stages.

    Attributes:
        blocks: the block grid.
        progress: what the ledger says is done.
        ledger: where what gets done is recorded.
        predict: runs the predict stage of a block.
        normalize: runs the normalize stage of a block, given the digests of what it reads.
        delete: deletes the partials of a block.
        stop: set to make the tasks in flight give up.
    """

    blocks: BlockGrid
    progress: Progress
    ledger: Ledger
    predict: Callable[[int], Done]
    normalize: Callable[[int, dict[int, int]], Done]
    delete: Callable[[int], None]
    stop: threading.Event
    _ready: deque[tuple[str, int]] = field(default_factory=deque)
    _queued: set[int] = field(default_factory=set)
    _failed: dict[int, str] = field(default_factory=dict)
    _repairs: dict[int, int] = field(default_factory=dict)
    _earlier: dict[int, int] = field(default_factory=dict)
    _released: list[int] = field(default_factory=list)
    _neighbours: Neighbours = field(init=False)

    def __post_init__(self) -> None:
        self._neighbours = Neighbours(self.blocks)

    def execute(self, submit: Submit, window: int) -> None:
        """Run all that is not done yet.

        Args:
            submit: hands one task to an executor.
            window: tasks submitted at a time.

        Raises:
            BlockFailed: when blocks failed; the others are done.
        """
        upcoming = iter(range(self.blocks.num_blocks))
        pending: dict[Future[Any], tuple[str, int]] = {}
        predict, normalize = with_retries(self.predict), with_retries(self.normalize)
        try:
            while True:
                while len(pending) < window and (task := self._next(upcoming)) is not None:
                    stage, index = task
                    future = (
                        submit(predict, index) if stage == "predict" else submit(normalize, index, self._digests(index))
                    )
                    pending[future] = task
                if not pending:
                    break
                done, _ = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    self._finished(*pending.pop(future), future)
                self._tidy()
        except BaseException:
            self.stop.set()
            for future in pending:
                future.cancel()
            wait([f for f in pending if not f.cancelled()])
            for future, task in pending.items():
                if not future.cancelled() and future.exception() is None:
                    self._finished(*task, future)
            self.ledger.commit()
            raise
        self._tidy(force=True)
        if self._failed:
            raise BlockFailed(_report(self._failed), self._failed)

    def _next(self, upcoming: Iterator[int]) -> tuple[str, int] | None:
        while True:
            while self._ready:
                stage, index = self._ready.popleft()
                if stage == "predict" or self._complete(index):
                    return stage, index
                self._queued.discard(index)  # a partial it needs was found damaged meanwhile
            index = next(upcoming, -1)
            if index < 0:
                return None
            if index not in self.progress.predicted:
                return "predict", index
            self._predicted(index)

    def _complete(self, index: int) -> bool:
        """Whether everything that the normalize stage of a block reads is there."""
        return all(i in self.progress.predicted for i in (index, *self._neighbours.sources(index)))

    def _digests(self, index: int) -> dict[int, int]:
        return {i: self.progress.predicted[i] for i in (index, *self._neighbours.sources(index))}

    def _finished(self, stage: str, index: int, future: Future[Any]) -> None:
        error = future.exception()
        if error is None and stage == "predict":
            self._record_predicted(index, future.result())
        elif error is None:
            done = future.result()
            self._record(Record("normalize", index, uncovered=done.uncovered, units=done.units))
            self._release(index)
        elif isinstance(error, CorruptPartial):
            self._repair(index, error)
        elif isinstance(error, Stopped):
            return
        elif not isinstance(error, Exception) or hopeless(error):
            raise error
        else:
            logger.debug("block %d failed", index, exc_info=error)
            message = f"{type(error).__name__}: {error}"
            self._failed[index] = message
            self._record(Record("failed", index, note=message[:500]))

    def _record_predicted(self, index: int, done: Done) -> None:
        before = self._earlier.pop(index, done.digest)
        self._record(Record("predict", index, done.digest, done.uncovered, units=done.units))
        if before != done.digest:
            raise CorruptData(
                f"block {index} gave other bytes when it was computed again: the model is not deterministic here; "
                "make it so, or start afresh with overwrite=True"
            )
        self._predicted(index)

    def _predicted(self, index: int) -> None:
        """Queue what became possible because the partials of a block are there."""
        for reader in self._neighbours.readers(index):
            if reader in self._queued or reader in self.progress.normalized:
                continue
            if self._complete(reader):
                self._queued.add(reader)
                self._ready.append(("normalize", reader))
        self._release(index)

    def _repair(self, reader: int, error: CorruptPartial) -> None:
        """Compute a block anew whose partials are damaged; its reader is queued again when they are there."""
        self._queued.discard(reader)
        if error.block not in self.progress.predicted:
            return  # another reader found the damage first
        count = self._repairs[error.block] = self._repairs.get(error.block, 0) + 1
        if count > REPAIRS:
            raise CorruptData(f"{error}; it was computed anew {REPAIRS} times and damaged each time") from error
        logger.warning("%s; computing block %d anew", error, error.block)
        self._earlier[error.block] = self.progress.predicted[error.block]
        self._record(Record("undone", error.block))
        self.delete(error.block)
        self._ready.append(("predict", error.block))

    def _record(self, record: Record) -> None:
        self.ledger.append(record)
        self.progress.add(record)

    def _release(self, index: int) -> None:
        """Note the blocks whose partials nobody will read any more."""
        for i in (index, *self._neighbours.sources(index)):
            readers = self._neighbours.readers(i)
            if readers and all(r in self.progress.normalized for r in readers):
                self._released.append(i)

    def _tidy(self, *, force: bool = False) -> None:
        """Commit when it is time, and delete what the committed records say nobody needs."""
        if force or self.ledger.due or len(self._released) >= self.blocks.num_blocks // 4 + 1:
            self.ledger.commit()
            released, self._released = self._released, []
            for index in released:
                self.delete(index)


def _report(failed: dict[int, str]) -> str:
    shown = "; ".join(f"block {i}: {message}" for i, message in sorted(failed.items())[:5])
    more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
    return f"{len(failed)} block(s) failed, the others are done, the same call retries them: {shown}{more}"
