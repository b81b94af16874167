"""Where the patches of a volume lie in an output of its own scale or another, and in which tiles.

A model may give more or fewer voxels than its patch has. Along an axis, the output has `scale` voxels per voxel of the
volume, and what a patch starting at `s` gives is placed at `s * scale`, rounded half up. A patch that ends at the
volume's border, or beyond, ends there in the output, too; no other reaches beyond the output:

```text
 volume   |0         8         16        24     |      29 voxels
 patches  [=========)          [=========)
                    [=========)     [===========)      the last one ends at the border
 output   |0    2    4    6    |8                      a quarter of the scale: ceil(29 / 4) = 8 voxels
                               |6 - - -8)              so its 2 voxels are the last ones
```

Starts that lie at most a patch apart are placed at most a patch's output apart, so that patches without holes between
them leave none. The output is cut into tiles of whole write units, a lattice in C order.

In `crop` mode a patch claims what is left when `trim` voxels are taken from each side that is not at the volume's
border. Of several claims on a voxel the one with the greatest key holds it, so the order of arrival is of no matter.
Along an axis, the key is the patch's start. A claim that only the border saves from being trimmed comes after all
others: in a padded grid other patches may reach further beyond the border, and then those voxels are theirs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from oocpatch.planning.box import Box, Ints
from oocpatch.planning.grid import GridAxis, PatchGrid

Key = tuple[tuple[bool, int, int], ...]
"""Per axis: whether the claim would stand away from the border, and the patch's start and size."""


