"""Boxes: half-open integer regions in the frame of the unpadded volume, and arithmetic on their lattices.

A box knows nothing of arrays; volumes, outputs and partials turn it into slices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A half-open integer region, `start[a] <= v[a] < stop[a]` on every axis `a`.

    A box may start below zero or end beyond the volume; reading it pads.

    >>> box = Box((0, 10), (4, 16))
    >>> box.shape, box.size
    ((4, 6), 24)
    >>> box & Box((2, 0), (9, 12))
    Box(start=(2, 10), stop=(4, 12))
    """

    start: Ints
    stop: Ints

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop):
            raise ValueError(f"start and stop must have one length, got {self.start} and {self.stop}")

    @classmethod
    def of_shape(cls, shape: Ints) -> Box:
        """Return the box from the origin with the given shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> Ints:
        return tuple(max(0, b - a) for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def empty(self) -> bool:
        return any(b <= a for a, b in zip(self.start, self.stop, strict=True))

    def __and__(self, other: Box) -> Box:
        """Return the common region; empty where there is none."""
        return Box(
            tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True)),
            tuple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True)),
        )

    def __contains__(self, other: Box) -> bool:
        return all(a <= b for a, b in zip(self.start, other.start, strict=True)) and all(
            a >= b for a, b in zip(self.stop, other.stop, strict=True)
        )

    def meets(self, other: Box) -> bool:
        """Return whether two boxes that are not empty have a common voxel."""
        # A loop: `all` of a generator takes twice as long.
        for a, b, c, d in zip(self.start, self.stop, other.start, other.stop, strict=True):
            if b <= c or d <= a:
                return False
        return True

    def slices(self, origin: Ints | None = None) -> tuple[slice, ...]:
        """Return the slices of this box in an array whose first voxel lies at `origin` (default: zero).

        >>> Box((2, 3), (4, 9)).slices((2, 2))
        (slice(0, 2, None), slice(1, 7, None))
        """
        origin = origin or (0,) * len(self.start)
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, origin, strict=True))

    def along(self, axis: int, start: int, stop: int) -> Box:
        """Return this box with another extent on one axis."""
        return Box(
            (*self.start[:axis], start, *self.start[axis + 1 :]),
            (*self.stop[:axis], stop, *self.stop[axis + 1 :]),
        )

    def split(self, step: Ints) -> Iterator[Box]:
        """Cut at the multiples of `step`: the pieces cover the box exactly once, each in one cell of the lattice."""
        ranges = [list(cut(a, b, s)) for a, b, s in zip(self.start, self.stop, step, strict=True)]
        for spans in itertools.product(*ranges):
            yield Box(tuple(a for a, _ in spans), tuple(b for _, b in spans))


def cut(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut `[start, stop)` at the multiples of `step`.

    >>> list(cut(3, 9, 4))
    [(3, 4), (4, 8), (8, 9)]
    """
    a = start
    while a < stop:
        b = min(stop, (a // step + 1) * step)
        yield a, b
        a = b


def unravel(index: int, counts: Ints) -> Ints:
    """Return the position of an index in C order, for any number of cells.

    >>> unravel(5, (2, 3))
    (1, 2)
    """
    position = []
    for count in reversed(counts):
        index, p = divmod(index, count)
        position.append(p)
    return tuple(reversed(position))


def ceil_to(value: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def worthwhile(step: Ints, shape: Ints, voxels: int) -> Ints:
    """Double a step, along the last axes first, until it has so many voxels or covers the shape.

    >>> worthwhile((8, 8), (64, 64), 256)
    (8, 32)
    """
    grown = list(step)
    for axis in reversed(range(len(grown))):
        while grown[axis] < shape[axis] and math.prod(grown) < voxels:
            grown[axis] *= 2
    return tuple(grown)


def selected(selection: tuple[slice, ...], shape: Ints) -> Box:
    """Return the box that slices select of an array of the given shape.

    >>> selected((slice(None), slice(1, 9)), (4, 6))
    Box(start=(0, 1), stop=(4, 6))
    """
    spans = [part.indices(n)[:2] for part, n in zip(selection, shape, strict=True)]
    return Box(tuple(a for a, _ in spans), tuple(b for _, b in spans))


def unit_positions(unit: Sequence[int], selection: tuple[slice, ...]) -> Iterator[Ints]:
    """Return the positions, in write units and in C order, of the units that a selection of voxels meets."""
    return itertools.product(*(range(s.start // n, -(-s.stop // n)) for s, n in zip(selection, unit, strict=True)))
