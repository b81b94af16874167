"""Promises on values: whatever the shape, patch, overlap, border, chunks, memory and workers, the voxels are right.

The volumes are small, the laws are checked on hundreds of them, and the truth is `oracle.py`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st

import oocpatch
from tests.support import oracle
from tests.support.cases import (
    INTEGERS,
    MODES,
    Case,
    cases,
    channel_first,
    law,
    position_model,
    positional,
    random_values,
    scratch,
    small_integers,
)
from tests.support.children import file_digests


@given(case=cases(("crop",)), dtype=st.sampled_from(("bool", "float16", "float32", "float64", *INTEGERS)))
@law(26)
def test_crop_with_the_identity_model_gives_the_input_back_exactly(case: Case, dtype: str) -> None:
    data = random_values(dtype, (case.channels or 1, *case.shape))
    with scratch() as root:
        result = case.predict(data, torch.nn.Identity(), root)
        values = channel_first(result, case)
    assert values.dtype == data.dtype
    np.testing.assert_array_equal(values, data)


@given(case=cases(MODES[1:]), dtype=st.sampled_from(("float16", "float32", "float64")))
@law(26)
def test_blending_the_identity_model_gives_the_input_back_to_rounding(case: Case, dtype: str) -> None:
    data = random_values(dtype, (case.channels or 1, *case.shape))
    with scratch() as root:
        values = channel_first(case.predict(data, torch.nn.Identity(), root), case)
    assert values.dtype == np.float32
    # Every patch gives a voxel the same value, so the error is relative to that voxel.
    assert (np.abs(values - data) <= case.rounding(1) * np.abs(data)).all()


@given(case=cases(MODES[1:]), dtype=st.sampled_from(("int8", "int16", "uint8", "uint16")))
@law(14)
def test_blending_the_identity_model_into_the_inputs_integers_is_exact(case: Case, dtype: str) -> None:
    data = random_values(dtype, (case.channels or 1, *case.shape))
    with scratch() as root:
        values = channel_first(case.predict(data, torch.nn.Identity(), root, output_dtype=dtype), case)
    assert values.dtype == data.dtype
    np.testing.assert_array_equal(values, data)


@given(case=cases(), fill=st.sampled_from((0.0, -7.0)))
@law(32)
def test_a_model_that_looks_at_position_and_context_equals_the_oracle(case: Case, fill: float) -> None:
    data = small_integers((case.channels or 1, *case.shape))
    padded = {"fill": fill} if case.padding == "constant" else {}
    expected = oracle.predict(
        data,
        position_model,
        patch=case.patch,
        overlap=case.overlap,
        mode=case.mode,
        padding_mode=case.padding,
        even=case.even,
        **padded,
    )
    with scratch() as root:
        result = case.predict(data, positional, root, **padded)
        values = channel_first(result, case)
    assert values.dtype == np.float32
    assert values.shape == expected.shape
    if case.mode == "crop":
        np.testing.assert_array_equal(values, expected)
    else:
        np.testing.assert_allclose(values, expected, rtol=0, atol=case.rounding(250))


SPLITS: dict[str, dict[str, Any]] = {
    "one block": {},
    "blocks": {"block_shape": (8, 8), "output_chunks": 4},
    "uneven blocks": {"block_shape": (9, 12), "output_chunks": (3, 4)},
    "blocks of shards": {"block_shape": (12, 8), "output_chunks": (3, 4), "output_shards": (6, 8)},
    "little memory": {"max_memory": "1.25MiB", "output_chunks": 4},
    "large batches": {"block_shape": (8, 8), "output_chunks": 2, "batch_size": 7},
    "three workers": {"block_shape": (8, 8), "output_chunks": 8, "workers": 3},
}


@pytest.mark.parametrize(
    ("mode", "split"),
    [(mode, split) for n, split in enumerate(SPLITS) for mode in ("crop", ("hann", "average", "gaussian")[n % 3])],
)
def test_any_split_into_blocks_gives_the_same_voxels(mode: str, split: str, tmp_path: Path) -> None:
    options = SPLITS[split]
    case = Case((31, 26), (8, 7), (3, 4), mode, None, chunks=(5, 9))
    data = small_integers((1, *case.shape))
    expected = oracle.predict(data, position_model, patch=case.patch, overlap=case.overlap, mode=mode)
    values = channel_first(case.predict(data, positional, tmp_path, **options), case)
    np.testing.assert_allclose(values, expected, rtol=0, atol=0 if mode == "crop" else case.rounding(250))


@pytest.mark.parametrize("kind", ["path", "string", "zarr array", "numpy", "dask", "xarray", "xarray store"])
def test_every_kind_of_volume_gives_the_same_voxels(kind: str, tmp_path: Path) -> None:
    data = small_integers((17, 14))
    named = xr.DataArray(data, dims=("y", "x"), name="scan")
    stored = zarr.create_array(tmp_path / "in.zarr", data=data, chunks=(5, 6), dimension_names=("y", "x"))
    if kind == "xarray store":
        named.to_dataset().to_zarr(tmp_path / "store.zarr", consolidated=False)
    volume = {
        "path": tmp_path / "in.zarr",
        "string": str(tmp_path / "in.zarr"),
        "zarr array": stored,
        "numpy": data,
        "dask": named.chunk({"y": 5, "x": 6}).data,
        "xarray": named,
        "xarray store": tmp_path / "store.zarr",
    }[kind]
    result = oocpatch.predict(volume, positional, tmp_path / "out", patch_size=6, patch_overlap=(3, 2), output_chunks=4)
    expected = oracle.predict(data[np.newaxis], position_model, patch=(6, 6), overlap=(3, 2), mode="hann")
    np.testing.assert_allclose(result.values, expected, rtol=0, atol=1e-3)
    assert result.dims == ("channel", "y", "x")


@given(case=cases())
@law(12)
def test_the_number_of_workers_does_not_change_a_byte(case: Case) -> None:
    data = small_integers((case.channels or 1, *case.shape))
    fixed = {"output_chunks": case.patch, "block_shape": case.patch, **case.options}
    with scratch() as root:
        for workers in (1, 2, 4):
            case.predict(data, positional, root, name=f"out{workers}", **{**fixed, "workers": workers})
        digests = [file_digests(root / f"out{workers}" / "prediction") for workers in (1, 2, 4)]
    assert digests[0] == digests[1] == digests[2]
    assert "zarr.json" in digests[0]


@dataclass
class Script:
    """What `failing` shall do; an object of its own, so that it is no part of the model."""

    fail_at: int = -1
    calls: int = 0

    def __reduce__(self) -> str:
        return "SCRIPT"  # a name, whatever it holds


SCRIPT = Script()


def failing(patches: torch.Tensor) -> torch.Tensor:
    SCRIPT.calls += 1
    if SCRIPT.calls == SCRIPT.fail_at:
        raise RuntimeError("the model fails here")
    return positional(patches)


@given(case=cases(), calls=st.lists(st.integers(1, 40), min_size=1, max_size=4))
@law(11)
def test_a_run_that_fails_and_is_run_again_gives_the_same_bytes(case: Case, calls: list[int]) -> None:
    data = small_integers((case.channels or 1, *case.shape))
    fixed = {"output_chunks": case.patch, "block_shape": case.patch, **case.options, "workers": 1}
    with scratch() as root:
        SCRIPT.fail_at = -1
        case.predict(data, failing, root, name="whole", **fixed)
        for call in calls:
            # The first call of a new plan is the probe; failing there is another promise.
            SCRIPT.calls, SCRIPT.fail_at = 0, call + 1
            with contextlib.suppress(oocpatch.BlockFailed):
                case.predict(data, failing, root, **fixed)
        SCRIPT.fail_at = -1
        case.predict(data, failing, root, **fixed)
        assert file_digests(root / "out" / "prediction") == file_digests(root / "whole" / "prediction")


@given(data=st.data(), mode=st.sampled_from(MODES))
@law(11)
def test_a_long_sweep_of_many_layers_is_as_exact_as_a_short_one(data: st.DataObject, mode: str) -> None:
    # A ring that holds too few planes shows only after its layers have gone around it in step with the chunks.
    length = data.draw(st.integers(150, 500))
    patch = data.draw(st.integers(3, 17))
    overlap = data.draw(st.integers(0, patch - 1))
    sizes_of_chunks = st.integers(max(7, length // 24), 40)
    shape, chunks = (length, 6), (data.draw(sizes_of_chunks), 6)
    arguments = {
        "axes": "yx",
        "patch_size": (patch, 4),
        "patch_overlap": (overlap, 2),
        "patch_starts": data.draw(st.sampled_from(("regular", "even"))),
        "overlap_mode": mode,
        "block_shape": data.draw(st.sampled_from(((length, 6), (length // 2, 6)))),
        "output_chunks": (data.draw(sizes_of_chunks), 6),
        "batch_size": data.draw(st.integers(1, 5)),
        "progress": False,
    }
    volume = np.arange(1, length * 6 + 1, dtype=np.float32).reshape(shape)
    with scratch() as root:
        zarr.create_array(root / "volume.zarr", data=volume, chunks=chunks)
        values = oocpatch.predict(root / "volume.zarr", torch.nn.Identity(), root / "out", **arguments).values
    np.testing.assert_allclose(values, volume, rtol=0 if mode == "crop" else 4e-6)
