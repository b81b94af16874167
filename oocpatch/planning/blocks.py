"""Blocks: the units of work, their cores, their seams, and the neighbours that exchange these.

The volume is partitioned into cores, boxes of whole write units of the output. A patch belongs to the block whose core
holds its start, so that its values spill towards higher indices only, into the halo:

```text
 axis:   0        core of block 0         |        core of block 1        |  ...
         [patch 0 ]                       |
             [patch 1 ]                   |
                        [patch 5      ====]   halo of block 0: its seam, stored for block 1
                                       [patch 6 ]
                                          |<open>|<------ direct ------>|
```

Per axis, a block's core is split into the voxels that lower neighbours spill into (`open`, rounded up to whole write
units) and the rest (`direct`). The predict task itself writes the box that is direct on every axis to the output; the
remainder of the core waits in the workspace for the seams, as at most one box per axis (`open_boxes`):

```text
            open   direct   halo
           +------+--------+------+
      open | open-0 ...... | 0, 1 |     open-a: sums over a box of `open_boxes`, open on axis a
           +------+--------+------+             and direct on the axes before
    direct |open-1| output | 0, 1 |     output: complete values
           +------+--------+------+     0 or 1 per axis: seam, named by the offset of the neighbour
      halo | 1, 0 |  1, 0  | 1, 1 |             that reads it, 1 where the piece lies in the halo
           +------+--------+------+
```

A core is never shorter than `patch_size - 1`, so that a block has at most `2**d - 1` neighbours on either side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from oocpatch.planning.box import Box, Ints, ceil_to, unravel
from oocpatch.planning.grid import GridAxis, PatchGrid, Scale

Offset = Ints


@dataclass(frozen=True)
class BlockAxis:
    """The cores of one axis, in voxels.

    Attributes:
        size: core length, in whole write units of the output; too small a remainder joins the last core.
        crop: whether patches are cropped (a halo then ends where the next patch decides).
        step: granularity of `open`: a write unit, or more on the swept axis.
        blocks: number of cores; None: it follows from the rest.

    >>> axis = BlockAxis(GridAxis(20, 4, 2), size=8, crop=False, step=4)
    >>> [(axis.core(i), axis.patches(i), axis.open(i), axis.spill(i)) for i in range(axis.count)]
    [((0, 8), range(0, 4), 0, 2), ((8, 16), range(4, 8), 4, 2), ((16, 20), range(8, 9), 4, 0)]
    """

    grid: GridAxis
    size: int
    crop: bool
    step: int
    blocks: int | None = None

    @classmethod
    def of(cls, grid: GridAxis, core: int, unit: int, *, crop: bool, swept: bool) -> BlockAxis:
        """Return the cores of the given length, rounded up to whole write units and to at least `patch - 1`."""
        return cls(grid, core_length(grid, core, unit), crop, sweep_step(grid, unit) if swept else unit)

    @cached_property
    def count(self) -> int:
        if self.blocks is not None:
            return self.blocks
        full, rest = divmod(self.grid.length, self.size)
        return max(1, full + _is_block(rest, self.size, self.grid))

    def core(self, index: int) -> tuple[int, int]:
        start = index * self.size
        return start, self.grid.length if index == self.count - 1 else start + self.size

    def patches(self, index: int) -> range:
        return self.grid.indices(*self.core(index))

    def spill(self, index: int) -> int:
        """Return the length of the halo: the voxels beyond the core that this block's patches write to."""
        stop, patches = self.core(index)[1], self.patches(index)
        if not patches or index == self.count - 1:
            return 0
        last = patches[-1]
        end = self.grid.crop_span(last)[1] if self.crop else self.grid.start(last) + self.grid.patch
        return max(0, min(end, self.grid.length) - stop)

    def open(self, index: int) -> int:
        """Return the length of the part of the core that the lower neighbour's halo covers, in whole steps."""
        if index == 0:
            return 0
        start, stop = self.core(index)
        return min(ceil_to(self.spill(index - 1), self.step), stop - start)


@dataclass(frozen=True, slots=True)
class Block:
    """One block: the box that it owns, and per axis the lengths of its halo and open part, in voxels.

    `index` is its place in the order of execution, C order of `position`.
    """

    index: int
    position: Ints
    core: Box
    halo: Ints
    open: Ints

    @property
    def reach(self) -> Box:
        """The core and its halo: the voxels that the block's patches write to."""
        return Box(self.core.start, tuple(b + h for b, h in zip(self.core.stop, self.halo, strict=True)))

    @property
    def direct(self) -> Box:
        """The part of the core that no seam enters: complete when the block is."""
        return Box(tuple(a + o for a, o in zip(self.core.start, self.open, strict=True)), self.core.stop)

    @property
    def open_boxes(self) -> tuple[Box, ...]:
        """The core without `direct`, as disjoint boxes; box `a` is open on axis `a` and direct on the axes before."""
        boxes, rest = [], self.core
        for axis, direct in enumerate(self.direct.start):
            boxes.append(rest.along(axis, self.core.start[axis], direct))
            rest = rest.along(axis, direct, self.core.stop[axis])
        return tuple(boxes)

    def seam(self, offset: Offset) -> Box:
        """Return the piece of the halo for the neighbour at `offset`: halo where the offset is 1, core elsewhere."""
        return Box(
            tuple(b if e else a for a, b, e in zip(self.core.start, self.core.stop, offset, strict=True)),
            tuple(b + h if e else b for b, h, e in zip(self.core.stop, self.halo, offset, strict=True)),
        )


