"""Volumes on another grid, resampled box by box: nearest, linear or cubic along each axis.

```text
 volume      |  0  |  1  |  2  |  3  |      edges coincide: voxel j of the grid has its centre at
 grid        |   0   |   1   |   2   |      (j + 1/2) * 4/3 - 1/2, in voxels of the volume
```

A box is read with the voxels that its own depend on, so that its values do not depend on how a volume is cut into
boxes. Beyond its ends a volume goes on with its last voxels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray

from oocpatch.planning.box import Box, Ints, worthwhile
from oocpatch.planning.memory import READ_BYTES
from oocpatch.storage.unit_tags import TagReader, Tags, common_tag
from oocpatch.volumes.ome_metadata import Multiscale
from oocpatch.volumes.volume import Volume, chunks_in_memory, read_selection

Array = npt.NDArray[Any]

POLE = math.sqrt(3) - 2
"""Pole of the filter that turns values into coefficients of cubic B-splines."""

MARGIN = 12
"""Voxels after which a value has no influence on the coefficients of others: the pole to this power is 1e-7."""

EXACT = 1e-6
"""Voxels by which positions may differ from whole ones through rounding."""

LEAST_CHUNK = 4
"""Least voxels of a chunk along an axis: thinner ones would be read several times for the voxels around them."""

CHUNK_BYTES = 1 << 23
"""Bytes of a chunk of a grid, unless chunks of the volume have half of it: on finer grids they have more voxels."""

ORDERS = (0, 1, 3)


@dataclass(frozen=True, slots=True)
class AxisMap:
    """The voxels of a grid along one axis of a volume: the centre of voxel `j` lies at `scale * j + offset`.

    Attributes:
        size: number of voxels of the grid.
        scale: negative where the grid goes the other way.
        offset: position of the first voxel, in voxels of the volume.
        order: order of the spline between voxels: 0 takes the nearest, 1 is linear, 3 cubic.
        inside: start and stop of the voxels of the grid that have values; others are NaN. None: all have.
    """

    size: int
    scale: float = 1.0
    offset: float = 0.0
    order: int = 1
    inside: tuple[int, int] | None = None

    @classmethod
    def over(cls, length: int, size: int, order: int = 1) -> AxisMap:
        """Return a grid of `size` voxels over an axis of `length`, whose outer edges coincide.

        >>> AxisMap.over(8, 4).positions(0, 4).tolist()
        [0.5, 2.5, 4.5, 6.5]
        """
        return cls(size, length / size, (length / size - 1) / 2, order)

    @property
    def moves(self) -> bool:
        """Return whether voxels of the grid are voxels of the volume, in order or reversed."""
        shift = abs(self.offset - round(self.offset))
        return abs(abs(self.scale) - 1) * self.size < EXACT and shift < EXACT

    @property
    def is_identity(self) -> bool:
        """Return whether the voxels of the grid are those of the volume."""
        return self.moves and self.scale > 0 and round(self.offset) == 0 and self.inside is None

    def after(self, scale: float, offset: float) -> AxisMap:
        """Return the same grid along another axis, on which a position of this one lies at `scale * x + offset`."""
        return replace(self, scale=self.scale * scale, offset=self.offset * scale + offset)

    def reversed_to(self, size: int, order: int) -> AxisMap:
        """Return the grid of the volume's voxels along an axis of this grid's."""
        return AxisMap(size, 1 / self.scale, -self.offset / self.scale, order)

    def positions(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """Return the positions of some voxels."""
        voxels = np.arange(start, stop, dtype=np.float64)
        if self.inside is not None:
            voxels = voxels.clip(self.inside[0], self.inside[1] - 1)
        values = self.scale * voxels + self.offset
        whole = np.rint(values)
        return np.where(np.abs(values - whole) < EXACT, whole, values)

    def support(self, start: int, stop: int) -> tuple[int, int]:
        """Return the span of the volume that some voxels depend on; it may go beyond the volume.

        >>> AxisMap.over(8, 4).support(1, 3), AxisMap.over(8, 4, 0).support(1, 3), AxisMap.over(8, 4, 3).support(1, 3)
        ((2, 6), (3, 6), (-11, 19))
        """
        ends = self.positions(start, stop)[[0, -1]]
        low, high = float(ends.min()), float(ends.max())
        if self.moves or self.order == 0:
            return math.floor(low + 0.5 + EXACT), math.floor(high + 0.5 + EXACT) + 1
        margin = 0 if self.order == 1 else MARGIN + 1
        return math.floor(low) - margin, math.ceil(high) + 1 + margin

    def resample(self, values: Array, axis: int, first: int, start: int, stop: int) -> Array:
        """Return some voxels of the grid from those that they depend on, `values`, which begin at `first`."""
        result = self._interpolate(values, axis, first, start, stop)
        if self.inside is not None:
            low, high = (max(0, end - start) for end in self.inside)
            along = np.moveaxis(result, axis, 0)
            along[:low] = along[high:] = np.nan
        return result

    def _interpolate(self, values: Array, axis: int, first: int, start: int, stop: int) -> Array:
        """Return the same, with those of the nearest voxels in place of missing ones."""
        at = self.positions(start, stop)
        if self.moves or self.order == 0:
            return np.take(values, np.floor(at + 0.5 + EXACT).astype(np.int64) - first, axis)
        base = np.floor(at)
        t, index = at - base, base.astype(np.int64) - first
        if self.order == 1:
            taps = [(index, 1 - t), (index + (t > 0), t)]
        else:
            values = spline_coefficients(values, axis)
            weights = ((1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 4 - 6 * (1 - t) ** 2 + 3 * (1 - t) ** 3, t**3)
            taps = [(index + shift, weight / 6) for shift, weight in zip((-1, 0, 1, 2), weights, strict=True)]
        shape = [-1 if a == axis else 1 for a in range(values.ndim)]
        total = np.zeros((), values.dtype)
        for number, (taken, weight) in enumerate(taps):
            part = np.take(values, taken, axis)
            part *= weight.astype(values.dtype).reshape(shape)
            total = np.add(total, part, out=total) if number else part
        return total


def spline_coefficients(values: Array, axis: int) -> Array:
    """Return the coefficients of the cubic B-splines that go through values; the `MARGIN` at both ends is inexact.

    M. Unser, Splines: a perfect fit for signal and image processing, IEEE Signal Processing Magazine 16 (1999).
    """
    coefficients = np.moveaxis(values, axis, 0) * np.asarray(6, values.dtype)
    pole = np.asarray(POLE, values.dtype)
    coefficients[0] /= 1 - pole
    for k in range(1, len(coefficients)):
        coefficients[k] += pole * coefficients[k - 1]
    coefficients[-1] *= pole / (pole - 1)
    for k in range(len(coefficients) - 2, -1, -1):
        coefficients[k] = pole * (coefficients[k + 1] - coefficients[k])
    return np.moveaxis(coefficients, 0, axis)


def values_at(values: npt.NDArray[np.float64], positions: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the values between those of a coordinate, and beyond its ends, along straight lines.

    >>> values_at(np.array([0.0, 10.0, 20.0]), np.array([-0.5, 0.5, 2.5])).tolist()
    [-5.0, 5.0, 25.0]
    """
    if len(values) == 1:
        return np.full(len(positions), values[0])
    low = np.clip(np.floor(positions).astype(int), 0, len(values) - 2)
    return np.asarray(values[low] + (positions - low) * (values[low + 1] - values[low]))


