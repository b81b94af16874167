"""Journals: records of what is done, appended by one process, each with a checksum, and never changed.

A record is a line: the CRC-32C of a JSON text, a blank, and the text. It is a promise that what it says is there, so it
is appended after that. Lines that are torn or damaged count as not written.

```text
 on a disk              ledger                a file
 in an object store     ledger/0000000000     what was committed first
                        ledger/0000000001     what was committed next
                        ...
```

Nothing can be appended to an object, so each commit puts one of its own, only if there is none of its name. A record
is there when it is committed; in a file when it is appended, though not yet for good. Many small objects are read at a
time, and the next writer merges them under the name of the last one before it deletes the others: whoever reads in
between reads some records twice, which must change nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from oocpatch.errors import CorruptData
from oocpatch.storage.checksums import text_checksum
from oocpatch.storage.object_store import AT_A_TIME
from oocpatch.storage.paths import LocalPath, ObjectPath, StoragePath

COMMIT_RECORDS, COMMIT_SECONDS = 256, 5.0
"""Records are made durable in groups: so many, or so many seconds."""

DIGITS = 10
FEW = 64
"""Objects that are left as they are."""
MERGED = 1 << 23
"""Bytes from which on an object is no small one."""


def encode_record(value: Any) -> bytes:
    r"""Return a record as a line of a journal.

    >>> encode_record(["done", 3])
    b'b32ba4ff ["done", 3]\n'
    """
    text = json.dumps(value)
    return f"{text_checksum(text):08x} {text}\n".encode()


def decode_record(line: bytes) -> Any:
    """Return the record of a line; None where the line is torn or damaged.

    >>> decode_record(encode_record(["done", 3])), decode_record(encode_record(["done", 3])[:-1])
    (['done', 3], None)
    """
    try:
        crc, text = line.decode().removesuffix("\n").split(" ", 1)
        return json.loads(text) if line.endswith(b"\n") and int(crc, 16) == text_checksum(text) else None
    except ValueError:
        return None


class Journal:
    """A journal, opened by its one writer, and made if it is missing. Several threads may append."""

    def __init__(self, path: StoragePath) -> None:
        self.path = path
        self._lines = _lines_at(path)
        self._lines.open()
        self._lock = threading.Lock()
        self._pending = 0
        self._committed_at = time.monotonic()

    def append(self, value: Any) -> None:
        """Add a record, of values that JSON has; None is no record.

        On a disk it survives this process, and after `commit` the machine; an object is put then.
        """
        with self._lock:
            self._lines.append(encode_record(value))
            self._pending += 1

    @property
    def due(self) -> bool:
        """True when it is time to commit."""
        late = time.monotonic() - self._committed_at >= COMMIT_SECONDS
        return self._pending >= COMMIT_RECORDS or (self._pending > 0 and late)

    def commit(self, *, if_due: bool = False) -> None:
        """Make all records durable, with `if_due` only when it is time.

        Raises:
            OSError: when they cannot be stored.
        """
        with self._lock:
            if if_due and not self.due:
                return
            if self._pending:
                self._lines.commit()
            self._pending = 0
            self._committed_at = time.monotonic()

    def close(self) -> None:
        """Commit, and give the journal up."""
        try:
            self.commit()
        finally:
            self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: StoragePath, *, strict: bool = False) -> Iterator[Any]:
    """Read the records of a journal in order; none where there is none. What a crash has torn is left out.

    Raises:
        CorruptData: when a record is damaged; without `strict` it is left out.
    """
    for number, line in enumerate(_lines_at(path).read()):
        value = decode_record(line)
        if value is not None:
            yield value
        elif strict and line.endswith(b"\n"):
            raise CorruptData(f"record {number} in {path} is damaged")


def read_journal_after(path: StoragePath, mark: str) -> tuple[list[Any], str]:
    """Read the records that were added to a journal since it had a mark, and its mark now; empty: all of them."""
    lines, mark = _lines_at(path).read_after(mark)
    return [value for value in map(decode_record, lines) if value is not None], mark


def find_journals(root: StoragePath, name: str) -> list[StoragePath]:
    """List the journals right below a path that have this name, or begin with it and a dot."""
    return _lines_at(root / name).find()


def replace_journal(path: StoragePath, lines: Iterable[bytes]) -> None:
    """Put lines in place of a journal that nobody writes to.

    In an object store a crash may leave both, the old lines before the new ones.
    """
    _lines_at(path).replace(lines)


def remove_journal(path: StoragePath) -> None:
    """Delete a journal."""
    _lines_at(path).remove()


def local_copy(path: StoragePath) -> contextlib.AbstractContextManager[Path]:
    """Open a journal on the local disk: the file itself, or a copy of an object, or of the objects of a journal."""
    return _lines_at(path).local_copy()


class _FileLines:
    """Lines in a file. The last one may be torn."""

    def __init__(self, path: LocalPath) -> None:
        self._path = path
        self._file = -1

    def open(self) -> None:
        """Open the file to append to it; a torn end is cut off."""
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
        whole = self._path.read_bytes().rfind(b"\n") + 1
        if whole < self._path.size():
            os.truncate(self._file, whole)

    def append(self, line: bytes) -> None:
        written = os.write(self._file, line)
        if written != len(line):  # a disk that is just full takes part of a line
            raise OSError(f"{self._path} could not be written whole: {written} of {len(line)} bytes")

    def commit(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def read(self) -> Iterator[bytes]:
        if self._path.exists():
            with self._path.open("rb") as file:
                yield from file

    def read_after(self, mark: str) -> tuple[list[bytes], str]:
        start = int(mark or 0)
        with self._path.open("rb") as file:
            file.seek(start)
            data = file.read()
        whole = data.rfind(b"\n") + 1  # the end may be on its way
        return data[:whole].splitlines(keepends=True), str(start + whole)

    def replace(self, lines: Iterable[bytes]) -> None:
        self._path.write_atomic(lines)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def find(self) -> list[StoragePath]:
        folder, name = self._path.parent, self._path.name
        return [*folder.glob(name), *sorted(folder.glob(f"{name}.*"))]

    def local_copy(self) -> contextlib.AbstractContextManager[Path]:
        return contextlib.nullcontext(self._path)


class _ObjectLines:
    """Lines in numbered objects, one per commit."""

    def __init__(self, path: ObjectPath) -> None:
        self._path = path
        self._next = 0
        self._pending: list[bytes] = []
        self._error: OSError | None = None

    def open(self) -> None:
        """Find the next number; many small objects are put together."""
        names = self._names()
        if len(names) > FEW:
            self._merge(names)
        self._next = _number_after(names)

    def append(self, line: bytes) -> None:
        self._pending.append(line)

    def commit(self) -> None:
        """Put what was appended.

        Raises:
            OSError: when the store does not take it, at once if it did not the last time: that took a minute.
        """
        if self._error is not None:
            raise self._error
        content = b"".join(self._pending)
        try:
            # A name is taken where a process that was frozen had this journal, and is back.
            while not (self._path / _name(self._next)).put_if_absent(content):
                self._next += 1
        except OSError as error:
            self._error = error
            raise
        self._next += 1
        self._pending = []

    def close(self) -> None:
        self._pending = []

    def read(self) -> Iterator[bytes]:
        return self._read(self._names())

    def read_after(self, mark: str) -> tuple[list[bytes], str]:
        names = self._names(mark)
        return list(self._read(names)), names[-1] if names else mark

    def replace(self, lines: Iterable[bytes]) -> None:
        names = self._names()
        (self._path / _name(_number_after(names))).write_atomic(lines)
        self._path.remove(names)

    def remove(self) -> None:
        self._path.remove_tree()

    def find(self) -> list[StoragePath]:
        root, name = self._path.parent, self._path.name
        return [root / folder for folder in root.list_folders() if folder == name or folder.startswith(f"{name}.")]

    @contextlib.contextmanager
    def local_copy(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="oocpatch-") as folder:
            copy = Path(folder, self._path.name)
            with copy.open("wb") as file:
                try:
                    file.writelines(self._path.read_pieces())
                except FileNotFoundError:
                    file.writelines(self.read())
            yield copy

    def _names(self, after: str = "") -> list[str]:
        return sorted(self._path.list_files(after=after))

    def _read(self, names: list[str]) -> Iterator[bytes]:
        for content in self._contents(names):
            yield from content.splitlines(keepends=True)

    def _contents(self, names: list[str]) -> Iterator[bytes]:
        """Read objects in order, some of them at a time; one that was merged meanwhile is empty."""

        def content(name: str) -> bytes:
            state = (self._path / name).state()
            return b"" if state is None else state.content

        with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="oocpatch-journal") as pool:
            for first in range(0, len(names), AT_A_TIME):
                yield from pool.map(content, names[first : first + AT_A_TIME])

    def _merge(self, names: list[str]) -> None:
        """Put small objects together."""
        group: list[str] = []
        content = b""
        for name, data in zip(names, self._contents(names), strict=True):
            group.append(name)
            content += data
            if len(content) >= MERGED or name == names[-1]:
                if len(group) > 1:
                    (self._path / name).write_atomic(content)
                    self._path.remove(group[:-1])
                group, content = [], b""


def _lines_at(path: StoragePath) -> _FileLines | _ObjectLines:
    if isinstance(path, LocalPath):
        return _FileLines(path)
    if isinstance(path, ObjectPath):
        return _ObjectLines(path)
    raise TypeError(f"the path of a journal must be a StoragePath, got {type(path).__name__}; convert it on entry")


def _name(number: int) -> str:
    return f"{number:0{DIGITS}d}"


def _number_after(names: Sequence[str]) -> int:
    return int(names[-1]) + 1 if names else 0
