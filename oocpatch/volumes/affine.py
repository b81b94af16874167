"""Affines: where voxels lie in the world, as square matrices of one row more than there are axes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.planning.box import Ints
from oocpatch.volumes.axes import Axes
from oocpatch.volumes.ome_metadata import long_unit
from oocpatch.volumes.sources import Source

Affine = npt.NDArray[np.float64]

WORLD = "xyz"
"""Axes of the affines of files."""

EVEN = 1e-3
"""Difference from an even spacing, as a part of a step, that is due to rounding."""

ENDS = ("LR", "PA", "IS")
"""Letters for the ends of the axes of the world."""


@dataclass(frozen=True, slots=True)
class Spacing:
    """Evenly spaced coordinates of an axis.

    Attributes:
        step: distance of adjacent voxels, negative where coordinates decrease; None: not known.
        start: coordinate of the first voxel.
        unit: name of the unit, if it has one.
    """

    step: float | None = None
    start: float = 0.0
    unit: str | None = None


def affine_of(source: Source, axes: Axes) -> Affine:
    """Return the affine of the spatial axes of an array, from its file's affine, else from evenly spaced coordinates.

    An affine among the attributes is that of the file that the array came from; its coordinates say which part it is.
    Axes without either have a spacing of 1 and begin at 0. Rows are x, y and z where a file has an affine, else in the
    order of the axes.

    >>> from oocpatch.volumes.volume import Volume
    >>> import xarray
    >>> array = xarray.DataArray(np.zeros((4, 5)), dims=("y", "x"), coords={"y": [3.0, 3.5, 4.0, 4.5]})
    >>> Volume(array).affine.tolist()
    [[0.5, 0.0, 3.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    names = [axes.names[a] for a in axes.order if a in axes.spatial]
    stored = np.asarray(source.attrs.get("affine", ()), np.float64)
    if stored.shape == (4, 4) and sorted(names) == list(WORLD):
        spacings: dict[str, Spacing | None] = dict.fromkeys(WORLD)
        with contextlib.suppress(ValueError):  # of uneven coordinates, which say nothing
            spacings = {name: spacing_along(source, name) for name in WORLD}
        moved = stored @ to_input(stored, spacings)
        return np.asarray(moved[:, [*(WORLD.index(name) for name in names), 3]], np.float64)
    affine = np.eye(len(names) + 1)
    for i, name in enumerate(names):
        spacing, origin = _even(source.coords.get(name))
        affine[i, i], affine[i, -1] = spacing, origin
    return affine


def axis_scales(affine: Affine) -> tuple[tuple[float, float], ...]:
    """Return step and start of the coordinates that a NIfTI with an affine has, per axis.

    They are positions in the world where the axes are those of the world, else multiples of the voxel size.

    >>> axis_scales(np.array([[0, -2, 0, 9], [3, 0, 0, 9], [0, 0, 1, 9], [0, 0, 0, 1.0]]))
    ((3.0, 0.0), (2.0, 0.0), (1.0, 0.0))
    """
    linear = affine[:3, :3]
    if np.allclose(linear, np.diag(np.diag(linear))):
        return tuple((float(linear[a, a]), float(affine[a, 3])) for a in range(3))
    return tuple((float(np.linalg.norm(linear[:, a])), 0.0) for a in range(3))


def to_input(affine: Affine, spacings: Mapping[str, Spacing | None]) -> Affine:
    """Return the affine from the voxels of a volume to those of the input whose affine it has, by its coordinates."""
    matrix = np.eye(4)
    for row, (axis, (step, start)) in enumerate(zip(spacings.values(), axis_scales(affine), strict=True)):
        if axis is None or not step:
            continue
        scale = 1.0 if axis.step is None else axis.step / step
        offset = (axis.start - start) / step
        # coordinates have the rounding of the file's float32: where it was the same grid, it is the same affine
        whole = round(offset)
        matrix[row, row] = math.copysign(1.0, scale) if abs(abs(scale) - 1) < EVEN / 10 else scale
        matrix[row, 3] = whole if abs(offset - whole) < EVEN * (1 + abs(offset) / 10) else offset
    return matrix


def shifted(affine: Affine, corner: Ints) -> Affine:
    """Return the affine of the part of a volume that begins at a corner.

    >>> shifted(np.diag([2.0, 3.0, 1.0]), (4, 5)).tolist()
    [[2.0, 0.0, 8.0], [0.0, 3.0, 15.0], [0.0, 0.0, 1.0]]
    """
    moved = affine.copy()
    moved[:-1, -1] += affine[:-1, :-1] @ np.asarray(corner, np.float64)
    return moved


def spacing_of(affine: Affine) -> tuple[float, ...]:
    """Return the distance of neighbouring voxels along each axis."""
    return tuple(float(d) for d in np.linalg.norm(affine[:-1, :-1], axis=0))


def orientation_of(affine: Affine) -> tuple[str, ...]:
    """Return the end of the world to which each of three axes points most: `R` or `L`, `A` or `P`, `S` or `I`.

    >>> orientation_of(np.array([[0, -2.0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    ('A', 'L', 'S')

    Raises:
        ValueError: for another number of axes.
    """
    if affine.shape != (4, 4):
        raise ValueError(f"an orientation needs three spatial axes, got {len(affine) - 1}")
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing_of(affine))
    directions = left @ right  # the rotation nearest to the affine, which may be sheared
    codes, taken = [""] * 3, np.zeros((3, 3))
    for _ in range(3):
        row, column = np.unravel_index(np.argmax(np.abs(directions) - taken), (3, 3))
        codes[column] = ENDS[row][int(directions[row, column] > 0)]
        taken[row], taken[:, column] = 9, 9
    return tuple(codes)


def spacing_along(source: Source, name: str) -> Spacing | None:
    """Return the spacing of an axis by its coordinate; None where it has none, or one that is no number.

    Raises:
        ValueError: if it is not evenly spaced.

    >>> import xarray
    >>> from oocpatch.volumes.sources import open_source
    >>> array = xarray.DataArray(np.zeros((2, 3)), {"x": [5.0, 4.5, 4.0]}, ("y", "x"))
    >>> spacing_along(open_source(array), "x")
    Spacing(step=-0.5, start=5.0, unit=None)
    """
    coordinate: Any = source.coords.get(name)
    if coordinate is None or coordinate.ndim > 1 or coordinate.size < 1:
        return None
    values, unit = np.atleast_1d(np.asarray(coordinate.values)), long_unit(coordinate.attrs.get("units"))
    if values.dtype.kind == "m" or (values.dtype.kind == "M" and len(values) > 1):
        values, unit = (values - values[0] if values.dtype.kind == "M" else values) / np.timedelta64(1, "s"), "second"
    if values.dtype.kind not in "iuf":
        return None
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"the coordinates of axis {name!r} must be finite, got {values.min()} to {values.max()}")
    if len(values) == 1:
        return Spacing(None, float(values[0]), unit)
    step = (values[-1] - values[0]) / (len(values) - 1)
    error = float(np.abs(values - (values[0] + step * np.arange(len(values)))).max())
    if step == 0 or error > EVEN * abs(step):
        raise ValueError(
            f"the coordinates of axis {name!r} must be evenly spaced, to have one distance, got "
            f"distances from {np.diff(values).min():g} to {np.diff(values).max():g}; drop the coordinate, or resample"
        )
    return Spacing(float(step), float(values[0]), unit)


def _even(coordinate: Any) -> tuple[float, float]:
    """Return step and start of a coordinate; 1 and 0 where it is none of evenly spaced numbers."""
    values = np.empty(0) if coordinate is None or coordinate.dtype.kind not in "iuf" else np.asarray(coordinate.values)
    if values.ndim != 1 or len(values) < 2:
        return 1.0, float(values.reshape(-1)[0]) if values.size == 1 else 0.0
    steps = np.diff(values.astype(np.float64))
    step = float(values[-1] - values[0]) / (len(values) - 1)
    is_even = step != 0 and bool(np.allclose(steps, step, rtol=1e-3, atol=0))
    return (round(step, 12), float(values[0])) if is_even else (1.0, 0.0)
