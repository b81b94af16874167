"""Masses: one pass over a map says how much probability lies in each of its cells.

A map's voxels are summed cell by cell in Dask tasks, each of many cells, of which a thread holds one at a time. What
comes out is a few bytes per cell and value:

```text
 map            cells                table
 0 0 | 3 1      cell 0  cell 1       cell   value   mass
 0 2 | 0 0  -->         3 1     -->  0      -       2          (a probability map)
                        0 0          1      -       4
```

For labels there is a line per cell and label, with the number of voxels, so that other label probabilities need no
second pass.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from oocpatch.sampling.map_cells import Cells
from oocpatch.sampling.subject import LoadedVolume
from oocpatch.storage.files import write_atomically
from oocpatch.volumes.passes import run_pass
from oocpatch.volumes.volume import Volume

Values = npt.NDArray[Any]
Summary = Callable[[Values], tuple[Values, Values]]
"""Gives the values found among voxels, and the mass of each."""

TASK_BYTES = 128 << 20
"""Voxels that one task sums: a fifth of a second or more, against which Dask's own time is nothing."""

MOST_LABELS_COUNTED = 1 << 16
"""Integers further apart than this are sorted rather than counted."""

COUNTED_AT_ONCE = 1 << 17
"""Voxels whose labels are counted at a time."""

MOST_THREADS = 8
"""Threads of a pass: each holds a cell, and Zarr's turns leave no work for more."""


def weights_in(values: Values) -> tuple[Values, Values]:
    """The mass of some voxels of a probability map: their sum, in float64, with a value that says nothing.

    Raises:
        ValueError: when one is negative, infinite or not a number.

    >>> weights_in(np.array([0.5, 0.25]))
    (array([0.]), array([0.75]))
    """
    lowest, highest = values.min(), values.max()
    if not (lowest >= 0 and highest < np.inf):
        raise ValueError(
            f"a probability map must hold finite values that are not negative, got {lowest if lowest < 0 else highest}"
        )
    total = values.sum(dtype=np.float64)
    return np.zeros(1), np.array([total])


def labels_in(values: Values) -> tuple[Values, Values]:
    """The labels of some voxels, and how many voxels have each.

    Raises:
        ValueError: when one is not a number.

    >>> labels_in(np.array([3, -1, 3], np.int8))
    (array([-1,  3], dtype=int8), array([1., 2.]))
    """
    low, high = values.min(), values.max()
    if low == high:
        return values.ravel()[:1].copy(), np.array([float(values.size)])
    if values.dtype.kind == "f":
        if np.isnan(low):
            raise ValueError("a label map must hold numbers, got nan")
        labels, counts = np.unique(values, return_counts=True)
    elif int(high) - int(low) < MOST_LABELS_COUNTED:
        found = np.zeros(int(high) - int(low) + 1, np.intp)
        flat = values.ravel()
        for start in range(0, len(flat), COUNTED_AT_ONCE):  # bincount takes eight bytes a voxel
            part = flat[start : start + COUNTED_AT_ONCE]
            wide = part.astype(np.intp) if part.dtype.itemsize < 4 else part
            offsets = (wide - wide.dtype.type(low)).astype(np.intp, copy=False)
            found += np.bincount(offsets, minlength=len(found))
        present = np.flatnonzero(found)
        labels, counts = present.astype(values.dtype) + low, found[present]  # wraps around and back for int8
    else:
        labels, counts = np.unique(values, return_counts=True)
    return labels, counts.astype(np.float64)