@dataclass(frozen=True, slots=True)
class AxisPlacement:
    """Where patches lie in an output, along one axis.

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
        """The placement that a patch of `size` voxels and its output of `given` voxels show; None: there is none.

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
        """Whether `given` is `size` scaled, rounded up or down."""
        return abs(given * self.denominator - size * self.numerator) < self.denominator

    def start(self, start: int, size: int, given: int) -> int:
        """Where the output of a patch starts; it may start below zero or end beyond the output, as the patch does."""
        at = self._scaled(start)
        return min(at, self.out - given) if start + size < self.length else max(at, self.out - given)

    def claims(self, start: int, size: int, given: int) -> list[tuple[tuple[bool, int, int], int, int]]:
        """What a patch claims of the output: key, first voxel and end. At most two adjacent spans, in order.

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
        """First voxel and end of all that a patch claims; equal where it claims nothing."""
        spans = self.claims(start, size, given)
        return (spans[0][1], spans[-1][2]) if spans else (0, 0)

    def _scaled(self, at: int) -> int:
        """A position in the output, rounded half up."""
        return (2 * at * self.numerator + self.denominator) // (2 * self.denominator)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where patches lie in an output, and in which of its tiles. Tiles are numbered in C order.

    Attributes:
        axes: the placement along each axis.
        tile: shape of a tile, in voxels of the output.

    >>> place = Placement((AxisPlacement(10, 10), AxisPlacement(10, 10)), tile=(4, 8))
    >>> place.num_tiles, place.box(5), list(place.touched(Box((3, 0), (5, 4))))
    (6, Box(start=(8, 8), stop=(10, 10)), [0, 2])
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

    @property
    def num_tiles(self) -> int:
        return math.prod(self.counts)

    def box(self, index: int) -> Box:
        """The box of a tile."""
        corner = []
        for count, tile in zip(reversed(self.counts), reversed(self.tile), strict=True):
            index, i = divmod(index, count)
            corner.append(i * tile)
        start = tuple(reversed(corner))
        return Box(start, tuple(min(a + t, n) for a, t, n in zip(start, self.tile, self.shape, strict=True)))

    def touched(self, box: Box) -> Iterator[int]:
        """The tiles that a box lies in, in order."""
        if box.empty:
            return
        weights = [math.prod(self.counts[axis + 1 :]) for axis in range(len(self.counts))]
        ranges = [
            [i * w for i in range(a // t, -(-b // t))]
            for a, b, t, w in zip(box.start, box.stop, self.tile, weights, strict=True)
        ]
        yield from map(sum, itertools.product(*ranges))

    def fits(self, size: Ints, given: Ints) -> bool:
        """Whether an output of `given` voxels is what a patch of `size` voxels should give."""
        return all(a.fits(p, m) for a, p, m in zip(self.axes, size, given, strict=True))

    def start(self, start: Ints, size: Ints, given: Ints) -> Ints:
        """Where the output of a patch starts."""
        return tuple(a.start(s, p, m) for a, s, p, m in zip(self.axes, start, size, given, strict=True))

    def claims(self, start: Ints, size: Ints, given: Ints) -> list[tuple[Key, Box]]:
        """What a patch claims of the output, as disjoint boxes with their keys."""
        spans = (a.claims(s, p, m) for a, s, p, m in zip(self.axes, start, size, given, strict=True))
        return [
            (tuple(key for key, _, _ in parts), Box(tuple(a for _, a, _ in parts), tuple(b for _, _, b in parts)))
            for parts in itertools.product(*spans)
        ]

    def extent(self, start: Ints, size: Ints, given: Ints) -> Box:
        """The box of all that a patch claims."""
        spans = [a.extent(s, p, m) for a, s, p, m in zip(self.axes, start, size, given, strict=True)]
        return Box(tuple(a for a, _ in spans), tuple(b for _, b in spans))

    def most_tiles(self, given: Ints) -> int:
        """No patch with an output of `given` voxels touches more tiles than this."""
        return math.prod(
            min(count, 1 + -(-(m - 1) // t)) for count, m, t in zip(self.counts, given, self.tile, strict=True)
        )


class TiledGrid:
    """The patches of a grid by the tiles of an output that they touch: arithmetic along each axis.

    Args:
        grid: the grid.
        placement: where its patches lie.
        given: voxels per axis of what a patch gives.

    >>> place = Placement((AxisPlacement(10, 10),), tile=(4,))
    >>> tiled = TiledGrid(PatchGrid.of((10,), (4,), (2,)), place, (4,))
    >>> [tiled.count(i) for i in range(3)], tiled.starts(2)
    ([2, 3, 1], ([6],))
    """

    def __init__(self, grid: PatchGrid, placement: Placement, given: Ints) -> None:
        self.given = given
        self.grid = grid
        self._counts = placement.counts
        self._starts: list[list[list[int]]] = []
        for axis, place, tile, m in zip(grid.axes, placement.axes, placement.tile, given, strict=True):
            starts: list[list[int]] = [[] for _ in range(-(-place.out // tile))]
            for i in range(axis.count):
                low, high = place.extent(axis.start(i), axis.patch, m)
                for t in range(low // tile, -(-high // tile) if high > low else 0):
                    starts[t].append(axis.start(i))
            self._starts.append(starts)

    def starts(self, tile: int) -> tuple[list[int], ...]:
        """Per axis, the starts of the patches that touch a tile; the patches are their product."""
        found = []
        for count, starts in zip(reversed(self._counts), reversed(self._starts), strict=True):
            tile, i = divmod(tile, count)
            found.append(starts[i])
        return tuple(reversed(found))

    def count(self, tile: int) -> int:
        """Number of patches that touch a tile."""
        return math.prod(map(len, self.starts(tile)))


def on_grid(grid: PatchGrid, start: Ints, size: Ints) -> bool:
    """Whether a patch is one of a grid's.

    >>> grid = PatchGrid.of((10,), (4,), (1,))
    >>> [s for s in range(-3, 10) if on_grid(grid, (s,), (4,))]
    [0, 3, 6]
    """
    return size == grid.patch_size and all(_on_axis(a, s) for a, s in zip(grid.axes, start, strict=True))


def _on_axis(axis: GridAxis, start: int) -> bool:
    return start == axis.last or (axis.first <= start < axis.last and (start - axis.first) % axis.stride == 0)


def grid_through(shape: Ints, size: Ints, starts: tuple[list[int], ...]) -> PatchGrid | None:
    """The grid whose patches have exactly these starts along each axis, ascending; None when there is none.

    >>> grid_through((10,), (4,), ([-1, 1, 3, 5, 7],)).axes[0] == GridAxis(10, 4, 2, padded=True)
    True
    """
    for padded in (False, True):
        axes = [_axis_through(n, p, found, padded=padded) for n, p, found in zip(shape, size, starts, strict=True)]
        if all(axes):
            return PatchGrid(tuple(a for a in axes if a is not None))
    return None


def _axis_through(length: int, patch: int, starts: list[int], *, padded: bool) -> GridAxis | None:
    # A last patch that was moved back may hide the stride; a padded frame shows half of the overlap as well.
    shown = [patch - (starts[1] - starts[0])] if len(starts) > 1 else [0]
    shown += [-2 * starts[0], 1 - 2 * starts[0]] if padded else []
    for overlap in shown:
        if 0 <= overlap < patch:
            axis = GridAxis(length, patch, overlap, padded)
            if [axis.start(i) for i in range(axis.count)] == starts:
                return axis
    return None
