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

In `crop` mode a patch claims what is left when half of the overlap is taken from each side that is not at the volume's
border. The claim with the greatest key holds a voxel, so the order of arrival does not matter. Along an axis the key is
the patch's start. A claim that only the border saves from being trimmed yields to all others: in a padded grid other
patches may reach further beyond the border, and those voxels are theirs.

Where outputs lack a context on each side of their patches, a patch is from here on what its output is of, and the
overlap is smaller, too. Only at the border of the volume does the context still count.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from oocpatch.planning.arguments import clipped_chunks
from oocpatch.planning.box import Box, Ints, unit_positions, worthwhile
from oocpatch.planning.grid import PatchGrid
from oocpatch.volumes.volume import DEFAULT_CHUNKS

TILE_BYTES = 1 << 20
"""Bytes of the sums of one tile, where the limit is large: enough to be worth a write."""
LEAST_CHUNK = 64
"""Voxels below which default chunks are not made smaller."""
WRITING = 6
"""Tiles' worth of bytes while one is written: its sums, its values, and chunks on their way through zarr."""

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
        overlap: voxels of the volume of which `crop` takes half from each side; None for the blending modes.
        context: voxels on each side of a patch that the model has seen.

    >>> axis = AxisPlacement(length=29, out=8, numerator=1, denominator=4)
    >>> [axis.start(s, 8, 2) for s in (0, 8, 16, 21)]
    [0, 2, 4, 6]
    """

    length: int
    out: int
    numerator: int = 1
    denominator: int = 1
    overlap: int | None = None
    context: int = 0

    @classmethod
    def fitted(  # noqa: PLR0917 - mapped over the axes
        cls, length: int, out: int | None, size: int, out_size: int, overlap: int | None, context: int
    ) -> AxisPlacement | None:
        """Return the placement that follows from a patch of `size` voxels and its output of `out_size` voxels, or None.

        With `out`, the scale is `out_size / size` where `out` is `length` times that, rounded up or down, else
        `out / length`; then `out_size` must be `size` times that, rounded up or down. Without, `out` is rounded up.

        >>> [AxisPlacement.fitted(*sizes, None, 0).numerator for sizes in ((29, 7, 8, 2), (100, 33, 32, 10))]
        [1, 33]
        """
        if out is None:
            out = -(-length * out_size // size)
        gap = abs(length * out_size - size * out)  # with a scale of out_size / size, or of out / length
        if gap >= max(size, length):
            return None
        numerator, denominator = (out_size, size) if gap < size else (out, length)
        common = math.gcd(numerator, denominator)
        return cls(length, out, numerator // common, denominator // common, overlap, context)

    def fits(self, size: int, out_size: int) -> bool:
        """Return whether `out_size` is `size` scaled, rounded up or down."""
        return abs(out_size * self.denominator - size * self.numerator) < self.denominator

    def start(self, start: int, size: int, out_size: int) -> int:
        """Return the start of a patch's output, which may lie outside of the output as the patch may of the volume."""
        at = self.scaled(start)
        return min(at, self.out - out_size) if start + size < self.length else max(at, self.out - out_size)

    def scaled(self, at: int) -> int:
        """Return a position in the output, rounded half up."""
        return (2 * at * self.numerator + self.denominator) // (2 * self.denominator)


Spans = list[tuple[tuple[bool, int, int], int, int]]


@functools.lru_cache(1 << 12)
def axis_claims(axis: AxisPlacement, start: int, size: int, out_size: int) -> Spans:
    """Return the spans that a patch claims, as key, first voxel and end: at most two adjacent ones, in order.

    >>> axis_claims(AxisPlacement(10, 10, overlap=2), 0, 4, 4)
    [((False, 0, 4), 0, 1), ((True, 0, 4), 1, 3)]
    """
    at = axis.start(start, size, out_size)
    low, high = max(at, 0), min(at + out_size, axis.out)
    if axis.overlap is None:
        return [((True, start, size), low, high)] if low < high else []
    trim = axis.overlap * axis.numerator // (2 * axis.denominator)
    own = max(low, axis.scaled(start) + trim)
    if start + size < axis.length - axis.context:  # up to where the next patch begins: further, if scaling rounds it
        high = min(high, max(at + out_size - trim, axis.scaled(start + size - axis.overlap) + trim))
    spans = [((True, start, size), own, high)]
    if start <= axis.context:
        spans.insert(0, ((False, start, size), low, min(own, high)))
    return [span for span in spans if span[1] < span[2]]


@dataclass(frozen=True, slots=True)
class Lattice:
    """Patches of one size whose starts are the product of one ascending sequence per axis.

    >>> lattice = Lattice.of_grid(PatchGrid.of((10,), (4,), (1,)), (0,))
    >>> lattice.starts, ((3,), (4,)) in lattice, ((4,), (4,)) in lattice
    (((0, 3, 6),), True, False)
    """

    size: Ints
    starts: tuple[Ints, ...]

    @classmethod
    def of_grid(cls, grid: PatchGrid, context: Ints) -> Lattice:
        """Return the patches of a grid, without a context on each side."""
        axes = [axis.grown(-c) for axis, c in zip(grid.axes, context, strict=True)]
        return cls(tuple(a.patch for a in axes), tuple(tuple(a.start(i) for i in range(a.count)) for a in axes))

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

    def covers(self, shape: Ints, context: Ints) -> bool:
        """Return whether every voxel of a volume lies in a patch, but for a context at its border."""
        return all(
            starts[0] <= c and n - c <= starts[-1] + p and all(b - a <= p for a, b in itertools.pairwise(starts))
            for starts, p, n, c in zip(self.starts, self.size, shape, context, strict=True)
        )


