"""The merge of the tables of all blocks, and its way into a file, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.errors import PlanTooLarge
from oocpatch.objects import moments, polygons
from oocpatch.objects.block_measurement import CORNERS, ROWS, block_folder
from oocpatch.objects.table_files import Batches, TableFile
from oocpatch.objects.table_parts import SortedRun, read_ranges, read_runs, samples_per_run
from oocpatch.objects.table_workspace import TableWorkspace
from oocpatch.planning.plan import human
from oocpatch.workspace.ledger import PartialsRef

Array = npt.NDArray[Any]

ROW_COPIES = 8
"""Bytes that merging a row takes, in its own: it is sorted, shifted, merged, and made into columns."""

CORNER_BYTES = 160
"""Bytes that sorting and tracing a corner takes."""

RUN_BYTES = 1 << 10
"""Bytes that a sorted run takes while it is open, and each of its sampled labels eight more."""


def find_runs(workspace: TableWorkspace, refs: Mapping[int, PartialsRef]) -> dict[str, list[SortedRun]]:
    """Return the sorted runs of all blocks in their order, verified.

    Raises:
        CorruptPartial: when one is missing or damaged.
    """
    schema, blocks = workspace.plan.schema, workspace.plan.blocks
    dtypes = {ROWS: schema.layout.dtype, CORNERS: polygons.corner_dtype(schema.layout.indices)}
    runs: dict[str, list[SortedRun]] = {ROWS: [], CORNERS: []}
    for block in range(blocks):
        runs_of_block = read_runs(
            block_folder(workspace.root, block), block, refs[block], dtypes, samples_per_run(blocks)
        )
        for name, of_block in runs_of_block.items():
            runs[name] += of_block
    return runs


def write_objects(
    workspace: TableWorkspace,
    runs: dict[str, list[SortedRun]],
    file: TableFile,
    advance: Callable[[int], None],
) -> int:
    """Merge sorted runs by label, write a row per object, close the file, and return how many there are.

    Args:
        workspace: the workspace.
        runs: those of the blocks, in their order.
        file: receives the rows.
        advance: called with the number of rows of runs that were merged.

    Raises:
        PlanTooLarge: when there are too many runs for `max_memory`.
    """
    plan, objects = workspace.plan, 0
    layout = plan.schema.layout
    sizes = {ROWS: ROW_COPIES * layout.dtype.itemsize, CORNERS: CORNER_BYTES}
    open_bytes = sum(RUN_BYTES + 24 * len(run.sample) for of_table in runs.values() for run in of_table)
    limit = plan.max_memory - open_bytes
    if 2 * limit < plan.max_memory:
        count = sum(map(len, runs.values()))
        raise PlanTooLarge(
            f"merging the tables of {plan.blocks:,} blocks needs {human(2 * open_bytes, up=True)} for their {count:,} "
            f"files alone but max_memory is {human(plan.max_memory)}; raise max_memory"
        )
    batches = Batches(file)
    for tables in read_ranges(runs, sizes, limit // 4, lambda: None):
        rows, starts = moments.sort_rows(tables[ROWS], layout)
        if not len(starts):
            continue
        merged = moments.merge_sorted(rows, starts, layout)
        shapes = _polygons(tables[CORNERS]) if plan.has_polygons else None
        batches.write(plan.schema.columns(merged, rows, starts), shapes)
        objects += len(merged)
        advance(len(rows))
    batches.close()
    return objects


def _polygons(parts: list[Array]) -> Iterator[list[list[polygons.Ring]]]:
    """Yield the polygons of objects, in the order of their rows; some objects at a time, as Python's take memory."""
    corners = polygons.merge_corners(parts)
    bounds = [0, *polygons.object_starts(corners)[:: polygons.TRACED].tolist()[1:], len(corners)]
    for start, stop in pairwise(bounds):
        yield from polygons.trace(corners[start:stop])


def count_rows(runs: Mapping[str, list[SortedRun]]) -> int:
    """Return the number of rows of all runs."""
    return int(np.sum([run.count for run in runs[ROWS]], dtype=np.int64))