def measure(volume: Volume, cells: Cells, summarize: Summary, name: str) -> Table:
    """Sum up a map, cell by cell.

    Memory stays bounded whatever the size of the map: each thread holds one cell.

    Args:
        volume: the map, of one channel.
        cells: how it is cut.
        summarize: sums up the voxels of a cell.
        name: of the map, for the progress bar and for messages.

    Raises:
        ValueError: when `summarize` refuses a voxel; the message names the map and the cell.
    """
    per_task = max(1, TASK_BYTES // (math.prod(cells.step) * volume.dtype.itemsize))
    tasks = [range(i, min(i + per_task, len(cells))) for i in range(0, len(cells), per_task)]
    threads = min(len(tasks), len(os.sched_getaffinity(0)), MOST_THREADS)
    tables = run_pass(
        lambda numbers: Table.joined(list(_summaries(volume, cells, summarize, name, numbers))),
        tasks,
        threads=threads,
        name=f"masses of {name}",
        unit="cells",
        size=len,
        total=len(cells),
    )
    return Table.joined(list(tables))


def _summaries(volume: Volume, cells: Cells, summarize: Summary, name: str, numbers: range) -> Iterator[Table]:
    for number in numbers:
        box = cells[number]
        try:
            values, masses = summarize(volume.read(box)[0])
        except ValueError as error:
            raise ValueError(f"{name}: {error} in the box from {box.start} to {box.stop}") from error
        kept = masses > 0
        yield Table(np.full(int(kept.sum()), number), values[kept], masses[kept])


logger = logging.getLogger("oocpatch")


Known = tuple[Cells, "Table", npt.NDArray[np.float64]]
"""The cells of a map, what lies in them, and the cumulative sums of the masses."""


FORMAT = 1


HIERARCHY = ("zarr.json", ".zgroup")


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """How much of which value lies in which cell; what has no mass is left out.

    Attributes:
        cells: `(E,)` int64, numbers of cells, ascending.
        values: `(E,)`, labels in the map's dtype; zeros for a probability map.
        masses: `(E,)` float64, number of voxels with that label; sum of the probabilities.
    """

    cells: npt.NDArray[np.int64]
    values: npt.NDArray[Any]
    masses: npt.NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Sequence[Table]) -> Self:
        """Tables of consecutive cells as one."""
        return cls(
            np.concatenate([part.cells for part in parts]),
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.masses for part in parts]),
        )


class Tables:
    """The tables of the maps that a sampler has drawn from, for as long as those maps are there."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, Known] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def get(self, source: Volume | LoadedVolume, make: Callable[[], Known]) -> Known:
        """The table of a map; made if it is not known, by one thread at a time."""
        with self._lock:
            if source not in self._known:
                self._known[source] = make()
            return self._known[source]

    def __getstate__(self) -> list[tuple[Any, Any]]:
        return list(self._known.items())

    def __setstate__(self, state: list[tuple[Any, Any]]) -> None:
        self._known = weakref.WeakKeyDictionary(dict(state))
        self._lock = threading.Lock()


def remembered(volume: Volume, cells: Cells, kind: str, measure: Callable[[], Table]) -> Table:
    """The table of a map from its place beside the map; measured, and put there, if it is not there yet.

    Several processes that ask at once take turns, so that one of them measures.

    Args:
        volume: the map.
        cells: how it is cut; the patch size is part of that.
        kind: what is measured.
        measure: makes the table.
    """
    if volume.source.files is None:
        return measure()
    folder = _outermost(volume.source.files)
    folder = folder.with_name(f"{folder.name}.oocpatch-masses")
    file = folder / f"{_key(volume, cells, kind)}.npz"
    with _alone(folder):
        stamp = _stamp(volume.source.files)
        table = _load(file, stamp)
        if table is None:
            table = measure()
            if _stamp(volume.source.files) == stamp:
                _save(file, table, stamp)
    return table


def _outermost(path: Path) -> Path:
    """The whole hierarchy that an array belongs to: a directory of ours inside would look like a part of it."""
    while any((path.parent / name).exists() for name in HIERARCHY):
        path = path.parent
    return path


def _key(volume: Volume, cells: Cells, kind: str) -> str:
    parts = [FORMAT, kind, volume.fingerprint, volume.axes.order, cells.box.start, cells.box.stop, cells.step]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _stamp(files: Path) -> str:
    """A digest of names, sizes and times of all files below a directory."""
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(files):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(folder, name)  # noqa: PTH118 - a Path per chunk takes longer than its stat
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(path)  # noqa: PTH116 - likewise
                digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a lock on a directory, made if need be; without one where that cannot be."""
    try:
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        logger.info("masses cannot be kept in %s: %s", folder, error)
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks: at worst the work is done twice
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _load(file: Path, stamp: str) -> Table | None:
    try:
        with np.load(io.BytesIO(file.read_bytes())) as stored:
            # each array has a CRC-32 in the archive, which reading compares
            table = Table(stored["cells"], stored["values"], stored["masses"])
            return table if str(stored["stamp"]) == stamp else None
    except Exception:  # noqa: BLE001 - whatever a damaged file raises, it counts as absent
        return None


def _save(file: Path, table: Table, stamp: str) -> None:
    content = io.BytesIO()
    np.savez(content, cells=table.cells, values=table.values, masses=table.masses, stamp=np.array(stamp))
    try:
        for left in file.parent.glob("*.partial"):  # by a process that died; we hold the lock
            left.unlink(missing_ok=True)
        write_atomically(file, content.getvalue())
    except OSError as error:
        logger.info("masses cannot be kept in %s: %s", file.parent, error)
