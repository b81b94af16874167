"""The stages after the prediction of a model of objects, as plain functions over block indices.

```text
 predict_block     model --> objects of each patch                                          workspace
 assemble_block    patches that meet the core --> first voxels of objects, pairs            workspace: a table
 merge_instances   tables of all blocks --> ids                                             workspace
 write_objects     patches that meet the core, again --> ids in their places                output
```

The objects of a core are assembled twice and never stored. All stages are idempotent: they write below addresses of
their own, or whole write units of their own block.
"""

from __future__ import annotations

import itertools
import json
import math
import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np

from oocpatch.engine.buffers import buffer, torch_dtype
from oocpatch.engine.device_transfer import HostStaging
from oocpatch.engine.normalize import Counts
from oocpatch.engine.partial_sums import FilledPiece, SlabPiece
from oocpatch.engine.stages import IN_MEMORY, Refs, SlabWriter, TaskContext, TaskResult
from oocpatch.errors import InvalidVolume, TooManyObjects
from oocpatch.objects.cache import Cache
from oocpatch.objects.instance_table import InstanceSection, decode_sections, encode_sections, make_table, merge_table
from oocpatch.objects.merge import MergeGrid
from oocpatch.objects.merged_ids import IdWriter, read_ids
from oocpatch.objects.neighbourhood import Neighbourhood
from oocpatch.outputs.write_units import WriteChecksums
from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.box import Ints
from oocpatch.planning.plan import Plan
from oocpatch.workspace.ledger import MERGED, PartialsRef, table_key
from oocpatch.workspace.partials import PartialReader

TABLE = "table"
"""Name of the file with the table of a head."""


def assemble_block(context: TaskContext, index: int, refs: Refs) -> TaskResult:
    """Assemble the objects of a block's core from the patches that meet it, and store the table of each head.

    Idempotent: writes only a new directory in `blocks/<index>`.

    Raises:
        CorruptPartial: when the objects of a patch are damaged.
    """
    writer = context.workspace.writer(index)
    try:
        for number, match in _heads(context.plan):
            around = _neighbourhood(context, index, number, refs)
            table = make_table(around, _looped(context.plan), match, lambda: context.report(index, 0))
            writer.write_file(number, TABLE, encode_sections(table))
        return TaskResult(writer.close())
    finally:
        writer.discard()


def write_objects(context: TaskContext, index: int, number: int, refs: Refs, checksums: WriteChecksums) -> Counts:
    """Assemble the objects of a block's core again, and write their ids, slab by slab.

    Idempotent: writes only its own core to the output, whole write units.

    Raises:
        CorruptPartial: when the objects of a patch, the table or the ids are damaged.
    """
    plan = context.plan
    head, around = plan.heads[number], _neighbourhood(context, index, number, refs)
    ids = np.zeros(around.count + 1, head.out_dtype)
    folder = context.workspace.merged_folder(refs[MERGED].attempt) / str(number)
    for section, table in enumerate(_sections(context, index, number, refs[table_key(index)])):
        ids[table.numbers] = read_ids(folder, index, section, len(table.numbers))[1:]
    writer, counts = SlabWriter(context, HostStaging(IN_MEMORY, 0), checksums, partials=None), Counts()
    try:
        for slab in around.slabs():
            context.report(index, 0)
            objects, uncovered = around.assemble(slab)
            values = buffer((1, *slab.shape), torch_dtype(head.out_dtype), "cpu")
            array = values.numpy()[0]
            np.take(ids, objects, out=array, mode="clip")  # without the mode, numpy copies the result
            if uncovered is not None:
                counts += Counts(int(np.count_nonzero(uncovered)))
                array[uncovered] = plan.output_fill
            writer.flush_slab(slab, [FilledPiece(SlabPiece(None, around.core, slab, number), values)])
        writer.pending.wait()
    finally:
        writer.pending.cancel_and_wait()
    return counts


