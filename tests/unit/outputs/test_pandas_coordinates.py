"""Promises on coordinates of pandas' own kinds: what Zarr cannot store is left out, and does not stop a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import oocpatch


@pytest.mark.parametrize(
    "rows",
    [
        pd.CategoricalIndex([f"row {i % 5}" for i in range(16)]),
        pd.interval_range(0, 16, 16),
        np.array([i if i % 2 else f"row {i}" for i in range(16)], object),
        pd.MultiIndex.from_product([range(4), range(4)], names=("a", "b")),
    ],
    ids=["categories", "intervals", "mixed", "levels"],
)
def test_coordinates_that_zarr_cannot_store_do_not_stop_a_run(rows: Any, tmp_path: Path) -> None:
    data = np.random.default_rng(0).random((16, 24), dtype=np.float32)
    is_levels = isinstance(rows, pd.MultiIndex)
    coords: Any = xr.Coordinates.from_pandas_multiindex(rows, "y") if is_levels else {"y": rows}
    volume = xr.DataArray(data, dims=("y", "x"), coords=coords).assign_coords(x=np.arange(24))
    result = oocpatch.predict(
        volume, "identity", tmp_path / "out.zarr", patch_size=8, overlap_mode="crop", progress=False
    )
    np.testing.assert_array_equal(result, data)
    np.testing.assert_array_equal(result["x"], np.arange(24))
