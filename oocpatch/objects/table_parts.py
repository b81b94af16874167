"""Tables of blocks on disk: what a task leaves of its block, and their merge by label in bounded memory.

```text
 <attempt>/rows            sorted runs of rows, one after the other; mostly one
           corners         likewise, of polygons
           manifest.json   rows and CRC of each run

 runs   [1 1 4 | 6 9]  [2 3 4 | 7]  [4 | 8 8 9]      cut at the same labels, so that a range of all runs fits in memory
 table  [1 2 3 4]      then [6 7 8 9]
```

The manifest's CRC is in the ledger, so damage is found before anything is merged.
"""

from __future__ import annotations

import bisect
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.errors import CorruptPartial
from oocpatch.storage.checksums import checksum, text_checksum
from oocpatch.storage.paths import LocalPath
from oocpatch.workspace.ledger import NO_PARTIALS, PartialsRef

Array = npt.NDArray[Any]
MANIFEST = "manifest.json"
SAMPLES = 1 << 20
"""Labels of all runs that are looked at to choose ranges."""

MOST_SAMPLES = 64
"""Labels of one run that are."""


class PartWriter:
    """Writes the tables of one attempt at a block, run by run.

    Idempotent: writes only below an address of its own.
    """

    def __init__(self, block: LocalPath) -> None:
        self._attempt = f"{secrets.randbelow(10**15):015d}"
        self._folder = block / self._attempt
        self._runs: dict[str, list[tuple[int, int]]] = {}

    def write(self, name: str, rows: Array) -> None:
        """Append a sorted run to the table of a name."""
        if not len(rows):
            return
        self._folder.make_folder()
        with (self._folder / name).open("ab") as file:
            file.write(rows.view(np.uint8).data)
        self._runs.setdefault(name, []).append((len(rows), _run_checksum(rows)))

    def close(self) -> PartialsRef:
        """Write the manifest, and return the reference for the ledger."""
        if not self._runs:
            return NO_PARTIALS
        manifest = json.dumps(self._runs, sort_keys=True)
        (self._folder / MANIFEST).write_atomic(manifest)
        return PartialsRef(text_checksum(manifest) or 1, self._attempt)

    def discard(self) -> None:
        """Delete what was written by an attempt that failed."""
        self._folder.remove_tree()


def _run_checksum(rows: Array) -> int:
    return checksum(rows.view(np.uint8))


@dataclass
class SortedRun:
    """A sorted run of rows in a file, read from its beginning to its end.

    Attributes:
        path: the file.
        dtype: dtype of its rows.
        first: its first row in the file.
        count: number of its rows.
        sample: some of its labels, ascending.
        next_label: label of the next row; None at the end.
        position: number of rows that were read.
    """

    path: LocalPath
    dtype: np.dtype[np.void]
    first: int
    count: int
    sample: list[int]
    next_label: int | None
    position: int = 0

    @classmethod
    def verified(
        cls, path: LocalPath, dtype: np.dtype[np.void], first: int, count: int, *, crc: int, samples: int
    ) -> SortedRun | None:
        """Return a run; None if it is not the one that was written."""
        rows = np.fromfile(path, dtype, count, offset=first * dtype.itemsize)
        if len(rows) != count or _run_checksum(rows) != crc:
            return None
        sample = rows["label"][:: -(-count // samples)].tolist()
        return cls(path, dtype, first, count, sample, sample[0])

    def take(self, bound: int | None) -> Array:
        """Read the next rows, those of labels below the bound."""
        if self.next_label is None or (bound is not None and self.next_label >= bound):
            return np.empty(0, self.dtype)
        table = np.memmap(self.path, self.dtype, "r", self.first * self.dtype.itemsize, (self.count,))
        start, stop = self.position, self.count
        if bound is not None:
            stop = bisect.bisect_left(range(self.count), bound, start, key=lambda row: int(table["label"][row]))
        self.position, self.next_label = stop, int(table["label"][stop]) if stop < self.count else None
        return np.array(table[start:stop])


def read_runs(
    folder: LocalPath, block: int, ref: PartialsRef, dtypes: dict[str, np.dtype[np.void]], samples: int
) -> dict[str, list[SortedRun]]:
    """Return the runs of the tables that the ledger records of a block, each verified.

    Raises:
        CorruptPartial: when one is missing, or not the one that was written.
    """
    if not ref.digest:
        return {}
    place = folder / ref.attempt
    try:
        manifest = (place / MANIFEST).read_text()
        if (text_checksum(manifest) or 1) != ref.digest:
            raise CorruptPartial(block, f"{MANIFEST} is not the one in the ledger")
        found: dict[str, list[SortedRun]] = {}
        for name, runs in json.loads(manifest).items():
            first = 0
            for count, crc in runs:
                run = SortedRun.verified(place / name, dtypes[name], first, count, crc=crc, samples=samples)
                if run is None:
                    raise CorruptPartial(block, f"its table {name} is not what was written")
                found.setdefault(name, []).append(run)
                first += count
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptPartial(block, f"its table cannot be read ({type(error).__name__})") from error
    return found


def samples_per_run(blocks: int) -> int:
    """Return the number of labels to look at of each run, for so many blocks."""
    return max(1, min(MOST_SAMPLES, SAMPLES // max(1, blocks)))


def cut_ranges(runs: Sequence[tuple[SortedRun, int]], limit: int) -> list[int]:
    """Return labels to cut all runs at, so that no range has much more than `limit` bytes.

    A single label is never cut.

    Args:
        runs: each with the bytes that a row of it takes in memory.
        limit: bytes of a range.

    >>> run = SortedRun(LocalPath("x"), np.dtype([("label", "u8")]), 0, 8, [1, 3, 5, 7], 1)
    >>> cut_ranges([(run, 1)], 4)
    [5]
    """
    if not runs:
        return []
    labels = np.concatenate([np.array(run.sample, np.uint64) for run, _ in runs])
    sizes = np.concatenate([np.full(len(run.sample), run.count / len(run.sample) * size) for run, size in runs])
    order = np.argsort(labels, kind="stable")
    labels, below = labels[order], np.cumsum(sizes[order]) - sizes[order]
    bounds: list[int] = []
    position, start = 0, 0.0
    while (position := int(np.searchsorted(below, start + limit))) < len(labels):
        bound = int(labels[position])
        if bounds and bound <= bounds[-1]:  # one label alone takes more
            position = int(np.searchsorted(labels, np.uint64(bounds[-1]), side="right"))
            if position == len(labels):
                break
            bound = int(labels[position])
        bounds.append(bound)
        start = float(below[int(np.searchsorted(labels, np.uint64(bound)))])
    return bounds


def read_ranges(
    runs: dict[str, list[SortedRun]], bytes_per_row: dict[str, int], limit: int, check: Callable[[], None]
) -> Iterator[dict[str, list[Array]]]:
    """Yield the rows of all tables, a range of labels after the other, each in the order of the runs.

    Args:
        runs: the runs of each table, those of the blocks in order.
        bytes_per_row: bytes in memory that a row of each table needs.
        limit: bytes of a range; a label alone may have more.
        check: called now and then.
    """
    sized = [(run, bytes_per_row[name]) for name, of_table in runs.items() for run in of_table]
    for bound in (*cut_ranges(sized, limit), None):
        check()
        yield {name: [rows for run in of_table if len(rows := run.take(bound))] for name, of_table in runs.items()}
