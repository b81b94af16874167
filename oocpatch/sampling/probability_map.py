"""Masses: the probability in each cell of a map, summed in one pass over it.

The voxels of a map are summed cell by cell in Dask tasks of many cells; a thread has one cell in memory at a time. The
result takes a few bytes per cell and value:

```text
 map            cells                masses
 0 0 | 3 1      cell 0  cell 1       cell   value   mass
 0 2 | 0 0  -->         3 1     -->  0      -       2          (a probability map)
                        0 0          1      -       4
```

Labels have one entry per cell and label, with the number of voxels, so other label probabilities need no second pass.
The masses of a map on disk are stored beside it, for the next sampler and for other processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from oocpatch.sampling.images import LoadedVolume
from oocpatch.sampling.map_cells import Cells
from oocpatch.sampling.subject import as_volume
from oocpatch.storage.paths import LocalPath
from oocpatch.system import folder_lock, usable_cores
from oocpatch.volumes.passes import run_pass
from oocpatch.volumes.volume import Volume

logger = logging.getLogger("oocpatch")

Values = npt.NDArray[Any]
Summary = Callable[[Values], tuple[Values, Values]]
"""Returns the distinct values of some voxels, and the mass of each."""

TASK_BYTES = 128 << 20
"""Bytes of the voxels that one task sums: a fifth of a second or more, so that Dask's own time does not matter."""

MOST_LABELS_COUNTED = 1 << 16
"""Integers of a larger range are sorted rather than counted."""

COUNTED_AT_ONCE = 1 << 17
"""Voxels whose labels are counted at a time."""

MOST_THREADS = 8
"""Threads of a pass: each has a cell in memory, and Zarr's locks leave no work for more."""

FORMAT = 1
"""Version of the stored files."""


def sum_weights(values: Values) -> tuple[Values, Values]:
    """Return the mass of some voxels of a probability map: their sum, in float64, with the unused value 0.

    Raises:
        ValueError: if a voxel is negative, infinite or not a number.

    >>> sum_weights(np.array([0.5, 0.25]))
    (array([0.]), array([0.75]))
    """
    lowest, highest = values.min(), values.max()
    if not (lowest >= 0 and highest < np.inf):
        raise ValueError(
            f"a probability map must hold finite values that are not negative, got {lowest if lowest < 0 else highest}"
        )
    return np.zeros(1), np.array([values.sum(dtype=np.float64)])


def count_labels(values: Values) -> tuple[Values, Values]:
    """Return the labels of some voxels, and the number of voxels of each.

    Raises:
        ValueError: if a voxel is not a number.

    >>> count_labels(np.array([3, -1, 3], np.int8))
    (array([-1,  3], dtype=int8), array([1., 2.]))
    """
    low, high = values.min(), values.max()
    if low == high:
        return values.ravel()[:1].copy(), np.array([float(values.size)])
    if np.isnan(low):
        raise ValueError("a label map must hold numbers, got nan")
    if values.dtype.kind == "f" or int(high) - int(low) >= MOST_LABELS_COUNTED:
        labels, counts = np.unique(values, return_counts=True)
        return labels, counts.astype(np.float64)
    totals = np.zeros(int(high) - int(low) + 1, np.intp)
    flat = values.ravel()
    for start in range(0, len(flat), COUNTED_AT_ONCE):  # bincount takes eight bytes a voxel
        part = flat[start : start + COUNTED_AT_ONCE]
        wide = part.astype(np.intp) if part.dtype.itemsize < 4 else part
        offsets = (wide - wide.dtype.type(low)).astype(np.intp, copy=False)
        totals += np.bincount(offsets, minlength=len(totals))
    present = np.flatnonzero(totals)
    return present.astype(values.dtype) + low, totals[present].astype(np.float64)  # wraps around and back for int8


def measure(volume: Volume, cells: Cells, summarize: Summary, name: str) -> Masses:
    """Sum a map of one channel cell by cell; each thread has one cell in memory.

    Raises:
        ValueError: if `summarize` refuses a voxel; the message names the map and the cell.
    """

    def summarized(numbers: range) -> Masses:
        parts = []
        for number in numbers:
            box = cells[number]
            try:
                values, masses = summarize(volume.read(box)[0])
            except ValueError as error:
                raise ValueError(f"{name}: {error} in the box from {box.start} to {box.stop}") from error
            nonzero = masses > 0
            parts.append(Masses(np.full(int(nonzero.sum()), number), values[nonzero], masses[nonzero]))
        return Masses.joined(parts)

    per_task = max(1, TASK_BYTES // (math.prod(cells.step) * volume.dtype.itemsize))
    tasks = [range(i, min(i + per_task, len(cells))) for i in range(0, len(cells), per_task)]
    threads = min(len(tasks), usable_cores(), MOST_THREADS)
    title, total = f"masses of {name}", len(cells)
    parts = run_pass(summarized, tasks, threads=threads, name=title, unit="cells", size=len, total=total)
    return Masses.joined(list(parts))


@dataclass(frozen=True, slots=True, eq=False)
class Masses:
    """The mass of each value in each cell; entries without mass are left out.

    Attributes:
        cells: `(E,)` int64, numbers of the cells, ascending.
        values: `(E,)`, labels in the map's dtype; zeros for a probability map.
        masses: `(E,)` float64, number of voxels with that label; sum of the probabilities.
    """

    cells: npt.NDArray[np.int64]
    values: npt.NDArray[Any]
    masses: npt.NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Sequence[Masses]) -> Self:
        """Concatenate the masses of consecutive cells."""
        columns = zip(*((part.cells, part.values, part.masses) for part in parts), strict=True)
        return cls(*map(np.concatenate, columns))


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredMap:
    """A map of a subject, as draws use it.

    Attributes:
        cells: voxels that can be the centre of a patch.
        masses: mass of each value in each cell.
        weights: weight of a unit of mass, by value.
        sums: cumulative sums of the weighted masses.
    """

    cells: Cells
    masses: Masses
    weights: Mapping[Any, float]
    sums: npt.NDArray[np.float64]

    @classmethod
    def of(cls, cells: Cells, masses: Masses, weights: Mapping[Any, float]) -> Self:
        """Return a map with its weighted masses."""
        return cls(cells, masses, weights, np.cumsum(masses.masses * _look_up(weights, masses.values)))

    def weights_of(self, values: Values) -> npt.NDArray[np.float64]:
        """Return the weight of a unit of mass for each value."""
        return _look_up(self.weights, values)