def offsets(ndim: int) -> list[Offset]:
    """Return the offsets of a block's neighbours, by number of axes and then in C order: the order of summation.

    In `crop` mode a later offset overrides an earlier one, which this order makes right.

    >>> offsets(2)
    [(0, 1), (1, 0), (1, 1)]
    """
    return sorted((e for e in itertools.product((0, 1), repeat=ndim) if any(e)), key=lambda e: (sum(e), e))


@dataclass(frozen=True)
class BlockGrid:
    """All blocks of a run. The cores of all blocks cover the volume exactly once.

    Attributes:
        sweep: the axis along which a block is swept.

    >>> from oocpatch.planning.grid import PatchGrid
    >>> blocks = BlockGrid.of(PatchGrid.of((20,), (4,), (2,)), core=(8,), unit=(4,), sweep=0, crop=False)
    >>> [blocks[i].core.shape for i in range(len(blocks))], blocks[0].halo, blocks[1].open
    ([(8,), (8,), (4,)], (2,), (4,))
    """

    axes: tuple[BlockAxis, ...]
    sweep: int

    @classmethod
    def of(cls, grid: PatchGrid, core: Ints, unit: Ints, sweep: int, *, crop: bool) -> BlockGrid:
        """Return blocks with the given core, rounded up to whole write units and to at least `patch_size - 1`."""
        axes = enumerate(zip(grid.axes, core, unit, strict=True))
        return cls(tuple(BlockAxis.of(g, c, u, crop=crop, swept=a == sweep) for a, (g, c, u) in axes), sweep)

    def scaled(self, scale: tuple[Scale, ...], unit: Ints, *, crop: bool) -> BlockGrid:
        """Return the same blocks in an output at another scale, with write units of its own."""
        axes = enumerate(zip(self.axes, scale, unit, strict=True))
        scaled = tuple(_scaled_axis(axis, s, u, crop=crop, swept=a == self.sweep) for a, (axis, s, u) in axes)
        return BlockGrid(scaled, self.sweep)

    @cached_property
    def grid(self) -> PatchGrid:
        return PatchGrid(tuple(a.grid for a in self.axes))

    @cached_property
    def counts(self) -> Ints:
        return tuple(a.count for a in self.axes)

    @property
    def core_shape(self) -> Ints:
        """Shape of a regular core (the last one on an axis may be longer or shorter), at most the volume's."""
        return tuple(min(a.size, a.grid.length) for a in self.axes)

    @property
    def step(self) -> int:
        """Voxels along the swept axis that are written at a time."""
        return self.axes[self.sweep].step

    @cached_property
    def num_blocks(self) -> int:
        """Number of blocks, without the limit of `len`, `sys.maxsize`."""
        return math.prod(self.counts)

    @property
    def patches_per_block(self) -> int:
        """Number of patches of the block with most of them."""
        return math.prod(map(_most_patches, self.axes))

    @property
    def layer(self) -> int:
        """Number of blocks at one place along the first axis that has several."""
        several = next((a for a, count in enumerate(self.counts) if count > 1), 0)
        return math.prod(self.counts[several + 1 :])

    def block_patches(self) -> npt.NDArray[np.int32]:
        """Return the number of patches of each block."""
        counts = np.ones(1, np.int32)
        for axis in self.axes:
            of_axis = np.array([len(axis.patches(i)) for i in range(axis.count)], np.int32)
            counts = np.multiply.outer(counts, of_axis).reshape(-1)
        return counts

    @property
    def num_open(self) -> int:
        """Number of blocks that seams enter: those with a spilling block before them on some axis."""
        direct = math.prod(1 + sum(a.open(i) == 0 for i in range(1, a.count)) for a in self.axes)
        return self.num_blocks - direct

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> Block:
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"block index must be in [0, {self.num_blocks}), got {index}")
        position = unravel(index, self.counts)
        spans = [a.core(p) for a, p in zip(self.axes, position, strict=True)]
        return Block(
            index,
            position,
            Box(tuple(a for a, _ in spans), tuple(b for _, b in spans)),
            tuple(a.spill(p) for a, p in zip(self.axes, position, strict=True)),
            tuple(a.open(p) for a, p in zip(self.axes, position, strict=True)),
        )

    def patches(self, block: Block) -> tuple[range, ...]:
        return tuple(a.patches(p) for a, p in zip(self.axes, block.position, strict=True))

    def steps(self, box: Box) -> Iterator[Box]:
        """Cut a piece along the swept axis in steps, counted from the piece's start."""
        start, stop = box.start[self.sweep], box.stop[self.sweep]
        for a in range(start, stop, self.step):
            yield box.along(self.sweep, a, min(a + self.step, stop))

    def sources(self, block: Block) -> list[tuple[Offset, Block]]:
        """Return the lower neighbours whose seams enter the block, with their offsets, in the order of summation."""
        sources = []
        for offset in offsets(len(self.axes)):
            position = tuple(p - e for p, e in zip(block.position, offset, strict=True))
            if min(position) >= 0:
                index = 0
                for p, n in zip(position, self.counts, strict=True):
                    index = index * n + p
                neighbour = self[index]
                if not neighbour.seam(offset).empty:
                    sources.append((offset, neighbour))
        return sources


