"""A volume in the order of a file that is written from its start: planes, one after the other, piece by piece.

```text
 slabs of planes that share chunks
   that fit    --> pieces, one read ahead of the one that is written
   that do not --> strips: some rows of all planes of a slab --> temporary file --> pieces
```

So chunks are decoded once where the memory holds the planes that share them, or a few of their rows.
"""

from __future__ import annotations

import itertools
import math
import mmap
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from oocpatch import system
from oocpatch.errors import PlanTooLarge
from oocpatch.planning.box import Box, Ints, cut
from oocpatch.planning.memory import READ_BYTES
from oocpatch.planning.plan import human
from oocpatch.system import usable_cores
from oocpatch.volumes.axes import LOOP_NAMES, Axes
from oocpatch.volumes.volume import Volume

Array = npt.NDArray[Any]
Item = TypeVar("Item")
Result = TypeVar("Result")

COPIES = 3
"""Copies of a chunk that decoding it needs at most, including the encoded one."""

THREADS = 4

ENOUGH = 1 << 25
"""Bytes of a piece beyond which larger ones are not faster."""

OVERHEAD = 1 << 20
"""Bytes for everything that is not counted by itself."""


class Piece(NamedTuple):
    """Some rows of some planes: `values` are `(planes, rows, ...)`, from the plane and the row with these numbers."""

    plane: int
    row: int
    values: Array


