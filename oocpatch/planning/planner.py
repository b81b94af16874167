"""The planner: the choice of the blocks of a run, of their sweep axis, and of patch and batch sizes left open.

Among the block shapes that fit the limits the planner takes the one with the least projected traffic. Seams are
thinnest where a core is a multiple of the stride, and each chunk is decoded least often where cores and chunks meet;
both show in the traffic, so that no rule for them is needed. If its blocks are much work for the model, it takes the
cheapest of those that a crash may cost, or that come nearest to it. The bytes of a result follow from the blocks; these
depend on volume, grid, limits and counted operations, and not on the number of workers or on timing.

```text
 grid --> block shapes x sweep axes --> x I/O strategies --> cheapest that fits --> smaller ones --> tasks at a time
          (about 12 lengths per axis)       (4 each)          (memory, disk)        (heavy models)
```
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from oocpatch.errors import PlanTooLarge
from oocpatch.planning.blocks import BlockAxis, BlockGrid, core_length
from oocpatch.planning.box import Ints, ceil_to
from oocpatch.planning.grid import GridAxis, PatchGrid
from oocpatch.planning.heads import common_unit, crops
from oocpatch.planning.memory import (
    LEAST_MAPPED,
    ByteSizes,
    IoStrategy,
    MemoryUse,
    Needs,
    Projection,
    Traffic,
    io_threads,
    traffic,
)
from oocpatch.planning.plan import Plan, human
from oocpatch.planning.sweep import Frame
from oocpatch.planning.workload import BYTES_PER_SECOND, TASK_SECONDS, Workload, crash_limit

WORK = 1 << 30
"""Voxels of patches that a block should not exceed: a crash costs a block, ten seconds on a GPU, minutes on a CPU."""

NOMINAL = (2, 1)
"""Concurrency that block shapes are chosen for: one task's ends overlap with the other's middle; one if need be."""

NO_PREFETCH = 1.3
"""Factor on the cost of tasks that do not read and write during computation."""

LEAST_USE = 0.75
"""Share of the time of calls side by side in which they must compute: below, one call with all threads is as fast."""

LEAST_RETAINED, MOST_HOLES = 64 << 20, 3
"""Bytes that the heap retains at least, and how many times the tensors of calls at most: with these, few networks have
some of it returned to the system."""

SINGLE_TASK = 1.06
"""Factor on the cost of a single task at a time: its first read and its last write overlap with nothing."""


@dataclass(frozen=True, slots=True)
class BlockChoice:
    """The blocks of a run, the reads and writes of its tasks, tasks and calls at a time, and the projected needs.

    `nominal_concurrency` is the number of tasks at a time if none was requested. `crash_limit` is the number of patches
    that a crash should not exceed; None: the model is light.
    """

    blocks: BlockGrid
    io_strategy: IoStrategy
    concurrency: int
    nominal_concurrency: int
    calls: int
    projection: Projection
    crash_limit: int | None = None


def choose(
    grid: PatchGrid,
    sizes: ByteSizes,
    *,
    max_memory: int,
    max_disk: int | None = None,
    block_shape: Ints | None = None,
    workers: int | None = None,
    workload: Workload | None = None,
    side_by_side: Sequence[ByteSizes] = (),
) -> BlockChoice:
    """Choose the blocks of a run.

    Args:
        grid: the patches.
        sizes: bytes of voxels, chunks and batches.
        max_memory: bytes that the run may add to its process.
        max_disk: bytes that the workspace may have; None: any number.
        block_shape: requested core, in voxels per axis; None: the planner chooses.
        workers: requested number of concurrent tasks; there are fewer when memory is short, or a crash would cost more
            than it may.
        workload: the model's work; None: none.
        side_by_side: the same sizes with more calls of the model at a time, each number of them that may be chosen.

    Raises:
        PlanTooLarge: when nothing fits; with the numbers, and the parameters to change.
    """
    grids = list(_block_grids(grid, common_unit(sizes.heads, len(grid.axes)), block_shape, crop=crops(sizes.heads)))
    candidates: list[_Candidate] = []
    for threads in dict.fromkeys((io_threads(max_memory, sizes.unit_bytes), 1)):  # one only where more do not fit
        candidates = _with_io(grids, sizes, threads)
        best = _best(candidates, max_memory, max_disk)
        if best is not None:
            limit = None
            if workload is not None and not workload.is_light(_lost(*best)):
                limit = crash_limit(grid.num_patches)
                if block_shape is None:
                    best = _smaller(best, candidates, workload, max_memory, max_disk)
            candidate, concurrency = best  # blocks and calls, and so the bytes, do not depend on `workers`
            concurrency = nominal = min(concurrency, candidate.frame.blocks.num_blocks)
            candidate = candidate.with_calls(side_by_side, nominal, max_memory)
            blocks, projection = candidate.frame.blocks, candidate.projection
            if workers is not None:
                most = workers
                if limit is not None and block_shape is None:
                    most = min(workers, limit // blocks.patches_per_block)
                fitting = (n for n in range(most, 1, -1) if projection.fits(n, max_memory, sizes.device_memory))
                concurrency = next(fitting, 1)
            calls = candidate.sizes.calls
            return BlockChoice(blocks, candidate.io_strategy, concurrency, nominal, calls, projection, limit)
    raise PlanTooLarge(_refusal(candidates, max_memory, max_disk))


def _with_io(grids: list[BlockGrid], sizes: ByteSizes, threads: int) -> list[_Candidate]:
    """Return each block grid with each strategy for I/O, with so many threads for chunks."""
    candidates = []
    for blocks in grids:
        frame = Frame.of(blocks, sizes.in_chunks, sizes.context)
        heads = tuple(Frame.of(blocks.scaled(h.scale, h.unit, crop=h.crop)) for h in sizes.heads)
        for aligned_reads, moved in traffic(frame, heads, sizes, NOMINAL[0]).items():
            strategies = (IoStrategy(aligned_reads, prefetch, threads) for prefetch in (True, False))
            candidates += [_Candidate(frame, heads, sizes, strategy, moved) for strategy in strategies]
    return candidates


def _lost(candidate: _Candidate, concurrency: int) -> int:
    """Return the number of patches that a crash of a process may cost."""
    blocks = candidate.frame.blocks
    return min(concurrency * blocks.patches_per_block, blocks.grid.num_patches)


def _smaller(
    best: tuple[_Candidate, int],
    candidates: list[_Candidate],
    workload: Workload,
    max_memory: int,
    max_disk: int | None,
) -> tuple[_Candidate, int]:
    """Return the cheapest blocks of no more work than they should be; if there are none, the smallest.

    Their seams and their number may add no more than a small share of the model's work to the cheapest of all.
    """
    cheapest, lost = best[0], _lost(*best)
    patches = cheapest.frame.blocks.grid.num_patches
    limit, most = crash_limit(patches), workload.most_patches(patches)
    if lost <= limit and cheapest.frame.blocks.patches_per_block <= most:
        return best

    def may_cost(candidate: _Candidate) -> bool:
        return candidate.seconds - cheapest.seconds <= workload.seam_seconds(patches)

    sizes = {id(c): c.frame.blocks.patches_per_block for c in candidates}
    smaller = sorted((c for c in candidates if sizes[id(c)] < lost and may_cost(c)), key=lambda c: sizes[id(c)])
    fitting = _best([c for c in smaller if sizes[id(c)] <= most], max_memory, max_disk, limit)
    if fitting is not None:
        return fitting
    for size, equal in groupby((c for c in smaller if sizes[id(c)] > most), key=lambda c: sizes[id(c)]):
        fitting = _best(list(equal), max_memory, max_disk, max(size, limit))
        if fitting is not None:
            return fitting
    return best


def _best(
    candidates: list[_Candidate], max_memory: int, max_disk: int | None, most: int | None = None
) -> tuple[_Candidate, int] | None:
    """Return the cheapest candidate that fits, and the number of tasks at a time; None when none fits.

    All tasks at a time have at most so many patches.
    """
    best: tuple[float, _Candidate, int] | None = None
    for candidate in sorted(candidates, key=lambda c: c.cost(NOMINAL[0])):
        if best is not None and candidate.cost(NOMINAL[0]) >= best[0]:
            break  # the candidates after it cost no less
        if max_disk is not None and candidate.moved.disk > max_disk:
            continue
        concurrency = candidate.concurrency(max_memory, most)
        if concurrency and (best is None or candidate.cost(concurrency) < best[0]):
            best = candidate.cost(concurrency), candidate, concurrency
    return None if best is None else best[1:]


class _Candidate(MemoryUse):
    """Blocks with a strategy for I/O, to be compared with others."""

    def concurrency(self, max_memory: int, most: int | None = None) -> int:
        """Return the largest of the nominal numbers of concurrent tasks that fits; 0: none does."""
        here, there = self.least
        if here.memory(1) > max_memory or there.memory(1) > (self.sizes.device_memory or 0):
            return 0
        size = self.frame.blocks.patches_per_block
        allowed = (c for c in NOMINAL if most is None or c * size <= most)
        return next((c for c in allowed if self.projection.fits(c, max_memory, self.sizes.device_memory)), 0)

    @property
    def needs(self) -> tuple[Needs, Needs]:
        """Return the needs in main memory, and on the device."""
        return self.projection.main, self.projection.device

    def with_calls(self, side_by_side: Sequence[ByteSizes], concurrency: int, max_memory: int) -> _Candidate:
        """Return the same with as many calls of the model at a time as memory and the patches of a block allow.

        Calls run on into the next group of layers if its input is read meanwhile.
        """
        axes = (t for a, t in enumerate(self.frame.totals) if a != self.frame.blocks.sweep)
        of_group = self._group * math.prod(max(span.patch_count for span in axis.spans) for axis in axes)
        of_block = self.frame.blocks.patches_per_block
        patches = of_block if self.io_strategy.prefetch else min(of_group, of_block)
        for sizes in sorted(side_by_side, key=lambda sizes: -sizes.calls):
            if sizes.calls > of_group + self.io_strategy.prefetch or use_of_calls(patches, sizes.calls) < LEAST_USE:
                continue
            more = replace(self, sizes=sizes)
            if more.projection.fits(concurrency, max_memory, sizes.device_memory):
                return more
        return self

    @property
    def seconds(self) -> float:
        """Nominal seconds of traffic and of tasks."""
        moved = self.moved.bytes_read + self.moved.bytes_written
        return moved / BYTES_PER_SECOND + TASK_SECONDS * self.frame.blocks.num_blocks

    def cost(self, concurrency: int) -> float:
        """Return the projected traffic in bytes, weighed by what makes it slower or dearer to lose."""
        blocks = self.frame.blocks
        cost = float(self.moved.bytes_read + self.moved.bytes_written)
        cost *= 1.0 if self.io_strategy.prefetch else NO_PREFETCH
        cost *= SINGLE_TASK if concurrency == 1 or blocks.num_blocks == 1 else 1.0
        cost *= 1.0 + 0.01 * blocks.sweep  # rows of memory stay long when an early axis is swept
        work = blocks.grid.num_patches * math.prod(blocks.grid.patch_size) / blocks.num_blocks
        cost *= max(1.0, work / WORK)
        return cost + 20_000.0 * blocks.num_blocks  # the overhead of a task


def _block_grids(grid: PatchGrid, unit: Ints, block_shape: Ints | None, *, crop: bool) -> Iterator[BlockGrid]:
    """Return the block grids to compare: the requested one alone, or all products of some core lengths per axis."""
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
        per_axis = enumerate(zip(grid.axes, unit, lengths, strict=True))
        axes = [[BlockAxis.of(g, n, u, crop=crop, swept=a == sweep) for n in some] for a, (g, u, some) in per_axis]
        for of_grid in itertools.product(*axes):  # which share them, and what they have computed
            yield BlockGrid(of_grid, sweep)


def _core_lengths(axis: GridAxis, unit: int, few: int) -> list[int]:
    """Return at most `few` core lengths: the whole axis, and multiples of the unit, those of the stride first."""
    longest = core_length(axis, axis.length, unit)
    shortest = core_length(axis, 1, unit)
    lengths = {longest, shortest}
    lattice = math.lcm(unit, axis.stride)
    for base in (lattice, unit):
        k = 1
        while k * base < longest and len(lengths) < 2 * few:
            lengths.add(core_length(axis, k * base, unit))
            k = max(k + 1, k * 3 // 2)
    for parts in (2, 3, 4):
        lengths.add(core_length(axis, ceil_to(-(-axis.length // parts), unit), unit))
    ordered = sorted(lengths)
    if len(ordered) <= few:
        return ordered
    picked = {round(i * (len(ordered) - 1) / (few - 1)) for i in range(few)}
    return [ordered[i] for i in sorted(picked)]


def _refusal(candidates: list[_Candidate], max_memory: int, max_disk: int | None) -> str:
    """Return the message for no candidate that fits: each needs too much memory, or too much disk."""
    if max_disk is not None:
        for candidate in sorted(candidates, key=lambda c: c.moved.disk):
            if candidate.concurrency(max_memory):
                return (
                    f"the workspace needs {human(candidate.moved.disk, up=True)} of disk but max_disk is "
                    f"{human(max_disk)}; raise max_disk, or raise max_memory so that blocks are larger and seams fewer"
                )
    lower = "lower batch_size, patch_size, block_shape or output_chunks"
    smallest, limit = _smallest(candidates, 0), f"max_memory is {human(max_memory)}; raise max_memory, or {lower}"
    device_memory = candidates[0].sizes.device_memory
    if smallest.memory(1) <= max_memory and device_memory is not None:
        smallest, limit = _smallest(candidates, 1), f"{human(device_memory)} of the device are to be used; {lower}"
    parts = ", ".join(f"{name} {human(n)}" for name, n in smallest.parts if n)
    return f"one layer of patches needs {human(smallest.memory(1), up=True)} ({parts}) but {limit}"


def _smallest(candidates: list[_Candidate], place: int) -> Needs:
    """Return the least that a candidate needs in main memory, 0, or on the device, 1."""
    first, *others = sorted(candidates, key=lambda c: c.least[place].memory(1))
    smallest = first.needs[place]
    for candidate in others:
        if candidate.least[place].memory(1) >= smallest.memory(1):
            break
        smallest = min(smallest, candidate.needs[place], key=lambda n: n.memory(1))
    return smallest


LARGEST = {1: 1 << 16, 2: 512, 3: 128, 4: 32}
"""Longest side of a patch by number of spatial axes: a good deal of context, and a few million voxels at most."""

MULTIPLE, SMALL_MULTIPLE = 32, 8
"""Divisors of the sides of patches: the first suits networks that halve five times, the second saves memory."""

MODEL_SHARE = 4
"""Divisor of the memory that the model may use with one patch; half of that with a batch chosen here."""

BATCH_VOXELS = 1 << 21
"""Voxels that repay the overhead of a call of the model."""

LARGEST_BATCH = 64
"""Most patches of a batch chosen here."""


def patch_sizes(shape: Ints, chunks: Ints, fixed: tuple[int | None, ...] | None = None) -> Iterator[Ints]:
    """Return patch sizes to try, the largest first; `fixed`: the sides that the model fixes, None for the others.

    Sides are whole chunks where possible, and no longer than the volume needs.

    >>> list(patch_sizes((4000, 3000), (256, 256)))[:3]
    [(512, 512), (256, 256), (192, 192)]
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


