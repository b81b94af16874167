"""Place of a volume's voxels as an affine or as sizes, from its coordinates and the affine of its input.

An input's `affine` belongs to the voxels of that input. The coordinates of its axes, which outputs, crops and flips
have as well, say which voxel of the input each voxel was.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from oocpatch.volumes.affine import Affine, Spacing, spacing_along, to_input
from oocpatch.volumes.ome_metadata import METERS
from oocpatch.volumes.volume import Volume

SECONDS = {
    "nanosecond": 1e-9,
    "microsecond": 1e-6,
    "millisecond": 1e-3,
    "second": 1.0,
    "minute": 60.0,
    "hour": 3600.0,
    "day": 86400.0,
}
"""Units of time, by their names in OME-Zarr."""


def spatial_axes(volume: Volume) -> dict[str, str]:
    """Return the names of the volume's spatial axes by `x`, `y` and `z`: by these names, else the last one is `x`.

    Raises:
        ValueError: if there are fewer than two or more than three.

    >>> spatial_axes(Volume(np.zeros((2, 3, 4)), ("depth", "height", "width")))
    {'x': 'width', 'y': 'height', 'z': 'depth'}
    """
    own = volume.axes
    names = [own.names[a] for a in own.spatial]
    if not 2 <= len(names) <= 3:
        raise ValueError(
            f"export writes volumes of two or three spatial axes, with channel and time, got {', '.join(names)}"
        )
    by_role = {own.roles[a]: own.names[a] for a in own.spatial}
    if by_role.keys() <= set("xyz") and {"x", "y"} <= by_role.keys():
        return {role: by_role[role] for role in sorted(by_role)}
    return dict(zip("xyz", reversed(names), strict=False))


def time_spacing(volume: Volume) -> Spacing | None:
    """Return the spacing of the axis of time, if the volume has one with even steps; uneven ones are warned about."""
    names = [volume.axes.names[a] for a in volume.axes.looped]
    if not names:
        return None
    try:
        return spacing_along(volume.source, names[0])
    except ValueError as error:
        warnings.warn(f"times are not written: {error}", stacklevel=2)
        return None


def affine_of(volume: Volume) -> tuple[Affine, str | None]:
    """Return the affine from voxel indices `(x, y, z)` to the world, and the unit of the world.

    Raises:
        ValueError: if coordinates are not evenly spaced.

    >>> import xarray
    >>> array = xarray.DataArray(np.zeros((3, 2)), {"x": [5.0, 4.5], "y": [0.0, 2.0, 4.0]}, ("y", "x"))
    >>> affine_of(Volume(array))[0].diagonal().tolist()
    [-0.5, 2.0, 1.0, 1.0]
    """
    axes = spatial_axes(volume)
    spacings = {role: spacing_along(volume.source, axes.get(role, role)) for role in "xyz"}
    source_affine = input_affine(volume.source.attrs) if axes.keys() <= set(axes.values()) else None
    units = [s.unit for s in spacings.values() if s is not None and s.unit]
    unit = next((u for u in units if u in METERS), units[0] if units else None)
    if source_affine is not None:
        return source_affine @ to_input(source_affine, spacings), unit
    affine = np.eye(4)
    for row, axis in enumerate(spacings.values()):
        if axis is not None:
            factor = factor_of(axis.unit, unit)
            affine[row, row] = factor * (1.0 if axis.step is None else axis.step)
            affine[row, 3] = factor * axis.start
    return affine, unit


def input_affine(attrs: Mapping[str, Any]) -> Affine | None:
    """Return the affine among the attributes of a volume, that of the NIfTI it came from, or None."""
    try:
        affine = np.asarray(attrs.get("affine"), np.float64)
    except (TypeError, ValueError):
        return None
    is_affine = affine.shape == (4, 4) and np.isfinite(affine).all() and abs(np.linalg.det(affine)) > 0
    return affine if is_affine else None


def factor_of(unit: str | None, target: str | None) -> float:
    """Return how many of the target unit one of another unit is; 1 where they cannot be compared.

    >>> factor_of("micrometer", "millimeter"), factor_of("minute", "second"), factor_of(None, "second")
    (0.001, 60.0, 1.0)
    """
    if unit in METERS and target in METERS:
        return float(f"1e{METERS[unit] - METERS[target]}")
    if unit in SECONDS and target in SECONDS:
        return SECONDS[unit] / SECONDS[target]
    return 1.0
