"""The grid that a model takes its patches on: the voxel size it was trained with, and the ends its axes point to."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from oocpatch.planning.arguments import real_number
from oocpatch.planning.box import Box
from oocpatch.volumes.affine import EVEN, WORLD, orientation_of, spacing_along
from oocpatch.volumes.axes import Axes
from oocpatch.volumes.ome_metadata import METERS, long_unit
from oocpatch.volumes.resampling import EXACT, ORDERS, AxisMap, cropped, resampled
from oocpatch.volumes.volume import Volume

QUANTITY = re.compile(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*(.*)", re.IGNORECASE)

SAME_SPACING = 1e-3
"""Difference of spacings up to which a grid from the centre keeps the voxels of the volume, as MONAI does."""

Orders = int | Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ModelGrid:
    """A grid over the extent of a volume.

    Attributes:
        spacing: distance of voxels: one for all spatial axes, one per axis in their order, or a dict by their names; a
            number in the unit of the axis, or a text with a unit. Axes that a dict leaves out keep theirs.
        order: order of the splines along each axis, see `AxisMap`: one for all, or by their names.
        scores: the same, for scores that are resampled to the grid of the volume.
        orientation: the end of the world to which each axis of the patches points, such as `RAS`; None: as stored.
        separate: ratio of voxel sizes beyond which no value is interpolated along the one axis with the largest, in
            the volume or, if it is isotropic enough, on the grid; as nnU-Net treats thick slices.
        unit: unit of spacings that are numbers, along axes that have a unit of length; None: that of the axis.
        from_center: begin at the centre of the first voxel of the volume, at exactly the spacing, as MONAI does, and
            not at its edge.
    """

    spacing: Any = None
    order: Orders = 1
    scores: Orders = 1
    orientation: str | None = None
    separate: float = math.inf
    unit: str | None = None
    from_center: bool = False

    @classmethod
    def of(cls, value: Any, volume: Volume) -> ModelGrid | None:
        """Return the grid that an argument `spacing` names.

        Raises:
            TypeError, ValueError: if a spacing is none, or an axis is not spatial.
        """
        if value is None:
            return None
        grid = value if isinstance(value, ModelGrid) else cls(value)
        names = volume.names[-volume.spatial_ndim :]
        for orders in (grid.order, grid.scores):
            wrong = [o for o in (orders.values() if isinstance(orders, Mapping) else [orders]) if o not in ORDERS]
            if wrong:
                raise ValueError(f"the order of a spline must be one of {ORDERS}, got {wrong[0]!r}")
        if grid.orientation is not None:
            names = tuple(names[a] for a, _ in _turns(volume, grid.orientation))
        spacing: Any = {} if grid.spacing is None else grid.spacing
        if not isinstance(spacing, Mapping):
            is_one = isinstance(spacing, str) or not isinstance(spacing, Sequence | np.ndarray)
            values = [spacing] * len(names) if is_one else list(spacing)
            if len(values) != len(names):
                raise ValueError(f"spacing must have one value per spatial axis ({', '.join(names)}), got {spacing!r}")
            spacing = dict(zip(names, values, strict=True))
        if unknown := sorted(set(spacing) - set(names)):
            raise ValueError(f"spacing must name spatial axes ({', '.join(names)}), got {', '.join(unknown)}")
        sizes = {str(name): _quantity(size) for name, size in spacing.items()}
        for name, (size, unit) in sizes.items():
            own = spacing_along(volume.source, name)
            if unit is None and own is not None and own.unit in METERS:
                sizes[name] = size, grid.unit
        return replace(grid, spacing=sizes)

    def __str__(self) -> str:
        sizes = (f"{name} {size:g} {unit or ''}".strip() for name, (size, unit) in self.spacing.items())
        oriented = "" if self.orientation is None else f" in the orientation {self.orientation}"
        return f"takes voxels of {', '.join(sizes) or 'the volume'}{oriented}"

    def to_json(self) -> Any:
        """Return what identifies a run on the grid."""
        sizes = {name: size if unit is None else f"{size!r} {unit}" for name, (size, unit) in self.spacing.items()}
        is_plain = (self.order, self.scores, self.orientation, self.separate) == (1, 1, None, math.inf)
        values = sizes if is_plain else [sizes, self.order, self.scores, self.orientation, str(self.separate)]
        return [values, "from_center"] if self.from_center else values

    def over(
        self,
        volume: Volume,
        levels: Callable[[int], Volume] | None = None,
        limits: tuple[tuple[float, float], ...] = (),
    ) -> Volume:
        """Return a volume on the grid; the volume itself where that is its own.

        Args:
            volume: the volume, whose outer edges are those of the grid.
            levels: opens a coarser level by its number: the coarsest that is no coarser than the grid is read.
            limits: see `ResampledReader`.

        Raises:
            ValueError: if the volume has no evenly spaced coordinates along an axis with a spacing.
        """
        volume = volume if self.orientation is None else _oriented(volume, self.orientation)
        maps = [self._map(volume, a) for a in range(len(volume.shape))]
        chosen, own = volume, maps
        for level in () if levels is None or all(m.is_identity for m in maps) else _levels(levels):
            at_level = _at_level(volume, level, own)
            if at_level is None or level.source.shape == chosen.source.shape:  # files without levels
                break
            chosen, maps = Volume(level.source, volume.axes), at_level
        return resampled(chosen, maps, limits)

    def back(self, volume: Volume, crop: Box | None = None) -> dict[str, AxisMap]:
        """Return the voxels of a volume on this grid, by the names of its axes.

        With `crop`, the grid lies over this box of the volume, and voxels outside have no values.
        """
        if crop is not None:
            inner, maps = self.back(cropped(volume, crop)), {}
            for name, length, start, stop in zip(volume.names, volume.shape, crop.start, crop.stop, strict=True):
                shifted = replace(inner[name], size=length, offset=inner[name].offset - start * inner[name].scale)
                maps[name] = replace(shifted, inside=(start, stop)) if (start, stop) != (0, length) else shifted
            return maps
        oriented = volume if self.orientation is None else _oriented(volume, self.orientation)
        maps = {}
        for axis, (name, length) in enumerate(zip(oriented.names, oriented.shape, strict=True)):
            order = self.scores.get(name, 1) if isinstance(self.scores, Mapping) else self.scores
            order = 0 if name == self._coarsest(oriented, back=True) else order
            maps[name] = self._map(oriented, axis).reversed_to(length, order)
        return maps

    def box(self, box: Box, volume: Volume) -> Box:
        """Return the box on the grid that covers a box of a volume."""
        oriented = volume if self.orientation is None else _oriented(volume, self.orientation)
        spans = []
        for axis, name in enumerate(oriented.names):
            m, own = self._map(oriented, axis), volume.names.index(name)
            ends = sorted((end - 0.5 - m.offset) / m.scale for end in (box.start[own], box.stop[own]))
            span = math.floor(ends[0] + 0.5 + EXACT), math.ceil(ends[1] + 0.5 - EXACT)
            spans.append((max(0, span[0]), min(m.size, span[1])))
        return Box(*zip(*spans, strict=True))

    def turned(self, array: Volume, volume: Volume, places: Sequence[int | None]) -> Volume:
        """Return an array that lies over a volume, flipped along the axes that this grid flips.

        Args:
            array: the array, of any resolution, as `align` returns it.
            volume: the volume, as it is stored.
            places: per axis of the array, the number of the volume's axis.
        """
        looped, turns = len(volume.shape) - volume.spatial_ndim, _turns(volume, str(self.orientation))
        flipped = {looped + axis for axis, is_flipped in turns if is_flipped}
        maps = [
            AxisMap(n, order=0).after(-1, n - 1) if place in flipped else AxisMap(n)
            for n, place in zip(array.shape, places, strict=True)
        ]
        return resampled(array, maps)

    def _map(self, volume: Volume, axis: int) -> AxisMap:
        """Return the grid along an axis of a volume."""
        name, length = volume.names[axis], volume.shape[axis]
        is_flipped = False
        if self.orientation is not None and axis >= len(volume.shape) - volume.spatial_ndim:
            spatial = axis - (len(volume.shape) - volume.spatial_ndim)
            is_flipped = _turns(volume, self.orientation)[spatial][1]
        order = self.order.get(name, 1) if isinstance(self.order, Mapping) else self.order
        order = 0 if name == self._coarsest(volume) else order
        grid = AxisMap.over(length, length, order)
        if name in self.spacing and length > 1:  # one voxel has no distance to another
            asked, unit = self.spacing[name]
            own = spacing_along(volume.source, name)
            if own is None or own.step is None:
                raise ValueError(
                    f"spacing needs coordinates along {name}, which the volume does not have: pass an OME-Zarr, a file "
                    "with voxel sizes, or an xarray.DataArray with coordinates"
                )
            asked *= _factor(name, unit, own.unit)
            if not self.from_center:
                grid = AxisMap.over(length, max(1, round(length * abs(own.step) / asked)), order)
            elif abs(asked - abs(own.step)) > SAME_SPACING:
                scale = asked / abs(own.step)
                grid = AxisMap(round((length - 1) / scale + 1), scale, 0.0, order)
        return grid.after(-1, length - 1) if is_flipped else grid

    def _coarsest(self, volume: Volume, *, back: bool = False) -> str | None:
        """Return the axis that `separate` is about, if there is one; `back`: of resampling from the grid."""
        own, on_grid = {}, {}
        for name in volume.names[-volume.spatial_ndim :] if math.isfinite(self.separate) else ():
            along = spacing_along(volume.source, name)
            if along is None or along.step is None:
                continue
            asked, unit = self.spacing.get(name, (abs(along.step), None))
            own[name], on_grid[name] = abs(along.step), asked * _factor(name, unit, along.unit)
        for sizes in (on_grid, own) if back else (own, on_grid):
            coarsest = [name for name, size in sizes.items() if size == max(sizes.values())]
            if coarsest and max(sizes.values()) > self.separate * min(sizes.values()):
                return coarsest[0] if len(coarsest) == 1 else None
        return None


def _quantity(value: Any) -> tuple[float, str | None]:
    """Read a spacing as a number and its unit, if it has one.

    >>> _quantity("0.5um"), _quantity(2)
    ((0.5, 'micrometer'), (2.0, None))
    """
    if isinstance(value, tuple):
        return value
    number, unit = value, None
    if isinstance(value, str):
        match = QUANTITY.fullmatch(value)
        try:
            number, unit = float(match[1] if match else value), long_unit(match[2] if match else None)
        except ValueError:
            raise ValueError(f"spacing must be a number, or one with a unit such as '0.5um', got {value!r}") from None
    size = float(real_number("spacing", number))
    if not (size > 0 and math.isfinite(size)):
        raise ValueError(f"spacing must be positive and finite on every axis, got {value!r}")
    return size, unit


def _factor(name: str, unit: str | None, own: str | None) -> float:
    """Return how many units of an axis one of another unit is."""
    if unit is None or unit == own:
        return 1.0
    if own not in METERS or unit not in METERS:
        raise ValueError(
            f"spacing must be in the unit of axis {name}, {own or 'which has none'}, got {unit}; pass a number"
        )
    return float(f"1e{METERS[unit] - METERS[own]}")


def _levels(open_level: Callable[[int], Volume]) -> Iterator[Volume]:
    """Yield the coarser levels of a volume, as far as there are any."""
    for number in itertools.count(1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # which opening the volume gave
                level = open_level(number)
        except (ValueError, TypeError):
            return
        yield level


def _at_level(volume: Volume, level: Volume, maps: Sequence[AxisMap]) -> list[AxisMap] | None:
    """Return the grid along the axes of a coarser level; None if that is coarser than the grid."""
    if level.axes.names != volume.axes.names or level.channels != volume.channels:
        return None
    level = Volume(level.source, volume.axes)
    at_level = []
    for name, n, own_n, m in zip(volume.names, level.shape, volume.shape, maps, strict=True):
        first, other = (spacing_along(v.source, name) for v in (volume, level))
        if n == own_n:
            at_level.append(m)
            continue
        if not (first and other and first.step and other.step):
            return None
        ratio = first.step / other.step
        at_level.append(m.after(ratio, (first.start - other.start) / other.step))
        if abs(at_level[-1].scale) < 1 - EVEN:
            return None
    return at_level


def with_orientation(arguments: Mapping[str, Any], *, by_name: bool = False) -> dict[str, Any]:
    """Return arguments of a run whose `spacing` is a grid in the `orientation` that they name, if they name one.

    Raises:
        TypeError: if it is no text.
        ValueError: if the model knows axes by their names, whatever their order.

    >>> with_orientation({"orientation": "ras"})["spacing"].orientation
    'RAS'
    """
    code = arguments.get("orientation")
    if code is None:
        return dict(arguments)
    if not isinstance(code, str):
        raise TypeError(f"orientation must be a text such as 'RAS', got {code!r}")
    if by_name:
        raise ValueError(
            f"orientation must be None for a model package that knows axes by their names, got {code!r}; store the "
            "volume as those of the training were, such as with nibabel.as_closest_canonical"
        )
    spacing, code = arguments.get("spacing"), code.upper()
    grid = spacing if isinstance(spacing, ModelGrid) else ModelGrid(spacing)
    return {**arguments, "orientation": code, "spacing": replace(grid, orientation=code)}


def _turns(volume: Volume, orientation: str) -> list[tuple[int, bool]]:
    """Return, per axis of the patches, the spatial axis of the volume and whether it is flipped.

    Raises:
        ValueError: if the orientation is none, or the volume has no three spatial axes.
    """
    affine, names = volume.affine, volume.names[-volume.spatial_ndim :]
    if "affine" not in volume.source.attrs and sorted(names) == list(WORLD):  # rows are in the order of the axes
        affine = affine[[*np.argsort(names), -1]]
    own = orientation_of(affine)
    turns: list[tuple[int, bool]] = []
    for end in orientation:
        pair = next((pair for pair in ("LR", "PA", "IS") if end in pair), "")
        axis = next((a for a, code in enumerate(own) if code in pair), None)
        if axis is None or any(axis == taken for taken, _ in turns):
            raise ValueError(f"orientation must name an end of each axis, such as RAS, got {orientation!r}")
        turns.append((axis, own[axis] != end))
    if len(turns) != len(own):
        raise ValueError(f"orientation must name an end of each axis, such as RAS, got {orientation!r}")
    return turns


def _oriented(volume: Volume, orientation: str) -> Volume:
    """Return a volume with its spatial axes in the order of an orientation."""
    axes, looped = volume.axes, len(volume.shape) - volume.spatial_ndim
    order = axes.order[:looped] + tuple(axes.order[looped + a] for a, _ in _turns(volume, orientation))
    if order == axes.order:
        return volume
    return Volume(volume.source, Axes(axes.names, axes.roles, order, axes.is_default))
