"""Alignment: arrays lie over each other by the names of their axes, and by coordinates where both have them.

```text
 volume (z, y, x)     array (x, y, c=1, z)    axes of the array in the volume's order: z, y, x; c has one voxel
```

Axes match by name or role, whatever the case. An array without names is laid over a volume by position. Coordinates,
in a common unit, must describe the same extent: otherwise voxels would be taken for others.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray

from oocpatch.planning.box import Ints
from oocpatch.volumes.axes import CHANNEL_NAMES, LOOP_NAMES, Axes
from oocpatch.volumes.ome_metadata import METERS, long_unit
from oocpatch.volumes.resampling import stored_volume
from oocpatch.volumes.stack import StackReader
from oocpatch.volumes.volume import Volume

NEAR = 0.5 * (1 + 1e-6)
"""Share of a voxel by which positions may differ."""

AFFINE = 4
"""Rows and columns of an affine."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The place of an array over a volume.

    Attributes:
        axes: per axis of the array, the number of the volume's axis; None for one of length 1 that the volume lacks.
        extent: per axis, the voxels of the volume that the array covers; they may be more or less than it has.
    """

    axes: tuple[int | None, ...]
    extent: Ints


def align(name: str, array: Volume, volume: Volume) -> tuple[Volume, Placement]:
    """Return an array of any resolution with its axes in the order of a volume's, and its placement.

    Args:
        name: name of the parameter or the volume, for messages.
        array: the array; it needs all spatial axes of the volume, and may have others of length 1.
        volume: the volume that it lies over.

    Raises:
        ValueError: if they do not match; the message names the axes of both.
    """
    order, axes = _by_position(name, array, volume) if array.axes.is_default else _by_name(name, array, volume)
    aligned = Volume(array.source, replace(axes, sequence=tuple(a for a, _ in order)))
    extent = []
    for a, b in order:
        own, n = array.source.shape[a], 1 if b is None else volume.shape[b]
        axis_name = axes.names[a]
        if own > n and not _is_resampled(volume):  # a volume on another grid may be coarser than what it is made of
            raise ValueError(
                f"{name} must not have more voxels than the volume on any axis, got {own} for {n} along {axis_name}"
            )
        is_looped = b is not None and b < len(volume.shape) - volume.spatial_ndim
        if is_looped and own not in {1, n}:
            raise ValueError(f"{name} must have 1 or {n} indices along {axis_name}, as the volume, got {own}")
        coords = array.source.coords.get(axis_name), None if b is None else volume.source.coords.get(volume.names[b])
        extent.append(n if array.axes.is_default else _extent(name, axis_name, coords, own, n))
    _check_affines(name, aligned, volume)
    return aligned, Placement(tuple(b for _, b in order), tuple(extent))


def _is_resampled(volume: Volume) -> bool:
    load = volume.source.load
    parts = load.volumes if isinstance(load, StackReader) else (volume,)
    return any(stored_volume(part) is not part for part in parts)


def _listed(volume: Volume) -> str:
    axes = zip(volume.axes.names, volume.source.shape, strict=True)
    return "(" + ", ".join(f"{name}: {n}" for name, n in axes) + ")"


def _keys(axes: Axes) -> list[set[str]]:
    """Return the names by which each axis is known: its name and its role; time and channels are known as such."""
    keys = []
    for name, role in zip(axes.names, axes.roles, strict=True):
        known = {name.lower(), role}
        known |= {"c"} if role in CHANNEL_NAMES else set()
        known |= {"t"} if role in LOOP_NAMES and len(axes.looped) == 1 else set()
        keys.append(known)
    return keys


def _by_name(name: str, array: Volume, volume: Volume) -> tuple[list[tuple[int, int | None]], Axes]:
    """Match axes by name: pairs of an axis of the array and one of the volume, in the volume's order."""
    keys, own_keys = _keys(volume.axes), _keys(array.axes)
    pairs: list[tuple[int, int | None]] = []
    for b, position in enumerate(volume.axes.order):
        matching = [a for a, known in enumerate(own_keys) if known & keys[position]]
        exact = [a for a in matching if array.axes.names[a].lower() == volume.axes.names[position].lower()]
        pairs += [(a, b) for a in (exact or matching)[:1]]
    extra = [a for a in range(len(own_keys)) if a not in {a for a, _ in pairs} and a != array.axes.channel]
    looped = len(volume.shape) - volume.spatial_ndim
    is_whole = len([b for _, b in pairs if b is not None and b >= looped]) == volume.spatial_ndim
    if volume.axes.is_default and not is_whole:  # names that nobody gave are no reason to refuse
        extra = [a for a in extra if a not in array.axes.spatial]
        pairs = [(a, b) for a, b in pairs if b is not None and b < looped]
        pairs += [(a, looped + i) for i, a in enumerate(array.axes.spatial)]
        is_whole = len(array.axes.spatial) == volume.spatial_ndim
    is_turned = volume.axes.is_default and [a for a, _ in pairs] != sorted(a for a, _ in pairs)
    if not is_whole or is_turned or any(array.source.shape[a] != 1 for a in extra):
        unnamed = ", whose axes have no names, so that these are assumed" if volume.axes.is_default else ""
        raise ValueError(
            f"{name} must have the spatial axes of the volume by name, and others of length 1 only, got "
            f"{_listed(array)} for the volume {_listed(volume)}{unnamed}; rename the axes of one of them, for example "
            f"oocpatch.Volume({name}, axes=...)"
        )
    return sorted(
        [*pairs, *((a, None) for a in extra)], key=lambda pair: -1 if pair[1] is None else pair[1]
    ), array.axes


