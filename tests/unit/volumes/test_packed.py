"""Promises on packed arrays: they are read as xarray reads them, or refused, and never as other numbers."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray
import zarr

import oocpatch

pytestmark = pytest.mark.filterwarnings("ignore:saving variable:xarray.SerializationWarning")

STORED = np.random.default_rng(1).integers(0, 100, (9, 14)).astype("int16")
VALUES = STORED * 0.5 + 20.0
WITH_GAP = np.where(STORED[0, 0] == STORED, np.nan, VALUES)

PACKINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "scale and offset": (VALUES, {"dtype": "int16", "scale_factor": 0.5, "add_offset": 20.0}),
    "scale alone": (VALUES, {"dtype": "int32", "scale_factor": 0.25}),
    "offset alone": (STORED + 1000.0, {"dtype": "uint8", "add_offset": 1000.0}),
    "integers for float32": (VALUES.astype("f4"), {"dtype": "int16", "scale_factor": 0.5}),
    "float32 scale": (VALUES, {"dtype": "int16", "scale_factor": np.float32(0.5)}),
    "gaps": (WITH_GAP, {"dtype": "int16", "scale_factor": 0.5, "add_offset": 20.0, "_FillValue": -9999}),
    "gaps without scale": (np.where(STORED > 90, np.nan, STORED), {"dtype": "int16", "_FillValue": -1}),
    "two kinds of gaps": (WITH_GAP, {"dtype": "int16", "scale_factor": 0.5, "_FillValue": -9, "missing_value": -9}),
    "gaps of floats": (WITH_GAP.astype("f4"), {"dtype": "float32", "_FillValue": -1.0}),
    "gaps that are NaN": (WITH_GAP.astype("f4"), {"dtype": "float32", "_FillValue": np.nan}),
    "unsigned bytes": (
        np.where(STORED > 90, np.nan, STORED + 100.0),
        {"dtype": "int8", "_Unsigned": "true", "_FillValue": -1},
    ),
    "booleans": (STORED > 50, {}),
    "floats as integers": (np.rint(VALUES), {"dtype": "int16", "_FillValue": -1}),
    "not packed": (STORED, {}),
}


def opened(folder: Path) -> list[Any]:
    """The ways to an array in a group."""
    group = zarr.open_group(folder, mode="r")
    return [folder, folder / "v", str(folder / "v"), group, group["v"], zarr.open(folder / "v", mode="r")]


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(("values", "encoding"), PACKINGS.values(), ids=PACKINGS)
def test_a_packed_zarr_is_read_as_xarray_reads_it(
    values: Any, encoding: dict[str, Any], zarr_format: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "in.zarr"
    dataset = xarray.Dataset({"v": (("y", "x"), values, {"long_name": "heat"})}, coords={"x": np.arange(14) * 2.0})
    dataset.to_zarr(folder, zarr_format=zarr_format, encoding={"v": encoding}, consolidated=False)
    expected = xarray.open_zarr(folder, consolidated=False)["v"]
    for number, source in enumerate(opened(folder)):
        volume = oocpatch.Volume(source)
        assert volume.dtype == expected.dtype
        whole = volume.source.load((slice(None), slice(None)))
        np.testing.assert_array_equal(whole, expected.values)
        part = pickle.loads(pickle.dumps(volume.source)).load((slice(2, 5), slice(3, 9)))  # noqa: S301
        np.testing.assert_array_equal(part, expected.values[2:5, 3:9])
        assert volume.source.attrs == {"long_name": "heat"}
        if number != 1:  # one of each kind
            continue
        result = oocpatch.predict(
            source, "identity", tmp_path / "out.zarr", patch_size=8, overlap_mode="crop", allow_nonfinite=True
        )
        assert result.dtype == expected.dtype
        np.testing.assert_array_equal(result.values, expected.values)
    before = oocpatch.Volume(folder).fingerprint
    with_other_scale = zarr.open_group(folder, mode="r+")["v"]
    with_other_scale.attrs["scale_factor"] = 7.0
    assert oocpatch.Volume(folder).fingerprint != before


HDF5: dict[str, tuple[dict[str, Any], Any]] = {
    "scale and offset": ({"scale_factor": 0.5, "add_offset": 20.0}, VALUES),
    "arrays of one": ({"scale_factor": np.array([0.5]), "add_offset": np.array([20.0], "f4")}, VALUES),
    "gaps": ({"_FillValue": STORED[0, 0], "scale_factor": 0.5, "add_offset": 20.0}, WITH_GAP),
    "missing": ({"missing_value": STORED[0, :1], "scale_factor": 0.5, "add_offset": 20.0}, WITH_GAP),
    "unsigned": ({"_Unsigned": b"true"}, STORED),
    "not packed": ({"units": "K"}, STORED),
}


@pytest.mark.parametrize(("attributes", "expected"), HDF5.values(), ids=HDF5)
def test_a_packed_netcdf_is_decoded(attributes: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "in.h5", "w") as file:
        data = file.create_dataset("v", data=STORED, chunks=(4, 4))
        data.attrs.update(attributes)
        for axis, (name, n) in enumerate((("y", 9), ("x", 14))):
            scale = file.create_dataset(name, data=np.arange(n, dtype="int16"))
            scale.make_scale(name)
            data.dims[axis].attach_scale(scale)
        file["x"].attrs.update({"scale_factor": 0.5, "units": "m"})
        file["y"].attrs["units"] = "days since 2000-01-01"
    volume = oocpatch.Volume(tmp_path / "in.h5")
    np.testing.assert_array_equal(volume.source.load((slice(None), slice(None))), expected)
    assert volume.source.coords["x"].values.tolist() == [0.5 * i for i in range(14)]
    assert volume.source.coords["y"].values[3] == np.datetime64("2000-01-04")
    result = oocpatch.predict(
        tmp_path / "in.h5", "identity", tmp_path / "out.zarr", patch_size=8, overlap_mode="crop", allow_nonfinite=True
    )
    np.testing.assert_array_equal(result.values, expected)
    assert result["x"].values.tolist() == [0.5 * i for i in range(14)]
    assert result["y"].values[3] == np.datetime64("2000-01-04")


@pytest.mark.parametrize(
    "attributes",
    [{"scale_factor": "0.5"}, {"scale_factor": [1.0, 2.0]}, {"_FillValue": "none"}, {"add_offset": {"a": 1}}],
    ids=str,
)
def test_packing_that_xarray_refuses_is_refused(attributes: dict[str, Any], tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "in.zarr")
    group.create_array("v", data=STORED, dimension_names=("y", "x"), attributes=attributes)
    for source in opened(tmp_path / "in.zarr"):
        with pytest.raises(ValueError, match=r"cannot be decoded: .*in.zarr/v.*open it with xarray"):
            oocpatch.Volume(source)


def test_what_is_not_decoded_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An array that xarray does not open is read as it is stored, and the log says what is not applied."""
    attributes = {"scale_factor": 0.5, "_FillValue": 3}
    alone = zarr.create_array(tmp_path / "alone.zarr", data=STORED, dimension_names=("y", "x"), attributes=attributes)
    group = zarr.create_group(tmp_path / "in.zarr")
    unnamed = group.create_array("v", data=STORED, attributes=attributes)
    for source in (alone, tmp_path / "alone.zarr", unnamed, tmp_path / "in.zarr"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "oocpatch"):
            volume = oocpatch.Volume(source)
        assert np.array_equal(volume.source.load((slice(None), slice(None))), STORED)
        assert "without applying scale_factor, _FillValue" in caplog.text


