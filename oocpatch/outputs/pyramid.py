"""The coarser levels of an OME-Zarr output, computed from the finest one after the engine has written it.

```text
 scale0 --2 x 2 x 2 voxels: mean, or mode of labels--> scale1 --the same--> scale2 ...
```

Each level is computed from the stored level above, region by region of whole write units, so that memory does not grow
with the output. A region depends only on the level above and is written by one task, so writing it twice gives the same
bytes. The number of written regions is recorded in the workspace after they are written. A run is complete when its
pyramids are.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from oocpatch.errors import PlanTooLarge
from oocpatch.outputs.ome_zarr import is_ome_zarr
from oocpatch.outputs.record import require_output
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.plan import Plan, human
from oocpatch.planning.pyramid_levels import pieces, regions, task_memory
from oocpatch.progress import OnProgress, show_progress
from oocpatch.storage.chunk_guard import ChunkGuard
from oocpatch.storage.journal import Journal, read_journal
from oocpatch.storage.paths import StoragePath
from oocpatch.storage.retries import with_retries
from oocpatch.storage.zarrs_codec import StagedArray, ZarrsArray

Array = npt.NDArray[Any]

JOURNAL = "pyramids"
"""Name of the journal in the workspace; a record is a level, and the number of its first regions that are written."""

MOST_WORKERS = 4
OVERHEAD = 1 << 20
"""Bytes for everything that is not counted by itself."""


def mean(values: Array, step: Ints) -> Array:
    """Return the mean of each `step` of voxels, in float64; integers are rounded half to even.

    An odd voxel at the end is used alone.

    >>> mean(np.array([[0, 1, 10], [2, 5, 20]], np.uint8), (2, 2)).tolist()
    [[2, 15]]
    """
    parts = list(_parts(values, step))
    total = parts[0].astype(np.float64)
    for part in parts[1:]:
        total += part
    total /= len(parts)
    return (np.rint(total) if values.dtype.kind in "iu" else total).astype(values.dtype)


def mode(values: Array, step: Ints) -> Array:
    """Return the most frequent label in each `step` of voxels, the smallest of equally frequent ones.

    >>> mode(np.array([[7, 7, 3], [2, 1, 3]]), (2, 2)).tolist(), mode(np.array([[4, 2]]), (1, 2)).tolist()
    ([[7, 3]], [[2]])
    """
    parts = list(_parts(values, step))
    best, most = parts[0].copy(), np.zeros(parts[0].shape, np.uint8)
    for part in parts:
        count = np.zeros(part.shape, np.uint8)
        for other in parts:
            count += part == other
        better = (count > most) | ((count == most) & (part < best))
        np.copyto(best, part, where=better)
        np.copyto(most, count, where=better)
    return best


def _parts(values: Array, step: Ints) -> Iterator[Array]:
    """Yield the first, second, ... voxel of each step; the last voxel of an odd axis is repeated."""
    short = [(0, -n % f) for n, f in zip(values.shape, step, strict=True)]
    if any(end for _, end in short):
        values = np.pad(values, short, mode="edge")  # repeating a voxel changes neither mean nor mode
    for offsets in itertools.product(*map(range, step)):
        yield values[tuple(slice(o, None, f) for o, f in zip(offsets, step, strict=True))]


METHODS: dict[str, Callable[[Array, Ints], Array]] = {"mean": mean, "mode": mode}


@dataclass(frozen=True, slots=True)
class Level:
    """A level that is computed from the one above it.

    Attributes:
        above, array: arrays of the level above and of this one.
        step: voxels of the level above per voxel, per axis.
        method: `mean` or `mode`.
        reader, writer: the same arrays, coded by zarrs if possible.
    """

    above: zarr.Array[Any]
    array: zarr.Array[Any]
    step: Ints
    method: str
    reader: ZarrsArray | None = None
    writer: StagedArray | None = None

    @classmethod
    def open(cls, path: StoragePath, above: str, level: str, method: str) -> Level:
        store = path.store()
        source, target = (zarr.open_array(store, path=name, mode="r+") for name in (above, level))
        pairs = zip(source.shape, target.shape, strict=True)
        return cls(source, target, tuple(1 if m == n else 2 for n, m in pairs), method)

    @property
    def unit(self) -> Ints:
        return tuple(self.array.shards or self.array.chunks)

    @property
    def region(self) -> Ints:
        """Shape of the region that one task writes."""
        return regions(self.array.shape, self.unit, sharded=self.array.shards is not None)

    @property
    def num_regions(self) -> int:
        """Number of regions."""
        return math.prod(-(-n // r) for n, r in zip(self.array.shape, self.region, strict=True))

    @property
    def memory(self) -> int:
        """Bytes that one task needs."""
        above, itemsize = tuple(self.above.chunks), self.array.dtype.itemsize
        return OVERHEAD + task_memory(self.array.shape, above, self.unit, self.step, itemsize)

    def build(self, region: Box) -> None:
        """Compute and write one region. Idempotent: writes only its own, whole write units."""
        write = self.array.__setitem__ if self.writer is None else self.writer.write
        write(region.slices(), self._compute(region))

    def compare(self, region: Box) -> Iterator[tuple[Box, str]]:
        """Yield the write units of a region, each with its problem; an empty text if there is none."""
        guard = ChunkGuard.of(self.array)
        expected = self._compute(region)
        for unit in region.split(self.unit):
            try:
                if guard is not None:
                    guard.check(unit.slices())
                stored = np.asarray(self.array[unit.slices()])
            except (OSError, ValueError, RuntimeError) as error:
                yield unit, f"cannot be read ({type(error).__name__})"
                continue
            is_equal = stored.tobytes() == expected[unit.slices(region.start)].tobytes()
            yield unit, "" if is_equal else "is not what the level above gives"

    def _compute(self, region: Box) -> Array:
        """Compute a region, piece by piece."""
        out = np.empty(region.shape, self.array.dtype)
        for piece in region.split(pieces(self.region, tuple(self.above.chunks), self.step)):
            starts = (a * f for a, f in zip(piece.start, self.step, strict=True))
            stops = (min(b * f, n) for b, f, n in zip(piece.stop, self.step, self.above.shape, strict=True))
            source = Box(tuple(starts), tuple(stops))
            if self.reader is None:
                values = np.asarray(self.above[source.slices()])
            else:
                values = np.empty(source.shape, self.above.dtype)
                self.reader.read_into(values, source.slices())
            out[piece.slices(region.start)] = METHODS[self.method](values, self.step)
        return out

    @contextlib.contextmanager
    def with_zarrs(self, threads: int) -> Iterator[Level]:
        """Return the same level, coded by threads of zarrs if it is installed."""
        writer = StagedArray.open(self.array, threads)
        try:
            yield replace(self, reader=ZarrsArray.open(self.above, threads), writer=writer)
        finally:
            if writer is not None:
                writer.close()


def coarser_levels(path: StoragePath) -> Iterator[tuple[str, Level]]:
    """Yield the names and levels of an output's pyramids without the finest ones, each after the level above it."""
    record = require_output(path)
    for pyramid in record.details.get("pyramids", ()):
        yield from levels_below(path, pyramid["levels"], pyramid["method"])


