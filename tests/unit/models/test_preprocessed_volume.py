"""Volumes that are preprocessed as they are read, and the box of their voxels that are not zero."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from oocpatch.models.preprocessed_volume import Normalization, nonzero_box
from oocpatch.models.preprocessing import checked_preprocess
from oocpatch.planning.box import Box
from oocpatch.volumes.resampling import AxisMap, cropped, resampled
from oocpatch.volumes.statistics import VolumeStatistics
from oocpatch.volumes.volume import Volume

OPTIONS: dict[str, Any] = {"max_memory": 1 << 26, "progress": False}


@given(st.data())
def test_the_box_is_that_of_all_channels(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 3), *[st.integers(1, 9)] * 2))
    values = data.draw(npst.arrays(np.int16, shape, elements=st.sampled_from((0, 0, 0, 0, 0, 7)), fill=st.just(0)))
    box = nonzero_box(Volume(values, "ctyx"), **OPTIONS)
    at = np.argwhere(values.any(axis=0))
    whole = Box((0, 0, 0), values.shape[1:])
    low, high = (at.min(0), at.max(0) + 1) if len(at) else (whole.start, whole.stop)
    expected = Box((0, *map(int, low[1:])), (shape[1], *map(int, high[1:])))
    assert (box or whole) == expected


def test_values_are_preprocessed_before_they_are_resampled_and_stay_within_the_volumes() -> None:
    values = np.random.default_rng(0).normal(50, 30, (2, 12, 10)).astype(np.int16)
    volume = Volume(values, "cyx")
    steps = checked_preprocess(
        [{"name": "clip", "low": 20, "high": 80}, {"name": "zscore", "channels": [1]}], volume.dtype, 2
    )
    box = Box((2, 1), (11, 9))
    normalization = Normalization.of(volume, steps, box, **OPTIONS).within_limits(volume, **OPTIONS)
    expected = values.clip(20, 80).astype(np.float64)
    inside = expected[1, 2:11, 1:9]
    expected[1] = (expected[1] - inside.mean()) / inside.std()
    on_volume = normalization.over(volume)
    np.testing.assert_allclose(on_volume.read(Box((0, 0), (12, 10))), expected, rtol=1e-5, atol=1e-6)
    ends = [(part.min(), part.max()) for part in expected[:, 2:11, 1:9]]
    np.testing.assert_allclose(normalization.limits, ends, rtol=1e-5, atol=1e-6)
    maps = (AxisMap.over(12, 17, 3), AxisMap.over(10, 14, 3))
    loose, tight = (resampled(on_volume, maps, limits) for limits in ((), normalization.limits))
    low, high = np.array(ends).T[:, :, None, None]
    read = loose.read(Box((0, 0), (17, 14)))
    assert (read < low).any()
    assert (read > high).any()
    np.testing.assert_allclose(tight.read(Box((0, 0), (17, 14))), read.clip(low, high), rtol=1e-6)


def test_a_cropped_volume_goes_on_with_its_own_last_voxels() -> None:
    part = cropped(Volume(np.arange(10.0)), Box((3,), (7,)))
    assert part.read(Box((-2,), (6,)), "edge").tolist() == [[3, 3, 3, 4, 5, 6, 6, 6]]


def test_voxels_outside_of_a_grid_are_nan() -> None:
    volume = Volume(np.array([0.0, 10, 20]))
    grid = AxisMap(9, 0.5, -1.0, 1, inside=(2, 7))
    values = resampled(volume, (grid,)).read(Box((0,), (9,)))[0]
    np.testing.assert_array_equal(values, [np.nan, np.nan, 0, 5, 10, 15, 20, np.nan, np.nan])


def test_extremes_are_those_of_the_finite_values_of_a_box() -> None:
    values = np.array([[np.nan, -3.0, 4, np.inf], [7, 1, -9, 2]], np.float32)
    assert VolumeStatistics(Volume(values, "cx"), box=Box((0,), (3,))).extremes() == ((-3.0, 4.0), (-9.0, 7.0))
