"""The sweep of a block: the order in which its layers of patches are read, computed and written.

```text
   sweep ->       final, written  |    sums ring    | not yet read
                 =================|  [ layer n  ]   |
                                  |     [ layer n+1 ]
```

A layer holds the patches of a block that share one start on the swept axis. Layers are taken in groups of just enough
patches to fill a batch. Once a group is computed, the voxels before the next one's start are final and leave the ring:

```text
 group 0     [=====]
               [=====]
 group 1         [=====]
                   [=====]
 final       |---|               the voxels before group 1 starts, once group 0 is computed
```

The second half of the module sums and bounds the blocks of each axis, for the projections of memory and traffic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from oocpatch.planning.blocks import BlockAxis, BlockGrid
from oocpatch.planning.box import Ints, ceil_to
from oocpatch.planning.grid import GridAxis, chunk_span


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive layers that are computed together.

    Attributes:
        layers: grid indices of the layers.
        start, stop: span of the group's patches on the swept axis.
        read_stop: end of the planes that the group needs; `stop`, or beyond it up to a chunk border of the input.
    """

    layers: range
    start: int
    stop: int
    read_stop: int


def groups(axis: GridAxis, layers: range, layers_per_group: int, chunk: int, end: int | None = None) -> list[Group]:
    """Return the groups of a block's layers, in order. Reads end at multiples of `chunk` voxels.

    The layers may be some of the block's, whose last one then ends at `end`.

    >>> [g.read_stop for g in groups(GridAxis(10, 4, 2), range(0, 4), 1, 3)]
    [6, 6, 9, 10]
    """
    if not layers:
        return []
    schedule = []
    reach_stop = axis.start(layers[-1]) + axis.patch if end is None else end
    for i in range(0, len(layers), layers_per_group):
        members = layers[i : i + layers_per_group]
        stop = axis.start(members[-1]) + axis.patch
        # Beyond the border there are no chunks: padding is read to the voxel.
        aligned = max(stop, min(ceil_to(stop, chunk), reach_stop, max(axis.length, stop)))
        schedule.append(Group(members, axis.start(members[0]), stop, aligned))
    return schedule


