"""Projections of memory, disk and traffic of a run, from integers alone.

A run stays within its projection: every buffer of the stages is counted, at the size it is allocated with. A process
needs what its tasks share and, for each concurrent task, the buffers of the stage that needs more:

```text
 shared      model | chunks in coding | weights | windows | uploads (device)
 predict     input ring | sums ring | slabs being written | tile | batch | mask | downloads (device)
 normalize   sums, a seam and its bytes | values being written | tile
```

The constants below that sizes of buffers follow from are those that the engine allocates with. `planner` compares
projections; nothing here chooses.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.box import Ints
from oocpatch.planning.grid import chunk_span
from oocpatch.planning.heads import Head
from oocpatch.planning.sweep import EXAMINED_BLOCKS, AxisTotals, Frame, capacity

TILE = 1 << 16
"""Values that are normalized at a time on the CPU: 256 KiB of float32, which stay in a core's cache."""

DEVICE_TILE = 1 << 20
"""Values that are normalized at a time on a device with its own memory, where each step is a launch."""

READ_BYTES = 1 << 20
"""Most bytes of one read where chunks are smaller; `volumes.volume` splits its reads by it."""

HEAP_LIMIT = 2 << 20
"""Bytes above which an allocation is mapped, and returned to the system when it is freed; see `engine.buffers`."""

PLAN_BYTES, RECORD_BYTES, PIECE_BYTES = 1 << 15, 128, 2048
"""Bytes in the workspace besides sums: of the plan and its metadata, a ledger record, the metadata of a piece."""