def merge_instances(context: TaskContext, refs: Refs) -> TaskResult:
    """Merge the tables of all blocks, and store the ids of their objects.

    Idempotent: writes only a new directory in `merged`.

    Returns:
        The reference of the ids, with the numbers of objects at all places of looped axes, as the text of checksums; of
        several heads by their names.

    Raises:
        CorruptPartial: when the table of a block is damaged.
        PlanTooLarge: when there are more objects than `max_memory` holds.
        InvalidVolume: when the output's dtype does not hold the ids.
    """
    plan, counts_by_head, digest = context.plan, {}, 0
    counts: list[int] = []
    attempt = f"{secrets.randbelow(10**15):015d}"
    for number, _ in _heads(plan):
        writer = IdWriter(context.workspace.merged_folder(attempt) / str(number))
        counts_by_head[plan.heads[number].name] = counts = _merge_head(context, number, refs, writer)
        digest ^= writer.digest
        count, dtype = max(counts), plan.heads[number].out_dtype
        if count > np.iinfo(dtype).max:
            error = TooManyObjects(count, dtype)
            raise error if len(plan.heads) == 1 else InvalidVolume(str(error))
    numbers = json.dumps(counts_by_head if len(plan.heads) > 1 else counts)
    return TaskResult(PartialsRef(digest or 1, attempt), unit_checksums=numbers)


def _merge_head(context: TaskContext, number: int, refs: Refs, writer: IdWriter) -> list[int]:
    """Give ids to the objects of one head, and return the number at each place of looped axes."""
    plan, frame, looped = context.plan, context.plan.frames[number], _looped(context.plan)
    tables: Cache[list[InstanceSection]] = Cache(plan.merge_memory // 4)

    def section_of(block: int, section: int) -> InstanceSection:
        def load() -> tuple[list[InstanceSection], int]:
            context.report(block, 0)
            sections = _sections(context, block, number, refs[table_key(block)])
            return sections, sum(one.nbytes for one in sections)

        return tables.get(block, load)[section]

    places, counts = _merge_grid(frame, looped), {}
    for first, section, at in _places(frame, looped, len(places)):

        def write(block: int, piece: int, ids: Any, first: int = first, section: int = section) -> None:
            writer.write(first + block, section, piece, ids)

        def read(block: int, first: int = first, section: int = section) -> InstanceSection:
            return section_of(first + block, section)

        counts[at] = merge_table(places, read, write, plan.merge_memory // 2)
    return [counts[at] for at in sorted(counts)]


def _merge_grid(frame: BlockGrid, looped: int) -> MergeGrid:
    """Return the blocks of one place of the looped axes."""
    first, *others = frame.axes[looped:]
    plane = math.prod(axis.grid.length for axis in others)
    rows = [first.core(row)[0] * plane for row in range(first.count)]
    return MergeGrid(frame.counts[looped:], (*rows, first.grid.length * plane))


def _places(frame: BlockGrid, looped: int, blocks: int) -> Iterator[tuple[int, int, Ints]]:
    """Yield each place on the looped axes with the first of its blocks, and its section in their tables."""
    loops = frame.axes[:looped]
    for number, position in enumerate(itertools.product(*(range(axis.count) for axis in loops))):
        spans = [range(*axis.core(p)) for axis, p in zip(loops, position, strict=True)]
        for section, at in enumerate(itertools.product(*spans)):
            yield number * blocks, section, at


def _heads(plan: Plan) -> list[tuple[int, float]]:
    """Return the numbers of the heads of objects, each with its least intersection over union."""
    return [(number, head.match) for number, head in enumerate(plan.heads) if head.match is not None]


def _looped(plan: Plan) -> int:
    return len(plan.axes) - plan.spatial


def _neighbourhood(context: TaskContext, index: int, number: int, refs: Refs) -> Neighbourhood:
    def read(block: int) -> PartialReader:
        return context.workspace.reader(block, refs[block])

    return Neighbourhood(context.plan.frames[number], index, number=number, looped=_looped(context.plan), read=read)


def _sections(context: TaskContext, block: int, number: int, ref: PartialsRef) -> list[InstanceSection]:
    reader = context.workspace.table_reader(block, ref)
    content = reader.read_file(number, TABLE)
    if content is None:
        raise reader.missing(TABLE)
    return decode_sections(content)
