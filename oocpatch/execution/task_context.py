"""The context of a process: everything that its tasks share, opened once and closed at the end."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from oocpatch.configuration.run_config import Request
from oocpatch.engine.buffers import lean_heap
from oocpatch.engine.device_transfer import Transfer, is_staged
from oocpatch.engine.normalize import Normalizer
from oocpatch.engine.stages import TaskContext, TaskResult, normalize_block, patch_window, predict_block
from oocpatch.execution.scheduler import Task
from oocpatch.models.postprocessing import postprocess_of
from oocpatch.outputs.output import Output
from oocpatch.planning.memory import heap_chunk_bytes, read_buffer_bytes, reader_threads, tile_voxels
from oocpatch.planning.plan import Plan
from oocpatch.workspace.workspace import Workspace


def run_task(context: TaskContext, task: Task) -> TaskResult:
    """Do one task.

    Idempotent: as the stages are.
    """
    if task.stage == "predict":
        return predict_block(context, task.index)
    return normalize_block(context, task.index, task.partials_refs)


@contextlib.contextmanager
def open_task_context(
    request: Request, made: Plan, workspace: Workspace, output: Output, on_patches: Callable[[int], None]
) -> Iterator[TaskContext]:
    """Open what tasks share: the model on its device, arrays, threads that read and write.

    Args:
        request: the arguments.
        made: the plan.
        workspace: where partials go.
        output: where values go.
        on_patches: told the number of patches that are done with.
    """
    files = [math.prod(head.unit) * np.dtype(head.out_dtype).itemsize for head in made.heads]
    units = [size * head.out_channels for size, head in zip(files, made.heads, strict=True)]
    read = request.volume.chunk_bytes
    lean_heap(heap_chunk_bytes(made.io_strategy.threads, max(read, *units)), max(read, *files))
    predictor = request.predictor(
        copies_input=made.copies_input,
        torch_threads=made.torch_threads,
        statistics=made.statistics,
        compiled=True,
    )
    threads = made.io_strategy.threads
    with contextlib.ExitStack() as stack:
        stack.enter_context(predictor.ready())
        reads = stack.enter_context(ThreadPoolExecutor(reader_threads(threads), thread_name_prefix="oocpatch-read"))
        writes = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="oocpatch-write"))
        stack.enter_context(output.with_chunk_writers(threads))
        yield TaskContext(
            plan=made,
            volume=request.volume.with_chunk_reader(reader_threads(threads)),
            selection=request.selection,
            predictor=predictor,
            transfer=Transfer(
                predictor.device,
                staged=is_staged(predictor.device),
                read_bytes=read_buffer_bytes(request.volume.chunk_bytes),
            ),
            workspace=workspace,
            windows=tuple(patch_window(made, head, predictor.device) for head in made.heads),
            output=output,
            normalizers=tuple(_normalizer(request, made, workspace, number) for number in range(len(made.heads))),
            read_pool=reads,
            write_pool=writes,
            allow_nonfinite=request.options["allow_nonfinite"],
            skip_value=request.options["skip_value"],
            on_patches=on_patches,
        )


def _normalizer(request: Request, made: Plan, workspace: Workspace, number: int) -> Normalizer:
    head, weights = made.heads[number], None
    if head.blended and not head.dense:
        weights = tuple(torch.from_numpy(w).to(torch.float32) for w in workspace.weights(number))
    return Normalizer(
        weights,
        postprocess_of(request.options, head.name, head.mode),
        request.looped,
        tile_voxels(head.max_channels),
        dense=head.dense,
        divide=head.blended,
        fill=request.options["output_fill"],
        allow_nonfinite=request.options["allow_nonfinite"],
    )
