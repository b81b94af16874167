"""Projections of memory, disk and traffic of a run, from integers alone.

A run stays within its projection: every buffer of the stages is counted, at the size it is allocated with. A process
needs what its tasks share and, for each concurrent task, the buffers of the stage that needs more; what is then left of
`max_memory` may hold the model's tensors from call to call (`planner.with_retained_memory`):

```text
 shared      model * | chunks in coding | weights * | windows * | uploads *
 predict     input ring * | sums ring * | slabs being written * | tile * | batch * | mask | downloads
 normalize   sums, a seam and its bytes | values being written | tile
```

Where the model's device has memory of its own, the parts marked by a star are there, and uploads and downloads are what
they pass through: those are in main memory, too, as are the weights, for the normalize stage. One more block is
normalized beside those that are computed then.

The engine allocates its buffers with the constants below. `planner` compares projections; nothing here chooses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.box import Ints
from oocpatch.planning.grid import chunk_span
from oocpatch.planning.heads import Head
from oocpatch.planning.labelling import LEAST_MERGE_BYTES
from oocpatch.planning.sweep import EXAMINED_BLOCKS, Frame, Span, capacity

TILE = 1 << 16
"""Values that are normalized at a time on the CPU: 256 KiB of float32, which stay in a core's cache."""

DEVICE_TILE = 1 << 20
"""Values that are normalized at a time on a device with its own memory, where each step is a launch."""

ROWS_BYTES = 1 << 20
"""Bytes of a chunk of vectors of patches in the output; each is a row."""

ROWS_FILE_BYTES = 1 << 18
"""Most bytes of a file of rows in the workspace, unless one alone is larger."""

READ_BYTES = 1 << 20
"""Most bytes of one read where chunks are smaller; `volumes.volume` splits its reads by it."""

HEAP_LIMIT = 2 << 20
"""Bytes above which an allocation is mapped, and returned to the system when it is freed; see `engine.buffers`."""

LEAST_MAPPED = 11 << 17
"""Least bytes of an allocation that is mapped: zstd allocates 1.3 MiB for each chunk, again and again."""

OBJECT_FILE_BYTES, OBJECT_CACHE_BYTES = 1 << 17, 8 << 20
"""Bytes of a full file of labels of patches; and of labels, and of files, that are kept in memory for another use."""

VOXELS_PER_OBJECT, BYTES_PER_OBJECT = 256, 64
"""Fewest voxels of an object, on average, that the tables of a block have room for, and the bytes of its rows."""

DEVICE_LIBRARIES = 512 << 20
"""Bytes that cuDNN and cuBLAS may take on a device once they are used: kernels, and workspaces of each thread."""

ON_DEVICE = frozenset({"model", "window", "input", "sums", "staged", "tile", "batch"})
"""Names of parts of the predict stage that are on the model's device alone, where that has memory of its own."""

PLAN_BYTES, RECORD_BYTES, PIECE_BYTES = 1 << 15, 128, 2048
"""Bytes in the workspace besides sums: of the plan and its metadata, a ledger record, the metadata of a piece."""


Parts = tuple[tuple[str, int], ...]
"""Bytes by name."""


