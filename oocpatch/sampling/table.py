"""Tables of masses, and where they are kept: beside the map, so that its next reader is spared the pass over it.

```text
 labels.zarr/                                the map
 labels.zarr.oocpatch-masses/<key>.npz       its table: cells, values, masses, a stamp of the map's files
```

The key says which map is cut how; the stamp changes when a chunk of the map is written. A table that is damaged, or
whose map has changed, counts as absent. Maps without a directory of their own do without, and so do places that cannot
be written.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
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
from oocpatch.volumes.volume import Volume

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
    parts = [FORMAT, kind, volume.identity, volume.axes.order, cells.box.start, cells.box.stop, cells.step]
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
