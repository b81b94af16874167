"""Promises on models that misbehave: refused before the run where it can be known, else the block is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
import zarr

import oocpatch
from tests.support.children import unchanged
from tests.support.small_volume import LAST, predict


def smaller_by_one(patches: torch.Tensor) -> torch.Tensor:
    return patches[..., 1:, 1:]


def without_channels(patches: torch.Tensor) -> torch.Tensor:
    return patches[:, 0]


def only_one_patch(patches: torch.Tensor) -> torch.Tensor:
    return patches[0]


def words(patches: torch.Tensor) -> Any:
    return [patches, "words"]


def nothing(_: torch.Tensor) -> Any:
    return None


def complex_values(patches: torch.Tensor) -> torch.Tensor:
    return patches.to(torch.complex64)


def sparse(patches: torch.Tensor) -> torch.Tensor:
    return patches.to_sparse()


def eighth(patches: torch.Tensor) -> torch.Tensor:
    return patches.to(torch.float8_e4m3fn)


def named_as_a_file(patches: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"zarr.json": patches}


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="torch 2.8 has it")
def test_a_device_that_has_failed_stops_the_run(volume: Path, tmp_path: Path) -> None:
    """Every other block would fail as well, and none of them for its own sake."""
    calls = []

    def model(patches: torch.Tensor) -> torch.Tensor:
        calls.append(len(patches))
        if len(calls) > 2:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA")
        return patches

    with pytest.raises(oocpatch.DeviceLost, match=r"cpu failed: .*device-side assert.*a new process continues"):
        predict(volume, tmp_path / "out", model)
    assert len(calls) == 3


def test_the_algorithms_of_cudnn_are_deterministic_while_a_model_is_called(volume: Path, tmp_path: Path) -> None:
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    seen = set()

    def model(patches: torch.Tensor) -> torch.Tensor:
        seen.add((torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark))
        return patches

    predict(volume, tmp_path / "out", model)
    assert seen == {(True, False)}
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == before


WRONG = (
    *(smaller_by_one, without_channels, only_one_patch, words, nothing, complex_values),
    *(sparse, eighth, named_as_a_file),
)
GOT = {
    "smaller_by_one": "7, 7",
    "without_channels": "8, 8",
    "words": "for '1', got str",
    "nothing": "None",
    "sparse": "got a sparse one; return x.to_dense()",
    "eighth": "got torch.float8_e4m3fn; return x.float()",
    "named_as_a_file": "'zarr.json', which is a file of Zarr",
}
"""Part of the message for what a wrong model returns."""


@pytest.mark.parametrize("model", WRONG, ids=[model.__name__ for model in WRONG])
def test_a_model_that_returns_the_wrong_thing_is_refused_by_the_probe(model: Any, volume: Path, output: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=r"model") as error:
        predict(volume, output, model)
    assert GOT.get(model.__name__, "") in str(error.value)


def test_a_model_that_raises_at_once_says_so_in_its_own_words(volume: Path, output: Path) -> None:
    def broken(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises((ValueError, RuntimeError), match="mat1 and mat2 shapes cannot be multiplied"):
        predict(volume, output, broken)


def test_a_model_that_is_none_is_refused(volume: Path, output: Path) -> None:
    with pytest.raises(TypeError, match="model"):
        oocpatch.predict(volume, 3, output, patch_size=8)


class FiveTimesHalved(torch.nn.Module):
    """Rejects what it cannot halve five times, as encoder-decoder networks do."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        small = patches
        for _ in range(5):
            small = torch.nn.functional.max_pool2d(small, 2)
        large = torch.nn.functional.interpolate(small, scale_factor=32)
        return torch.cat([patches, large], dim=1)


def test_a_patch_size_that_the_model_rejects_is_answered_with_the_nearest_that_work(volume: Path, output: Path) -> None:
    with pytest.raises(ValueError, match=r"multiples of 32; nearest: 96, 128") as error:
        predict(volume, output, FiveTimesHalved(), patch_size=100, patch_overlap=0)
    assert "100" in str(error.value)


def test_a_patch_size_that_the_model_takes_runs(tmp_path: Path, volume: Path) -> None:
    result = predict(volume, tmp_path / "out.zarr", FiveTimesHalved(), patch_size=96, patch_overlap=0)
    np.testing.assert_allclose(result.values[0], zarr.open_array(volume)[:], rtol=1e-6)


def other_shape_for_one_patch(patches: torch.Tensor) -> torch.Tensor:
    return patches[..., :-1] if float(patches.max()) == LAST else patches


def nan_for_one_voxel(patches: torch.Tensor) -> torch.Tensor:
    return torch.where(patches == LAST, torch.nan, patches)


def infinity_for_one_voxel(patches: torch.Tensor) -> torch.Tensor:
    return torch.where(patches == LAST, torch.inf, patches)


