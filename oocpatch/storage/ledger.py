"""The ledger: the durable record of what is done.

One line per record, with a CRC of its own, appended by the driver alone. An entry is a promise that the data is there,
and a marker that comes last: a crash before it costs one block of work, never a wrong voxel. Lines that are torn or
damaged count as not written.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from oocpatch.storage.checksum import text_checksum

Kind = Literal["predict", "normalize", "undone", "failed", "begun"]
COMMIT_RECORDS, COMMIT_SECONDS = 256, 5.0
"""Records are made durable in groups: so many, or so many seconds."""


@dataclass(frozen=True, slots=True)
class Record:
    """One fact about one block.

    Attributes:
        kind: `predict` and `normalize`: the stage is done; `undone`: the predict stage must run again, because its
            partials were damaged; `failed`: the block failed, for the reason in `note`; `begun`: a call went to work.
        block: index of the block.
        digest: digest of the partials that the block left (`predict`).
        uncovered: voxels of the output where no patch was, among those the stage wrote.
        note: a message (`failed`).
        units: the CRCs of the output's write units that the stage is answerable for (`predict`, `normalize`).
        at: when it was recorded, in seconds since 1970, for people.
    """

    kind: Kind
    block: int
    digest: int = 0
    uncovered: int = 0
    note: str = ""
    units: str = ""
    at: float = 0.0

    def line(self) -> bytes:
        """The record as a line of a ledger."""
        fields = [self.kind, self.block, self.digest, self.uncovered, self.note, self.units, self.at]
        text = json.dumps(fields)
        return f"{text_checksum(text):08x} {text}\n".encode()


class Ledger:
    """An append-only file of records. The caller must be its only writer.

    Args:
        path: the file; made when missing. A torn end is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cut_torn_end()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._pending = 0
        self._committed_at = time.monotonic()

    def append(self, record: Record) -> None:
        """Hand a record to the operating system: it survives this process, and after `commit` the machine."""
        line = replace(record, at=round(time.time(), 3)).line()
        written = os.write(self._file, line)
        if written != len(line):  # a disk that is just full takes part of a line
            raise OSError(f"ledger {self.path} could not be written whole: {written} of {len(line)} bytes")
        self._pending += 1

    @property
    def due(self) -> bool:
        """Whether it is time to commit."""
        late = time.monotonic() - self._committed_at >= COMMIT_SECONDS
        return self._pending >= COMMIT_RECORDS or (self._pending > 0 and late)

    def commit(self) -> None:
        """Make all records durable."""
        if self._pending:
            os.fsync(self._file)
        self._pending = 0
        self._committed_at = time.monotonic()

    def close(self) -> None:
        self.commit()
        os.close(self._file)

    def _cut_torn_end(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                file.truncate(whole)


def read_ledger(path: Path) -> Iterator[Record]:
    """The records of a ledger in order; none when there is no file. Damaged lines are left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            record = _parse(line)
            if record is not None:
                yield record


def standing(path: Path, blocks: int) -> Iterator[Record]:
    """The records that stand: of each stage of each block the last one, block by block, but for what was undone.

    Args:
        path: the ledger.
        blocks: number of blocks; 16 bytes are kept of each.
    """
    if not path.is_file():
        return
    places = {kind: np.full(blocks, -1, np.int64) for kind in ("predict", "normalize")}
    with path.open("rb") as file:
        place = 0
        for line in file:
            record = _parse(line)
            if record is not None and 0 <= record.block < blocks:
                if record.kind in places:
                    places[record.kind][record.block] = place
                elif record.kind == "undone":
                    places["predict"][record.block] = -1
            place += len(line)
        for block in range(blocks):
            for kind in places:
                if (found := int(places[kind][block])) >= 0:
                    file.seek(found)
                    record = _parse(file.readline())
                    if record is not None:
                        yield record


def _parse(line: bytes) -> Record | None:
    try:
        crc, text = line.decode().removesuffix("\n").split(" ", 1)
        if not line.endswith(b"\n") or int(crc, 16) != text_checksum(text):
            return None
        return Record(*json.loads(text))
    except (ValueError, TypeError):
        return None


@dataclass(slots=True)
class Progress:
    """What a ledger says, summed up.

    Attributes:
        predicted: digest of the partials of each block whose predict stage is done.
        normalized: the blocks whose normalize stage is done.
        failed: message of each block that failed and was not done since.
        without: voxels where no patch was, by stage and block, where there are any.
        begun, last: when the last call went to work, and of the last record, in seconds since 1970; 0: never.
        since: blocks whose predict stage the last call has done.
    """

    predicted: dict[int, int]
    normalized: set[int]
    failed: dict[int, str]
    without: dict[tuple[str, int], int] = field(default_factory=dict)
    begun: float = 0.0
    last: float = 0.0
    since: list[int] = field(default_factory=list)

    @property
    def uncovered(self) -> int:
        """Voxels where no patch was."""
        return sum(self.without.values())

    @classmethod
    def read(cls, path: Path) -> Progress:
        """Sum up a ledger."""
        progress = cls({}, set(), {})
        for record in read_ledger(path):
            progress.add(record)
        return progress

    def add(self, record: Record) -> None:
        """Take one more record into account."""
        self.last = max(self.last, record.at)
        if record.uncovered:
            self.without[record.kind, record.block] = record.uncovered
        if record.kind == "predict":
            self.predicted[record.block] = record.digest
            self.since.append(record.block)
            self.failed.pop(record.block, None)
        elif record.kind == "normalize":
            self.normalized.add(record.block)
            self.failed.pop(record.block, None)
        elif record.kind == "undone":
            self.predicted.pop(record.block, None)
        elif record.kind == "begun":
            self.begun = record.at
            self.since.clear()
        else:
            self.failed[record.block] = record.note
