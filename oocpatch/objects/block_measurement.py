"""The measurement of one block: what it adds to the table, as sorted runs of rows in the workspace."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.engine.stages import TaskResult
from oocpatch.errors import InvalidVolume
from oocpatch.objects import moments, polygons
from oocpatch.objects.columns import TableSchema
from oocpatch.objects.table_parts import PartWriter
from oocpatch.planning.box import Box
from oocpatch.planning.plan import Plan
from oocpatch.progress import OnProgress, TaskDone
from oocpatch.storage.paths import LocalPath
from oocpatch.volumes.content import INTENSITY, LABELS, InputStamps
from oocpatch.volumes.volume import Volume
from oocpatch.workspace.workspace import Workspace

Array = npt.NDArray[Any]
ROWS, CORNERS = "rows", "corners"
"""Names of the tables of a block."""


@dataclass(frozen=True)
class MeasurementContext:
    """Everything that the tasks of one process share.

    Attributes:
        labels, intensity: open for a run.
        name: name of the table's file.
        on_progress: receives an event per block; it raises to stop.
    """

    plan: Plan
    labels: Volume
    intensity: Volume | None
    workspace: Workspace
    name: str
    on_progress: OnProgress

    @cached_property
    def schema(self) -> TableSchema:
        """The columns."""
        return TableSchema.of(self.plan.table or {})

    @property
    def has_polygons(self) -> bool:
        """True where the file has polygons."""
        return self.name.lower().endswith(".geojson")

    @property
    def scratch(self) -> int:
        """Bytes that measuring a block takes beside the block itself."""
        return dict(self.plan.memory_parts)["scratch"]

    def check(self) -> None:
        """Stop if the run is stopped."""
        self.on_progress(TaskDone(0, 0, 0.0))


def measure_block(context: MeasurementContext, block: int) -> TaskResult:
    """Measure the objects in one block.

    Idempotent: writes only below an address of its own.

    Raises:
        InvalidVolume: when a label is negative.
    """
    core, stamps = context.plan.block_grid[block].core, InputStamps()
    context.check()
    labels = _read(context.labels, LABELS, core, stamps)
    labels = labels.view(np.uint8) if labels.dtype == bool else labels
    if labels.dtype.kind == "i" and labels.size and int(labels.min()) < 0:
        raise InvalidVolume(_negative(labels, core, context.plan))
    intensity = None if context.intensity is None else _read(context.intensity, INTENSITY, core, stamps)
    writer = PartWriter(LocalPath(str(context.workspace.folder(block))))
    try:
        for name, rows in measured_tables(context, core, labels, intensity):
            writer.write(name, rows)
        ref = writer.close()
    except BaseException:
        writer.discard()
        raise
    context.on_progress(TaskDone(block, core.size, labels.nbytes))
    return TaskResult(ref, input_stamps=stamps.pack())


def measured_tables(
    context: MeasurementContext, core: Box, labels: Array, intensity: Array | None
) -> Iterator[tuple[str, Array]]:
    """Yield the sorted runs of the tables of a block, mostly one of each: a pure function of what the block holds.

    Args:
        context: the plan, and the file's format.
        core: the block's box.
        labels: `(C, *core.shape)`.
        intensity: `(C, *core.shape)`, or None.
    """
    plan, layout, scratch = context.plan, context.schema.layout, context.scratch
    looped = len(plan.shape) - plan.spatial
    start = core.start[looped:]
    rows = _Runs(ROWS, scratch // (8 * layout.dtype.itemsize), lambda parts: moments.merge(parts, layout))
    dtype = polygons.corner_dtype(layout.indices)
    corners = _Runs(CORNERS, scratch // (8 * dtype.itemsize), polygons.merge_corners)
    segment = min(moments.SEGMENT, scratch // (2 * moments.BYTES_PER_VOXEL))
    for channel, *place in itertools.product(range(plan.in_channels), *map(range, core.shape[:looped])):
        position = [core.start[a] + p for a, p in enumerate(place) if plan.shape[a] > 1]
        index = (*position, channel) if plan.in_channels > 1 else tuple(position)
        values = labels[(channel, *place)]
        of_place = None if intensity is None else np.moveaxis(intensity, 0, looped)[tuple(place)]
        for part in moments.measure(values, of_place, layout, start=start, index=index, segment_size=segment):
            yield from rows.add(part)
        if context.has_polygons:
            lines = max(1, segment // values.shape[1])
            for top in range(0, values.shape[0], lines):
                strip = values[top : top + lines]
                yield from corners.add(polygons.find_corners(strip, (start[0] + top, start[1]), index, dtype))
    yield from rows.flush()
    yield from corners.flush()


class _Runs:
    """Merges rows that come in parts; what does not fit in memory is passed on as a sorted run."""

    def __init__(self, name: str, most: int, merge: Callable[[list[Array]], Array]) -> None:
        self._name, self._most, self._merge = name, most, merge
        self._parts: list[Array] = []
        self._count = 0

    def add(self, part: Array) -> Iterator[tuple[str, Array]]:
        if not len(part):
            return
        self._parts.append(part)
        self._count += len(part)
        if self._count > self._most:
            merged = self._merge(self._parts)
            self._parts, self._count = [merged], len(merged)
            if 2 * self._count > self._most:
                yield from self.flush()

    def flush(self) -> Iterator[tuple[str, Array]]:
        if self._parts:
            yield self._name, self._merge(self._parts)
        self._parts, self._count = [], 0


def _read(volume: Volume, name: str, core: Box, stamps: InputStamps) -> Array:
    """Read a box of a volume, which may have axes of length 1 besides, with stamps of what was read."""
    extra = len(volume.shape) - len(core.shape)
    box = Box((*(0,) * extra, *core.start), (*(1,) * extra, *core.stop))
    out = np.empty((volume.channels, *box.shape), volume.dtype)
    for request, stamped in volume.split_reads(box, out):
        tags = [volume.tags(part) for part in stamped]
        volume.read_into(out[(slice(None), *request.slices(box.start))], request)
        for part, of_part in zip(stamped, tags, strict=True):
            stamps.add(name, part, out[(slice(None), *part.slices(box.start))], of_part)
    return out.reshape(volume.channels, *core.shape)


def _negative(labels: Array, core: Box, plan: Plan) -> str:
    place = np.unravel_index(int(np.argmin(labels)), labels.shape)[1:]
    at = ", ".join(f"{n}={a + int(p)}" for n, a, p in zip(plan.axes, core.start, place, strict=True))
    return f"labels must be 0, where there is no object, or positive, got {int(labels.min())} at {at}"