@pytest.mark.parametrize("model", [other_shape_for_one_patch, nan_for_one_voxel, infinity_for_one_voxel])
def test_a_block_that_fails_is_named_and_the_others_are_kept(model: Any, volume: Path, tmp_path: Path) -> None:
    with unchanged(volume), pytest.raises(oocpatch.BlockFailed) as failure:
        predict(volume, tmp_path / "out.zarr", model, block_shape=8)
    plan = oocpatch.plan(volume, model, tmp_path / "plan", patch_size=8, patch_overlap=4, block_shape=8)
    assert set(failure.value.failures) == {plan.blocks - 1}
    assert re.search(rf"\b{plan.blocks - 1}\b", str(failure.value))
    said = {"other_shape_for_one_patch": "8, 7"}.get(model.__name__, "allow_nonfinite")
    assert said in failure.value.failures[plan.blocks - 1]


@pytest.mark.parametrize("mode", ["crop", "average", "hann", "gaussian"])
def test_a_nonfinite_voxel_is_a_failure_in_every_mode(mode: str, volume: Path, tmp_path: Path) -> None:
    with pytest.raises(oocpatch.BlockFailed, match="finite"):
        predict(volume, tmp_path / "out.zarr", nan_for_one_voxel, overlap_mode=mode)


@pytest.mark.parametrize("mode", ["crop", "average", "hann", "gaussian"])
def test_allowed_nonfinite_values_stay_where_they_are(mode: str, volume: Path, tmp_path: Path) -> None:
    data = zarr.open_array(volume)[:]
    arguments = {"overlap_mode": mode, "block_shape": 8, "allow_nonfinite": True}
    found = predict(volume, tmp_path / "out.zarr", nan_for_one_voxel, **arguments)
    result = found.values
    assert np.isnan(result[-1, -1])
    assert found.attrs["nonfinite_voxels"] == 1
    np.testing.assert_allclose(result.ravel()[:-1], data.ravel()[:-1], rtol=1e-6)


def shifting_nan(patches: torch.Tensor) -> torch.Tensor:
    """NaN wherever the patch that holds the marked voxel reaches, as a network that takes a mean would give."""
    marked = (patches == 10 * 20 + 10).flatten(1).any(1)
    return torch.where(marked.reshape(-1, 1, 1, 1), torch.nan, patches)


@pytest.mark.parametrize("mode", ["average", "hann", "gaussian"])
def test_allowed_nonfinite_values_spread_only_where_their_patch_reaches(
    mode: str, volume: Path, tmp_path: Path
) -> None:
    arguments = {"overlap_mode": mode, "block_shape": 8, "allow_nonfinite": True, "patch_overlap": 0}
    found = predict(volume, tmp_path / "out.zarr", shifting_nan, **arguments)
    result = found.values
    assert found.attrs["nonfinite_voxels"] == np.isnan(result).sum()
    reached = np.zeros((24, 20), bool)
    # The marked voxel lies in the patch [8, 16) x [8, 16) alone; the last patch of a row starts at 12, after it.
    reached[8:16, 8:16] = True
    clear = reached.copy()
    clear[8:16, 12:16] = False
    assert np.isnan(result[clear]).all()
    assert np.isfinite(result[~reached]).all()


def test_a_dict_of_heads_is_refused_clearly_or_written_whole(tmp_path: Path, volume: Path) -> None:
    def heads(patches: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"edges": patches, "classes": -patches}

    try:
        result = predict(volume, tmp_path / "out.zarr", heads)
    except (ValueError, TypeError, NotImplementedError) as refusal:
        assert "dict" in str(refusal) or "heads" in str(refusal)  # noqa: PT017 - either answer is honest
        assert not (tmp_path / "out.zarr").exists()
    else:
        np.testing.assert_allclose(result["classes"].values, -result["edges"].values)


@pytest.mark.parametrize(("model", "name"), [(lambda p: p, "prediction"), (lambda p: {"scores": p}, "scores")])
def test_an_output_with_the_name_of_a_coordinate_is_refused(model: Any, name: str, tmp_path: Path) -> None:
    """One of them would be lost."""
    data = np.zeros((16, 16), np.float32)
    image = xarray.DataArray(data, dims=("y", "x"), coords={"prediction": ("y", data[0]), "scores": 5})
    with pytest.raises(ValueError, match=rf"output '{name}' must not have the name of a coordinate.*drop_vars"):
        oocpatch.predict(image, model, tmp_path / "out.zarr", patch_size=8, progress=False)
    oocpatch.predict(image.drop_vars(name), model, tmp_path / "out.zarr", patch_size=8, progress=False)


@pytest.mark.parametrize("dtype", ["uint16", "uint8"])
def test_a_function_that_does_not_take_the_dtype_of_the_volume_says_so_and_what_helps(
    dtype: str, tmp_path: Path
) -> None:
    volume, settings = np.ones((16, 16), dtype), {"patch_size": 8, "progress": False}
    with pytest.raises(ValueError, match=f"does not take patches of {dtype}, .* but those of float32 .*preprocess="):
        oocpatch.plan(volume, lambda p: p.softmax(1), tmp_path / "out", **settings)
    for preprocess in ("scale", torch.Tensor.float):
        oocpatch.plan(volume, lambda p: p.softmax(1), tmp_path / "out", preprocess=preprocess, **settings)
