"""Work in other processes: what a worker of a cluster makes of a recipe, and the executor that hands it out.

```text
  driver:  request, plan --> calls/<token>/recipe  <--read once-- worker process: job
              |                                                        ^
              +----- task: address and digest of the recipe, block ----+
```

A process makes a job of the recipe once, and keeps it until the call is over or a task of another call arrives.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import pickle
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from oocpatch.configuration.run_config import Request
from oocpatch.engine.patch_selection import Mask, Selection
from oocpatch.engine.stages import TaskContext, TaskResult
from oocpatch.errors import ClusterLost
from oocpatch.execution.dask_clients import MUST_AGREE, device_of_rank, disagreement, log_dashboard, versions_here
from oocpatch.execution.dask_cluster import Cluster
from oocpatch.execution.payload import RunHandle, WorkerPayload, published_payload
from oocpatch.execution.scheduler import Stopped, Task
from oocpatch.execution.task_context import open_task_context, run_task
from oocpatch.models.fingerprint import model_fingerprint
from oocpatch.models.loading import load_models
from oocpatch.models.predictor import use_threads
from oocpatch.outputs.output import Output
from oocpatch.planning.plan import Plan, differences
from oocpatch.storage.files import flush
from oocpatch.storage.paths import Address
from oocpatch.storage.retries import transient
from oocpatch.workspace.workspace import PLAN, Workspace

LOOK_SECONDS = 1.0
"""How often a worker looks whether the run it works for is still there."""


@contextlib.contextmanager
def cluster_of(
    request: Request, made: Plan, workspace: Workspace, on_patches: Callable[[int], None]
) -> Iterator[tuple[Cluster, Callable[[], int], Callable[[], None]]]:
    """The executor of a call with a client; how many batches its processes halved; what flushes what they wrote."""
    halved = 0

    def on_done(task: Task, done: TaskResult) -> None:
        nonlocal halved
        halved += done.halved
        if task.stage == "predict":
            on_patches(made.patches_in([task.index]))

    log_dashboard(request.client)
    with (
        published_payload(request, made, workspace) as call,
        Cluster(request.client, call, work, drop, request.options["processes"], on_done) as executor,
    ):
        yield executor, lambda: halved, lambda: executor.everywhere(functools.partial(flush, request.output))


# What a worker process holds. One call at a time, so that memory is what the plan says.
_turn = threading.Lock()
"""One block at a time, whatever the number of Dask's threads: the device and `max_memory` are those of the process."""
_ended: deque[str] = deque(maxlen=1000)


@dataclass
class _Held:
    """The job of a call, and what closes it."""

    token: str
    job: TaskContext
    stack: contextlib.ExitStack
    stopped: threading.Event


_held: _Held | None = None


def work(call: RunHandle, task: Task, place: int) -> TaskResult:
    """Do one task in a worker process.

    Idempotent: as the stages are.

    Args:
        call: the call it belongs to.
        task: what to do.
        place: number of this process among those of its host, which says what device it uses.

    Raises:
        ClusterLost: when this process cannot take part.
        Stopped: when the call is over.
    """
    with _turn:
        held = _hold(call, place)
        threads = torch.get_num_threads()
        use_threads(1)
        try:
            halving = held.job.predictor.halving
            before = halving.count
            done = run_task(held.job, task)
            return replace(done, halved=halving.count - before)
        finally:
            use_threads(threads)
            if held.stopped.is_set():
                _let_go()


def drop(token: str) -> None:
    """Let go of a call; a task that is under way gives up at its next patch."""
    _ended.append(token)
    held = _held
    if held is not None and held.token == token:
        held.stopped.set()
        if _turn.acquire(blocking=False):
            try:
                _let_go()
            finally:
                _turn.release()


def _let_go() -> None:
    global _held  # noqa: PLW0603 - one per process
    if _held is not None:
        _held.stack.close()
        _held = None


