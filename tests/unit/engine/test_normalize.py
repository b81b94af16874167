"""Promises on the last step: values are sums divided by the outer product of the weights, rounded as numpy rounds."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from oocpatch.engine.normalize import Counts, Normalizer
from oocpatch.planning.box import Box


@pytest.mark.parametrize("tile", [1, 7, 40, 10_000])
@pytest.mark.parametrize("shape", [(5,), (4, 9), (3, 5, 7), (2, 3, 2, 5)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "int8", "uint16", "int16", "int32"])
def test_values_are_sums_divided_by_weights_however_they_are_cut(dtype: str, shape: tuple[int, ...], tile: int) -> None:
    """Ties go to the even integer, what is too large saturates; the product of weights is taken from the last axis."""
    generator = np.random.default_rng(0)
    whole = tuple(n + 3 for n in shape)
    weights = [generator.choice(np.array([0.5, 1, 2], np.float32), n) for n in whole]
    box = Box((2,) * len(shape), tuple(n + 2 for n in shape))
    product = np.ones((), np.float32)
    for weight, part in zip(reversed(weights), reversed(box.slices()), strict=True):
        product = np.multiply.outer(weight[part], product)
    # halves are ties; some are beyond every limit of 16 bits
    wanted = generator.integers(-300, 300, (2, *shape)).astype(np.float32) / 2
    wanted.reshape(-1)[::4] *= 1000
    wanted.reshape(-1)[1] = np.inf
    expected = wanted
    if np.dtype(dtype).kind in "ui":
        info = np.iinfo(dtype)
        expected = np.clip(np.rint(wanted.astype(np.float64)), info.min, info.max)
    larger = torch.from_numpy(np.zeros((2, *(n + 1 for n in shape)), dtype))
    out = larger[(slice(None), *(slice(1, None) for _ in shape))]  # with strides of its own
    normalizer = Normalizer(
        tuple(map(torch.from_numpy, weights)), None, 0, tile, allow_nonfinite=np.dtype(dtype).kind == "f"
    )
    normalizer.normalize(torch.from_numpy(wanted * product), box, out)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out.numpy(), expected.astype(dtype))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"])
def test_voxels_without_a_patch_are_filled_in_every_dtype(dtype: str) -> None:
    values, weights = np.arange(12, dtype=np.float32).reshape(1, 3, 4), np.tile(np.float32([0, 2]), (1, 3, 2))
    out = torch.from_numpy(np.full((1, 3, 8), 9, dtype))[..., ::2]
    normalizer = Normalizer(None, None, 0, 5, dense=True, fill=1)
    sums = torch.from_numpy(np.concatenate([values * weights, weights]))
    assert normalizer.normalize(sums, Box((0, 0), (3, 4)), out).uncovered == 6
    np.testing.assert_array_equal(out.numpy(), np.where(weights == 0, 1, values).astype(dtype))


@pytest.mark.parametrize(
    ("source", "target", "largest"),
    [
        ("float32", "float16", 65504),
        ("float64", "float16", 65504),
        ("int32", "float16", 65504),
        ("float64", "float32", 3.4028234663852886e38),
    ],
)
@pytest.mark.parametrize("dense", [True, False])
def test_values_that_a_float_dtype_cannot_hold_are_an_error_or_counted(
    source: str, target: str, largest: float, dense: bool
) -> None:
    """Numbers up to the largest are stored as they are, larger ones never become infinite without a word."""
    values = np.array([[1, largest, -largest, 0]]).astype(source)
    larger = values.copy()
    larger[0, 3] = np.iinfo(source).max if source == "int32" else 8 * largest

    def normalized(sums: npt.NDArray[Any], *, allowed: bool) -> tuple[Any, npt.NDArray[Any]]:
        stored = torch.from_numpy(np.concatenate([sums, np.ones_like(sums)]) if dense else sums)
        out = torch.zeros((1, 4), dtype=getattr(torch, target))
        normalizer = Normalizer(None, None, 0, 64, dense=dense, divide=False, allow_nonfinite=allowed)
        return normalizer.normalize(stored, Box((0,), (4,)), out), out.numpy()

    counts, out = normalized(values, allowed=False)
    assert counts == Counts()
    np.testing.assert_array_equal(out, values.astype(target))
    with pytest.raises(ValueError, match=f"{target} holds numbers up to .*, but 1 voxels of the output are larger"):
        normalized(larger, allowed=False)
    counts, out = normalized(larger, allowed=True)
    assert counts == Counts(nonfinite=1)
    assert np.isinf(out).sum() == 1


@pytest.mark.parametrize("allowed", [True, False])
def test_what_is_not_a_number_becomes_zero_in_integers_and_is_counted(allowed: bool) -> None:
    sums = torch.tensor([[2.0, torch.nan, 600.0, -torch.inf]])
    out = torch.zeros((1, 4), dtype=torch.uint8)
    counts = Normalizer((torch.full((4,), 2.0),), None, 0, 64, allow_nonfinite=allowed).normalize(
        sums, Box((0,), (4,)), out
    )
    assert out.tolist() == [[1, 0, 255, 0]]
    assert counts.nonfinite == (2 if allowed else 0)


def test_a_run_without_a_cluster_does_not_import_one() -> None:
    """It takes a fifth of a second of each start."""
    code = (
        "import sys, tempfile, numpy as np, torch, oocpatch\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    oocpatch.predict(np.ones((8, 8), 'f4'), torch.nn.Identity(), folder + '/out', patch_size=4)\n"
        "assert 'distributed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