def chosen_overlap(patch_size: Ints, shape: Ints, overlap_mode: object) -> Ints:
    """Return the overlap of patches whose size is chosen, even, and none where one patch covers the volume.

    Half a patch where windows fall to the border, so that their weights add up evenly; a quarter in other modes.

    >>> chosen_overlap((64, 64), (512, 40), "hann"), chosen_overlap((64, 64), (512, 512), "crop")
    ((32, 0), (16, 16))
    """
    modes = set(overlap_mode.values()) if isinstance(overlap_mode, Mapping) else {overlap_mode}
    parts = 2 if modes & {"hann", "gaussian", "nnunet", "monai"} else 4
    return tuple(0 if n <= p else p // (2 * parts) * 2 for p, n in zip(patch_size, shape, strict=True))


def _side(length: int, chunk: int, limit: int) -> int:
    """Return the longest side within a limit: whole chunks if one fits, and a multiple that networks need."""
    multiple = MULTIPLE if limit >= MULTIPLE else SMALL_MULTIPLE
    step = math.lcm(multiple, chunk)
    step = step if step <= limit else multiple
    return min(limit // step * step, ceil_to(length, multiple))


def batch_size(
    voxels: int, patch_bytes: int, max_memory: int, *, patches: int, least: int = 1, most: int | None = None
) -> int:
    """Return the number of patches per call of the model, a power of two within its limits, `least` and `most`.

    A patch has so many voxels, and takes `patch_bytes` of the model and a batch; the volume has so many patches.

    >>> batch_size(64**3, 40 << 20, 1 << 30, patches=500), batch_size(64**3, 0, 1 << 30, patches=500, most=3)
    (2, 3)
    """
    wanted = min(BATCH_VOXELS // voxels, max_memory // (2 * MODEL_SHARE) // max(1, patch_bytes), patches, LARGEST_BATCH)
    power = 1 << max(1, wanted).bit_length() - 1
    return max(least, min(power, most or power))


def use_of_calls(patches: int, calls: int) -> float:
    """Return the share of the time of calls side by side in which they compute, until all these patches are done.

    >>> use_of_calls(9, 2), use_of_calls(9, 8)
    (0.9, 0.5625)
    """
    return patches / (calls * -(-patches // calls))


def with_fewer_calls(plan: Plan, calls: int) -> Plan:
    """Return a plan with fewer calls of the model at a time, whose threads stay, and with less memory."""
    parts = tuple((n, size // plan.calls * calls if n in ("model", "batch") else size) for n, size in plan.memory_parts)
    freed = {name: size - less for (name, size), (_, less) in zip(plan.memory_parts, parts, strict=True)}
    # the normalize stage, which has no batches, may need more than what is left of the predict stage
    sizes = ByteSizes(0, plan.in_chunks, 0, plan.context, plan.heads, 0, 0, plan.batch_size, 0, 0)
    frame = Frame.of(plan.block_grid, plan.in_chunks, plan.context)
    others = MemoryUse(frame, tuple(map(Frame.of, plan.frames)), sizes, plan.io_strategy, Traffic(0, 0, 0))
    of_task = max(plan.task_memory - freed.get("batch", 0), others.projection.main.task_memory)
    less_memory = freed.get("model", 0) + plan.concurrency * (plan.task_memory - of_task)
    return replace(
        plan,
        calls=calls,
        memory_parts=parts,
        task_memory=of_task,
        projected_memory=plan.projected_memory - less_memory,
    )


def with_retained_memory(plan: Plan, max_memory: int) -> Plan:
    """Return a plan whose heap retains the model's tensors from call to call, if there is as much memory left."""
    parts = {name: size for name, size in plan.memory_parts if name != "heap"}
    needed, calls = plan.projected_memory - plan.retained_memory, parts.get("model", 0)
    retained = min(max_memory - needed, max(MOST_HOLES * calls, LEAST_RETAINED))
    if plan.device_parts or calls < LEAST_MAPPED or retained < max(calls, LEAST_RETAINED):
        retained = 0
    parts |= {"heap": retained} if retained else {}
    return replace(plan, projected_memory=needed + retained, memory_parts=tuple(parts.items()))
