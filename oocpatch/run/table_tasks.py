"""Where the blocks of a table are measured: on threads of this process, or in the worker processes of a cluster."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from oocpatch.engine.buffers import lean_heap
from oocpatch.engine.stages import TaskResult
from oocpatch.errors import ClusterLost
from oocpatch.execution.scheduler import Executor, Stopped, Task, ThreadExecutor
from oocpatch.objects.block_measurement import MeasurementContext, measure_block
from oocpatch.objects.moments import SEGMENT
from oocpatch.objects.table_plan import TablePlan
from oocpatch.objects.table_workspace import PLAN, TableWorkspace
from oocpatch.progress import OnProgress, TaskDone
from oocpatch.storage.paths import LocalPath
from oocpatch.storage.retries import transient
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
        opened = [None if volume is None else volume.for_run(1) for volume in (labels, intensity)]
        for volume in opened:
            if volume is not None:
                stack.callback(volume.source.close)
        assert opened[0] is not None
        yield MeasurementContext(workspace.plan, opened[0], opened[1], workspace.root, on_progress)


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


@dataclass(frozen=True, slots=True)
class _OpenCall:
    """The context of a call, and what closes it."""

    token: str
    context: MeasurementContext
    stack: contextlib.ExitStack
    stopped: threading.Event


_open_call: _OpenCall | None = None
_one_block = threading.Lock()
"""One block at a time, whatever the number of Dask's threads: `max_memory` is that of the process."""
_closed: deque[str] = deque(maxlen=1000)


def measure_in_worker(handle: TableHandle, task: Task, _rank: int) -> TaskResult:
    """Measure one block of a call in a worker process.

    Idempotent: as `measure_block`.

    Raises:
        ClusterLost: when this process cannot take part.
        Stopped: when the call is over.
    """
    with _one_block:
        call = _opened(handle)
        try:
            return measure_block(call.context, task.index)
        finally:
            if call.stopped.is_set():
                _close()


def close_call(token: str) -> None:
    """Close a call; a block that is under way is completed."""
    _closed.append(token)
    if _open_call is not None and _open_call.token == token:
        _open_call.stopped.set()
        if _one_block.acquire(blocking=False):
            try:
                _close()
            finally:
                _one_block.release()


def _close() -> None:
    global _open_call  # noqa: PLW0603 - one per process
    if _open_call is not None:
        _open_call.stack.close()
        _open_call = None


def _opened(handle: TableHandle) -> _OpenCall:
    """Return the open call; it is opened when its first task comes."""
    from oocpatch.execution.dask_clients import MUST_AGREE, disagreement, versions_here  # noqa: PLC0415 - as above

    global _open_call  # noqa: PLW0603 - one per process
    if handle.token in _closed:
        raise Stopped
    if _open_call is not None and _open_call.token == handle.token:
        return _open_call
    _close()
    process = f"worker process {os.getpid()} on {socket.gethostname()} cannot take part"
    if differing := disagreement(handle.versions, versions_here(), MUST_AGREE):
        raise ClusterLost(f"{process}: workers must have the client's versions: {differing}")
    with contextlib.ExitStack() as stack:
        stopped = threading.Event()
        try:
            context = stack.enter_context(_opened_context(handle, stopped))
        except Exception as error:
            if transient(error) and not isinstance(error, ClusterLost):
                raise
            raise ClusterLost(
                f"{process}: {type(error).__name__}: {error}; workers must see labels, intensity and workspace under "
                "the paths that the client sees"
            ) from error
        _open_call = _OpenCall(handle.token, context, stack.pop_all(), stopped)
    return _open_call


def _opened_context(
    handle: TableHandle, stopped: threading.Event
) -> contextlib.AbstractContextManager[MeasurementContext]:
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
    return _context(TableWorkspace(root, plan), labels, intensity, check_stopped)