@dataclass(frozen=True)
class ResampledReader:
    """Reads selections of a volume on another grid.

    Attributes:
        volume: the volume.
        maps: the grid along its looped and spatial axes, in their order.
        dtype: dtype of the values.
        limits: least and greatest value of each channel, as cubic splines go beyond those of the voxels; may be empty.
    """

    volume: Volume
    maps: tuple[AxisMap, ...]
    dtype: np.dtype[Any]
    limits: tuple[tuple[float, float], ...] = ()

    def __call__(self, selection: tuple[slice, ...]) -> Array:
        shape = tuple(m.size for m in self.maps)
        return read_selection(self.volume.axes, shape, self.volume.channels, selection, self.read)

    def read(self, box: Box) -> Array:
        """Read a box of the grid, `(C, *box.shape)`."""
        support = self.support(box)
        values = self.volume.read(support, "edge")
        values = values.astype(self.dtype, copy=False)
        spans = zip(self.maps, support.start, box.start, box.stop, strict=True)
        for axis, (axis_map, first, start, stop) in enumerate(spans, 1):
            if not axis_map.is_identity:
                values = axis_map.resample(values, axis, first, start, stop)
        for of_channel, (low, high) in zip(values, self.limits, strict=False):
            np.clip(of_channel, low, high, out=of_channel)
        return values

    def support(self, box: Box) -> Box:
        """Return the box of the volume that a box of the grid depends on; it may go beyond the volume."""
        spans = [m.support(a, b) for m, a, b in zip(self.maps, box.start, box.stop, strict=True)]
        return Box(tuple(a for a, _ in spans), tuple(b for _, b in spans))

    def read_bytes(self, shape: Ints) -> int:
        """Return the bytes of what a box of a shape depends on, and of a chunk of the volume."""
        spans = [m.support(0, n) for m, n in zip(self.maps, shape, strict=True)]
        voxels = self.volume.channels * math.prod(b - a + 1 for a, b in spans)
        return voxels * max(self.dtype.itemsize, self.volume.dtype.itemsize) + self.volume.chunk_bytes

    def for_run(self, threads: int) -> ResampledReader:
        """Return the same reader for one run; see `Volume.for_run`."""
        return replace(self, volume=self.volume.for_run(threads))

    def close(self) -> None:
        """Close the file of the volume."""
        self.volume.source.close()


