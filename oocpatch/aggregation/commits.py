"""What an aggregator remembers on disk: commits, each a fact that is there whole or not at all, and the sums behind it.

```text
<output>.oocpatch/<run_id>/
    commits/00000000.json    what was added, and where its sums are; written when they are, never changed
    pieces/00000000          those sums: raw bytes, one piece after the other; deleted when no later commit needs them
```

A commit carries a CRC of its own, and one per piece. So neither needs more of the disk than to keep files apart: a
lost, torn or flipped piece is found before it is used. Damage to a commit, or one that is missing before others, shows
when the commits are read.
"""

from __future__ import annotations

import json
import math
import shutil
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from oocpatch.errors import CorruptData
from oocpatch.storage.checksums import checksum, text_checksum
from oocpatch.storage.paths import LocalPath

Array = npt.NDArray[Any]
Body = dict[str, Any]


class Commits:
    """The commits of one aggregated output. The caller must be its only writer.

    Args:
        root: directory of the run, `<workspace>/<run_id>`.
    """

    def __init__(self, root: LocalPath) -> None:
        self.root = root
        self.number = 0

    def read(self) -> list[Body]:
        """All commits, in order; what a crash left beside them is swept.

        Raises:
            CorruptData: when one is damaged, or missing before others.
        """
        found: list[Body] = []
        for path in sorted((self.root / "commits").glob("*.json")):
            body = _parse(path)
            if body is None or path.name != _name(len(found), ".json"):
                raise CorruptData(f"commit {len(found)} in {path.parent} is missing or damaged")
            found.append(body)
        self.number = len(found)
        for left in (self.root / "commits").glob("*.partial"):
            left.unlink(missing_ok=True)
        return found

    def pieces(self) -> PieceWriter:
        """Write the sums of the next commit; what an attempt before it left is overwritten."""
        (self.root / "pieces").mkdir(parents=True, exist_ok=True)
        return PieceWriter(self._file(self.number))

    def commit(self, body: Body) -> None:
        """Add a commit, when its pieces are written."""
        (self.root / "commits").mkdir(parents=True, exist_ok=True)
        text = json.dumps(body)
        stored = json.dumps({"crc": text_checksum(text), "body": text})
        (self.root / "commits" / _name(self.number, ".json")).write_atomic(stored)
        self.number += 1

    def piece(self, number: int, offset: int, crc: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Read a piece.

        Raises:
            CorruptData: when it is not what was written.
        """
        path = self._file(number)
        count = math.prod(shape)
        try:
            data = np.fromfile(path, dtype, count, offset=offset)
        except OSError as error:
            raise CorruptData(f"sums in {path} cannot be read ({type(error).__name__})") from error
        if data.size != count or checksum(data) != crc:
            raise CorruptData(f"sums in {path} at byte {offset} are not what was written")
        return data.reshape(shape)

    def check_pieces(self, numbers: set[int]) -> None:
        """Look whether the pieces of some commits are there.

        Raises:
            CorruptData: when some are not.
        """
        for number in sorted(numbers):
            if not self._file(number).exists():
                raise CorruptData(f"sums in {self._file(number)} are missing")

    def keep_pieces(self, numbers: set[int]) -> None:
        """Delete the pieces of all commits but these."""
        for path in (self.root / "pieces").glob("*"):
            if path.name not in {_name(n) for n in numbers}:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget everything. Commits go from the first on: a crash in between leaves what shows as damage."""
        for path in sorted((self.root / "commits").glob("*")):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.root / "pieces", ignore_errors=True)
        self.number = 0

    def _file(self, number: int) -> LocalPath:
        return self.root / "pieces" / _name(number)


class PieceWriter:
    """Writes pieces one after the other."""

    def __init__(self, path: LocalPath) -> None:
        self._file = path.open("wb", buffering=0)
        self._at = 0

    def append(self, data: Array) -> tuple[int, int]:
        """Write one piece; its offset in bytes, and its CRC."""
        whole = np.ascontiguousarray(data)
        left = whole.reshape(-1).view(np.uint8).data
        at, self._at = self._at, self._at + whole.nbytes
        while left:
            left = left[self._file.write(left) :]
        return at, checksum(whole)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _name(number: int, suffix: str = "") -> str:
    return f"{number:08d}{suffix}"


def _parse(path: LocalPath) -> Body | None:
    try:
        stored = json.loads(path.read_text())
        if text_checksum(stored["body"]) != stored["crc"]:
            return None
        body: Body = json.loads(stored["body"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return body