@functools.lru_cache(1 << 12)
def _starts_between(axis: AxisPlacement, starts: Ints, size: int, out_size: int, span: tuple[int, int]) -> Ints:
    """Return the starts of the patches that claim a voxel of a span along an axis."""
    low, high = span
    return tuple(s for s in starts if any(a < high and b > low for _, a, b in axis_claims(axis, s, size, out_size)))


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """One output of the model, and the placement of its patches in the array and in tiles, addressed by position.

    Attributes:
        name: name of its array.
        channels: its channels.
        dtype: dtype of its sums and of its array, as numpy calls it.
        axes: placement of its patches, per axis.
        chunks: chunks of the array, spatial.
        tile: shape of a tile, whole chunks, spatial.

    >>> axes = (AxisPlacement(10, 10), AxisPlacement(10, 10))
    >>> head = HeadSpec("prediction", 1, "float32", axes, chunks=(4, 4), tile=(4, 8))
    >>> head.counts, head.box((2, 1)), head.tiles(((3, 0), (2, 4)), (2, 4))
    ((3, 2), Box(start=(8, 8), stop=(10, 10)), [(0, 0), (1, 0)])
    """

    name: str
    channels: int
    dtype: str
    axes: tuple[AxisPlacement, ...]
    chunks: Ints = ()
    tile: Ints = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the head that `dataclasses.asdict` made JSON of."""
        axes = tuple(AxisPlacement(**axis) for axis in value["axes"])
        return cls(value["name"], value["channels"], value["dtype"], axes, tuple(value["chunks"]), tuple(value["tile"]))

    def cut(self, out_size: Ints, chunks: Ints | None, limit: int) -> HeadSpec:
        """Return the head with chunks and tiles: default chunks shrink until a patch takes half of the limit."""
        side = DEFAULT_CHUNKS.get(len(self.shape), 16)
        options = [chunks] if chunks is not None else [(side >> k,) * len(self.shape) for k in range(side.bit_length())]
        for option in options:
            clipped = clipped_chunks(option, self.shape)
            voxels = min(TILE_BYTES, limit // 64) // self.voxel_bytes
            tile = clipped_chunks(worthwhile(clipped, self.shape, voxels), self.shape)
            spec = replace(self, chunks=clipped, tile=tile)
            if sum(memory_needed([spec], {spec.name: out_size})) <= limit // 2 or math.prod(clipped) <= LEAST_CHUNK:
                break
        return spec

    @property
    def blended(self) -> bool:
        """True where patches are added, in float32, and divided by weights."""
        return self.axes[0].overlap is None

    @property
    def voxel_bytes(self) -> int:
        """Bytes of one voxel, all channels."""
        return self.channels * np.dtype(self.dtype).itemsize

    @property
    def tile_bytes(self) -> int:
        """Bytes of the sums of one tile."""
        return self.voxel_bytes * math.prod(self.tile)

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

    def tiles(self, patch: Patch, out_size: Ints) -> list[Ints]:
        """Return the positions of the tiles that a patch claims voxels of."""
        boxes = [box.slices() for _, box in self.claims(patch, out_size)]
        return list(dict.fromkeys(itertools.chain.from_iterable(unit_positions(self.tile, box) for box in boxes)))

    def start(self, patch: Patch, out_size: Ints) -> Ints:
        """Return the start of a patch's output."""
        return tuple(a.start(s, p, m) for a, s, p, m in zip(self.axes, *patch, out_size, strict=True))

    def claims(self, patch: Patch, out_size: Ints) -> list[tuple[Key, Box]]:
        """Return what a patch claims of the output, as disjoint boxes with their keys; one at most where it blends."""
        spans = map(axis_claims, self.axes, *patch, out_size)
        products = (zip(*parts, strict=True) for parts in itertools.product(*spans))
        return [(keys, Box(start, stop)) for keys, start, stop in products]

    def lattice_starts(self, lattice: Lattice, out_size: Ints, position: Ints) -> tuple[Ints, ...]:
        """Return the starts along each axis of the patches of a lattice that lie in a tile: they are the product."""
        box = self.box(position)
        spans = zip(box.start, box.stop, strict=True)
        return tuple(map(_starts_between, self.axes, lattice.starts, lattice.size, out_size, spans))

    def most_tiles(self, out_size: Ints) -> int:
        """Return an upper bound of the number of tiles that a patch with an output of `out_size` voxels lies in."""
        return math.prod(
            min(count, 1 + -(-(m - 1) // t)) for count, m, t in zip(self.counts, out_size, self.tile, strict=True)
        )


def memory_needed(specs: Sequence[HeadSpec], out_size: Mapping[str, Ints]) -> tuple[int, int]:
    """Return the bytes that adding one patch takes: for its tiles, and for its values and the writing of one tile."""
    tiles = sum(s.tile_bytes * s.most_tiles(out_size[s.name]) for s in specs)
    patch = sum((2 * s.voxel_bytes + 4) * math.prod(out_size[s.name]) for s in specs)
    return tiles, patch + WRITING * max(s.tile_bytes for s in specs)
