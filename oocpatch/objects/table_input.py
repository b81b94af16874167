"""Inputs of a table: labels, an intensity over them, and their coordinates, checked before any voxel is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from oocpatch.planning.arguments import real_number
from oocpatch.volumes.alignment import align
from oocpatch.volumes.axes import Axes
from oocpatch.volumes.ome_metadata import long_unit
from oocpatch.volumes.volume import Volume

EVEN = 1e-3
"""Share of a voxel by which coordinates may differ from those at even distances: they may be stored as float32."""


@dataclass(frozen=True, slots=True)
class VoxelGrid:
    """Coordinates of the voxels of the spatial axes: `offset + scale * index`.

    Attributes:
        scale, offset: one per axis.
        units: unit per axis, empty where there is none.
        is_physical: whether any axis has coordinates.
    """

    scale: tuple[float, ...]
    offset: tuple[float, ...]
    units: tuple[str, ...]
    is_physical: bool

    @classmethod
    def of(cls, labels: Volume, spacing: Any = None) -> VoxelGrid:
        """Return the coordinates of a volume; with a spacing, those at its multiples instead.

        Raises:
            ValueError: when coordinates are not at even distances.
        """
        looped = len(labels.shape) - labels.spatial_ndim
        names, shape = labels.names[looped:], labels.shape[looped:]
        if spacing is not None:
            return cls(checked_spacing(spacing, names), (0.0,) * len(names), ("",) * len(names), True)
        axes = [_axis(name, labels.source.coords.get(name), n) for name, n in zip(names, shape, strict=True)]
        scales, offsets, units, has_coords = zip(*axes, strict=True)
        return cls(scales, offsets, units, any(has_coords))


def _axis(name: str, variable: Any, n: int) -> tuple[float, float, str, bool]:
    """Return scale, offset and unit of an axis, and whether it has coordinates."""
    if variable is None or variable.shape != (n,) or np.dtype(variable.dtype).kind not in "iuf":
        return 1.0, 0.0, "", False
    values = np.asarray(variable.values, np.float64)
    unit = long_unit(variable.attrs.get("units", variable.attrs.get("unit"))) or ""
    first = float(values[0])
    if n == 1:  # no distance is known
        return 1.0, first, unit, True
    step = float((values[-1] - values[0]) / (n - 1))
    if (
        not np.isfinite(values).all()
        or step == 0
        or np.abs(values - (first + step * np.arange(n))).max() > EVEN * abs(step)
    ):
        raise ValueError(
            f"labels must have coordinates at even distances along {name}, got {first:g}, {values[1]:g}, ... "
            f"{values[-1]:g}; pass the size of a voxel as spacing=, or drop the coordinates"
        )
    return step, first, unit, True


def checked_spacing(spacing: Any, names: Sequence[str]) -> tuple[float, ...]:
    """Return the size of a voxel per spatial axis, from one number for all, one per axis, or a dict by axis name.

    Raises:
        ValueError, TypeError: for anything else.

    >>> checked_spacing({"y": 0.5, "x": 0.25}, ("y", "x")), checked_spacing(2, ("y", "x"))
    ((0.5, 0.25), (2.0, 2.0))
    """
    values: Any = spacing
    if isinstance(spacing, Mapping):
        if set(spacing) != set(names):
            raise ValueError(
                f"spacing must name each spatial axis ({', '.join(names)}) and no other, got {dict(spacing)}"
            )
        values = [spacing[name] for name in names]
    elif isinstance(spacing, str) or not isinstance(spacing, Sequence | np.ndarray):
        values = [spacing] * len(names)
    if len(values) != len(names):
        raise ValueError(f"spacing must have one value per spatial axis ({', '.join(names)}), got {spacing!r}")
    sizes = tuple(float(real_number("spacing", value)) for value in values)
    if not all(0 < size < np.inf for size in sizes):
        raise ValueError(f"spacing must be positive and finite on every axis, got {spacing!r}")
    return sizes


def open_labels(labels: Any, axes: Any, level: int | str) -> Volume:
    """Open a volume of labels.

    Raises:
        ValueError: when its values are no integers.
    """
    volume = labels if isinstance(labels, Volume) and axes is None else _opened("labels", labels, axes, level)
    if volume.dtype.kind not in "bui":
        raise ValueError(
            f"labels must be integers, 0 where there is no object, got {volume.dtype}; label scores first with "
            "oocpatch.label(..., threshold=...)"
        )
    return volume


def open_intensity(intensity: Any, labels: Volume, level: int | str) -> Volume | None:
    """Open a volume of the extent and resolution of the labels, with its axes in their order.

    Raises:
        ValueError: when it is not that.
    """
    if intensity is None:
        return None
    has_levels = intensity is not None and not hasattr(intensity, "dtype")
    volume = (
        intensity
        if isinstance(intensity, Volume)
        else _opened("intensity", intensity, None, level if has_levels else 0)
    )
    aligned, _ = align("intensity", _named(volume, labels), labels)
    extra = len(aligned.shape) - len(labels.shape)
    if aligned.shape[extra:] != labels.shape:
        raise ValueError(
            f"intensity must have as many voxels as the labels on every axis, got {_sizes(aligned)} for labels of "
            f"{_sizes(labels)}"
        )
    return aligned


def _opened(name: str, value: Any, axes: Any, level: int | str) -> Volume:
    try:
        return Volume(value.source, axes, level) if isinstance(value, Volume) else Volume(value, axes, level)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from error


def _named(volume: Volume, labels: Volume) -> Volume:
    """Return an intensity whose axes nobody named with the names of the labels' axes, by role and order."""
    if not volume.axes.is_default:
        return volume
    if len(volume.source.shape) == len(labels.source.shape):  # an array like the labels
        return Volume(volume.source, replace(labels.axes, is_default=False))
    own = volume.axes
    if len(own.spatial) != labels.spatial_ndim:
        own = _with_channel(len(volume.source.shape), labels.spatial_ndim) or own
    names = list(own.names)
    for positions, of_labels in ((own.spatial, labels.axes.spatial), (own.looped, labels.axes.looped)):
        if len(positions) == len(of_labels):
            for position, other in zip(positions, of_labels, strict=True):
                names[position] = labels.axes.names[other]
    return Volume(volume.source, Axes(tuple(names), own.roles))


