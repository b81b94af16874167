"""`predict` on another grid: equal to the whole volume resampled at once, at every border of blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import xarray
import zarr
from click.testing import CliRunner
from nibabel.affines import apply_affine
from nibabel.orientations import axcodes2ornt, inv_ornt_aff

import oocpatch
from oocpatch import Volume
from oocpatch.cli.main import main
from oocpatch.planning.box import Box
from oocpatch.volumes.affine import orientation_of
from oocpatch.volumes.model_grid import ModelGrid
from tests.unit.volumes.test_resampling import image, whole

SETTINGS: dict[str, Any] = {
    "patch_size": 12,
    "patch_overlap": 4,
    "block_shape": 16,
    "output_chunks": 8,
    "max_memory": "64MiB",
    "progress": False,
}
OBLIQUE = np.array([[0.9, 0.3, 0, 5], [-0.25, 1.1, 0.2, -7], [0.1, -0.2, 2.0, 30], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume of 16-bit integers with chunks, 0.8 x 0.5 x 0.5 um."""
    data = image((25, 40, 45), (0.8, 0.5, 0.5), "int16").rename("image")
    path = tmp_path_factory.mktemp("scan") / "scan.zarr"
    data.to_dataset().to_zarr(path, zarr_format=3, consolidated=False, encoding={"image": {"chunks": (7, 16, 16)}})
    return path


@pytest.mark.parametrize("order", [0, 1, 3])
def test_scores_of_patches_are_those_of_the_whole_volume_resampled_at_once(
    order: int, scan: Path, tmp_path: Path
) -> None:
    data = np.asarray(zarr.open_array(scan / "image")[:])
    spacing = "0.6um" if order == 1 else ModelGrid("0.6um", order=order)
    result = oocpatch.predict(scan, torch.nn.Identity(), tmp_path / "out.zarr", spacing=spacing, **SETTINGS)
    assert result.shape == (33, 33, 38)
    np.testing.assert_allclose(result, whole(data, result.shape, (order,) * 3), rtol=0, atol=1e-5 * 200)
    for name, n, step in zip("zyx", (25, 40, 45), (0.8, 0.5, 0.5), strict=True):
        edges = 3 - step / 2, 3 - step / 2 + n * step
        own = (edges[1] - edges[0]) / result.sizes[name]
        np.testing.assert_allclose(result[name], np.arange(edges[0] + own / 2, edges[1], own))
        assert result[name].attrs["units"] == "um"


def test_a_mask_and_a_box_are_those_of_the_volume(scan: Path, tmp_path: Path) -> None:
    mask = np.zeros((25, 40, 45), bool)
    mask[3, 5, 7] = True  # a voxel that no voxel of the grid takes its value from
    options = {**SETTINGS, "patch_overlap": 0, "spacing": 2.5, "patch_size": 4, "output_fill": -1}
    result = oocpatch.predict(scan, "identity", tmp_path / "mask.zarr", mask=mask, **options)
    covered = np.argwhere(np.asarray(result) != -1)
    assert covered.min(axis=0).tolist() == [0, 0, 0]
    assert covered.max(axis=0).tolist() == [3, 3, 3]
    box = [(0, 5), (20, 40), (0, 45)]
    result = oocpatch.predict(scan, "identity", tmp_path / "box.zarr", box=box, **options)
    covered = np.argwhere(np.asarray(result) != -1)
    assert covered.min(axis=0).tolist() == [0, 4, 0]
    assert covered.max(axis=0).tolist() == [3, 7, 8]


