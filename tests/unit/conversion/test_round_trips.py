"""From a file of each kind, through `predict`, to files that other programs open: values, axes, places, names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
import torch
import xarray

import oocpatch
from tests.unit.volumes.test_formats import KINDS, PLACES

CHANNELS = {"czi": ["DAPI", "GFP"], "nd2": ["DAPI", "GFP"], "lif": ["Cyan", "Magenta"], "ims": ["DAPI", "GFP"]}

NIFTI = {"nanometer": ("micron", 1e-3), "micrometer": ("micron", 1.0), "millimeter": ("mm", 1.0)}
"""Units of a NIfTI, and how many of them a unit of a volume is."""

TIFF = {"nanometer": "nm", "micrometer": "\u00b5m", "millimeter": "mm"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_comes_back_from_the_identity_model_and_from_the_files_that_it_is_exported_to(
    kind: str, tmp_path: Path
) -> None:
    make, name, part, names, _ = KINDS[kind]
    expected = xarray.DataArray(make(tmp_path / name), dims=names)
    size = 16 if "z" in names else 64
    result = oocpatch.predict(
        f"{tmp_path / name}{part}", torch.nn.Identity(), tmp_path / "out.zarr",
        patch_size=size, patch_overlap=size // 2, overlap_mode="crop", progress=False,
    )  # fmt: skip
    assert isinstance(result, xarray.DataArray)
    assert set(result.dims) == set(names)
    np.testing.assert_array_equal(result.transpose(*names), expected)
    check_nifti(oocpatch.export(result, tmp_path / "out.nii.gz", progress=False), expected, kind)
    check_tiff(oocpatch.export(result, tmp_path / "out.ome.tif", progress=False), expected, kind)


def check_nifti(file: Path, expected: xarray.DataArray, kind: str) -> None:
    image = nibabel.load(file)
    order = [axis for axis in "xyzc" if axis in expected.dims]
    np.testing.assert_array_equal(np.asarray(image.dataobj).squeeze(), expected.transpose(*order))
    unit, places = PLACES.get(kind, ("", {}))
    name, scale = NIFTI.get(unit, ("", 1.0))
    affine = np.eye(4)
    for row, axis in enumerate("xyz"):
        if axis in places:
            affine[row, [3, row]] = np.multiply(places[axis], scale)
    np.testing.assert_allclose(image.affine, affine, atol=1e-6)
    assert not places or image.header.get_xyzt_units()[0] == name


def check_tiff(file: Path, expected: xarray.DataArray, kind: str) -> None:
    with tifffile.TiffFile(file) as tiff:
        pixels: Any = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
        axes, values = tiff.series[0].axes, tiff.series[0].asarray()
    np.testing.assert_array_equal(values, expected.transpose(*axes.lower().replace("s", "c")))
    unit, places = PLACES.get(kind, ("", {}))
    for axis, (_, step) in places.items():
        assert pixels[f"PhysicalSize{axis.upper()}"] == pytest.approx(abs(step))
        assert pixels[f"PhysicalSize{axis.upper()}Unit"] == TIFF[unit]
    if kind in CHANNELS:
        assert [channel["Name"] for channel in pixels["Channel"]] == CHANNELS[kind]