@dataclass(frozen=True)
class CommonUnits:
    """The stored units that an array is computed from, as one unit: its tag is that of all units a box depends on.

    Attributes:
        unit: shape of the array.
        order: the axes of boxes, as positions in it.
        volumes: the volumes that it is computed from, each with a function that returns the box that a box depends on.
    """

    unit: Ints
    order: Ints
    volumes: tuple[tuple[Volume, Callable[[Box], Box]], ...]

    def reader(self) -> TagReader:
        """Return a function that reads tags as they are now; for one run."""
        opened = [(volume.for_run(), support) for volume, support in self.volumes]

        def read(box: Box) -> Tags:
            inner = Box(tuple(box.start[a] for a in self.order), tuple(box.stop[a] for a in self.order))
            return common_tag(np.concatenate([volume.tags(support(inner)) for volume, support in opened]))

        return read


def resampled(volume: Volume, maps: Sequence[AxisMap], limits: tuple[tuple[float, float], ...] = ()) -> Volume:
    """Return a volume on another grid, one map per looped and spatial axis; the volume itself where that is its own.

    Integers become float32 unless every voxel of the grid is one of the volume. Values stay within `limits`, if given.

    >>> volume = Volume(np.array([[0, 10, 20, 30]]))
    >>> resampled(volume, (AxisMap(1), AxisMap.over(4, 2))).read(Box((0, 0), (1, 2))).tolist()
    [[[5.0, 25.0]]]
    """
    if all(m.is_identity for m in maps):
        return volume
    source, order = volume.source, volume.axes.order
    dtype = volume.dtype
    if not all(m.moves or m.order == 0 for m in maps):
        dtype = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    reader = ResampledReader(volume, tuple(maps), dtype, limits)
    shape, chunks = list(source.shape), list(source.chunks)
    for position, m in zip(order, maps, strict=True):
        shape[position] = m.size
        if source.chunked and not m.is_identity:
            chunk = max(LEAST_CHUNK, round(source.chunks[position] / abs(m.scale)))
            chunks[position] = min(chunk, m.size)
    largest = max(CHUNK_BYTES, 2 * volume.chunk_bytes) // dtype.itemsize
    while source.chunked and math.prod(chunks) > largest and max(chunks[a] for a in order) > LEAST_CHUNK:
        position = max(order, key=lambda a: chunks[a])
        chunks[position] = -(-chunks[position] // 2)
    units = None if source.units is None else CommonUnits(tuple(shape), order, ((volume, reader.support),))
    by_name = {volume.axes.names[a]: m for a, m in zip(order, maps, strict=True) if not m.is_identity}
    on_grid = source.computed(
        reader,
        shape=tuple(shape),
        dtype=dtype,
        chunks=tuple(chunks),
        units=units,
        coords=_coords(source.coords, by_name),
    )
    if source.image is not None:
        on_grid = replace(on_grid, image=_image(source.image, by_name))
    result = Volume(on_grid, volume.axes)
    return Volume(replace(on_grid, read_bytes=reader.read_bytes(largest_read(result))), volume.axes)


def largest_read(volume: Volume) -> Ints:
    """Return the shape of the largest box of a volume that is read at a time."""
    step = volume.chunks if volume.source.chunked else chunks_in_memory(volume.source, volume.axes.order)
    part = worthwhile(step, volume.shape, READ_BYTES // (2 * volume.channels * volume.dtype.itemsize))
    return tuple(min(p, n) for p, n in zip(part, volume.shape, strict=True))


def cropped(volume: Volume, box: Box) -> Volume:
    """Return the part of a volume in a box.

    >>> cropped(Volume(np.array([[0, 10, 20, 30]])), Box((0, 1), (1, 3))).read(Box((0, 0), (1, 2))).tolist()
    [[[10, 20]]]
    """
    return resampled(volume, [AxisMap(b - a, 1.0, a, 0) for a, b in zip(box.start, box.stop, strict=True)])


def _coords(coords: Mapping[str, Any], maps: Mapping[str, AxisMap]) -> dict[str, Any]:
    """Return coordinates on another grid, by the names of its axes; those that are no numbers are left out."""
    on_grid = {}
    for name, variable in coords.items():
        along = [str(d) for d in variable.dims if d in maps]
        if not along:
            on_grid[name] = variable
        elif variable.ndim == 1 and variable.dtype.kind in "iuf":
            m = maps[along[0]]
            values = values_at(np.asarray(variable.values, np.float64), m.positions(0, m.size))
            on_grid[name] = xarray.Variable(variable.dims, values, variable.attrs)
    return on_grid


def _image(image: Multiscale, maps: Mapping[str, AxisMap]) -> Multiscale:
    """Return the metadata of an image on another grid."""
    grid = [maps.get(axis.name, AxisMap(0)) for axis in image.axes]
    levels = [
        replace(
            level,
            scale=tuple(s * m.scale for s, m in zip(level.scale, grid, strict=True)),
            translation=tuple(t + s * m.offset for t, s, m in zip(level.translation, level.scale, grid, strict=True)),
        )
        for level in image.levels
    ]
    return replace(image, levels=tuple(levels))


def stored_volume(volume: Volume) -> Volume:
    """Return the volume that a volume is resampled from; itself where it is not."""
    return volume.source.load.volume if isinstance(volume.source.load, ResampledReader) else volume
