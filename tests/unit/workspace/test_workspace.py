"""Promises on what a workspace stores: weights and sums are Zarr arrays, though zarr does not write them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import zarr

import oocpatch
from oocpatch.planning.windows import axis_weights
from oocpatch.storage.paths import LocalPath
from oocpatch.workspace.partials import write_metadata
from oocpatch.workspace.workspace import Workspace


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "int64", "bool"])
def test_zarr_reads_what_is_written_beside_its_metadata(dtype: str, tmp_path: Path) -> None:
    values = np.arange(6).reshape(2, 3).astype(dtype)
    write_metadata(LocalPath(tmp_path / "sums"), (2, 7), (2, 3), dtype)
    (tmp_path / "sums" / "c.0.1").write_bytes(values.astype(values.dtype.newbyteorder("<")).tobytes())
    array = zarr.open_array(tmp_path / "sums", mode="r")
    assert (array.dtype, array.shape, array.chunks) == (values.dtype, (2, 7), (2, 3))
    np.testing.assert_array_equal(array[:, 3:6], values)
    missing = np.asarray(array[:, :3])
    assert np.isnan(missing).all() if values.dtype.kind == "f" else not missing.any()


def test_stored_weights_are_the_sums_of_windows_and_others_are_refused(tmp_path: Path) -> None:
    data = np.ones((20, 17), np.float32)
    plan = oocpatch.plan(data, "identity", tmp_path / "out", patch_size=8, patch_overlap=(4, 3)).plan
    workspace = Workspace.create(LocalPath(tmp_path / "work"), plan, LocalPath(tmp_path / "out"))
    expected = [axis_weights("hann", axis) for axis in plan.grid.axes]
    for name, read, right in zip("yx", workspace.weights(0), expected, strict=True):
        np.testing.assert_array_equal(read, right)
        np.testing.assert_array_equal(zarr.open_array(tmp_path / "work" / "weights" / "0" / name, mode="r")[:], right)
    chunk = tmp_path / "work" / "weights" / "0" / "x" / "c.0"
    os.truncate(chunk, 8)
    with pytest.raises(oocpatch.CorruptData, match="are not what was written"):
        workspace.weights(0)
    chunk.unlink()
    with pytest.raises(oocpatch.CorruptData, match="are not what was written"):
        workspace.weights(0)
