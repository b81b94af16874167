"""Statistics of a volume are numpy's, whatever its dtype, chunks and axes, and the same on every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from oocpatch.volumes import statistics
from oocpatch.volumes.statistics import VolumeStatistics
from oocpatch.volumes.volume import Volume

Array = np.ndarray[Any, Any]
DTYPES = [
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "float32",
    "float64",
]
RANKS = (0.0, 0.5, 31.7, 50.0, 99.5, 100.0)


def moderate(dtype: str) -> dict[str, Any]:
    """Values of which numpy's own float64 arithmetic is a good enough oracle, negative zeros and few alike included."""
    if np.dtype(dtype).kind == "f":
        return {"min_value": -1024, "max_value": 1024}
    if np.dtype(dtype).kind == "b":
        return {}
    info = np.iinfo(dtype)
    return {"min_value": max(info.min, -(2**40)), "max_value": min(info.max, 2**40)}


@st.composite
def chunked(draw: st.DrawFn) -> tuple[Array, tuple[int, ...], bool]:
    """Any array `(C, *spatial)`, any chunks, and whether the channel axis is stored."""
    dtype = draw(st.sampled_from(DTYPES))
    ndim = draw(st.integers(1, 3))
    with_channels = draw(st.booleans())
    shape = (draw(st.integers(1, 3)) if with_channels else 1, *(draw(st.integers(1, 6)) for _ in range(ndim)))
    values = draw(npst.arrays(dtype, shape, elements=moderate(dtype)))
    chunks = tuple(draw(st.integers(1, n + 1)) for n in shape)
    return values, chunks, with_channels


@given(chunked())
def test_statistics_are_numpys_whatever_the_chunks(case: tuple[Array, tuple[int, ...], bool]) -> None:
    values, chunks, with_channels = case
    stored = da.from_array(values if with_channels else values[0], chunks=chunks if with_channels else chunks[1:])
    passes = VolumeStatistics(
        Volume(stored, "czyx"[:1] + "zyx"[4 - values.ndim :] if with_channels else "zyx"[4 - values.ndim :])
    )
    wide = values.reshape(len(values), -1).astype(np.float64)
    found = np.array(passes.moments())
    scale = np.abs(wide).max(initial=1)
    np.testing.assert_allclose(found[:, 0], wide.mean(axis=1), rtol=0, atol=1e-13 * scale)
    np.testing.assert_allclose(found[:, 1], wide.std(axis=1), rtol=0, atol=1e-7 * scale)
    # 64-bit integers of 2**40 are exact in float64
    expected = np.percentile(wide, RANKS, axis=1).T
    np.testing.assert_allclose(passes.percentiles(RANKS), expected, rtol=1e-14, atol=1e-14 * scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_many_boxes_over_the_whole_range_are_exact(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "BOX_BYTES", 64)
    monkeypatch.setattr(statistics, "PIECE", 5)
    generator = np.random.default_rng(0)
    raw = generator.integers(0, 256, 2 * 7 * 9 * 8, dtype=np.uint8)
    values = (raw > 99 if dtype == "bool" else raw.view(dtype)).reshape(2, 7, -1)
    if values.dtype.kind == "f":
        values = np.where(np.isfinite(values) & (np.abs(values.astype(np.float64)) < 1e30), values, 0).astype(dtype)
    zarr.create_array(tmp_path / "v", data=values, chunks=(1, 3, 4))
    volume = Volume(tmp_path / "v", "cyx")
    for channel, (low, middle, high) in enumerate(VolumeStatistics(volume, max_memory=1).percentiles((0, 50, 100))):
        ordered = np.sort(values[channel].ravel())
        assert (low, high) == (ordered[0], ordered[-1])
        n = ordered.size
        pair = ordered[[(n - 1) // 2, n // 2]].astype(np.float64)
        assert middle == pytest.approx(pair[0] + (pair[1] - pair[0]) * 0.5, rel=1e-15)
    for channel, (mean, std) in enumerate(VolumeStatistics(volume).moments()):
        wide = values[channel].astype(np.float64)
        assert mean == pytest.approx(wide.mean(), rel=1e-12)
        assert std == pytest.approx(wide.std(), rel=1e-12)


def test_sixteen_bit_moments_are_rounded_once() -> None:
    # Sums of squares beyond 2**53, a spread so small that float64 would lose it in the difference of squares.
    values = np.full((1000, 1000), 65534, np.uint16)
    values[0, 0] = 65535
    mean, std = VolumeStatistics(Volume(values)).moments()[0]
    assert mean == 65534 + 1e-6
    assert std == pytest.approx((1e-6 * (1 - 1e-6)) ** 0.5, rel=1e-15)


def test_a_large_offset_does_not_swallow_the_spread() -> None:
    values = np.random.default_rng(0).standard_normal((64, 64)) + 1e8
    mean, std = VolumeStatistics(Volume(da.from_array(values, chunks=(5, 7)))).moments()[0]
    assert mean == pytest.approx(values.mean(), rel=1e-15)
    assert std == pytest.approx(values.std(), rel=1e-12)


def test_statistics_have_the_same_bits_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BOX_BYTES", 1 << 10)
    values = np.random.default_rng(0).standard_normal((96, 96)).astype(np.float32)
    volume = Volume(da.from_array(values, chunks=(16, 16)))
    monkeypatch.setattr(statistics, "usable_cores", lambda: 7)
    assert {VolumeStatistics(volume, max_memory=limit).moments() for limit in (1, 1 << 33) for _ in range(3)} == {
        VolumeStatistics(volume, max_memory=1).moments()
    }


def test_what_is_not_finite_is_left_out() -> None:
    values = np.array([[1, np.nan, 3, np.inf], [-np.inf, 5, np.nan, 7]], np.float32)
    passes = VolumeStatistics(Volume(values, "cx"))
    assert passes.moments() == ((2.0, 1.0), (6.0, 1.0))
    assert passes.percentiles((0, 50, 100)) == ((1.0, 2.0, 3.0), (5.0, 6.0, 7.0))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_channel_without_finite_values_is_named(dtype: str) -> None:
    passes = VolumeStatistics(Volume(np.array([[1, 2], [np.nan, np.inf]], dtype), "cx"))
    for ask in (passes.moments, lambda: passes.percentiles((1, 2))):
        with pytest.raises(ValueError, match="channel 1 of the volume has no finite value"):
            ask()


def test_looped_axes_count_too() -> None:
    values = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    assert VolumeStatistics(Volume(values, "tyx")).percentiles((0, 100)) == ((0.0, 23.0),)