def levels_below(path: StoragePath, names: Sequence[str], method: str) -> Iterator[tuple[str, Level]]:
    """Yield the names and levels of a pyramid without the finest one, given the names of all its arrays."""
    for above, name in itertools.pairwise(names):
        yield name, Level.open(path, above, name, method)


def compare_pyramids(output: StoragePath) -> Iterator[tuple[str, str, Box, str]]:
    """Compare the write units of an output's coarser levels with the levels above: array, key, box and problem.

    The problem is empty if there is none. A level below a damaged one is left out, since it cannot be compared.
    """
    damaged: set[str] = set()
    for name, level in coarser_levels(output):
        if level.above.path in damaged:
            damaged.add(name)
            continue
        for region in Box.of_shape(level.array.shape).split(level.region):
            for unit, problem in level.compare(region):
                position = tuple(a // n for a, n in zip(unit.start, level.unit, strict=True))
                yield name, level.array.metadata.encode_chunk_key(position), unit, problem
                if problem:
                    damaged.add(name)


def build_pyramids(
    output: StoragePath,
    workspace: StoragePath,
    *,
    max_memory: int,
    workers: int,
    progress: str | bool | OnProgress = "none",
) -> None:
    """Build the missing part of the pyramids of an output whose finest levels are complete, if it has any."""
    levels = list(coarser_levels(output))
    build_levels(levels, workspace / JOURNAL, max_memory=max_memory, workers=workers, progress=progress)


def build_levels(
    levels: Sequence[tuple[str, Level]],
    journal_path: StoragePath,
    *,
    max_memory: int,
    workers: int,
    progress: str | bool | OnProgress,
) -> None:
    """Build the missing part of levels, each after the one above it, and record what is written in a journal.

    As many regions are built at a time as there are workers, if `max_memory` bytes suffice.
    """
    recorded: dict[str, int] = dict(read_journal(journal_path))
    done = {name: min(recorded.get(name, 0), level.num_regions) for name, level in levels}
    total = sum(level.num_regions for _, level in levels)
    resumed = sum(done.values())
    if resumed == total:
        return
    each = sum(level.array.nbytes for _, level in levels) / total
    with (
        show_progress(progress, "pyramid", "regions", total, resumed=resumed, bytes_each=each) as advance,
        Journal(journal_path) as journal,
    ):
        for name, level in levels:
            if done[name] < level.num_regions:
                at_a_time = max(1, min(workers, MOST_WORKERS, max_memory // level.memory))
                for written in _build(level, done[name], at_a_time):
                    done[name] += written
                    journal.append([name, done[name]])
                    journal.commit(if_due=True)
                    advance(written)


def _build(level: Level, first: int, at_a_time: int) -> Iterator[int]:
    """Build the regions of one level from a number on, and yield how many are written each time."""
    boxes = itertools.islice(Box.of_shape(level.array.shape).split(level.region), first, None)
    with level.with_zarrs(at_a_time) as coded, ThreadPoolExecutor(at_a_time, "oocpatch-pyramid") as pool:
        build = with_retries(coded.build)
        while group := list(itertools.islice(boxes, at_a_time)):
            list(pool.map(build, group))
            yield len(group)


def with_pyramids(plan: Plan, max_memory: int) -> Plan:
    """Return the plan with the memory that its pyramids need.

    Raises:
        PlanTooLarge: if that exceeds the limit.
    """
    if not is_ome_zarr(plan) or not plan.heads:
        return plan
    needed = OVERHEAD + max(_task_memory(plan, number) for number in range(len(plan.heads)))
    if needed > max_memory:
        raise PlanTooLarge(
            f"one write unit of the pyramid needs {human(needed, up=True)} but max_memory is {human(max_memory)}; "
            "raise max_memory, lower output_shards or output_chunks, or write output_format='zarr'"
        )
    return replace(plan, projected_memory=max(plan.projected_memory, needed))


def _task_memory(plan: Plan, number: int) -> int:
    """Return the bytes that a task of the finest coarser level of a head needs."""
    head, looped = plan.heads[number], len(plan.axes) - plan.spatial

    def insert(channels: int, sizes: Ints) -> Ints:
        return sizes if head.channel_axis is None else (*sizes[:looped], channels, *sizes[looped:])

    shape = insert(head.out_channels, plan.frames[number].grid.shape)
    step = insert(1, (1,) * looped + (2,) * plan.spatial)
    return task_memory(shape, insert(1, head.chunks), insert(1, head.unit), step, np.dtype(head.out_dtype).itemsize)
