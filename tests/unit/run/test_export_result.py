"""The option `export` of predict: a file once the output is complete, or a refusal before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import xarray
import zarr
from click.testing import CliRunner

import oocpatch
from oocpatch.cli import main as cli
from tests.support.children import unchanged

SCAN = np.random.default_rng(0).integers(0, 1000, (24, 20), dtype=np.uint16)
AFFINE = np.array([[0, -2, 0, 5], [0.5, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1.0]])


def predict(output: Path, export: Path | str | None, volume: Any = SCAN, model: Any = None, **options: Any) -> Any:
    settings = {"patch_size": 8, "overlap_mode": "crop", "progress": False, **options}
    return oocpatch.predict(volume, model or torch.nn.Identity(), output, export=export, **settings)


def test_the_file_has_the_result_and_is_written_again_only_where_it_is_missing(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(SCAN[:, :, None].astype(np.float32), AFFINE), tmp_path / "scan.nii")
    file = tmp_path / "files" / "labels.nii.gz"
    call = (tmp_path / "out.zarr", file, tmp_path / "scan.nii", torch.nn.ReLU())
    result = predict(*call, patch_size=4)
    image = nibabel.load(file)
    np.testing.assert_array_equal(image.dataobj, result)
    np.testing.assert_array_equal(image.affine, AFFINE)
    written = file.stat().st_mtime_ns
    predict(*call, patch_size=4)
    assert file.stat().st_mtime_ns == written
    data = file.read_bytes()
    file.unlink()
    predict(*call, patch_size=4)
    assert file.read_bytes() == data
    record = zarr.open_group(tmp_path / "out.zarr").attrs["oocpatch"]
    assert record["details"]["settings"]["export"] == str(file)  # so that a report shows it


def test_it_is_written_by_the_part_or_the_call_that_completes_the_output(tmp_path: Path) -> None:
    options = {"block_shape": 8, "output_chunks": 8}
    file = tmp_path / "out.tif"
    predict(tmp_path / "out.zarr", file, part=(1, 2), **options)
    assert not file.exists()
    predict(tmp_path / "out.zarr", file, part=(2, 2), **options)
    np.testing.assert_array_equal(oocpatch.Volume(file).source.load((slice(None), slice(None))), SCAN)
    plan = oocpatch.plan(
        SCAN, torch.nn.Identity(), tmp_path / "some.zarr", patch_size=8, overlap_mode="crop", progress=False,
        export=tmp_path / "some.nii", **options,
    )  # fmt: skip
    plan.run(blocks=[0])
    assert not (tmp_path / "some.nii").exists()
    plan.run()
    np.testing.assert_array_equal(np.asarray(nibabel.load(tmp_path / "some.nii").dataobj).T, SCAN)


def test_another_result_replaces_its_file_only_with_overwrite_or_update(tmp_path: Path) -> None:
    source = zarr.create_array(tmp_path / "in.zarr", data=SCAN, chunks=(8, 20))
    file = tmp_path / "out.nii"
    predict(tmp_path / "out.zarr", file, source)
    with pytest.raises(oocpatch.OutputExists, match="export must be a new file"), unchanged(tmp_path):
        predict(tmp_path / "other.zarr", file, source)
    source[:8] = 1
    predict(tmp_path / "out.zarr", file, source, update=True)
    np.testing.assert_array_equal(np.asarray(nibabel.load(file).dataobj).T, source[...])
    source[:8] = 2
    predict(tmp_path / "out.zarr", file, source, overwrite=True)
    np.testing.assert_array_equal(np.asarray(nibabel.load(file).dataobj).T, source[...])
    predict(tmp_path / "more.zarr", None, SCAN)
    with pytest.raises(oocpatch.RunMismatch, match="another volume"):
        predict(tmp_path / "more.zarr", file, SCAN)
    (tmp_path / "foreign.nii").write_text("text")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(oocpatch.OutputExists, match=r"foreign\.nii is there"):
            predict(tmp_path / "out.zarr", tmp_path / "foreign.nii", source, **options)
    assert (tmp_path / "foreign.nii").read_text() == "text"


UNEVEN = xarray.DataArray(SCAN, {"y": np.arange(24.0) ** 2}, ("y", "x"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"export": "out.png"}, "export must end in one of .nii, .nii.gz"),
        ({"export": "s3://bucket/out.nii"}, "export must be a path on a local or shared file system"),
        ({"export": 3}, "export must be a path"),
        ({"model": lambda p: {"a": p, "b": p}}, r"export must be None for .* \(a, b\): .*out.zarr/a', 'out.nii'"),
        ({"volume": UNEVEN}, "'y' must be evenly spaced"),
        ({"volume": np.zeros((4, 4, 4, 4), np.uint8), "axes": "wzyx", "patch_size": 4}, "two or three spatial axes"),
    ],
)
def test_what_could_not_be_exported_is_refused_before_anything_is_computed(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    call = {"export": tmp_path / "out.nii", **options}
    with pytest.raises((ValueError, TypeError), match=message):
        predict(tmp_path / "out.zarr", **call)
    settings = {"patch_size": 8, "model": torch.nn.Identity(), "volume": SCAN, **call}
    with pytest.raises((ValueError, TypeError), match=message):
        oocpatch.plan(output=tmp_path / "out.zarr", **settings)
    assert not list(tmp_path.iterdir())


def test_the_command_line_has_the_option(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "in.zarr", data=SCAN)
    arguments = ["--model", "identity", "--patch-size", "8", "--export", str(tmp_path / "out.nii.gz"), "--json"]
    result = CliRunner().invoke(cli.main, ["predict", str(tmp_path / "in.zarr"), str(tmp_path / "o.zarr"), *arguments])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["export"] == str(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(np.asarray(nibabel.load(tmp_path / "out.nii.gz").dataobj).T, SCAN, rtol=1e-5)
