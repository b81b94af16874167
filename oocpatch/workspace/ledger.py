"""The ledger: the durable record of what is done.

One line per record, with a CRC of its own, appended by the driver alone. An entry is a promise that the data is there,
and a marker that comes last: a crash before it costs one block of work, never a wrong voxel. Lines that are torn or
damaged count as not written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from oocpatch.storage.checksums import text_checksum
from oocpatch.storage.paths import Address
from oocpatch.workspace.segments import lines_after, lines_of, open_segment, segments

Kind = Literal["predict", "normalize", "undone", "failed", "begun"]
COMMIT_RECORDS, COMMIT_SECONDS = 256, 5.0
"""Records are made durable in groups: so many, or so many seconds."""

NEWS_SECONDS, DISTANT_NEWS_SECONDS = 1.0, 10.0
"""How often drivers look what others recorded: on a disk, and in an object store."""


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


class PartialsRef(NamedTuple):
    """The partials that a block left.

    Attributes:
        digest: of their manifest; 0: there are none.
        attempt: which of the attempts at the block left them.
    """

    digest: int
    attempt: str


NO_PARTIALS = PartialsRef(0, "")


class Ledger:
    """An append-only record of what is done. The caller must be its only writer.

    Args:
        path: the segment to write to; made when missing.
    """

    def __init__(self, path: Address) -> None:
        self.path = path
        self._segment = open_segment(path)
        self._pending = 0
        self._committed_at = time.monotonic()

    def append(self, record: Record) -> None:
        """Add a record. On a disk it survives this process, and after `commit` the machine; an object is put then."""
        self._segment.append(replace(record, at=record.at or round(time.time(), 3)).line())
        self._pending += 1

    @property
    def due(self) -> bool:
        """Whether it is time to commit."""
        late = time.monotonic() - self._committed_at >= COMMIT_SECONDS
        return self._pending >= COMMIT_RECORDS or (self._pending > 0 and late)

    def commit(self) -> None:
        """Make all records durable."""
        if self._pending:
            self._segment.commit()
        self._pending = 0
        self._committed_at = time.monotonic()

    def close(self) -> None:
        try:
            self.commit()
        finally:
            self._segment.close()


def read_ledger(path: Address) -> Iterator[Record]:
    """The records of a segment in order; none when there is none. Damaged lines are left out."""
    for line in lines_of(path):
        record = _parse(line)
        if record is not None:
            yield record


class LedgerTail:
    """What other drivers record in segments of their own, as it comes.

    Args:
        root: the directory of all segments.
        own: name of the segment that is not looked at.

    Attributes:
        seconds: how often to look; seldom where each look is a request that is paid for.
    """

    def __init__(self, root: Address, own: str) -> None:
        self._root = root
        self._own = own
        self._marks: dict[str, str] = {}
        self.seconds = NEWS_SECONDS if isinstance(root, Path) else DISTANT_NEWS_SECONDS

    def __call__(self) -> list[Record]:
        """The records since the last time; the first time all of them."""
        found: list[Record] = []
        for path in segments(self._root):
            if path.name != self._own:
                lines, self._marks[path.name] = lines_after(path, self._marks.get(path.name, ""))
                found += [record for record in map(_parse, lines) if record is not None]
        return found


def latest_records(path: Path, blocks: int) -> Iterator[Record]:
    """The records that stand: of each stage of each block the last one, block by block, but for what was undone.

    Args:
        path: the ledger, a file.
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
