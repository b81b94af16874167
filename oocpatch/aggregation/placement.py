"""Placement of patches in an output of the volume's scale or another, and in its tiles; lattices of patches.

A model may give more or fewer voxels than its patch has. Along an axis the output has `scale` voxels per voxel of the
volume, and the values of a patch that starts at `s` are placed at `s * scale`, rounded half up. A patch that ends at
the volume's border, or beyond it, also ends there in the output; no other patch reaches beyond the output:

```text
 volume   |0         8         16        24     |      29 voxels
 patches  [=========)          [=========)
                    [=========)     [===========)      the last one ends at the border
 output   |0    2    4    6    |8                      a quarter of the scale: ceil(29 / 4) = 8 voxels
                               |6 - - -8)              so its 2 voxels are the last ones
```

Starts at most a patch apart are placed at most a patch's output apart, so patches without holes between them leave
none in the output. The output is cut into tiles of whole write units.

In `crop` mode a patch claims what is left when `trim` voxels are taken from each side that is not at the volume's
border. The claim with the greatest key holds a voxel, so the order of arrival does not matter. Along an axis the key is
the patch's start. A claim that only the border saves from being trimmed yields to all others: in a padded grid other
patches may reach further beyond the border, and those voxels are theirs.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from oocpatch.planning.box import Box, Ints, unit_positions
from oocpatch.planning.grid import PatchGrid

Patch = tuple[Ints, Ints]
"""Start and size of a patch, in voxels of the volume."""

Key = tuple[tuple[bool, int, int], ...]
"""Per axis: whether the claim also stands away from the border, and the patch's start and size."""


