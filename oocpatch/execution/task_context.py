"""The context of tasks in one process: what they share, opened once and closed at the end.

It is made of the plan, the model's options and the arrays; tasks of this process and of a cluster's workers alike.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from oocpatch.engine.buffers import HUGE, lean_heap, retaining_heap, warn_without_huge_pages
from oocpatch.engine.context_patches import ContextPatches
from oocpatch.engine.device_transfer import Transfer, is_staged
from oocpatch.engine.normalize import Normalizer
from oocpatch.engine.patch_selection import Mask, Selection
from oocpatch.engine.stages import PatchContext, TaskContext, TaskResult, normalize_block, patch_window, predict_block
from oocpatch.execution.scheduler import Executor, Stopped, Task, ThreadExecutor
from oocpatch.models.loading import Model
from oocpatch.models.options import ModelOptions
from oocpatch.models.pipeline import Pipeline
from oocpatch.models.postprocessing import postprocess_of
from oocpatch.models.predictor import Predictor, on_device, use_threads
from oocpatch.outputs.output import Output
from oocpatch.planning.box import Box
from oocpatch.planning.heads import Head
from oocpatch.planning.memory import heap_chunk_bytes, read_buffer_bytes, reader_threads, tile_voxels
from oocpatch.planning.plan import Plan
from oocpatch.progress import OnProgress, TaskDone
from oocpatch.volumes.padding import reading_rule
from oocpatch.volumes.volume import Volume
from oocpatch.workspace.workspace import Workspace


class Tasks(Protocol):
    """Runs the tasks of one process."""

    def run(self, task: Task) -> TaskResult:
        """Run one task; idempotent."""

    def halved(self) -> int:
        """Return the number of batches that were halved because memory ran out."""


Weights = Sequence[npt.NDArray[np.float64]]

OpenTasks = Callable[
    [Plan, "RunInputs", Workspace, Output, OnProgress],
    AbstractContextManager[Tasks],
]
"""Opens what the tasks of a kind of run share; a function of a module, since workers import it."""


@dataclass(frozen=True, slots=True)
class RunInputs:
    """Volume, mask of patches to compute, loaded models and their options, and what runs tasks on them.

    The intensity is what `objects` measures besides; of `predict`, it is the level of the patches' context.
    """

    options: ModelOptions
    volume: Volume
    mask: Mask | None
    models: tuple[Model, ...]
    open_tasks: OpenTasks
    intensity: Volume | None = None

    def predictor(self, plan: Plan) -> Predictor:
        """Return the models as a function of batches."""
        looped = len(plan.axes) - plan.spatial
        sizes = (plan.axes[looped:], plan.patch_size[looped:], looped)
        pipeline = Pipeline(self.options, self.models, *sizes, plan.model_inputs)
        return pipeline.predictor(
            copies_input=plan.copies_input,
            threads=plan.torch_threads,
            calls=plan.calls,
            statistics=plan.statistics,
            compiled=True,
        )

    @contextlib.contextmanager
    def opened(self, plan: Plan, predictor: Predictor, weights: Sequence[Weights | None]) -> Iterator[PatchContext]:
        """Put the model on its device, and open the arrays to read, as long as the `with` block lasts.

        `weights` has those of the full grid, along each axis, for each head that needs them.
        """
        volume, threads = self.volume, reader_threads(plan.io_strategy.threads)
        opened = volume.for_run(threads)
        mask = None if self.mask is None else self.mask.for_run()
        device = predictor.device
        if torch.device(device).type == "cpu" and dict(plan.memory_parts).get("model", 0) >= HUGE:
            warn_without_huge_pages()
        with contextlib.ExitStack() as stack:
            stack.callback(opened.source.close)  # a file that stays open cannot be edited: HDF5 refuses
            if mask is not None:
                stack.callback(mask.volume.source.close)
            coarse = None
            if self.intensity is not None:
                level = self.intensity.for_run(threads)
                stack.callback(level.source.close)
                coarse = ContextPatches(level, plan.shape, reading_rule(plan.padding_mode, plan.fill))
            stack.enter_context(predictor.ready())
            transfer = Transfer(device, staged=is_staged(device), read_bytes=read_buffer_bytes(volume.chunk_bytes))
            stack.callback(transfer.close)
            reads = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="oocpatch-read"))
            yield PatchContext(
                plan=plan,
                volume=opened,
                selection=Selection(mask, None if plan.box is None else Box(*plan.box)),
                predictor=predictor,
                transfer=transfer,
                windows=tuple(patch_window(plan, head, device) for head in plan.heads),
                normalizers=tuple(
                    _normalizer(plan, self.options, head, w) for head, w in zip(plan.heads, weights, strict=True)
                ),
                read_pool=reads,
                coarse=coarse,
            )


@dataclass(frozen=True, slots=True)
class RunExecutor:
    """The executor of a run's tasks.

    Attributes:
        executor: runs tasks.
        halved: returns the number of batches that were halved because memory ran out.
        flush: makes durable what was written to the output.
    """

    executor: Executor
    halved: Callable[[], int]
    flush: Callable[[], None]


@contextlib.contextmanager
def thread_executor(
    plan: Plan, inputs: RunInputs, workspace: Workspace, output: Output, on_progress: OnProgress
) -> Iterator[RunExecutor]:
    """Run tasks on Dask's threads in this process."""
    stop = threading.Event()

    def check_stopped(event: TaskDone) -> None:
        if stop.is_set():
            raise Stopped
        on_progress(event)

    with (
        inputs.open_tasks(plan, inputs, workspace, output, check_stopped) as tasks,
        ThreadPoolExecutor(plan.concurrency + plan.normalize_slots, "oocpatch-block", use_threads, (1,)) as pool,
    ):
        at_a_time = plan.concurrency + plan.normalize_slots
        executor = ThreadExecutor(pool, at_a_time, tasks.run, stop, plan.normalize_slots)
        yield RunExecutor(executor, tasks.halved, output.flush)


