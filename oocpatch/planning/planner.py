"""The planner: chooses cross-section, length and sweep axis of the blocks, and how tasks go about them.

Among the block shapes that fit the limits it takes the one with the least projected traffic. Seams are thinnest where a
core is a multiple of the stride, and each chunk is decoded least often where cores and chunks meet; both show in the
traffic, so that no rule for them is needed. The choice depends on volume, grid and limits, and not on the number of
workers or on timing: the same call plans the same blocks, and the bytes of a result follow from the blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from oocpatch.errors import PlanTooLarge
from oocpatch.planning.blocks import BlockAxis, BlockGrid, core_length
from oocpatch.planning.box import Ints, ceil_to
from oocpatch.planning.grid import GridAxis, PatchGrid
from oocpatch.planning.heads import common_unit, crops
from oocpatch.planning.memory import (
    ByteSizes,
    IoStrategy,
    Projection,
    Traffic,
    io_threads,
    least_memory,
    project,
    traffic,
)
from oocpatch.planning.plan import human
from oocpatch.planning.sweep import AxisTotals, Frame, axis_totals

WORK = 1 << 30
"""Voxels of patches a block should not exceed: what a crash costs, about ten seconds on a GPU, minutes on a CPU."""

NOMINAL = (2, 1)
"""Concurrency that block shapes are chosen for: one task's ends overlap with the other's middle; one if need be."""

UNHURRIED = 1.3
"""Penalty for tasks that do not read ahead and write behind."""

LONELY = 1.06
"""Penalty for a single task at a time: its first read and its last write overlap with nothing."""


@dataclass(frozen=True, slots=True)
class BlockChoice:
    """A block grid, the way its tasks work, how many run at a time, and what that needs."""

    blocks: BlockGrid
    io_strategy: IoStrategy
    concurrency: int
    projection: Projection


def choose(
    grid: PatchGrid,
    sizes: ByteSizes,
    *,
    max_memory: int,
    max_disk: int | None = None,
    block_shape: Ints | None = None,
    workers: int | None = None,
) -> BlockChoice:
    """Choose the blocks of a run.

    Args:
        grid: the patches.
        sizes: what a voxel, a chunk and a batch weigh.
        max_memory: bytes that the run may add to its process.
        max_disk: bytes that the workspace may take.
        block_shape: core asked for, in voxels per axis.
        workers: concurrent tasks asked for; fewer when memory is short.

    Raises:
        PlanTooLarge: when nothing fits; with the numbers, and what to change.
    """
    grids = list(_candidates(grid, common_unit(sizes.heads), block_shape, crop=crops(sizes.heads)))
    candidates: list[_Candidate] = []
    for threads in dict.fromkeys((io_threads(max_memory, sizes.unit_bytes), 1)):  # one only where more do not fit
        candidates = _ways(grids, sizes, threads)
        best = _best(candidates, max_memory, max_disk)
        if best is not None:
            found, concurrency = best
            choice = BlockChoice(found.frame.blocks, found.io_strategy, concurrency, found.projection)
            return _with_workers(choice, workers, max_memory)
    raise PlanTooLarge(_refusal(candidates, max_memory, max_disk))


def _ways(grids: list[BlockGrid], sizes: ByteSizes, threads: int) -> list[_Candidate]:
    """All ways to go about the blocks, with so many threads for chunks."""
    frames, candidates = Frames(sizes), []
    for blocks in grids:
        frame, heads = frames.of(blocks)
        for aligned_reads in (True, False):
            moved = traffic(frame, heads, sizes, NOMINAL[0], aligned_reads=aligned_reads)
            strategies = (IoStrategy(aligned_reads, prefetch, threads) for prefetch in (True, False))
            candidates += [_Candidate(frame, heads, sizes, strategy, moved) for strategy in strategies]
    return candidates


def _best(candidates: list[_Candidate], max_memory: int, max_disk: int | None) -> tuple[_Candidate, int] | None:
    """The candidate that costs least of those that fit, and how many tasks at a time; None when none fits."""
    best: tuple[float, _Candidate, int] | None = None
    for candidate in sorted(candidates, key=lambda c: c.cost(NOMINAL[0])):
        if best is not None and candidate.cost(NOMINAL[0]) >= best[0]:
            break  # nor does any that comes after it cost less
        if max_disk is not None and candidate.moved.disk > max_disk:
            continue
        concurrency = candidate.concurrency(max_memory)
        if concurrency and (best is None or candidate.cost(concurrency) < best[0]):
            best = candidate.cost(concurrency), candidate, concurrency
    return None if best is None else best[1:]


@dataclass(frozen=True)
class _Candidate:
    """Blocks, and a way to go about them."""

    frame: Frame
    heads: tuple[Frame, ...]
    sizes: ByteSizes
    io_strategy: IoStrategy
    moved: Traffic

    @cached_property
    def projection(self) -> Projection:
        return project(self.frame, self.heads, self.sizes, self.io_strategy, self.moved)

    @cached_property
    def least(self) -> int:
        """A bound from below of the memory of one task at a time."""
        return least_memory(self.frame, self.heads, self.sizes, self.io_strategy)

    def concurrency(self, max_memory: int) -> int:
        """How many tasks at a time fit, of the nominal numbers; 0: not even one."""
        if self.least > max_memory:
            return 0
        return next((c for c in NOMINAL if self.projection.memory(c) <= max_memory), 0)

    def cost(self, concurrency: int) -> float:
        """Projected traffic, weighed: bytes, and what makes them slower or dearer to lose."""
        blocks = self.frame.blocks
        cost = float(self.moved.bytes_read + self.moved.bytes_written)
        cost *= 1.0 if self.io_strategy.prefetch else UNHURRIED
        cost *= LONELY if concurrency == 1 or blocks.num_blocks == 1 else 1.0
        cost *= 1.0 + 0.01 * blocks.sweep  # rows of memory stay long when an early axis is swept
        work = blocks.grid.num_patches * math.prod(blocks.grid.patch_size) / blocks.num_blocks
        cost *= max(1.0, work / WORK)
        return cost + 20_000.0 * blocks.num_blocks  # what a task costs besides its bytes


class Frames:
    """Blocks in all frames, with the totals of their axes, which many candidates share."""

    def __init__(self, sizes: ByteSizes) -> None:
        self._sizes = sizes
        self._totals: dict[tuple[int, int, BlockAxis], AxisTotals] = {}

    def of(self, blocks: BlockGrid) -> tuple[Frame, tuple[Frame, ...]]:
        """The blocks in the volume's frame, and in each head's."""
        sizes = self._sizes
        heads = (blocks.scaled(h.scale, h.unit, crop=h.crop) for h in sizes.heads)
        ones = (0,) * len(blocks.axes)
        return self._frame(blocks, -1, sizes.context), tuple(self._frame(b, i, ones) for i, b in enumerate(heads))

    def _frame(self, blocks: BlockGrid, head: int, context: Ints) -> Frame:
        found = []
        for a, axis in enumerate(blocks.axes):
            key = (head, a, axis)
            if key not in self._totals:
                chunk = self._sizes.in_chunks[a] if head < 0 else 1
                self._totals[key] = axis_totals(axis, chunk, context[a])
            found.append(self._totals[key])
        return Frame(blocks, tuple(found))


def _with_workers(choice: BlockChoice, workers: int | None, max_memory: int) -> BlockChoice:
    """The choice at the concurrency asked for, as far as memory allows."""
    if workers is None:
        wanted = min(choice.concurrency, choice.blocks.num_blocks)
    else:
        wanted = workers
        while wanted > 1 and choice.projection.memory(wanted) > max_memory:
            wanted -= 1
    return BlockChoice(choice.blocks, choice.io_strategy, max(1, wanted), choice.projection)


def _candidates(grid: PatchGrid, unit: Ints, block_shape: Ints | None, *, crop: bool) -> Iterator[BlockGrid]:
    ndim = len(unit)
    if block_shape is not None:
        core = tuple(core_length(g, b, u) for g, b, u in zip(grid.axes, block_shape, unit, strict=True))
        # The longest axis gives the smallest cross-section. Memory and workers have no say: the bytes depend on it.
        extents = tuple(min(c, g.length) for c, g in zip(core, grid.axes, strict=True))
        yield BlockGrid.of(grid, core, unit, extents.index(max(extents)), crop=crop)
        return
    few = 12 if ndim <= 3 else 6
    lengths = [_core_lengths(g, u, few) for g, u in zip(grid.axes, unit, strict=True)]
    for sweep in range(ndim):
        for core in itertools.product(*lengths):
            yield BlockGrid.of(grid, core, unit, sweep, crop=crop)


def _core_lengths(axis: GridAxis, unit: int, few: int) -> list[int]:
    """Core lengths worth looking at: the whole axis, and multiples of the unit, those of the stride first."""
    longest = core_length(axis, axis.length, unit)
    shortest = core_length(axis, 1, unit)
    found = {longest, shortest}
    lattice = math.lcm(unit, axis.stride)
    for base in (lattice, unit):
        k = 1
        while k * base < longest and len(found) < 2 * few:
            found.add(core_length(axis, k * base, unit))
            k = max(k + 1, k * 3 // 2)
    for parts in (2, 3, 4):
        found.add(core_length(axis, ceil_to(-(-axis.length // parts), unit), unit))
    ordered = sorted(found)
    if len(ordered) <= few:
        return ordered
    picked = {round(i * (len(ordered) - 1) / (few - 1)) for i in range(few)}
    return [ordered[i] for i in sorted(picked)]


def _refusal(candidates: list[_Candidate], max_memory: int, max_disk: int | None) -> str:
    """Why none of the candidates will do: those that fit the memory take too much disk, or none fits it."""
    if max_disk is not None:
        for candidate in sorted(candidates, key=lambda c: c.moved.disk):
            if candidate.concurrency(max_memory):
                return (
                    f"the workspace needs {human(candidate.moved.disk, up=True)} of disk but max_disk is "
                    f"{human(max_disk)}; raise max_disk, or raise max_memory so that blocks are larger and seams fewer"
                )
    smallest: Projection | None = None
    for candidate in sorted(candidates, key=lambda c: c.least):
        if smallest is not None and candidate.least >= smallest.memory(1):
            break
        if smallest is None or candidate.projection.memory(1) < smallest.memory(1):
            smallest = candidate.projection
    assert smallest is not None, "a grid has at least one candidate"
    parts = ", ".join(f"{name} {human(n)}" for name, n in smallest.parts if n)
    return (
        f"one layer of patches needs {human(smallest.memory(1), up=True)} ({parts}) but max_memory is "
        f"{human(max_memory)}; raise max_memory, or lower batch_size, patch_size, block_shape or output_chunks"
    )


LARGEST = {1: 1 << 16, 2: 512, 3: 128, 4: 32}
"""Longest side of a patch by number of spatial axes: a good deal of context, and a few million voxels at most."""


MULTIPLE, SMALL_MULTIPLE = 32, 8
"""Sides are multiples of it, as networks that halve five times need, as long as there is memory for that."""

MODEL_SHARE = 4
"""The model may take this part of the memory with one patch, and half of it with a batch chosen here."""


BATCH_VOXELS = 1 << 21
"""Voxels that make a call of the model worth its overhead."""


LARGEST_BATCH = 64


def patch_sizes(shape: Ints, chunks: Ints, fixed: tuple[int | None, ...] | None = None) -> Iterator[Ints]:
    """Patch sizes to try, the largest first.

    Sides are whole chunks where that suits, and no longer than the volume needs.

    Args:
        shape: of the volume, spatial.
        chunks: of the volume, spatial.
        fixed: sides that the model fixes, None where it does not.

    >>> list(patch_sizes((4000, 3000), (256, 256)))[:3]
    [(512, 512), (256, 256), (192, 192)]
    >>> next(patch_sizes((20, 300, 300), (48, 48, 48), (None, 64, 64)))
    (32, 64, 64)
    """
    seen = None
    largest = LARGEST.get(len(shape), SMALL_MULTIPLE * 2)
    limits = (limit for k in range(largest.bit_length()) for limit in (largest >> k, (largest >> k) * 3 // 4))
    for limit in limits:
        if limit % SMALL_MULTIPLE:
            return
        sides = tuple(_side(n, c, limit) for n, c in zip(shape, chunks, strict=True))
        sides = tuple(s or f for s, f in zip(fixed or (None,) * len(shape), sides, strict=True))
        if sides != seen:
            yield sides
        seen = sides


def _side(length: int, chunk: int, limit: int) -> int:
    multiple = MULTIPLE if limit >= MULTIPLE else SMALL_MULTIPLE
    step = math.lcm(multiple, chunk)
    step = step if step <= limit else multiple
    return min(limit // step * step, ceil_to(length, multiple))


def batch_size(
    voxels: int, patch_bytes: int, max_memory: int, *, patches: int, least: int = 1, most: int | None = None
) -> int:
    """Patches per call of the model.

    Args:
        voxels: of a patch.
        patch_bytes: memory that the model and a batch take per patch.
        max_memory: the run's.
        patches: of the volume.
        least: fewest that the model takes.
        most: most that the model takes.

    >>> batch_size(64**3, 40 << 20, 1 << 30, patches=500), batch_size(64**3, 0, 1 << 30, patches=500, most=3)
    (2, 3)
    """
    wanted = min(BATCH_VOXELS // voxels, max_memory // (2 * MODEL_SHARE) // max(1, patch_bytes), patches, LARGEST_BATCH)
    power = 1 << max(1, wanted).bit_length() - 1
    return max(least, min(power, most or power))
