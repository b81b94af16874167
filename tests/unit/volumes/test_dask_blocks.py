"""Promises on Dask and masked arrays: blocks are what their array declares, and no masked voxel counts as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray

import oocpatch
from oocpatch.planning.box import Box

SCAN = np.random.default_rng(0).integers(0, 200, (32, 48)).astype(np.uint8)
MASKED = np.ma.masked_greater(SCAN, 100)
SETTINGS: dict[str, Any] = {"patch_size": 16, "overlap_mode": "crop", "progress": False}


def blocks(function: Any, dtype: str, source: Any = SCAN) -> Any:
    """An array whose blocks are what a function makes of them, whatever it declares."""
    return da.from_array(source, chunks=16).map_blocks(function, dtype=dtype)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (MASKED, r"must not be a masked array.*volume\.filled"),
        (da.from_array(MASKED, chunks=16), r"must not be a masked array.*dask\.array\.ma\.filled"),
        (da.ma.masked_less(da.from_array(SCAN, chunks=16), 9), r"must not be a masked array.*dask\.array\.ma\.filled"),
    ],
    ids=["numpy", "from_array", "masked_less"],
)
def test_masked_arrays_are_refused(array: Any, message: str, tmp_path: Path) -> None:
    for make in (oocpatch.Volume, lambda value: oocpatch.Subject(t1=value)):
        with pytest.raises(ValueError, match=message):
            make(array)
    with pytest.raises(ValueError, match=r"mask: .*must not be a masked array"):
        oocpatch.predict(SCAN, "identity", tmp_path / "out.zarr", mask=array, **SETTINGS)
    assert not any(tmp_path.iterdir())


def test_a_masked_array_without_masked_voxels_is_read_as_it_is() -> None:
    volume = oocpatch.Volume(np.ma.array(SCAN))
    np.testing.assert_array_equal(volume.read(Box.of_shape(SCAN.shape))[0], SCAN)


def test_blocks_that_turn_out_to_be_masked_fail() -> None:
    array = da.from_array(SCAN, chunks=16)
    array = array.map_blocks(lambda block: np.ma.masked_greater(block, 100), meta=np.empty((0, 0), "u1"))
    volume = oocpatch.Volume(array)
    with pytest.raises(ValueError, match=r"blocks of the dask array must not be a masked array"):
        volume.read(Box.of_shape(SCAN.shape))


def test_a_masked_answer_of_a_model_fails(tmp_path: Path) -> None:
    def answer(patches: Any) -> Any:
        return np.ma.masked_greater(np.asarray(patches), 100)

    for model in (oocpatch.NumpyModel(answer), answer):
        with pytest.raises(oocpatch.BlockFailed, match=r"plain arrays, got a masked one; return x\.filled"):
            oocpatch.predict(SCAN, model, tmp_path / "out.zarr", overwrite=True, **SETTINGS)


def test_xarray_shows_masked_voxels_as_nan(tmp_path: Path) -> None:
    image = xarray.DataArray(da.from_array(MASKED, chunks=16), dims=("y", "x"))
    result = oocpatch.predict(image, "identity", tmp_path / "out.zarr", allow_nonfinite=True, **SETTINGS)
    np.testing.assert_array_equal(result, MASKED.astype(float).filled(np.nan))


def test_unknown_sizes_are_refused_until_they_are_computed() -> None:
    line = da.from_array(SCAN.ravel(), chunks=64)
    line = line[line > 100]
    with pytest.raises(ValueError, match=r"known shape, got \(nan,\).*compute_chunk_sizes"):
        oocpatch.Volume(line, "x")
    volume = oocpatch.Volume(line.compute_chunk_sizes(), "x")
    np.testing.assert_array_equal(volume.read(Box.of_shape(volume.shape))[0], SCAN[SCAN > 100])


@pytest.mark.parametrize(
    ("function", "declared", "expected"),
    [
        (lambda b: b.astype("f8"), "f4", SCAN.astype("f4")),
        (lambda b: b.astype("i8"), "u1", SCAN),  # as np.where and others give
        (lambda b: b.astype("f8"), "u1", SCAN),
        (lambda b: b > 100, "u1", (SCAN > 100).astype("u1")),
        (lambda b: b.astype("u1"), "i4", SCAN.astype("i4")),
        (lambda b: b.astype(">i2"), "i2", SCAN.astype("i2")),
        (np.asfortranarray, "u1", SCAN),
    ],
    ids=range(7),
)
def test_blocks_of_another_dtype_are_read_where_their_values_fit(function: Any, declared: str, expected: Any) -> None:
    volume = oocpatch.Volume(blocks(function, declared))
    values = volume.read(Box.of_shape(SCAN.shape))[0]
    assert values.dtype == expected.dtype
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize(
    ("function", "declared", "is_of"),
    [
        (lambda b: b * 0.5, "u1", "float64"),
        (lambda b: b.astype("i4") * 1000, "u1", "int32"),
        (lambda b: b.astype("i4") - 100, "u1", "int32"),
        (lambda b: b.astype("i8") + 2**40, "i4", "int64"),
        (lambda b: b, "bool", "uint8"),
        (lambda b: np.where(b > 100, np.nan, b), "u1", "float64"),
        (lambda b: b.astype("i8") + 2**24, "f4", "int64"),
    ],
    ids=range(7),
)
def test_blocks_whose_values_do_not_fit_the_declared_dtype_fail(function: Any, declared: str, is_of: str) -> None:
    volume = oocpatch.Volume(blocks(function, declared))
    with pytest.raises(ValueError, match=f"are {is_of}, not {np.dtype(declared)} as it declares, and do not fit"):
        volume.read(Box.of_shape(SCAN.shape))


@pytest.mark.parametrize(
    "function", [lambda b: b[:8], lambda b: b[:1], lambda b: b[:, :1]], ids=["half", "row", "column"]
)
def test_blocks_of_another_shape_than_declared_fail(function: Any) -> None:
    """Also those that would be broadcast."""
    volume = oocpatch.Volume(blocks(function, "u1"))
    with pytest.raises(ValueError, match=r"blocks of the dask array have shape .*, not \(16, 16\) as it declares"):
        volume.read(Box((0, 0), (16, 16)))
