"""Padding by TorchIO's names: the values of TorchIO's own padded volume, and NumPy's where TorchIO has none."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchio
import zarr

import oocpatch
from oocpatch import GridSampler, Subject

NUMPY = {"replicate": "edge", "circular": "wrap", "reflect": "reflect"}
MODES = ("constant", "reflect", "replicate", "circular", "mean", "median", "minimum")
SHAPES = (((2, 7, 9, 8), 4, 2), ((1, 5, 8, 11), (4, 6, 8), (2, 4, 4)), ((3, 4, 4, 4), 4, 0))


def values_of(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Values of a dtype, none of which is another's neighbour by chance, and negative ones where there are any."""
    numbers = (torch.arange(math.prod(shape)) * 37 % 101).reshape(shape)
    return (numbers % 2 == 0) if dtype is torch.bool else (numbers - (0 if dtype is torch.uint8 else 40)).to(dtype)


def padded_by_torchio(values: torch.Tensor, border: tuple[int, ...], mode: str) -> torch.Tensor:
    """TorchIO's padded volume; the modes of PyTorch take neither integers nor a value there."""
    fill = {"fill": 3} if mode == "constant" else {}
    pad = torchio.Pad(padding=tuple(b for b in border for _ in range(2)), padding_mode=mode, **fill)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that integers are truncated
        padded: torch.Tensor = pad(torchio.ScalarImage(values.double() if mode in NUMPY else values)).data
    return padded.to(values.dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "patch", "overlap"), SHAPES)
