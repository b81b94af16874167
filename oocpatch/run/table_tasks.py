"""The tasks of `objects`, in threads of this process or in a worker of a cluster, which imports this module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from oocpatch.engine.buffers import lean_heap
from oocpatch.engine.stages import TaskResult
from oocpatch.execution.scheduler import Task
from oocpatch.execution.task_context import RunInputs, Tasks
from oocpatch.objects.block_measurement import MeasurementContext, measure_block
from oocpatch.objects.moments import SEGMENT
from oocpatch.objects.table_merge import merge_tables
from oocpatch.outputs.output import Output
from oocpatch.planning.plan import Plan
from oocpatch.progress import OnProgress
from oocpatch.volumes.volume import Volume
from oocpatch.workspace.workspace import Workspace


@dataclass(frozen=True, slots=True)
class TableTasks:
    """The tasks of `objects`."""

    context: MeasurementContext

    def run(self, task: Task) -> TaskResult:
        """Run one task.

        Idempotent: as the stages are.
        """
        if task.stage == "predict":
            return measure_block(self.context, task.index)
        return merge_tables(self.context, task.partials_refs)

    def halved(self) -> int:
        """Return 0: there are no batches."""
        return 0


@contextlib.contextmanager
def open_table_tasks(
    plan: Plan, inputs: RunInputs, workspace: Workspace, output: Output, on_progress: OnProgress
) -> Iterator[Tasks]:
    """Open what the tasks of `objects` share: the labels, and the intensity if there is one."""
    with contextlib.ExitStack() as stack:

        def opened(volume: Volume) -> Volume:
            volume = volume.for_run(1)
            stack.callback(volume.source.close)
            return volume

        intensity = None if inputs.intensity is None else opened(inputs.intensity)
        context = MeasurementContext(plan, opened(inputs.volume), intensity, workspace, output.path.name, on_progress)
        lean_heap(context.scratch, SEGMENT * np.dtype(np.int64).itemsize)
        yield TableTasks(context)
