"""The driver of a run: how it begins, which blocks it runs where, and how it ends; for whole runs and parts alike."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from oocpatch.configuration.make_plan import counted
from oocpatch.configuration.run_config import RunConfig
from oocpatch.engine.patch_rows import write_rows
from oocpatch.errors import CorruptData, OutputExists, RunMismatch
from oocpatch.execution.merge_run import InstanceRun, MergeRun, TableRun
from oocpatch.execution.scheduler import REPAIRS, Executor, Run
from oocpatch.execution.task_context import RunExecutor, RunInputs, open_predict_tasks, thread_executor
from oocpatch.models.preprocessing import needs_statistics, preprocess_statistics
from oocpatch.objects.table_merge import TABLE
from oocpatch.outputs.integrity import LEDGER, METADATA_CRC, latest_lines
from oocpatch.outputs.ome_labels import register_label
from oocpatch.outputs.output import Output, create_output, stored_ledger
from oocpatch.outputs.pyramid import build_pyramids
from oocpatch.outputs.record import OutputRecord, inspect_output, write_record
from oocpatch.outputs.row_arrays import row_members
from oocpatch.outputs.write_units import unpack
from oocpatch.planning.choices import STATISTIC_PADDING
from oocpatch.planning.plan import Plan, digest
from oocpatch.progress import OnProgress, show_progress
from oocpatch.provenance import run_facts
from oocpatch.run.instance_tasks import open_instance_tasks
from oocpatch.run.label_tasks import open_label_tasks
from oocpatch.run.table_tasks import open_table_tasks
from oocpatch.storage.checksums import ABSENT, file_checksum
from oocpatch.storage.journal import local_copy, replace_journal
from oocpatch.storage.locks import beside
from oocpatch.storage.paths import StoragePath, output_path, storage_path
from oocpatch.volumes.padding import padding_value
from oocpatch.volumes.resampling import stored_volume
from oocpatch.volumes.volume import Volume
from oocpatch.workspace.ledger import NO_PARTIALS, WHOLE, Record, latest_records
from oocpatch.workspace.run_progress import RunProgress
from oocpatch.workspace.workspace import Workspace, remove_workspace, way

logger = logging.getLogger("oocpatch")


def workspace_root(record: OutputRecord) -> StoragePath:
    """Return the workspace of the run that wrote, or writes, an output."""
    return storage_path(record.workspace) / record.run_id


def plan_of(record: OutputRecord) -> Plan | None:
    """Return the plan of a complete output; None if it was written by a version that stored none."""
    plan = record.details.get("plan")
    return None if plan is None else Plan.from_json(json.dumps(plan), older=True)


def all_done(plan: Plan, progress: RunProgress) -> bool:
    """Return whether both stages of all blocks are recorded, and their merge, if there is one."""
    is_merged = not plan.merges or progress.merged != NO_PARTIALS
    return is_merged and len(progress.partials) == plan.blocks and len(progress.normalized) == plan.num_normalized


def find_workspace(config: RunConfig, record: OutputRecord) -> Workspace | None:
    """Return the workspace of an unfinished run: where its record has it, or where this call has workspaces."""
    roots = dict.fromkeys((workspace_root(record), config.workspace / record.run_id))
    workspaces = (workspace for root in roots if (workspace := Workspace.find(root)) is not None)
    return next((workspace for workspace in workspaces if not _is_of_original(workspace, config.output, record)), None)


def _is_of_original(workspace: Workspace, output: StoragePath, record: OutputRecord) -> bool:
    """Return whether a workspace is of another output, of which this one is a copy."""
    if str(output) == workspace.output or way(workspace.root, output) == workspace.way:
        return False
    try:
        original = inspect_output(output_path("output", workspace.output))
    except (OutputExists, ValueError):
        return False
    return original is not None and original.run_id == record.run_id


def discard_workspace(config: RunConfig, record: OutputRecord) -> None:
    """Delete what the run of an output left in its workspace, unless it is that of another output."""
    try:
        workspace = Workspace.find(workspace_root(record))
    except RunMismatch:  # of another version, which shared workspaces with no copy
        workspace = None
    if workspace is None or not _is_of_original(workspace, config.output, record):
        remove_workspace(workspace_root(record))


def new_root(config: RunConfig, plan: Plan) -> StoragePath:
    """Return where a new workspace is made; other outputs may share the directory that `workspace` names."""
    is_shared = config.workspace != beside(config.output, "")
    return config.workspace / (digest([plan.run_id, str(config.output)]) if is_shared else plan.run_id)


def set_up(config: RunConfig, plan: Plan, *, resuming: bool) -> Workspace:
    """Return the workspace to continue, its weights written anew; or a new one, with an output marked incomplete."""
    record = inspect_output(config.output)
    if resuming and record is not None and (stored := find_workspace(config, record)) is not None:
        workspace = Workspace(stored.root, plan)
        workspace.write_weights()
        if workspace.root != workspace_root(record):  # it was moved
            write_record(config.output, replace(record, workspace=str(workspace.root.parent)))
        if config.execution.part is None and stored.output != str(config.output):
            if stored.way != way(stored.root, config.output):
                _adopt(config.output, workspace)
            workspace.belong_to(config.output)
        return workspace
    if record is not None:
        discard_workspace(config, record)
    plan = with_statistics(plan, config)
    plan = plan if plan.selected else counted(plan, config.selection)  # the mask was too large to be read for a plan
    root = new_root(config, plan)
    create_output(config.output, plan, config.volume, root, record)
    return Workspace.create(root, plan, config.output)


def measured_volume(config: RunConfig, volume: Volume) -> Volume:
    """Return the volume that statistics are of: as it is stored, or, as MONAI measures, on a grid from its centre."""
    grid = config.data.spacing
    return volume if grid is not None and grid.from_center else stored_volume(volume)


def with_statistics(plan: Plan, config: RunConfig) -> Plan:
    """Return the plan with what its preprocess and its padding need to know about the whole volume."""
    preprocess, volume = config.model.preprocess, measured_volume(config, config.volume)
    mode = plan.padding_mode if plan.padding_mode in STATISTIC_PADDING else None
    limit, progress = config.limits.max_memory, config.execution.progress
    statistics_of = volume.fingerprint if mode is not None or needs_statistics(preprocess) else ""
    statistics = preprocess_statistics(preprocess, volume, limit, progress=progress)
    fill = plan.fill if mode is None else padding_value(volume, mode, max_memory=limit, progress=progress)
    return replace(plan, statistics=statistics, statistics_of=statistics_of, fill=fill)


def _adopt(path: StoragePath, workspace: Workspace) -> None:
    """Remove from the ledger what an output does not have: it may have been copied before the original went on."""
    plan, whole = workspace.plan, workspace.root / WHOLE
    output, lost = Output(path, plan), set()
    workspace.join()
    with local_copy(whole) as ledger:
        for record in latest_records(ledger, plan.blocks):
            for head, position, crc in unpack(plan, record.kind, record.block, record.units):
                unit = path / output.unit_name(head, position)
                if (file_checksum(unit) or 1 if unit.exists() else ABSENT) != crc:
                    lost.add((record.kind, record.block))
                    break
    replace_journal(whole, latest_lines(whole, plan.blocks, without=frozenset(lost), plain=False))


def reopen(path: StoragePath, record: OutputRecord, plan: Plan, stages: Collection[tuple[str, int]]) -> None:
    """Remove stages of blocks from what is recorded as done; a complete output is incomplete then.

    The next call computes them again. Only with the output's lock. The partials of a complete output are deleted: what
    reads them must be among the stages.
    """
    root = workspace_root(record)
    if record.complete:
        if plan.vectors:  # those of all blocks are put in order again
            stages = {*stages, *(("predict", block) for block in range(plan.blocks))}
        Workspace.create(root, plan, path)
        ledger = stored_ledger(path, plan)
    else:
        Workspace(root, plan).join()
        ledger = root / WHOLE
    replace_journal(root / WHOLE, latest_lines(ledger, plan.blocks, without=frozenset(stages), plain=record.complete))
    if record.complete:
        details = {name: value for name, value in record.details.items() if name not in ("plan", METADATA_CRC)}
        details["files"] = {name: crc for name, crc in details["files"].items() if not name.endswith(LEDGER)}
        rows = row_members(plan)
        details["files"] = {n: crc for n, crc in details["files"].items() if n.partition("/")[0] not in rows}
        write_record(path, replace(record, complete=False, details=details))


@contextlib.contextmanager
def open_executor(
    config: RunConfig, workspace: Workspace, blocks: Collection[int], done: RunProgress
) -> Iterator[RunExecutor]:
    """Open what runs the tasks of a run, with a display of its progress.

    Args:
        config: the configuration.
        workspace: the workspace, which has the plan.
        blocks: the blocks whose predict stage this call runs.
        done: the stages that are done already.
    """
    plan = workspace.plan
    with (
        _progress_display(plan, config.execution.progress, blocks, done) as on_progress,
        _executor(config, workspace, on_progress) as executor,
    ):
        yield executor


@contextlib.contextmanager
def _executor(config: RunConfig, workspace: Workspace, on_progress: OnProgress) -> Iterator[RunExecutor]:
    plan, execution = workspace.plan, config.execution
    open_tasks = open_instance_tasks if plan.has_objects else open_predict_tasks
    open_tasks = open_tasks if plan.labelling is None else open_label_tasks
    open_tasks = open_tasks if plan.table is None else open_table_tasks
    second = config.intensity or config.context
    inputs = RunInputs(config.model, config.volume, config.data.mask, config.models, open_tasks, second)
    if not execution.is_distributed:
        with thread_executor(plan, inputs, workspace, Output(config.output, plan), on_progress) as executor:
            yield executor
        return
    from oocpatch.execution.dask_clients import connected  # noqa: PLC0415 - a second of imports, for clusters only
    from oocpatch.execution.worker import cluster_executor  # noqa: PLC0415

    with contextlib.ExitStack() as stack:
        client = execution.client
        if execution.processes:
            client = stack.enter_context(connected(None, min(execution.workers or 1, plan.blocks), config.model.device))
        yield stack.enter_context(
            cluster_executor(
                plan,
                inputs,
                workspace,
                config.output,
                client=client,
                processes=execution.workers,
                max_disk=config.limits.max_disk,
                on_progress=on_progress,
            )
        )


@contextlib.contextmanager
def _progress_display(
    plan: Plan, progress: str | bool | OnProgress, blocks: Collection[int], done: RunProgress
) -> Iterator[OnProgress]:
    """Show the progress over the patches of some blocks; yield a function of its events."""
    if callable(progress) and plan.scores:  # the patches are those of the scores
        yield lambda _: None
        return
    if callable(progress):
        yield lambda event: progress(event) if event.patches else None
        return
    total = plan.patches if len(blocks) == plan.blocks else plan.patches_in(blocks)
    resumed = plan.patches_in([i for i in blocks if i in done.partials])
    verb, unit = "predict", "patches"
    if plan.scores and plan.labelling is None:
        verb = "resample"
    elif plan.table is not None:
        verb, unit = "objects", "voxels"
    elif plan.labelling is not None:  # each block is read twice
        verb, unit, total = "label", "voxels", 2 * total
        resumed += plan.patches_in(done.normalized)
    with show_progress(progress, verb, unit, total, resumed=resumed, bytes_each=plan.bytes_per_patch) as on_patches:
        yield lambda event: on_patches(event.patches)


def run_of(plan: Plan) -> type[Run]:
    """Return what runs the stages of a plan."""
    if plan.has_objects:
        return InstanceRun
    if plan.table is not None:
        return TableRun
    return Run if plan.labelling is None else MergeRun


def run_details(config: RunConfig, plan: Plan, progress: RunProgress, seconds: float, halved: int) -> dict[str, Any]:
    """Return facts about a finished run, for the output's attributes."""
    return {
        **({"statistics": plan.statistics} if plan.statistics else {}),
        **({"padding_value": plan.fill} if plan.padding_mode in STATISTIC_PADDING else {}),
        **({"halved_batches": halved} if halved else {}),
        **({"objects": json.loads(progress.objects)} if plan.merges else {}),
        **({"crc": progress.merged.digest, "attempt": progress.merged.attempt} if plan.table is not None else {}),
        "patches": plan.patches,
        "blocks": plan.blocks,
        "open_blocks": plan.num_normalized,
        "uncovered_voxels": progress.uncovered,
        "nonfinite_voxels": progress.nonfinite,
        "seconds": round(seconds, 3),
        "torch_threads": plan.torch_threads,
        **run_facts(config.settings),
    }


