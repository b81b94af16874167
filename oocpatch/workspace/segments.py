"""Segments of a ledger: lines that are appended, by one process each, and read by all.

```text
 on a disk              ledger                a file
 in an object store     ledger/0000000000     what was committed first
                        ledger/0000000001     what was committed next
                        ...
```

Nothing can be appended to an object, so there each commit puts one of its own, only if there is none of its name. A
line is there when it is committed; in a file already when it is appended, though not yet for good. What was put many
times a minute for days is read object by object, many at a time; and the next writer puts small ones together, under
the name of the last of them, before it deletes the others: whoever reads in between reads some lines twice, which
changes nothing that a ledger says.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from oocpatch.storage.object_store import AT_A_TIME
from oocpatch.storage.paths import Address, ObjectPath

WHOLE = "ledger"
"""Name of the segment of a whole run; those of parts begin with it and a dot."""

DIGITS = 10
FEW = 64
"""Objects that are left as they are."""
MERGED = 1 << 23
"""Bytes from which on an object is no small one."""


class Segment(Protocol):
    """A segment, for its one writer."""

    def append(self, line: bytes) -> None:
        """Add a line."""

    def commit(self) -> None:
        """Make all lines durable."""

    def close(self) -> None:
        """Give the segment up; what is not committed may be lost."""


def open_segment(path: Address) -> Segment:
    """The segment at an address, to append to; made when it is missing."""
    return ObjectSegment(path) if isinstance(path, ObjectPath) else FileSegment(path)


class FileSegment:
    """A file. A torn end is cut off.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cut_torn_end()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, line: bytes) -> None:
        written = os.write(self._file, line)
        if written != len(line):  # a disk that is just full takes part of a line
            raise OSError(f"ledger {self._path} could not be written whole: {written} of {len(line)} bytes")

    def commit(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def _cut_torn_end(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb+") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                file.truncate(whole)


class ObjectSegment:
    """Numbered objects, one per commit.

    Args:
        path: what their names begin with.
    """

    def __init__(self, path: ObjectPath) -> None:
        self._path = path
        names = sorted(path.files())
        if len(names) > FEW:
            self._merge(names)
        self._next = int(names[-1]) + 1 if names else 0
        self._lines: list[bytes] = []
        self._lost: OSError | None = None

    def append(self, line: bytes) -> None:
        self._lines.append(line)

    def commit(self) -> None:
        """Put what was appended.

        Raises:
            OSError: when the store does not take it, at once if it did not the last time: that took a minute.
        """
        if self._lost is not None:
            raise self._lost
        if not self._lines:
            return
        content = b"".join(self._lines)
        try:
            # A name is taken where a process that was frozen had this segment, and is back.
            while not (self._path / _name(self._next)).put_if(content, None):
                self._next += 1
        except OSError as error:
            self._lost = error
            raise
        self._next += 1
        self._lines = []

    def close(self) -> None:
        self._lines = []

    def _merge(self, names: list[str]) -> None:
        """Put small objects together."""
        group: list[str] = []
        content = b""
        for name, data in zip(names, _contents(self._path, names), strict=True):
            group.append(name)
            content += data
            if len(content) >= MERGED or name == names[-1]:
                if len(group) > 1:
                    (self._path / name).write_bytes(content)
                    self._path.remove(group[:-1])
                group, content = [], b""


def segments(root: Address) -> list[Address]:
    """The ledger of a run, and those of parts that have drivers of their own."""
    if isinstance(root, ObjectPath):
        found = root.folders()
        return [root / name for name in found if name == WHOLE or name.startswith(f"{WHOLE}.")]
    return [*root.glob(WHOLE), *sorted(root.glob(f"{WHOLE}.*"))]


def lines_of(path: Address) -> Iterator[bytes]:
    """The lines of a segment, in order; none where there is none. The last one of a file may be torn."""
    if isinstance(path, ObjectPath):
        yield from _lines(path, sorted(path.files()))
    elif path.exists():
        with path.open("rb") as file:
            yield from file


def lines_after(path: Address, mark: str) -> tuple[list[bytes], str]:
    """The whole lines of a segment that were added since it had this mark, and its mark now; empty: all of them."""
    if isinstance(path, ObjectPath):
        names = sorted(path.files(after=mark))
        return list(_lines(path, names)), names[-1] if names else mark
    start = int(mark or 0)
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    whole = data.rfind(b"\n") + 1  # the end may be on its way
    return data[:whole].splitlines(keepends=True), str(start + whole)


def remove_segment(path: Address) -> None:
    """Delete a segment."""
    if isinstance(path, ObjectPath):
        path.remove()
    else:
        path.unlink()


@contextlib.contextmanager
def rewritten(path: Address) -> Iterator[Address]:
    """Where to write, all at once, what is to stand in place of a segment that nobody writes to.

    In an object store a crash may leave both, the old lines before the new ones.
    """
    if isinstance(path, Path):
        yield path
        return
    names = sorted(path.files())
    yield path / _name(int(names[-1]) + 1 if names else 0)
    path.remove(names)


def _lines(path: ObjectPath, names: list[str]) -> Iterator[bytes]:
    """The lines of objects, in order."""
    for content in _contents(path, names):
        yield from content.splitlines(keepends=True)


def _contents(path: ObjectPath, names: list[str]) -> Iterator[bytes]:
    """Objects in order, some of them read at a time; one that was merged meanwhile has nothing any more."""

    def content(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except FileNotFoundError:
            return b""

    with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="oocpatch-ledger") as pool:
        for first in range(0, len(names), AT_A_TIME):
            yield from pool.map(content, names[first : first + AT_A_TIME])


def _name(number: int) -> str:
    return f"{number:0{DIGITS}d}"


@contextlib.contextmanager
def at_hand(path: Address) -> Iterator[Path]:
    """A ledger on the local disk: the file itself, or a copy of an object, or of the objects of a segment."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="oocpatch-") as folder:
        copy = Path(folder, path.name)
        with copy.open("wb") as file:
            try:
                file.writelines(path.pieces())
            except FileNotFoundError:
                file.writelines(lines_of(path))
        yield copy
