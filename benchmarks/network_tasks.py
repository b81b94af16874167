"""One run of one architecture: the time of its plan, the memory that it promises, and the memory that the run adds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import oocpatch
from benchmarks.architectures import ARCHITECTURES
from benchmarks.contest import remove
from benchmarks.measure import answer, measured
from oocpatch.errors import PlanTooLarge


def run_network(name: str, directory: str, max_memory: str, threads: int, batch_size: int) -> dict[str, Any]:
    """Plan and run over a volume of three patches, or report a refusal."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    network = architecture.make().eval()
    target = Path(directory) / "result.zarr"
    options: dict[str, Any] = {"patch_size": architecture.patch, "axes": "czyx"[-len(architecture.patch) :]}
    options |= {"max_memory": max_memory, "batch_size": batch_size, "progress": False, "output_chunks": 32}
    options["patch_overlap"] = tuple(side // 2 for side in architecture.patch)
    if architecture.channels > 1:
        options["axes"] = "c" + options["axes"]
    remove(target)
    small = {**options, "patch_size": 16, "patch_overlap": 8}
    oocpatch.predict(_volume(architecture.channels, (32,) * len(architecture.patch)), _Warm(), target, **small)
    remove(target)
    first, *others = architecture.patch
    volume = _volume(architecture.channels, ((1 + batch_size) * first, *others))
    started = time.perf_counter()
    try:
        with measured() as planning:
            plan = oocpatch.plan(volume, network, target, **options)
    except PlanTooLarge as error:
        seconds = time.perf_counter() - started
        return {"refused": str(error), "planning": seconds, "planning_peak": planning.peak}
    with measured() as usage:
        plan.run()
    parts = dict(plan.memory_parts)
    return {
        "planning": planning.wall,
        "planning_peak": planning.peak,
        "projected": plan.projected_memory,
        "retained": plan.retained_memory,
        "model": parts.get("model", 0),
        "peak": usage.peak,
        "wall": usage.wall,
        "patches": plan.patches,
    }


class _Warm(torch.nn.Module):
    """A module without work, by which the imports and threads of a run are there before anything is measured."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Return other values of the same shape."""
        return patches + 1


def _volume(channels: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.zeros((channels, *shape) if channels > 1 else shape, np.float32)


if __name__ == "__main__":
    answer(run_network)