@dataclass(frozen=True, slots=True)
class PredictTasks:
    """The tasks of `predict`."""

    context: TaskContext

    def run(self, task: Task) -> TaskResult:
        """Run one task.

        Idempotent: as the stages are.
        """
        with on_device(self.context.predictor.device):  # where a postprocess puts what it makes for itself
            if task.stage == "predict":
                return predict_block(self.context, task.index)
            return normalize_block(self.context, task.index, task.partials_refs)

    def halved(self) -> int:
        """Return the number of batches that were halved because memory ran out."""
        return self.context.predictor.halving.count


@contextlib.contextmanager
def open_predict_tasks(
    plan: Plan, inputs: RunInputs, workspace: Workspace, output: Output, on_progress: OnProgress
) -> Iterator[PredictTasks]:
    """Open what the tasks of `predict` share: the model on its device, arrays, threads that read and write.

    `on_progress` is called with an event for patches that are done.
    """
    chunk_bytes = [math.prod(head.unit) * np.dtype(head.out_dtype).itemsize for head in plan.heads]
    unit_bytes = [size * head.out_channels for size, head in zip(chunk_bytes, plan.heads, strict=True)]
    volume, threads = inputs.volume, plan.io_strategy.threads
    heap_bytes = heap_chunk_bytes(threads, max([volume.chunk_bytes, *unit_bytes]))
    lean_heap(heap_bytes, max([volume.chunk_bytes, *chunk_bytes]))
    weights = [workspace.weights(n) if head.needs_weights else None for n, head in enumerate(plan.heads)]
    with contextlib.ExitStack() as stack:
        patches = stack.enter_context(inputs.opened(plan, inputs.predictor(plan), weights))
        writes = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="oocpatch-write"))
        stack.enter_context(output.with_chunk_writers(threads))
        stack.enter_context(retaining_heap(plan.retained_memory, plan.projected_memory))
        context = TaskContext(
            **vars(patches), workspace=workspace, output=output, write_pool=writes, on_progress=on_progress
        )
        yield PredictTasks(context)


def _normalizer(plan: Plan, options: ModelOptions, head: Head, weights: Weights | None) -> Normalizer:
    """Return the conversion of the sums of a head to values."""
    return Normalizer(
        None if weights is None else tuple(torch.from_numpy(w).to(torch.float32) for w in weights),
        postprocess_of(options.postprocess, head.name, head.mode),
        len(plan.axes) - plan.spatial,
        tile_voxels(head.max_channels),
        dense=head.dense,
        divide=head.blended,
        fill=plan.output_fill,
        allow_nonfinite=plan.allow_nonfinite if not plan.scores else bool(plan.parameters["allow_nonfinite"]),
        nan_is_empty=plan.scores_may_lack,
    )
