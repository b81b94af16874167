"""Promises to xarray's users: names everywhere, the accessor where it is asked for, and flat OME-Zarrs as trees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
import zarr
from click.testing import CliRunner
from numpy.testing import assert_array_equal

import oocpatch.xarray
from oocpatch.cli.main import main
from oocpatch.volumes.xarray_backend import OmeZarrBackend
from tests.unit.volumes.test_ome_metadata import FULL, LEVELS, write_image

SIZES = {"patch_size": (4, 6), "patch_overlap": (2, 3), "block_shape": (8, 12), "output_chunks": (4, 4)}


def array() -> xarray.DataArray:
    values = np.random.default_rng(0).random((20, 30), dtype=np.float32)
    coords = {"y": 0.5 * np.arange(20), "x": 0.5 * np.arange(30)}
    return xarray.DataArray(values, coords, dims=("y", "x"), name="scan", attrs={"patient": 7})


def test_sizes_by_name_are_those_in_order_and_the_same_run(tmp_path: Path) -> None:
    named = {name: {"x": x, "y": y} for name, (y, x) in SIZES.items()}
    shards = {"output_shards": {"y": 8, "x": 4}}
    oocpatch.predict(array(), torch.nn.Identity(), tmp_path / "out.zarr", **SIZES, output_shards=(8, 4))
    result = oocpatch.predict(array(), torch.nn.Identity(), tmp_path / "out.zarr", **named, **shards)
    assert np.allclose(result, array())
    stored = zarr.open_array(tmp_path / "out.zarr/prediction", mode="r")
    assert (stored.chunks, stored.shards) == ((4, 4), (8, 4))


@pytest.mark.parametrize("name", [*SIZES, "output_shards"])
@pytest.mark.parametrize("given", [{"z": 4, "x": 4}, {"x": 4}, {"c": 1, "y": 4, "x": 4}], ids=["other", "less", "more"])
def test_sizes_by_other_names_are_refused_with_the_axes(name: str, given: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name} must name each spatial axis \(y, x\) and no other, got {given}"):
        oocpatch.plan(
            array(), torch.nn.Identity(), tmp_path / "out", **{"patch_size": 8, "output_chunks": 4, name: given}
        )


def test_sizes_by_name_on_the_command_line(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "in.zarr", data=array().values, dimension_names=("y", "x"))
    command = ["plan", str(tmp_path / "in.zarr"), str(tmp_path / "out.zarr"), "--model", "identity", "--json"]
    done = CliRunner().invoke(main, [*command, "--patch-size", "x=6,y=4", "--patch-overlap", "2,3"])
    assert oocpatch.Plan.from_json(done.stdout).patch_size == (4, 6)
    for wrong in ("x=6,4", "x=6,x=4", "x=a,y=4"):
        done = CliRunner().invoke(main, [*command, "--patch-size", wrong])
        assert done.exit_code == 2
        assert "such as 96 or 32,96,96 or z=32,y=96,x=96" in done.stderr.replace("\n", " ")


def test_the_accessor_is_predict_and_type_dims_coordinates_and_attributes_are_kept(tmp_path: Path) -> None:
    scan = array()
    result = scan.oocpatch.predict(torch.nn.Identity(), tmp_path / "out.zarr", patch_size={"y": 8, "x": 16})
    assert isinstance(result, xarray.DataArray)
    xarray.testing.assert_allclose(result.rename("scan"), scan)
    assert result.attrs == scan.attrs
    again = oocpatch.predict(scan, torch.nn.Identity(), output=tmp_path / "out.zarr", patch_size=(8, 16))
    assert_array_equal(again, result)
    assert scan.oocpatch.plan(torch.nn.Identity(), tmp_path / "p.zarr", patch_size=8).patches == 12


def child(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    ["oocpatch.xarray, xarray", "xarray, oocpatch.xarray", "xarray, oocpatch", "oocpatch, xarray, oocpatch.xarray"],
)
def test_the_accessor_is_there_with_oocpatch_xarray_and_where_xarray_was_imported_before(imports: str) -> None:
    assert child(f"import {imports}; print(xarray.DataArray(1).oocpatch.predict.__name__)") == "predict"


@pytest.mark.parametrize("imports", ["oocpatch", "oocpatch, xarray"])
def test_importing_oocpatch_leaves_the_import_system_and_xarray_alone(imports: str) -> None:
    code = (
        "import sys; before = list(sys.meta_path); "
        f"import {imports}; print(sys.meta_path == before, 'oocpatch.xarray' in sys.modules)"
    )
    assert child(code) == "True False"


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_flat_ome_zarr_opens_as_a_tree_with_coordinates(version: str, tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.zarr", version)
    tree = xarray.open_datatree(path, engine=OmeZarrBackend)
    assert list(tree.children) == ["scale0", "scale1", "scale2"]
    assert tree.attrs == {"name": "cells"}
    for number, values in enumerate(LEVELS):
        node = tree[f"scale{number}"]
        assert node["image"].dims == ("t", "stain", "y", "x")
        assert_array_equal(node["image"], values)
        assert_array_equal(node["y"], 7 + 0.25 * (2**number - 1) + np.arange(values.shape[2]) * 0.5 * 2**number)
        assert node["x"].attrs == {"units": "micrometer"}
    lazy = tree["scale0/image"]
    assert_array_equal(lazy[1, :, [0, 3, 2], 2:5], FULL[1][:, [0, 3, 2], 2:5])
    assert lazy.sel(y=7.5, x=0.25, t=10).values.tolist() == FULL[1, :, 1, 1].tolist()
    dataset = xarray.open_dataset(str(path), engine=OmeZarrBackend, level=1, chunks={})
    assert dataset["image"].chunksizes["y"] == (4,)
    assert_array_equal(dataset["image"], LEVELS[1])
    result = oocpatch.predict(dataset["image"], torch.nn.Identity(), tmp_path / "out", patch_size=2)
    assert_array_equal(result.transpose("t", "stain", "y", "x"), LEVELS[1])


def test_the_engine_is_registered_by_its_name(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.zarr", "0.4")
    assert_array_equal(xarray.open_datatree(path, engine="oocpatch")["scale2/image"], LEVELS[2])


def refused(path: Path) -> Any:
    return xarray.open_datatree(path, engine=OmeZarrBackend)


def test_what_is_no_ome_zarr_is_refused_by_the_engine(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "plain.zarr", data=FULL[0])
    with pytest.raises(ValueError, match=r"engine 'oocpatch' opens OME-Zarr images, but .*plain.zarr is another kind"):
        refused(tmp_path / "plain.zarr")
    with pytest.raises(FileNotFoundError, match="absent"):
        refused(tmp_path / "absent")
