"""What the drivers of whole runs and of parts have in common: how a run begins, what it needs, and how it ends."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from oocpatch.configuration.run_config import Request
from oocpatch.execution.scheduler import Executor, Stopped, dask_threads
from oocpatch.execution.task_context import open_task_context, run_task
from oocpatch.outputs.ome_labels import register_label
from oocpatch.outputs.output import Output, create_output
from oocpatch.outputs.pyramid import build_pyramids
from oocpatch.outputs.record import inspect_output
from oocpatch.planning.plan import Plan
from oocpatch.provenance import run_facts
from oocpatch.run.status import bar_of, hidden, root_of
from oocpatch.storage.files import flush
from oocpatch.workspace.ledger import Ledger, Record
from oocpatch.workspace.run_progress import RunProgress
from oocpatch.workspace.segments import WHOLE
from oocpatch.workspace.workspace import Workspace, remove_workspace


def all_done(made: Plan, done: RunProgress) -> bool:
    """Whether nothing is left to do."""
    return len(done.predicted) == made.blocks and len(done.normalized) == made.block_grid.num_open


def set_up(request: Request, made: Plan, progress: str | bool, *, resuming: bool) -> Workspace:
    """The workspace to go on with, its weights written anew; or a new one, and an output that says it is incomplete."""
    found = inspect_output(request.output)
    if resuming and found is not None:
        workspace = Workspace(root_of(found), made)
        workspace.write_weights()
        return workspace
    if found is not None:
        remove_workspace(root_of(found))
    made = made.with_statistics(request.statistics(hidden=hidden(progress)))
    create_output(request.output, made, request.volume, request.workspace, found)
    return Workspace.create(request.workspace / made.run_id, made)


@contextlib.contextmanager
def open_ledger(workspace: Workspace, segment: str) -> Iterator[Ledger]:
    """The ledger, or a segment of it, committed and closed at the end."""
    ledger = workspace.ledger(segment)
    ledger.append(Record("begun", 0))
    try:
        yield ledger
    finally:
        ledger.close()


@contextlib.contextmanager
def open_executor(
    request: Request, workspace: Workspace, progress: str | bool, own: range, done: RunProgress
) -> Iterator[tuple[Executor, Callable[[], int], Callable[[], None]]]:
    """Where the tasks of a run are executed; how many batches were halved there; what flushes the output there."""
    made, stop = workspace.plan, threading.Event()
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(bar_of(made, progress, own, done.predicted))
        if request.client is not None:
            from oocpatch.execution.worker import cluster_of  # noqa: PLC0415 - a second of imports, for clusters only

            yield stack.enter_context(cluster_of(request, made, workspace, bar))
            return

        def on_patches(count: int) -> None:
            if stop.is_set():
                raise Stopped
            bar(count)

        job = stack.enter_context(open_task_context(request, made, workspace, Output(request.output, made), on_patches))
        threads = stack.enter_context(dask_threads(made.concurrency, functools.partial(run_task, job), stop))
        yield threads, lambda: job.predictor.halving.count, functools.partial(flush, request.output)


def details(request: Request, made: Plan, seconds: float, done: RunProgress, halved: int) -> dict[str, Any]:
    """Facts about a finished run, for the output's attributes."""
    return {
        **({"statistics": made.statistics} if made.statistics else {}),
        **({"halved_batches": halved} if halved else {}),
        "patches": made.patches,
        "blocks": made.blocks,
        "open_blocks": made.block_grid.num_open,
        "uncovered_voxels": done.uncovered,
        "nonfinite_voxels": done.nonfinite,
        "seconds": round(seconds, 3),
        "torch_threads": made.torch_threads,
        **run_facts(request.settings),
    }


def conclude(request: Request, workspace: Workspace, found: Mapping[str, Any], progress: str | bool) -> None:
    """Make the coarser levels, if there are any, and record success."""
    made, memory = workspace.plan, request.max_memory
    build_pyramids(request.output, workspace.root, max_memory=memory, workers=made.concurrency, progress=progress)
    Output(request.output, made).complete(found, workspace.root / WHOLE)
    register_label(request.output)