def batches(patches: int, most: int, lanes: int) -> list[range]:
    """Return the batches of a group: of `most` patches but the last, or where calls run side by side, of even sizes.

    The calls of `lanes` then end at the same time.

    >>> batches(5, 4, 1), batches(5, 4, 2), batches(1, 4, 2)
    ([range(0, 4), range(4, 5)], [range(0, 3), range(3, 5)], [range(0, 1)])
    """
    if lanes == 1:
        return [range(i, min(i + most, patches)) for i in range(0, patches, most)]
    count = min(patches, lanes * -(-patches // (lanes * most)))
    size, larger = divmod(patches, max(1, count))
    return [range(i * size + min(i, larger), (i + 1) * size + min(i + 1, larger)) for i in range(count)]


@lru_cache(maxsize=4096)
def capacity(axis: GridAxis, layers: range, layers_per_group: int, chunk: int, *, prefetch: bool) -> tuple[int, int]:
    """Return the planes of the input ring and of the sums ring of a block, `(input, sums)`.

    With `prefetch`, the input of the next group is read while the current one is computed. Of many groups, one period
    of the pattern that strides and chunks make is examined, and the last ones; all where starts are spaced evenly.

    >>> capacity(GridAxis(10, 4, 2), range(0, 4), 1, 1, prefetch=True)
    (6, 4)
    """
    reads, sums = 1, 1
    end = axis.start(layers[-1]) + axis.patch if layers else 0
    period = math.lcm(axis.stride, chunk) // axis.stride
    for part in [layers] if axis.even else _excerpts(layers, layers_per_group, period):
        schedule = groups(axis, part, layers_per_group, chunk, end)
        for i, group in enumerate(schedule):
            following = schedule[min(i + prefetch, len(schedule) - 1)]
            reads = max(reads, following.read_stop - group.start)
            sums = max(sums, group.stop - group.start)
    return reads, sums


def _excerpts(layers: range, layers_per_group: int, period: int) -> list[range]:
    """Return all layers; of many, the first period of whole groups and the last layers."""
    head = (min(period, 512) + 2) * layers_per_group
    if len(layers) <= 2 * head:
        return [layers]
    tail = len(layers) // layers_per_group * layers_per_group - 2 * layers_per_group
    return [layers[:head], layers[tail:]]


EXAMINED_BLOCKS = 64
"""Blocks per axis that a projection examines one by one; more of them repeat and are extrapolated."""


@dataclass(frozen=True, slots=True)
class Span:
    """Largest sizes of some blocks along one axis, in voxels: of the first block, the last one, or all between.

    Attributes:
        members: grid indices of the patches of one such block.
        extent: length of a block's patches together, padding included.
        patch_count: number of patches of a block.
    """

    members: range
    core: int
    halo: int
    open: int
    direct: int
    extent: int
    patch_count: int

    @property
    def reach(self) -> int:
        return self.core + self.halo

    @property
    def shortest_direct(self) -> int:
        return self.core - self.open


@dataclass(frozen=True)
class AxisTotals:
    """Sums over the blocks of one axis, in voxels, and bounds on the first block, those between, and the last one.

    Attributes:
        decoded: voxels that are decoded, in whole chunks of the volume.
    """

    decoded: int
    halo: int
    open: int
    spans: tuple[Span, ...]

    @cached_property
    def reach(self) -> int:
        """Length of the longest core with its halo."""
        return max(span.reach for span in self.spans)

    @cached_property
    def shortest_direct(self) -> int:
        """Least length of a core that no seam enters."""
        return min(span.shortest_direct for span in self.spans)


@dataclass(frozen=True, slots=True)
class Frame:
    """The blocks in the frame of the volume or of a head, with the totals of each axis."""

    blocks: BlockGrid
    totals: tuple[AxisTotals, ...]

    @classmethod
    def of(cls, blocks: BlockGrid, chunks: Ints | None = None, context: Ints | None = None) -> Frame:
        """Return the blocks with their totals; chunks and context are those of the volume, in its own frame."""
        ndim = len(blocks.axes)
        per_axis = zip(blocks.axes, chunks or (1,) * ndim, context or (0,) * ndim, strict=True)
        return cls(blocks, tuple(axis_totals(*values) for values in per_axis))

    @property
    def seam_voxels(self) -> int:
        """Voxels of all halos."""
        shape = self.blocks.grid.shape
        return math.prod(n + t.halo for n, t in zip(shape, self.totals, strict=True)) - math.prod(shape)

    @property
    def open_voxels(self) -> int:
        """Voxels of all cores that wait for seams."""
        shape = self.blocks.grid.shape
        return math.prod(shape) - math.prod(n - t.open for n, t in zip(shape, self.totals, strict=True))


@lru_cache(maxsize=4096)  # block grids that a planner compares share their axes
def axis_totals(axis: BlockAxis, chunk: int, context: int = 0) -> AxisTotals:
    """Return the totals of one axis, from all its blocks or, of many, from one period of their pattern.

    >>> totals = axis_totals(BlockAxis(GridAxis(20, 4, 2), size=8, crop=False, step=4), chunk=8)
    >>> totals.decoded, totals.halo, totals.open
    (32, 4, 8)
    """
    count = axis.count
    inner = range(1, count - 1)
    if len(inner) > EXAMINED_BLOCKS and not axis.grid.even:
        period = math.lcm(axis.grid.stride, axis.size, chunk) // axis.size
        inner = range(1, 1 + max(1, min(period, EXAMINED_BLOCKS)))
    scale = (count - 2) / len(inner) if inner else 0.0
    classes = [([0], 1.0), (list(inner), scale), ([count - 1] if count > 1 else [], 1.0)]
    decoded = halo = opened = 0.0
    spans = []
    for indices, weight in classes:
        if not indices:
            continue
        spans.append(_span(axis, indices, context))
        halo += weight * sum(axis.spill(i) for i in indices)
        opened += weight * sum(axis.open(i) for i in indices)
        decoded += weight * sum(chunk_span(*_extent(axis, i, context), chunk, axis.grid.length) for i in indices)
    return AxisTotals(round(decoded), round(halo), round(opened), tuple(spans))


def _extent(axis: BlockAxis, index: int, context: int) -> tuple[int, int]:
    patches = axis.patches(index)
    if not patches:
        return 0, 0
    return axis.grid.start(patches[0]) - context, axis.grid.start(patches[-1]) + axis.grid.patch + context


def _span(axis: BlockAxis, indices: list[int], context: int) -> Span:
    cores = [stop - start for start, stop in map(axis.core, indices)]
    opens = [axis.open(i) for i in indices]
    members = axis.patches(indices[0])
    if axis.grid.even:  # no two blocks need have the same starts: those of all together bound each
        members = range(members.start, max(axis.patches(i).stop for i in indices))
    return Span(
        members=members,
        core=max(cores),
        halo=max(axis.spill(i) for i in indices),
        open=max(opens),
        direct=max(c - o for c, o in zip(cores, opens, strict=True)),
        extent=max(stop - start for start, stop in (_extent(axis, i, context) for i in indices)),
        patch_count=max(len(axis.patches(i)) for i in indices),
    )
