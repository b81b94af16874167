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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

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
        note: a message (`failed`); the attempt that left the partials (`predict`), and whose are damaged (`undone`).
        units: the CRCs of the output's write units that the stage is answerable for (`predict`, `normalize`).
        at: when it was recorded, in seconds since 1970, for people.
        nonfinite: voxels that are NaN or infinite, among those the stage wrote.
    """

    kind: Kind
    block: int
    digest: int = 0
    uncovered: int = 0
    note: str = ""
    units: str = ""
    at: float = 0.0
    nonfinite: int = 0

    def line(self) -> bytes:
        """The record as a line of a ledger."""
        told = [self.kind, self.block, self.digest, self.uncovered, self.note, self.units, self.at, self.nonfinite]
        text = json.dumps(told)
        return f"{text_checksum(text):08x} {text}\n".encode()


class Promise(NamedTuple):
    """The partials that a block left.

    Attributes:
        digest: of their manifest; 0: there are none.
        attempt: which of the attempts at the block left them.
    """

    digest: int
    attempt: str


NO_PARTIALS = Promise(0, "")


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
        line = replace(record, at=record.at or round(time.time(), 3)).line()
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


class News:
    """What other drivers record in segments of their own, as it comes.

    Args:
        root: the directory of all segments.
        own: name of the segment that is not looked at.
    """

    def __init__(self, root: Path, own: str) -> None:
        self._root = root
        self._own = own
        self._read: dict[str, int] = {}

    def __call__(self) -> list[Record]:
        """The records since the last time; the first time all of them."""
        found: list[Record] = []
        for path in segments(self._root):
            if path.name == self._own:
                continue
            with path.open("rb") as file:
                file.seek(self._read.get(path.name, 0))
                data = file.read()
            whole = data.rfind(b"\n") + 1  # the end may be on its way
            self._read[path.name] = self._read.get(path.name, 0) + whole
            records = (_parse(line) for line in data[:whole].splitlines(keepends=True))
            found += [record for record in records if record is not None]
        return found


def segments(root: Path) -> list[Path]:
    """The ledger of a run, and those of parts that have drivers of their own."""
    return sorted(root.glob("ledger")) + sorted(root.glob("ledger.*"))


def standing(path: Path, blocks: int) -> Iterator[Record]:
    """The records that stand: of each stage of each block the last one, block by block, but for what was undone.

    Args:
        path: the ledger.
        blocks: number of blocks; 16 bytes are kept of each.
    """
    if not path.is_file():
        return
    places = {kind: np.full(blocks, -1, np.int64) for kind in ("predict", "normalize")}
    undone: set[str] = set()
    with path.open("rb") as file, path.open("rb") as again:

        def at(place: int) -> Record | None:
            again.seek(place)
            return _parse(again.readline())

        place = 0
        for line in file:
            record = _parse(line)
            if record is not None and 0 <= record.block < blocks:
                if record.kind in places and not (record.kind == "predict" and record.note in undone):
                    places[record.kind][record.block] = place
                elif record.kind == "undone":
                    undone.add(record.note)
                    before = int(places["predict"][record.block])
                    if before >= 0 and (found := at(before)) is not None and found.note == record.note:
                        places["predict"][record.block] = -1
            place += len(line)
        for block in range(blocks):
            for kind in places:
                if (last := int(places[kind][block])) >= 0 and (found := at(last)) is not None:
                    yield found


def _parse(line: bytes) -> Record | None:
    try:
        crc, text = line.decode().removesuffix("\n").split(" ", 1)
        if not line.endswith(b"\n") or int(crc, 16) != text_checksum(text):
            return None
        return Record(*json.loads(text))
    except (ValueError, TypeError):
        return None
