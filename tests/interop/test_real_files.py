"""A published scan in each format that holds volumes: what comes out is what nibabel reads."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import tensorstore
import tifffile
import torch
import xarray as xr

import oocpatch
from tests.support.real_data import RealData, fetch, fetch_nd2, had

pytestmark = pytest.mark.real_data

Array = np.ndarray[Any, Any]

SUMS = [
    [243, 34274, 174770, 418527, 409845, 213456, 49258, 0, 0, 0],
    [326, 37577, 192689, 413082, 391845, 184813, 31740, 12, 0, 0],
    [406, 41424, 189104, 427076, 387774, 186063, 29747, 133, 0, 0],
]
"""Of the planes of the first channel of the recording, as nd2reader 3.3.1 reads them."""


@pytest.fixture(scope="module")
def data() -> RealData:
    return had(fetch)


@pytest.fixture(scope="module")
def scan(data: RealData) -> Path:
    return data.scan


@pytest.fixture(scope="module")
def voxels(scan: Path) -> Array:
    return np.asarray(nibabel.load(scan).dataobj)


def packed(path: Path, scan: Path, _: Array) -> str:
    path.write_bytes(gzip.compress(scan.read_bytes(), 1))
    return str(path)


def hdf5(path: Path, _: Path, voxels: Array) -> str:
    with h5py.File(path, "w") as file:
        file.create_dataset("t1", data=voxels, chunks=(64, 64, 64), compression="gzip")
    return f"{path}::t1"


def tiff(path: Path, _: Path, voxels: Array) -> str:
    tifffile.imwrite(path, voxels.T, compression="zlib", metadata={"axes": "ZYX"}, ome=True)
    return str(path)


def n5(path: Path, _: Path, voxels: Array) -> str:
    metadata = {
        "dimensions": list(voxels.shape),
        "blockSize": [64, 64, 64],
        "dataType": "uint8",
        "axes": ["x", "y", "z"],
    }
    description = {"driver": "n5", "kvstore": {"driver": "file", "path": str(path)}, "metadata": metadata}
    tensorstore.open(description, create=True).result().write(voxels).result()
    return str(path)


@pytest.mark.parametrize(
    ("make", "name"), [(packed, "ch2.nii.gz"), (hdf5, "ch2.h5"), (tiff, "ch2.ome.tif"), (n5, "ch2.n5")]
)
def test_a_published_scan_comes_back_from_each_format(
    make: Any, name: str, scan: Path, voxels: Array, tmp_path: Path
) -> None:
    address = make(tmp_path / name, scan, voxels)
    axes = "xyz" if name.endswith("h5") else None
    made = oocpatch.convert(address, tmp_path / "a.zarr", axes=axes, chunks=64, max_memory="64MiB", progress=False)
    assert made.shape == (voxels.shape if name.endswith(("gz", "h5")) else voxels.shape[::-1])
    np.testing.assert_array_equal(made.transpose("x", "y", "z"), voxels)
    predicted = oocpatch.predict(
        address, torch.nn.Identity(), tmp_path / "b.zarr",
        axes=axes, patch_size=64, patch_overlap=32, overlap_mode="crop", progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(predicted, made)


def test_its_voxels_lie_where_its_affine_says(scan: Path) -> None:
    affine = nibabel.load(scan).affine
    source = oocpatch.Volume(scan).source
    for axis, name in enumerate("xyz"):
        places = source.coords[name].values
        assert places[0] == affine[axis, 3]
        assert places[-1] == affine[axis, 3] + affine[axis, axis] * (source.shape[axis] - 1)


@pytest.mark.parametrize(("name", "step", "first"), [("atlas", 1, -90), ("flipped", -2, 90)])
def test_an_atlas_keeps_its_labels_and_its_places(
    name: str, step: int, first: int, data: RealData, tmp_path: Path
) -> None:
    path: Path = getattr(data, name)
    labels = np.asarray(nibabel.load(path).dataobj)
    made = oocpatch.predict(
        path, torch.nn.Identity(), tmp_path / "out.zarr",
        patch_size=48, patch_overlap=16, overlap_mode="crop", progress=False,
    )  # fmt: skip
    assert made.dtype == labels.dtype
    np.testing.assert_array_equal(made, labels)
    np.testing.assert_array_equal(made.x, first + step * np.arange(len(labels)))
    units_of = {"mm": "millimeter", "unknown": None}  # the atlas says nothing, the flipped one mm
    assert made.x.attrs.get("units") == units_of[nibabel.load(path).header.get_xyzt_units()[0]]
    converted = oocpatch.convert(path, tmp_path / "converted.zarr", chunks=64, progress=False)
    xr.testing.assert_identical(
        converted, xr.open_zarr(tmp_path / "converted.zarr", group="scale0").image.rename("volume")
    )
    np.testing.assert_array_equal(converted, labels)
    np.testing.assert_array_equal(converted.x, made.x)
    np.testing.assert_array_equal(converted.attrs["affine"], nibabel.load(path).affine)


def test_a_structure_of_an_atlas_is_found_in_the_scan_by_its_label(data: RealData, voxels: Array) -> None:
    """Patches around the left hippocampus, which is 37 in this atlas."""
    labels = np.asarray(nibabel.load(data.atlas).dataobj)
    subject = oocpatch.Subject(t1=data.scan, atlas=data.atlas)
    sampler = oocpatch.LabelSampler(subject, 16, "atlas", {37: 1}, num_patches=8, seed=0)
    found = list(sampler)
    assert len(found) == 8
    for patch in found:
        assert int(patch.atlas.data[0, 8, 8, 8]) == 37
        box = patch.patch_location.to_slices()
        np.testing.assert_array_equal(patch.atlas.data[0], labels[box])
        np.testing.assert_array_equal(patch.t1.data[0], voxels[box])


def test_a_recording_has_the_axes_names_sizes_and_values_that_nikon_s_own_library_and_another_reader_found(
    tmp_path: Path,
) -> None:
    pytest.importorskip("nd2")
    file = had(fetch_nd2)
    source = oocpatch.Volume(file).source
    assert source.names == ("t", "z", "c", "y", "x")
    assert source.shape == (3, 10, 2, 31, 38)
    assert source.coords["c"].values.tolist()[0] == "5-FAM/pH 9.0"
    np.testing.assert_allclose(source.coords["x"].values[1], 0.167808983)
    np.testing.assert_allclose(source.coords["z"].values[1], 0.5)
    made = oocpatch.predict(
        file, torch.nn.Identity(), tmp_path / "out.zarr",
        patch_size=16, patch_overlap=8, overlap_mode="crop", progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(made.isel(c=0).transpose("t", "z", "y", "x").sum(("y", "x")), SUMS)
    assert int(made.isel(c=1).sum()) == 1_018_707
