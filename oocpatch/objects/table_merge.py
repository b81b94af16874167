"""The merge of the tables of all blocks, and its way into a file, in bounded memory."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy.typing as npt

from oocpatch.engine.stages import TaskResult
from oocpatch.errors import PlanTooLarge
from oocpatch.objects import moments, polygons
from oocpatch.objects.block_measurement import CORNERS, ROWS, MeasurementContext
from oocpatch.objects.columns import TableSchema
from oocpatch.objects.table_files import Batches, TableFile, open_file
from oocpatch.objects.table_parts import SortedRun, read_ranges, read_runs, samples_per_run
from oocpatch.planning.plan import human
from oocpatch.storage.checksums import measured
from oocpatch.storage.paths import LocalPath
from oocpatch.workspace.ledger import PartialsRef
from oocpatch.workspace.workspace import Workspace

Array = npt.NDArray[Any]

TABLE = "table"
"""Name of the table's file in the workspace."""

ROW_COPIES = 8
"""Bytes that merging a row takes, in its own: it is sorted, shifted, merged, and made into columns."""

CORNER_BYTES = 160
"""Bytes that sorting and tracing a corner takes."""

RUN_BYTES = 1 << 10
"""Bytes that a sorted run takes while it is open, and each of its sampled labels eight more."""


def find_runs(workspace: Workspace, schema: TableSchema, block: int, ref: PartialsRef) -> dict[str, list[SortedRun]]:
    """Return the sorted runs of a block, verified.

    Raises:
        CorruptPartial: when one is missing or damaged.
    """
    dtypes = {ROWS: schema.layout.dtype, CORNERS: polygons.corner_dtype(schema.layout.indices)}
    samples = samples_per_run(workspace.plan.blocks)
    return read_runs(LocalPath(str(workspace.folder(block))), block, ref, dtypes, samples)


def merge_tables(context: MeasurementContext, refs: Mapping[int, PartialsRef]) -> TaskResult:
    """Merge the tables of all blocks by label, and write a row per object to the table's file.

    Idempotent: writes only a new directory in `merged`.

    Returns:
        The attempt with the CRC of the file, and the number of objects, as the text of checksums.

    Raises:
        CorruptPartial: when the table of a block is damaged.
        PlanTooLarge: when there are too many blocks for `max_memory`, or a table that is returned does not fit.
    """
    runs: dict[str, list[SortedRun]] = {ROWS: [], CORNERS: []}
    for block in range(context.plan.blocks):
        context.check()
        for name, of_block in find_runs(context.workspace, context.schema, block, refs[block]).items():
            runs[name] += of_block
    attempt = f"{secrets.randbelow(10**15):015d}"
    folder = context.workspace.merged_folder(attempt)
    folder.make_folder()
    path = LocalPath(str(folder / TABLE))
    file = open_file(path, context.name, context.schema, context.plan.merge_memory)
    try:
        count = _write_objects(context, runs, file)
    except BaseException:
        with contextlib.suppress(Exception):
            file.close()
        raise
    return TaskResult(PartialsRef(measured(path)[1], attempt), unit_checksums=json.dumps(count))


def _write_objects(context: MeasurementContext, runs: dict[str, list[SortedRun]], file: TableFile) -> int:
    """Merge sorted runs by label, write a row per object, close the file, and return how many there are."""
    schema, limit, objects = context.schema, context.plan.merge_memory, 0
    layout = schema.layout
    sizes = {ROWS: ROW_COPIES * layout.dtype.itemsize, CORNERS: CORNER_BYTES}
    open_bytes = sum(RUN_BYTES + 24 * len(run.sample) for of_table in runs.values() for run in of_table)
    if 2 * open_bytes > limit:
        count = sum(map(len, runs.values()))
        raise PlanTooLarge(
            f"merging the tables of {context.plan.blocks:,} blocks needs {human(2 * open_bytes, up=True)} for their "
            f"{count:,} files alone but max_memory is {human(limit)}; raise max_memory"
        )
    batches = Batches(file)
    for tables in read_ranges(runs, sizes, (limit - open_bytes) // 4, context.check):
        rows, starts = moments.sort_rows(tables[ROWS], layout)
        if not len(starts):
            continue
        merged = moments.merge_sorted(rows, starts, layout)
        shapes = _polygons(tables[CORNERS]) if context.has_polygons else None
        batches.write(schema.columns(merged, rows, starts), shapes)
        objects += len(merged)
    batches.close()
    return objects


def _polygons(parts: list[Array]) -> Iterator[list[list[polygons.Ring]]]:
    """Yield the polygons of objects, in the order of their rows; some objects at a time, as Python's take memory."""
    corners = polygons.merge_corners(parts)
    bounds = [0, *polygons.object_starts(corners)[:: polygons.TRACED].tolist()[1:], len(corners)]
    for start, stop in pairwise(bounds):
        yield from polygons.trace(corners[start:stop])
