"""Promises in a console: each object says in a line what it is, with its numbers, and prints no voxel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray

import oocpatch.xarray


def test_each_object_says_what_it_is_in_a_line() -> None:
    volume = oocpatch.Volume(np.ones((40, 50), np.uint8))
    subject = oocpatch.Subject(t1=volume, age=45)
    sampler = oocpatch.UniformSampler(subject, 16, num_patches=1200)
    patch = next(iter(sampler))
    batch = next(iter(oocpatch.SubjectsLoader(oocpatch.GridSampler(subject, 16, 8), batch_size=3)))
    shown = {
        "Volume(y: 40, x: 50; 1 channel(s), uint8)": volume,
        "Subject(t1 (1, 40, 50); age)": subject,
        "GridSampler(24 patches of (16, 16), overlap (8, 8), of Subject(t1 (1, 40, 50); age))": oocpatch.GridSampler(
            subject, 16, 8
        ),
        "UniformSampler(1,200 patches of (16, 16) from Subject(t1 (1, 40, 50); age))": sampler,
        "WeightedSampler(no end of patches of (16, 16) from Subject(t1 (1, 40, 50); age))": oocpatch.WeightedSampler(
            subject, 16, "t1"
        ),
        "Queue(2 subjects, 10 patches of each, at most 300 here: 75.0 KiB)": oocpatch.Queue([subject] * 2, sampler),
        "LoadedVolume((1, 16, 16), torch.uint8)": patch.t1,
        "SubjectsBatch(t1 (3, 1, 16, 16); age, patch_location)": batch,
        "VolumeBatch((3, 1, 16, 16), torch.uint8)": batch.t1,
        "PatchAggregator((40, 50), 'hann', patch_overlap=(8, 8), in memory)": oocpatch.PatchAggregator(
            (40, 50), "hann", 8
        ),
    }
    assert [repr(value) for value in shown.values()] == list(shown)


def test_a_store_and_an_address_are_named(tmp_path: Path) -> None:
    with oocpatch.PatchAggregator((4, 4), store=tmp_path / "out.zarr") as aggregator:
        aggregator.add_batch(torch.zeros(1, 1, 4, 4), [oocpatch.PatchLocation((0, 0), (4, 4))])
        assert f"at {tmp_path / 'out.zarr'}" in repr(aggregator)
    assert str(tmp_path / "out.zarr") in repr(oocpatch.Volume(tmp_path / "out.zarr"))


def test_a_plan_shows_its_numbers_and_the_accessor_what_it_can_do(tmp_path: Path) -> None:
    array = xarray.DataArray(np.zeros((40, 50), np.float32), dims=("y", "x"))
    plan = array.oocpatch.plan(torch.nn.Identity(), tmp_path / "out.zarr", patch_size=16)
    assert repr(plan) == str(plan)
    assert "12 of 16 x 16" in repr(plan)
    assert ".predict(model, output, ...)" in repr(array.oocpatch)


@pytest.mark.parametrize("dtype", [np.float64, np.dtype("float64"), torch.float64, "float64", float], ids=repr)
def test_a_dtype_may_be_given_in_every_way_that_people_write_it(dtype: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((20, 20))
    asked = {"patch_size": 16, "overlap_mode": "crop", "output_dtype": dtype, "progress": "none"}
    result = oocpatch.predict(values, torch.nn.Identity(), tmp_path / "out.zarr", **asked)
    assert result.dtype == np.float64
    assert np.array_equal(result, values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fill", np.float32(0)),
        ("fill", np.int16(3)),
        ("output_fill", np.float32(1)),
        ("max_memory", np.int64(64 << 20)),
        ("patch_overlap", np.int64(8)),
        ("patch_size", np.array([16, 16])),
        ("batch_size", np.uint8(2)),
    ],
    ids=str,
)
def test_numbers_of_numpy_are_numbers(name: str, value: Any, tmp_path: Path) -> None:
    """Also to a run that is resumed: the same number of Python is the same argument."""
    values = np.random.default_rng(0).random((20, 20))
    asked = {"patch_size": 16, "overlap_mode": "crop", "padding_mode": "constant", "progress": "none"}
    for given in (value, value.tolist()):
        result = oocpatch.predict(values, torch.nn.Identity(), tmp_path / "out.zarr", **{**asked, name: given})
        assert np.array_equal(result, values)
