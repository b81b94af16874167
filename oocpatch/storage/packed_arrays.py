"""Arrays packed into the content of one file, compressed; whoever stores the file stores its CRC elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd  # type: ignore[import-untyped]  # it has no types of its own

Array = npt.NDArray[Any]

_CODEC = Zstd(level=1)


def compress(array: Array) -> bytes:
    """Return the numbers of an array in C order, compressed.

    >>> decompress(compress(np.arange(6)), "int64", (2, 3)).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    return bytes(_CODEC.encode(np.ascontiguousarray(array).reshape(-1).view(np.uint8))) if array.size else b""


def decompress(data: bytes, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> Array:
    """Return the array of the given dtype and shape that was compressed; it cannot be written to."""
    return np.frombuffer(_CODEC.decode(data) if data else b"", dtype).reshape(shape)


def pack_arrays(arrays: Mapping[str, Array]) -> bytes:
    """Return arrays by name as the content of a file.

    >>> unpack_arrays(pack_arrays({"a": np.array([1, 2], "uint8"), "b": np.zeros((0, 2))}))
    {'a': array([1, 2], dtype=uint8), 'b': array([], shape=(0, 2), dtype=float64)}
    """
    parts = {name: compress(array) for name, array in arrays.items()}
    header = [[name, array.dtype.str, list(array.shape), len(parts[name])] for name, array in arrays.items()]
    return b"".join([json.dumps(header).encode(), b"\n", *parts.values()])


def unpack_arrays(content: bytes) -> dict[str, Array]:
    """Return the arrays in the content of a file."""
    end = content.index(b"\n")
    arrays, at = {}, end + 1
    for name, dtype, shape, length in json.loads(content[:end]):
        arrays[name] = decompress(content[at : at + length], dtype, tuple(shape))
        at += length
    return arrays
