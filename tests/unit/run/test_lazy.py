"""`lazy`: the values of `predict`, of the parts that are asked for, from the patches that reach them."""

from __future__ import annotations

import functools
import itertools
import re
import threading
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import xarray
import zarr

import oocpatch

DATA = np.random.default_rng(0).random((40, 44), dtype=np.float32)
PATCHES: dict[str, Any] = {"patch_size": 12, "patch_overlap": 5, "output_chunks": 8}


def network(outputs: int = 3, inputs: int = 1) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv2d(inputs, outputs, 3, padding=1).requires_grad_(requires_grad=False)


class TwoHeads(torch.nn.Module):
    """Scores and labels; counts its calls."""

    def __init__(self, scale: int = 1) -> None:
        super().__init__()
        self.scale = scale
        self.patches: list[float] = []

    def forward(self, patches: torch.Tensor) -> dict[str, torch.Tensor]:
        self.patches += patches.reshape(len(patches), -1)[:, 0].tolist()
        scores = torch.nn.functional.avg_pool2d(patches, self.scale)
        return {"scores": torch.cat([scores, 1 - scores], 1), "labels": (patches > 0.5).to(torch.uint8)}


def written(path: Path, volume: Any, model: Any, **options: Any) -> Any:
    result = oocpatch.predict(volume, model, path / "out.zarr", progress=False, **options).load()
    for name in ("uncovered_voxels", "oocpatch"):
        result.attrs.pop(name, None)
    return result


AROUND: dict[str, dict[str, Any]] = {
    "plain": {},
    "classes": {"block_shape": 16, "postprocess": "argmax"},
    "padded": {"padding_mode": "reflect", "block_shape": 24},
    "mask": {"mask": np.eye(5)[::-1], "output_fill": 7, "block_shape": 16},
    "around": {"preprocess": "zscore", "augment": "flips", "padding_mode": "mean"},
}


@pytest.mark.parametrize(
    ("mode", "around"),
    [
        ("crop", "plain"),
        ("gaussian", "plain"),
        ("max", "plain"),
        ("hann", "classes"),
        ("average", "classes"),
        ("crop", "padded"),
        ("hann", "padded"),
        ("crop", "mask"),
        ("hann", "mask"),
        ("max", "mask"),
        ("hann", "around"),
    ],
)
def test_any_part_has_the_bits_that_predict_writes(mode: str, around: str, tmp_path: Path) -> None:
    settings = {**PATCHES, "overlap_mode": mode, **AROUND[around]}
    expected = written(tmp_path, DATA, network(), **settings)
    result = oocpatch.lazy(DATA, network(), **settings)
    part = {"y": slice(13, 29), "x": 17}
    np.testing.assert_array_equal(result.isel(part), expected.isel(part))
    xarray.testing.assert_identical(result.compute(), expected)


