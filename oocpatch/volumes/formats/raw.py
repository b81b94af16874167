"""Boxes of an uncompressed array in a file, by reads, since the pages of a memory map count as memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.system import read_at

ROW = 1 << 16
"""Rows of at most so many bytes are read whole and together: reading a gap costs less than another call."""

PIECE = 1 << 20
"""Bytes of one read."""


def row_chunk(length: int, dtype: npt.DTypeLike) -> int:
    """Return how many voxels of a row are read at least: short rows are read whole, so plans must count them whole."""
    return length if length * np.dtype(dtype).itemsize <= ROW else 1


def read_box(
    file: int, offset: int, shape: tuple[int, ...], dtype: npt.DTypeLike, selection: tuple[slice, ...]
) -> npt.NDArray[Any]:
    """Read a selection of an array in C order that begins at `offset` of an open file.

    Raises:
        OSError: if the file ends too early.
    """
    item = np.dtype(dtype)
    shape = (1, 1, *shape)  # so that there are rows, and several of them
    spans = [range(1), range(1), *(range(*s.indices(n)[:2]) for s, n in zip(selection, shape[2:], strict=True))]
    out = np.empty([len(s) for s in spans], item)
    # Axes from `whole` on are selected entirely, so a contiguous run covers a span of the axis before them.
    whole = len(shape)
    while whole > 2 and len(spans[whole - 1]) == shape[whole - 1]:
        whole -= 1
    inner = math.prod(shape[whole:])
    strides = [math.prod(shape[a + 1 :]) for a in range(whole)]
    columns = slice(spans[whole - 1].start * inner, spans[whole - 1].stop * inner)
    for index in np.ndindex(*out.shape[: whole - 2]) if out.size else ():
        corner = (*(spans[a].start + i for a, i in enumerate(index)), spans[whole - 2].start)
        first = sum(i * stride for i, stride in zip(corner, strides, strict=False))
        target = out[index].reshape(len(spans[whole - 2]), -1)
        _fill_rows(file, offset + first * item.itemsize, target, shape[whole - 1] * inner, columns)
    return out.reshape(out.shape[2:])


def _fill_rows(file: int, offset: int, target: npt.NDArray[Any], row: int, columns: slice) -> None:
    """Read some columns of consecutive rows."""
    size = row * target.itemsize
    if size > ROW:
        for number, line in enumerate(target):
            _fill(file, offset + number * size + columns.start * target.itemsize, line)
        return
    step = max(1, PIECE // size)
    for start in range(0, len(target), step):
        part = target[start : start + step]
        lines = np.empty((len(part), row), target.dtype)
        _fill(file, offset + start * size, lines)
        part[...] = lines[:, columns]


def _fill(file: int, offset: int, target: npt.NDArray[Any]) -> None:
    view = target.reshape(-1).view(np.uint8).data
    while view:
        count = read_at(file, view, offset)
        if not count:
            raise OSError(f"the file ends {len(view)} bytes too early")
        view, offset = view[count:], offset + count
