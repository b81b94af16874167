"""Sample slices and projections of a volume for a picture: chunk by chunk, with few chunks in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.planning.box import Box, worthwhile
from oocpatch.planning.memory import READ_BYTES
from oocpatch.volumes.volume import Volume

Array = npt.NDArray[Any]

PROJECTED = 1 << 30
"""Bytes of a volume that a projection decodes at most: of a larger one it sees evenly spaced layers of chunks."""


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
    groups = [_groups(w, s) for w, s in zip(wanted, step, strict=True)]
    for parts in itertools.product(*groups):
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
    at = []
    for axis, (length, fraction) in enumerate(zip(volume.shape, position, strict=True)):
        if axis in axes:
            at.append(places(size[axes.index(axis)], length))
        else:
            at.append(np.array([min(length - 1, int(fraction * length))]))
    values = sample(volume, at).reshape(volume.channels, *(len(at[a]) for a in sorted(axes)))
    return values if axes[0] < axes[1] else values.transpose(0, 2, 1)


def projection(
    volume: Volume, axis: int, axes: tuple[int, int], size: tuple[int, int], position: Sequence[float]
) -> tuple[Array, float]:
    """Return the largest values along an axis as `(C, height, width)`, and the share of the volume that was read."""
    length, chunk = volume.shape[axis], max(1, volume.chunks[axis]) if volume.source.chunked else 16
    layers = -(-length // chunk)
    bytes_each = math.prod(volume.shape) / length * chunk * volume.channels * volume.dtype.itemsize
    seen = np.unique(places(int(min(layers, max(1, PROJECTED // max(1, int(bytes_each))))), layers))
    highest: Array | None = None
    for layer in seen:
        for first in range(int(layer) * chunk, min(length, (int(layer) + 1) * chunk), 16):
            at = []
            for a, (n, fraction) in enumerate(zip(volume.shape, position, strict=True)):
                if a in axes:
                    at.append(places(size[axes.index(a)], n))
                elif a == axis:
                    at.append(np.arange(first, min(n, first + 16, (int(layer) + 1) * chunk)))
                else:
                    at.append(np.array([min(n - 1, int(fraction * n))]))
            values = sample(volume, at).max(axis=axis + 1)
            highest = values if highest is None else np.maximum(highest, values)
    assert highest is not None
    picture = highest.reshape(volume.channels, *(size[axes.index(a)] for a in sorted(axes)))
    return (picture if axes[0] < axes[1] else picture.transpose(0, 2, 1)), len(seen) / layers