@dataclass(frozen=True)
class FileOrder:
    """A volume whose axes are in the order of a file, the slowest first, and how it is read in that order.

    Attributes:
        volume: the volume; its channels are an axis like the others.
        inner: number of axes of a plane, rows first.
        slab: shape of the boxes that follow each other in the file.
        strip: shape of the boxes that are read; smaller than a slab, they pass through a temporary file.
        threads: threads that read.
        rows: rows of a piece are a multiple of these, but for the last of a plane.
    """

    volume: Volume
    inner: int
    slab: Ints
    strip: Ints
    threads: int
    rows: int = 1

    @classmethod
    def plan(
        cls, volume: Volume, names: Sequence[str], inner: int, limit: int, *, rows: int = 1, coding: int = 0
    ) -> FileOrder:
        """Choose the boxes in which a volume is read.

        Args:
            volume: the volume.
            names: all its axes, the slowest of the file first.
            inner: number of axes of a plane.
            limit: bytes of memory.
            rows: rows that are needed together.
            coding: bytes that the writer of the file needs.

        Raises:
            PlanTooLarge: if not even so many rows of a plane fit.

        >>> volume = Volume(np.zeros((8, 64, 64), np.uint8), "zyx")
        >>> order = FileOrder.plan(volume, "zyx", 2, 16 << 20)
        >>> [(piece.plane, piece.row, piece.values.shape) for piece in order.pieces()]
        [(0, 0, (8, 64, 64))]
        """
        volume = _arranged(volume, names)
        chunked = volume.source.chunked
        each = max(COPIES * volume.chunk_bytes, 2 * READ_BYTES if chunked else READ_BYTES)
        row = math.prod(volume.shape[-inner + 1 :]) * volume.dtype.itemsize
        least = min(rows, volume.shape[-inner]) * row
        threads = max(1, min(THREADS, usable_cores(), (limit - coding - OVERHEAD - 2 * least) // each))
        needed = OVERHEAD + coding + threads * each + 2 * least
        if needed > limit:
            raise PlanTooLarge(
                f"{min(rows, volume.shape[-inner])} row(s) of {volume.shape[1 - inner]} voxels need "
                f"{human(needed, up=True)} (chunks of the volume included) but max_memory is {human(limit)}; "
                "raise max_memory, or convert the volume to smaller chunks"
            )
        budget = (limit - OVERHEAD - coding - threads * each) // 2
        chunks = volume.chunks if chunked else (1,) * len(volume.shape)
        slab, strip = _boxes(volume.shape, chunks, inner, itemsize=volume.dtype.itemsize, budget=budget, rows=rows)
        return cls(volume, inner, slab, strip, threads, rows)

    @property
    def planes(self) -> int:
        """Number of planes."""
        return math.prod(self.volume.shape[: -self.inner])

    @property
    def plane(self) -> Ints:
        """Shape of a plane, rows first."""
        return self.volume.shape[-self.inner :]

    @property
    def is_spooled(self) -> bool:
        """Return whether planes pass through a temporary file."""
        return self.slab != self.strip and math.prod(self.slab[: -self.inner]) > 1

    def strips(self) -> Iterator[Piece]:
        """Yield every voxel once, as it is read; values are valid until the next piece."""
        slabs = Box.of_shape(self.volume.shape).split(self.slab)
        boxes = itertools.chain.from_iterable(slab.split(self.strip) for slab in slabs)
        for box, values in _read_ahead(self.volume, boxes, self.strip, self.threads):
            plane = 0
            for start, n in zip(box.start[: -self.inner], self.volume.shape, strict=False):
                plane = plane * n + start
            yield Piece(plane, box.start[-self.inner], values.reshape(-1, *box.shape[-self.inner :]))

    def pieces(self, folder: Path | None = None) -> Iterator[Piece]:
        """Yield every voxel once in the order of the file; values are valid until the next piece.

        A temporary file, if one is needed, lies in `folder` without a name, and disappears with the process.
        """
        if not self.is_spooled:
            yield from self.strips()
            return
        rows, dtype = self.plane[0], self.volume.dtype
        row = math.prod(self.plane[1:]) * dtype.itemsize
        # a strip has rows of all planes of a slab; as many bytes are so many more rows of one plane
        height = math.prod(self.strip[: 1 - self.inner]) // self.rows * self.rows
        with tempfile.TemporaryFile(prefix="oocpatch-", dir=folder) as file:
            for strip in self.strips():
                for number, values in enumerate(strip.values):
                    write_at(file.fileno(), values, (number * rows + strip.row) * row)
                if strip.row + strip.values.shape[1] < rows:
                    continue
                for number, (start, stop) in itertools.product(range(len(strip.values)), cut(0, rows, height)):
                    values = np.empty((1, stop - start, *self.plane[1:]), dtype)
                    _read_at(file.fileno(), values, (number * rows + start) * row)
                    yield Piece(strip.plane + number, start, values)


def _arranged(volume: Volume, names: Sequence[str]) -> Volume:
    """Return a volume with its axes in another order, the channel one of them."""
    own = volume.axes
    free = next(name for name in sorted(LOOP_NAMES) if name not in own.roles)
    roles = tuple(free if a == own.channel else role for a, role in enumerate(own.roles))
    return Volume(volume.source, Axes(own.names, roles, tuple(own.names.index(name) for name in names)))


def _boxes(shape: Ints, chunks: Ints, inner: int, *, itemsize: int, budget: int, rows: int) -> tuple[Ints, Ints]:
    """Return the shapes of slabs and strips.

    >>> _boxes((100, 512, 512), (32, 64, 64), 2, itemsize=1, budget=1 << 24, rows=1)  # planes that share chunks fit
    ((64, 512, 512), (64, 512, 512))
    >>> _boxes((100, 512, 512), (32, 64, 64), 2, itemsize=1, budget=1 << 21, rows=1)  # rows of them do
    ((32, 512, 512), (32, 128, 512))
    >>> _boxes((100, 512, 512), (1, 64, 64), 2, itemsize=1, budget=1 << 17, rows=16)  # no planes share chunks
    ((1, 512, 512), (1, 256, 512))
    """
    outer, plane = shape[:-inner], shape[-inner:]
    row, enough = math.prod(plane[1:]) * itemsize, min(ENOUGH, budget)
    for axis, n in enumerate(outer):
        together = min(chunks[axis], n)
        planes = together * math.prod(outer[axis + 1 :])
        size = planes * plane[0] * row
        is_shared, is_last = together > 1, axis == len(outer) - 1
        if (is_shared and size <= budget) or (is_last and size <= enough):
            slab = (*(1,) * axis, min(n, together * max(1, enough // size)), *outer[axis + 1 :], *plane)
            return slab, slab
    least = min(rows, plane[0])
    depth = min(chunks[len(outer) - 1], outer[-1]) if outer else 1
    depth = -(-depth // -(-depth // max(1, min(depth, budget // (least * row)))))  # parts of equal thickness
    unit = math.lcm(rows, min(chunks[-inner], plane[0]))
    unit = unit if unit * depth * row <= budget else rows
    high = min(plane[0], max(unit, enough // (depth * row) // unit * unit))
    before = (*(1,) * (len(outer) - 1), depth) if outer else ()
    return (*before, *plane), (*before, high, *plane[1:])


def _read_ahead(volume: Volume, boxes: Iterable[Box], shape: Ints, threads: int) -> Iterator[tuple[Box, Array]]:
    """Yield boxes of at most a shape with their values, while the next one is read."""
    size = math.prod(shape) * volume.dtype.itemsize
    # Two mappings, reused: the heap would not return the memory of freed buffers.
    buffers = itertools.cycle([np.frombuffer(mmap.mmap(-1, size), volume.dtype) for _ in range(2)])
    waiting: deque[tuple[Box, Array, list[Future[None]]]] = deque()

    def next_read() -> tuple[Box, Array]:
        box, values, reads = waiting.popleft()
        for read in reads:
            read.result()
        return box, values

    with ThreadPoolExecutor(threads, thread_name_prefix="oocpatch-export") as pool:
        try:
            for box, buffer in zip(boxes, buffers, strict=False):
                values = buffer[: box.size].reshape(1, *box.shape)
                reads = [
                    pool.submit(volume.read_into, values[(slice(None), *read.slices(box.start))], read)
                    for read, _ in volume.split_reads(box, values)
                ]
                waiting.append((box, values[0], reads))
                if len(waiting) > 1:
                    yield next_read()
            while waiting:
                yield next_read()
        finally:
            pool.shutdown(cancel_futures=True)


def in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yield the results of a function in the order of the items; `ahead(threads)` items are taken at a time.

    >>> list(in_order(abs, [-1, 2, -3], 2))
    [1, 2, 3]
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="oocpatch-export") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= ahead(threads):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def ahead(threads: int) -> int:
    """Return how many items `in_order` takes before it waits for the first result."""
    return 2 * threads


def write_at(descriptor: int, values: Array, offset: int) -> None:
    """Write an array at a place of a file."""
    view = np.ascontiguousarray(values).data.cast("B")
    while view:
        written = system.write_at(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _read_at(descriptor: int, out: Array, offset: int) -> None:
    """Fill an array from a place of a file."""
    view = out.data.cast("B")
    while view:
        count = system.read_at(descriptor, view, offset)
        if not count:
            raise OSError(f"a temporary file ends too early, at byte {offset}")
        view, offset = view[count:], offset + count
