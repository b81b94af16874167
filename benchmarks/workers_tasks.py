"""The steps of the workers benchmark; each in a process of its own: `python -m benchmarks.workers_tasks NAME JSON`."""

from __future__ import annotations

import hashlib
import heapq
import math
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import zarr

import oocpatch
from benchmarks.measure import answer, measured
from oocpatch.engine.stages import TaskResult
from oocpatch.execution import scheduler
from oocpatch.execution.dask_clients import connected
from oocpatch.execution.scheduler import Run, Task
from oocpatch.planning.plan import Plan
from oocpatch.planning.schedule import occupancy
from oocpatch.planning.workload import BYTES_PER_SECOND, TASK_SECONDS
from oocpatch.storage.paths import LocalPath
from oocpatch.workspace.ledger import NO_PARTIALS, Ledger, PartialsRef
from oocpatch.workspace.run_progress import RunProgress

CHUNK = 64


def waiting(seconds: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a model that waits so long for each patch, and returns it."""

    def model(patches: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds * len(patches))
        return patches.float()

    return model


def _volume(directory: str, edge: int) -> Path:
    """Return a volume: zeros, of which one voxel in each chunk is one."""
    path = Path(directory) / f"volume-{edge}.zarr"
    if not path.exists():
        array = zarr.create_array(path, shape=(edge,) * 3, chunks=(CHUNK,) * 3, dtype="uint8")
        if edge <= 512:
            array[::CHUNK, ::CHUNK, ::CHUNK] = 1
    return path


def _plan(directory: str, edge: int, patch: int, seconds: float, **options: Any) -> oocpatch.PlannedRun:
    arguments = {"model_args": {"seconds": seconds}, "axes": "zyx", "patch_size": patch, "patch_overlap": patch // 2}
    output = Path(directory) / f"out-{edge}.zarr"
    model = "benchmarks.workers_tasks:waiting"
    return oocpatch.plan(_volume(directory, edge), model, output, progress=False, **arguments, **options)


class VirtualWorkers:
    """An executor whose workers take the time of a plan's tasks, on a clock of its own."""

    def __init__(self, plan: Plan, workers: int, seconds: float) -> None:
        self.max_in_flight, self.normalize_slots = workers, 0
        self.now = self.busy = 0.0
        self._plan, self._seconds = plan, seconds
        self._under_way: list[tuple[float, int, Future[TaskResult], TaskResult]] = []
        self._count = 0
        self._each = TASK_SECONDS + (plan.bytes_read + plan.bytes_written) / plan.blocks / BYTES_PER_SECOND

    def submit(self, task: Task) -> Future[TaskResult]:
        """Begin a task at once: there are no more tasks than workers."""
        is_predict = task.stage == "predict"
        patches = self._plan.patches_in([task.index]) if is_predict else 0
        # a normalize task reads and writes no more than all stages of a block do on average
        seconds = self._each + patches * self._seconds
        ref = PartialsRef(task.index + 1, f"{task.index:015d}") if is_predict else NO_PARTIALS
        future: Future[TaskResult] = Future()
        self.busy, self._count = self.busy + seconds, self._count + 1
        heapq.heappush(self._under_way, (self.now + seconds, self._count, future, TaskResult(ref)))
        return future

    def wait(self, pending: Collection[Future[TaskResult]], **_: Any) -> tuple[set[Future[TaskResult]], None]:
        """Let time pass until a task is done."""
        assert len(pending) == len(self._under_way)
        self.now, _number, future, result = heapq.heappop(self._under_way)
        future.set_result(result)
        return {future}, None

    def stop(self) -> None:
        """Nothing is under way."""


def simulate(directory: str, edge: int, workers: int, patch: int, seconds: float) -> dict[str, Any]:
    """Run the driver over all blocks of a plan with virtual workers."""
    plan = _plan(directory, edge, patch, seconds).plan
    virtual, every = VirtualWorkers(plan, workers, seconds), range(plan.blocks)
    path = LocalPath(directory) / f"ledger-{edge}"
    progress, ledger = RunProgress(plan.blocks), Ledger(path)
    stages = Run(
        plan.block_grid,
        progress,
        ledger,
        lambda _: None,
        to_predict=every,
        to_normalize=every,
        order=plan.in_order(every),
    )
    with mock.patch.object(scheduler, "wait", virtual.wait), measured() as usage:
        stages.execute(virtual)
        ledger.close()
    ledger_bytes = sum(file.stat().st_size for file in Path(directory).glob(f"{path.name}*"))
    path.unlink()
    assert len(progress.partials) == plan.blocks
    assert math.isclose(sum(map(plan.patches_in, ([i] for i in every))), plan.patches)
    planned = occupancy(plan.block_patches, plan.block_grid.layer, workers, 0.0)
    return {
        "edge": edge,
        "workers": workers,
        "blocks": plan.blocks,
        "patches": plan.patches,
        "busy": virtual.busy / (workers * virtual.now),
        "planned_idle": planned.idle,
        "driver_cpu": usage.cpu,
        "driver_memory": usage.peak,
        "ledger": ledger_bytes,
    }


def compute(directory: str, edge: int, processes: int, patch: int, seconds: float) -> dict[str, Any]:
    """Compute in real processes, which are there before the clock starts."""
    with connected(None, processes) as client:
        client.run(_import)
        planned = _plan(directory, edge, patch, seconds, client=client)
        output = Path(planned.config.output)
        began = time.perf_counter()
        planned.run()
        wall = time.perf_counter() - began
    files = sorted(path for path in output.rglob("c/*") if path.is_file())
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()
    shutil.rmtree(output)
    return {"processes": processes, "wall": wall, "digest": digest, "files": len(files)}


def _import() -> None:
    import oocpatch.execution.worker  # noqa: F401, PLC0415 - a second or two of each process


if __name__ == "__main__":
    answer(simulate, compute)
