"""A call for a fresh process that runs `predict` once and says how much memory the run added.

Fresh, because memory that an earlier run freed would be used again unseen.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

import dask
import numpy as np
import psutil
import torch
import zarr

import oocpatch
from oocpatch.configuration import make_plan
from oocpatch.execution import task_context
from oocpatch.planning import memory

SAMPLE_SECONDS = 0.005


class PeakSampler:
    """The largest resident size that this process has while the `with` block runs, in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._sample)

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __enter__(self) -> Self:
        # Where the kernel keeps the high-water mark, reset it: it also knows the peaks between two samples.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, high_water_mark())


def high_water_mark() -> int:
    """The kernel's mark in bytes, 0 where it keeps none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def add_one(patches: torch.Tensor) -> torch.Tensor:
    """Not zero anywhere: the output's chunks must really be written."""
    return patches + 1


def light(patches: torch.Tensor) -> torch.Tensor:
    """Two of ones, in steps that take no time, each with a tensor of its own."""
    return torch.sigmoid((patches[:, :2].float() - 1) / 30) * 4


def added_by_lazy(volume: str, options: dict[str, Any]) -> dict[str, float]:
    """Return the bytes that computing all chunks of a lazy result adds, each dropped when it is summed."""
    workers = options.pop("workers")
    before = psutil.Process().memory_info().rss
    with PeakSampler() as sampler:
        result = oocpatch.lazy(volume, add_one, progress=False, **options)
        with dask.config.set(scheduler="threads", num_workers=workers):
            mean = float(result.data.mean(dtype="float64", split_every=4).compute())
    return {"added": sampler.peak - before, "mean": mean, "chunks": result.data.npartitions}


def main(volume: str, output: str, options: dict[str, Any]) -> None:
    """Print `{"added", "projected", "written"}` in bytes, and the extremes of the output."""
    if options.pop("staged", False):  # the CPU stands in for a device with memory of its own
        make_plan.is_staged = task_context.is_staged = lambda _: True
        make_plan.device_memory = lambda *_: 64 << 20
        memory.DEVICE_LIBRARIES = 0  # which are CUDA's
    with tempfile.TemporaryDirectory() as warm_up:
        # Imports on first use, thread pools and the like belong to the process and not to the run.
        small = zarr.create_array(f"{warm_up}/in", shape=(64, 64, 64), chunks=(32, 32, 32), dtype="float32")
        arguments = {"patch_size": 16, "patch_overlap": 4, "block_shape": 32, "axes": "zyx", "progress": False}
        arguments |= {name: options[name] for name in ("workers", "output_format") if name in options}
        oocpatch.predict(small, add_one, f"{warm_up}/out", **arguments)
    model = light if options.pop("light", False) else add_one
    if options.pop("lazy", False):
        sys.stdout.write(json.dumps(added_by_lazy(volume, options)))
        return
    plan = oocpatch.plan(volume, model, output, progress=False, **options)
    before = psutil.Process().memory_info().rss
    with PeakSampler() as sampler:
        plan.run()
    place = "scale0/image" if options.get("output_format") == "ome-zarr" else "prediction"
    result = zarr.open_array(f"{output}/{place}", mode="r")
    probes = [result[tuple(slice(at * n // 2, at * n // 2 + 8) for n in result.shape)] for at in (0, 1)]
    probes.append(result[tuple(slice(-8, None) for _ in result.shape)])
    answer = {
        "added": sampler.peak - before,
        "projected": plan.projected_memory + plan.projected_device_memory,
        "workspace": plan.projected_disk,
        "blocks": plan.blocks,
        "lowest": min(float(np.min(probe)) for probe in probes),
        "highest": max(float(np.max(probe)) for probe in probes),
    }
    sys.stdout.write(json.dumps(answer))
