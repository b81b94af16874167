"""The ledger of a run: the journal of which blocks are done, with the driver as its one writer.

An entry is a promise that the data is there, and a marker that comes last: a crash before it costs one block of work,
never a wrong voxel. The parts of an array job have segments of their own, each a journal, which all of them read.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from oocpatch.storage.journal import (
    Journal,
    decode_record,
    find_journals,
    read_journal,
    read_journal_after,
    remove_journal,
)
from oocpatch.storage.paths import StoragePath

Kind = Literal["predict", "assemble", "merge", "normalize", "undone", "failed", "begun"]

WHOLE = "ledger"
"""Name of the segment of a whole run; those of parts begin with it and a dot."""

NEWS_SECONDS, DISTANT_NEWS_SECONDS = 1.0, 10.0
"""How often drivers read what others recorded: on a disk, and in an object store, where each request is paid for."""


@dataclass(frozen=True, slots=True)
class Record:
    """One fact about one block.

    Attributes:
        kind: `predict` and `normalize`: the stage is done; `undone`: the predict stage must run again, because its
            partials were damaged; `assemble`: the objects in the block's core are known; `merge`: the objects of all
            blocks are merged; `failed`: the block failed, for the reason in `note`; `begun`: a call went to work.
        block: index of the block; 0 for `merge`.
        digest: digest of the partials that the block left (`predict`, `assemble`), and of all ids (`merge`).
        uncovered: voxels of the output where no patch was, among those the stage wrote.
        note: a message (`failed`); the attempt that left the partials (`predict`, `assemble`) or ids (`merge`), or
            whose are damaged (`undone`).
        units: the CRCs of the output's write units that the stage is answerable for (`predict`, `normalize`); the
            numbers of objects as JSON (`merge`).
        at: when it was recorded, in seconds since 1970, for people.
        nonfinite: voxels that are NaN or infinite, among those the stage wrote.
        stamps: stamps of the parts of the input that the stage read (`predict`).
    """

    kind: Kind
    block: int
    digest: int = 0
    uncovered: int = 0
    note: str = ""
    units: str = ""
    at: float = 0.0
    nonfinite: int = 0
    stamps: str = ""

    def values(self) -> list[Any]:
        """Return the record as a journal has it."""
        return [getattr(self, field.name) for field in fields(self)]

    @classmethod
    def of(cls, values: Any) -> Record | None:
        """Return the record that a journal has; None where it is none of this version."""
        try:
            return cls(*values)
        except TypeError:
            return None


class PartialsRef(NamedTuple):
    """The partials that a block left."""

    digest: int
    """Digest of their manifest; 0: there are none."""
    attempt: str
    """The attempt at the block that left them."""


NO_PARTIALS = PartialsRef(0, "")

MERGED = -1
"""Key of what the merge left, among the partials of blocks."""


def table_key(block: int) -> int:
    """Return the key of what assembling the objects of a block left, among the partials of blocks."""
    return MERGED - 1 - block


def block_of(key: int) -> int:
    """Return the block of a key; 0 for `MERGED`.

    >>> block_of(3), block_of(table_key(3)), block_of(MERGED)
    (3, 3, 0)
    """
    return key if key >= 0 else max(MERGED - 1 - key, 0)


class Ledger(Journal):
    """A segment of the ledger, opened by its one writer."""

    def append(self, value: Record) -> None:
        """Add a record, with the time if it has none."""
        super().append(replace(value, at=value.at or round(time.time(), 3)).values())


def segments(root: StoragePath) -> list[StoragePath]:
    """List the segments of a run: that of a whole run, and those of parts that have drivers of their own."""
    return find_journals(root, WHOLE)


def join_segments(root: StoragePath) -> None:
    """Move the records of all segments of a run into its ledger; only when nobody writes to any of them."""
    parts = [path for path in segments(root) if path.name != WHOLE]
    if parts:
        with Ledger(root / WHOLE) as ledger:
            for record in itertools.chain.from_iterable(map(read_ledger, parts)):
                ledger.append(record)
        for path in parts:
            remove_journal(path)


@contextlib.contextmanager
def open_ledger(root: StoragePath, segment: str) -> Iterator[Ledger]:
    """Open the ledger of a run, or a segment of it, with a record of the time; commit and close it at the end."""
    ledger = Ledger(root / segment)
    ledger.append(Record("begun", 0))
    try:
        yield ledger
    finally:
        ledger.close()


def read_ledger(path: StoragePath) -> Iterator[Record]:
    """Read the records of a segment in order; none when there is none. Damaged lines are left out."""
    for values in read_journal(path):
        record = Record.of(values)
        if record is not None:
            yield record


class LedgerTail:
    """Reads what other drivers record in segments of their own, as it comes.

    Args:
        root: the directory of all segments.
        own: name of the segment that is left out.
    """

    def __init__(self, root: StoragePath, own: str) -> None:
        self._root = root
        self._own = own
        self._marks: dict[str, str] = {}
        self.seconds = NEWS_SECONDS if root.is_local else DISTANT_NEWS_SECONDS

    def __call__(self) -> list[Record]:
        """Return the records since the last call; of the first call all of them."""
        records: list[Record | None] = []
        for path in segments(self._root):
            if path.name != self._own:
                values, self._marks[path.name] = read_journal_after(path, self._marks.get(path.name, ""))
                records += map(Record.of, values)
        return [record for record in records if record is not None]


def latest_records(path: Path, blocks: int) -> Iterator[Record]:
    """Read the last record of each stage of each block, block by block, except those that were undone.

    Args:
        path: the ledger, a local file.
        blocks: number of blocks; 16 bytes are kept of each.
    """
    if not path.is_file():
        return
    offsets = {kind: np.full(blocks, -1, np.int64) for kind in ("predict", "normalize")}
    undone: set[str] = set()
    with path.open("rb") as file, path.open("rb") as again:

        def record_at(offset: int) -> Record | None:
            again.seek(offset)
            return Record.of(decode_record(again.readline()))

        offset = 0
        for line in file:
            record = Record.of(decode_record(line))
            if record is not None and 0 <= record.block < blocks:
                if record.kind in offsets and not (record.kind == "predict" and record.note in undone):
                    offsets[record.kind][record.block] = offset
                elif record.kind == "undone":
                    undone.add(record.note)
                    before = int(offsets["predict"][record.block])
                    if before >= 0 and (last := record_at(before)) is not None and last.note == record.note:
                        offsets["predict"][record.block] = -1
            offset += len(line)
        for block in range(blocks):
            for kind in offsets:
                if (place := int(offsets[kind][block])) >= 0 and (last := record_at(place)) is not None:
                    yield last
