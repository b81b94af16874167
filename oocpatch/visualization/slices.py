"""Sample slices and projections of a volume for a picture: chunk by chunk, with few chunks in memory."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.planning.box import Box, worthwhile
from oocpatch.planning.memory import READ_BYTES
from oocpatch.volumes.volume import Volume

Array = npt.NDArray[Any]

PROJECTED = 1 << 30
"""Bytes of a volume that a projection decodes at most: of a larger one it sees evenly spaced layers of chunks."""


@dataclass(frozen=True)
class SlicePlane:
    """A plane to draw.

    Attributes:
        axes: the axes that run down and across, by number.
        along: the axis of a projection; None: a slice.
        name: name of the plane; empty: the names of its axes.
        flips: whether these axes run upwards, and to the left.
        ends: letters at the left, right, upper and lower side; empty: none.
    """

    axes: tuple[int, int]
    along: int | None = None
    name: str = ""
    flips: tuple[bool, bool] = (False, False)
    ends: str = ""


def places(pixels: int, length: int) -> npt.NDArray[np.int64]:
    """Return the voxels at the centres of the pixels of one axis.

    >>> places(3, 9).tolist(), places(4, 2).tolist()
    ([1, 4, 7], [0, 0, 1, 1])
    """
    return ((2 * np.arange(pixels) + 1) * length) // (2 * pixels)


def sample(volume: Volume, at: Sequence[npt.NDArray[np.int64]]) -> Array:
    """Read the voxels at the product of positions per axis, `(C, *lengths)`; positions ascend on each axis."""
    unique = [np.unique(p, return_inverse=True) for p in at]
    wanted = [u for u, _ in unique]
    spread = tuple(max(1, int(w[-1]) + 1 - int(w[0])) for w in wanted)
    step = worthwhile(volume.chunks, spread, READ_BYTES // max(1, volume.channels * volume.dtype.itemsize))
    out = np.empty((volume.channels, *map(len, wanted)), volume.dtype)
    for parts in itertools.product(*map(_groups, wanted, step)):
        index = [w[part] for w, part in zip(wanted, parts, strict=True)]
        box = Box(tuple(int(i[0]) for i in index), tuple(int(i[-1]) + 1 for i in index))
        data = volume.read(box)
        out[(slice(None), *parts)] = data[
            np.ix_(np.arange(volume.channels), *(i - b for i, b in zip(index, box.start, strict=True)))
        ]
    return out[np.ix_(np.arange(volume.channels), *(inverse.reshape(-1) for _, inverse in unique))]


def _groups(wanted: npt.NDArray[np.int64], step: int) -> list[slice]:
    """Return runs of positions that lie in the same step."""
    borders = np.flatnonzero(np.diff(wanted // step)) + 1
    return [slice(int(a), int(b)) for a, b in itertools.pairwise([0, *borders, len(wanted)])]


def plane(volume: Volume, axes: tuple[int, int], size: tuple[int, int], position: Sequence[float]) -> Array:
    """Read a slice as `(C, height, width)`.

    Args:
        volume: the volume.
        axes: the axes that run down and across, by number.
        size: height and width in pixels.
        position: of the slice on the other axes, as a fraction of their lengths.
    """
    return _as_picture(sample(volume, _positions(volume, axes, size, position)), axes, size)


def _positions(
    volume: Volume, axes: tuple[int, int], size: tuple[int, int], position: Sequence[float]
) -> list[npt.NDArray[np.int64]]:
    """Return the voxels of a slice per axis."""
    positions = [np.array([min(n - 1, int(part * n))]) for n, part in zip(volume.shape, position, strict=True)]
    for axis, pixels in zip(axes, size, strict=True):
        positions[axis] = places(pixels, volume.shape[axis])
    return positions


def _as_picture(values: Array, axes: tuple[int, int], size: tuple[int, int]) -> Array:
    """Return the values of a slice as `(C, height, width)`."""
    if axes[0] < axes[1]:
        return values.reshape(len(values), *size)
    return values.reshape(len(values), *reversed(size)).transpose(0, 2, 1)


def projection(
    volume: Volume, axis: int, axes: tuple[int, int], size: tuple[int, int], position: Sequence[float]
) -> tuple[Array, float]:
    """Return the largest values along an axis as `(C, height, width)`, and the share of the volume that was read."""
    length, chunk = volume.shape[axis], max(1, volume.chunks[axis]) if volume.source.chunked else 16
    layers = -(-length // chunk)
    bytes_each = math.prod(volume.shape) / length * chunk * volume.channels * volume.dtype.itemsize
    seen = np.unique(places(int(min(layers, max(1, PROJECTED // max(1, int(bytes_each))))), layers))
    positions = _positions(volume, axes, size, position)

    def maxima() -> Iterator[Array]:
        for layer in seen:
            stop = min(length, (int(layer) + 1) * chunk)
            for first in range(int(layer) * chunk, stop, 16):
                positions[axis] = np.arange(first, min(stop, first + 16))
                yield sample(volume, positions).max(axis=axis + 1)

    return _as_picture(functools.reduce(np.maximum, maxima()), axes, size), len(seen) / layers
