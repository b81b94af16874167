"""How far a run is: a bar while it goes on, and what its output and workspace say from outside."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta

import numpy as np

from oocpatch.outputs.record import OutputRecord, find_output
from oocpatch.planning.plan import Plan
from oocpatch.progress import display_of, show_progress
from oocpatch.storage.locks import holder, locks
from oocpatch.storage.paths import Address, address, output_path
from oocpatch.workspace.workspace import Workspace


def hidden(progress: str | bool) -> bool | None:
    """Whether no progress is shown; None: it is, on a terminal.

    Raises:
        ValueError: when it is none of the known ways.
    """
    display_of(progress)
    return None if progress == "auto" else progress not in ("bar", True)


def root_of(record: OutputRecord) -> Address:
    """The workspace of the run that wrote, or writes, an output."""
    return address(record.workspace) / record.run_id


@contextlib.contextmanager
def bar_of(made: Plan, progress: str | bool, own: range, predicted: Container[int]) -> Iterator[Callable[[int], None]]:
    """Progress over the patches of some blocks, as a function that is told how many more are done, from any thread."""
    total = made.patches if len(own) == made.blocks else made.patches_in(own)
    done = made.patches_in([i for i in own if i in predicted])
    volume = math.prod(made.shape) * made.in_channels * np.dtype(made.in_dtype).itemsize
    each = volume / max(1, made.patches)
    with show_progress(progress, "predict", "patches", total, resumed=done, bytes_each=each) as tell:
        yield tell


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

    def to_json(self) -> str:
        """The status as a JSON object."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        lines = [f"{self.output}: {self.state}"]
        if self.predict_total:
            lines.append(f"predict    {self.predict_done} of {self.predict_total} blocks")
            lines.append(f"normalize  {self.normalize_done} of {self.normalize_total} blocks")
        if self.patches_total:
            lines.append(f"patches    {self.patches_done:,} of {self.patches_total:,}")
        if self.seconds_left is not None:
            left = timedelta(seconds=round(self.seconds_left))
            each = f"{self.patches_per_second:.3g} patches/s, {self.blocks_per_second:.3g} blocks/s"
            when = "" if self.state == "running" else " for the call that resumes"
            lines.append(f"speed      {each}, {left} left{when}")
        lines += [f"failed     block {block}: {' '.join(text.split())}" for block, text in self.failed.items()]
        return "\n".join(lines)


def status(output: str | os.PathLike[str]) -> RunStatus:
    """How far the run of an output is.

    Raises:
        OutputExists: when what lies there is not an output of oocpatch.
    """
    path = output_path("output", output)
    record = find_output(path)
    if record is None:
        return RunStatus(str(path), "", "absent", 0, 0, 0, 0, {})
    if record.complete:
        blocks, opened, patches = (int(record.details.get(n, 0)) for n in ("blocks", "open_blocks", "patches"))
        return RunStatus(str(path), "", "complete", blocks, blocks, opened, opened, {}, patches, patches)
    running = any(holder(lock) for lock in locks(path))
    state = "running" if running else "incomplete"
    workspace = Workspace.find(root_of(record))
    if workspace is None:
        return RunStatus(str(path), str(root_of(record)), state, 0, 0, 0, 0, {})
    done, grid = workspace.progress(), workspace.plan.block_grid
    patches = workspace.plan.patches_in(done.predicted)
    recent = workspace.plan.patches_in(done.since)
    # While a run is at work, a block that takes long must slow its speed down.
    seconds = (max(done.last, time.time()) if running else done.last) - done.begun
    speed = recent / seconds if done.begun and seconds > 0 else 0.0
    return RunStatus(
        output=str(path),
        workspace=str(workspace.root),
        state=state,
        predict_done=len(done.predicted),
        predict_total=grid.num_blocks,
        normalize_done=len(done.normalized),
        normalize_total=grid.num_open,
        failed=done.failed,
        patches_done=patches,
        patches_total=workspace.plan.patches,
        blocks_per_second=len(done.since) / seconds if speed else 0.0,
        patches_per_second=speed,
        seconds_left=(workspace.plan.patches - patches) / speed if speed else None,
    )
