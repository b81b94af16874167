"""Several volumes of one grid as the channels of one volume, read box by box; nothing is copied.

```text
 t1     (z, y, x)      channel 0
 t2     (z, y, x)      channel 1           of the stack (z, y, x, channel), in the dtype that holds all values
 flair  (c, z, y, x)   channels 2, 3
```
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.planning.box import Box
from oocpatch.volumes.affine import spacing_along
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
    on_grid = source.computed(
        reader,
        shape=tuple(shape),
        dtype=dtype,
        chunks=tuple(chunks),
        names=axes.names,
        roles=axes.roles,
        chunked=True,
        units=units if has_units else None,
        read_bytes=math.prod(chunks) * dtype.itemsize + max(volume.chunk_bytes for volume in volumes),
    )
    return Volume(on_grid, axes)


def _itself(box: Box) -> Box:
    return box


NEAR = 1e-3
"""Share of a voxel by which positions of one grid may differ."""


def parts_of(volume: Any) -> dict[str, Any]:
    """Return the volumes of an argument `volume` by their names in messages: of a dict, a list, or of one alone.

    Raises:
        ValueError: for an empty dict or list, and names that no argument can have.
    """
    if not isinstance(volume, list | tuple | dict):
        return {"volume": volume}
    parts = volume if isinstance(volume, dict) else {f"volume[{i}]": part for i, part in enumerate(volume)}
    if not parts:
        raise ValueError(f"volume must not be an empty {type(volume).__name__}")
    for name in volume if isinstance(volume, dict) else ():
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"names of volumes must be names of the model's arguments, got {name!r}")
    return dict(parts)


def stacked_on_grid(volumes: Mapping[str, Volume]) -> Volume:
    """Return volumes, by their names, as channels of one volume.

    Raises:
        ValueError: if their axes or their grids differ; it names the axes.
    """
    first, *others = volumes
    like = volumes[first]
    for name in others:
        if volumes[name].names != like.names:
            axes = ", ".join(volumes[name].names), ", ".join(like.names)
            raise ValueError(f"volumes must have the same axes, got {axes[0]} of {name} and {axes[1]} of {first}")
    if differing := grid_differences(volumes):
        raise ValueError(
            f"volumes must have one grid, but they differ along {', '.join(differing)}; those of one extent are "
            "resampled to one grid by spacing="
        )
    return stacked(list(volumes.values()), like)


def grid_differences(volumes: Mapping[str, Volume]) -> list[str]:
    """Describe the axes along which volumes of the same axes have other voxels than the first one."""
    first, *others = volumes
    like = volumes[first]
    return [
        f"{axis} ({_described(volumes[name], axis, n)} of {name}, {_described(like, axis, m)} of {first})"
        for name in others
        for axis, n, m in zip(like.names, volumes[name].shape, like.shape, strict=False)
        if n != m or not _is_same_place(volumes[name], like, axis)
    ]


def _described(volume: Volume, axis: str, size: int) -> str:
    spacing = spacing_along(volume.source, axis)
    if spacing is None or spacing.step is None:
        return f"{size} voxels"
    return f"{size} voxels of {abs(spacing.step):g} from {spacing.start:g}"


def _is_same_place(volume: Volume, other: Volume, axis: str) -> bool:
    """Return whether two volumes have the same coordinates along an axis, if both have some."""
    one, two = (spacing_along(v.source, axis) for v in (volume, other))
    if one is None or two is None:
        return True
    ends = [(s.start, s.start + (s.step or 0.0) * (volume.shape[volume.names.index(axis)] - 1)) for s in (one, two)]
    near = NEAR * abs(one.step or 1.0)
    return one.unit == two.unit and all(abs(a - b) <= near for a, b in zip(*ends, strict=True))
