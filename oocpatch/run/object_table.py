"""Tables of objects: one call that measures the blocks of a volume of labels and merges what they have by label."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from oocpatch.errors import CorruptPartial, OutputBusy, OutputExists, RunMismatch
from oocpatch.execution.array_job import ArrayJobPart, busy_holder
from oocpatch.execution.scheduler import REPAIRS, Executor, Run
from oocpatch.objects.table_files import FORMATS, FrameCollector, TableFile
from oocpatch.objects.table_merge import count_rows, find_runs, write_objects
from oocpatch.objects.table_workspace import (
    TableRecord,
    TableWorkspace,
    find_table,
    publish,
    record_path,
    remove_table,
    remove_workspace,
    staging_path,
)
from oocpatch.planning.plan import differences
from oocpatch.progress import OnProgress, show_progress
from oocpatch.provenance import run_facts
from oocpatch.run.input_changes import InputChanges, changed_parts, compare_inputs
from oocpatch.run.table_config import TableConfig
from oocpatch.run.table_tasks import cluster_tasks, thread_tasks
from oocpatch.storage.locks import beside, clear_dead, holder, locked, locked_in_turn, locks
from oocpatch.storage.paths import LocalPath, StoragePath
from oocpatch.workspace.ledger import WHOLE, Ledger, LedgerTail, Record, open_ledger, segments

logger = logging.getLogger("oocpatch")


def objects(
    labels: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    intensity: Any = None,
    properties: Sequence[str] = ("area", "bbox", "centroid"),
    spacing: float | Sequence[float] | Mapping[str, float] | None = None,
    axes: str | Sequence[str] | None = None,
    level: int | str = 0,
    block_shape: int | Sequence[int] | Mapping[str, int] | None = None,
    max_memory: int | float | str = "auto",
    workers: int | None = None,
    processes: bool = False,
    client: Any = None,
    part: tuple[int, int] | None = None,
    workspace: str | os.PathLike[str] | None = None,
    resume: bool = True,
    overwrite: bool = False,
    update: bool = False,
    check_input: bool = True,
    progress: str | bool | OnProgress = "auto",
) -> Any:
    """Measure the objects of a volume of labels: a table with one row per object, whatever the size of the volume.

    The volume is read once, block by block. Areas, boxes and centroids are exact, and the table is the same for every
    schedule. An interrupted call leaves nothing at `output`, and the same call continues it.

    Args:
        labels: as a volume for `predict`; integers, where voxels of one value are one object, and 0 is none. Indices
            of time and channel have objects of their own, each with its index in a column of the axis' name.
        output: the file to write: `.parquet`, `.csv`, `.geojson` (polygons, of two spatial axes), `.h5ad` (AnnData);
            None: the table is returned.
        intensity: volume of the extent of the labels, of which each channel is measured.
        properties: columns to compute: `area`, `bbox`, `centroid`, `equivalent_diameter`, `axis_major_length`,
            `axis_minor_length`, `orientation`, `principal_axes`; of an intensity all of `mean`, `min`, `max` and `std`,
            or those that are named.
        spacing: size of a voxel, for all axes, per axis or by their names; default: from the coordinates of the labels.
        axes: names of the axes of the labels, e.g. `"zyx"`.
        level: level of a pyramid; 0 is the largest.
        block_shape: spatial shape of a block, in voxels; default: chosen by memory and workers.
        max_memory: limit in bytes of what the call adds to a process; `"auto"`: a quarter of the machine's.
        workers: threads, or with `client` processes; default: one per core, or all.
        processes: compute in `workers` processes of this machine instead of threads.
        client: a `dask.distributed.Client` to compute on.
        part: `(i, n)`: measure only the i-th of n parts; the last one to end writes the table.
        workspace: directory of what is measured until the table is complete; default: beside the output.
        resume: continue an interrupted call; False: refuse.
        overwrite: replace a table that oocpatch wrote.
        update: where the input changed since, measure again.
        check_input: compare the input of a complete table with what it was made of.
        progress: as for `predict`.

    Returns:
        The path of the table, or the table as a `pandas.DataFrame`, with the units of its columns in `attrs`. With
        `part`, None while other parts are not done.

    Raises:
        ValueError, TypeError: for bad arguments, before any voxel is read.
        InvalidVolume: when a label is negative.
        OutputExists: if there is something else at `output`.
        OutputBusy: if another call is writing it.
        RunMismatch: if a table with other arguments, or of other input, was written or begun there.
        PlanTooLarge: if not even one block, or the table that is returned, fits the memory limit.
        BlockFailed: if blocks failed; the same call measures them again.

    >>> import numpy as np
    >>> objects(np.array([[7, 7, 0], [0, 7, 3]])).to_dict("list")
    {'label': [3, 7], 'area': [1, 3], 'bbox_y_start': [1, 0], 'bbox_y_stop': [2, 2], 'bbox_x_start': [2, 0],
    'bbox_x_stop': [3, 2], 'centroid_y': [1.0, 0.333...], 'centroid_x': [2.0, 0.666...]}
    """
    config = TableConfig.of(
        labels,
        output,
        intensity=intensity,
        properties=properties,
        spacing=spacing,
        axes=axes,
        level=level,
        block_shape=block_shape,
        max_memory=max_memory,
        workers=workers,
        processes=processes,
        client=client,
        part=part,
        workspace=workspace,
        resume=resume,
        overwrite=overwrite,
        update=update,
        check_input=check_input,
        progress=progress,
    )
    return _frame(config) if config.output is None else _table(config, config.output)


def _frame(config: TableConfig) -> Any:
    """Return a table that is not stored."""
    above = None if config.workspace is None else config.workspace
    if above is not None:
        above.make_folder()
    with tempfile.TemporaryDirectory(prefix="oocpatch-", dir=above) as folder:
        workspace = TableWorkspace.create(LocalPath(folder) / "table", config.plan)
        frame = FrameCollector(config.plan.schema, config.plan.max_memory)
        with open_ledger(workspace.root, WHOLE) as ledger:
            _measure_and_merge(config, workspace, ledger, frame)
        return frame.frame()


def _table(config: TableConfig, output: LocalPath) -> LocalPath | None:
    """Write a table, or continue one; return its path, or None while other parts are not done."""
    process = busy_holder(output, None if config.part is None else ArrayJobPart(*config.part))
    if process is not None:
        raise OutputBusy(_busy(output, process))
    record, root = _stored_table(config, output), config.root(output)
    if record is not None and not config.overwrite:
        changes = InputChanges()
        if config.check_input or config.update:
            changes = _changes(config, [record_path(output)], record.plan.blocks, lambda *_: True)
        if not changes:
            _clear(root, output)
            return output
        if not config.update:
            raise RunMismatch(_changed_message(output, changes), changes.names)
        config = replace(config, overwrite=True)  # what blocks have was deleted: all are measured again
    output.parent.mkdir(parents=True, exist_ok=True)
    if config.part is not None:
        return _run_part(config, output, ArrayJobPart(*config.part))
    with locked(beside(output, ".lock"), str(output)):
        process = next(filter(None, map(holder, locks(output)[1:])), None)
        if process is not None:  # a part that began meanwhile
            raise OutputBusy(_busy(output, process))
        if find_table(output) == record:
            workspace = _set_up(config, output)
            workspace.join()
            with open_ledger(workspace.root, WHOLE) as ledger:
                _complete(config, output, workspace, ledger, time.monotonic())
            return output
    return _table(config, output)  # another call was at work since this one looked


def _stored_table(config: TableConfig, output: LocalPath) -> TableRecord | None:
    """Return the record of a complete table of the same arguments, or any that is to be replaced.

    Raises:
        OutputExists, RunMismatch: when this call must not touch what is there.
    """
    record, begun = find_table(output), TableWorkspace.find(config.root(output))
    if config.overwrite:
        return record
    stored = record.plan if record is not None else begun.plan if begun is not None else None
    if stored is None:
        return None
    if not config.resume:
        state = "complete" if record is not None else "incomplete"
        raise OutputExists(f"{output} is there ({state}) and resume is off; pass overwrite=True to replace it")
    differing = differences(config.plan.parameters, stored.parameters)
    if config.block_shape is not None and config.plan.core != stored.core:
        differing["block_shape"] = (config.plan.core, stored.core)
    if differing:
        values = "; ".join(f"{name}: {old!r} before, {new!r} now" for name, (new, old) in differing.items())
        raise RunMismatch(
            f"{output} belongs to a run with other parameters ({values}); repeat its call, choose another output, or "
            "start afresh with overwrite=True",
            tuple(differing),
        )
    return record


def _busy(output: LocalPath, process: str) -> str:
    return f"another run is at work on {output} ({process}); wait for it, or stop it first"


def _set_up(config: TableConfig, output: LocalPath) -> TableWorkspace:
    """Return the workspace to continue, without what other input gave; or a new one, and no table."""
    root = config.root(output)
    begun = None if config.overwrite else TableWorkspace.find(root)
    if begun is None:
        remove_table(output)
        return TableWorkspace.create(root, config.plan)
    workspace = TableWorkspace(root, begun.plan.resumed(config.plan.max_memory, config.workers))
    progress = workspace.progress()

    def counts(block: int, attempt: str) -> bool:
        return block in progress.partials and progress.partials[block].attempt == attempt

    changes = _changes(config, segments(root), workspace.plan.blocks, counts)
    if changes and not config.update:
        raise RunMismatch(_changed_message(output, changes), changes.names)
    if changes:
        with workspace.ledger() as ledger:
            for block in changes.blocks:
                ledger.append(Record("undone", block, note=progress.partials[block].attempt))
    return workspace


def _changes(
    config: TableConfig, ledgers: Sequence[StoragePath], blocks: int, counts: Callable[[int, str], bool]
) -> InputChanges:
    """Compare the input with the stamps of what blocks have read."""
    inputs = {name: volume.for_run(1) for name, volume in config.inputs.items()}
    try:
        return compare_inputs(
            inputs,
            ledgers,
            blocks,
            counts=counts,
            changed=functools.partial(changed_parts, inputs),
            progress=config.progress,
        )
    finally:
        for volume in inputs.values():
            volume.source.close()


def _changed_message(output: LocalPath, changes: InputChanges) -> str:
    return (
        f"{output} was measured on other input ({changes} since); measure what changed again with update=True, choose "
        "another output, or start afresh with overwrite=True"
    )


def _clear(root: LocalPath, output: LocalPath) -> None:
    """Delete what a crash after success may have left."""
    remove_workspace(root)
    for lock in locks(output):
        clear_dead(lock)


@contextlib.contextmanager
def _tasks(
    config: TableConfig, workspace: TableWorkspace, blocks: Collection[int], done: Collection[int]
) -> Iterator[Executor]:
    """Open what measures blocks, with a display of their progress."""
    plan = workspace.plan
    with contextlib.ExitStack() as stack:
        on_progress: OnProgress
        if callable(config.progress):
            on_progress = config.progress
        else:
            resumed = sum(plan.core_of(i).size for i in blocks if i in done)
            total = sum(plan.core_of(i).size for i in blocks)
            advance = stack.enter_context(
                show_progress(
                    config.progress, "objects", "voxels", total, resumed=resumed, bytes_each=plan.bytes_per_voxel
                )
            )
            on_progress = lambda event: advance(event.patches)  # noqa: E731
        client = config.client
        if config.processes:
            from oocpatch.execution.dask_clients import connected  # noqa: PLC0415 - a second of imports

            client = stack.enter_context(connected(None, config.workers or 1))
        inputs = (workspace, config.labels, config.intensity, on_progress)
        if client is None:
            tasks = thread_tasks(*inputs)
        else:
            tasks = cluster_tasks(*inputs, client=client, processes=config.workers)
        yield stack.enter_context(tasks)


def _measure_and_merge(config: TableConfig, workspace: TableWorkspace, ledger: Ledger, file: TableFile) -> int:
    """Measure what is not done yet, and write the rows of all objects; return how many there are."""
    plan, progress = workspace.plan, workspace.progress()
    workspace.sweep(progress)
    blocks = range(plan.blocks)
    for repairs in range(REPAIRS + 1):
        if len(progress.partials) < plan.blocks:
            with _tasks(config, workspace, blocks, progress.partials) as executor:
                stages = Run(plan.block_grid, progress, ledger, lambda _: None, to_predict=blocks, to_normalize=())
                stages.execute(executor)
        try:
            runs = find_runs(workspace, progress.partials)
            break
        except CorruptPartial as error:
            if repairs == REPAIRS:
                raise
            logger.warning("%s; measuring block %d again", error, error.block)
            record = Record("undone", error.block, note=progress.partials[error.block].attempt)
            ledger.append(record)
            progress.add(record)
    with show_progress(
        "none" if callable(config.progress) else config.progress, "merge", "rows", count_rows(runs), delay=2.0
    ) as advance:
        return write_objects(workspace, runs, file, advance)


def _complete(
    config: TableConfig, output: LocalPath, workspace: TableWorkspace, ledger: Ledger, started: float
) -> None:
    """Measure what is left, write the table, and delete the workspace."""
    plan, staged = workspace.plan, staging_path(output)
    staged.unlink(missing_ok=True)
    file = FORMATS[plan.suffix][0](staged, plan.schema)
    try:
        count = _measure_and_merge(config, workspace, ledger, file)
    except BaseException:
        with contextlib.suppress(Exception):
            file.close()
        staged.unlink(missing_ok=True)
        raise
    ledger.commit()
    seconds = round(time.monotonic() - started, 3)
    publish(output, workspace, {"objects": count, "seconds": seconds, **run_facts(config.settings)})
    remove_workspace(workspace.root)
    logger.info("%s is complete after %s s: %d objects", output, seconds, count)


def _run_part(config: TableConfig, output: LocalPath, part: ArrayJobPart) -> LocalPath | None:
    """Measure the blocks of one part, and write the table if it is the last one."""
    started, name = time.monotonic(), str(output)
    turn = functools.partial(locked_in_turn, beside(output, ".lock"), name, str(part))
    with contextlib.ExitStack() as stack:
        with turn():
            own_lock = stack.enter_context(contextlib.ExitStack())
            own_lock.enter_context(locked(part.lock(output), name, str(part)))
            if _stored_table(config, output) is not None:
                return output
            workspace = _set_up(config, output)
            own, progress = part.blocks_of(np.ones(workspace.plan.blocks, np.int32)), workspace.progress()
            ledger = stack.enter_context(open_ledger(workspace.root, part.segment))
        with _tasks(config, workspace, own, progress.partials) as executor:
            tail = LedgerTail(workspace.root, part.segment)
            Run(
                workspace.plan.block_grid,
                progress,
                ledger,
                lambda _: None,
                to_predict=own,
                to_normalize=(),
                ledger_tail=tail,
            ).execute(executor)
        with turn():
            if find_table(output) is not None:
                return output
            is_last = len(workspace.progress().partials) == workspace.plan.blocks
            if is_last:
                workspace.join()
                _complete(config, output, workspace, ledger, started)
            own_lock.close()  # within the turn: the next one sees that this part is gone
    return output if is_last else None
