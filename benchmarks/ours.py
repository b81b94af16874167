"""oocpatch at the same jobs as its peers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
import zarr

import oocpatch
from benchmarks.contest import Job, Run, contend, until_first_patch
from benchmarks.measure import answer, measured
from benchmarks.models import network


def predict(
    max_memory: str = "1GiB",
    workers: int | None = None,
    output_dtype: str | None = None,
    overlap_mode: str = "hann",
    **job: Any,
) -> dict[str, Any]:
    """A run, with all that a run does; how much memory its plan promised, and in how many blocks."""
    options = {"max_memory": max_memory, "workers": workers, "output_dtype": output_dtype, "overlap_mode": overlap_mode}
    return contend(_runner(options), **job)


def first_patch(max_memory: str = "1GiB", **job: Any) -> dict[str, Any]:
    """Seconds from the call until the network gets its first patch."""
    return until_first_patch(lambda clock: _runner({"max_memory": max_memory}, clock), **job)


def _runner(options: dict[str, Any], model: torch.nn.Module | None = None) -> Run:
    def run(task: Job) -> dict[str, Any]:
        plan = oocpatch.plan(
            task.source,
            network(task.model) if model is None else model,
            task.target,
            patch_size=task.patch,
            patch_overlap=task.overlap,
            axes="yxc" if task.image else "zyx",
            output_chunks=task.chunk,
            progress=False,
            **options,
        )
        plan.run()
        names = ("projected_memory", "patches", "blocks", "block_shape", "concurrency")
        return {name: getattr(plan, name) for name in names}

    return run


def export(source: str, target: str, max_memory: str, chunk: int, read: bool = False) -> dict[str, Any]:
    """An export, the size of the file that it wrote and that is deleted, and a conversion of it back to Zarr.

    Imports are not measured.
    """
    small = zarr.create_array(f"{target}.zarr", data=np.ones((64, 64, 64), "f4"), chunks=(32,) * 3, overwrite=True)
    file = oocpatch.export(small, target, axes="zyx", progress=False)
    with measured() as usage:
        oocpatch.export(source, file, axes="zyx", max_memory=max_memory, overwrite=True, progress=False)
    record = {"peak": usage.peak, "wall": usage.wall, "cpu": usage.cpu, "size": file.stat().st_size}
    if read:
        back = f"{target}.back.zarr"
        with measured() as usage:
            oocpatch.convert(file, back, chunks=chunk, levels=1, max_memory=max_memory, overwrite=True, progress=False)
        record |= {"read_peak": usage.peak, "read_wall": usage.wall, "read_cpu": usage.cpu}
        shutil.rmtree(back)
    file.unlink()
    return record


def print_help() -> dict[str, Any]:
    """Seconds that `oocpatch --help` takes, from the start of the interpreter to its end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "oocpatch", "--help"], stdout=subprocess.DEVNULL, check=True)
    return {"first": time.perf_counter() - started, "imports": 0.0}


if __name__ == "__main__":
    answer(predict, first_patch, export, print_help)
