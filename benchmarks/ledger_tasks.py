"""The steps of the ledger benchmark; each in a process of its own: `python -m benchmarks.ledger_tasks NAME JSON`."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import zarr

import oocpatch
from benchmarks.measure import MIB, answer, measured
from oocpatch.engine.stages import TaskResult
from oocpatch.execution.scheduler import Run, Task
from oocpatch.outputs.integrity import copy_ledger
from oocpatch.outputs.output import create_output
from oocpatch.outputs.record import inspect_output
from oocpatch.planning.plan import Plan
from oocpatch.run.driver import workspace_root
from oocpatch.storage.paths import LocalPath
from oocpatch.volumes.volume import Volume
from oocpatch.workspace.ledger import NO_PARTIALS, Ledger, PartialsRef
from oocpatch.workspace.run_progress import RunProgress
from oocpatch.workspace.workspace import Workspace

PATCH, STRIDE, BLOCK = 16, 8, 16
"""Each block receives seams from up to seven neighbours."""


def _plan(directory: str, edge: int) -> tuple[Plan, LocalPath]:
    """A run over an empty volume."""
    volume, output = Path(directory) / f"empty-{edge}.zarr", LocalPath(directory) / "out.zarr"
    if not volume.exists():
        zarr.create_array(volume, shape=(edge * BLOCK,) * 3, chunks=(BLOCK,) * 3, dtype="uint8")
    made = oocpatch.plan(
        volume,
        torch.nn.Identity(),
        output,
        axes="zyx",
        patch_size=PATCH,
        patch_overlap=PATCH - STRIDE,
        block_shape=BLOCK,
        output_chunks=BLOCK,
        max_memory="4GiB",
    )
    return made, output


def _ledger(directory: str) -> LocalPath:
    return LocalPath(directory) / "ledger"


def plan_huge(directory: str, edge: int) -> dict[str, Any]:  # noqa: ARG001 - all steps have it
    """Make the plan of a volume of 10^15 voxels, without a stored chunk; it is as large for every `edge`."""
    _plan(directory, 4)
    volume = Path(directory) / "huge.zarr"
    zarr.create_array(volume, shape=(100_000,) * 3, chunks=(128,) * 3, dtype="uint8", overwrite=True)
    with measured() as usage:
        made = oocpatch.plan(
            volume,
            torch.nn.Identity(),
            Path(directory) / "out.zarr",
            axes="zyx",
            patch_size=96,
            patch_overlap=24,
            max_memory="4GiB",
            max_disk="1PiB",
        )
    return {**vars(usage), "blocks": made.blocks, "result": f"{made.patches:,} patches"}


def plan_blocks(directory: str, edge: int) -> dict[str, Any]:
    """Make the plan, and look at its first and last blocks."""
    _plan(directory, 4)
    with measured() as usage:
        made, _ = _plan(directory, edge)
        last = made.block_grid[made.blocks - 1]
        sources = made.block_grid.sources(last)
    return {**vars(usage), "result": f"{made.patches:,} patches, {len(sources)} seams"}


class Idle:
    """An executor whose tasks do nothing, and are done at once."""

    max_in_flight, normalize_slots = 2, 0

    def submit(self, task: Task) -> Future[TaskResult]:
        """Say what a stage would."""
        promise = PartialsRef(task.index + 1, f"{task.index:015d}") if task.stage == "predict" else NO_PARTIALS
        future: Future[TaskResult] = Future()
        future.set_result(TaskResult(promise, unit_checksums="AAAAAA=="))
        return future

    def stop(self) -> None:
        """Nothing is under way."""


def drive(directory: str, edge: int) -> dict[str, Any]:
    """Run both stages over all blocks, with tasks that do nothing."""
    made, _ = _plan(directory, edge)
    done, every = RunProgress.read([_ledger(directory)], made.blocks), range(made.blocks)
    with measured() as usage:
        ledger = Ledger(_ledger(directory))
        Run(made.block_grid, done, ledger, lambda _: None, to_predict=every, to_normalize=every).execute(Idle())
        ledger.close()
    size = _ledger(directory).stat().st_size
    return {**vars(usage), "result": f"{len(done.partials) + len(done.normalized):,} records, {size / MIB:.0f} MiB"}


def read_progress(directory: str, edge: int) -> dict[str, Any]:
    """Read the ledger, as a resume does."""
    with measured() as usage:
        found = RunProgress.read([_ledger(directory)], edge**3)
    return {**vars(usage), "result": f"{len(found.partials):,} of {edge**3:,} blocks"}


def keep(directory: str, edge: int) -> dict[str, Any]:
    """Gather the records that stand, as the end of a run does."""
    with measured() as usage:
        copy_ledger(_ledger(directory), LocalPath(directory) / "kept", edge**3)
    return {**vars(usage), "result": f"{(Path(directory) / 'kept').stat().st_size / MIB:.0f} MiB"}


def tell_status(directory: str, edge: int) -> dict[str, Any]:
    """Say how far the run is, from its workspace alone."""
    made, output = _plan(directory, edge)
    create_output(
        output,
        made,
        Volume(Path(directory) / f"empty-{edge}.zarr", "zyx"),
        LocalPath(directory) / "workspace" / made.run_id,
        None,
    )
    record = inspect_output(output)
    assert record is not None
    workspace = Workspace.create(workspace_root(record), made, output)
    _ledger(directory).rename(workspace.root / "ledger")
    with measured() as usage:
        found = oocpatch.status(output)
    (workspace.root / "ledger").rename(_ledger(directory))
    return {**vars(usage), "result": f"{found.predict_done:,} blocks done"}


if __name__ == "__main__":
    answer(plan_huge, plan_blocks, drive, read_progress, keep, tell_status)
