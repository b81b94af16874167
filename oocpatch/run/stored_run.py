"""The run that an output has already: to open, to continue, to compute in part again, or to refuse."""

from __future__ import annotations

import logging
from dataclasses import replace

from oocpatch.configuration.make_plan import check_same_run, resumed_plan
from oocpatch.configuration.run_config import RunConfig
from oocpatch.errors import OutputBusy, OutputExists
from oocpatch.execution.array_job import ArrayJobPart, busy_holder
from oocpatch.outputs.record import OutputRecord, inspect_output
from oocpatch.planning.plan import Plan
from oocpatch.run.driver import find_workspace, new_root, reopen, workspace_root
from oocpatch.run.input_changes import InputChanges, stages_to_repeat

logger = logging.getLogger("oocpatch")


def stored_run(config: RunConfig) -> tuple[Plan | None, OutputRecord | None]:
    """Return the stored plan to continue, if there is one, and the record of the output, if there is one.

    Raises:
        OutputExists, OutputBusy, RunMismatch: when this call must not touch the output.
    """
    execution = config.execution
    if execution.is_distributed:
        from oocpatch.execution.payload import check_cluster  # noqa: PLC0415 - a second of imports, for clusters only

        check_cluster(config.model, execution.client)
    process = busy_holder(config.output, None if execution.part is None else ArrayJobPart(*execution.part))
    if process is not None:
        raise OutputBusy(busy(config, process))
    record = inspect_output(config.output)
    if record is None or execution.overwrite:
        return None, record
    if not execution.resume:
        state = "complete" if record.complete else "incomplete"
        raise OutputExists(f"{config.output} is there ({state}) and resume is off; pass overwrite=True to replace it")
    stored = stored_plan(config, record)
    if stored is None and execution.part is None:  # another part may be at the set-up: a part looks in its turn
        warn_of_lost_workspace(config, record)
    return stored, record


def warn_of_lost_workspace(config: RunConfig, record: OutputRecord) -> None:
    """Say that an incomplete output is computed afresh."""
    if not record.complete:
        logger.warning(
            "%s is incomplete, and its workspace, %s, is not there or is of another output: it is computed afresh",
            config.output,
            workspace_root(record),
        )


def reopen_changed(config: RunConfig, plan: Plan, record: OutputRecord, changes: InputChanges) -> None:
    """Mark the stages that depend on changes of the input as not done."""
    workspace = None if record.complete else find_workspace(config, record)
    root = new_root(config, plan) if workspace is None else workspace.root
    stages = stages_to_repeat(plan, changes, None if workspace is None else workspace.progress().normalized)
    again = len({block for stage, block in stages if stage == "predict"})
    logger.info("%s: %s; %d of %d blocks are computed again", config.output, changes, again, plan.blocks)
    reopen(config.output, replace(record, run_id=root.name, workspace=str(root.parent)), plan, stages)


def stored_plan(config: RunConfig, record: OutputRecord) -> Plan | None:
    """Return the stored plan to continue; None where there is none, or nothing is left to do.

    Raises:
        RunMismatch: when it is of a run with other parameters. CorruptData: when it only seems so.
    """
    workspace = None if record.complete else find_workspace(config, record)
    check_same_run(config, record, None if workspace is None else workspace.plan)
    return None if workspace is None else resumed_plan(workspace.plan, config)


def busy(config: RunConfig, process: str) -> str:
    """Return the message that another process is at work on an output."""
    return f"another run is at work on {config.output} ({process}); wait for it, or stop it first"
