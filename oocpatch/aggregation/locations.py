"""A set of patch locations that stays small: twelve bytes each, whatever their number, with fast membership.

A patch's start is one integer, its rank in C order among all starts at which a patch of its size has a voxel in the
volume. Ranks are kept in sorted arrays, one per size of patch; those that were just added wait in a set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from oocpatch.planning.box import Ints

Starts = npt.NDArray[np.int64]
NUMBER = np.dtype(np.int32)
BYTES_EACH = 8 + NUMBER.itemsize


class Locations:
    """Patches of a volume, each with the number of the generation it belongs to.

    Args:
        shape: spatial shape of the volume.

    >>> seen = Locations((10, 10))
    >>> seen.add((-1, 3), (4, 4))
    >>> seen.fold(generation=0)
    >>> ((-1, 3), (4, 4)) in seen, ((-1, 3), (4, 5)) in seen, len(seen)
    (True, False, 1)
    """

    def __init__(self, shape: Ints) -> None:
        self._shape = shape
        self.clear()

    def clear(self) -> None:
        """Forget all patches."""
        self._ranks: dict[Ints, Starts] = {}
        self._generations: dict[Ints, npt.NDArray[np.int32]] = {}
        self._new: dict[Ints, set[int]] = {}

    def add(self, start: Ints, size: Ints) -> None:
        """Add one patch that is not there yet, and has a voxel in the volume."""
        self._new.setdefault(size, set()).add(self._rank(start, size))

    def __contains__(self, patch: tuple[Ints, Ints]) -> bool:
        start, size = patch
        rank = self._rank(start, size)
        return rank in self._new.get(size, ()) or self._folded(rank, size)

    def folded(self, start: Ints, size: Ints) -> bool:
        """Whether a patch was there when `fold` was called last."""
        return self._folded(self._rank(start, size), size)

    def _folded(self, rank: int, size: Ints) -> bool:
        ranks = self._ranks.get(size)
        if ranks is None:
            return False
        i = int(np.searchsorted(ranks, rank))
        return i < len(ranks) and int(ranks[i]) == rank

    def __len__(self) -> int:
        return sum(map(len, self._ranks.values())) + sum(map(len, self._new.values()))

    def before(self, generation: int) -> int:
        """Number of folded patches of earlier generations."""
        return sum(int((numbers < generation).sum()) for numbers in self._generations.values())

    @property
    def sizes(self) -> list[Ints]:
        """The sizes of patches there are."""
        return sorted({*self._ranks, *self._new})

    def axis_starts(self, size: Ints) -> tuple[list[int], ...]:
        """The starts that the folded patches of a size have along each axis, in order."""
        starts = self._starts(self._ranks.get(size, np.empty(0, np.int64)), size)
        return tuple(np.unique(column).tolist() for column in starts.T)

    @property
    def has_new(self) -> bool:
        """Whether patches were added since the last `fold`."""
        return bool(self._new)

    def new(self) -> Iterator[tuple[Ints, Starts]]:
        """The patches that were added since the last `fold`: each size with its starts, `(n, axes)`."""
        for size, ranks in self._new.items():
            yield size, self._starts(np.array(sorted(ranks), np.int64), size)

    def fold(self, generation: int) -> None:
        """Sort in what was added since the last time, as patches of a generation."""
        for size, ranks in self._new.items():
            self._extend(np.array(sorted(ranks), np.int64), size, generation)
        self._new.clear()

    def restart(self, generation: int) -> None:
        """Put all folded patches into one generation."""
        for numbers in self._generations.values():
            numbers[:] = generation

    def unfold(self) -> None:
        """Take all patches for new, as if they had just been added."""
        for size, ranks in self._ranks.items():
            self._new.setdefault(size, set()).update(ranks.tolist())
        self._ranks.clear()
        self._generations.clear()

    def extend(self, starts: Starts, size: Ints, generation: int) -> None:
        """Add many patches, `(n, axes)`, that are not there yet."""
        ranks = [self._rank(tuple(map(int, start)), size) for start in starts]
        self._extend(np.array(sorted(ranks), np.int64), size, generation)

    def _extend(self, ranks: Starts, size: Ints, generation: int) -> None:
        old = self._ranks.get(size, np.empty(0, np.int64))
        numbers = self._generations.get(size, np.empty(0, NUMBER))
        at = np.searchsorted(old, ranks)
        self._ranks[size] = np.insert(old, at, ranks)
        self._generations[size] = np.insert(numbers, at, generation)

    def between(self, size: Ints, low: int, high: int) -> tuple[Starts, npt.NDArray[np.int32]]:
        """The folded patches of a size that start in `[low, high)` on the first axis: starts and generations."""
        ranks = self._ranks.get(size)
        if ranks is None:
            return np.empty((0, len(size)), np.int64), np.empty(0, NUMBER)
        plane = math.prod(self._dims(size)[1:])
        ends = [max(0, at + size[0] - 1) * plane for at in (low, high)]
        part = slice(*(int(i) for i in np.searchsorted(ranks, ends)))
        return self._starts(ranks[part], size), self._generations[size][part]

    def _dims(self, size: Ints) -> Ints:
        return tuple(n + p - 1 for n, p in zip(self._shape, size, strict=True))

    def _rank(self, start: Ints, size: Ints) -> int:
        rank = 0
        for s, p, n in zip(start, size, self._shape, strict=True):
            if not -p < s < n:
                return -1  # no voxel in the volume: never there
            rank = rank * (n + p - 1) + s + p - 1
        return rank

    def _starts(self, ranks: Starts, size: Ints) -> Starts:
        parts = np.unravel_index(ranks, self._dims(size))
        return np.asarray(np.stack(parts, axis=-1) - (np.array(size) - 1), np.int64)