def test_a_fill_value_of_zero_that_nobody_chose_is_no_gap(tmp_path: Path) -> None:
    """In Zarr 2 every array has one; it says nothing where nothing else does."""
    group = zarr.create_group(tmp_path / "in.zarr", zarr_format=2)
    names = {"_ARRAY_DIMENSIONS": ["y", "x"]}
    array = group.create_array("v", shape=(9, 14), dtype="uint8", chunks=(4, 4), fill_value=0, attributes=names)
    array[2:5] = 7
    volume = oocpatch.Volume(tmp_path / "in.zarr")
    assert volume.dtype == np.uint8
    assert np.array_equal(volume.source.load((slice(None), slice(None))), np.asarray(array[...]))


def test_empty_chunks_of_a_packed_array_are_skipped(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "in.zarr")
    array = group.create_array(
        "v", shape=(32, 32), dtype="int16", chunks=(16, 16), fill_value=-1, dimension_names=("y", "x"),
        attributes={"scale_factor": 2.0, "_FillValue": -1},
    )  # fmt: skip
    array[:16, :16] = 5
    result = oocpatch.predict(
        tmp_path / "in.zarr", "identity", tmp_path / "out.zarr", patch_size=16, skip_empty=True, overlap_mode="crop"
    )
    assert result.attrs["uncovered_voxels"] == 3 * 256
    assert np.array_equal(result[:16, :16], np.full((16, 16), 10.0))


def test_coordinates_beside_the_variable_are_decoded_and_no_volumes(tmp_path: Path) -> None:
    times = np.array(["2001-02-03", "2001-02-04", "2001-02-07"], "datetime64[ns]")
    dataset = xarray.Dataset(
        {"v": (("t", "y", "x"), np.arange(60.0).reshape(3, 4, 5))},
        coords={"t": times, "x": np.arange(5) * 0.1, "lat": (("y", "x"), np.ones((4, 5)))},
    )
    packing = {"dtype": "int16", "scale_factor": 0.1}
    dataset.to_zarr(tmp_path / "in.zarr", encoding={"v": {"dtype": "int16"}, "x": packing}, consolidated=False)
    result = oocpatch.predict(tmp_path / "in.zarr", "identity", tmp_path / "out.zarr", patch_size=4, progress=False)
    expected = xarray.open_zarr(tmp_path / "in.zarr", consolidated=False)["v"]
    assert np.array_equal(result["t"], times)
    assert np.array_equal(result["x"], expected["x"])
    assert np.allclose(result, expected)