@dataclass(frozen=True, slots=True)
class ByteSizes:
    """Bytes of voxels, chunks and batches.

    Attributes:
        in_voxel_bytes: bytes of one voxel of the volume, all channels.
        in_chunks: chunks of the volume, in voxels per axis.
        in_chunk_bytes: bytes of one decoded chunk of the volume.
        context: input of the model beyond its output, in voxels on each side.
        heads: the outputs.
        mask_voxel_bytes: bytes of the mask per voxel of the volume, while it is examined.
        window_bytes: bytes of the windows of all heads.
        batch_size: patches per batch.
        model_bytes: bytes that the model adds while it works on a batch, for the one task that calls it.
        batch_bytes: bytes of the batch of one task: patches copied for the model, and its output while it is added.
        staged: whether input and results go through buffers, since the model's device has memory of its own.
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
        """Bytes of the largest array that is coded in one piece: a chunk of the volume or a write unit of an output."""
        return max(self.in_chunk_bytes, *(math.prod(h.unit) * h.out_voxel_bytes for h in self.heads))


@dataclass(frozen=True, slots=True)
class IoStrategy:
    """Reads and writes of a task beside its computation; they change memory and time, never a byte of the result.

    Attributes:
        aligned_reads: whether reads along the swept axis end at chunk borders, so that each chunk is decoded once.
        prefetch: whether the next group of layers is read, and the last slab written, during computation.
        threads: threads that write chunks, per process; half as many read.
    """

    aligned_reads: bool
    prefetch: bool
    threads: int


@dataclass(frozen=True, slots=True)
class Projection:
    """Memory, disk and traffic of a run, in bytes.

    Attributes:
        task_memory: memory of one task.
        shared_memory: memory that the tasks of one process share.
        disk: size of the workspace at its fullest.
        bytes_read: decoded bytes read from the volume and the workspace.
        bytes_written: uncompressed bytes written to the output and the workspace.
        parts: shares of the memory by name, for messages.
    """

    task_memory: int
    shared_memory: int
    disk: int
    bytes_read: int
    bytes_written: int
    parts: tuple[tuple[str, int], ...]

    def memory(self, concurrency: int) -> int:
        """Return the bytes that a process adds with so many concurrent tasks."""
        return self.shared_memory + concurrency * self.task_memory


def layers_per_group(blocks: BlockGrid, totals: tuple[AxisTotals, ...], batch_size: int) -> int:
    """Return the layers per group: just enough patches for a batch, in the blocks with most patches."""
    per_layer = math.prod(max(s.layers for s in t.spans) for a, t in enumerate(totals) if a != blocks.sweep)
    return max(1, -(-batch_size // max(1, per_layer)))


@dataclass(frozen=True, slots=True)
class Traffic:
    """The part of a projection that takes little time to compute.

    Attributes:
        disk: bytes of the workspace at its fullest.
        bytes_read: decoded bytes read from the volume and the workspace.
        bytes_written: uncompressed bytes written to the output and the workspace.
    """

    disk: int
    bytes_read: int
    bytes_written: int


def traffic(
    frame: Frame, heads: tuple[Frame, ...], sizes: ByteSizes, concurrency: int, *, aligned_reads: bool
) -> Traffic:
    """Return disk and traffic of a run with the given blocks.

    Args:
        frame: the blocks in the volume's frame.
        heads: the blocks in the frame of each head.
        sizes: bytes of voxels, chunks and batches.
        concurrency: blocks computed at a time, on which the number of stored partials depends.
        aligned_reads: as in `IoStrategy`.
    """
    blocks, totals, sweep = frame.blocks, frame.totals, frame.blocks.sweep
    stored = sum((f.seam_voxels + f.open_voxels) * h.sum_voxel_bytes for f, h in zip(heads, sizes.heads, strict=True))
    swept = totals[sweep].decoded if aligned_reads else _decoded_unaligned(blocks, totals[sweep], sizes)
    decoded = swept * math.prod(t.decoded for a, t in enumerate(totals) if a != sweep)
    written = sum(math.prod(f.blocks.grid.shape) * h.out_voxel_bytes for f, h in zip(heads, sizes.heads, strict=True))
    return Traffic(_disk(heads, sizes, stored, concurrency), decoded * sizes.in_voxel_bytes + stored, written + stored)


Parts = tuple[tuple[str, int], ...]
"""Bytes by name."""


def _total(parts: Parts) -> int:
    return sum(size for _, size in parts)


@dataclass(frozen=True)
class MemoryUse:
    """Memory of the tasks of a run with given blocks.

    Attributes:
        frame: the blocks in the volume's frame.
        heads: the blocks in the frame of each head.
        sizes: bytes of voxels, chunks and batches.
        io_strategy: reads and writes of a task beside its computation.
    """

    frame: Frame
    heads: tuple[Frame, ...]
    sizes: ByteSizes
    io_strategy: IoStrategy

    def project(self, moved: Traffic) -> Projection:
        """Return all that the run needs; `moved` is the traffic of the same blocks."""
        every_block = itertools.product(*(range(len(t.spans)) for t in self.frame.totals))
        parts, shared = max(map(self._task, every_block), key=_total), self._shared()
        return Projection(
            task_memory=_total(parts),
            shared_memory=_total(shared),
            disk=moved.disk,
            bytes_read=moved.bytes_read,
            bytes_written=moved.bytes_written,
            parts=(*parts, *shared),
        )

    def lower_bound(self) -> int:
        """Return a lower bound of `Projection.memory(1)`, from one block amid others: a fraction of the time."""
        amid = tuple(len(t.spans) // 2 for t in self.frame.totals)
        return _total(self._shared()) + _total(self._task(amid))

    @cached_property
    def _group(self) -> int:
        return layers_per_group(self.frame.blocks, self.frame.totals, self.sizes.batch_size)

    def _shared(self) -> Parts:
        """Return the bytes that the tasks of a process share."""
        sizes, threads = self.sizes, self.io_strategy.threads
        shared = (
            ("model", sizes.model_bytes),
            ("chunks", chunk_bytes(threads, sizes.unit_bytes)),
            ("weights", 8 * sum(sum(f.blocks.grid.shape) for f in self.heads)),
            ("window", sizes.window_bytes),
        )
        if not sizes.staged:
            return shared
        # in main memory, and on the device, where copies to planes of the ring are contiguous first
        return (*shared, ("uploads", reader_threads(threads) * 2 * read_buffer_bytes(sizes.in_chunk_bytes)))

    def _task(self, which: Ints) -> Parts:
        """Return the bytes of the buffers of one task, in the stage that needs more.

        Args:
            which: per axis, the position of the block's span in the totals.
        """
        sizes, sweep = self.sizes, self.frame.blocks.sweep
        axis = self.frame.blocks.axes[sweep]
        spans = [t.spans[i] for t, i in zip(self.frame.totals, which, strict=True)]
        chunk = sizes.in_chunks[sweep] if self.io_strategy.aligned_reads else 1
        grid, layers = axis.grid.grown(sizes.context[sweep]), spans[sweep].members
        in_planes, _ = capacity(grid, layers, self._group, chunk, prefetch=self.io_strategy.prefetch)
        section = math.prod(s.patches for a, s in enumerate(spans) if a != sweep)
        planes = self.frame.blocks.grid.patch_size[sweep] + (self._group - 1) * axis.grid.stride
        heads = [self._head(f, h, which) for f, h in zip(self.heads, sizes.heads, strict=True)]
        sums, staged, tile = (sum(column) for column in zip(*(predict for predict, _ in heads), strict=True))
        predict = (
            ("input", in_planes * section * sizes.in_voxel_bytes),
            ("sums", sums),
            ("staged", staged),
            ("tile", tile),
            ("batch", sizes.batch_bytes),
            ("mask", math.ceil(planes * section * sizes.mask_voxel_bytes)),
            *((("downloads", self._downloads()),) if sizes.staged else ()),
        )
        # one head after the other
        sums, staged, tile = (max(column) for column in zip(*(normalize for _, normalize in heads), strict=True))
        normalize = (("sums", sums), ("staged", staged), ("tile", tile))
        return max(predict, normalize, key=_total)

    def _head(self, frame: Frame, head: Head, which: Ints) -> tuple[Ints, Ints]:
        """Return the bytes of one head's buffers, of the predict and of the normalize stage: sums, staged, tile."""
        sweep, prefetch = frame.blocks.sweep, self.io_strategy.prefetch
        sum_bytes, out_bytes = head.sum_voxel_bytes, head.out_voxel_bytes
        spans = [t.spans[i] for t, i in zip(frame.totals, which, strict=True)]
        swept, cross = spans[sweep], [s for a, s in enumerate(spans) if a != sweep]
        _, planes = capacity(frame.blocks.axes[sweep].grid, swept.members, self._group, 1, prefetch=prefetch)
        reach = math.prod(s.reach for s in cross)
        step = min(frame.blocks.step, swept.reach)
        mixed = math.prod(s.direct for s in cross) * out_bytes
        mixed += (reach - math.prod(s.closed for s in cross)) * sum_bytes
        whole = reach * sum_bytes if swept.halo or swept.open else 0
        voxels = min(tile_voxels(head.max_channels, staged=self.sizes.staged), step * reach)
        tile = voxels * (4 + 2 * sum_bytes + out_bytes)
        received = any(s.open for s in spans) * step * math.prod(s.core for s in cross)
        return (
            (planes * reach * sum_bytes, (1 + prefetch) * step * max(mixed, whole), tile),
            # sums of the block itself, a seam, and a piece as bytes while it is read
            (received * 3 * sum_bytes, (1 + prefetch) * received * out_bytes, tile),
        )

    def _downloads(self) -> int:
        """Return the bytes of the buffers in main memory that slabs of a device are copied to."""
        return sum(
            pinned_bytes(slab_bytes(f.blocks, f.totals, max(h.sum_voxel_bytes, h.out_voxel_bytes)))
            for f, h in zip(self.heads, self.sizes.heads, strict=True)
        )


