"""`predict` on another grid: equal to the whole volume resampled at once, at every border of blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import scipy.ndimage
import torch
import xarray
import zarr
from click.testing import CliRunner
from nibabel.affines import apply_affine
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

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
    "output_chunks": 16,
    "max_memory": "64MiB",
    "progress": False,
}
MODEL_GRID = {**SETTINGS, "output_grid": "model"}
OBLIQUE = np.array([[0.9, 0.3, 0, 5], [-0.25, 1.1, 0.2, -7], [0.1, -0.2, 2.0, 30], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume of 16-bit integers with chunks, 0.8 x 0.5 x 0.5 um."""
    data = image((25, 40, 45), (0.8, 0.5, 0.5), "int16").rename("image")
    path = tmp_path_factory.mktemp("scan") / "scan.zarr"
    data.to_dataset().to_zarr(path, zarr_format=3, consolidated=False, encoding={"image": {"chunks": (7, 16, 16)}})
    return path


@pytest.mark.parametrize("order", [1, 3])
def test_scores_of_patches_are_those_of_the_whole_volume_resampled_at_once(
    order: int, scan: Path, tmp_path: Path
) -> None:
    data = np.asarray(zarr.open_array(scan / "image")[:])
    spacing = "0.6um" if order == 1 else ModelGrid("0.6um", order=order)
    result = oocpatch.predict(scan, torch.nn.Identity(), tmp_path / "out.zarr", spacing=spacing, **MODEL_GRID)
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
    options = {**MODEL_GRID, "patch_overlap": 0, "spacing": 2.5, "patch_size": 4, "output_fill": -1}
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
    options = {**MODEL_GRID, "spacing": 1.0, "preprocess": "zscore"}
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


@pytest.mark.parametrize(
    ("code", "grid"),
    [("RAS", "volume"), ("LAS", "volume"), ("LPS", "model"), ("PIR", "volume"), ("oblique", "volume")],
)
def test_a_nifti_of_any_orientation_has_its_voxels_where_they_were(code: str, grid: str, tmp_path: Path) -> None:
    shape = (14, 15, 16)
    affine = OBLIQUE if code == "oblique" else inv_ornt_aff(axcodes2ornt(code), shape) @ np.diag([0.5, 0.75, 2, 1])
    places = np.moveaxis(np.indices(shape), 0, -1)
    world = apply_affine(affine, places)
    data = (world @ [1.0, -2.0, 0.5] + 100).astype(np.float32)  # linear in the world
    file = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(data, affine), file)
    options = {"patch_size": 8, "patch_overlap": 2, "spacing": 1.1, "output_format": "ome-zarr", "progress": False}
    options["output_grid"] = grid
    result = oocpatch.predict(file, "identity", tmp_path / "out.zarr", export=tmp_path / "out.nii", **options)
    written = nibabel.load(tmp_path / "out.nii")
    assert written.shape == result.shape
    inner = (slice(2, -2),) * 3  # beyond the centres of its outer voxels a volume goes on as it is
    at = apply_affine(written.affine, np.moveaxis(np.indices(written.shape), 0, -1))
    np.testing.assert_allclose((at @ [1.0, -2.0, 0.5] + 100)[inner], np.asarray(written.dataobj)[inner], rtol=1e-4)
    assert nibabel.aff2axcodes(written.affine) == nibabel.aff2axcodes(affine)
    np.testing.assert_allclose(Volume(tmp_path / "out.zarr").affine, written.affine, atol=1e-5)
    if grid == "volume":
        np.testing.assert_allclose(written.affine, affine, atol=1e-5)
    if code == "PIR":  # the model gets patches (z, x, y), one of these axes flipped
        options |= {"spacing": ModelGrid(orientation="LPS"), "overlap_mode": "crop"}
        assert np.array_equal(oocpatch.predict(file, "identity", tmp_path / "turned.zarr", **options), data)
    turned = ModelGrid.of(ModelGrid(orientation="LPS"), Volume(file))
    assert turned is not None
    volume = turned.over(Volume(file))
    reoriented = nibabel.as_closest_canonical(nibabel.Nifti1Image(data, affine)).get_fdata()[::-1, ::-1]
    assert np.array_equal(volume.read(Box.of_shape(volume.shape))[0], reoriented)
    assert orientation_of(affine) == nibabel.aff2axcodes(affine)