def complete_rows(config: RunConfig, workspace: Workspace, stages: functools.partial[Run], executor: Executor) -> None:
    """Write the rows of vectors of patches, if the model gives any, when all blocks are done.

    Args:
        config: the configuration.
        workspace: the workspace, which has the plan.
        stages: the run with its blocks, its progress and its ledger, which gets a record of each block that is damaged.
        executor: computes these blocks again.

    Raises:
        CorruptData: when blocks are damaged however often they are computed.
    """
    plan, (_, progress, ledger, *_) = workspace.plan, stages.args
    for _ in range(REPAIRS + 1 if plan.vectors else 0):
        damaged = write_rows(config.output, plan, lambda block: workspace.reader(block, progress.partials[block]))
        if not damaged:
            return
        for error in damaged:
            logger.warning("%s; computing block %d again", error, error.block)
            record = Record("undone", error.block, note=progress.partials[error.block].attempt)
            ledger.append(record)
            progress.add(record)
        stages(to_predict=[error.block for error in damaged], to_normalize=()).execute(executor)
    if plan.vectors:
        raise CorruptData(f"{damaged[0]}; it was computed again {REPAIRS} times and damaged each time")


def complete(config: RunConfig, workspace: Workspace, details: dict[str, Any]) -> None:
    """Make the coarser levels of a pyramid, if there is one, record success, and delete the workspace."""
    plan, table = workspace.plan, None
    if plan.table is not None:
        table = workspace.merged_folder(details["attempt"]) / TABLE
    else:
        build_pyramids(
            config.output,
            workspace.root,
            max_memory=config.limits.max_memory,
            workers=plan.concurrency,
            progress=config.execution.progress,
        )
    Output(config.output, plan).complete(details, workspace.root / WHOLE, table)
    register_label(config.output)
    remove_workspace(workspace.root)
