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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from oocpatch.storage.checksum import text_checksum

Kind = Literal["predict", "normalize", "undone", "failed"]
COMMIT_RECORDS, COMMIT_SECONDS = 256, 5.0
"""Records are made durable in groups: so many, or so many seconds."""


@dataclass(frozen=True, slots=True)
class Record:
    """One fact about one block.

    Attributes:
        kind: `predict` and `normalize`: the stage is done; `undone`: the predict stage must run again, because its
            partials were damaged; `failed`: the block failed, for the reason in `note`.
        block: index of the block.
        digest: digest of the partials that the block left (`predict`).
        uncovered: voxels of the output where no patch was, among those the stage wrote.
        note: a message (`failed`).
        nonfinite: voxels that are NaN or infinite, among those the stage wrote.
    """

    kind: Kind
    block: int
    digest: int = 0
    uncovered: int = 0
    note: str = ""
    nonfinite: int = 0


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
        text = json.dumps([record.kind, record.block, record.digest, record.uncovered, record.note, record.nonfinite])
        line = f"{text_checksum(text):08x} {text}\n".encode()
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
        counts: voxels where no patch was, and that are NaN or infinite, by stage and block, where there are any.
    """

    predicted: dict[int, int]
    normalized: set[int]
    failed: dict[int, str]
    counts: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)

    @property
    def uncovered(self) -> int:
        """Voxels where no patch was."""
        return sum(uncovered for uncovered, _ in self.counts.values())

    @property
    def nonfinite(self) -> int:
        """Voxels that are NaN or infinite."""
        return sum(nonfinite for _, nonfinite in self.counts.values())

    @classmethod
    def read(cls, path: Path) -> Progress:
        """Sum up a ledger."""
        progress = cls({}, set(), {})
        for record in read_ledger(path):
            progress.add(record)
        return progress

    def add(self, record: Record) -> None:
        """Take one more record into account."""
        if record.uncovered or record.nonfinite:
            self.counts[record.kind, record.block] = record.uncovered, record.nonfinite
        if record.kind == "predict":
            self.predicted[record.block] = record.digest
            self.failed.pop(record.block, None)
        elif record.kind == "normalize":
            self.normalized.add(record.block)
            self.failed.pop(record.block, None)
        elif record.kind == "undone":
            self.predicted.pop(record.block, None)
        else:
            self.failed[record.block] = record.note