def _by_position(name: str, array: Volume, volume: Volume) -> tuple[list[tuple[int, int | None]], Axes]:
    """Match the axes of an array without names by position: with all axes of the volume, or its spatial ones."""
    shape, channel = array.source.shape, volume.axes.channel
    if len(shape) == len(volume.source.shape) and channel is not None and shape[channel] == 1:
        axes = volume.axes
        return [(a, b) for b, a in enumerate(axes.order)], Axes(axes.names, axes.roles)
    for first in (0, len(volume.shape) - volume.spatial_ndim):
        names = volume.names[first:]
        if len(shape) == len(names):
            roles = tuple(volume.axes.roles[a] for a in volume.axes.order[first:])
            return [(a, first + a) for a in range(len(names))], Axes(names, roles)
    spatial = ", ".join(volume.names[-volume.spatial_ndim :])
    raise ValueError(f"{name} must have the volume's spatial axes ({spatial}), at any resolution, got shape {shape}")


def _extent(name: str, axis: str, coords: Sequence[xarray.Variable | None], own: int, n: int) -> int:
    """Return the voxels of the volume that an array covers along an axis, by the coordinates of both.

    The first voxels must share an edge, or a centre, as those of levels that keep every other voxel do.

    Raises:
        ValueError: if the coordinates describe another extent.
    """
    of_array, of_volume = coords
    if of_array is None or of_volume is None or of_array.shape != (own,) or of_volume.shape != (n,):
        return n
    b, a = np.asarray(of_array.values), np.asarray(of_volume.values)
    if a.dtype.kind not in "iuf" or b.dtype.kind not in "iuf":
        if own == n and not (a.dtype.kind == b.dtype.kind and np.array_equal(a, b)):
            raise ValueError(f"{name} must have the coordinates of the volume along {axis}, got others")
        return n
    a, b = a.astype(np.float64), b.astype(np.float64)
    units = [long_unit(v.attrs.get("units", v.attrs.get("unit"))) for v in (of_array, of_volume)]
    if None not in units and units[0] != units[1]:
        if not set(units) <= METERS.keys():
            raise ValueError(f"{name} must have the units of the volume along {axis}, got {units[0]} for {units[1]}")
        b = b * 10.0 ** (METERS[str(units[0])] - METERS[str(units[1])])
    step = (a[-1] - a[0]) / (n - 1) if n > 1 else 0.0
    near = NEAR * abs(step) if step else 1e-6 * max(1.0, abs(a[0]))
    if own == n:
        covered = n if np.abs(a - b).max() <= near else 0
    elif own == 1:
        covered = n if a.min() - near <= b[0] <= a.max() + near else 0
    else:
        longer = (b[-1] - b[0]) / (own - 1)
        shares_edge = abs((b[0] - longer / 2) - (a[0] - step / 2)) <= near
        difference = abs(longer * own - step * n)
        is_over = (
            longer * step > 0 and (shares_edge or abs(b[0] - a[0]) <= near) and difference < abs(longer) * 0.999999
        )
        covered = 0 if not is_over else n if difference <= near else max(1, round(longer * own / step))
    if not covered:
        unit = f" {units[1]}" if units[1] else ""
        raise ValueError(
            f"{name} must lie over the volume, but its coordinates along {axis} go from {b[0]:g} to {b[-1]:g}{unit}, "
            f"and those of the volume from {a[0]:g} to {a[-1]:g}{unit}; mend them, flip or crop it, or pass an array "
            "without coordinates"
        )
    return covered


def _check_affines(name: str, array: Volume, volume: Volume) -> None:
    """Refuse an array of the volume's resolution whose affine puts it elsewhere: coordinates cannot say all of it.

    Raises:
        ValueError: in that case.
    """
    affines: list[Any] = []
    for source in (array, volume):
        has_axes = set("xyz") <= set(source.names)
        affine = np.asarray(source.source.attrs.get("affine", ()), np.float64) if has_axes else np.empty(0)
        if affine.shape != (AFFINE, AFFINE):
            return
        affines.append((affine, [source.shape[source.names.index(axis)] for axis in "xyz"]))
    (own, sizes), (of_volume, shape) = affines
    if sizes != shape:
        return
    corners = np.array([(*corner, 1.0) for corner in itertools.product(*((0, n - 1) for n in shape))]).T
    distances = np.linalg.norm(((own - of_volume) @ corners)[:3], axis=0)
    if distances.max() > NEAR * np.linalg.norm(of_volume[:3, :3], axis=0).max():
        raise ValueError(
            f"{name} must lie over the volume, but its affine puts it up to {distances.max():g} away from it; resample "
            "it, or pass an array without an affine"
        )
