"""The tasks of `objects`: blocks are measured on threads of this process, or in worker processes of a cluster."""

from __future__ import annotations

import contextlib
import functools
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from oocpatch.engine.buffers import lean_heap
from oocpatch.engine.stages import TaskResult
from oocpatch.execution.scheduler import Executor, Stopped, Task, ThreadExecutor
from oocpatch.objects.block_measurement import MeasurementContext, measure_block
from oocpatch.objects.moments import SEGMENT
from oocpatch.objects.table_plan import TablePlan
from oocpatch.objects.table_workspace import PLAN, TableWorkspace
from oocpatch.progress import OnProgress, TaskDone
from oocpatch.storage.paths import LocalPath
from oocpatch.volumes.volume import Volume


@contextlib.contextmanager
def thread_tasks(
    workspace: TableWorkspace, labels: Volume, intensity: Volume | None, on_progress: OnProgress
) -> Iterator[Executor]:
    """Run tasks on Dask's threads in this process."""
    stop, plan = threading.Event(), workspace.plan

    def check_stopped(event: TaskDone) -> None:
        if stop.is_set():
            raise Stopped
        if event.patches:
            on_progress(event)

    with (
        _context(workspace, labels, intensity, check_stopped) as context,
        ThreadPoolExecutor(plan.concurrency, "oocpatch-block") as pool,
    ):
        yield ThreadExecutor(pool, plan.concurrency, lambda task: measure_block(context, task.index), stop)


@contextlib.contextmanager
def _context(
    workspace: TableWorkspace, labels: Volume, intensity: Volume | None, on_progress: OnProgress
) -> Iterator[MeasurementContext]:
    """Open what the tasks of one process share."""
    lean_heap(workspace.plan.scratch, SEGMENT * np.dtype(np.int64).itemsize)
    with contextlib.ExitStack() as stack:

        def opened(volume: Volume) -> Volume:
            volume = volume.for_run(1)
            stack.callback(volume.source.close)
            return volume

        of_intensity = None if intensity is None else opened(intensity)
        yield MeasurementContext(workspace.plan, opened(labels), of_intensity, workspace.root, on_progress)


@dataclass(frozen=True, slots=True)
class TableHandle:
    """The call of `objects` that a task belongs to, with what a worker opens of it.

    Attributes:
        token: name of the call.
        root: the workspace, which workers must see under the same address.
        payload: the plan and the volumes' addresses, pickled.
        versions: versions of the client.
    """

    token: str
    root: str
    payload: bytes
    versions: dict[str, str | None]


@contextlib.contextmanager
def cluster_tasks(
    workspace: TableWorkspace,
    labels: Volume,
    intensity: Volume | None,
    on_progress: OnProgress,
    *,
    client: Any,
    processes: int | None,
) -> Iterator[Executor]:
    """Run tasks in the worker processes of a `dask.distributed.Client`."""
    import secrets  # noqa: PLC0415 - for clusters only, as what follows, a second of imports

    from oocpatch.execution.dask_clients import log_dashboard, versions_here  # noqa: PLC0415
    from oocpatch.execution.dask_cluster import ClusterExecutor, pickled  # noqa: PLC0415
    from oocpatch.execution.payload import volume_ref  # noqa: PLC0415
    from oocpatch.execution.worker_calls import close_call  # noqa: PLC0415

    plan, token = workspace.plan, secrets.token_hex(8)
    folder = workspace.root / "calls" / token
    folder.parent.remove_tree()  # of calls that were killed
    folder.make_folder()

    def on_done(task: Task, _: TaskResult) -> None:
        core = plan.core_of(task.index)
        on_progress(TaskDone(task.index, core.size, core.size * labels.channels * labels.dtype.itemsize))

    log_dashboard(client)
    try:
        refs = [
            None if volume is None else volume_ref(volume, folder, name, None)
            for name, volume in (("labels", labels), ("intensity", intensity))
        ]
        handle = TableHandle(token, str(workspace.root), pickled((plan, *refs)), versions_here())
        with ClusterExecutor(client, handle, measure_in_worker, close_call, processes, on_done) as cluster:
            yield cluster
    finally:
        folder.remove_tree()
        folder.parent.remove_if_empty()


def measure_in_worker(handle: TableHandle, task: Task, _rank: int) -> TaskResult:
    """Measure one block of a call in a worker process.

    Idempotent: as `measure_block`.

    Raises:
        ClusterLost: when this process cannot take part.
        Stopped: when the call is over.
    """
    from oocpatch.execution.worker_calls import opened_call  # noqa: PLC0415 - imports distributed

    needs = "see labels, intensity and workspace under the paths that the client sees"
    open_context = functools.partial(_open_context, handle)
    with opened_call(handle.token, handle.versions, open_context, needs) as context:
        return measure_block(context, task.index)


def _open_context(handle: TableHandle, stopped: threading.Event, stack: contextlib.ExitStack) -> MeasurementContext:
    plan: TablePlan
    plan, labels_ref, intensity_ref = pickle.loads(handle.payload)  # noqa: S301 - what the client sent
    labels: Volume = labels_ref.open()
    intensity: Volume | None = None if intensity_ref is None else intensity_ref.open()
    root = LocalPath(handle.root)

    def check_stopped(_: TaskDone) -> None:
        if stopped.is_set() or not (root / PLAN).is_file():
            raise Stopped

    check_stopped(TaskDone(0, 0, 0))
    if labels.signature != plan.parameters["labels"]:
        raise ValueError(f"the labels at {labels.source.location} are not those that the client reads")
    if intensity is not None and intensity.signature != plan.parameters["intensity"][0]:
        raise ValueError(f"the intensity at {intensity.source.location} is not the one that the client reads")
    return stack.enter_context(_context(TableWorkspace(root, plan), labels, intensity, check_stopped))
