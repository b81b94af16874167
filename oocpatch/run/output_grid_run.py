"""A run whose output is resampled or labelled: the run of its scores, in its workspace, and then its own.

```text
 lock, output, workspace --> scores: a whole run, or a part --> resample: the stages of the output --> complete
```

See `configuration.output_grid`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from oocpatch.configuration.output_grid import SCORES, with_scores
from oocpatch.configuration.run_config import RunConfig
from oocpatch.errors import OutputBusy
from oocpatch.execution.array_job import ArrayJobPart
from oocpatch.outputs.output import Result, ledger_path, open_result
from oocpatch.outputs.record import inspect_output, require_output, write_record
from oocpatch.planning.plan import Plan
from oocpatch.run.driver import set_up
from oocpatch.run.input_changes import changes_of_unfinished, scores_ledger
from oocpatch.run.stored_run import reopen_changed, stored_plan
from oocpatch.storage.checksums import file_checksum
from oocpatch.storage.locks import beside, locked_in_turn
from oocpatch.workspace.workspace import Workspace

RunScores = Callable[[RunConfig, Plan | None, Iterable[int] | None], Result]
"""Runs a configuration: `run.predict`, which imports this module."""

OF_SCORES = ("statistics", "padding_value", "halved_batches", "patches", "blocks", "open_blocks", "torch_threads")
"""Facts about the run of the scores that the output reports as its own."""


def shown_plan(plan: Plan) -> Plan:
    """Return the plan of the scores with what the run of the output needs beside, as it is shown to users."""
    if not plan.scores:
        return plan
    scores = Plan.from_json(plan.scores)
    size = " x ".join(map(str, plan.shape[-plan.spatial :]))
    note = f"scores are resampled to {size} voxels" if plan.labelling is None else "connected voxels are labelled"
    return replace(
        scores,
        projected_memory=max(scores.projected_memory, plan.projected_memory),
        projected_disk=plan.projected_disk,
        bytes_read=scores.bytes_read + plan.bytes_read,
        bytes_written=scores.bytes_written + plan.bytes_written,
        model_note=f"{scores.model_note}, {note}" if scores.model_note else note,
    )


def compute_scores(scores: RunConfig, workspace: Workspace, run: RunScores) -> RunConfig:
    """Compute the scores of an output in its workspace, as far as they are not there yet; return their configuration.

    They are incomplete where the configuration is of a part, and others have not computed theirs yet.

    Raises:
        As `predict`.
    """
    path = workspace.root / SCORES
    scores = replace(scores, output=path, workspace=beside(path, ""))
    run(scores, Plan.from_json(workspace.plan.scores), None)
    return scores


def with_computed_scores(config: RunConfig, workspace: Workspace, run: RunScores) -> RunConfig:
    """Return the configuration of an output with its scores, which are computed first; with the output's lock.

    Raises:
        As `predict`.
    """
    if config.scores is None:
        return config
    scores = compute_scores(config.scores, workspace, run)
    config = with_scores(config, scores, Plan.from_json(workspace.plan.scores))
    record = require_output(config.output)
    changes = changes_of_unfinished(config, workspace, workspace.progress())
    if changes:  # scores that were computed again, as the input has changed
        reopen_changed(config, workspace.plan, record, changes)
    return config


def keep_scores_record(config: RunConfig, workspace: Workspace) -> dict[str, Any]:
    """Keep what the scores were computed from beside the output's own ledger, and return facts about their run."""
    if config.scores is None:
        return {}
    record, own = require_output(config.scores.output), require_output(config.output)
    source = config.scores.output / ledger_path(Plan.from_json(workspace.plan.scores))
    name = scores_ledger(workspace.plan)
    (config.output / name).write_atomic(source.read_bytes())
    files = {**own.details["files"], name: file_checksum(config.output / name)}
    write_record(config.output, replace(own, details={**own.details, "files": files}))
    facts = OF_SCORES if workspace.plan.labelling is None else (*OF_SCORES, "uncovered_voxels", "nonfinite_voxels")
    return {fact: record.details[fact] for fact in facts if fact in record.details}


def run_part(config: RunConfig, asked: RunConfig, plan: Plan, part: ArrayJobPart, run: RunScores) -> Result | None:
    """Run one part of the scores, and the output, if it is the last one; None: other parts have not computed theirs.

    Args:
        config: the configuration of the output.
        asked: that of the call.
        plan: the plan of the output.
        part: the part.
        run: runs a configuration.
    """
    output = config.output
    with locked_in_turn(beside(output, ".lock"), str(output), str(part)):
        record = inspect_output(output)
        stored = None if record is None else stored_plan(config, record)
        if record is not None and record.complete:
            return open_result(output)
        workspace = set_up(config, stored or plan, resuming=stored is not None)
    if config.scores is None or not require_output(compute_scores(config.scores, workspace, run).output).complete:
        return None
    try:
        return run(replace(asked, execution=replace(asked.execution, part=None)), None, None)
    except OutputBusy:  # another part was first
        return None
