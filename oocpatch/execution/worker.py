"""Run tasks in the worker processes of a cluster.

```text
  driver:  plan, options --> calls/<token>/payload  <--read once-- worker process: task context
              |                                                        ^
              +----- task: address and digest of the payload, block ---+
```

A process opens a task context of the payload once, and keeps it until the call is over or a task of another call
arrives.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from distributed import get_worker

from oocpatch.engine.stages import TaskResult
from oocpatch.execution.dask_clients import log_dashboard
from oocpatch.execution.dask_cluster import ClusterExecutor
from oocpatch.execution.payload import PAYLOAD, RunHandle, WorkerPayload, importable, published_payload
from oocpatch.execution.scheduler import Stopped, Task
from oocpatch.execution.task_context import RunExecutor, RunInputs, Tasks
from oocpatch.execution.worker_calls import close_call, opened_call
from oocpatch.models.predictor import use_threads
from oocpatch.outputs.output import Output
from oocpatch.planning.plan import Plan
from oocpatch.progress import OnProgress, TaskDone
from oocpatch.storage.paths import StoragePath
from oocpatch.workspace.run_progress import BlockSet
from oocpatch.workspace.workspace import PLAN, Workspace

LOOK_SECONDS = 1.0
"""How often a worker checks that the run it works for is still there, and reports its progress."""


@contextlib.contextmanager
def cluster_executor(
    plan: Plan,
    inputs: RunInputs,
    workspace: Workspace,
    output: StoragePath,
    *,
    client: Any,
    processes: int | None,
    max_disk: int | None,
    on_progress: OnProgress,
) -> Iterator[RunExecutor]:
    """Run tasks in the worker processes of a `dask.distributed.Client`, `processes` of them at most, or all.

    `max_disk` bounds the workspace in bytes, with the copy of a volume in memory. `on_progress` is called with an event
    for each block that is done.
    """
    halved, reports = 0, ProgressReports(plan, on_progress)

    def on_done(task: Task, result: TaskResult) -> None:
        nonlocal halved
        halved += result.halved
        if task.stage == "predict":
            reports.finish(task.index)
        elif plan.labelling is not None and task.stage == "normalize":  # which reads the block again
            patches = plan.patches_in([task.index])
            on_progress(TaskDone(task.index, patches, patches * plan.bytes_per_patch))

    flush = output.flush if plan.table is None else output.parent.flush
    log_dashboard(client)
    with (
        published_payload(plan, inputs, workspace, output, max_disk) as handle,
        reports.received(client, handle.token),
        ClusterExecutor(client, handle, run_in_worker, close_call, processes, on_done) as cluster,
    ):
        yield RunExecutor(cluster, lambda: halved, lambda: cluster.run_on_all_workers(flush))


class ProgressReports:
    """The patches that workers report of the blocks that they are at, so that progress moves within a block.

    A report has the number of patches since the block began. A block that is computed again is counted once, and the
    end of a block counts what was not reported.
    """

    def __init__(self, plan: Plan, on_progress: OnProgress) -> None:
        self._plan = plan
        self._on_progress = on_progress
        self._patches: dict[int, int] = {}
        self._done = BlockSet(plan.blocks)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def received(self, client: Any, token: str) -> Iterator[None]:
        """Receive the reports of a call's workers, as events of Dask, while the `with` block lasts."""
        client.subscribe_topic(token, lambda event: self.report(*event[1]))
        try:
            yield
        finally:
            with contextlib.suppress(Exception):  # the scheduler may be gone
                client.unsubscribe_topic(token)

    def report(self, block: int, patches: int) -> None:
        """Count the patches of a block beyond those that were counted before."""
        with self._lock:
            counted = self._patches.get(block, 0)
            patches = min(patches, self._plan.patches_in([block]))
            if block in self._done or patches <= counted:
                return
            self._patches[block] = patches
        self._add(block, patches - counted)

    def finish(self, block: int) -> None:
        """Count the patches of a block that were not reported; reports of it that come later do not count."""
        with self._lock:
            if block in self._done:  # computed again, because its partials were damaged
                return
            self._done.add(block)
            counted = self._patches.pop(block, 0)
        self._add(block, self._plan.patches_in([block]) - counted)

    def _add(self, block: int, patches: int) -> None:
        if patches:
            self._on_progress(TaskDone(block, patches, patches * self._plan.bytes_per_patch))


