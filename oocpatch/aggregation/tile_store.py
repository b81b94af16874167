"""Sums of an aggregator on disk: one file per tile, and a journal of what is durable.

```text
<output>.oocpatch/<run_id>/
    journal                    one line per commit: which tiles are final, and how many patches the others have
    tiles/<head>.<position>    the sums of one tile, and the patches in them; replaced as a whole
```

A tile's file lists the patches in its sums, so files need not be of one moment: after a crash one may be ahead of the
journal, and leaves out the patches it has already when they are added again. A file begins with a CRC of its name and
its patches and one of its sums, and must have the patches that the journal counts. So a file that is lost, torn,
flipped, swapped or stale is found before it is used, and files need no fsync.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.aggregation.placement import Patch
from oocpatch.errors import CorruptData
from oocpatch.planning.box import Ints
from oocpatch.storage.checksums import checksum, text_checksum
from oocpatch.storage.journal import Journal, read_journal
from oocpatch.storage.paths import LocalPath

Array = npt.NDArray[Any]
JOURNAL = "journal"
HEADER = struct.Struct("<IIIi")
"""CRC of the name and the patches, CRC of the sums, number of patches and of axes."""


class TileStore:
    """Tile files and journal of one aggregated output. The caller must be its only writer.

    Args:
        root: directory of the run, `<workspace>/<run_id>`.
    """

    def __init__(self, root: LocalPath) -> None:
        self.root = root
        self._number = 0

    def read(self) -> list[Any]:
        """Return all commits, in order, but for one that a crash tore.

        Raises:
            CorruptData: when one is damaged, or missing before others.
        """
        commits = list(read_journal(self.root / JOURNAL, strict=True))
        self._number = 0
        for commit in commits:
            if commit["number"] not in (self._number - 1, self._number):  # an interrupted commit is made again
                raise CorruptData(f"commit {self._number} in {self.root / JOURNAL} is missing")
            self._number = commit["number"] + 1
        return commits

    def commit(self, body: dict[str, Any]) -> None:
        """Add a commit, when the files of its tiles are written."""
        self.root.make_folder()
        with Journal(self.root / JOURNAL) as journal:
            journal.append({"number": self._number, **body})
        self._number += 1

    def write(self, head: int, position: Ints, patches: Iterable[Patch], sums: Array) -> None:
        """Write the file of a tile, whole or not at all."""
        path, table = self.path(head, position), np.array(list(patches), np.int64)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.partial")
        with aside.open("wb") as file:
            crc = checksum(table, text_checksum(path.name))
            file.write(HEADER.pack(crc, checksum(sums), len(table), table.shape[-1]) + table.tobytes())
            file.write(sums.reshape(-1).view(np.uint8).data)
        aside.replace(path)

    def read_tile(self, head: int, position: Ints, count: int, sums: Array | None) -> list[Patch]:
        """Return the patches in a tile, and read its sums `(C, *spatial)` into an array, if one is given.

        Raises:
            CorruptData: when the file is not one that was written for this tile with `count` patches or more.
        """
        path = self.path(head, position)
        try:
            with path.open("rb") as file:
                crc, sums_crc, length, axes = HEADER.unpack(file.read(HEADER.size))
                table = np.frombuffer(file.read(16 * length * axes), np.int64).reshape(length, 2, axes)
                is_whole = length >= count and checksum(table, text_checksum(path.name)) == crc
                if is_whole and sums is not None:
                    is_whole = file.readinto(sums.reshape(-1).view(np.uint8).data) == sums.nbytes
                    is_whole = is_whole and checksum(sums) == sums_crc
        except (OSError, ValueError, struct.error) as error:
            raise CorruptData(f"sums in {path} cannot be read ({type(error).__name__})") from error
        if not is_whole:
            raise CorruptData(f"sums in {path} are not what was written")
        return [(tuple(start), tuple(size)) for start, size in table.tolist()]

    def sweep(self, known: Container[LocalPath]) -> None:
        """Delete all tile files but some: what a crash left."""
        for path in self.root.glob("tiles/*"):
            if path not in known:
                path.unlink()

    def clear(self) -> None:
        """Delete everything, the journal first."""
        (self.root / JOURNAL).unlink(missing_ok=True)
        self.root.remove_tree()
        self.root.parent.remove_if_empty()
        self._number = 0

    def path(self, head: int, position: Ints) -> LocalPath:
        """Return the path of a tile's file."""
        return self.root / "tiles" / ".".join(map(str, (head, *position)))
