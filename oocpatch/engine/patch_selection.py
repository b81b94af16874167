"""Selection of the patches to compute: all, those with foreground in a mask, or those that meet a box.

Patches of one value are skipped later, when they are read.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.grid import GridAxis, PatchGrid
from oocpatch.volumes.alignment import Placement, align
from oocpatch.volumes.content import MASK, InputStamps
from oocpatch.volumes.volume import Volume

Voxels = npt.NDArray[np.int64]

COUNTED_AT_A_TIME = 1 << 20
"""Voxels of a mask, with the patches over them, that are examined at a time while patches are counted."""


@dataclass(frozen=True)
class Mask:
    """A mask of any resolution over the extent of a volume: patches without a nonzero voxel in it are skipped.

    Attributes:
        volume: the mask, with its axes in the order of the volume's.
        shape: shape of the volume, in voxels.
        placement: where the mask lies; it holds at all indices of looped axes that it lacks.

    >>> mask = Mask.over(Volume(np.zeros((8, 8))), Volume(np.array([[0, 0], [0, 1]])))
    >>> mask.foreground(PatchGrid.of((8, 8), (4, 4), (0, 0)), [range(2), range(2)]).tolist()
    [[False, False], [False, True]]
    """

    volume: Volume
    shape: Ints
    placement: Placement

    @classmethod
    def over(cls, volume: Volume, mask: Volume) -> Mask:
        """Lay a mask over a volume.

        Raises:
            ValueError: if it does not fit.
        """
        aligned, placement = align("mask", mask, volume)
        if aligned.channels > 1:
            raise ValueError(f"mask must have one channel, got {aligned.channels}; select one of them")
        return cls(aligned, volume.shape, placement)

    @property
    def signature(self) -> str:
        """Signature of the mask and, where it is not that of an array without names, its placement."""
        first = len(self.shape) - len(self.volume.shape)
        plain = Placement(tuple(range(first, len(self.shape))), self.shape[first:])
        if self.placement == plain and list(self.volume.axes.order) == sorted(self.volume.axes.order):
            return self.volume.signature
        return f"{self.volume.signature} {self.volume.axes.order} {self.placement}"

    def for_run(self) -> Mask:
        """Return the same mask for one run; see `Volume.for_run`."""
        return replace(self, volume=self.volume.for_run())

    @property
    def voxel_bytes(self) -> float:
        """Bytes per voxel of the volume while a layer is examined: as read, as booleans, and two running counts."""
        covered = [self.shape[b] for b in self.placement.axes if b is not None]
        share = math.prod(self.volume.shape) / math.prod(covered)
        return share * (self.volume.channels * (self.volume.dtype.itemsize + 1) + 1 + 2 * 4)

    def foreground(
        self, grid: PatchGrid, ranges: Sequence[range], stamps: InputStamps | None = None
    ) -> npt.NDArray[np.bool_]:
        """Return whether each patch of a product of ranges has foreground, as an array with one axis per range.

        The part of the mask that is read is added to `stamps`.
        """
        axes, extent = self.placement.axes, self.placement.extent
        spans = [
            (np.array([0]), np.array([1])) if b is None else _spans(grid.axes[b], ranges[b], self.shape[b], n, m)
            for b, n, m in zip(axes, extent, self.volume.shape, strict=True)
        ]
        box = Box(tuple(int(a.min()) for a, _ in spans), tuple(int(b.max()) for _, b in spans))
        tags, values = self.volume.tags(box), self.volume.read(box)
        if stamps is not None:
            stamps.add(MASK, box, values, tags)
        nonzero = ((values != 0) & (values == values)).any(axis=0)  # noqa: PLR0124 - NaN is no foreground
        for axis, (starts, stops) in enumerate(spans):
            # A product of spans has foreground if it does span by span, one axis after the other.
            counts = np.zeros((*nonzero.shape[:axis], nonzero.shape[axis] + 1, *nonzero.shape[axis + 1 :]), np.int32)
            np.cumsum(nonzero, axis=axis, dtype=np.int32, out=counts[(*(slice(None),) * axis, slice(1, None))])
            low, high = (np.take(counts, edge - box.start[axis], axis=axis) for edge in (starts, stops))
            nonzero = high > low
        sizes = [len(r) for r in ranges]
        return np.broadcast_to(nonzero.reshape([n if b in axes else 1 for b, n in enumerate(sizes)]), sizes)


def _spans(axis: GridAxis, indices: range, length: int, extent: int, size: int) -> tuple[Voxels, Voxels]:
    """Return start and stop of the mask's voxels that each patch meets along one axis.

    The mask has `size` voxels over `extent` voxels of the volume, whose length is `length`.
    """
    starts = np.array([min(max(axis.start(i), 0), length - 1) for i in indices], np.int64)
    stops = np.array([max(1, min(axis.start(i) + axis.patch, length)) for i in indices], np.int64)
    first = np.minimum(starts * size // extent, size - 1)  # a mask may end before the volume
    return first, np.maximum(np.minimum(-(-stops * size // extent), size), first + 1)


@dataclass(frozen=True, slots=True)
class Selection:
    """The patches to compute: those with foreground that meet the box.

    Attributes:
        mask: the mask; None: all patches are foreground.
        box: a box in the volume's frame, looped axes included; None: the whole volume.

    >>> grid = PatchGrid.of((8, 8), (4, 4), (0, 0))
    >>> Selection(box=Box((0, 5), (3, 6))).of(grid, [range(2), range(2)])
    [(0, 1)]
    """

    mask: Mask | None = None
    box: Box | None = None

    def __bool__(self) -> bool:
        """Return whether patches may be skipped."""
        return self.mask is not None or self.box is not None

    def of(self, grid: PatchGrid, ranges: Sequence[range], stamps: InputStamps | None = None) -> list[Ints]:
        """Return the patches to compute among a product of ranges of grid indices, in C order.

        The part of the mask that is read is added to `stamps`.
        """
        ranges = [
            self._meeting(axis, number, r) for number, (axis, r) in enumerate(zip(grid.axes, ranges, strict=True))
        ]
        if self.mask is None or not all(ranges):
            return list(itertools.product(*ranges))
        chosen = np.argwhere(self.mask.foreground(grid, ranges, stamps)).tolist()
        return [tuple(r[i] for r, i in zip(ranges, index, strict=True)) for index in chosen]

    def _meeting(self, axis: GridAxis, number: int, indices: range) -> range:
        """Return those of some patches along an axis that meet the box."""
        if self.box is None:
            return indices
        meeting = axis.meeting(self.box.start[number], self.box.stop[number])
        first = max(indices.start, meeting.start)
        return range(first, max(first, min(indices.stop, meeting.stop)))

    def count(self, blocks: BlockGrid) -> npt.NDArray[np.int32]:
        """Return the number of patches to compute of each block, with one axis per axis of the grid.

        Reads the mask, a bounded part of it at a time.

        >>> blocks = BlockGrid.of(PatchGrid.of((8, 8), (4, 4), (0, 0)), (4, 8), (4, 4), 0, crop=False)
        >>> Selection(box=Box((0, 5), (3, 6))).count(blocks).tolist()
        [[1], [0]]
        """
        per_axis = [
            [self._meeting(axis.grid, number, axis.patches(i)) for i in range(axis.count)]
            for number, axis in enumerate(blocks.axes)
        ]
        counts = np.ones(blocks.counts, np.int32)
        for number, ranges in enumerate(per_axis):
            lengths = np.array([len(r) for r in ranges], np.int32)
            counts *= lengths.reshape([-1 if n == number else 1 for n in range(counts.ndim)])
        if self.mask is not None:
            mask = self.mask.for_run()
            with contextlib.closing(mask.volume.source):
                _count_foreground(mask, blocks.grid, per_axis, counts)
        return counts


def _count_foreground(mask: Mask, grid: PatchGrid, per_axis: list[list[range]], counts: npt.NDArray[np.int32]) -> None:
    """Replace the counts of some blocks, by the patches of each along each axis, by those with foreground."""
    filled = [[r for r in ranges if r] for ranges in per_axis]
    if not all(filled):
        return
    spans = [range(ranges[0].start, ranges[-1].stop) for ranges in filled]
    extents = (a.start(s[-1]) + a.patch - a.start(s[0]) for a, s in zip(grid.axes, spans, strict=True))
    density = math.prod(mask.volume.shape) / math.prod(grid.shape)
    longest = max(range(len(per_axis)), key=lambda axis: len(per_axis[axis]))
    if len(per_axis[longest]) > 1 and math.prod(extents) * density + math.prod(map(len, spans)) > COUNTED_AT_A_TIME:
        half = len(per_axis[longest]) // 2
        for part in (slice(None, half), slice(half, None)):
            halved = [r[part] if axis == longest else r for axis, r in enumerate(per_axis)]
            view = counts[tuple(part if axis == longest else slice(None) for axis in range(counts.ndim))]
            _count_foreground(mask, grid, halved, view)
        return
    sums = mask.foreground(grid, spans).astype(np.int32)
    for axis, (ranges, span) in enumerate(zip(per_axis, spans, strict=True)):
        totals = np.insert(np.cumsum(sums, axis=axis, dtype=np.int32), 0, 0, axis=axis)
        starts = np.clip([r.start - span.start for r in ranges], 0, len(span))
        stops = np.clip([r.start + len(r) - span.start for r in ranges], 0, len(span))
        sums = np.take(totals, stops, axis=axis) - np.take(totals, starts, axis=axis)
    counts[...] = sums
