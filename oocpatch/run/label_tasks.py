"""The tasks of `label`, in threads of this process or in a worker of a cluster, which imports this module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from oocpatch.engine.stages import TaskResult
from oocpatch.execution.scheduler import Task
from oocpatch.execution.task_context import RunInputs, Tasks
from oocpatch.objects.stages import LabelContext, label_block, merge_blocks, open_label_context, relabel_block
from oocpatch.outputs.output import Output
from oocpatch.planning.plan import Plan
from oocpatch.progress import OnProgress
from oocpatch.workspace.workspace import Workspace


@dataclass(frozen=True, slots=True)
class LabelTasks:
    """The tasks of `label`."""

    context: LabelContext

    def run(self, task: Task) -> TaskResult:
        """Run one task.

        Idempotent: as the stages are.
        """
        if task.stage == "predict":
            return label_block(self.context, task.index)
        if task.stage == "merge":
            return merge_blocks(self.context, task.partials_refs)
        return relabel_block(self.context, task.index, task.partials_refs)

    def halved(self) -> int:
        """Return 0: there are no batches."""
        return 0


@contextlib.contextmanager
def open_label_tasks(
    plan: Plan, inputs: RunInputs, workspace: Workspace, output: Output, on_progress: OnProgress
) -> Iterator[Tasks]:
    """Open what the tasks of `label` share: arrays, and threads that read and write."""
    with open_label_context(plan, inputs.volume, workspace, output, on_progress) as context:
        yield LabelTasks(context)
