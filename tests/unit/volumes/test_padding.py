"""Padding by a statistic of the whole volume: exact, of the volume's dtype, over all channels."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from oocpatch import Volume
from oocpatch.volumes.padding import padding_value
from tests.support.cases import law

DTYPES = ("bool", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64")


def expected(values: np.ndarray[Any, Any], mode: str) -> Any:
    """The statistic of the finite values, in exact arithmetic, as the dtype holds it."""
    finite = sorted(Fraction(v) for v in values.reshape(-1).tolist() if math.isfinite(v))
    middle = len(finite) // 2
    exact = {
        "mean": sum(finite, Fraction(0)) / len(finite),
        "median": finite[middle] if len(finite) % 2 else (finite[middle - 1] + finite[middle]) / 2,
        "minimum": finite[0],
    }[mode]
    if values.dtype.kind == "f":
        return float(values.dtype.type(float(exact)))
    return bool(exact) if values.dtype.kind == "b" else math.trunc(exact)


@law(60)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), mode=st.sampled_from(("mean", "median", "minimum")))
def test_statistics_of_padding_are_exact_in_every_dtype(data: st.DataObject, dtype: str, mode: str) -> None:
    shape = data.draw(arrays.array_shapes(min_dims=3, max_dims=3, max_side=4))
    values = data.draw(arrays.arrays(dtype, shape, elements={"allow_subnormal": False} if dtype[0] == "f" else None))
    values.reshape(-1)[0] = 1
    value = padding_value(Volume(values, axes="cyx"), mode)
    assert value == expected(values, mode)
    assert isinstance(value, {"b": bool, "f": float}.get(np.dtype(dtype).kind, int))


@pytest.mark.parametrize("mode", ["mean", "median", "minimum"])
def test_statistics_of_a_volume_in_many_chunks_are_those_of_the_whole(mode: str) -> None:
    values = np.random.default_rng(0).normal(1e4, 3, (3, 40, 50)).astype("float32")
    values[1, :3] = np.nan
    array = zarr.create_array({}, data=values, chunks=(1, 16, 16), dimension_names=("c", "y", "x"))
    assert padding_value(Volume(array), mode) == expected(values, mode)


def test_a_third_of_large_integers_is_not_rounded_before_it_is_truncated() -> None:
    values = np.array([6, 6, 9, 6, 6, 9], np.int64) + 2**60
    assert padding_value(Volume(values), "mean") == 2**60 + 7


def test_a_volume_without_finite_values_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="the volume has no finite value to take statistics of"):
        padding_value(Volume(np.full((2, 3), np.nan)), "mean")
