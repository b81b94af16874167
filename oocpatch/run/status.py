"""The status of a run, read from its output and workspace by any process."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

from oocpatch.configuration.output_grid import SCORES
from oocpatch.outputs.record import find_output
from oocpatch.run.driver import workspace_root
from oocpatch.storage.locks import holder, locks
from oocpatch.storage.paths import output_path
from oocpatch.workspace.workspace import Workspace

_WORDS = {
    "predict": ("predict", "normalize", "patches"),
    "label": ("label", "relabel", "voxels"),
    "objects": ("measure", "", "voxels"),
}
"""Names of the stages and the units of a run, by its verb."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """How far a run is, from its output and workspace alone.

    Attributes:
        output: where it is.
        workspace: where unfinished work lies.
        state: `complete`, `running` (a process is at work), `incomplete` (the same call resumes it) or `absent`.
        predict_done: blocks computed.
        predict_total: all blocks.
        normalize_done: blocks finished after their neighbours.
        normalize_total: all blocks that need it.
        failed: message of each block that failed.
        patches_done: patches of the blocks computed.
        patches_total: patches of all blocks.
        blocks_per_second: of the last call, from the times of its records; 0: not known yet.
        patches_per_second: the same in patches.
        seconds_left: what the rest takes at that speed; None: not known.
        verb: `predict`; `label`, whose patches are voxels, and whose blocks are predicted, merged and normalized; or
            `objects`, whose blocks are predicted, and merged into a table.
    """

    output: str
    workspace: str
    state: str
    predict_done: int
    predict_total: int
    normalize_done: int
    normalize_total: int
    failed: dict[int, str]
    patches_done: int = 0
    patches_total: int = 0
    blocks_per_second: float = 0.0
    patches_per_second: float = 0.0
    seconds_left: float | None = None
    verb: str = "predict"

    def to_json(self) -> str:
        """The status as a JSON object."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        lines = [f"{self.output}: {self.state}"]
        first, second, unit = _WORDS[self.verb]
        if self.predict_total:
            lines.append(f"{first:<10} {self.predict_done} of {self.predict_total} blocks")
        if self.normalize_total:
            lines.append(f"{second:<10} {self.normalize_done} of {self.normalize_total} blocks")
        if self.patches_total:
            lines.append(f"{unit:<10} {self.patches_done:,} of {self.patches_total:,}")
        if self.seconds_left is not None:
            left = timedelta(seconds=round(self.seconds_left))
            each = f"{self.patches_per_second:.3g} {unit}/s, {self.blocks_per_second:.3g} blocks/s"
            when = "" if self.state == "running" else " for the call that resumes"
            lines.append(f"speed      {each}, {left} left{when}")
        lines += [f"failed     block {block}: {' '.join(text.split())}" for block, text in self.failed.items()]
        return "\n".join(lines)

    __repr__ = __str__


def status(output: str | os.PathLike[str]) -> RunStatus:
    """How far the run of an output is.

    Raises:
        OutputExists: when what lies there is not an output of oocpatch.
    """
    path = output_path("output", output)
    record = find_output(path)
    if record is None:
        return RunStatus(str(path), "", "absent", 0, 0, 0, 0, {})
    named = {"connectivity": "label", "labels": "objects"}
    verb = next((verb for name, verb in named.items() if name in record.parameters), "predict")
    if record.complete:
        blocks, opened, patches = (int(record.details.get(n, 0)) for n in ("blocks", "open_blocks", "patches"))
        return RunStatus(str(path), "", "complete", blocks, blocks, opened, opened, {}, patches, patches, verb=verb)
    running = any(holder(lock) for lock in locks(path))
    state = "running" if running else "incomplete"
    workspace = Workspace.find(workspace_root(record))
    if workspace is None:
        return RunStatus(str(path), str(workspace_root(record)), state, 0, 0, 0, 0, {}, verb=verb)
    scores = workspace.root / SCORES
    if workspace.plan.scores and scores.exists() and (of_scores := status(str(scores))).state != "complete":
        state = of_scores.state if of_scores.state == "running" else state
        return replace(of_scores, output=str(path), workspace=str(workspace.root), state=state)
    done, grid = workspace.progress(), workspace.plan.block_grid
    patches = workspace.plan.patches_in(done.partials)
    recent = workspace.plan.patches_in(done.recent_blocks)
    # While a run is at work, a block that takes long must slow its speed down.
    seconds = (max(done.last_at, time.time()) if running else done.last_at) - done.begun_at
    speed = recent / seconds if done.begun_at and seconds > 0 else 0.0
    left = workspace.plan.patches - patches
    verb = verb if workspace.plan.labelling is None else "label"
    if verb == "label":  # voxels are read once more
        left += workspace.plan.patches - workspace.plan.patches_in(done.normalized)
    return RunStatus(
        output=str(path),
        workspace=str(workspace.root),
        state=state,
        predict_done=len(done.partials),
        predict_total=grid.num_blocks,
        normalize_done=len(done.normalized),
        normalize_total=workspace.plan.num_normalized,
        failed=done.failed,
        patches_done=patches,
        patches_total=workspace.plan.patches,
        blocks_per_second=len(done.recent_blocks) / seconds if speed else 0.0,
        patches_per_second=speed,
        seconds_left=left / speed if speed else None,
        verb=verb,
    )