@dataclass(frozen=True, slots=True)
class ByteSizes:
    """Bytes of voxels, chunks and batches.

    Attributes:
        in_voxel_bytes: bytes of one voxel of the volume, all channels.
        in_chunks, in_chunk_bytes: chunks of the volume, in voxels per axis, and bytes of one when it is decoded.
        context: input of the model beyond its output, in voxels on each side.
        mask_voxel_bytes: bytes of the mask per voxel of the volume, while it is examined.
        window_bytes: bytes of the windows of all heads.
        batch_size: patches of a batch, that of all calls side by side.
        model_bytes: bytes that a call of the model adds.
        batch_bytes: bytes of the patches of a call: copied for the model, and its output while it is added.
        device_memory: bytes that a process may take on the model's device, if that has memory of its own: input and
            results go through buffers then. None: the model runs in main memory.
        row_bytes: bytes of all vectors of a patch.
        calls: calls of the model at a time, of all tasks of a process, and batches of a task.
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
    device_memory: int | None = None
    row_bytes: int = 0
    calls: int = 1

    @property
    def staged(self) -> bool:
        """Return whether the model's device has memory of its own."""
        return self.device_memory is not None

    @property
    def unit_bytes(self) -> int:
        """Bytes of the largest array that is coded in one piece: a chunk of the volume or a write unit of an output."""
        return max([self.in_chunk_bytes, *(math.prod(h.unit) * h.out_voxel_bytes for h in self.heads)])


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
class Traffic:
    """The part of a projection that takes little time to compute, in bytes.

    Attributes:
        disk: size of the workspace at its fullest.
        bytes_read: decoded bytes read from the volume and the workspace.
        bytes_written: uncompressed bytes written to the output and the workspace.
    """

    disk: int
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True, slots=True)
class Projection(Traffic):
    """Traffic, and memory: in main memory, and on the model's device if it has memory of its own."""

    main: Needs
    device: Needs

    def fits(self, concurrency: int, max_memory: int, device_memory: int | None) -> bool:
        """Return whether a process may have so many concurrent tasks."""
        fits_device = device_memory is None or self.device.memory(concurrency) <= device_memory
        return fits_device and self.main.memory(concurrency) <= max_memory


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of one task, and bytes that the tasks of a process share, by name."""

    of_task: Parts = ()
    shared: Parts = ()

    @property
    def parts(self) -> Parts:
        """All of them."""
        return (*self.of_task, *self.shared)

    @property
    def task_memory(self) -> int:
        """Bytes of one task."""
        return _total(self.of_task)

    def memory(self, concurrency: int) -> int:
        """Return the bytes that a process adds with so many concurrent tasks."""
        return _total(self.shared) + concurrency * self.task_memory


def layers_per_group(frame: Frame, batch_size: int) -> int:
    """Return the layers per group: just enough patches for a batch, in the blocks with most patches."""
    totals = (t for a, t in enumerate(frame.totals) if a != frame.blocks.sweep)
    return max(1, -(-batch_size // max(1, math.prod(max(s.patch_count for s in t.spans) for t in totals))))


def traffic(frame: Frame, heads: tuple[Frame, ...], sizes: ByteSizes, concurrency: int) -> dict[bool, Traffic]:
    """Return disk and traffic of a run whose blocks are given in the frames of the volume and of each head.

    By whether reads along the swept axis end at chunk borders. The number of partials that are stored at a time depends
    on `concurrency`, the blocks computed at a time.
    """
    totals, sweep = frame.totals, frame.blocks.sweep
    stored = sum((f.seam_voxels + f.open_voxels) * h.sum_voxel_bytes for f, h in zip(heads, sizes.heads, strict=True))
    stored += sum(_patch_voxels(f) * f.blocks.grid.num_patches for f, h in _of_objects(heads, sizes))
    swept = {True: totals[sweep].decoded, False: _decoded_unaligned(frame, sizes.in_chunks[sweep])}
    plane = math.prod(t.decoded for a, t in enumerate(totals) if a != sweep) * sizes.in_voxel_bytes
    written = sum(math.prod(f.blocks.grid.shape) * h.out_voxel_bytes for f, h in zip(heads, sizes.heads, strict=True))
    rows = frame.blocks.grid.num_patches * sizes.row_bytes  # in the workspace, and then in the output
    disk = _disk(frame.blocks, heads, sizes, stored, concurrency)
    if rows:
        disk += rows + frame.blocks.num_blocks * (PIECE_BYTES + 2 * rows // ROWS_FILE_BYTES // frame.blocks.num_blocks)
    more, moved = stored + rows, written + stored + 2 * rows
    return {aligned: Traffic(disk, planes * plane + more, moved) for aligned, planes in swept.items()}


def _of_objects(heads: tuple[Frame, ...], sizes: ByteSizes) -> list[tuple[Frame, Head]]:
    """Return the heads of objects, in their frames; their labels take a byte per voxel of a patch at most."""
    return [(f, h) for f, h in zip(heads, sizes.heads, strict=True) if h.has_objects]


def _patch_voxels(frame: Frame) -> int:
    return math.prod(frame.blocks.grid.patch_size)


def _total(parts: Parts) -> int:
    return sum(size for _, size in parts)


def _on_device(parts: Parts, which: bool) -> Parts:
    """Return the parts of the predict stage that are on the device, or the others."""
    return tuple((name, size) for name, size in parts if (name in ON_DEVICE) == which)


@dataclass(frozen=True)
class MemoryUse:
    """Needs of a run with given blocks, in the frames of the volume and of each head; computed when they are asked for.

    Attributes:
        moved: disk and traffic.
    """

    frame: Frame
    heads: tuple[Frame, ...]
    sizes: ByteSizes
    io_strategy: IoStrategy
    moved: Traffic

    @cached_property
    def projection(self) -> Projection:
        """All that the run needs."""
        every_block = itertools.product(*(range(len(t.spans)) for t in self.frame.totals))
        moved = (self.moved.disk, self.moved.bytes_read, self.moved.bytes_written)
        return Projection(*moved, *self._needs(every_block))

    @cached_property
    def least(self) -> tuple[Needs, Needs]:
        """Lower bounds of `projection`, main memory and device, from one block amid others: a fraction of the time."""
        return self._needs([tuple(len(t.spans) // 2 for t in self.frame.totals)])

    def _needs(self, blocks: Iterable[Ints]) -> tuple[Needs, Needs]:
        """Return the most that one of some blocks takes, in main memory and on the device."""
        stages, shared = list(zip(*map(self._stages, blocks), strict=True)), self._shared()
        if not self.sizes.staged:
            return Needs(max(itertools.chain(*stages), key=_total), shared), Needs()
        predict, normalize = stages
        here, there = (max((_on_device(p, which) for p in predict), key=_total) for which in (False, True))
        most = max(normalize, key=_total)
        more = ("weights", dict(shared)["weights"]), ("uploads", dict(shared)["uploads"])
        device = (*_on_device(shared, True), *more, ("libraries", DEVICE_LIBRARIES))
        main = (*_on_device(shared, False), ("normalize", _total(most)))
        return Needs(max(here, most, key=_total), main), Needs(there, device)

    @cached_property
    def _group(self) -> int:
        return layers_per_group(self.frame, self.sizes.batch_size)

    def _shared(self) -> Parts:
        """Return the bytes that the tasks of a process share."""
        sizes, threads = self.sizes, self.io_strategy.threads
        shared = (
            ("model", sizes.calls * sizes.model_bytes),
            ("chunks", chunk_bytes(threads, sizes.unit_bytes)),
            ("weights", 8 * sum(sum(f.blocks.grid.shape) for f in self.heads)),
            ("window", sizes.window_bytes),
        )
        if not sizes.staged:
            return shared
        # as much on the device, where copies to planes of the ring are contiguous first
        return (*shared, ("uploads", reader_threads(threads) * read_buffer_bytes(sizes.in_chunk_bytes)))

    def _stages(self, which: Ints) -> tuple[Parts, Parts]:
        """Return the buffers of a task in each of its stages, by the positions of its spans in the totals."""
        sizes, sweep = self.sizes, self.frame.blocks.sweep
        axis = self.frame.blocks.axes[sweep]
        spans = [t.spans[i] for t, i in zip(self.frame.totals, which, strict=True)]
        chunk = sizes.in_chunks[sweep] if self.io_strategy.aligned_reads else 1
        grid, layers = axis.grid.grown(sizes.context[sweep]), spans[sweep].members
        in_planes, _ = capacity(grid, layers, self._group, chunk, prefetch=self.io_strategy.prefetch)
        section = math.prod(s.extent for a, s in enumerate(spans) if a != sweep)
        planes = self.frame.blocks.grid.patch_size[sweep] + (self._group - 1) * axis.grid.stride
        heads = [self._head(f, h, which) for f, h in zip(self.heads, sizes.heads, strict=True)]
        none = (0, 0, 0)  # a model may give vectors only
        sums, staged, tile = (sum(column) for column in zip(none, *(predict for predict, _ in heads), strict=True))
        rows = math.prod(s.patch_count for s in spans) * sizes.row_bytes
        predict: Parts = (
            ("input", in_planes * section * sizes.in_voxel_bytes),
            ("sums", sums),
            ("staged", staged),
            ("tile", tile),
            ("batch", sizes.calls * sizes.batch_bytes),
            ("mask", math.ceil(planes * section * sizes.mask_voxel_bytes)),
            ("rows", rows + min(rows, max(ROWS_FILE_BYTES, sizes.row_bytes))),
        )
        if sizes.staged:
            slabs = (pinned_bytes(landing_bytes(f, h)) for f, h in zip(self.heads, sizes.heads, strict=True))
            predict = (*predict, ("downloads", sum(slabs)))
        # one head after the other
        sums, staged, tile = (max(column) for column in zip(none, *(normalize for _, normalize in heads), strict=True))
        return predict, (("sums", sums), ("staged", staged), ("tile", tile))

    def _head(self, frame: Frame, head: Head, which: Ints) -> tuple[Ints, Ints]:
        """Return the bytes of one head's buffers, of the predict and of the normalize stage: sums, staged, tile."""
        sweep, prefetch = frame.blocks.sweep, self.io_strategy.prefetch
        sum_bytes, out_bytes = head.sum_voxel_bytes, head.out_voxel_bytes
        spans = [t.spans[i] for t, i in zip(frame.totals, which, strict=True)]
        if head.has_objects:
            return self._objects(frame, head, [s.core for s in spans])
        swept, cross = spans[sweep], [s for a, s in enumerate(spans) if a != sweep]
        _, planes = capacity(frame.blocks.axes[sweep].grid, swept.members, self._group, 1, prefetch=prefetch)
        reach = math.prod(s.reach for s in cross)
        step = min(frame.blocks.step, swept.reach)
        voxels = min(tile_voxels(head.max_channels, staged=self.sizes.staged), step * reach)
        tile = voxels * (4 + 2 * sum_bytes + out_bytes)
        received = any(s.open for s in spans) * step * math.prod(s.core for s in cross)
        return (
            (planes * reach * sum_bytes, (1 + prefetch) * _slab(frame, head, spans), tile),
            # sums of the block itself, a seam, and a piece as bytes while it is read
            (received * 3 * sum_bytes, (1 + prefetch) * received * out_bytes, tile),
        )

    def _objects(self, frame: Frame, head: Head, core: list[int]) -> tuple[Ints, Ints]:
        """Return the same of a head of objects, whose labels are stored patch by patch, and assembled slab by slab."""
        patch, ndim = _patch_voxels(frame), len(core)
        labels = 4 * patch * frame.blocks.grid.num_patches  # of all patches: small volumes need no more
        predict = 40 * patch + 2 * min(OBJECT_FILE_BYTES << ndim, labels)
        tables = max(math.prod(core) // VOXELS_PER_OBJECT * BYTES_PER_OBJECT, LEAST_MERGE_BYTES)
        core[frame.blocks.sweep] = min(frame.blocks.step, core[frame.blocks.sweep])
        slab = math.prod(core) * (16 + 2 * head.out_voxel_bytes)
        cached = 2 * min(OBJECT_CACHE_BYTES + OBJECT_FILE_BYTES, labels) + 8 * patch  # and at least two patches
        return (predict, 0, 0), (slab + 40 * patch + cached, tables, 0)


def _decoded_unaligned(frame: Frame, chunk: int) -> int:
    """Return the voxels decoded along the swept axis when layers are read to the voxel: shared chunks count twice."""
    axis = frame.blocks.axes[frame.blocks.sweep].grid
    period = min(math.lcm(axis.stride, chunk) // axis.stride, EXAMINED_BLOCKS)
    spans = [chunk_span(s, s + axis.stride, chunk, axis.length) for s in range(0, period * axis.stride, axis.stride)]
    return max(frame.totals[frame.blocks.sweep].decoded, round(sum(spans) / len(spans) * axis.count))


def _disk(blocks: BlockGrid, heads: tuple[Frame, ...], sizes: ByteSizes, stored: int, concurrency: int) -> int:
    """Return the bytes of the workspace at its fullest: partials of all blocks between a block and its last reader."""
    axes = sum(sum(f.blocks.grid.shape) for f in heads)
    bookkeeping = PLAN_BYTES + RECORD_BYTES * 2 * blocks.num_blocks + 8 * axes
    if not stored:
        return bookkeeping
    distance, weight = 0, 1
    for count in reversed(blocks.counts):
        distance += weight if count > 1 else 0
        weight *= count
    alive = min(blocks.num_blocks, distance + 1 + 2 * concurrency)
    if _of_objects(heads, sizes):  # what is stored stays until the run is complete
        alive = blocks.num_blocks
    pieces = len(heads) * alive * PIECE_BYTES * ((1 << len(blocks.axes)) + len(blocks.axes))
    partials = 0
    for frame, head in zip(heads, sizes.heads, strict=True):
        reach = math.prod(t.reach for t in frame.totals)
        direct = math.prod(t.shortest_direct for t in frame.totals)
        partials += alive * (reach - direct) * head.sum_voxel_bytes
    if alive == blocks.num_blocks:
        partials = stored
    return min(stored, partials) + pieces + bookkeeping


def tile_voxels(channels: int, *, staged: bool = False) -> int:
    """Return the voxels of so many channels that are normalized at a time."""
    return max(1, TILE // channels) * (DEVICE_TILE // TILE if staged else 1)


def landing_bytes(frame: Frame, head: Head) -> int:
    """Return the most bytes of a slab of any block in main memory; of a head of objects, none is downloaded."""
    if head.has_objects:
        return 0
    pieces = len(frame.totals) + (1 << len(frame.totals))
    return max(_slab(frame, head, spans) for spans in itertools.product(*(t.spans for t in frame.totals))) + 8 * pieces


def _slab(frame: Frame, head: Head, spans: Sequence[Span]) -> int:
    """Return the most bytes of a slab of a block: values, and sums of what waits for neighbours or goes to them."""
    sweep = frame.blocks.sweep
    swept, cross = spans[sweep], [s for a, s in enumerate(spans) if a != sweep]
    reach = math.prod(s.reach for s in cross)
    mixed = math.prod(s.direct for s in cross) * head.out_voxel_bytes
    mixed += (reach - math.prod(s.shortest_direct for s in cross)) * head.sum_voxel_bytes
    whole = reach * head.sum_voxel_bytes if swept.halo or swept.open else 0
    return min(frame.blocks.step, swept.reach) * max(mixed, whole)


def read_buffer_bytes(chunk: int) -> int:
    """Return the bytes of the buffer of a thread that reads such chunks for a device with its own memory."""
    return pinned_bytes(max(chunk, READ_BYTES))


def pinned_bytes(size: int) -> int:
    """Return the bytes that torch allocates for so many bytes of pinned memory: a power of two."""
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