@pytest.mark.parametrize("axes", ["tcyx", "tyxc"])
def test_axes_coordinates_and_attributes_are_those_of_predict(axes: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((2, 2, 20, 24), dtype=np.float32)
    coords = {"t": [1, 5], "y": ("y", np.arange(20) * 0.5, {"units": "micrometer"})}
    volume = xarray.DataArray(values, coords, tuple("tcyx"), attrs={"subject": "a"}).transpose(*axes)
    expected = written(tmp_path, volume, network(3, 2), **PATCHES)
    xarray.testing.assert_identical(oocpatch.lazy(volume, network(3, 2), **PATCHES).compute(), expected)


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("output_format", ["zarr", "ome-zarr"])
def test_several_heads_are_a_dataset_or_of_several_scales_a_tree(
    scale: int, output_format: str, tmp_path: Path
) -> None:
    settings = {"patch_size": 12, "patch_overlap": 4, "output_format": output_format, "output_chunks": 8}
    modes = {"scores": "hann", "labels": "crop"}
    expected = written(tmp_path, DATA, TwoHeads(scale), overlap_mode=modes, **settings)
    result = oocpatch.lazy(DATA, TwoHeads(scale), overlap_mode=modes, **settings)
    assert type(result) is type(expected) is (xarray.Dataset if scale == 1 else xarray.DataTree)
    for head in modes:
        place = head if scale == 1 else f"{head}/{head}"
        assert result[place].dims == expected[place].dims
        np.testing.assert_array_equal(result[place], expected[place])


def test_only_the_patches_that_reach_the_chunks_asked_for_are_computed_and_once_for_all_heads() -> None:
    model = TwoHeads()
    corners = np.arange(1, 1 + DATA.size, dtype=np.float32).reshape(DATA.shape)  # a patch starts with its place
    result = oocpatch.lazy(corners, model, patch_size=12, patch_overlap=4, output_chunks=8)
    model.patches.clear()
    result.isel(y=slice(17, 20), x=slice(9, 17)).compute()  # chunks 16:24, 8:24
    starts = [[*range(0, n - 12, 8), n - 12] for n in DATA.shape]
    reaching = [(y, x) for y, x in itertools.product(*starts) if y < 24 and y + 12 > 16 and x < 24 and x + 12 > 8]
    of_chunks = [(y, x, c) for y, x in reaching for c in (8, 16) if x < c + 8 and x + 12 > c]
    assert sorted(model.patches) == sorted(float(corners[y, x]) for y, x, _ in of_chunks)
    assert len(reaching) < len(of_chunks) < len(starts[0]) * len(starts[1])


def test_a_large_volume_is_looked_at_without_a_task_per_chunk() -> None:
    volume = zarr.create_array(
        zarr.storage.MemoryStore(),
        shape=(1 << 16,) * 3,
        chunks=(64, 64, 64),
        dtype="float32",
        fill_value=3,
    )
    result = oocpatch.lazy(volume, "identity", patch_size=16, patch_overlap=8, block_shape=256)
    assert result.data.npartitions == 1 << 30
    assert float(result[1 << 15, 1 << 14, 77]) == 3


def test_the_model_is_called_in_evaluation_mode_and_left_as_it_was() -> None:
    model = torch.nn.Sequential(network(1), torch.nn.Dropout(0.9)).train()
    result = oocpatch.lazy(DATA, model, **PATCHES)
    threads = torch.get_num_threads()
    np.testing.assert_array_equal(result.compute(scheduler="threads"), result.compute(scheduler="sync"))
    assert model.training
    assert model[1].training
    assert torch.get_num_threads() == threads


def test_it_is_stored_and_persisted_as_other_dask_arrays(tmp_path: Path) -> None:
    result = oocpatch.lazy(DATA, network(), **PATCHES)
    expected = result.compute()
    xarray.testing.assert_identical(result.persist().compute(), expected)
    result.to_zarr(tmp_path / "stored.zarr", consolidated=False)
    stored = xarray.open_zarr(tmp_path / "stored.zarr", consolidated=False)["prediction"]
    xarray.testing.assert_identical(stored.load(), expected)


def test_it_comes_back_as_itself_from_a_pickle_in_the_same_process() -> None:
    result = oocpatch.lazy(DATA, network(), **PATCHES)
    copied = cloudpickle.loads(cloudpickle.dumps(result))
    source, same = (
        next(v for k, v in r.__dask_graph__().items() if str(k).endswith("-model")) for r in (result, copied)
    )
    assert same.value is source.value
    np.testing.assert_array_equal(copied, result)


def test_a_model_that_cannot_be_sent_is_refused_by_name() -> None:
    class Held(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    result = oocpatch.lazy(DATA, Held(), model_id="held", **PATCHES)
    with pytest.raises(ValueError, match=re.escape("model must be a model spec, such as 'file.py:name'")):
        cloudpickle.dumps(result)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"workers": 2, "export": "a.nii"}, TypeError, "lazy takes no export, workers: it writes nothing"),
        (
            {"overlap_mode": "instances", "patch_overlap": 5},
            ValueError,
            "overlap_mode must not be 'instances' for a lazy result",
        ),
        (
            {"max_memory": "40MiB", "patch_size": 96, "patch_overlap": 0, "output_chunks": 32},
            oocpatch.PlanTooLarge,
            "needs .*lower output_chunks or patch_size",
        ),
        ({"overlap": 4}, TypeError, "no argument overlap"),
        ({"spacing": 2.0}, ValueError, "output_grid must be 'model' for a lazy result with spacing"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(options: dict[str, Any], error: type[Exception], message: str) -> None:
    zeros = np.broadcast_to(np.float32(0), (512, 512, 512))
    volume = xarray.DataArray(zeros, {axis: np.arange(512) for axis in "zyx"}, tuple("zyx"))
    with pytest.raises(error, match=message):
        oocpatch.lazy(volume, "identity", **{**PATCHES, **options})


def test_vectors_per_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="must be voxels for a lazy result, got a vector per patch: prediction"):
        oocpatch.lazy(DATA, lambda patches: patches.mean((2, 3)), patch_size=8, model_id="mean")


def test_a_patch_that_is_not_finite_fails_its_chunks_alone() -> None:
    def divide(patches: torch.Tensor) -> torch.Tensor:
        return 1 / patches

    data = DATA.copy() + 1
    data[4, 4] = 0
    result = oocpatch.lazy(data, divide, model_id="divide", overlap_mode="crop", **PATCHES)
    assert np.isfinite(result[24:]).all()
    with pytest.raises(ValueError, match=r"must be finite, got NaN or infinity at voxel \(4, 4\)"):
        result[4, 4].compute()


def test_the_accessor_has_it(tmp_path: Path) -> None:
    import oocpatch.xarray  # noqa: PLC0415

    array = xarray.DataArray(DATA, dims=("y", "x"))
    result = array.oocpatch.lazy(network(), **PATCHES)
    expected = functools.partial(oocpatch.lazy, array, network())(**PATCHES)
    xarray.testing.assert_identical(result.compute(), expected.compute())
    assert list(tmp_path.iterdir()) == []
