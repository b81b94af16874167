"""The sweep of a block: the order in which its layers of patches are read, computed and written.

```text
   sweep ->      done and written | rolling partial | not yet read
                 =================|  [ layer n  ]   |
                                  |     [ layer n+1 ]
```

A layer holds the patches of a block that share one start on the swept axis. Layers are taken in groups of just enough
patches to fill a batch. When a group is done, the voxels before the next group's start are final and leave the partial:

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
from functools import lru_cache

from oocpatch.planning.blocks import BlockAxis, BlockGrid
from oocpatch.planning.box import ceil_to
from oocpatch.planning.grid import GridAxis, chunk_span


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive layers that are computed together.

    Attributes:
        layers: grid indices of the layers.
        start: first voxel of the group's patches on the swept axis.
        stop: end of the group's patches.
        read_stop: end of the planes that the group needs; `stop`, or beyond it up to a chunk border of the input.
        done: end of the voxels that are final once the group is computed.
    """

    layers: range
    start: int
    stop: int
    read_stop: int
    done: int


def groups(axis: GridAxis, layers: range, layers_per_group: int, chunk: int, end: int | None = None) -> list[Group]:
    """Return the groups of a block's layers, in order.

    Args:
        axis: the swept axis.
        layers: grid indices of the block's layers.
        layers_per_group: number of layers that are computed together.
        chunk: divisor of the ends of reads, in voxels.
        end: end of the block's last layer; default: that of the last of `layers`.

    >>> [g.read_stop for g in groups(GridAxis(10, 4, 2), range(0, 4), 1, 3)]
    [6, 6, 9, 10]
    """
    if not layers:
        return []
    schedule = []
    reach_stop = axis.start(layers[-1]) + axis.patch if end is None else end
    for i in range(0, len(layers), layers_per_group):
        members = layers[i : i + layers_per_group]
        following = i + layers_per_group
        done = axis.start(layers[following]) if following < len(layers) else reach_stop
        stop = axis.start(members[-1]) + axis.patch
        # Beyond the border there are no chunks: padding is read to the voxel.
        aligned = max(stop, min(ceil_to(stop, chunk), reach_stop, max(axis.length, stop)))
        schedule.append(Group(members, axis.start(members[0]), stop, aligned, done))
    return schedule


@lru_cache(maxsize=4096)
def capacity(axis: GridAxis, layers: range, layers_per_group: int, chunk: int, *, prefetch: bool) -> tuple[int, int]:
    """Return the planes of the input ring and of the sums ring of a block, `(input, sums)`.

    With `prefetch`, the input of the next group is read while the current one is computed. Of many groups, one period
    of the pattern that strides and chunks make is examined, and the last ones.

    >>> capacity(GridAxis(10, 4, 2), range(0, 4), 1, 1, prefetch=True)
    (6, 4)
    """
    reads, sums = 1, 1
    end = axis.start(layers[-1]) + axis.patch if layers else 0
    for part in _excerpts(layers, layers_per_group, math.lcm(axis.stride, chunk) // axis.stride):
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
    """A bound on some blocks' lengths along one axis, in voxels: first block, last block, or all between.

    Attributes:
        members: grid indices of the patches of one such block.
        core: longest core.
        halo: longest halo.
        open: longest open part.
        direct: longest direct part.
        patches: longest extent of a block's patches, padding included.
        layers: largest number of patches of a block.
    """

    members: range
    core: int
    halo: int
    open: int
    direct: int
    patches: int
    layers: int

    @property
    def reach(self) -> int:
        return self.core + self.halo

    @property
    def closed(self) -> int:
        """Shortest direct part."""
        return self.core - self.open


@dataclass(frozen=True, slots=True)
class AxisTotals:
    """Sums over the blocks of one axis, in voxels, and bounds on single blocks.

    Attributes:
        decoded: voxels that are decoded, in whole chunks of the volume.
        halo: length of all halos.
        open: length of all open parts.
        spans: bounds on the first block, those between, and the last one.
    """

    decoded: int
    halo: int
    open: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """The blocks in the frame of the volume or of a head, with the totals of each axis."""

    blocks: BlockGrid
    totals: tuple[AxisTotals, ...]

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


def axis_totals(axis: BlockAxis, chunk: int, context: int = 0) -> AxisTotals:
    """Return the totals of one axis, from all its blocks or, of many, from one period of their pattern.

    Args:
        axis: the blocks of the axis.
        chunk: length of the volume's chunks, in voxels.
        context: voxels that are read beyond the patches, on each side.

    >>> totals = axis_totals(BlockAxis(GridAxis(20, 4, 2), size=8, unit=4, crop=False, step=4), chunk=8)
    >>> totals.decoded, totals.halo, totals.open
    (32, 4, 8)
    """
    count = axis.count
    inner = range(1, count - 1)
    if len(inner) > EXAMINED_BLOCKS:
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
    """Return start and stop of the voxels that a block's patches read."""
    patches = axis.patches(index)
    if not patches:
        return 0, 0
    return axis.grid.start(patches[0]) - context, axis.grid.start(patches[-1]) + axis.grid.patch + context


def _span(axis: BlockAxis, indices: list[int], context: int) -> Span:
    cores = [stop - start for start, stop in map(axis.core, indices)]
    opens = [axis.open(i) for i in indices]
    return Span(
        members=axis.patches(indices[0]),
        core=max(cores),
        halo=max(axis.spill(i) for i in indices),
        open=max(opens),
        direct=max(c - o for c, o in zip(cores, opens, strict=True)),
        patches=max(stop - start for start, stop in (_extent(axis, i, context) for i in indices)),
        layers=max(len(axis.patches(i)) for i in indices),
    )