@dataclass(frozen=True, slots=True)
class AxisPlacement:
    """Placement of patches along one axis.

    Attributes:
        length: voxels of the volume.
        out: voxels of the output.
        numerator, denominator: the scale, in voxels of the output per voxel of the volume.
        trim: voxels of the volume that `crop` takes from each side of a patch; None for the blending modes.

    >>> axis = AxisPlacement(length=29, out=8, numerator=1, denominator=4, trim=None)
    >>> [axis.start(s, 8, 2) for s in (0, 8, 16, 21)]
    [0, 2, 4, 6]
    """

    length: int
    out: int
    numerator: int = 1
    denominator: int = 1
    trim: int | None = None

    @classmethod
    def fitted(cls, length: int, out: int | None, size: int, given: int, trim: int | None) -> AxisPlacement | None:
        """Return the placement that follows from a patch of `size` voxels and its output of `given` voxels, or None.

        With `out`, the scale is `given / size` where `out` is `length` times that, rounded up or down, else
        `out / length`; then `given` must be `size` times that, rounded up or down. Without, `out` is rounded up.

        >>> AxisPlacement.fitted(29, 7, 8, 2, None).denominator, AxisPlacement.fitted(100, 33, 32, 10, None).numerator
        (4, 33)
        """
        if out is None:
            out = -(-length * given // size)
        gap = abs(length * given - size * out)  # with a scale of given / size, or of out / length
        if gap >= max(size, length):
            return None
        numerator, denominator = (given, size) if gap < size else (out, length)
        common = math.gcd(numerator, denominator)
        return cls(length, out, numerator // common, denominator // common, trim)

    def fits(self, size: int, given: int) -> bool:
        """Return whether `given` is `size` scaled, rounded up or down."""
        return abs(given * self.denominator - size * self.numerator) < self.denominator

    def start(self, start: int, size: int, given: int) -> int:
        """Return the start of a patch's output, which may lie outside of the output as the patch may of the volume."""
        at = self._scaled(start)
        return min(at, self.out - given) if start + size < self.length else max(at, self.out - given)

    def claims(self, start: int, size: int, given: int) -> list[tuple[tuple[bool, int, int], int, int]]:
        """Return the spans that a patch claims, as key, first voxel and end: at most two adjacent ones, in order.

        >>> AxisPlacement(10, 10, trim=1).claims(0, 4, 4)
        [((False, 0, 4), 0, 1), ((True, 0, 4), 1, 3)]
        """
        at = self.start(start, size, given)
        low, high = max(at, 0), min(at + given, self.out)
        if self.trim is None:
            return [((True, start, size), low, high)] if low < high else []
        own = max(low, self._scaled(start + self.trim))
        if start + size < self.length:
            high = min(high, -(-(start + size - self.trim) * self.numerator // self.denominator))
        spans = [((True, start, size), own, high)]
        if start <= 0:
            spans.insert(0, ((False, start, size), low, min(own, high)))
        return [span for span in spans if span[1] < span[2]]

    def extent(self, start: int, size: int, given: int) -> tuple[int, int]:
        """Return first voxel and end of all that a patch claims; equal where it claims nothing."""
        spans = self.claims(start, size, given)
        return (spans[0][1], spans[-1][2]) if spans else (0, 0)

    def _scaled(self, at: int) -> int:
        """Return a position in the output, rounded half up."""
        return (2 * at * self.numerator + self.denominator) // (2 * self.denominator)


@dataclass(frozen=True, slots=True)
class Lattice:
    """Patches of one size whose starts are the product of one ascending sequence per axis.

    >>> lattice = Lattice.of_grid(PatchGrid.of((10,), (4,), (1,)))
    >>> lattice.starts, ((3,), (4,)) in lattice, ((4,), (4,)) in lattice
    (((0, 3, 6),), True, False)
    """

    size: Ints
    starts: tuple[Ints, ...]

    @classmethod
    def of_grid(cls, grid: PatchGrid) -> Lattice:
        """Return the patches of a grid."""
        return cls(grid.patch_size, tuple(tuple(a.start(i) for i in range(a.count)) for a in grid.axes))

    @classmethod
    def from_json(cls, value: Any) -> Lattice:
        """Return the lattice that `dataclasses.astuple` and JSON made lists of."""
        return cls(tuple(value[0]), tuple(map(tuple, value[1])))

    def __contains__(self, patch: Patch) -> bool:
        start, size = patch
        return size == self.size and all(
            (i := bisect.bisect_left(starts, s)) < len(starts) and starts[i] == s
            for starts, s in zip(self.starts, start, strict=True)
        )

    def covers(self, shape: Ints) -> bool:
        """Return whether every voxel of a volume lies in a patch."""
        return all(
            starts[0] <= 0 and n <= starts[-1] + p and all(b - a <= p for a, b in itertools.pairwise(starts))
            for starts, p, n in zip(self.starts, self.size, shape, strict=True)
        )


@functools.lru_cache(1 << 12)
def _starts_between(axis: AxisPlacement, starts: Ints, size: int, given: int, span: tuple[int, int]) -> Ints:
    """Return the starts of the patches that claim a voxel of a span along an axis."""
    extents = ((start, axis.extent(start, size, given)) for start in starts)
    return tuple(start for start, (a, b) in extents if a < b and a < span[1] and b > span[0])


@dataclass(frozen=True, slots=True)
class Placement:
    """Placement of patches in an output and in its tiles, which go by their positions in the lattice of tiles.

    Attributes:
        axes: the placement along each axis.
        tile: shape of a tile, in voxels of the output.

    >>> place = Placement((AxisPlacement(10, 10), AxisPlacement(10, 10)), tile=(4, 8))
    >>> place.counts, place.box((2, 1)), list(place.tiles(Box((3, 0), (5, 4))))
    ((3, 2), Box(start=(8, 8), stop=(10, 10)), [(0, 0), (1, 0)])
    """

    axes: tuple[AxisPlacement, ...]
    tile: Ints

    @property
    def shape(self) -> Ints:
        """Spatial shape of the output."""
        return tuple(a.out for a in self.axes)

    @property
    def counts(self) -> Ints:
        """Number of tiles per axis."""
        return tuple(-(-a.out // t) for a, t in zip(self.axes, self.tile, strict=True))

    def box(self, position: Ints) -> Box:
        """Return the box of a tile."""
        start = tuple(i * t for i, t in zip(position, self.tile, strict=True))
        return Box(start, tuple(min(a + t, n) for a, t, n in zip(start, self.tile, self.shape, strict=True)))

    def tiles(self, box: Box) -> Iterator[Ints]:
        """Yield the positions of the tiles that a box lies in, in order."""
        return iter(()) if box.empty else unit_positions(self.tile, box.slices())

    def start(self, patch: Patch, given: Ints) -> Ints:
        """Return the start of a patch's output."""
        return tuple(a.start(s, p, m) for a, s, p, m in zip(self.axes, *patch, given, strict=True))

    def claims(self, patch: Patch, given: Ints) -> list[tuple[Key, Box]]:
        """Return what a patch claims of the output, as disjoint boxes with their keys."""
        spans = (a.claims(s, p, m) for a, s, p, m in zip(self.axes, *patch, given, strict=True))
        return [
            (tuple(key for key, _, _ in parts), Box(tuple(a for _, a, _ in parts), tuple(b for _, _, b in parts)))
            for parts in itertools.product(*spans)
        ]

    def extent(self, patch: Patch, given: Ints) -> Box:
        """Return the box of all that a patch claims."""
        spans = [a.extent(s, p, m) for a, s, p, m in zip(self.axes, *patch, given, strict=True)]
        return Box(tuple(a for a, _ in spans), tuple(b for _, b in spans))

    def lattice_starts(self, lattice: Lattice, given: Ints, position: Ints) -> tuple[Ints, ...]:
        """Return the starts along each axis of the patches of a lattice that lie in a tile: they are the product."""
        box = self.box(position)
        return tuple(
            map(_starts_between, self.axes, lattice.starts, lattice.size, given, zip(box.start, box.stop, strict=True))
        )

    def most_tiles(self, given: Ints) -> int:
        """Return an upper bound of the number of tiles that a patch with an output of `given` voxels lies in."""
        return math.prod(
            min(count, 1 + -(-(m - 1) // t)) for count, m, t in zip(self.counts, given, self.tile, strict=True)
        )
