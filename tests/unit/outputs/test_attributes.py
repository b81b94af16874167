"""Promises on attributes: an output is read as it was written, whatever the attributes of its volume are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray
import zarr

import oocpatch

TRUTH = np.random.default_rng(0).integers(0, 4, (12, 16)).astype("int16")
SETTINGS: dict[str, Any] = {"patch_size": 8, "overlap_mode": "crop", "progress": False}


def scores(patches: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(patches[:, 0].long(), 4).movedim(-1, 1).float()


def in_zarr(folder: Path, attributes: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    zarr.create_array(folder / "in.zarr", data=TRUTH, dimension_names=("y", "x"), attributes=attributes)
    return folder / "in.zarr", {}


def in_hdf5(folder: Path, attributes: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    with h5py.File(folder / "in.h5", "w") as file:
        file.create_dataset("layer", data=TRUTH).attrs.update({k: v for k, v in attributes.items() if v is not None})
    return folder / "in.h5", {"axes": "yx"}


def in_xarray(_folder: Path, attributes: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return xarray.DataArray(TRUTH, dims=("y", "x"), attrs=attributes), {}


ATTRIBUTES: dict[str, dict[str, Any]] = {
    "packed": {"scale_factor": 0.01, "add_offset": 283.73},
    "packed and masked": {"scale_factor": 2, "_FillValue": 3, "missing_value": 3},
    "masked": {"missing_value": 0},
    "several masks": {"missing_value": [0, 1]},
    "fill value of floats": {"_FillValue": "AAAAAAAA+H8="},
    "fill value of nothing": {"_FillValue": "none"},
    "scale of text": {"scale_factor": "0.1"},
    "scales of channels": {"scale_factor": [1.0, 2.0], "add_offset": [0.0, 0.0]},
    "unsigned": {"_Unsigned": "true"},
    "dates": {"units": "seconds since 2000-01-01", "calendar": "standard"},
    "dates without leap days": {"units": "days since 1850-01-01", "calendar": "noleap"},
    "no dates": {"units": "unknown since the flood"},
    "durations": {"units": "days", "dtype": "timedelta64[ns]"},
    "booleans": {"dtype": "bool"},
    "text": {"_Encoding": "utf-8"},
    "flags": {"flag_values": [0, 1], "flag_meanings": "no yes", "flag_masks": [1, 2]},
    "ranges": {"valid_range": [0, 2], "valid_min": 0, "valid_max": 2, "actual_range": [0, 3]},
    "rasters": {"nodatavals": [0], "nodata": 0, "fill_value": 0},
    "other variables": {"coordinates": "lat lon", "grid_mapping": "crs", "bounds": "b", "ancillary_variables": "q"},
    "dimensions": {"_ARRAY_DIMENSIONS": ["a", "b"]},
}


@pytest.mark.parametrize("kind", [in_zarr, in_hdf5, in_xarray], ids=["zarr", "hdf5", "xarray"])
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_labels_are_labels(kind: Any, name: str, tmp_path: Path) -> None:
    """They are read as they were written, by predict and by xarray, and say nothing about values of the volume."""
    attributes, number = ATTRIBUTES[name], list(ATTRIBUTES).index(name) + (kind is in_hdf5)
    output_format = ("zarr", "ome-zarr")[number % 2]  # for each attribute both, of different kinds of volumes
    volume, extra = kind(tmp_path, {**attributes, "long_name": "land cover", "history": "made"})
    out = tmp_path / "out.zarr"
    labels = oocpatch.predict(
        volume, scores, out, **SETTINGS, **extra, postprocess="argmax", output_format=output_format
    )
    assert labels.dtype == np.uint8
    assert np.array_equal(labels.values, TRUTH)
    group, name = (out / "scale0", "image") if output_format == "ome-zarr" else (out, labels.name)
    stored = xarray.open_zarr(group, consolidated=False)[name]
    assert stored.dtype == np.uint8
    assert np.array_equal(stored.values, TRUTH)
    assert stored.attrs == {"long_name": "land cover", "history": "made"}
    stored.to_dataset(name="again").to_zarr(tmp_path / "again.zarr", consolidated=False)  # nothing that xarray refuses


@pytest.mark.parametrize("attributes", ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_a_conversion_has_the_numbers_that_predict_reads(attributes: dict[str, Any], tmp_path: Path) -> None:
    volume, extra = in_hdf5(tmp_path, attributes)
    array = oocpatch.convert(volume, tmp_path / "out.zarr", progress=False, **extra)
    assert array.dtype == np.int16
    assert np.array_equal(array.values, TRUTH)
    assert np.array_equal(oocpatch.Volume(tmp_path / "out.zarr").source.load((slice(None), slice(None))), TRUTH)


def test_a_conversion_says_how_its_numbers_were_packed(tmp_path: Path) -> None:
    volume, extra = in_hdf5(tmp_path, {"scale_factor": 0.5, "units": "K", "valid_max": 3})
    array = oocpatch.convert(volume, tmp_path / "out.zarr", progress=False, **extra)
    assert array.attrs == {"units": "K", "valid_max": 3, "input_encoding": {"scale_factor": 0.5}}


def test_units_are_kept_by_quantities_alone(tmp_path: Path) -> None:
    """Labels and probabilities have none, and units of time would be decoded by older versions of xarray."""
    volume = xarray.DataArray(TRUTH.astype("float32"), dims=("y", "x"), attrs={"units": "K", "long_name": "heat"})
    kept = oocpatch.predict(volume, "identity", tmp_path / "kept.zarr", **SETTINGS)
    assert kept.attrs == {"units": "K", "long_name": "heat"}
    shares = oocpatch.predict(volume, scores, tmp_path / "shares.zarr", **SETTINGS, postprocess="softmax")
    assert shares.attrs == {"long_name": "heat"}
    days = oocpatch.predict(volume.assign_attrs(units="days"), "identity", tmp_path / "days.zarr", **SETTINGS)
    assert days.attrs == {"long_name": "heat"}
    assert np.array_equal(days, volume)


def test_counts_of_one_run_are_not_those_of_the_next(tmp_path: Path) -> None:
    volume = xarray.DataArray(np.ones((16, 16), np.float32), dims=("y", "x"))
    part = oocpatch.predict(volume, "identity", tmp_path / "part.zarr", **SETTINGS, box=[(0, 8), (0, 8)])
    assert part.attrs["uncovered_voxels"] == 192
    whole = oocpatch.predict(part, "identity", tmp_path / "whole.zarr", **SETTINGS)
    assert "uncovered_voxels" not in whole.attrs


def test_metadata_are_strict_json(tmp_path: Path) -> None:
    """NaN is a word of Python's JSON alone; programs in other languages refuse such a file."""
    volume = xarray.DataArray(TRUTH, dims=("y", "x"), attrs={"gap": np.nan, "most": [1, np.inf], "what": object()})
    result = oocpatch.predict(volume, "identity", tmp_path / "out.zarr", **SETTINGS)
    assert result.attrs == {"gap": "NaN", "most": [1, "Infinity"]}

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for file in (tmp_path / "out.zarr").rglob("zarr.json"):
        json.loads(file.read_text(), parse_constant=refuse)


