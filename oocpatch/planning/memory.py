"""Projections: memory, disk and traffic of a run, from integers alone.

What the projection promises the run keeps: every buffer of the stages is counted, at the size it is allocated with.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from oocpatch.planning.blocks import BlockAxis, BlockGrid
from oocpatch.planning.box import Ints
from oocpatch.planning.grid import chunk_span
from oocpatch.planning.sweep import capacity

TILE = 1 << 16
"""Values that are normalized at a time: 256 KiB of float32, which stays in a core's cache."""

KEPT_BY_HEAP = 2 << 20
"""Larger allocations are mapped, and go back to the system when they are freed; see `inference.buffers`."""

PLAN_BYTES, RECORD_BYTES, PIECE_BYTES = 1 << 15, 128, 2048
"""Bookkeeping in the workspace: the plan and its metadata, a ledger record, a piece's metadata."""

LOOKED_AT = 64
"""Blocks per axis that a projection looks at one by one; more of them repeat and are extrapolated."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a voxel, a chunk and a batch weigh.

    Attributes:
        in_voxel: bytes of one voxel of the volume, all channels.
        sum_voxel: bytes of one voxel of the sums, all channels.
        out_voxel: bytes of one voxel of the output, all channels.
        channels: the larger number of channels of sums and output.
        in_chunk: the volume's chunks, in voxels per axis.
        in_chunk_bytes: bytes of one decoded chunk of the volume.
        out_unit_bytes: bytes of one write unit of the output.
        batch: patches per batch.
        model_bytes: bytes that the model adds while it works on a batch, for the one task that calls it.
        batch_bytes: bytes of the batch of one task: patches copied for the model, and its output while it is added.
    """

    in_voxel: int
    sum_voxel: int
    out_voxel: int
    channels: int
    in_chunk: Ints
    in_chunk_bytes: int
    out_unit_bytes: int
    batch: int
    model_bytes: int
    batch_bytes: int

    @property
    def tile(self) -> int:
        """Voxels that are normalized at a time."""
        return max(1, TILE // self.channels)


@dataclass(frozen=True, slots=True)
class Way:
    """How tasks go about their blocks; it changes memory and time, never a byte of the result.

    Attributes:
        aligned: reads along the swept axis end at chunk borders, so that each chunk is decoded once.
        ahead: the next layer is read, and the last one written, while this one is computed.
        io_threads: threads that write chunks, per process; half as many read.
    """

    aligned: bool
    ahead: bool
    io_threads: int


@dataclass(frozen=True, slots=True)
class Projection:
    """What a run will need, in bytes.

    Attributes:
        task_memory: of one task.
        shared_memory: shared by the tasks of one process.
        disk: of the workspace at its fullest.
        bytes_read: decoded input, and workspace.
        bytes_written: output before compression, and workspace.
        parts: the shares of the memory by name, for messages.
    """

    task_memory: int
    shared_memory: int
    disk: int
    bytes_read: int
    bytes_written: int
    parts: tuple[tuple[str, int], ...]

    def memory(self, concurrency: int) -> int:
        """Bytes that a process adds with so many concurrent tasks."""
        return self.shared_memory + concurrency * self.task_memory


@dataclass(frozen=True, slots=True)
class Span:
    """A bound on some blocks' lengths along one axis, in voxels: first block, last block, or all between.

    Attributes:
        position: index of one such block.
        core: longest core.
        halo: longest halo.
        open: longest open part.
        direct: longest direct part.
        patches: longest extent of a block's patches, padding included.
        layers: most patches of a block.
    """

    position: int
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


def axis_totals(axis: BlockAxis, chunk: int) -> AxisTotals:
    """Look at the blocks of one axis, all of them or, of many, one period of the pattern they make."""
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
        spans.append(_span(axis, indices))
        halo += weight * sum(axis.spill(i) for i in indices)
        opened += weight * sum(axis.open(i) for i in indices)
        decoded += weight * sum(chunk_span(*_extent(axis, i), chunk, axis.grid.length) for i in indices)
    return AxisTotals(round(decoded), round(halo), round(opened), tuple(spans))


def _extent(axis: BlockAxis, index: int) -> tuple[int, int]:
    """First and last voxel of a block's patches."""
    patches = axis.patches(index)
    return (axis.grid.start(patches[0]), axis.grid.start(patches[-1]) + axis.grid.patch) if patches else (0, 0)


def _span(axis: BlockAxis, indices: list[int]) -> Span:
    cores = [stop - start for start, stop in map(axis.core, indices)]
    opens = [axis.open(i) for i in indices]
    return Span(
        position=indices[0],
        core=max(cores),
        halo=max(axis.spill(i) for i in indices),
        open=max(opens),
        direct=max(c - o for c, o in zip(cores, opens, strict=True)),
        patches=max(stop - start for start, stop in (_extent(axis, i) for i in indices)),
        layers=max(len(axis.patches(i)) for i in indices),
    )


def layers_per_group(blocks: BlockGrid, totals: tuple[AxisTotals, ...], batch: int) -> int:
    """Layers that are computed together: just enough patches for a batch, in the blocks with most patches."""
    per_layer = math.prod(max(s.layers for s in t.spans) for a, t in enumerate(totals) if a != blocks.sweep)
    return max(1, -(-batch // max(1, per_layer)))


def project(blocks: BlockGrid, totals: tuple[AxisTotals, ...], sizes: Sizes, way: Way, concurrency: int) -> Projection:
    """Memory, disk and traffic of a run with the given blocks.

    Args:
        blocks: the block grid.
        totals: `axis_totals` of each axis.
        sizes: what a voxel, a chunk and a batch weigh.
        way: how tasks go about their blocks.
        concurrency: blocks computed at a time, for the number of blocks whose partials live at a time.
    """
    sweep, shape = blocks.sweep, blocks.grid.shape
    volume = math.prod(shape)
    seams = math.prod(n + t.halo for n, t in zip(shape, totals, strict=True)) - volume
    own = volume - math.prod(n - t.open for n, t in zip(shape, totals, strict=True))
    stored = (seams + own) * sizes.sum_voxel
    group = layers_per_group(blocks, totals, sizes.batch)
    parts = max(
        (_task_parts(blocks, spans, sizes, way, group) for spans in itertools.product(*(t.spans for t in totals))),
        key=lambda found: sum(size for _, size in found),
    )
    largest_unit = max(sizes.in_chunk_bytes, sizes.out_unit_bytes)
    shared = (
        ("model", sizes.model_bytes),
        ("chunks", chunk_bytes(way.io_threads, largest_unit)),
        ("weights", 8 * sum(shape)),
        ("window", 4 * math.prod(blocks.grid.patch_size)),
    )
    swept = totals[sweep].decoded if way.aligned else _decoded_unaligned(blocks, totals[sweep], sizes)
    decoded = swept * math.prod(t.decoded for a, t in enumerate(totals) if a != sweep)
    return Projection(
        task_memory=sum(size for _, size in parts),
        shared_memory=sum(size for _, size in shared),
        disk=_disk(blocks, totals, sizes, stored, concurrency),
        bytes_read=decoded * sizes.in_voxel + stored,
        bytes_written=volume * sizes.out_voxel + stored,
        parts=(*parts, *shared),
    )


def _task_parts(
    blocks: BlockGrid, spans: tuple[Span, ...], sizes: Sizes, way: Way, group: int
) -> tuple[tuple[str, int], ...]:
    """Bytes of the buffers of one task, of the stage that needs more."""
    sweep = blocks.sweep
    axis, swept = blocks.axes[sweep], spans[sweep]
    cross = [s for a, s in enumerate(spans) if a != sweep]
    chunk = sizes.in_chunk[sweep] if way.aligned else 1
    in_planes, sum_planes = capacity(axis.grid, axis.patches(swept.position), group, chunk, ahead=way.ahead)
    reach = math.prod(s.reach for s in cross)
    step = min(blocks.step, swept.reach)
    mixed = math.prod(s.direct for s in cross) * sizes.out_voxel
    mixed += (reach - math.prod(s.closed for s in cross)) * sizes.sum_voxel
    whole = reach * sizes.sum_voxel if swept.halo or swept.open else 0
    tile = min(sizes.tile, step * reach) * (4 + 2 * sizes.sum_voxel + sizes.out_voxel)
    predict = (
        ("input", in_planes * math.prod(s.patches for s in cross) * sizes.in_voxel),
        ("sums", sum_planes * reach * sizes.sum_voxel),
        ("staged", (1 + way.ahead) * step * max(mixed, whole)),
        ("tile", tile),
        ("batch", sizes.batch_bytes),
    )
    received = any(s.open for s in spans) * step * math.prod(s.core for s in cross)
    # own sums, a seam, and a piece as bytes while it is read
    normalize = (("sums", received * 3 * sizes.sum_voxel), ("staged", received * sizes.out_voxel), ("tile", tile))
    return max(predict, normalize, key=lambda found: sum(size for _, size in found))


def _decoded_unaligned(blocks: BlockGrid, totals: AxisTotals, sizes: Sizes) -> int:
    """Voxels decoded along the swept axis when every layer reads just what it needs: chunks it shares come twice."""
    axis, chunk = blocks.axes[blocks.sweep].grid, sizes.in_chunk[blocks.sweep]
    period = min(math.lcm(axis.stride, chunk) // axis.stride, LOOKED_AT)
    spans = [chunk_span(s, s + axis.stride, chunk, axis.length) for s in range(0, period * axis.stride, axis.stride)]
    return max(totals.decoded, round(sum(spans) / len(spans) * axis.count))


def _disk(blocks: BlockGrid, totals: tuple[AxisTotals, ...], sizes: Sizes, stored: int, concurrency: int) -> int:
    """Bytes of partials at the fullest: those of the blocks between a block and its last reader, in C order."""
    bookkeeping = PLAN_BYTES + RECORD_BYTES * 2 * blocks.num_blocks + 8 * sum(blocks.grid.shape)
    if not stored:
        return bookkeeping
    distance, weight = 0, 1
    for count in reversed(blocks.counts):
        distance += weight if count > 1 else 0
        weight *= count
    alive = min(blocks.num_blocks, distance + 1 + 2 * concurrency)
    reach = math.prod(max(s.reach for s in t.spans) for t in totals)
    closed = math.prod(min(s.closed for s in t.spans) for t in totals)
    pieces = alive * PIECE_BYTES * ((1 << len(blocks.axes)) + len(blocks.axes))
    return min(stored, alive * (reach - closed) * sizes.sum_voxel) + pieces + bookkeeping


def chunk_bytes(threads: int, unit_bytes: int) -> int:
    """Bytes of chunks on their way: encoded, decoded and in place in each thread; and what the heap keeps."""
    active = threads + reading(threads)
    return active * 3 * unit_bytes + (active + 10) * min(unit_bytes, KEPT_BY_HEAP)


def reading(threads: int) -> int:
    """Threads that read beside `threads` that write: half as many, since decoding costs half of encoding."""
    return -(-threads // 2)


def io_threads(max_memory: int, unit_bytes: int) -> int:
    """Threads for chunks: up to four, as long as the chunks on their way stay under a quarter of the limit."""
    fitting = (t for t in (4, 3, 2) if chunk_bytes(t, unit_bytes) <= max_memory // 4)
    return next(fitting, 1)