def _with_channel(ndim: int, spatial: int) -> Axes | None:
    """Return axes of a channel before spatial ones, if that is what a number of axes can mean."""
    names = ("c", *"wzyx"[4 - spatial :]) if spatial <= 4 and ndim == spatial + 1 else None
    return None if names is None else Axes(names)


def _sizes(volume: Volume) -> str:
    return ", ".join(f"{name}: {n}" for name, n in zip(volume.names, volume.shape, strict=True))


def checked_classes(classes: Any, volume: Volume) -> tuple[tuple[int, str, tuple[int, ...] | None], ...]:
    """Return value, name and colour of each class, from a dict of names, or of pairs of a name and a colour.

    None: the names that a model package gave a result, by its values.

    Raises:
        ValueError, TypeError: for anything else.

    >>> checked_classes({1: "Tumor", 2: ("Stroma", "#96c896")}, Volume(np.zeros((2, 2), np.uint8)))
    ((1, 'Tumor', None), (2, 'Stroma', (150, 200, 150)))
    """
    if classes is None:
        names = volume.source.attrs.get("classes") if volume.channels == 1 else None
        classes = dict(enumerate(map(str, names))) if isinstance(names, list | tuple) else {}
    elif volume.channels > 1:
        raise ValueError(f"classes must be None for values of several channels, got {volume.channels} channels")
    if not isinstance(classes, Mapping) or not all(isinstance(value, int) for value in classes):
        raise TypeError(f"classes must be a dict of names by whole numbers, such as {{1: 'Tumor'}}, got {classes!r}")
    return tuple((int(value), *_name_and_colour(given)) for value, given in classes.items())


def _name_and_colour(given: Any) -> tuple[str, tuple[int, ...] | None]:
    """Return the name of a class and its colour, if it has one."""
    if isinstance(given, str):
        return given, None
    try:
        name, colour = given
        red, green, blue = bytes.fromhex(colour.removeprefix("#")) if isinstance(colour, str) else bytes(colour)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"a class must be a name, or a pair of a name and a colour such as ('Stroma', '#96c896'), got {given!r}"
        ) from error
    return str(name), (red, green, blue)


def channel_names(volume: Volume | None) -> tuple[str, ...]:
    """Return the names of the channels of an intensity: those it has, else their numbers."""
    if volume is None:
        return ()
    numbers = tuple(map(str, range(volume.channels)))
    variable = volume.source.coords.get(volume.channel_axis or "")
    if variable is not None and variable.shape == (volume.channels,) and variable.dtype.kind in "iuOUT":
        names = tuple(map(str, np.asarray(variable.values).tolist()))
    else:
        names = tuple(volume.source.display or ())
    return names if len(set(names)) == volume.channels else numbers
