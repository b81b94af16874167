"""Cells: how the voxels that can be the centre of a patch are cut up, so that drawing one reads little of a map.

A cell is one chunk of the map, or a few small ones, as far as its voxels can be the centre of a patch:

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
"""Voxels that a cell has at least: smaller chunks are taken together."""


@dataclass(frozen=True, slots=True)
class Cells:
    """The multiples of `step` within `box`, numbered in C order; they cover the box exactly once.

    >>> cells = Cells(Box((2,), (9,)), (4,))
    >>> [cells[i] for i in range(len(cells))]
    [Box(start=(2,), stop=(4,)), Box(start=(4,), stop=(8,)), Box(start=(8,), stop=(9,))]
    """

    box: Box
    step: Ints

    @classmethod
    def of_centres(cls, shape: Ints, chunks: Ints, patch_size: Ints) -> Cells:
        """The cells of a map in which patches of a size can be centred; a patch's centre is its corner + size // 2."""
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
        places = np.unravel_index(index, self.counts)
        corner = tuple(
            (a // step + int(i)) * step for a, step, i in zip(self.box.start, self.step, places, strict=True)
        )
        return Box(corner, tuple(c + s for c, s in zip(corner, self.step, strict=True))) & self.box


def pick(sums: npt.NDArray[np.float64], u: float) -> int:
    """The index drawn by `u`, uniform in `[0, 1)`, each with a probability proportional to its mass.

    Exact in float64, and never an index without mass.

    Args:
        sums: cumulative sums of the masses, the last one above zero.
        u: what decides.

    >>> [pick(np.array([0.0, 1.0, 1.0, 4.0, 4.0]), u) for u in (0.0, 0.24, 0.26, 0.999)]
    [1, 1, 3, 3]
    """
    index = np.searchsorted(sums, u * sums[-1], side="right")
    # u * total may round up to the total: then it is the last index with mass
    return int(min(index, np.searchsorted(sums, sums[-1], side="left")))


class RecentCells:
    """The voxels of the cells that were read last, as many as fit; safe to use from several threads.

    Args:
        limit: bytes. The last cell read is kept even if it is larger.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._kept: OrderedDict[tuple[Hashable, int], npt.NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, volume: Hashable, cell: int, read: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """The voxels of a cell of a volume, read if they are not here."""
        key = (volume, cell)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        values = read()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = values
                self._bytes += values.nbytes
            while self._bytes > self._limit and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return values

    def __reduce__(self) -> tuple[type[RecentCells], tuple[int]]:
        return type(self), (self._limit,)  # a process reads its own