def test_every_patch_is_that_of_torchios_padded_volume(
    shape: tuple[int, ...], patch: Any, overlap: Any, dtype: torch.dtype, mode: str
) -> None:
    values = values_of(shape, dtype)
    border = tuple(o // 2 for o in (overlap if isinstance(overlap, tuple) else (overlap,) * 3))
    padded = padded_by_torchio(values, border, mode)
    sampler = GridSampler(Subject(t1=values), patch, overlap, padding_mode=mode, fill=3)
    covered = torch.zeros(padded.shape[1:], dtype=torch.bool)
    for item in sampler:
        inside = tuple(
            slice(a + b, a + b + s)
            for a, b, s in zip(item.patch_location.index, border, item.patch_location.size, strict=True)
        )
        assert torch.equal(item.t1.data, padded[(slice(None), *inside)])
        covered[inside] = True
    assert covered.all()


@pytest.mark.parametrize("mode", NUMPY)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_borders_wider_than_the_volume_are_those_of_numpy_where_torchio_raises(mode: str, length: int) -> None:
    values = np.arange(length * 5 * 4, dtype=np.float32).reshape(1, length, 5, 4)
    if mode != "replicate":
        with pytest.raises(RuntimeError):
            torchio.Pad(padding=6, padding_mode=mode)(torch.from_numpy(values))
    widths = [(0, 0), *((6, max(6, 10 - n)) for n in values.shape[1:])]
    expected = np.pad(values, widths, mode=NUMPY[mode])  # type: ignore[call-overload]
    for item in GridSampler(Subject(t1=torch.from_numpy(values)), 16, 12, padding_mode=mode):
        where = tuple(slice(a + 6, a + 22) for a in item.patch_location.index)
        assert np.array_equal(item.t1.data, expected[(slice(None), *where)])


def test_statistics_leave_out_what_is_not_finite_where_torchio_pads_with_nan() -> None:
    values = torch.arange(64.0).reshape(1, 4, 4, 4)
    values[0, 3, 3, 3] = torch.nan
    assert torchio.Pad(padding=1, padding_mode="mean")(values)[0, 0, 0, 0].isnan()
    assert GridSampler(Subject(t1=values), 4, 2, padding_mode="mean")[0].t1.data[0, 0, 0, 0] == 31.0


@pytest.mark.filterwarnings("ignore:.*data type of the input image is not float:RuntimeWarning")
@pytest.mark.parametrize(
    ("mode", "dtype", "value"), [("mean", torch.int32, 2**24 + 1), ("median", torch.int64, 2**53 + 1)]
)
def test_statistics_of_large_integers_are_exact_where_torchio_rounds(mode: str, dtype: torch.dtype, value: int) -> None:
    values = torch.full((1, 40, 40, 40), value, dtype=dtype)
    assert torchio.Pad(padding=1, padding_mode=mode)(torchio.ScalarImage(values)).data[0, 0, 0, 0] == value - 1
    assert GridSampler(Subject(t1=values), 4, 2, padding_mode=mode)[0].t1.data[0, 0, 0, 0] == value


def test_a_value_beside_a_mode_that_needs_none_is_left_alone_where_torchio_raises() -> None:
    values = torch.arange(512.0).reshape(1, 8, 8, 8)
    with pytest.raises(RuntimeError, match="value argument"):
        torchio.GridSampler(torchio.Subject(t1=torchio.ScalarImage(values)), 4, 2, padding_mode="reflect", fill=3)
    sampler = GridSampler(Subject(t1=values), 4, 2, padding_mode="reflect", fill=3)
    assert np.array_equal(sampler[0].t1.data[0], np.pad(values[0], 1, mode="reflect")[:4, :4, :4])


def blur(patches: torch.Tensor) -> torch.Tensor:
    """A model that sees what is beyond the border."""
    return torch.nn.functional.avg_pool2d(torch.nn.functional.pad(patches, (1, 1, 1, 1)), 3, 1)


@pytest.mark.parametrize("mode", [*MODES, "edge", "wrap", "symmetric"])
def test_predict_pads_by_the_same_names(tmp_path: Path, mode: str) -> None:
    values = np.random.default_rng(0).normal(5, 2, (13, 18)).astype(np.float32)
    call: dict[str, Any] = {"patch_size": 8, "patch_overlap": 4, "padding_mode": mode, "fill": 7}
    out = oocpatch.predict(values, blur, tmp_path / "out.zarr", **call)
    mean, median = values.mean(dtype=np.float64), np.median(values)
    statistic = {"constant": 7, "mean": mean, "median": median, "minimum": values.min()}
    how: dict[str, Any] = {"mode": NUMPY.get(mode, mode)}
    if mode in statistic:
        how = {"mode": "constant", "constant_values": np.float32(statistic[mode])}
    by_hand = GridSampler(Subject(t1=np.pad(values, 2, **how)), 8, 4)
    aggregator = oocpatch.PatchAggregator((17, 22), "hann", patch_overlap=4)
    for item in by_hand:
        aggregator.add_batch(blur(item.t1.data[None]), [item.patch_location])
    assert np.allclose(np.asarray(out), aggregator.get_output()[0, 2:-2, 2:-2], rtol=1e-5)


def test_synonyms_are_the_same_run_and_other_names_are_not(tmp_path: Path) -> None:
    call = {"patch_size": 8, "patch_overlap": 4}
    values = np.arange(400.0, dtype=np.float32).reshape(20, 20)
    oocpatch.predict(values, blur, tmp_path / "out.zarr", padding_mode="replicate", **call)
    before = (tmp_path / "out.zarr" / "zarr.json").read_bytes()
    oocpatch.predict(values, blur, tmp_path / "out.zarr", padding_mode="edge", **call)
    assert (tmp_path / "out.zarr" / "zarr.json").read_bytes() == before
    for mode in ("circular", "mean"):
        with pytest.raises(oocpatch.RunMismatch, match="padding_mode"):
            oocpatch.predict(values, blur, tmp_path / "out.zarr", padding_mode=mode, **call)
    assert oocpatch.plan(values, blur, tmp_path / "o", padding_mode="circular", **call).padding_mode == "wrap"


def test_an_update_computes_all_blocks_again_when_the_padding_has_another_value(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "in.zarr", data=np.ones((32, 32), np.float32), chunks=(8, 8))
    call: dict[str, Any] = {"patch_size": 8, "patch_overlap": 4, "padding_mode": "mean"}
    oocpatch.predict(tmp_path / "in.zarr", blur, tmp_path / "out.zarr", **call)
    array[:8, :8] = 100
    updated = oocpatch.predict(tmp_path / "in.zarr", blur, tmp_path / "out.zarr", update=True, **call)
    fresh = oocpatch.predict(tmp_path / "in.zarr", blur, tmp_path / "fresh.zarr", **call)
    assert np.array_equal(np.asarray(updated), np.asarray(fresh))
