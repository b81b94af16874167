"""Windows: their values along one axis, and their sums over a full grid, compared with plain numpy."""

from __future__ import annotations

import numpy as np
import pytest

from oocpatch.planning.choices import OVERLAP_MODES
from oocpatch.planning.grid import GridAxis
from oocpatch.planning.windows import axis_weights, axis_window
from tests.support import oracle

WEIGHED = [mode for mode in OVERLAP_MODES if mode not in {"crop", "max", "vote", "instances"}]


def test_the_average_weighs_every_voxel_alike() -> None:
    np.testing.assert_array_equal(axis_window("average", 5), np.ones(5))


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_hann_is_the_symmetric_window_without_its_two_zeros(n: int) -> None:
    np.testing.assert_allclose(axis_window("hann", n), np.hanning(n + 2)[1:-1], rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_gaussian_has_a_sigma_of_an_eighth_of_the_patch(n: int) -> None:
    distance = np.arange(n) - (n - 1) / 2
    np.testing.assert_allclose(axis_window("gaussian", n), np.exp(-((8 * distance / n) ** 2) / 2), rtol=1e-12)


def test_the_voxels_of_a_gaussian_of_four_are_one_and_three_sigmas_from_its_centre() -> None:
    np.testing.assert_allclose(axis_window("gaussian", 4), np.exp([-4.5, -0.5, -0.5, -4.5]), rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_nnunet_has_its_centre_at_half_the_patch_rounded_down(n: int) -> None:
    window = axis_window("nnunet", n)
    assert window[n // 2] == 1
    np.testing.assert_allclose(window, oracle.window("nnunet", n), rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 9, 256])
@pytest.mark.parametrize("mode", WEIGHED)
def test_weights_are_float64_symmetric_and_above_zero(mode: str, n: int) -> None:
    window = axis_window(mode, n)
    assert (window.dtype, window.shape) == (np.float64, (n,))
    assert (window > 0).all()
    assert (window.astype(np.float32) > 0).all(), "the engine's windows are float32"
    if mode != "nnunet":
        np.testing.assert_allclose(window, window[::-1], rtol=1e-12)


@pytest.mark.parametrize(
    "axis",
    [
        GridAxis(20, 8, 4),
        GridAxis(23, 8, 3),  # the last patch is moved back to end at the border
        GridAxis(5, 8, 4),  # a patch longer than the volume
        GridAxis(23, 8, 4, padded=True),  # patches begin before the volume and end beyond it
        GridAxis(8, 8, 0),
    ],
    ids=["even", "moved back", "longer than the volume", "padded", "one patch"],
)
@pytest.mark.parametrize("mode", WEIGHED)
def test_weights_of_a_full_grid_are_the_sum_of_all_windows(mode: str, axis: GridAxis) -> None:
    margin = axis.patch  # room for patches that reach beyond the volume
    total = np.zeros(margin + axis.length + 2 * axis.patch)
    for i in range(axis.count):
        start = margin + axis.start(i)
        total[start : start + axis.patch] += axis_window(mode, axis.patch)
    weights = axis_weights(mode, axis)
    np.testing.assert_allclose(weights, total[margin : margin + axis.length], rtol=1e-12)
    assert (weights > 0).all(), "every voxel is covered"


def test_hann_of_half_an_overlap_is_constant_in_the_interior() -> None:
    weights = axis_weights(
        "hann", GridAxis(101, 7, 3)
    )  # n + 1 is twice the stride: shifted squares of sines add to one
    np.testing.assert_allclose(weights[7:-7], 1, rtol=1e-12)


def test_crop_has_weights_of_one_and_no_window() -> None:
    np.testing.assert_array_equal(axis_weights("crop", GridAxis(20, 8, 4)), np.ones(20))
    with pytest.raises(ValueError, match=r"overlap_mode must be one of .*hann.*, got 'crop'"):
        axis_window("crop", 8)


@pytest.mark.parametrize("mode", ["max", "vote", "instances", "linear"])
def test_a_mode_without_a_window_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"got '{mode}'"):
        axis_window(mode, 8)
