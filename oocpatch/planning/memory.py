"""Projections: memory, disk and traffic of a run, from integers alone.

What the projection promises the run keeps: every buffer of the stages is counted, at the size it is allocated with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.box import Ints
from oocpatch.planning.grid import chunk_span
from oocpatch.planning.heads import Head
from oocpatch.planning.sweep import EXAMINED_BLOCKS, AxisTotals, Frame, capacity

TILE = 1 << 16
"""Values that are normalized at a time: 256 KiB of float32, which stays in a core's cache."""

DEVICE_TILE = 1 << 20
"""The same where the model's device has memory of its own."""

READ_BYTES = 1 << 20
"""Bytes that one read gives at most, where it goes through a buffer and chunks are smaller; see `storage.volume`."""

HEAP_LIMIT = 2 << 20
"""Larger allocations are mapped, and go back to the system when they are freed; see `inference.buffers`."""

PLAN_BYTES, RECORD_BYTES, PIECE_BYTES = 1 << 15, 128, 2048
"""Bookkeeping in the workspace: the plan and its metadata, a ledger record, a piece's metadata."""


@dataclass(frozen=True, slots=True)
class ByteSizes:
    """What a voxel, a chunk and a batch weigh.

    Attributes:
        in_voxel_bytes: bytes of one voxel of the volume, all channels.
        in_chunks: the volume's chunks, in voxels per axis.
        in_chunk_bytes: bytes of one decoded chunk of the volume.
        context: voxels that the model takes beyond its output, on each side.
        heads: the outputs.
        mask_voxel_bytes: bytes of the mask per voxel of the volume, while it is looked at.
        window_bytes: of the windows of all heads.
        batch_size: patches per batch.
        model_bytes: bytes that the model adds while it works on a batch, for the one task that calls it.
        batch_bytes: bytes of the batch of one task: patches copied for the model, and its output while it is added.
        staged: whether what is read and written goes through buffers, since the model's device has memory of its own.
    """

    in_voxel_bytes: int
    in_chunks: Ints
    in_chunk_bytes: int
    context: Ints
    heads: tuple[Head, ...]
    mask_voxel_bytes: float
    window_bytes: int
    batch_size: int
    model_bytes: int
    batch_bytes: int
    staged: bool = False

    @property
    def unit_bytes(self) -> int:
        """Bytes of the largest thing that is coded in one piece: a chunk of the volume or a write unit of an output."""
        return max(self.in_chunk_bytes, *(math.prod(h.unit) * h.out_voxel_bytes for h in self.heads))


@dataclass(frozen=True, slots=True)
class IoStrategy:
    """How tasks go about their blocks; it changes memory and time, never a byte of the result.

    Attributes:
        aligned_reads: reads along the swept axis end at chunk borders, so that each chunk is decoded once.
        prefetch: the next layer is read, and the last one written, while this one is computed.
        threads: threads that write chunks, per process; half as many read.
    """

    aligned_reads: bool
    prefetch: bool
    threads: int


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


