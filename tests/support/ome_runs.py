"""A table of runs that write OME-Zarr, and what their pyramids must hold: an oracle in plain numpy.

Voxels are small integers, so that labels and intensities have ties, and halves to be rounded.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray

import oocpatch


def labels_and_scores(patches: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"scores": patches / 2, "nuclei": patches.to(torch.int32) % 5, "cells": patches.to(torch.uint8) % 3}


def other_scales(patches: torch.Tensor) -> dict[str, torch.Tensor]:
    pool = torch.nn.functional.avg_pool2d
    return {
        "full": patches,
        "half": pool(patches, 2),
        "double": patches.repeat_interleave(2, 2).repeat_interleave(2, 3),
    }


@dataclass(frozen=True)
class Run:
    """One call of `predict`, of a volume with a voxel size and an origin per axis in space and time."""

    axes: str
    shape: tuple[int, ...]
    sizes: dict[str, float]
    origins: dict[str, float] = field(default_factory=dict)
    model: Any = field(default_factory=torch.nn.Identity)
    options: dict[str, Any] = field(default_factory=dict)
    units: str = "um"

    def volume(self) -> xarray.DataArray:
        data = np.random.default_rng(3).integers(0, 7, self.shape).astype(self.options.get("dtype", "float32"))
        coords: dict[str, Any] = {}
        for axis, n in zip(self.axes, self.shape, strict=True):
            if axis == "c":
                coords[axis] = [f"stain {i}" for i in range(n)]
            else:
                unit = "s" if axis == "t" else self.units
                values = np.arange(n) * self.sizes[axis] + self.origins.get(axis, 0.0)
                coords[axis] = (axis, values, {"units": unit})
        return xarray.DataArray(data, dims=tuple(self.axes), coords=coords, attrs={"patient": 7})

    def predict(self, output: Path, **more: Any) -> Any:
        options = {k: v for k, v in self.options.items() if k != "dtype"}
        common = {"patch_size": 8, "overlap_mode": "crop", "output_chunks": 4, "output_format": "ome-zarr"}
        return oocpatch.predict(self.volume(), self.model, output, **{**common, **options, **more})


RUNS = {
    "2-D": Run("yx", (37, 50), {"y": 0.5, "x": 0.5}, {"y": 100.0}),
    "3-D": Run("zyx", (9, 21, 34), {"z": 2.0, "y": 0.5, "x": 0.5}, {"z": -3.0}),
    "time": Run("tyx", (3, 20, 17), {"t": 5.0, "y": 1.0, "x": 1.0}),
    "channels": Run("cyx", (3, 20, 33), {"y": 0.1, "x": 0.1}),
    "time and channels": Run(
        "tczyx",
        (2, 3, 8, 12, 16),
        {"t": 1.5, "z": 1.0, "y": 1.0, "x": 1.0},
        options={"overlap_mode": "average", "patch_overlap": 4},
    ),
    "labels": Run("yx", (30, 41), {"y": 2.0, "x": 2.0}, options={"dtype": "uint16"}),
    "sharded": Run("zyx", (20, 33, 24), {"z": 1.0, "y": 1.0, "x": 1.0}, options={"output_shards": 8}),
    "labels beside an image": Run("yx", (33, 28), {"y": 0.5, "x": 0.5}, model=labels_and_scores),
    "scaled heads": Run("yx", (36, 28), {"y": 0.5, "x": 1.0}, {"x": 4.0}, model=other_scales),
}
"""By what they are for."""


def image_groups(name: str, output: Path) -> dict[str, Path]:
    """Where the image of each head of a run lies, as the documentation says."""
    if name == "labels beside an image":
        return {"scores": output, "nuclei": output / "labels/nuclei", "cells": output / "labels/cells"}
    if name == "scaled heads":
        return {head: output / head for head in ("full", "half", "double")}
    return {"prediction": output}


def coarser(values: npt.NDArray[Any], step: tuple[int, ...], *, labels: bool) -> npt.NDArray[Any]:
    """The next level, voxel by voxel: of those voxels of the level above that are there."""
    shape = tuple(-(-n // f) for n, f in zip(values.shape, step, strict=True))
    out = np.empty(shape, values.dtype)
    for index in itertools.product(*map(range, shape)):
        part = values[tuple(slice(i * f, i * f + f) for i, f in zip(index, step, strict=True))].ravel().tolist()
        if labels:
            counts = Counter(part)
            out[index] = min(label for label, count in counts.items() if count == max(counts.values()))
        else:
            mean = sum(part) / len(part)
            out[index] = round(mean) if values.dtype.kind in "iu" else mean
    return out