DATES = np.array(["2001-02-03", "2001-02-04", "2001-02-06T12"], "datetime64[ns]")
NUMBERS = np.array([0.0, 1.0, 3.5])
COORDINATES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "dates": (DATES, {}, DATES),
    "dates with attributes": (DATES, {"units": "days since 1970-01-01", "calendar": "standard"}, DATES),
    "nanoseconds": (DATES + np.arange(3), {}, DATES + np.arange(3)),
    "no date": (np.array([*DATES[:2], "NaT"], DATES.dtype), {}, np.array([*DATES[:2], "NaT"], DATES.dtype)),
    "dates not decoded": (NUMBERS, {"units": "days since 2001-02-03"}, DATES),
    "dates of another calendar": (NUMBERS, {"units": "days since 2001-02-03", "calendar": "360_day"}, NUMBERS),
    "no dates": (NUMBERS, {"units": "steps since the start"}, NUMBERS),
    "durations": (DATES - DATES[0], {}, DATES - DATES[0]),
    "durations in numbers": (NUMBERS, {"units": "days"}, NUMBERS),
    "scaled": (NUMBERS, {"scale_factor": 10.0, "add_offset": 5.0}, NUMBERS),
    "masked": (NUMBERS, {"_FillValue": 1.0, "missing_value": 0.0}, NUMBERS),
    "booleans": (np.array([True, False, True]), {}, np.array([True, False, True])),
    "dtype": (np.array([0, 1, 2]), {"dtype": "bool"}, np.array([0, 1, 2])),
    "text": (np.array(["a", "b\u00e9", ""]), {}, np.array(["a", "b\u00e9", ""])),
    "objects": (np.array(["a", "b", "c"], object), {"what": object()}, np.array(["a", "b", "c"])),
    "unsigned": (np.array([0, -1, 1], np.int8), {"_Unsigned": "true"}, np.array([0, -1, 1])),
}