def _decoded_unaligned(blocks: BlockGrid, totals: AxisTotals, sizes: ByteSizes) -> int:
    """Return the voxels decoded along the swept axis when layers are read to the voxel: shared chunks count twice."""
    axis, chunk = blocks.axes[blocks.sweep].grid, sizes.in_chunks[blocks.sweep]
    period = min(math.lcm(axis.stride, chunk) // axis.stride, EXAMINED_BLOCKS)
    spans = [chunk_span(s, s + axis.stride, chunk, axis.length) for s in range(0, period * axis.stride, axis.stride)]
    return max(totals.decoded, round(sum(spans) / len(spans) * axis.count))


def _disk(heads: tuple[Frame, ...], sizes: ByteSizes, stored: int, concurrency: int) -> int:
    """Return the bytes of the workspace at its fullest: partials of all blocks between a block and its last reader."""
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
    """Return the voxels of so many channels that are normalized at a time.

    >>> tile_voxels(4), tile_voxels(4, staged=True)
    (16384, 262144)
    """
    return max(1, TILE // channels) * (DEVICE_TILE // TILE if staged else 1)


def slab_bytes(blocks: BlockGrid, totals: tuple[AxisTotals, ...], voxel: int) -> int:
    """Return the largest slab of any block, in bytes, at `voxel` bytes per voxel."""
    reach = [max(span.reach for span in axis.spans) for axis in totals]
    cross = math.prod(n for axis, n in enumerate(reach) if axis != blocks.sweep)
    return min(blocks.step, reach[blocks.sweep]) * cross * voxel


def read_buffer_bytes(chunk: int) -> int:
    """Return the bytes of the buffer of a thread that reads such chunks for a device with its own memory."""
    return pinned_bytes(max(chunk, READ_BYTES))


def pinned_bytes(size: int) -> int:
    """Return the bytes that torch allocates for so many bytes of pinned memory: a power of two.

    >>> pinned_bytes(1 << 20), pinned_bytes((1 << 20) + 1) >> 20
    (1048576, 2)
    """
    return 1 << max(0, size - 1).bit_length()


def chunk_bytes(threads: int, unit_bytes: int) -> int:
    """Return the bytes of chunks in coding: encoded, decoded and in place per thread, and freed ones in the heap."""
    return (threads + reader_threads(threads)) * 3 * unit_bytes + heap_chunk_bytes(threads, unit_bytes)


def heap_chunk_bytes(threads: int, unit_bytes: int) -> int:
    """Return the bytes of freed chunks that the heap may keep."""
    return (threads + reader_threads(threads) + 10) * min(unit_bytes, HEAP_LIMIT)


def reader_threads(threads: int) -> int:
    """Return the number of threads that read beside `threads` that write: half, as decoding costs half of encoding."""
    return -(-threads // 2)


def io_threads(max_memory: int, unit_bytes: int) -> int:
    """Return the threads that write chunks: up to four, while chunks in coding stay under a quarter of the limit.

    >>> io_threads(1 << 30, 1 << 20), io_threads(64 << 20, 1 << 20)
    (4, 1)
    """
    fitting = (t for t in (4, 3, 2) if chunk_bytes(t, unit_bytes) <= max_memory // 4)
    return next(fitting, 1)
