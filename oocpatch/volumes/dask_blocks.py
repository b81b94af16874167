"""Blocks of Dask arrays: read as the array declares them, or refused.

A Dask array declares shape and dtype before any block is computed, and nothing checks that its blocks have them. Masked
blocks are arrays of all values with a mask beside it, which a conversion to a plain array drops.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

MASKED = "must not be a masked array, since masked voxels would count as data; pass {} with a value for them"


def refuse_masked(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array in memory without its mask, if no voxel is masked.

    Raises:
        ValueError: if one is.
    """
    if not isinstance(array, np.ma.MaskedArray):
        return array
    if np.ma.is_masked(array):
        raise ValueError(f"the volume {MASKED.format('volume.filled(...)')}")
    return np.asarray(array)


def check_declared(array: Any) -> None:
    """Refuse a Dask array of unknown shape, or of masked blocks.

    Raises:
        ValueError: in these cases.
    """
    from dask.array.utils import meta_from_array  # noqa: PLC0415 - half a second, for Dask arrays only

    if any(math.isnan(n) for n in array.shape):
        raise ValueError(
            f"the volume must have a known shape, got {array.shape}: the sizes of its chunks are unknown; call "
            "volume.compute_chunk_sizes() first"
        )
    if isinstance(meta_from_array(array), np.ma.MaskedArray):  # type: ignore[no-untyped-call] # Dask gives it none
        raise ValueError(f"the volume {MASKED.format('dask.array.ma.filled(volume, ...)')}")


def load_blocks(array: Any, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
    """Compute a selection of a Dask array, in the calling thread.

    Raises:
        ValueError: if the blocks differ from what the array declares in shape, or in values of another dtype.

    >>> import dask.array
    >>> halves = dask.array.arange(4, chunks=2).map_blocks(lambda block: block / 2, dtype="int64")
    >>> load_blocks(halves, (slice(0, 2),))
    Traceback (most recent call last):
    ...
    ValueError: blocks of the dask array are float64, not int64 as it declares, and do not fit: declare ...
    """
    declared = array[selection]
    computed = declared.compute(scheduler="synchronous")
    if np.ma.is_masked(computed):
        raise ValueError(f"blocks of the dask array {MASKED.format('dask.array.ma.filled(volume, ...)')}")
    values = np.asarray(computed)
    if values.shape != declared.shape:
        raise ValueError(
            f"blocks of the dask array have shape {values.shape}, not {declared.shape} as it declares; declare their "
            "shape, as by map_blocks(..., chunks=...)"
        )
    if values.dtype == declared.dtype or values.dtype.kind == declared.dtype.kind == "f":
        return values
    with np.errstate(invalid="ignore"):  # of NaN, which no integer equals
        cast = values.astype(declared.dtype)
    if not np.array_equal(cast, values):
        raise ValueError(
            f"blocks of the dask array are {values.dtype}, not {declared.dtype} as it declares, and do not fit: "
            f"declare their dtype, as by map_blocks(..., dtype={str(values.dtype)!r})"
        )
    return cast
