"""A run whose second stage needs the first one of all blocks, merged: of `oocpatch.label`, and of others like it.

```text
 predict 0, 1, 2 ... (tables of objects) --all there--> merge (ids) --> normalize 0, 1, 2 ... (labels)
```

Tables and ids stay until the run is complete. Where one is damaged, its block is labelled again, or all are merged
again, to the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from oocpatch.engine.stages import TaskResult
from oocpatch.errors import CorruptData, CorruptPartial, InvalidVolume
from oocpatch.execution.scheduler import REPAIRS, Run, Stopped, Task
from oocpatch.workspace.ledger import MERGED, NO_PARTIALS, PartialsRef, Record, block_of, table_key

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
        return self._next_of_all()

    def _next_of_all(self) -> Task | None:
        """Return the next task when the predict stages of all blocks are done."""
        if self.progress.merged == NO_PARTIALS:
            self._is_merging = True
            return Task("merge", 0, self._tables())
        if self._remaining is None:
            self._remaining = iter(self.to_normalize)
        for index in self._remaining:
            if index not in self.progress.normalized and index not in self._normalizing and index not in self._failed:
                self._normalizing.add(index)
                return Task("normalize", index, {**self._read_for(index), MERGED: self.progress.merged})
        return None

    def _tables(self) -> Mapping[int, PartialsRef]:
        """Return the tables that the merge reads, by their keys."""
        return self.progress.partials

    def _read_for(self, index: int) -> dict[int, PartialsRef]:
        """Return the partials that the normalize stage of a block reads besides what was merged."""
        return {index: self.progress.partials[index]}

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
            self._take_merged(future.result())
        elif isinstance(error, CorruptPartial):
            self._repair(task, error)
        elif not isinstance(error, Stopped):
            raise error

    def _take_merged(self, result: TaskResult) -> None:
        """Record what the merge left."""
        ids = result.partials_ref
        self._record(Record("merge", 0, digest=ids.digest, note=ids.attempt, units=result.unit_checksums))

    def _repair(self, task: Task, error: CorruptPartial) -> None:
        """Label a block again whose table is damaged, or merge again; what was to read it comes after that."""
        self._read_tail()
        self._remaining = None
        key, read = error.block, task.partials_refs.get(error.block)
        if read != self._ref(key):
            return  # another task found the damage first, and it may be repaired by now
        count = self._repairs[key] = self._repairs.get(key, 0) + 1
        if count > REPAIRS:
            raise CorruptData(f"{error}; it was computed again {REPAIRS} times and damaged each time") from error
        logger.warning("%s; computing it again", error)
        if key >= 0:
            self._earlier_digests[key] = self.progress.partials[key].digest
            self._ready.append(("predict", key))
        self._record(Record("undone", block_of(key), note=read.attempt if read else ""))

    def _ref(self, key: int) -> PartialsRef | None:
        """Return what is recorded of a key of partials."""
        return self.progress.merged if key == MERGED else self.progress.partials.get(key)

    def _queue_readers(self, index: int) -> None:
        """Queue nothing: blocks are normalized in order, after the merge."""

    def _mark_unneeded(self, index: int) -> None:
        """Mark nothing: what blocks read stays until the run is complete."""


@dataclass
class InstanceRun(MergeRun):
    """One execution of the stages of a model of objects, which are assembled from patches before the merge.

    ```text
     predict 0, 1 ... (objects of patches) --all--> assemble 0, 1 ... (tables) --all--> merge --> normalize 0, 1 ...
    ```
    """

    _assembling: set[int] = field(default_factory=set)
    _to_assemble: Iterator[int] | None = None

    def _next_of_all(self) -> Task | None:
        if self._to_assemble is None:
            self._to_assemble = iter(range(self.blocks.num_blocks))
        for index in self._to_assemble:
            if index not in self.progress.tables and index not in self._assembling and index not in self._failed:
                self._assembling.add(index)
                return Task("assemble", index, self._partials_for(index))
        return super()._next_of_all() if len(self.progress.tables) == self.blocks.num_blocks else None

    def _take_result(self, task: Task, future: Future[TaskResult]) -> None:
        if task.stage != "assemble":
            super()._take_result(task, future)
            return
        self._assembling.discard(task.index)
        if future.exception() is None:
            table = future.result().partials_ref
            self._record(Record("assemble", task.index, digest=table.digest, note=table.attempt))
        else:
            super()._take_result(task, future)

    def _repair(self, task: Task, error: CorruptPartial) -> None:
        self._to_assemble = None
        super()._repair(task, error)

    def _tables(self) -> Mapping[int, PartialsRef]:
        return {table_key(index): ref for index, ref in self.progress.tables.items()}

    def _read_for(self, index: int) -> dict[int, PartialsRef]:
        return {**self._partials_for(index), table_key(index): self.progress.tables[index]}

    def _partials_for(self, index: int) -> dict[int, PartialsRef]:
        """Return the partials of the blocks whose patches meet the core of a block."""
        return {i: self.progress.partials[i] for i in self._read_by(index)}

    def _ref(self, key: int) -> PartialsRef | None:
        return self.progress.tables.get(block_of(key)) if key < MERGED else super()._ref(key)


@dataclass
class TableRun(MergeRun):
    """One execution of the stages of `objects`, whose merge writes the table.

    A call that is continued writes it again: the merge is not recorded, so that no file of an earlier call is taken.

    ```text
     predict 0, 1, 2 ... (tables of blocks) --all there--> merge (the file)
    ```
    """

    def _next_of_all(self) -> Task | None:
        return super()._next_of_all() if self.progress.merged == NO_PARTIALS else None

    def _take_merged(self, result: TaskResult) -> None:
        self.progress.merged, self.progress.objects = result.partials_ref, result.unit_checksums
