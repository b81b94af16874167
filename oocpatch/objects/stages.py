"""The stages of labelling, as plain functions over block indices, and the context that they share.

```text
 label_block     volume --> labels of the block --> its table                                   workspace
 merge_blocks    tables of all blocks --> ids                                                    workspace
 relabel_block   volume --> labels of the block, again --> ids in their places                   output
```

The labels of a block are found twice and never stored: to find them takes less time than to write and read them.
All stages are idempotent: they write below addresses of their own, or whole write units of their own block.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from oocpatch.engine.buffers import FutureGroup, buffer, lean_heap
from oocpatch.engine.stages import TaskResult
from oocpatch.errors import TooManyObjects
from oocpatch.objects.block_table import Face, Section, label_section, read_table, write_table
from oocpatch.objects.cache import Cache
from oocpatch.objects.components import replace_labels
from oocpatch.objects.merge import MergeGrid, merge
from oocpatch.objects.merged_ids import IdWriter, read_ids
from oocpatch.outputs.output import Output
from oocpatch.outputs.write_units import WriteChecksums
from oocpatch.planning.blocks import Block
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.labelling import Labelling
from oocpatch.planning.memory import heap_chunk_bytes, reader_threads
from oocpatch.planning.plan import Plan
from oocpatch.progress import OnProgress, TaskDone
from oocpatch.volumes.content import VOLUME, InputStamps
from oocpatch.volumes.volume import Volume
from oocpatch.workspace.ledger import MERGED, PartialsRef
from oocpatch.workspace.workspace import Workspace

Array = npt.NDArray[Any]
PADDING = "edge"
"""Padding mode of reads, none of which leaves the volume."""


@dataclass(frozen=True)
class LabelContext:
    """Everything that the tasks of one process share.

    Attributes:
        read_pool, write_pool: threads for chunks.
        on_progress: receives an event for voxels that were read.
    """

    plan: Plan
    rule: Labelling
    volume: Volume
    workspace: Workspace
    output: Output
    read_pool: Executor
    write_pool: Executor
    on_progress: OnProgress

    @property
    def looped(self) -> int:
        """Number of looped axes."""
        return len(self.plan.axes) - self.plan.spatial

    def report(self, block: Block) -> None:
        """Report the voxels of a block."""
        self.on_progress(TaskDone(block.index, block.core.size, block.core.size * self.plan.bytes_per_patch))

    def check(self) -> None:
        """Stop if the run is stopped."""
        self.on_progress(TaskDone(0, 0, 0.0))


@contextlib.contextmanager
def open_label_context(
    plan: Plan, volume: Volume, workspace: Workspace, output: Output, on_progress: OnProgress
) -> Iterator[LabelContext]:
    """Open what the tasks share: arrays, and threads that read and write."""
    if plan.labelling is None:
        raise RuntimeError("the plan is not one of label")
    threads, head = plan.io_strategy.threads, plan.heads[0]
    unit_bytes = math.prod(head.unit) * head.out_voxel_bytes
    lean_heap(heap_chunk_bytes(threads, max(volume.chunk_bytes, unit_bytes)), max(volume.chunk_bytes, unit_bytes))
    opened = volume.for_run(reader_threads(threads))
    with contextlib.ExitStack() as stack:
        stack.callback(opened.source.close)
        reads = stack.enter_context(ThreadPoolExecutor(reader_threads(threads), thread_name_prefix="oocpatch-read"))
        writes = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="oocpatch-write"))
        stack.enter_context(output.with_chunk_writers(threads))
        yield LabelContext(plan, plan.labelling, opened, workspace, output, reads, writes, on_progress)


def label_block(context: LabelContext, index: int) -> TaskResult:
    """Label a block at each of its indices, and store the table of its objects.

    Idempotent: writes only a new directory in `blocks/<index>`.
    """
    block = context.plan.block_grid[index]
    stamps = InputStamps(context.volume.unit_stamps(block.core, PADDING))
    values = _read(context, block.core, stamps)
    sections = [section for _, _, section in _labelled(context, block, values)]
    del values
    ref = write_table(context.workspace.folder(index), sections)
    context.report(block)
    return TaskResult(ref, input_stamps=stamps.pack())


def relabel_block(context: LabelContext, index: int, refs: Mapping[int, PartialsRef]) -> TaskResult:
    """Label a block again, and write the ids of its objects.

    Idempotent: writes only its own core to the output, whole write units.

    Raises:
        CorruptPartial: when its table or its ids are damaged.
        ValueError: when the volume has changed since the block was labelled first.
    """
    context.check()
    plan, block = context.plan, context.plan.block_grid[index]
    expected = read_table(context.workspace.folder(index), index, refs[index])
    checksums = WriteChecksums(plan, "normalize", index)
    if any(section.count for section in expected):
        head = plan.heads[0]
        values = _read(context, block.core, None)
        result = _mapped((head.out_channels, *block.core.shape), np.dtype(head.out_dtype))
        folder = context.workspace.merged_folder(refs[MERGED].attempt)
        for number, (place, labels, section) in enumerate(_labelled(context, block, values)):
            if (section.count, section.crc) != (expected[number].count, expected[number].crc):
                raise ValueError(
                    "the volume has changed while it was labelled; run the same call with update=True, or start afresh "
                    "with overwrite=True"
                )
            if section.count:
                ids = read_ids(folder, index, number, section.count).astype(result.dtype)
                replace_labels(labels, ids, result[place])
        writing = FutureGroup(context.write_pool)
        try:
            for box in context.output.split_writes(0, block.core):
                part = result[(slice(None), *box.slices(block.core.start))]
                writing.submit(context.output.write, 0, box, part, checksums)
            writing.wait()
        finally:
            writing.cancel_and_wait()
    else:
        context.output.remove_empty(checksums)
    context.report(block)
    return TaskResult(unit_checksums=checksums.pack())


def merge_blocks(context: LabelContext, refs: Mapping[int, PartialsRef]) -> TaskResult:
    """Merge the tables of all blocks, and store the ids of their objects.

    Idempotent: writes only a new directory in `merged`.

    Returns:
        The reference of the ids, with the numbers of objects of all indices, in C order, as the text of checksums.

    Raises:
        CorruptPartial: when the table of a block is damaged.
        PlanTooLarge: when there are more objects at borders between blocks than `max_memory` holds.
        TooManyObjects: when the output's dtype does not hold the ids.
    """
    plan, looped = context.plan, context.looped
    grid = plan.block_grid
    spatial = grid.axes[looped:]
    counts = tuple(axis.count for axis in spatial)
    plane = math.prod(plan.shape[looped + 1 :])
    rows = tuple(spatial[0].core(row)[0] * plane for row in range(spatial[0].count))
    places = MergeGrid(counts, (*rows, spatial[0].grid.length * plane))
    tables = Cache[list[Section]](plan.merge_memory // 4, least=1)

    def table(block: int) -> tuple[list[Section], int]:
        context.check()
        sections = read_table(context.workspace.folder(block), block, refs[block])
        return sections, sum(
            array.nbytes
            for section in sections
            for array in (section.places, section.sizes, section.border, section.classes, *section.faces.values())
        )

    attempt = f"{secrets.randbelow(10**15):015d}"
    writer = IdWriter(context.workspace.merged_folder(attempt))
    found: dict[Ints, int] = {}
    for number, position in enumerate(itertools.product(*(range(axis.count) for axis in grid.axes[:looped]))):
        first = number * len(places)
        spans = [range(*axis.core(p)) for axis, p in zip(grid.axes[:looped], position, strict=True)]
        for section, at in enumerate(itertools.product(*spans, range(plan.in_channels))):
            found[at] = merge(
                places,
                context.rule,
                lambda block, first=first, section=section: tables.get(  # type: ignore[misc]
                    first + block, functools.partial(table, first + block)
                )[section],
                lambda block, piece, ids, first=first, section=section: writer.write(  # type: ignore[misc]
                    first + block, section, piece, ids
                ),
                plan.merge_memory // 2,
            )
    dtype = plan.heads[0].out_dtype
    if max(found.values()) > np.iinfo(dtype).max:
        raise TooManyObjects(max(found.values()), dtype)
    numbers = [found[at] for at in sorted(found)]
    return TaskResult(PartialsRef(writer.digest, attempt), unit_checksums=json.dumps(numbers))


def _labelled(context: LabelContext, block: Block, values: Array) -> Iterator[tuple[tuple[Any, ...], Array, Section]]:
    """Yield the place, the labels and the objects of a block at each of its indices, in C order, channels last."""
    looped = context.looped
    core = Box(block.core.start[looped:], block.core.stop[looped:])
    touching = _touching(block.position[looped:], context.plan.block_grid.counts[looped:])
    for *at, channel in itertools.product(*map(range, block.core.shape[:looped]), range(len(values))):
        place = (channel, *at)
        labels, section = label_section(values[place], context.rule, core, context.plan.shape[looped:], touching)
        yield place, labels, section


def _touching(position: Ints, counts: Ints) -> frozenset[Face]:
    lower = {(axis, 0) for axis, p in enumerate(position) if p > 0}
    return frozenset(lower | {(axis, 1) for axis, (p, n) in enumerate(zip(position, counts, strict=True)) if p + 1 < n})


def _mapped(shape: Ints, dtype: np.dtype[Any]) -> Array:
    """Return an array of zeros whose memory returns to the system when it is dropped."""
    size = math.prod(shape) * dtype.itemsize
    values: Array = buffer((size,), torch.uint8, "cpu").numpy().view(dtype).reshape(shape)
    return values


def _read(context: LabelContext, box: Box, stamps: InputStamps | None) -> Array:
    """Read a box, `(C, *box.shape)`."""
    volume = context.volume
    values = _mapped((volume.channels, *box.shape), volume.dtype)
    reading = FutureGroup(context.read_pool)

    def read(part: Box, stamped: list[Box], target: Array) -> None:
        units = None if stamps is None else stamps.units
        tags = [volume.tags(one, PADDING) for one in stamped] if stamps is not None and units is None else []
        volume.read_into(target, part, PADDING, 0.0, units)
        for one, one_tags in zip(stamped, tags, strict=False):  # none where stored units are stamped
            if stamps is not None:
                stamps.add(VOLUME, one, target[(slice(None), *one.slices(part.start))], one_tags)

    try:
        for part, stamped in volume.split_reads(box, values):
            reading.submit(read, part, stamped, values[(slice(None), *part.slices(box.start))])
        reading.wait()
    finally:
        reading.cancel_and_wait()
    return values