def layers_per_group(blocks: BlockGrid, totals: tuple[AxisTotals, ...], batch: int) -> int:
    """Layers that are computed together: just enough patches for a batch, in the blocks with most patches."""
    per_layer = math.prod(max(s.layers for s in t.spans) for a, t in enumerate(totals) if a != blocks.sweep)
    return max(1, -(-batch // max(1, per_layer)))


@dataclass(frozen=True, slots=True)
class Traffic:
    """The part of a projection that takes little to find.

    Attributes:
        disk, bytes_read, bytes_written: as in a projection.
    """

    disk: int
    bytes_read: int
    bytes_written: int


def traffic(
    frame: Frame, heads: tuple[Frame, ...], sizes: ByteSizes, concurrency: int, *, aligned_reads: bool
) -> Traffic:
    """Disk and traffic of a run with the given blocks.

    Args:
        frame: the blocks in the volume's frame.
        heads: the blocks in the frame of each head.
        sizes: what a voxel, a chunk and a batch weigh.
        concurrency: blocks computed at a time, for the number of blocks whose partials live at a time.
        aligned_reads: as in `IoStrategy`.
    """
    blocks, totals, sweep = frame.blocks, frame.totals, frame.blocks.sweep
    stored = sum((f.seams + f.own) * h.sum_voxel_bytes for f, h in zip(heads, sizes.heads, strict=True))
    swept = totals[sweep].decoded if aligned_reads else _decoded_unaligned(blocks, totals[sweep], sizes)
    decoded = swept * math.prod(t.decoded for a, t in enumerate(totals) if a != sweep)
    written = sum(math.prod(f.blocks.grid.shape) * h.out_voxel_bytes for f, h in zip(heads, sizes.heads, strict=True))
    return Traffic(_disk(heads, sizes, stored, concurrency), decoded * sizes.in_voxel_bytes + stored, written + stored)


def project(
    frame: Frame, heads: tuple[Frame, ...], sizes: ByteSizes, io_strategy: IoStrategy, moved: Traffic
) -> Projection:
    """All that a run with the given blocks will need; arguments as for `traffic`, whose result `moved` is."""
    every = itertools.product(*(range(len(t.spans)) for t in frame.totals))
    task = _of_a_task(frame, heads, sizes, io_strategy)
    parts = max(map(task, every), key=_total)
    shared = _shared(heads, sizes, io_strategy)
    return Projection(
        task_memory=_total(parts),
        shared_memory=_total(shared),
        disk=moved.disk,
        bytes_read=moved.bytes_read,
        bytes_written=moved.bytes_written,
        parts=(*parts, *shared),
    )


def least_memory(frame: Frame, heads: tuple[Frame, ...], sizes: ByteSizes, io_strategy: IoStrategy) -> int:
    """A bound from below of `Projection.memory(1)`, in a fraction of the time: that of a block amid others."""
    amid = tuple(len(t.spans) // 2 for t in frame.totals)
    return _total(_shared(heads, sizes, io_strategy)) + _total(_of_a_task(frame, heads, sizes, io_strategy)(amid))


Parts = tuple[tuple[str, int], ...]


def _total(parts: Parts) -> int:
    return sum(size for _, size in parts)


def _shared(heads: tuple[Frame, ...], sizes: ByteSizes, io_strategy: IoStrategy) -> Parts:
    """Bytes that the tasks of a process share."""
    return (
        ("model", sizes.model_bytes),
        ("chunks", chunk_bytes(io_strategy.threads, sizes.unit_bytes)),
        ("weights", 8 * sum(sum(f.blocks.grid.shape) for f in heads)),
        ("window", sizes.window_bytes),
        # in main memory, and on the device, where copies to planes of the ring are contiguous first
        *(
            (("uploads", reader_threads(io_strategy.threads) * 2 * read_buffer_bytes(sizes.in_chunk_bytes)),)
            if sizes.staged
            else ()
        ),
    )


def _of_a_task(
    frame: Frame, heads: tuple[Frame, ...], sizes: ByteSizes, io_strategy: IoStrategy
) -> Callable[[Ints], Parts]:
    """The bytes of the buffers of one task, as a function of which of the totals' spans its block lies in."""
    group = layers_per_group(frame.blocks, frame.totals, sizes.batch_size)
    return lambda which: _task_parts(frame, heads, which, sizes=sizes, io_strategy=io_strategy, group=group)


def _task_parts(
    frame: Frame, heads: tuple[Frame, ...], which: Ints, *, sizes: ByteSizes, io_strategy: IoStrategy, group: int
) -> Parts:
    """Bytes of the buffers of one task, of the stage that needs more.

    Args:
        frame: the blocks in the volume's frame.
        heads: the blocks in the frame of each head.
        which: per axis, which of the totals' spans the block lies in.
        sizes: as for `project`.
        io_strategy: as for `project`.
        group: layers that are computed together.
    """
    sweep = frame.blocks.sweep
    axis = frame.blocks.axes[sweep]
    spans = [t.spans[i] for t, i in zip(frame.totals, which, strict=True)]
    chunk = sizes.in_chunks[sweep] if io_strategy.aligned_reads else 1
    layers = spans[sweep].members
    in_planes, _ = capacity(axis.grid.grown(sizes.context[sweep]), layers, group, chunk, prefetch=io_strategy.prefetch)
    section = math.prod(s.patches for a, s in enumerate(spans) if a != sweep)
    planes = frame.blocks.grid.patch_size[sweep] + (group - 1) * axis.grid.stride
    predict = {
        "input": in_planes * section * sizes.in_voxel_bytes,
        "sums": 0,
        "staged": 0,
        "tile": 0,
        "batch": sizes.batch_bytes,
        "mask": math.ceil(planes * section * sizes.mask_voxel_bytes),
    }
    normalize = {"sums": 0, "staged": 0, "tile": 0}
    for head_frame, head in zip(heads, sizes.heads, strict=True):
        for parts, more in zip(
            (predict, normalize),
            _head_parts(head_frame, head, which, io_strategy, group, staged=sizes.staged),
            strict=True,
        ):
            for name, size in more.items():
                parts[name] = parts.get(name, 0) + size if parts is predict else max(parts[name], size)
    return max((tuple(p.items()) for p in (predict, normalize)), key=lambda found: sum(size for _, size in found))


def _head_parts(
    frame: Frame, head: Head, which: Ints, io_strategy: IoStrategy, group: int, *, staged: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """The share of one head in the buffers of a task: of the predict stage, of the normalize stage."""
    sweep = frame.blocks.sweep
    axis = frame.blocks.axes[sweep]
    spans = [t.spans[i] for t, i in zip(frame.totals, which, strict=True)]
    swept, cross = spans[sweep], [s for a, s in enumerate(spans) if a != sweep]
    _, sum_planes = capacity(axis.grid, swept.members, group, 1, prefetch=io_strategy.prefetch)
    reach = math.prod(s.reach for s in cross)
    step = min(frame.blocks.step, swept.reach)
    mixed = math.prod(s.direct for s in cross) * head.out_voxel_bytes
    mixed += (reach - math.prod(s.closed for s in cross)) * head.sum_voxel_bytes
    whole = reach * head.sum_voxel_bytes if swept.halo or swept.open else 0
    tile = min(tile_voxels(head.max_channels, staged=staged), step * reach) * (
        4 + 2 * head.sum_voxel_bytes + head.out_voxel_bytes
    )
    predict = {
        "sums": sum_planes * reach * head.sum_voxel_bytes,
        "staged": (1 + io_strategy.prefetch) * step * max(mixed, whole),
        "tile": tile,
    }
    if staged:
        predict["downloads"] = pinned_bytes(
            slab_bytes(frame.blocks, frame.totals, max(head.sum_voxel_bytes, head.out_voxel_bytes))
        )
    received = any(s.open for s in spans) * step * math.prod(s.core for s in cross)
    # own sums, a seam, and a piece as bytes while it is read
    writing = (1 + io_strategy.prefetch) * received * head.out_voxel_bytes
    normalize = {"sums": received * 3 * head.sum_voxel_bytes, "staged": writing, "tile": tile}
    return predict, normalize


def _decoded_unaligned(blocks: BlockGrid, totals: AxisTotals, sizes: ByteSizes) -> int:
    """Voxels decoded along the swept axis when every layer reads just what it needs: chunks it shares come twice."""
    axis, chunk = blocks.axes[blocks.sweep].grid, sizes.in_chunks[blocks.sweep]
    period = min(math.lcm(axis.stride, chunk) // axis.stride, EXAMINED_BLOCKS)
    spans = [chunk_span(s, s + axis.stride, chunk, axis.length) for s in range(0, period * axis.stride, axis.stride)]
    return max(totals.decoded, round(sum(spans) / len(spans) * axis.count))


def _disk(heads: tuple[Frame, ...], sizes: ByteSizes, stored: int, concurrency: int) -> int:
    """Bytes of partials at the fullest: those of the blocks between a block and its last reader, in C order."""
    blocks = heads[0].blocks
    axes = sum(sum(f.blocks.grid.shape) for f in heads)
    bookkeeping = PLAN_BYTES + RECORD_BYTES * 2 * blocks.num_blocks + 8 * axes
    if not stored:
        return bookkeeping
    distance, weight = 0, 1
    for count in reversed(blocks.counts):
        distance += weight if count > 1 else 0
        weight *= count
    alive = min(blocks.num_blocks, distance + 1 + 2 * concurrency)
    pieces = len(heads) * alive * PIECE_BYTES * ((1 << len(blocks.axes)) + len(blocks.axes))
    partials = 0
    for frame, head in zip(heads, sizes.heads, strict=True):
        reach = math.prod(max(s.reach for s in t.spans) for t in frame.totals)
        closed = math.prod(min(s.closed for s in t.spans) for t in frame.totals)
        partials += alive * (reach - closed) * head.sum_voxel_bytes
    return min(stored, partials) + pieces + bookkeeping


def tile_voxels(channels: int, *, staged: bool = False) -> int:
    """Voxels of so many channels that are normalized at a time; many, where each step is a launch on a device."""
    return max(1, TILE // channels) * (DEVICE_TILE // TILE if staged else 1)


def slab_bytes(blocks: BlockGrid, totals: tuple[AxisTotals, ...], voxel: int) -> int:
    """Bytes that leave a block in one step of its sweep at most, at so many per voxel: the same for all blocks."""
    reach = [max(span.reach for span in axis.spans) for axis in totals]
    cross = math.prod(n for axis, n in enumerate(reach) if axis != blocks.sweep)
    return min(blocks.step, reach[blocks.sweep]) * cross * voxel


def read_buffer_bytes(chunk: int) -> int:
    """Bytes of the buffer of a thread that reads chunks of so many bytes for a device with memory of its own."""
    return pinned_bytes(max(chunk, READ_BYTES))


def pinned_bytes(size: int) -> int:
    """Bytes that so many take of memory which is pinned: torch makes a power of two of them.

    >>> pinned_bytes(1 << 20), pinned_bytes((1 << 20) + 1) >> 20
    (1048576, 2)
    """
    return 1 << max(0, size - 1).bit_length()


def chunk_bytes(threads: int, unit_bytes: int) -> int:
    """Bytes of chunks on their way: encoded, decoded and in place in each thread; and what the heap keeps."""
    return (threads + reader_threads(threads)) * 3 * unit_bytes + heap_chunk_bytes(threads, unit_bytes)


def heap_chunk_bytes(threads: int, unit_bytes: int) -> int:
    """The part of it that the heap may keep when they are freed."""
    return (threads + reader_threads(threads) + 10) * min(unit_bytes, HEAP_LIMIT)


def reader_threads(threads: int) -> int:
    """Threads that read beside `threads` that write: half as many, since decoding costs half of encoding."""
    return -(-threads // 2)


def io_threads(max_memory: int, unit_bytes: int) -> int:
    """Threads for chunks: up to four, as long as the chunks on their way stay under a quarter of the limit."""
    fitting = (t for t in (4, 3, 2) if chunk_bytes(t, unit_bytes) <= max_memory // 4)
    return next(fitting, 1)
