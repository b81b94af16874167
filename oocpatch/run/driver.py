"""The driver of a run: how it begins, which blocks it runs where, and how it ends; for whole runs and parts alike."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Container, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from oocpatch.configuration.run_config import RunConfig
from oocpatch.execution.task_context import RunExecutor, RunInputs, thread_executor
from oocpatch.models.preprocessing import preprocess_statistics
from oocpatch.outputs.ome_labels import register_label
from oocpatch.outputs.output import Output, create_output
from oocpatch.outputs.pyramid import build_pyramids
from oocpatch.outputs.record import OutputRecord, inspect_output
from oocpatch.planning.plan import Plan
from oocpatch.progress import OnProgress, show_progress
from oocpatch.provenance import run_facts
from oocpatch.storage.paths import StoragePath, storage_path
from oocpatch.workspace.ledger import WHOLE, Ledger, Record
from oocpatch.workspace.run_progress import RunProgress
from oocpatch.workspace.workspace import Workspace, remove_workspace


def workspace_root(record: OutputRecord) -> StoragePath:
    """Return the workspace of the run that wrote, or writes, an output."""
    return storage_path(record.workspace) / record.run_id


def all_done(plan: Plan, progress: RunProgress) -> bool:
    """Return whether both stages of all blocks are recorded."""
    return len(progress.partials) == plan.blocks and len(progress.normalized) == plan.block_grid.num_open


def set_up(config: RunConfig, plan: Plan, *, resuming: bool) -> Workspace:
    """Return the workspace to continue, its weights written anew; or a new one, with an output marked incomplete."""
    record = inspect_output(config.output)
    if resuming and record is not None:
        workspace = Workspace(workspace_root(record), plan)
        workspace.write_weights()
        return workspace
    if record is not None:
        remove_workspace(workspace_root(record))
    statistics = preprocess_statistics(
        config.model.preprocess, config.volume, config.limits.max_memory, progress=config.execution.progress
    )
    plan = replace(plan, statistics=statistics)
    create_output(config.output, plan, config.volume, config.workspace, record)
    return Workspace.create(config.workspace / plan.run_id, plan)


@contextlib.contextmanager
def open_ledger(workspace: Workspace, segment: str) -> Iterator[Ledger]:
    """Open the ledger, or a segment of it; commit and close it at the end."""
    ledger = workspace.ledger(segment)
    ledger.append(Record("begun", 0))
    try:
        yield ledger
    finally:
        ledger.close()


@contextlib.contextmanager
def open_executor(
    config: RunConfig, workspace: Workspace, blocks: Collection[int], predicted: Container[int]
) -> Iterator[RunExecutor]:
    """Open what runs the tasks of a run, with a display of its progress.

    Args:
        config: the configuration.
        workspace: the workspace, which has the plan.
        blocks: the blocks whose predict stage this call runs.
        predicted: those that are done already.
    """
    plan = workspace.plan
    with (
        _progress_display(plan, config.execution.progress, blocks, predicted) as on_progress,
        _executor(config, workspace, on_progress) as executor,
    ):
        yield executor


def _executor(config: RunConfig, workspace: Workspace, on_progress: OnProgress) -> AbstractContextManager[RunExecutor]:
    plan = workspace.plan
    inputs = RunInputs(config.model, config.volume, config.data.mask, config.models)
    if config.execution.client is None:
        return thread_executor(plan, inputs, workspace, Output(config.output, plan), on_progress)
    from oocpatch.execution.worker import cluster_executor  # noqa: PLC0415 - a second of imports, for clusters only

    return cluster_executor(
        plan,
        inputs,
        workspace,
        config.output,
        client=config.execution.client,
        processes=config.execution.workers,
        max_disk=config.limits.max_disk,
        on_progress=on_progress,
    )


@contextlib.contextmanager
def _progress_display(
    plan: Plan, progress: str | bool | OnProgress, blocks: Collection[int], predicted: Container[int]
) -> Iterator[OnProgress]:
    """Show the progress over the patches of some blocks; yield a function of its events."""
    if callable(progress):
        yield progress
        return
    total = plan.patches if len(blocks) == plan.blocks else plan.patches_in(blocks)
    resumed = plan.patches_in([i for i in blocks if i in predicted])
    with show_progress(
        progress, "predict", "patches", total, resumed=resumed, bytes_each=plan.bytes_per_patch
    ) as on_patches:
        yield lambda event: on_patches(event.patches)


def run_details(config: RunConfig, plan: Plan, progress: RunProgress, seconds: float, halved: int) -> dict[str, Any]:
    """Return facts about a finished run, for the output's attributes."""
    return {
        **({"statistics": plan.statistics} if plan.statistics else {}),
        **({"halved_batches": halved} if halved else {}),
        "patches": plan.patches,
        "blocks": plan.blocks,
        "open_blocks": plan.block_grid.num_open,
        "uncovered_voxels": progress.uncovered,
        "nonfinite_voxels": progress.nonfinite,
        "seconds": round(seconds, 3),
        "torch_threads": plan.torch_threads,
        **run_facts(config.settings),
    }


def complete(config: RunConfig, workspace: Workspace, details: dict[str, Any]) -> None:
    """Make the coarser levels of a pyramid, if there is one, record success, and delete the workspace."""
    plan = workspace.plan
    build_pyramids(
        config.output,
        workspace.root,
        max_memory=config.limits.max_memory,
        workers=plan.concurrency,
        progress=config.execution.progress,
    )
    Output(config.output, plan).complete(details, workspace.root / WHOLE)
    register_label(config.output)
    remove_workspace(workspace.root)
