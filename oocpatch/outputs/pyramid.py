"""The coarser levels of an OME-Zarr output, made of the finest one when the engine has written it.

```text
 scale0 --2 x 2 x 2 voxels: mean, or mode of labels--> scale1 --the same--> scale2 ...
```

Level by level, each from the stored one above, region by region of whole write units, so that memory does not grow with
the output. Every region depends on the level above alone and is written by one task: done twice, it has the same
bytes. What is done is noted in the workspace, after it is written. Part of a run, which is complete when its pyramids
are; knows nothing of plans, models and blocks but where the arrays are.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from oocpatch.errors import PlanTooLarge
from oocpatch.outputs.ome_zarr import ome_version
from oocpatch.outputs.record import inspect_output
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.plan import Plan, human
from oocpatch.planning.pyramid_levels import pieces, regions, task_memory
from oocpatch.progress import show_progress
from oocpatch.storage.chunk_guard import ChunkGuard
from oocpatch.storage.files import write_atomically
from oocpatch.storage.paths import Address, store_at
from oocpatch.storage.retries import with_retries
from oocpatch.storage.zarrs_codec import StagedArray, ZarrsArray

Array = npt.NDArray[Any]

NOTE_SECONDS = 2.0
"""How often it is noted what is done."""

MOST_WORKERS = 4
OVERHEAD = 1 << 20
"""Bytes for what is not counted one by one."""


def mean(values: Array, step: Ints) -> Array:
    """The mean of each `step` of voxels, in float64; integers are rounded half to even.

    An odd voxel at the end stands for itself.

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
    """The most frequent label among each `step` of voxels, the smallest of equals.

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
    """The first, second, ... voxel of each step; where there is none, the one before it along that axis."""
    short = [(0, -n % f) for n, f in zip(values.shape, step, strict=True)]
    if any(end for _, end in short):
        values = np.pad(values, short, mode="edge")  # twice the same counts as once
    for offsets in itertools.product(*map(range, step)):
        yield values[tuple(slice(o, None, f) for o, f in zip(offsets, step, strict=True))]


METHODS: dict[str, Callable[[Array, Ints], Array]] = {"mean": mean, "mode": mode}


@dataclass(frozen=True, slots=True)
class Level:
    """One level that is made of the one above it.

    Attributes:
        above, array: the arrays.
        step: voxels of the one above per voxel, per axis.
        method: how they become one.
        above_coder, staged: the same arrays, coded by zarrs where that can be.
    """

    above: zarr.Array[Any]
    array: zarr.Array[Any]
    step: Ints
    method: str
    above_coder: ZarrsArray | None = None
    staged: StagedArray | None = None

    @classmethod
    def open(cls, path: Address, above: str, level: str, method: str) -> Level:
        store = store_at(path)
        source, target = (zarr.open_array(store, path=name, mode="r+") for name in (above, level))
        pairs = zip(source.shape, target.shape, strict=True)
        return cls(source, target, tuple(1 if m == n else 2 for n, m in pairs), method)

    @property
    def unit(self) -> Ints:
        return tuple(self.array.shards or self.array.chunks)

    @property
    def region(self) -> Ints:
        """Shape of what one task writes."""
        return regions(self.array.shape, self.unit, sharded=self.array.shards is not None)

    @property
    def regions(self) -> int:
        """How many there are."""
        return math.prod(-(-n // r) for n, r in zip(self.array.shape, self.region, strict=True))

    @property
    def memory(self) -> int:
        """Bytes that one task adds."""
        above, itemsize = tuple(self.above.chunks), self.array.dtype.itemsize
        return OVERHEAD + task_memory(self.array.shape, above, self.unit, self.step, itemsize)

    def make(self, region: Box) -> None:
        """Compute and write one region. Idempotent: writes only its own, whole write units."""
        out = self._computed(region)
        if self.staged is None:
            self.array[region.slices()] = out
        else:
            self.staged.write(region.slices(), out)

    def compare(self, region: Box) -> Iterator[tuple[Box, str]]:
        """The write units of a region, each with what is wrong with it, if anything."""
        guard = ChunkGuard.of(self.array)
        expected = self._computed(region)
        for unit in region.split(self.unit):
            try:
                if guard is not None:
                    guard.check(unit.slices())
                stored = np.asarray(self.array[unit.slices()])
            except (OSError, ValueError, RuntimeError) as error:
                yield unit, f"cannot be read ({type(error).__name__})"
                continue
            same = stored.tobytes() == expected[unit.slices(region.start)].tobytes()
            yield unit, "" if same else "is not what the level above gives"

    def _computed(self, region: Box) -> Array:
        out = np.empty(region.shape, self.array.dtype)
        for piece in region.split(pieces(self.region, tuple(self.above.chunks), self.step)):
            starts = (a * f for a, f in zip(piece.start, self.step, strict=True))
            stops = (min(b * f, n) for b, f, n in zip(piece.stop, self.step, self.above.shape, strict=True))
            values = self._read(tuple(slice(a, b) for a, b in zip(starts, stops, strict=True)))
            out[piece.slices(region.start)] = METHODS[self.method](values, self.step)
        return out

    def _read(self, selection: tuple[slice, ...]) -> Array:
        if self.above_coder is None:
            return np.asarray(self.above[selection])
        out = np.empty([s.stop - s.start for s in selection], self.above.dtype)
        self.above_coder.read_into(out, selection)
        return out

    @contextlib.contextmanager
    def with_zarrs(self, threads: int) -> Iterator[Level]:
        """The same level, coded by threads of zarrs where it is installed."""
        staged = StagedArray.open(self.array, threads)
        try:
            yield replace(self, above_coder=ZarrsArray.open(self.above, threads), staged=staged)
        finally:
            if staged is not None:
                staged.close()


class PyramidProgress:
    """How many regions of each level are done, in a file of the workspace."""

    def __init__(self, path: Address) -> None:
        self._path = path
        self._done: dict[str, int] = {}
        self._written = time.monotonic()
        with contextlib.suppress(OSError, ValueError):  # what cannot be read is done again
            self._done = {str(k): int(v) for k, v in json.loads(path.read_text()).items()}

    def done(self, level: str) -> int:
        return self._done.get(level, 0)

    def note(self, level: str, count: int, *, now: bool = False) -> None:
        """Note that the first `count` regions are written."""
        self._done[level] = count
        if now or time.monotonic() - self._written > NOTE_SECONDS:
            write_atomically(self._path, json.dumps(self._done))
            self._written = time.monotonic()


def levels_of(path: Address) -> Iterator[tuple[str, Level]]:
    """All levels of an output's pyramids that are to be made, those above first, with their names."""
    record = inspect_output(path)
    assert record is not None
    for pyramid in record.details.get("pyramids", ()):
        names: Sequence[str] = pyramid["levels"]
        for above, name in itertools.pairwise(names):
            yield name, Level.open(path, above, name, pyramid["method"])