@lru_cache(maxsize=4096)  # block grids that a planner compares share their axes
def _scaled_axis(axis: BlockAxis, scale: Scale, unit: int, *, crop: bool, swept: bool) -> BlockAxis:
    """Return the same cores in an output at another scale."""
    grid = axis.grid.scaled(scale)
    step = sweep_step(grid, unit) if swept else unit
    return BlockAxis(grid, axis.size * scale[0] // scale[1], crop, step, axis.count)


def core_length(axis: GridAxis, requested: int, unit: int) -> int:
    """Return the shortest allowed core length that is not below the requested one; the whole axis if there is one core.

    >>> core_length(GridAxis(100, 16, 8), 20, 8), core_length(GridAxis(100, 16, 8), 80, 8)
    (24, 104)
    """
    length = ceil_to(max(requested, axis.patch - 1, 1), unit)
    full, rest = divmod(axis.length, length)
    return length if full + _is_block(rest, length, axis) > 1 else ceil_to(axis.length, unit)


def _is_block(rest: int, size: int, axis: GridAxis) -> bool:
    """Return whether a remainder is a core of its own instead of a part of its neighbour."""
    return rest >= max(axis.patch - 1, size // 2, 1)


@lru_cache(maxsize=4096)  # block grids that a planner compares share their axes
def _most_patches(axis: BlockAxis) -> int:
    """Return the number of patches of the core with most of them: one of the last two, or of a period of the others.

    >>> _most_patches(BlockAxis(GridAxis(40, 4, 1), size=8, crop=False, step=4))
    3
    """
    count = axis.count
    period = count if axis.grid.even else axis.grid.stride // math.gcd(axis.grid.stride, axis.size)
    return max(len(axis.patches(i)) for i in {*range(min(count, period + 1)), max(0, count - 2), count - 1})


def sweep_step(axis: GridAxis, unit: int) -> int:
    """Return the voxels along the swept axis that are written at a time: one stride in whole write units."""
    return min(ceil_to(axis.stride, unit), ceil_to(axis.length, unit))


class Neighbours:
    """Indices of the blocks that exchange seams, each in the time of a few additions."""

    def __init__(self, blocks: BlockGrid) -> None:
        self._counts = blocks.counts
        self._strides = [1] * len(self._counts)
        for axis in reversed(range(len(self._counts) - 1)):
            self._strides[axis] = self._strides[axis + 1] * self._counts[axis + 1]
        # bytes: one for each position along an axis
        self._spills = [bytes(axis.spill(i) > 0 for i in range(axis.count)) for axis in blocks.axes]

    def sources(self, index: int) -> list[int]:
        """Return the blocks whose seams enter a block."""
        return self._sums(index, -1)[1:]

    def read_by(self, index: int) -> list[int]:
        """Return the blocks whose partials the normalize task of a block reads: itself, and its sources."""
        return self._sums(index, -1)

    def readers(self, index: int) -> list[int]:
        """Return the blocks whose normalize tasks read a block's partials, itself first if it stores sums."""
        readers = self._sums(index, 1)
        return readers if len(self._sums(index, -1)) > 1 else readers[1:]

    def _sums(self, index: int, sign: int) -> list[int]:
        """Return a block and its neighbours on one side, in C order of their offsets."""
        rest, steps = index, []
        for count, stride, spills in zip(self._counts, self._strides, self._spills, strict=True):
            position, rest = divmod(rest, stride)
            other = position if sign > 0 else position - 1
            inside = position + 1 < count if sign > 0 else position > 0
            steps.append((0, sign * stride) if inside and spills[other] else (0,))
        return [index + sum(step) for step in itertools.product(*steps)]


class AllBlocks:
    """Indices of blocks that all depend on each other: none is finished before every one has been read.

    >>> AllBlocks(3).read_by(1), AllBlocks(3).readers(0)
    (range(0, 3), range(0, 3))
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = range(blocks)

    def sources(self, index: int) -> list[int]:
        """Return the blocks other than this one."""
        return [other for other in self._blocks if other != index]

    def read_by(self, index: int) -> range:  # noqa: ARG002 - as of `Neighbours`
        """Return the blocks whose first stage the second stage of a block needs: all."""
        return self._blocks

    def readers(self, index: int) -> range:  # noqa: ARG002 - as of `Neighbours`
        """Return the blocks whose second stage needs the first one of a block: all."""
        return self._blocks
