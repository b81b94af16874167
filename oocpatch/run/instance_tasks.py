"""The tasks of a model of objects, in threads of this process or in a worker of a cluster, which imports them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from oocpatch.engine.stages import TaskResult, normalize_block
from oocpatch.execution.scheduler import Task
from oocpatch.execution.task_context import PredictTasks, RunInputs, Tasks, open_predict_tasks
from oocpatch.objects.instance_stages import assemble_block, merge_instances, write_objects
from oocpatch.outputs.output import Output
from oocpatch.planning.plan import Plan
from oocpatch.progress import OnProgress
from oocpatch.workspace.workspace import Workspace


@dataclass(frozen=True, slots=True)
class InstanceTasks(PredictTasks):
    """The tasks of `predict` with a model of objects."""

    def run(self, task: Task) -> TaskResult:
        """Run one task.

        Idempotent: as the stages are.
        """
        if task.stage == "assemble":
            return assemble_block(self.context, task.index, task.partials_refs)
        if task.stage == "merge":
            return merge_instances(self.context, task.partials_refs)
        if task.stage == "normalize":
            return normalize_block(self.context, task.index, task.partials_refs, write_objects)
        return PredictTasks.run(self, task)


@contextlib.contextmanager
def open_instance_tasks(
    plan: Plan, inputs: RunInputs, workspace: Workspace, output: Output, on_progress: OnProgress
) -> Iterator[Tasks]:
    """Open what the tasks share."""
    with open_predict_tasks(plan, inputs, workspace, output, on_progress) as tasks:
        yield InstanceTasks(tasks.context)
