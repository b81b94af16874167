"""A run whose second stage needs the first one of all blocks, merged: of `oocpatch.label`.

```text
 predict 0, 1, 2 ... (tables of objects) --all there--> merge (ids) --> normalize 0, 1, 2 ... (labels)
```

Tables and ids stay until the run is complete. Where one is damaged, its block is labelled again, or all are merged
again, to the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from oocpatch.engine.stages import TaskResult
from oocpatch.errors import CorruptData, CorruptPartial, InvalidVolume
from oocpatch.execution.scheduler import REPAIRS, Run, Stopped, Task
from oocpatch.workspace.ledger import MERGED, NO_PARTIALS, Record

logger = logging.getLogger("oocpatch")


@dataclass
class MergeRun(Run):
    """One execution of the stages of such a run. Without blocks to normalize, nothing is merged."""

    _is_merging: bool = False
    _normalizing: set[int] = field(default_factory=set)
    _remaining: Iterator[int] | None = None

    def _next(self, upcoming: Iterator[int]) -> Task | None:
        while self._ready:
            return Task(*self._ready.popleft())
        for index in upcoming:
            if index not in self.progress.partials:
                return Task("predict", index)
        if not len(self.to_normalize) or len(self.progress.partials) < self.blocks.num_blocks or self._is_merging:
            return None
        merged = self.progress.merged
        if merged == NO_PARTIALS:
            self._is_merging = True
            return Task("merge", 0, self.progress.partials)
        if self._remaining is None:
            self._remaining = iter(self.to_normalize)
        for index in self._remaining:
            if index not in self.progress.normalized and index not in self._normalizing and index not in self._failed:
                self._normalizing.add(index)
                return Task("normalize", index, {index: self.progress.partials[index], MERGED: merged})
        return None

    def _take_result(self, task: Task, future: Future[TaskResult]) -> None:
        error = future.exception()
        if task.stage == "normalize":
            self._normalizing.discard(task.index)
        if isinstance(error, InvalidVolume):  # of no use to label the other blocks
            raise error
        if task.stage != "merge":
            super()._take_result(task, future)
            return
        self._is_merging = False
        if error is None:
            result = future.result()
            ids = result.partials_ref
            self._record(Record("merge", 0, digest=ids.digest, note=ids.attempt, units=result.unit_checksums))
        elif isinstance(error, CorruptPartial):
            self._repair(task, error)
        elif not isinstance(error, Stopped):
            raise error

    def _repair(self, task: Task, error: CorruptPartial) -> None:
        """Label a block again whose table is damaged, or merge again; what was to read it comes after that."""
        self._read_tail()
        self._remaining = None
        block, read = error.block, task.partials_refs.get(error.block)
        if read != (self.progress.merged if block == MERGED else self.progress.partials.get(block)):
            return  # another task found the damage first, and it may be repaired by now
        count = self._repairs[block] = self._repairs.get(block, 0) + 1
        if count > REPAIRS:
            raise CorruptData(f"{error}; it was computed again {REPAIRS} times and damaged each time") from error
        logger.warning("%s; computing it again", error)
        if block != MERGED:
            self._earlier_digests[block] = self.progress.partials[block].digest
            self._ready.append(("predict", block))
        self._record(Record("undone", max(block, 0), note=read.attempt if read else ""))

    def _queue_readers(self, index: int) -> None:
        """Queue nothing: blocks are normalized in order, after the merge."""

    def _mark_unneeded(self, index: int) -> None:
        """Mark nothing: what blocks read stays until the run is complete."""
