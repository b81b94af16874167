"""Totals over all blocks, axis by axis: what a projection needs to know of them, without looking at each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from oocpatch.planning.blocks import BlockAxis, BlockGrid
from oocpatch.planning.grid import chunk_span

LOOKED_AT = 64
"""Blocks per axis that a projection looks at one by one; more of them repeat and are extrapolated."""


@dataclass(frozen=True, slots=True)
class Span:
    """A bound on some blocks' lengths along one axis, in voxels: first block, last block, or all between.

    Attributes:
        members: the patches of one such block.
        core: longest core.
        halo: longest halo.
        open: longest open part.
        direct: longest direct part.
        patches: longest extent of a block's patches, padding included.
        layers: most patches of a block.
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
    """Sums over the blocks of one axis, in voxels, and bounds on single blocks."""

    decoded: int
    """Voxels that are decoded, in whole chunks of the volume."""
    halo: int
    open: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """The blocks in one frame, with the totals of each axis."""

    blocks: BlockGrid
    totals: tuple[AxisTotals, ...]

    @property
    def seams(self) -> int:
        """Voxels of all halos."""
        shape = self.blocks.grid.shape
        return math.prod(n + t.halo for n, t in zip(shape, self.totals, strict=True)) - math.prod(shape)

    @property
    def own(self) -> int:
        """Voxels of all cores that wait for seams."""
        shape = self.blocks.grid.shape
        return math.prod(shape) - math.prod(n - t.open for n, t in zip(shape, self.totals, strict=True))


def axis_totals(axis: BlockAxis, chunk: int, context: int = 0) -> AxisTotals:
    """Look at the blocks of one axis, all of them or, of many, one period of the pattern they make.

    Args:
        axis: the blocks of the axis.
        chunk: the volume's chunks on it, in voxels.
        context: voxels that are read beyond the patches.
    """
    count = axis.count
    inner = range(1, count - 1)
    if len(inner) > LOOKED_AT:
        period = math.lcm(axis.grid.stride, axis.size, chunk) // axis.size
        inner = range(1, 1 + max(1, min(period, LOOKED_AT)))
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
    """First and last voxel that a block's patches read."""
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
