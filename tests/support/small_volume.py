"""A volume small enough to be refused many times, and a good call of `predict` on it for tests to spoil."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr

import oocpatch

SHAPE = (24, 20)
LAST = 24.0 * 20 - 1
"""The value of the last voxel of the last patch of the last block."""


def make_small_volume(path: Path) -> Path:
    """`arange` over `SHAPE` on disk, in float32, with named axes."""
    data = np.arange(24 * 20, dtype=np.float32).reshape(SHAPE)
    zarr.create_array(path, data=data, chunks=(8, 8), dimension_names=("y", "x"))
    return path


def predict(volume: Any, output: Any, model: Any = None, **options: Any) -> Any:
    """Half-overlapping patches of 8 voxels and the identity model, unless told otherwise."""
    arguments = {"patch_size": 8, "patch_overlap": 4, "progress": False}
    return oocpatch.predict(volume, model or "identity", output, **{**arguments, **options})
