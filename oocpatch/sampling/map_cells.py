"""Cells: a partition of the voxels that can be the centre of a patch, so that a draw reads only a small part of a map.

A cell is the voxels of one chunk of the map, or of several small ones, that can be the centre of a patch:

```text
 map       |  chunk 0  |  chunk 1  |  chunk 2  |  chunk 3  |
 centres       ===================================
 cells         |  0    |     1     |     2     | 3|
```
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.planning.box import Box, Ints, worthwhile

CELL_VOXELS = 1 << 16
"""Voxels of a cell at least: smaller chunks are combined."""


@dataclass(frozen=True, slots=True)
class Cells:
    """A box cut at multiples of `step` into cells, numbered in C order; they cover the box exactly once.

    >>> cells = Cells(Box((2,), (9,)), (4,))
    >>> [cells[i] for i in range(len(cells))]
    [Box(start=(2,), stop=(4,)), Box(start=(4,), stop=(8,)), Box(start=(8,), stop=(9,))]
    """

    box: Box
    step: Ints

    @classmethod
    def of_centres(cls, shape: Ints, chunks: Ints, patch_size: Ints) -> Cells:
        """Return the cells of the centres of patches; the centre of a patch is its corner + size // 2."""
        start = tuple(p // 2 for p in patch_size)
        stop = tuple(s + n - p + 1 for s, n, p in zip(start, shape, patch_size, strict=True))
        return cls(Box(start, stop), worthwhile(chunks, shape, CELL_VOXELS))

    @property
    def counts(self) -> Ints:
        """Number of cells per axis."""
        axes = zip(self.box.start, self.box.stop, self.step, strict=True)
        return tuple((stop - 1) // step - start // step + 1 for start, stop, step in axes)

    def __len__(self) -> int:
        return math.prod(self.counts)

    def __getitem__(self, index: int) -> Box:
        position = np.unravel_index(index, self.counts)
        corner = tuple(
            (a // step + int(i)) * step for a, step, i in zip(self.box.start, self.step, position, strict=True)
        )
        return Box(corner, tuple(c + s for c, s in zip(corner, self.step, strict=True))) & self.box


def pick(sums: npt.NDArray[np.float64], u: float) -> int:
    """Return the index selected by `u` from `[0, 1)`, each with a probability proportional to its mass.

    Masses are given by their cumulative sums. Exact in float64; an index without mass is never selected.

    >>> [pick(np.array([0.0, 1.0, 1.0, 4.0, 4.0]), u) for u in (0.0, 0.24, 0.26, 0.999)]
    [1, 1, 3, 3]
    """
    index = np.searchsorted(sums, u * sums[-1], side="right")
    # u * total may round up to the total, which selects the last index with mass
    return int(min(index, np.searchsorted(sums, sums[-1], side="left")))


class RecentCells:
    """A cache of the voxels of the cells that were read last, of `limit` bytes or one cell; safe in several threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._cache: OrderedDict[tuple[Hashable, int], npt.NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, volume: Hashable, cell: int, read: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Return the voxels of a cell of a volume from the cache, else read them."""
        key = (volume, cell)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        values = read()
        with self._lock:
            if key not in self._cache:
                self._cache[key] = values
                self._bytes += values.nbytes
            while self._bytes > self._limit and len(self._cache) > 1:
                self._bytes -= self._cache.popitem(last=False)[1].nbytes
        return values

    def clear(self) -> None:
        """Forget all cells."""
        with self._lock:
            self._cache.clear()
            self._bytes = 0

    def __reduce__(self) -> tuple[type[RecentCells], tuple[int]]:
        return type(self), (self._limit,)  # each process has a cache of its own
