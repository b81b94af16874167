"""Promises on masks: they lie over the volume by the names of their axes and by coordinates, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distributed
import nibabel
import numpy as np
import pytest
import tifffile
import xarray
import zarr

import oocpatch

SHAPE = {"t": 2, "z": 4, "y": 16, "x": 24}
RANDOM = np.random.default_rng(0)
SETTINGS: dict[str, Any] = {"patch_size": 4, "overlap_mode": "crop", "progress": False, "output_fill": -1}
WHERE = RANDOM.random((1, 4, 6)) < 0.4  # one voxel per patch of 4 x 4 x 4
FULL = WHERE.repeat(4, 0).repeat(4, 1).repeat(4, 2)
AT_X = np.arange(24) * 0.5 + 3.0  # coordinates


def an_image(dims: str, coords: dict[str, Any] | None = None) -> xarray.DataArray:
    sizes = {**SHAPE, "c": 2}
    return xarray.DataArray(RANDOM.random([sizes[d] for d in dims], dtype=np.float32), coords, dims=tuple(dims))


def a_mask(dims: str, **sizes: int) -> xarray.DataArray:
    """The mask in full resolution, with axes in another order and further ones."""
    mask = xarray.DataArray(FULL, dims=("z", "y", "x"))
    for name in set(dims) - {"z", "y", "x"}:
        mask = mask.expand_dims({name: sizes.get(name, 1)})
    return mask.transpose(*dims)


def expected(image: xarray.DataArray, where: Any = FULL) -> Any:
    kept = image.where(xarray.DataArray(where, dims=("z", "y", "x")), -1)
    return kept.transpose(*image.dims)


def masked(image: Any, mask: Any, tmp_path: Path, **options: Any) -> xarray.DataArray:
    return oocpatch.predict(image, "identity", tmp_path / "out.zarr", mask=mask, **SETTINGS, **options)


@pytest.mark.parametrize("of_mask", ["zyx", "xyz", "yxz", "czyx", "zyxc", "tzyx", "tczyx", "xyzt"])
@pytest.mark.parametrize("of_image", ["zyx", "xzy", "czyx", "tzyx", "tczyx"])
def test_masks_lie_over_volumes_by_the_names_of_axes(of_mask: str, of_image: str, tmp_path: Path) -> None:
    """Whatever their order; channels and times of length 1 are none."""
    image = an_image(of_image)
    result = masked(image, a_mask(of_mask), tmp_path)
    xarray.testing.assert_equal(result, expected(image))


def test_a_mask_with_times_holds_at_each(tmp_path: Path) -> None:
    image, where = an_image("tzyx"), np.stack([FULL, ~FULL])
    result = masked(image, xarray.DataArray(where, dims=("t", "z", "y", "x")).transpose("x", "t", "z", "y"), tmp_path)
    assert np.array_equal(result, np.where(where, image, -1))


def in_numpy(_folder: Path) -> Any:
    return FULL


def in_unnamed_zarr(folder: Path) -> Any:
    zarr.create_array(folder / "mask.zarr", data=FULL.astype("u1"), chunks=(2, 5, 7))
    return folder / "mask.zarr"


def in_named_zarr(folder: Path) -> Any:
    names = ("x", "z", "y")
    return zarr.create_array(folder / "mask.zarr", data=a_mask("xzy").values.astype("u1"), dimension_names=names)


def in_nifti(folder: Path) -> Any:
    nibabel.save(nibabel.Nifti1Image(a_mask("xyz").values.astype("u1"), np.eye(4)), folder / "mask.nii.gz")
    return str(folder / "mask.nii.gz")


def in_tiff(folder: Path) -> Any:
    tifffile.imwrite(folder / "mask.ome.tif", FULL.astype("u1"), metadata={"axes": "ZYX"})
    return folder / "mask.ome.tif"


def in_labels(folder: Path) -> Any:
    """Labels as programs of OME-Zarr write them: five axes, two of which have one voxel."""
    axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}]
    axes += [{"name": n, "type": "space"} for n in "zyx"]
    transform = [{"type": "scale", "scale": [1.0] * 5}]
    datasets = [{"path": "0", "coordinateTransformations": transform}]
    ome = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}], "image-label": {}}
    zarr.create_group(folder / "labels.zarr", attributes={"ome": ome}).create_array(
        "0", data=FULL[None, None].astype("u4")
    )
    return folder / "labels.zarr"


def with_axes_argument(_folder: Path) -> Any:
    return oocpatch.Volume(a_mask("yxz").values, axes="yxz")


def with_roles(_folder: Path) -> Any:
    return oocpatch.Volume(a_mask("xyz").rename(x="width", y="height", z="depth"), axes="xyz")


def in_capitals(_folder: Path) -> Any:
    return a_mask("xyz").rename(x="X", y="Y", z="Z")


def with_gaps(_folder: Path) -> Any:
    return a_mask("yzx").where(a_mask("yzx")).astype("f4")  # NaN is no foreground


def with_channels_in_numpy(_folder: Path) -> Any:
    return FULL[None]


KINDS = (in_numpy, in_unnamed_zarr, in_named_zarr, in_nifti, in_tiff, in_labels, with_axes_argument, with_roles)


@pytest.mark.parametrize("kind", [*KINDS, in_capitals, with_gaps, with_channels_in_numpy], ids=lambda k: k.__name__)
def test_masks_of_any_kind(kind: Any, tmp_path: Path) -> None:
    image = an_image("czyx")
    result = masked(image, kind(tmp_path), tmp_path)
    assert np.array_equal(result, expected(image))
    with pytest.raises(oocpatch.RunMismatch, match="mask"):
        masked(image, None, tmp_path)


def test_workers_lay_masks_as_the_caller_does(tmp_path: Path) -> None:
    image = an_image("czyx")
    with distributed.Client(n_workers=1, threads_per_worker=1, dashboard_address=":0") as client:
        result = masked(image.rename(c="stain"), a_mask("xyzc"), tmp_path, client=client, axes="czyx")
    assert np.array_equal(result, expected(image))


def at(**coords: Any) -> xarray.DataArray:
    """A mask in full resolution, with coordinates."""
    return a_mask("zyx").assign_coords(coords)


def every(n: int, **coords: Any) -> xarray.DataArray:
    return a_mask("zyx").isel(x=slice(None, None, n)).assign_coords(coords)


MICRONS = ("x", AT_X, {"units": "um"})
RIGHT: dict[str, xarray.DataArray] = {
    "the same": at(x=AT_X),
    "almost the same": at(x=AT_X + 0.2),
    "other units": at(x=("x", AT_X / 1000, {"units": "mm"})),
    "no units": at(x=AT_X),
    "means of four": every(4, x=AT_X.reshape(6, 4).mean(axis=1)),
    "every fourth": every(4, x=AT_X[::4]),
    "coarse, in other units": every(4, x=("x", AT_X[::4] * 1e3, {"units": "nanometer"})),
    "names instead of numbers": at(x=list("abcdefghijklmnopqrstuvwx")).drop_vars("x"),
    "none": a_mask("xyz"),
}
WRONG: dict[str, xarray.DataArray] = {
    "shifted": at(x=AT_X + 2.0),
    "by one voxel": at(x=AT_X - 0.5),
    "flipped": at(x=AT_X[::-1]),
    "other spacing": at(x=np.arange(24) + 3.0),
    "millimeters": at(x=("x", AT_X, {"units": "mm"})),
    "seconds": at(x=("x", AT_X, {"units": "second"})),
    "coarse and shifted": every(4, x=AT_X[::4] + 4.0),
    "coarse and flipped": every(4, x=AT_X[::4][::-1]),
    "half of it": at(x=AT_X).isel(x=slice(0, 12)),
    "the other half": at(x=AT_X).isel(x=slice(12, 24)),
    "one voxel elsewhere": at(x=AT_X).isel(x=[0]).assign_coords(x=[400.0]),
    "letters": at(x=list("abcdefghijklmnopqrstuvwx")),
}


@pytest.mark.parametrize("mask", RIGHT.values(), ids=RIGHT)
def test_a_mask_over_the_same_extent_is_taken(mask: xarray.DataArray, tmp_path: Path) -> None:
    image = an_image("zyx", {"x": MICRONS})
    result = masked(image, mask, tmp_path)
    assert np.array_equal(result, expected(image))


@pytest.mark.parametrize("mask", WRONG.values(), ids=WRONG)
def test_a_mask_over_another_extent_is_refused(mask: xarray.DataArray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mask must .* along x"):
        masked(an_image("zyx", {"x": MICRONS}), mask, tmp_path)
    assert not (tmp_path / "out.zarr").exists()


def test_a_coarse_mask_of_a_length_that_is_no_multiple_lies_by_its_coordinates(tmp_path: Path) -> None:
    """Its last voxel reaches beyond the volume, or lacks a part of it; by proportion all voxels would be shifted."""
    image = xarray.DataArray(RANDOM.random(100, dtype=np.float32), {"x": np.arange(100.0)}, dims=("x",))
    for n, last in ((4, 128), (3, 96)):
        where = np.zeros(n, bool)
        where[n - 2] = True
        mask = xarray.DataArray(where, {"x": np.arange(n) * 32.0 + 15.5}, dims=("x",))
        result = oocpatch.predict(
            image, "identity", tmp_path / f"out{n}.zarr", mask=mask, patch_size=4, overlap_mode="crop", output_fill=-1
        )
        covered = np.repeat(where, 32)[:100] if last == 128 else np.pad(np.repeat(where, 32), (0, 4))
        assert np.array_equal(result, np.where(covered, image, -1))


def test_affines_count_where_coordinates_cannot_say_all(tmp_path: Path) -> None:
    turned = np.array([[0, -1.0, 0, 9], [1, 0, 0, -4], [0, 0, 2, 0], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(an_image("xyz").values, turned), tmp_path / "image.nii")
    nibabel.save(nibabel.Nifti1Image(a_mask("xyz").values.astype("u1"), turned), tmp_path / "mask.nii")
    mirrored = turned @ np.diag([-1.0, 1, 1, 1])
    nibabel.save(nibabel.Nifti1Image(a_mask("xyz").values.astype("u1"), mirrored), tmp_path / "mirrored.nii")
    result = masked(tmp_path / "image.nii", tmp_path / "mask.nii", tmp_path)
    assert np.array_equal(result != -1, a_mask("xyz"))
    with pytest.raises(ValueError, match="mask must lie over the volume, but its affine"):
        oocpatch.plan(tmp_path / "image.nii", "identity", tmp_path / "o", mask=tmp_path / "mirrored.nii", patch_size=4)


NAMES: dict[str, tuple[Any, str]] = {
    "other names": (a_mask("zyx").rename(z="plane"), r"plane: 4.*volume \(z: 4, y: 16, x: 24\)"),
    "an axis too few": (a_mask("zyx").isel(z=0), r"\(y: 16, x: 24\)"),
    "an axis too many": (a_mask("zyx").expand_dims(q=2), r"\(q: 2, "),
    "times that the volume lacks": (a_mask("tzyx", t=2), r"t: 2"),
    "channels": (a_mask("czyx", c=2), "one channel, got 2"),
    "finer": (
        xarray.concat([a_mask("zyx")] * 2, "x"),
        "more voxels than the volume on any axis, got 48 for 24 along x",
    ),
    "transposed numpy": (FULL.T, "more voxels"),
    "numpy of other axes": (FULL[0], "spatial axes"),
}


@pytest.mark.parametrize(("mask", "message"), NAMES.values(), ids=NAMES)
def test_what_does_not_match_is_refused_by_name(mask: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"mask must .*{message}"):
        oocpatch.plan(an_image("zyx"), "identity", tmp_path / "out.zarr", mask=mask, patch_size=4)


def test_times_must_be_those_of_the_volume(tmp_path: Path) -> None:
    days = np.array(["2001-01-01", "2001-01-02"], "datetime64[ns]")
    image = an_image("tzyx", {"t": days})
    mask = a_mask("tzyx", t=2)
    assert oocpatch.plan(image, "identity", tmp_path / "a", mask=mask.assign_coords(t=days), patch_size=4)
    with pytest.raises(ValueError, match="mask must have the coordinates of the volume along t"):
        oocpatch.plan(image, "identity", tmp_path / "a", mask=mask.assign_coords(t=days[::-1]), patch_size=4)


def test_names_that_nobody_gave_do_not_turn_a_mask(tmp_path: Path) -> None:
    """Axes of numpy are assumed to be z, y, x: a mask in another order is refused, one with other names is laid."""
    image = an_image("zyx").values
    with pytest.raises(ValueError, match="no names, so that these are assumed"):
        masked(image, a_mask("xyz"), tmp_path)
    result = masked(image, a_mask("zyx").rename(z="plane", y="row", x="column"), tmp_path)
    assert np.array_equal(result, np.where(FULL, image, -1))
    named = oocpatch.predict(image.T, "identity", tmp_path / "named.zarr", mask=a_mask("zyx"), axes="xyz", **SETTINGS)
    assert np.array_equal(named, np.where(FULL.T, image.T, -1))
