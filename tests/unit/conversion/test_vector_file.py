"""Promises on vectors of patches in HDF5: what CLAM and TRIDENT read, an AnnData, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import torch
import xarray

import oocpatch

SETTINGS: dict[str, Any] = {"patch_size": 16, "patch_overlap": 8, "progress": False}


def encoder(patches: torch.Tensor) -> dict[str, torch.Tensor]:
    """An image, and the mean of each colour."""
    return {"grey": patches[:, :1].float(), "features": patches.float().mean((2, 3))}


def test_a_level_of_a_slide_becomes_features_and_pixels_of_the_largest_level(tmp_path: Path) -> None:
    slide = np.random.default_rng(0).integers(0, 255, (96, 160, 3), dtype=np.uint8)
    scanner = "Aperio Image Library v12\r\n160x96 [0,0 160x96] (16x16)|AppMag = 20|MPP = 0.5"
    with tifffile.TiffWriter(tmp_path / "slide.svs") as file:
        for picture, tile in ((slide, (16, 16)), (slide[::4, ::4], None), (slide[::2, ::2], (16, 16))):
            file.write(picture, tile=tile, photometric="rgb", description=scanner, metadata=None)  # the 2nd: thumbnail
    mask = np.zeros((6, 10), bool)
    mask[2:4, 5:9] = True
    result = oocpatch.predict(
        tmp_path / "slide.svs", encoder, tmp_path / "out.zarr", level=1, mask=mask, export=tmp_path / "f.h5", **SETTINGS
    )
    with h5py.File(tmp_path / "f.h5") as file:
        assert np.array_equal(file["features"], result.features)
        assert np.array_equal(file["coords"], 2 * result.starts.values[:, ::-1])
        attributes = dict(file["coords"].attrs)
    expected = {"patch_size": 16, "patch_level": 1, "patch_size_level0": 32, "overlap": 8, "name": "slide"}
    assert attributes | expected == attributes
    assert (attributes["level0_height"], attributes["level0_width"]) == (96, 160)
    assert (attributes["level0_magnification"], attributes["target_magnification"]) == (20, 10)
    written = (tmp_path / "f.h5").stat().st_mtime_ns
    oocpatch.export(tmp_path / "out.zarr" / "features", tmp_path / "f.h5", progress=False)
    assert (tmp_path / "f.h5").stat().st_mtime_ns == written
    (tmp_path / "slide.svs").unlink()
    with pytest.raises(ValueError, match=r"not the one that is read, and .*slide.svs cannot be opened to look at it"):
        oocpatch.export(tmp_path / "out.zarr", tmp_path / "other.h5", progress=False)


def test_an_anndata_has_the_middle_of_each_patch_as_x_y_z(tmp_path: Path) -> None:
    coords = {"z": 5.0 * np.arange(3), "y": 100 + 0.5 * np.arange(8), "x": 0.25 * np.arange(8)}
    data = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    volume = xarray.DataArray(data, dims=("t", "z", "y", "x"), coords=coords)
    oocpatch.predict(volume, lambda p: p.flatten(1)[:, :5], tmp_path / "out", patch_size=(1, 4, 4), progress=False)
    oocpatch.export(tmp_path / "out", tmp_path / "f.h5ad", progress=False)
    with h5py.File(tmp_path / "f.h5ad") as file:
        assert dict(file.attrs).items() >= {"encoding-type": "anndata", "encoding-version": "0.1.0"}.items()
        assert file["X"].shape == (24, 5)
        assert file["X"][13, 0] == data[1, 0, 0, 4]
        assert list(file["obs"].attrs["column-order"]) == ["start_z", "start_y", "start_x", "t"]
        assert [int(file["obs"][name][13]) for name in ("t", "start_z", "start_y", "start_x")] == [1, 0, 0, 4]
        assert file["obsm/spatial"][13].tolist() == [5.5 * 0.25, 100 + 1.5 * 0.5, 0.0]
    with pytest.raises(ValueError, match="only from square patches of a slide, got patches of 1 x 4 x 4"):
        oocpatch.export(tmp_path / "out", tmp_path / "f.h5", progress=False)


def test_what_has_no_vectors_or_several_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    picture = np.zeros((32, 32), np.float32)

    def pair(patches: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": patches.flatten(1), "b": patches.flatten(1)}

    with pytest.raises(ValueError, match=r"g.h5 is for a vector per patch, got prediction"):
        oocpatch.predict(picture, "identity", tmp_path / "o", export=tmp_path / "g.h5", **SETTINGS)
    with pytest.raises(ValueError, match=r"g.nii is for a volume, got a, b"):
        oocpatch.predict(picture, pair, tmp_path / "o", export=tmp_path / "g.nii", **SETTINGS)
    with pytest.raises(ValueError, match=r"several outputs \(a, b\)"):
        oocpatch.predict(picture, pair, tmp_path / "o", export=tmp_path / "g.h5", **SETTINGS)
    measured = xarray.DataArray(picture, {"y": 0.5 * np.arange(32), "x": 0.5 * np.arange(32)}, ("y", "x"))
    options = {"spacing": 1.0, "output_grid": "model", "export": tmp_path / "g.h5", **SETTINGS}
    with pytest.raises(ValueError, match="pixels of the largest level, which is not the one that is read"):
        oocpatch.predict(measured, lambda p: p.flatten(1), tmp_path / "o", **options)
    assert not list(tmp_path.iterdir())
    oocpatch.predict(picture, pair, tmp_path / "o", **SETTINGS)
    with pytest.raises(ValueError, match=r"vectors of patches for an HDF5 file, .* has: .*/o/a, .*/o/b"):
        oocpatch.export(tmp_path / "o", tmp_path / "g.h5")
    with pytest.raises(ValueError, match="must be the path of an output with vectors of patches, got ndarray"):
        oocpatch.export(picture, tmp_path / "g.h5")
    with pytest.raises(ValueError, match="has no picture: the model gave a vector per patch"):
        oocpatch.view(tmp_path / "o")
    assert "b: a vector of 256 per patch" in oocpatch.report(tmp_path / "o", tmp_path / "r.html").read_text()
    (tmp_path / "own.h5").write_bytes(b"mine")
    with pytest.raises(oocpatch.OutputExists, match=r"own\.h5 is something else"):
        oocpatch.export(tmp_path / "o" / "a", tmp_path / "own.h5")