def _look_up(weights: Mapping[Any, float], values: Values) -> npt.NDArray[np.float64]:
    distinct, inverse = np.unique(values, return_inverse=True)
    found: npt.NDArray[np.float64] = np.array([weights.get(value, 0.0) for value in distinct.tolist()])
    return found[inverse.ravel()]


class MassesOfMaps:
    """The masses of the maps that a sampler has drawn from, for as long as those maps exist and do not change."""

    def __init__(self) -> None:
        self._measured: weakref.WeakKeyDictionary[Any, tuple[str | None, MeasuredMap]] = weakref.WeakKeyDictionary()
        self._compared: weakref.WeakSet[Any] = weakref.WeakSet()  # in this pass
        self._lock = threading.Lock()

    def begin_pass(self) -> None:
        """Compare each map with what was measured once more, when it is used next."""
        with self._lock:
            self._compared.clear()

    def get(self, source: Volume | LoadedVolume, make: Callable[[Volume], MeasuredMap]) -> MeasuredMap:
        """Return the masses of a map, which one thread at a time measures, at first and when the map has changed."""
        with self._lock:
            content, measured = self._measured.get(source, (None, None))
            if measured is None or source not in self._compared:
                volume = as_volume(source)
                content, before = _content(volume), content
                if measured is None or content != before:
                    measured = make(volume)
                    self._measured[source] = content, measured
                self._compared.add(source)
            return measured

    def __getstate__(self) -> list[tuple[Any, Any]]:
        return list(self._measured.items())

    def __setstate__(self, state: list[tuple[Any, Any]]) -> None:
        self.__init__()  # type: ignore[misc] # another process compares for itself
        self._measured.update(dict(state))


def _content(volume: Volume) -> str | None:
    """Return what tells whether a map has changed: its files, or its values in memory; None where all must be read."""
    source = volume.source
    is_on_disk = source.units is not None and isinstance(source.location, LocalPath)
    return volume.fingerprint if is_on_disk or not source.chunked else None


def stored_masses(volume: Volume, cells: Cells, kind: str, measure: Callable[[], Masses]) -> Masses:
    """Read the masses of a map from a file beside it; they are measured and stored if there is none.

    A lock lets only one of several processes measure. `kind` is that of the masses: of probabilities or of labels.
    """
    if volume.source.files is None:
        return measure()
    root = volume.source.files
    # outside the Zarr hierarchy of the array: in it, another directory would look like a member
    while any((root.parent / name).exists() for name in ("zarr.json", ".zgroup")):
        root = root.parent
    folder = root.with_name(f"{root.name}.oocpatch-masses")
    key = [
        FORMAT,
        kind,
        str(volume.source.location),
        volume.signature,
        volume.axes.order,
        cells.box.start,
        cells.box.stop,
        cells.step,
    ]
    file = folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}.npz"
    with _locked(folder):
        stamp = _stamp(volume.source.files)
        masses = _load(file, stamp)
        if masses is None:
            masses = measure()
            if _stamp(volume.source.files) == stamp:
                _save(file, masses, stamp)
    return masses


def _stamp(files: Path) -> str:
    """Return a digest of names, sizes and times of all files below a directory."""
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
def _locked(folder: Path) -> Iterator[None]:
    """Create a directory and hold a lock on it; without one, work may be done twice."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        logger.info("masses cannot be stored in %s: %s", folder, error)
        yield
        return
    with folder_lock(folder):
        yield


def _load(file: LocalPath, stamp: str) -> Masses | None:
    try:
        with np.load(io.BytesIO(file.read_bytes())) as stored:
            # reading compares the CRC-32 of each array in the archive
            masses = Masses(stored["cells"], stored["values"], stored["masses"])
            return masses if str(stored["stamp"]) == stamp else None
    except Exception:  # noqa: BLE001 - a damaged file counts as absent, whatever it raises
        return None


def _save(file: LocalPath, masses: Masses, stamp: str) -> None:
    content = io.BytesIO()
    np.savez(content, cells=masses.cells, values=masses.values, masses=masses.masses, stamp=np.array(stamp))
    try:
        for left in file.parent.glob("*.partial"):  # of a process that died: this one has the lock
            left.unlink(missing_ok=True)
        file.write_atomic(content.getvalue())
    except OSError as error:
        logger.info("masses cannot be stored in %s: %s", file.parent, error)