def test_preprocessing_knows_the_statistics_of_the_volume_as_it_is_stored(scan: Path, tmp_path: Path) -> None:
    data = np.asarray(zarr.open_array(scan / "image")[:], np.float64)
    options = {**SETTINGS, "spacing": 1.0, "preprocess": "zscore"}
    result = oocpatch.predict(scan, "identity", tmp_path / "out.zarr", **options)
    expected = (whole(data, result.shape, (1, 1, 1)) - data.mean()) / data.std()
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_another_spacing_is_another_run_and_changed_voxels_are_seen(scan: Path, tmp_path: Path) -> None:
    options = {**SETTINGS, "spacing": 1.0}
    oocpatch.predict(scan, "identity", tmp_path / "out.zarr", **options)
    with pytest.raises(oocpatch.RunMismatch, match=r"spacing: .*1.0.* before, .*1.5.* now"):
        oocpatch.predict(scan, "identity", tmp_path / "out.zarr", **{**options, "spacing": 1.5})
    array = zarr.open_array(scan / "image", mode="r+")
    before = array[3, 3, 3]
    try:
        array[3, 3, 3] = before + 100
        with pytest.raises(oocpatch.RunMismatch, match=r"volume: 1 of .* chunks changed"):
            oocpatch.predict(scan, "identity", tmp_path / "out.zarr", **options)
        updated = oocpatch.predict(scan, "identity", tmp_path / "out.zarr", update=True, **options)
        fresh = oocpatch.predict(scan, "identity", tmp_path / "fresh.zarr", **options)
        assert np.array_equal(updated, fresh)
    finally:
        array[3, 3, 3] = before


@pytest.mark.parametrize("code", ["RAS", "LAS", "LPS", "PIR", "oblique"])
def test_a_nifti_of_any_orientation_has_its_voxels_where_they_were(code: str, tmp_path: Path) -> None:
    shape = (14, 15, 16)
    affine = OBLIQUE if code == "oblique" else inv_ornt_aff(axcodes2ornt(code), shape) @ np.diag([0.5, 0.75, 2, 1])
    places = np.moveaxis(np.indices(shape), 0, -1)
    world = apply_affine(affine, places)
    data = (world @ [1.0, -2.0, 0.5] + 100).astype(np.float32)  # linear in the world
    file = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(data, affine), file)
    options = {"patch_size": 8, "patch_overlap": 2, "spacing": 1.1, "output_format": "ome-zarr", "progress": False}
    result = oocpatch.predict(file, "identity", tmp_path / "out.zarr", export=tmp_path / "out.nii", **options)
    written = nibabel.load(tmp_path / "out.nii")
    assert written.shape == result.shape
    inner = (slice(2, -2),) * 3  # beyond the centres of its outer voxels a volume goes on as it is
    at = apply_affine(written.affine, np.moveaxis(np.indices(written.shape), 0, -1))
    np.testing.assert_allclose((at @ [1.0, -2.0, 0.5] + 100)[inner], np.asarray(written.dataobj)[inner], rtol=1e-4)
    assert nibabel.aff2axcodes(written.affine) == nibabel.aff2axcodes(affine)
    turned = ModelGrid.of(ModelGrid(orientation="LPS"), Volume(file))
    assert turned is not None
    volume = turned.over(Volume(file))
    reoriented = nibabel.as_closest_canonical(nibabel.Nifti1Image(data, affine)).get_fdata()[::-1, ::-1]
    assert np.array_equal(volume.read(Box.of_shape(volume.shape))[0], reoriented)
    assert orientation_of(affine) == nibabel.aff2axcodes(affine)


def test_coordinates_that_fall_are_legal_in_an_ome_zarr(tmp_path: Path) -> None:
    data = image((20, 24), (0.5, -0.25))
    options: dict[str, Any] = {"patch_size": 8, "output_format": "ome-zarr", "progress": False}
    oocpatch.predict(data, "identity", tmp_path / "out.zarr", spacing=0.5, **options)
    read = Volume(tmp_path / "out.zarr")
    assert read.source.coords["x"].values[:2].tolist() == pytest.approx([2.875, 2.375])
    again = oocpatch.predict(tmp_path / "out.zarr", "identity", tmp_path / "again.zarr", spacing=0.25, **options)
    assert again.shape == (40, 24)
    assert again.x.values.tolist() == pytest.approx(data.x.values.tolist())


def test_the_command_line_takes_a_spacing(scan: Path, tmp_path: Path) -> None:
    words = ["predict", str(scan), str(tmp_path / "out.zarr"), "--model", "identity", "--patch-size", "8"]
    done = CliRunner().invoke(main, [*words, "--spacing", "z=2,y=1000nm", "--progress", "none"])
    assert done.exit_code == 0, done.output
    assert xarray.open_zarr(tmp_path / "out.zarr").prediction.shape == (10, 20, 45)
    refused = CliRunner().invoke(main, [*words, "--spacing", "2 inches"])
    assert refused.exit_code == 2
    assert "spacing must be in the unit of axis z, micrometer, got inches" in refused.output
