"""The grid of patches: arithmetic, never a list of patches.

Per axis, patch starts are `0, stride, 2 * stride, ...` and a last one moved back so that it ends at the border; the
grid is the product of its axes, in C order:

```text
 volume      |-------------------------------------|
 patch 0     [==========]
 patch 1           [==========]
 patch 2                 [==========]
 last                              . [==========]   moved back to end at the border
```

With a padded frame, the frame grows by `overlap // 2` on each side and the first start is negative:

```text
 frame    ...|-------------------------------------|...
 patch 0  [==========]
 patch 1        [==========]
 last                                     [==========]
```

Starts can be spaced evenly instead, as nnU-Net spaces them: as many patches, `round(i * step)` apart, where no step is
longer than the stride. A volume smaller than a patch then lies in the middle of it:

```text
 patch 0     [==========]
 patch 1            [==========]
 last                      [==========]        the last one ends at the border by itself
```

A volume smaller than a patch has one patch, at 0, that reaches beyond the border. An output at another scale has a grid
of its own, with the same patches: each start and size is multiplied by the scale. Starts can snap to multiples so that
the products are whole voxels; the last patch then reaches beyond the border:

```text
 volume      |-------------------|        10 voxels, patches of 4 whose starts are multiples of 4
 patches     [=======|=======|=======]    starts 0, 4, 8: the last one ends at 12
 scale 1/4   |  0|  1|  2|                3 voxels, patches of 1 at 0, 1, 2
```
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from oocpatch.planning.box import Box, Ints, ceil_to, unravel
from oocpatch.planning.html_parts import image_of

Scale = tuple[int, int]
"""Voxels of an output per voxel of the volume, as a reduced fraction: numerator, denominator."""


@dataclass(frozen=True)
class GridAxis:
    """The patch starts of one axis, in voxels of the unpadded volume.

    Attributes:
        padded: whether the frame grows by `overlap // 2` on each side.
        snap: divisor of all starts, and of the stride.
        begin: start of the first patch; None: it follows from the rest.
        end: start of the last patch; None: it follows from the rest.
        even: whether starts are spaced evenly, so that adjacent patches share at least `overlap` voxels.

    >>> axis = GridAxis(length=10, patch=4, overlap=2)
    >>> [axis.start(i) for i in range(axis.count)]
    [0, 2, 4, 6]
    >>> axis = GridAxis(length=11, patch=4, overlap=1, even=True)
    >>> [axis.start(i) for i in range(axis.count)]
    [0, 2, 5, 7]
    """

    length: int
    patch: int
    overlap: int = 0
    padded: bool = False
    snap: int = 1
    begin: int | None = None
    end: int | None = None
    even: bool = False

    @property
    def stride(self) -> int:
        """The distance of adjacent starts; the most that it is where they are spaced evenly."""
        return self.patch - self.overlap

    @cached_property
    def first(self) -> int:
        """Start of the first patch; negative in a padded frame."""
        if self.begin is not None:
            return self.begin
        if self.even:
            return -(max(0, self.patch - self.length) // 2)
        return -ceil_to(self.overlap // 2, self.snap) if self.padded else 0

    @cached_property
    def last(self) -> int:
        """Start of the last patch."""
        if self.end is not None:
            return self.end
        return max(self.first, ceil_to(self.length - self.first - self.patch, self.snap))

    @cached_property
    def count(self) -> int:
        return 1 + -(-(self.last - self.first) // self.stride)

    def start(self, index: int) -> int:
        if self.even:  # the floats that nnU-Net rounds, half to even, so that ties fall as there
            return self.first + round((self.last - self.first) / max(1, self.count - 1) * index)
        return min(self.first + index * self.stride, self.last)

    def scaled(self, scale: Scale) -> GridAxis:
        """Return the same patches in an output with `scale[0] / scale[1]` times as many voxels.

        Raises:
            ValueError: when a patch does not begin and end at whole voxels of that output.

        >>> axis = GridAxis(10, 4, 2, snap=2).scaled((1, 2))
        >>> axis.length, [axis.start(i) for i in range(axis.count)]
        (5, [0, 1, 2, 3])
        """
        times, per = scale
        if scale == (1, 1):
            return self
        if self.even:
            raise ValueError(f"patch_starts 'even' needs outputs of the volume's scale, got one of {times}/{per}")
        length = -(-self.length * times // per)
        sizes = (self.patch, self.overlap, self.first, self.last)
        if any(n * times % per for n in sizes):
            raise ValueError(f"patches {sizes} do not have whole voxels at a scale of {times}/{per}")
        patch, overlap, first, last = (n * times // per for n in sizes)
        return GridAxis(length, patch, overlap, begin=first, end=last)

    def grown(self, context: int) -> GridAxis:
        """Return the same patches, larger by `context` voxels on each side."""
        if not context:
            return self
        patch, overlap = self.patch + 2 * context, self.overlap + 2 * context
        return GridAxis(
            self.length, patch, overlap, begin=self.first - context, end=self.last - context, even=self.even
        )

    def within(self, start: int, stop: int) -> GridAxis:
        """Return the evenly spaced patches that cover a span of the volume, and no more of it than they must.

        >>> axis = GridAxis(30, 4, 2, even=True).within(10, 19)
        >>> [axis.start(i) for i in range(axis.count)]
        [10, 12, 13, 15]
        """
        begin = start - max(0, self.patch - (stop - start)) // 2
        return replace(self, begin=begin, end=max(begin, stop - self.patch))

    def indices(self, start: int, stop: int) -> range:
        """Return the patches that the span `[start, stop)` of the volume owns: those that start in it.

        A patch that starts before the volume belongs to the span with voxel 0.
        """
        return range(0 if start <= 0 else self._index_from(start), self._index_from(stop))

    def meeting(self, start: int, stop: int) -> range:
        """Return the patches that have a voxel in the span `[start, stop)` of the volume.

        >>> GridAxis(10, 4, 2).meeting(4, 5)
        range(1, 3)
        """
        return range(self._index_from(start - self.patch + 1), self._index_from(stop))

    def _index_from(self, value: int) -> int:
        """Return the index of the first patch that starts at or after `value`, else `count`."""
        if value > self.last:
            return self.count
        if self.even:
            return bisect_left(range(self.count), value, key=self.start)
        return min(max(0, -(-(value - self.first) // self.stride)), self.count - 1)

    def crop_span(self, index: int) -> tuple[int, int]:
        """Return the span of voxels that patch `index` decides in `crop` mode; all spans together are a partition.

        `overlap // 2` voxels are cropped from each side that is not at the volume's border, and a later patch wins:

        ```text
         patch 0     [=========.]
         patch 1            [.=======.]
         last                      [.=========]
        ```

        >>> axis = GridAxis(10, 4, 2)
        >>> [axis.crop_span(i) for i in range(4)]
        [(0, 3), (3, 5), (5, 7), (7, 10)]
        """
        last = index == self.count - 1
        start = self._crop_start(index)
        return start, self.length if last else min(self._crop_start(index + 1), self.length)

    def _crop_start(self, index: int) -> int:
        return 0 if index == 0 else max(0, self.start(index) + self.overlap // 2)


@dataclass(frozen=True, slots=True)
class PatchLocation:
    """The place of a patch in the volume.

    Attributes:
        index: the corner with the lowest coordinates, in voxels of the unpadded volume.
        subject_index: position of the patch's subject, when there are several.
    """

    index: Ints
    size: Ints
    subject_index: int | None = None

    @property
    def index_ini(self) -> Ints:
        return self.index

    @property
    def index_fin(self) -> Ints:
        """End of the patch, one voxel beyond its last."""
        return tuple(i + s for i, s in zip(self.index, self.size, strict=True))

    @property
    def box(self) -> Box:
        return Box(self.index_ini, self.index_fin)

    def to_slices(self) -> tuple[slice, ...]:
        """Return the spatial slices of the patch in the volume."""
        return self.box.slices()

    def scaled(self, factor: float | tuple[float, ...]) -> PatchLocation:
        """Return the location in an output with `factor` times as many voxels per axis.

        Corners are scaled and rounded, so that patches that touch still touch.

        >>> PatchLocation((3, 8), (4, 4)).scaled(0.5).index_fin
        (4, 6)
        """
        factors = factor if isinstance(factor, tuple) else (factor,) * len(self.index)
        start = tuple(_half_up(i * f) for i, f in zip(self.index_ini, factors, strict=True))
        stop = tuple(_half_up(i * f) for i, f in zip(self.index_fin, factors, strict=True))
        return PatchLocation(start, tuple(b - a for a, b in zip(start, stop, strict=True)), self.subject_index)


def _half_up(value: float) -> int:
    return math.floor(value + 0.5)


@dataclass(frozen=True)
class PatchGrid:
    """The product of its axes: `len`, `[i]` and iteration are arithmetic, whatever the number of patches.

    >>> grid = PatchGrid.of((10, 20, 30), (5, 20, 20), (2, 4, 6))
    >>> len(grid), grid[0].index, grid[-1].index
    (6, (0, 0, 0), (5, 0, 10))
    """

    axes: tuple[GridAxis, ...]

    @classmethod
    def of(cls, shape: Ints, patch_size: Ints, patch_overlap: Ints, *, padded: bool = False) -> PatchGrid:
        """Return the grid of a volume of spatial `shape`; sizes in voxels, one per axis.

        Raises:
            ValueError: when a size is not positive, or an overlap is not in `[0, patch_size)`.
        """
        if not len(shape) == len(patch_size) == len(patch_overlap):
            raise ValueError(
                f"patch_size and patch_overlap need one value per spatial axis, got {patch_size} and "
                f"{patch_overlap} for a volume of shape {shape}"
            )
        if any(n < 1 for n in shape):
            raise ValueError(f"the volume must have at least one voxel on every axis, got shape {shape}")
        if any(p < 1 for p in patch_size):
            raise ValueError(f"patch_size must be positive on every axis, got {patch_size}")
        if any(o < 0 for o in patch_overlap):
            raise ValueError(f"patch_overlap must not be negative, got {patch_overlap}")
        if any(o >= p for o, p in zip(patch_overlap, patch_size, strict=True)):
            raise ValueError(
                f"patch_overlap must be smaller than patch_size on every axis, got {patch_overlap} and {patch_size}"
            )
        return cls(tuple(GridAxis(n, p, o, padded) for n, p, o in zip(shape, patch_size, patch_overlap, strict=True)))

    def _repr_html_(self) -> str:
        from oocpatch.planning.svg import draw_grid  # noqa: PLC0415 - drawings are made of grids

        return image_of(draw_grid(self), "patches of the grid")

    @property
    def shape(self) -> Ints:
        """Spatial shape of the volume."""
        return tuple(a.length for a in self.axes)

    @property
    def patch_size(self) -> Ints:
        return tuple(a.patch for a in self.axes)

    @cached_property
    def counts(self) -> Ints:
        return tuple(a.count for a in self.axes)

    @cached_property
    def num_patches(self) -> int:
        """Number of patches, without the limit of `len`, `sys.maxsize`."""
        return math.prod(self.counts)

    def box(self, indices: Ints) -> Box:
        """Return the box of the patch with the given index on each axis."""
        start = tuple(a.start(i) for a, i in zip(self.axes, indices, strict=True))
        return Box(start, tuple(s + a.patch for a, s in zip(self.axes, start, strict=True)))

    def crop_box(self, indices: Ints) -> Box:
        """Return the voxels that the patch with the given index on each axis decides in `crop` mode."""
        spans = [a.crop_span(i) for a, i in zip(self.axes, indices, strict=True)]
        return Box(tuple(a for a, _ in spans), tuple(b for _, b in spans))

    def __len__(self) -> int:
        return self.num_patches

    def __getitem__(self, index: int) -> PatchLocation:
        total = self.num_patches
        if not -total <= index < total:
            raise IndexError(f"patch index must be in [-{total}, {total}), got {index}")
        return PatchLocation(self.box(unravel(index % total, self.counts)).start, self.patch_size)

    def __iter__(self) -> Iterator[PatchLocation]:
        for corner in itertools.product(*([a.start(i) for i in range(a.count)] for a in self.axes)):
            yield PatchLocation(corner, self.patch_size)


def chunk_span(start: int, stop: int, chunk: int, length: int) -> int:
    """Return the voxels that are decoded to read `[start, stop)` of an axis of `length` voxels in chunks of `chunk`.

    >>> chunk_span(5, 9, 4, 10)
    6
    """
    start, stop = max(0, start), min(stop, length)
    return 0 if stop <= start else min(ceil_to(stop, chunk), length) - start // chunk * chunk