class ProgressReporter:
    """Reports the patches of the block that a worker process is at, now and then."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._block = self._patches = -1
        self._reported_at = time.monotonic()

    def __call__(self, event: TaskDone) -> None:
        """Count the patches of an event; report them where the last report is some time ago."""
        if event.block != self._block:
            self._block, self._patches = event.block, 0
        self._patches += event.patches
        if time.monotonic() - self._reported_at >= LOOK_SECONDS:
            self._reported_at = time.monotonic()
            get_worker().log_event(self._token, (self._block, self._patches))


def run_in_worker(handle: RunHandle, task: Task, rank: int) -> TaskResult:
    """Run one task of a call in a worker process, on the device of its rank on the host.

    Idempotent: as the stages are.

    Raises:
        ClusterLost: when this process cannot take part.
        Stopped: when the call is over.
    """
    open_tasks = functools.partial(_open_tasks, handle, rank)
    with opened_call(handle.token, handle.versions, open_tasks, _NEEDS) as tasks:
        before, threads = tasks.halved(), torch.get_num_threads()
        use_threads(1)
        try:
            result: TaskResult = tasks.run(task)
            return replace(result, halved=tasks.halved() - before)
        finally:
            use_threads(threads)


_NEEDS = (
    "see volume, output and workspace under the paths that the client sees, and be able to import what the client "
    "imports"
)


def _open_tasks(handle: RunHandle, rank: int, stopped: threading.Event, stack: contextlib.ExitStack) -> Tasks:
    data = (handle.folder / PAYLOAD).read_bytes()
    if hashlib.sha256(data).hexdigest() != handle.digest:
        raise ValueError("the payload of the run is not the one that the client wrote")
    stack.enter_context(importable(handle.path))
    payload: WorkerPayload = pickle.loads(data)  # noqa: S301 - what the client wrote, by its SHA-256
    plan, inputs = payload.open(rank)
    guard = RunGuard(handle.root / PLAN)

    reporter = ProgressReporter(handle.token)

    def check_stopped(event: TaskDone) -> None:
        if stopped.is_set():
            raise Stopped
        guard.check(LOOK_SECONDS)
        reporter(event)

    output = GuardedOutput(handle.output, plan, guard)
    return stack.enter_context(inputs.open_tasks(plan, inputs, Workspace(handle.root, plan), output, check_stopped))


class RunGuard:
    """Stops tasks whose run is gone, with the file or object that is there for as long as the run is."""

    def __init__(self, path: StoragePath) -> None:
        self._path = path
        self._checked_at = -math.inf
        self._patience = 0.0 if path.is_local else LOOK_SECONDS

    def check(self, seconds: float | None = None) -> None:
        """Check that the run is there, unless it was so many seconds ago, 0 by default.

        In an object store, where a request takes a while, the default is `LOOK_SECONDS`: a process that was frozen
        until another one took over has not checked for longer.

        Raises:
            Stopped: when the run is gone.
            OSError: when an object store does not answer.
        """
        if time.monotonic() - self._checked_at >= (self._patience if seconds is None else seconds):
            if not self._path.is_file():
                raise Stopped
            self._checked_at = time.monotonic()


class GuardedOutput(Output):
    """An output that is written to only while its run is there.

    A process that was frozen comes back late, perhaps when another run has the output.
    """

    def __init__(self, path: StoragePath, plan: Plan, guard: RunGuard) -> None:
        super().__init__(path, plan)
        self._guard = guard

    def write(self, *args: Any, **kwargs: Any) -> None:
        self._guard.check()
        super().write(*args, **kwargs)
