"""Promises on several volumes: channels of one, to the last bit those of a stored stack, or inputs by their names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
import zarr
from click.testing import CliRunner

import oocpatch
from oocpatch.cli import main as cli

RNG = np.random.default_rng(0)
T1, T2 = (RNG.random((40, 30), dtype=np.float32) for _ in range(2))
FLAIR = RNG.random((2, 40, 30), dtype=np.float32)
SETTINGS: dict[str, Any] = {"patch_size": 16, "patch_overlap": 8, "output_chunks": 8, "progress": False}


def weighted(patches: torch.Tensor) -> torch.Tensor:
    """Two sums of the channels with other weights."""
    weights = torch.arange(1.0, 1 + patches.shape[1])[:, None, None]
    return torch.stack([(patches * weights).sum(1), (patches / weights).sum(1)], 1)


class Gated(torch.nn.Module):
    """A model of two tensors."""

    def forward(self, image: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        return image.sum(1, keepdim=True) * prior


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, str]:
    names = {"t1": T1, "t2": T2, "flair": FLAIR, "stack": np.stack([T1, T2, *FLAIR])}
    for name, data in names.items():
        dims = ("c", "y", "x")[-data.ndim :]
        zarr.create_array(tmp_path / name, data=data, chunks=(1, 8, 8)[-data.ndim :], dimension_names=dims)
    return {name: str(tmp_path / name) for name in names}


def test_a_list_is_the_stored_stack_to_the_last_bit_and_its_changes_are_seen(
    stored: Mapping[str, str], tmp_path: Path
) -> None:
    parts = [stored[name] for name in ("t1", "t2", "flair")]
    expected = oocpatch.predict(stored["stack"], weighted, tmp_path / "a", **SETTINGS)
    result = oocpatch.predict(parts, weighted, tmp_path / "b", workers=2, **SETTINGS)
    assert np.array_equal(result, expected)
    assert oocpatch.predict(parts, weighted, tmp_path / "b", **SETTINGS).equals(result)
    zarr.open_array(stored["t2"])[3:9] = 0
    with pytest.raises(oocpatch.RunMismatch, match="computed from other input"):
        oocpatch.predict(parts, weighted, tmp_path / "b", **SETTINGS)
    zarr.open_array(stored["stack"])[1, 3:9] = 0
    again = oocpatch.predict(parts, weighted, tmp_path / "b", update=True, **SETTINGS)
    assert np.array_equal(again, oocpatch.predict(stored["stack"], weighted, tmp_path / "a", update=True, **SETTINGS))
    assert oocpatch.check([T1, T2], weighted, boxes=1, patch_size=8, patch_overlap=4).passed


def test_a_dict_calls_the_model_by_name_with_the_channels_of_each(stored: Mapping[str, str], tmp_path: Path) -> None:
    result = oocpatch.predict({"image": stored["flair"], "prior": T1}, Gated(), tmp_path / "a", **SETTINGS)
    assert np.allclose(result[0], FLAIR.sum(0) * T1, atol=1e-5)
    with pytest.raises(oocpatch.RunMismatch, match="inputs"):
        oocpatch.predict({"prior": stored["flair"], "image": T1}, Gated(), tmp_path / "a", **SETTINGS)
    with pytest.raises(ValueError, match="unexpected keyword argument 'mask'"):
        oocpatch.plan({"image": T1, "mask": T2}, Gated(), tmp_path / "b", **SETTINGS)
    words = f"predict image={stored['t1']},prior={stored['t2']} {tmp_path / 'c'} --model {__file__}:Gated"
    run = CliRunner().invoke(cli.main, [*words.split(), "--patch-size", "16", "--progress", "none", "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["complete"]
    report = oocpatch.report(tmp_path / "c", tmp_path / "r.html").read_text()
    assert f"oocpatch predict image={stored['t1']},prior={stored['t2']} " in report
    assert np.allclose(xarray.open_zarr(tmp_path / "c").prediction[0], T1 * T2, atol=1e-5)


def test_grids_that_differ_are_refused_by_axis_and_resampled_by_spacing(tmp_path: Path) -> None:
    def picture(length: int, step: float) -> xarray.DataArray:
        places = (step - 1) / 2 + step * np.arange(length)
        values = np.add.outer(places, places).astype(np.float32)
        return xarray.DataArray(values, {"y": places, "x": places}, ("y", "x"))

    fine, coarse = picture(40, 1.0), picture(20, 2.0)
    with pytest.raises(ValueError, match=r"differ along y \(20 voxels of 2 from 0.5 of volume\[1\], 40 .* spacing="):
        oocpatch.plan([fine, coarse], weighted, tmp_path / "a", **SETTINGS)
    with pytest.raises(ValueError, match=r"differ along x \(30 voxels of"):
        oocpatch.plan([fine, fine.isel(x=slice(10, None))], weighted, tmp_path / "a", **SETTINGS)
    with pytest.raises(ValueError, match=r"the same axes, got x, y of volume\[1\] and y, x of volume\[0\]"):
        oocpatch.plan([fine, fine.T], weighted, tmp_path / "a", **SETTINGS)
    with pytest.raises(ValueError, match="must be names of the model's arguments, got 'a-b'"):
        oocpatch.plan({"a-b": fine}, weighted, tmp_path / "a", **SETTINGS)
    result = oocpatch.predict([fine, coarse], lambda p: p[:, :1] - p[:, 1:], tmp_path / "a", spacing=1.0, **SETTINGS)
    assert np.allclose(result.squeeze()[1:-1, 1:-1], 0, atol=1e-4)