def _hold(call: RunHandle, place: int) -> _Held:
    """The job of a call: opened when its first task comes."""
    global _held  # noqa: PLW0603 - one per process
    if call.token in _ended:
        raise Stopped
    if _held is not None and _held.token == call.token:
        return _held
    _let_go()
    where = f"worker process {os.getpid()} on {socket.gethostname()} cannot take part"
    told = disagreement(call.versions, versions_here(), MUST_AGREE)
    if told:
        raise ClusterLost(f"{where}: workers must have the client's versions: {told}")
    with contextlib.ExitStack() as stack:
        stopped = threading.Event()
        try:
            job = _open(call, place, stopped, stack)
        except Exception as error:
            if transient(error) and not isinstance(error, ClusterLost):
                raise
            raise ClusterLost(
                f"{where}: {type(error).__name__}: {error}; workers must see volume, output and workspace under the "
                "paths that the client sees, and be able to import what the client imports"
            ) from error
        _held = _Held(call.token, job, stack.pop_all(), stopped)
    return _held


def _open(call: RunHandle, place: int, stopped: threading.Event, stack: contextlib.ExitStack) -> TaskContext:
    data = (call.folder / "recipe").read_bytes()
    if hashlib.sha256(data).hexdigest() != call.digest:
        raise ValueError("the recipe of the run is not the one that the client wrote")
    stack.enter_context(_importable(call.path))
    recipe: WorkerPayload = pickle.loads(data)  # noqa: S301 - what the client wrote, by its SHA-256
    made = Plan.from_json(recipe.plan)
    volume = recipe.volume.open()
    if volume.source.location not in (None, call.folder / "volume") and volume.fingerprint != made.parameters["volume"]:
        raise ValueError(f"the volume at {volume.source.location} is not the one that the client reads")
    device = device_of_rank(place, recipe.rest["options"]["device"], torch.cuda.device_count())
    rest = {**recipe.rest, "options": {**recipe.rest["options"], "device": device}}
    given = dict(recipe.model)
    models = load_models(given.pop("model"), **given, device=device)
    identities = [model_fingerprint(member) for member in models]
    if differences({"model": identities[0] if len(models) == 1 else identities}, made.parameters):
        raise ValueError("the model that is loaded here is not the one that the client has")
    request = Request(
        volume=volume,
        models=models,
        selection=Selection(None if recipe.mask is None else Mask(recipe.mask.open(), volume.shape), recipe.box),
        given={},
        client=None,
        **rest,
    )
    workspace = Workspace(call.root, made)
    fence = RunGuard(call.root / PLAN)

    def on_patches(_: int) -> None:
        if stopped.is_set():
            raise Stopped
        fence.look(LOOK_SECONDS)

    output = GuardedOutput(request.output, made, fence)
    return stack.enter_context(open_task_context(request, made, workspace, output, on_patches))


@contextlib.contextmanager
def _importable(folders: tuple[str, ...]) -> Iterator[None]:
    """Look for modules where the client does, too, after everything that is installed here."""
    before = list(sys.path)
    sys.path += folders
    try:
        yield
    finally:
        sys.path[:] = before


class RunGuard:
    """What is there for as long as a run is.

    Args:
        path: a file or an object.
    """

    def __init__(self, path: Address) -> None:
        self._path = path
        self._at = -math.inf
        self._patience = 0.0 if isinstance(path, Path) else LOOK_SECONDS

    def look(self, seconds: float | None = None) -> None:
        """See whether it is there, if that is not known of so many seconds ago.

        Args:
            seconds: default: 0; in an object store, where a request takes a while, those of a look now and then. Who
                was frozen for so long that another one took over has not looked for longer.

        Raises:
            Stopped: when it is not.
            OSError: when an object store does not answer.
        """
        if time.monotonic() - self._at >= (self._patience if seconds is None else seconds):
            if not self._path.is_file():
                raise Stopped
            self._at = time.monotonic()


class GuardedOutput(Output):
    """An output that is written to only while its run is there.

    A process that was frozen comes back late, perhaps when another run has the output.

    Args:
        path: the group.
        plan: the plan it was created with.
        fence: what is there for as long as the run is.
    """

    def __init__(self, path: Address, plan: Plan, fence: RunGuard) -> None:
        super().__init__(path, plan)
        self._fence = fence

    def write(self, *args: Any, **kwargs: Any) -> None:
        self._fence.look()
        super().write(*args, **kwargs)
