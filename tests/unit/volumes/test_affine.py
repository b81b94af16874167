"""Affines of volumes: from a file's affine, from coordinates, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import xarray
import zarr

from oocpatch import GridSampler, Subject, Volume
from oocpatch.volumes.affine import orientation_of, spacing_of

AFFINE = np.array([[0, 2.0, 0, 5], [1.5, 0, 0, 6], [0, 0, -3.0, 7], [0, 0, 0, 1]])


def coordinate(values: Any) -> Any:
    return xarray.DataArray(np.zeros((4, 5)), dims=("y", "x"), coords={"y": values})


def test_a_nifti_file_has_its_affine_in_whatever_order_its_axes_are_read(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.float32), AFFINE), tmp_path / "a.nii")
    zarr.create_array(tmp_path / "b.zarr", data=np.zeros((6, 5, 4)), dimension_names=("z", "y", "x"))
    assert np.array_equal(Volume(tmp_path / "a.nii").affine, AFFINE)
    patch = GridSampler(Subject(b=tmp_path / "b.zarr", a=tmp_path / "a.nii"), (3, 5, 4))[1]
    turned = AFFINE[:, [2, 1, 0, 3]]
    assert np.array_equal(patch.a.affine, turned + np.outer(turned[:, 0], [0, 0, 0, 3]))
    assert patch.a.spacing == (3, 2, 1.5)
    assert orientation_of(AFFINE) == nibabel.aff2axcodes(AFFINE)


def test_an_ome_zarr_has_the_scale_and_translation_of_its_level(tmp_path: Path) -> None:
    transform = [{"type": "scale", "scale": [2.0, 0.5]}, {"type": "translation", "translation": [10.0, -1.0]}]
    group = zarr.create_group(tmp_path / "image.zarr")
    group.create_array("0", data=np.zeros((8, 9)), dimension_names=("y", "x"))
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    datasets = [{"path": "0", "coordinateTransformations": transform}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    patch = GridSampler(Subject(t1=tmp_path / "image.zarr"), 4)[-1]
    assert np.allclose(patch.t1.affine, [[2, 0, 10 + 2 * 4], [0, 0.5, -1 + 0.5 * 5], [0, 0, 1]])
    assert patch.t1.origin == pytest.approx((18, 1.5))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0, 3.5, 4.0, 4.5], (0.5, 3.0)),
        ([4, 2, 0, -2], (-2, 4)),
        ([0.0, 1.0, 2.0, 7.0], (1, 0)),
        (["a", "b", "c", "d"], (1, 0)),
    ],
)
def test_evenly_spaced_coordinates_are_an_affine(values: Any, expected: tuple[float, float]) -> None:
    affine = Volume(coordinate(values)).affine
    assert (affine[0, 0], affine[0, 2]) == expected
    assert (affine[1, 1], affine[1, 2]) == (1, 0)


@pytest.mark.parametrize("seed", range(5))
def test_orientations_of_oblique_affines_are_those_of_nibabel(seed: int) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0] * [1.0, 2.0, 3.0]
    assert orientation_of(affine) == nibabel.aff2axcodes(affine)
    assert spacing_of(affine) == pytest.approx((1, 2, 3))
