"""Several volumes of one grid as the channels of one volume, read box by box; nothing is copied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.planning.box import Box
from oocpatch.volumes.axes import Axes
from oocpatch.volumes.resampling import CommonUnits
from oocpatch.volumes.volume import Volume, default_chunks, read_selection

CHANNEL = "channel"
"""Name of the axis of channels where the grid has none."""


@dataclass(frozen=True)
class StackReader:
    """Reads selections of the channels of several volumes.

    Attributes:
        volumes: the volumes, whose boxes have the same axes.
        axes: axes of the stack.
        dtype: dtype of the values.
    """

    volumes: tuple[Volume, ...]
    axes: Axes
    dtype: np.dtype[Any]

    def __call__(self, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        return read_selection(self.axes, self.volumes[0].shape, self.channels, selection, self.read)

    @property
    def channels(self) -> int:
        """Number of channels of all volumes."""
        return sum(volume.channels for volume in self.volumes)

    def read(self, box: Box) -> npt.NDArray[Any]:
        """Read a box, `(C, *box.shape)`."""
        values = np.empty((self.channels, *box.shape), self.dtype)
        first = 0
        for volume in self.volumes:
            values[first : first + volume.channels] = volume.read(box)
            first += volume.channels
        return values

    def for_run(self, threads: int) -> StackReader:
        """Return the same reader for one run; see `Volume.for_run`."""
        return replace(self, volumes=tuple(volume.for_run(threads) for volume in self.volumes))

    def close(self) -> None:
        """Close the files of the volumes."""
        for volume in self.volumes:
            volume.source.close()


def stacked(volumes: Sequence[Volume], like: Volume) -> Volume:
    """Return volumes of one grid as channels of one volume, in their order.

    Args:
        volumes: the volumes, whose boxes have the axes of `like` in its order, and its shape.
        like: the volume whose axes, coordinates and attributes the stack has; a new axis of channels is last.

    >>> first, second = Volume(np.array([1, 2])), Volume(np.array([3, 4]))
    >>> stacked([first, second], first).read(Box((0,), (2,))).tolist()
    [[1, 2], [3, 4]]
    """
    source, axes = like.source, like.axes
    shape, chunks = list(source.shape), list(source.shape)
    names, sequence = list(axes.names), axes.order
    if axes.channel is None:
        axes = Axes((*names, CHANNEL), (*axes.roles, "c"), sequence)
        shape, chunks = [*shape, 0], [*chunks, 0]
    dtype = np.result_type(*(volume.dtype for volume in volumes))
    reader = StackReader(tuple(volumes), axes, dtype)
    channel = axes.channel or 0
    shape[channel] = chunks[channel] = reader.channels
    for position, chunk in zip(sequence, default_chunks(like, dtype.itemsize), strict=True):
        chunks[position] = chunk
    units = CommonUnits(tuple(shape), sequence, tuple((volume, _itself) for volume in volumes))
    has_units = all(volume.source.units is not None for volume in volumes)
    on_grid = replace(
        source,
        shape=tuple(shape),
        dtype=dtype,
        chunks=tuple(chunks),
        load=reader,
        names=axes.names,
        roles=axes.roles,
        chunked=True,
        array=None,
        files=None,
        units=units if has_units else None,
        packing={},
        read_bytes=math.prod(chunks) * dtype.itemsize + max(volume.chunk_bytes for volume in volumes),
    )
    return Volume(on_grid, axes)


def _itself(box: Box) -> Box:
    return box
