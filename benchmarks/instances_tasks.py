"""Tasks of `benchmarks.instances`, each in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import nn

import oocpatch
from benchmarks.cells import compare, make_cells, renumbered
from benchmarks.measure import answer, measured


class Oracle(nn.Module):
    """A model that knows the cells, numbers them anew in every patch, and may be a voxel wrong at each boundary."""

    def __init__(self, *, perturbed: bool) -> None:
        super().__init__()
        self.perturbed = perturbed

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the labels of patches `(B, 1, *patch)`."""
        patches = batch[:, 0].numpy(force=True)
        return torch.from_numpy(np.stack([renumbered(p, perturbed=self.perturbed) for p in patches])[:, None])


def join(path: str, output: str, *, patch: int, overlap: int, perturbed: bool, workers: int | None) -> dict[str, Any]:
    """Join the cells of all patches; time, memory, and how many cells are split or merged."""
    with measured() as usage:
        result = oocpatch.predict(
            path,
            Oracle(perturbed=perturbed),
            output,
            patch_size=patch,
            patch_overlap=overlap,
            overlap_mode="instances",
            work="light",
            workers=workers,
            progress=False,
            overwrite=True,
        )
    plan = oocpatch.status(output)
    return {
        **compare(zarr.open_array(path, mode="r"), zarr.open_array(Path(output) / str(result.name), mode="r")),
        "objects": result.attrs["objects"],
        "blocks": plan.predict_total,
        "wall": usage.wall,
        "peak": usage.peak,
    }


if __name__ == "__main__":
    answer(make_cells, join)