@pytest.mark.parametrize(("values", "attributes", "expected"), COORDINATES.values(), ids=COORDINATES)
def test_coordinates_are_read_as_they_were(
    values: Any, attributes: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    volume = xarray.DataArray(
        np.zeros((3, 8, 8), np.float32), {"t": ("t", values, {**attributes, "long_name": "when"})}, dims=("t", "y", "x")
    )
    before = dict(volume["t"].attrs)
    for result in (
        oocpatch.predict(volume, "identity", tmp_path / "out.zarr", **SETTINGS),
        oocpatch.convert(volume, tmp_path / "copy.zarr", progress=False),
        xarray.open_zarr(tmp_path / "out.zarr"),
    ):
        assert np.array_equal(result["t"].values, expected, equal_nan=expected.dtype.kind in "fmM")
        assert result["t"].attrs["long_name"] == "when"
    assert volume["t"].attrs == before


def test_coordinates_without_a_dtype_of_zarr_are_left_out(tmp_path: Path) -> None:
    stacked = xarray.DataArray(np.zeros((3, 4, 8), np.float32), {"a": [0, 1, 2]}, dims=("a", "b", "x"))
    volume = stacked.stack(y=("a", "b")).transpose("y", "x")
    volume = volume.assign_coords(thing=("x", np.array([object()] * 8)))
    result = oocpatch.predict(volume, "identity", tmp_path / "out.zarr", **SETTINGS)
    assert sorted(map(str, result.coords)) == ["a", "b"]
    assert np.array_equal(result["a"], volume["a"])


def test_dates_that_cannot_be_decoded_keep_their_units_by_another_name(tmp_path: Path) -> None:
    times = ("t", NUMBERS, {"units": "days since 2001-02-03", "calendar": "360_day"})
    volume = xarray.DataArray(np.zeros((3, 8, 8), np.float32), {"t": times}, dims=("t", "y", "x"))
    result = oocpatch.predict(volume, "identity", tmp_path / "out.zarr", **SETTINGS)
    assert result["t"].attrs == {"encoded_units": "days since 2001-02-03", "encoded_calendar": "360_day"}


def test_a_grid_mapping_is_kept_with_its_coordinate(tmp_path: Path) -> None:
    volume = xarray.DataArray(
        TRUTH, {"crs": ((), 0, {"crs_wkt": "WGS 84"})}, dims=("y", "x"), attrs={"grid_mapping": "crs"}
    )
    result = oocpatch.predict(volume, "identity", tmp_path / "out.zarr", **SETTINGS)
    assert result.attrs["grid_mapping"] == "crs"
    assert result["crs"].attrs["crs_wkt"] == "WGS 84"
