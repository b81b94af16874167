"""The progress of a run, summed up from its ledger in a few bytes per block, since there may be a million of them.

Sets and dictionaries of Python keep 60 to 250 bytes of each member. Blocks are numbered from zero without gaps, so here
a block's place in an array says which it is: 26 bytes per block in all.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, MutableMapping, MutableSet
from dataclasses import dataclass, field

import numpy as np

from oocpatch.storage.paths import StoragePath
from oocpatch.workspace.ledger import NO_PARTIALS, PartialsRef, Record, read_ledger

ATTEMPT_BYTES = 15
"""Length of the name of an attempt."""


class BlockSet(MutableSet[int]):
    """A set of blocks, one byte for each of so many that there may be.

    >>> blocks = BlockSet(4)
    >>> blocks.add(2), 2 in blocks, 3 in blocks, list(blocks), len(blocks)
    (None, True, False, [2], 1)
    """

    def __init__(self, blocks: int) -> None:
        self._flags = bytearray(blocks)
        self._count = 0

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and 0 <= block < len(self._flags) and self._flags[block] == 1

    def __iter__(self) -> Iterator[int]:
        block = self._flags.find(1)
        while block >= 0:
            yield block
            block = self._flags.find(1, block + 1)

    def __len__(self) -> int:
        return self._count

    def add(self, value: int) -> None:
        self._count += not self._flags[value]
        self._flags[value] = 1

    def discard(self, value: int) -> None:
        self._count -= self._flags[value]
        self._flags[value] = 0


class PartialsIndex(MutableMapping[int, PartialsRef]):
    """The partials that each of so many blocks left."""

    def __init__(self, blocks: int) -> None:
        self._blocks = BlockSet(blocks)
        self._digests = array("L", bytes(array("L").itemsize * blocks))
        self._attempts = np.zeros(blocks, f"S{ATTEMPT_BYTES}")

    def __getitem__(self, block: int) -> PartialsRef:
        if block not in self._blocks:
            raise KeyError(block)
        digest = self._digests[block]
        return PartialsRef(digest, self._attempts[block].decode()) if digest else NO_PARTIALS

    def __setitem__(self, block: int, ref: PartialsRef) -> None:
        self._blocks.add(block)
        self._digests[block] = ref.digest
        self._attempts[block] = ref.attempt.encode()

    def __delitem__(self, block: int) -> None:
        self._blocks.remove(block)

    def __contains__(self, block: object) -> bool:
        return block in self._blocks

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)


@dataclass(slots=True)
class RunProgress:
    """The progress of a run, summed up from its ledger.

    Attributes:
        blocks: number of blocks of the run.
        partials: the partials of each block whose predict stage is done.
        tables: the tables of each block whose objects are assembled.
        normalized: the blocks whose normalize stage is done.
        merged: what the merge of objects left; none before it is done.
        objects: the numbers of objects that it found, as JSON.
        failed: message of each block that failed and was not done since.
        counts: voxels where no patch was, and that are NaN or infinite, by stage and block, where there are any.
        begun_at, last_at: times of the last call's start and of the last record, in seconds since 1970; 0: never.
        recent_blocks: blocks whose predict stage the last call has done.
    """

    blocks: int
    partials: PartialsIndex = field(init=False)
    tables: PartialsIndex = field(init=False)
    normalized: BlockSet = field(init=False)
    merged: PartialsRef = NO_PARTIALS
    objects: str = ""
    failed: dict[int, str] = field(default_factory=dict)
    counts: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    begun_at: float = 0.0
    last_at: float = 0.0
    recent_blocks: BlockSet = field(init=False)
    _undone: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.partials = PartialsIndex(self.blocks)
        self.tables = PartialsIndex(0)  # few runs have any
        self.normalized, self.recent_blocks = BlockSet(self.blocks), BlockSet(self.blocks)

    @property
    def uncovered(self) -> int:
        """The number of voxels where no patch was."""
        return sum(uncovered for uncovered, _ in self.counts.values())

    @property
    def nonfinite(self) -> int:
        """The number of voxels that are NaN or infinite."""
        return sum(nonfinite for _, nonfinite in self.counts.values())

    @classmethod
    def read(cls, paths: Iterable[StoragePath], blocks: int) -> RunProgress:
        """Sum up the segments of a ledger; in which order does not matter."""
        progress = cls(blocks)
        for path in paths:
            for record in read_ledger(path):
                progress.add(record)
        return progress

    def add(self, record: Record) -> None:
        """Take one more record into account; records of blocks that the run does not have are ignored."""
        if not 0 <= record.block < self.blocks:
            return
        self.last_at = max(self.last_at, record.at)
        if record.uncovered or record.nonfinite:
            self.counts[record.kind, record.block] = record.uncovered, record.nonfinite
        elif record.kind in ("predict", "normalize"):  # the input may have changed since it was computed before
            self.counts.pop((record.kind, record.block), None)
        if record.kind in ("predict", "assemble", "merge", "normalize"):
            self._add_done(record)
        elif record.kind == "undone":
            self._undone.add(record.note)
            if self.partials.get(record.block, NO_PARTIALS).attempt == record.note:
                del self.partials[record.block]
            if self.tables.get(record.block, NO_PARTIALS).attempt == record.note:
                del self.tables[record.block]
            if self.merged.attempt == record.note:
                self.merged = NO_PARTIALS
        elif record.kind == "begun":
            self.begun_at = record.at
            self.recent_blocks = BlockSet(self.blocks)
        else:
            self.failed[record.block] = record.note

    def _add_done(self, record: Record) -> None:
        """Take a stage that is done into account, unless it was undone by a driver whose records were read first."""
        if record.kind != "normalize" and record.note in self._undone:
            return
        if record.kind == "merge":
            self.merged, self.objects = PartialsRef(record.digest, record.note), record.units
            return
        if record.kind == "predict":
            self.partials[record.block] = PartialsRef(record.digest, record.note)
            self.recent_blocks.add(record.block)
        elif record.kind == "assemble":
            self.tables = self.tables or PartialsIndex(self.blocks)
            self.tables[record.block] = PartialsRef(record.digest, record.note)
        else:
            self.normalized.add(record.block)
        self.failed.pop(record.block, None)