def test_patches_in_an_orientation_give_what_the_turned_scan_gives(tmp_path: Path) -> None:
    """The oracle is nibabel: turned to RAS, predicted as an array, and turned back."""
    shape = (14, 15, 16)
    affine = inv_ornt_aff(axcodes2ornt("PIR"), shape) @ np.diag([0.5, 0.75, 2, 1])
    scan = nibabel.Nifti1Image(np.random.default_rng(0).random(shape, np.float32), affine)
    nibabel.save(scan, tmp_path / "scan.nii.gz")
    kernel = torch.rand((1, 1, 3, 3, 3), generator=torch.Generator().manual_seed(0))

    def model(patches: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv3d(patches, kernel, padding=1)

    options: dict[str, Any] = {"patch_size": 8, "patch_overlap": 4, "overlap_mode": "average", "progress": False}
    canonical = nibabel.as_closest_canonical(scan).get_fdata(dtype=np.float32)
    turned = oocpatch.predict(canonical, model, tmp_path / "turned.zarr", axes="xyz", **options)
    back = ornt_transform(axcodes2ornt("RAS"), io_orientation(affine))
    expected = apply_orientation(np.asarray(turned), back)
    options["orientation"] = "ras"
    result = oocpatch.predict(tmp_path / "scan.nii.gz", model, tmp_path / "out.zarr", **options)
    assert result.dims == ("x", "y", "z")
    assert np.array_equal(result, expected)
    np.testing.assert_allclose(Volume(tmp_path / "out.zarr").affine, affine, atol=1e-5)
    on_model = oocpatch.predict(
        tmp_path / "scan.nii.gz", model, tmp_path / "model.zarr", output_grid="model", **options
    )
    assert np.array_equal(on_model, turned)
    assert orientation_of(Volume(tmp_path / "model.zarr").affine) == ("R", "A", "S")
    assert oocpatch.check(tmp_path / "scan.nii.gz", model, boxes=1, **options).passed
    with pytest.raises(oocpatch.RunMismatch, match="orientation: 'RAS' before, 'LPS' now"):
        oocpatch.predict(tmp_path / "scan.nii.gz", model, tmp_path / "out.zarr", **{**options, "orientation": "LPS"})
    oocpatch.convert(tmp_path / "scan.nii.gz", tmp_path / "scan.zarr", progress=False)
    again = oocpatch.predict(tmp_path / "scan.zarr", model, tmp_path / "again.zarr", **options)
    assert np.array_equal(again.transpose("x", "y", "z"), expected)


@pytest.mark.parametrize("kind", ["array", "coarse", "file"])
def test_a_mask_lies_over_the_volume_whatever_the_orientation_of_patches(kind: str, tmp_path: Path) -> None:
    affine = np.array([[0, 0, -1.0, 30], [-1, 0, 0, 20], [0, 2, 0, 0], [0, 0, 0, 1]])
    scan = np.random.default_rng(0).random((20, 24, 16), np.float32)
    nibabel.save(nibabel.Nifti1Image(scan, affine), tmp_path / "scan.nii.gz")
    mask: Any = np.zeros((5, 6, 4) if kind == "coarse" else scan.shape, np.uint8)
    mask[(0, 1, 1) if kind == "coarse" else (1, 5, 6)] = 1
    if kind == "file":
        nibabel.save(nibabel.Nifti1Image(mask, affine), tmp_path / "mask.nii.gz")
        mask = tmp_path / "mask.nii.gz"
    options = {"patch_size": 4, "mask": mask, "output_fill": -1, "progress": False}
    for orientation in (None, "RAS"):
        result = oocpatch.predict(
            tmp_path / "scan.nii.gz", "identity", tmp_path / f"{orientation}.zarr", orientation=orientation, **options
        )
        expected = np.full(scan.shape, -1, np.float32)
        expected[:4, 4:8, 4:8] = scan[:4, 4:8, 4:8]
        np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_an_orientation_of_a_volume_that_does_not_say_where_it_points_is_refused(scan: Path, tmp_path: Path) -> None:
    for volume, code, message in (
        (scan, "RAS", "orientation must be None for a volume without an affine"),
        (scan, "RRS", "orientation must name an end of each axis, such as RAS, got 'RRS'"),
        (np.zeros((9, 9)), "RAS", "an orientation needs three spatial axes, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            oocpatch.plan(volume, "identity", tmp_path / "out.zarr", orientation=code, **SETTINGS)
    with pytest.raises(TypeError, match="orientation must be a text such as 'RAS', got 3"):
        oocpatch.plan(scan, "identity", tmp_path / "out.zarr", orientation=3, **SETTINGS)


def test_coordinates_that_fall_are_legal_in_an_ome_zarr(tmp_path: Path) -> None:
    data = image((20, 24), (0.5, -0.25))
    options: dict[str, Any] = {"patch_size": 8, "output_format": "ome-zarr", "progress": False}
    options["output_grid"] = "model"
    oocpatch.predict(data, "identity", tmp_path / "out.zarr", spacing=0.5, **options)
    read = Volume(tmp_path / "out.zarr")
    assert read.source.coords["x"].values[:2].tolist() == pytest.approx([2.875, 2.375])
    again = oocpatch.predict(tmp_path / "out.zarr", "identity", tmp_path / "again.zarr", spacing=0.25, **options)
    assert again.shape == (40, 24)
    assert again.x.values.tolist() == pytest.approx(data.x.values.tolist())


def test_the_command_line_takes_a_spacing(scan: Path, tmp_path: Path) -> None:
    words = ["predict", str(scan), str(tmp_path / "out.zarr"), "--model", "identity", "--patch-size", "8"]
    words += ["--output-grid", "model"]
    done = CliRunner().invoke(main, [*words, "--spacing", "z=2,y=1000nm", "--progress", "none"])
    assert done.exit_code == 0, done.output
    assert xarray.open_zarr(tmp_path / "out.zarr").prediction.shape == (10, 20, 45)
    refused = CliRunner().invoke(main, [*words, "--spacing", "2 inches"])
    assert refused.exit_code == 2
    assert "spacing must be in the unit of axis z, micrometer, got inches" in refused.output


class Classes(torch.nn.Module):
    """Three scores that are largest where voxels are large, medium and small."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the scores."""
        return torch.cat([patches, 100 + 0 * patches, 200 - patches], 1)


def test_scores_are_resampled_back_as_those_of_the_whole_volume(scan: Path, tmp_path: Path) -> None:
    spacing = ModelGrid("0.6um", scores={"z": 0, "x": 3})
    options = {**SETTINGS, "spacing": spacing}
    scores = oocpatch.predict(scan, Classes(), tmp_path / "scores.zarr", output_grid="model", **options)
    expected = np.stack([whole(channel, (25, 40, 45), (0, 1, 3)) for channel in np.asarray(scores)])
    planned = oocpatch.plan(scan, Classes(), tmp_path / "out.zarr", **options)
    assert (
        planned.patches == oocpatch.plan(scan, Classes(), tmp_path / "x.zarr", output_grid="model", **options).patches
    )
    assert "scores are resampled to 25 x 40 x 45 voxels" in str(planned)
    assert "takes voxels of z 0.6 micrometer, y 0.6 micrometer" in str(planned)
    result = planned.run()
    assert str(oocpatch.plan(scan, Classes(), tmp_path / "out.zarr", overwrite=True, **options)) == str(planned)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * 200)
    original = Volume(scan)
    for name in "zyx":
        assert np.array_equal(result[name], original.source.coords[name])
    labels = oocpatch.predict(scan, Classes(), tmp_path / "labels.zarr", postprocess="argmax", **options)
    assert labels.dtype == np.uint8
    first, second = np.sort(expected, axis=0)[[-2, -1]]
    clear = second - first > 1e-3
    assert np.array_equal(np.asarray(labels)[clear], expected.argmax(axis=0)[clear])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.zarr", "out.zarr", "scores.zarr"]
    assert oocpatch.verify(tmp_path / "labels.zarr").passed


def test_steps_before_resample_are_taken_on_the_grid_of_the_model(scan: Path, tmp_path: Path) -> None:
    options = {**SETTINGS, "spacing": "0.6um"}
    scores = oocpatch.predict(scan, Classes(), tmp_path / "scores", output_grid="model", **options)
    classes = np.asarray(scores).argmax(axis=0)
    labels = oocpatch.predict(scan, Classes(), tmp_path / "labels", postprocess=["argmax", "resample"], **options)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, whole(classes, (25, 40, 45), (0, 0, 0)))
    shares = oocpatch.predict(scan, Classes(), tmp_path / "shares", postprocess=["softmax", "resample"], **options)
    values = torch.from_numpy(np.asarray(scores)).softmax(dim=0).numpy()
    np.testing.assert_allclose(shares, [whole(of_class, (25, 40, 45), (1, 1, 1)) for of_class in values], atol=1e-5)
    with pytest.raises(oocpatch.RunMismatch, match="postprocess"):
        oocpatch.predict(scan, Classes(), tmp_path / "shares", postprocess=["resample", "softmax"], **options)


def test_voxels_without_scores_hold_the_fill_value(scan: Path, tmp_path: Path) -> None:
    options = {
        **SETTINGS,
        "spacing": 1.0,
        "patch_overlap": 0,
        "patch_size": 8,
        "output_fill": 9,
        "postprocess": "argmax",
    }
    box = [(0, 5), (0, 10), (0, 8)]
    result = oocpatch.predict(scan, Classes(), tmp_path / "out.zarr", box=box, **options)
    values = np.asarray(result)
    covered = values != 9
    assert covered[:5, :10, :8].all()
    assert values[covered].max() <= 2
    # one patch of 8 voxels of 1 um, but for the voxels between its last ones and those that no patch covers
    assert np.argwhere(covered).max(axis=0).tolist() == [8, 14, 14]
    assert result.attrs["uncovered_voxels"] == (~covered).sum()


def test_heads_of_several_scales_and_dtypes_lie_on_the_grid_of_the_volume(scan: Path, tmp_path: Path) -> None:
    def model(patches: torch.Tensor) -> dict[str, torch.Tensor]:
        half = torch.nn.functional.avg_pool3d(patches.float(), 2)
        return {"half": half, "large": (patches > 100).to(torch.uint8)}

    options = {**SETTINGS, "spacing": 0.6, "overlap_mode": {"half": "hann", "large": "crop"}}
    result = oocpatch.predict(scan, model, tmp_path / "out.zarr", **options)
    assert result.half.shape == result.large.shape == (25, 40, 45)
    assert (result.half.dtype, result.large.dtype) == (np.float32, np.uint8)
    data = np.asarray(zarr.open_array(scan / "image")[:])
    on_grid = whole(data, (33, 33, 38), (1, 1, 1))
    nearest = whole(on_grid > 100, data.shape, (0, 0, 0))
    assert (np.asarray(result.large) == nearest).mean() > 0.999
    inner = (slice(4, -4),) * 3
    padded = np.pad(on_grid, [(0, 1), (0, 1), (0, 0)], mode="edge")
    means = padded.reshape(17, 2, 17, 2, 19, 2).mean(axis=(1, 3, 5))
    at = [(np.arange(n) + 0.5) * m / n / 2 - 0.5 for n, m in zip(data.shape, (33, 33, 38), strict=True)]
    expected = scipy.ndimage.map_coordinates(means, np.meshgrid(*at, indexing="ij"), order=1, mode="nearest")
    np.testing.assert_allclose(np.asarray(result.half)[inner], expected[inner], atol=1e-3)


def test_named_volumes_of_other_voxels_give_scores_on_the_grid_of_the_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    fine, coarse = (
        xarray.DataArray(
            rng.random((n, n), dtype=np.float32), {a: (np.arange(n) + 0.5) * 24 / n for a in "yx"}, ("y", "x")
        )
        for n in (30, 20)
    )
    volumes = {"image": fine, "prior": coarse}
    call = {**SETTINGS, "spacing": 1.0}
    result = oocpatch.predict(volumes, lambda image, prior: image + prior, tmp_path / "out.zarr", **call)
    at_one = sum(whole(np.asarray(each), (24, 24), (1, 1)) for each in (fine, coarse))
    expected = whole(at_one, (30, 30), (1, 1))
    np.testing.assert_allclose(result[0], expected, atol=1e-5)
    mask = np.zeros((30, 30), bool)
    mask[21:23, 23:26] = True
    for number, part in enumerate(({"mask": mask}, {"box": [(21, 23), (23, 26)]})):
        some = oocpatch.predict(
            volumes, lambda image, prior: image + prior, tmp_path / str(number), **call, **part, output_fill=-1
        )
        np.testing.assert_allclose(some[0, 21:23, 23:26], expected[21:23, 23:26], atol=1e-5)
        assert (some[0, :8, :8] == -1).all()


def test_parts_compute_scores_and_the_last_one_resamples_them(scan: Path, tmp_path: Path) -> None:
    options = {**SETTINGS, "spacing": 0.6, "postprocess": "argmax"}
    expected = oocpatch.predict(scan, Classes(), tmp_path / "whole.zarr", **options)
    first = oocpatch.predict(scan, Classes(), tmp_path / "out.zarr", part=(2, 2), **options)
    assert first.attrs["complete"] is False
    state = oocpatch.status(tmp_path / "out.zarr")
    assert 0 < state.predict_done < state.predict_total
    assert state.state == "incomplete"
    last = oocpatch.predict(scan, Classes(), tmp_path / "out.zarr", part=(1, 2), **options)
    assert "complete" not in last.attrs
    assert np.array_equal(last, expected)


def test_what_cannot_be_resampled_back_is_refused(scan: Path, tmp_path: Path) -> None:
    options = {**SETTINGS, "spacing": 0.6}
    with pytest.raises(ValueError, match="output_grid must be 'model' for overlap_mode 'instances'"):
        oocpatch.plan(scan, "identity", tmp_path / "out.zarr", **options, overlap_mode="instances")
    with pytest.raises(ValueError, match="output_grid must be one of volume, model, got 'patches'"):
        oocpatch.plan(scan, "identity", tmp_path / "out.zarr", **options, output_grid="patches")
    with pytest.raises(oocpatch.PlanTooLarge, match=r"scores of the model .* pass output_grid='model'"):
        oocpatch.plan(scan, Classes(), tmp_path / "out.zarr", **options, max_disk="600KiB")
    with pytest.raises(ValueError, match="blocks must be None where scores are resampled"):
        oocpatch.plan(scan, "identity", tmp_path / "out.zarr", **options).run(blocks=[0])