def compare_pyramids(output: Address) -> Iterator[tuple[str, str, Box, str]]:
    """The write units of an output's coarser levels: array, key, voxels, and what is wrong, if anything.

    A level below a damaged one is left out: it follows from what was there before.
    """
    damaged: set[str] = set()
    for name, level in levels_of(output):
        if level.above.path in damaged:
            damaged.add(name)
            continue
        for region in Box.of_shape(level.array.shape).split(level.region):
            for unit, problem in level.compare(region):
                place = tuple(a // n for a, n in zip(unit.start, level.unit, strict=True))
                yield name, level.array.metadata.encode_chunk_key(place), unit, problem
                if problem:
                    damaged.add(name)


def build_pyramids(
    output: Address, workspace: Address, *, max_memory: int, workers: int, progress: str | bool = "none"
) -> None:
    """Make what is not yet made of an output's pyramids; nothing where it has none.

    Args:
        output: the output; its finest levels are complete.
        workspace: where it is noted what is done.
        max_memory: bytes that it may add to this process.
        workers: regions at a time, if the memory is enough.
        progress: how to tell how far it is.
    """
    notes = PyramidProgress(workspace / "pyramids.json")
    levels = list(levels_of(output))
    total = sum(level.regions for _, level in levels)
    done = sum(min(notes.done(name), level.regions) for name, level in levels)
    if done == total:
        return
    each = sum(level.array.nbytes for _, level in levels) / total
    with show_progress(progress, "pyramid", "regions", total, resumed=done, bytes_each=each) as tell:
        for name, level in levels:
            if notes.done(name) < level.regions:
                at_a_time = max(1, min(workers, MOST_WORKERS, max_memory // level.memory))
                _build(name, level, notes, at_a_time, tell)


def _build(name: str, level: Level, notes: PyramidProgress, at_a_time: int, tell: Callable[[int], None]) -> None:
    """Make what is left of one level."""
    done = notes.done(name)
    boxes = itertools.islice(Box.of_shape(level.array.shape).split(level.region), done, None)
    with level.with_zarrs(at_a_time) as coded, ThreadPoolExecutor(at_a_time, "oocpatch-pyramid") as pool:
        make = with_retries(coded.make)
        while group := list(itertools.islice(boxes, at_a_time)):
            list(pool.map(make, group))
            done += len(group)
            notes.note(name, done)
            tell(len(group))
    notes.note(name, level.regions, now=True)


def with_pyramids(plan: Plan, max_memory: int) -> Plan:
    """The plan, with what its pyramids need.

    Raises:
        PlanTooLarge: when that is more than is allowed.
    """
    if ome_version(plan) is None:
        return plan
    needed = OVERHEAD + max(_task_memory(plan, number) for number in range(len(plan.heads)))
    if needed > max_memory:
        raise PlanTooLarge(
            f"one write unit of the pyramid needs {human(needed, up=True)} but max_memory is {human(max_memory)}; "
            "raise max_memory, lower output_shards or output_chunks, or write output_format='zarr'"
        )
    return replace(plan, projected_memory=max(plan.projected_memory, needed))


def _task_memory(plan: Plan, number: int) -> int:
    head, looped = plan.heads[number], len(plan.axes) - plan.spatial
    shape = tuple(-(-n * times // per) for n, (times, per) in zip(plan.shape, head.scale, strict=True))
    channel = () if head.channel_axis is None else (1,)

    def laid(sizes: Ints, channels: Ints = channel) -> Ints:
        return (*sizes[:looped], *channels, *sizes[looped:])

    step = laid((1,) * looped + (2,) * plan.spatial)
    full = laid(shape, (head.out_channels,) if channel else ())
    return task_memory(full, laid(head.chunks), laid(head.unit), step, np.dtype(head.out_dtype).itemsize)
