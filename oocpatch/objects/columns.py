"""Columns of a table of objects, from merged rows: names, units and dtypes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.objects.moments import RowLayout, Rows, covariances, variances

Array = npt.NDArray[Any]
Columns = dict[str, Array]

SHAPE_PROPERTIES = (
    *("area", "bbox", "centroid", "equivalent_diameter"),
    *("axis_major_length", "axis_minor_length", "orientation", "principal_axes"),
)
INTENSITY_PROPERTIES = ("mean", "min", "max", "std")
OF_AXES = frozenset(SHAPE_PROPERTIES[4:])
"""Properties that need products of coordinates."""


@dataclass(frozen=True)
class TableSchema:
    """The columns of a table of objects.

    Attributes:
        axes: names of the spatial axes.
        scale: voxel size per axis, negative where coordinates descend.
        offset: coordinate of the first voxel per axis.
        units: unit per axis, empty where there is none.
        is_physical: whether coordinates are others than the numbers of voxels.
        indices: names of the axes of more than one index that objects are apart on, such as time.
        properties: the columns that were asked for, by the names of properties.
        channels: names of the channels of the intensity; empty: there is none.
        label_dtype: dtype of the labels.
        intensity_dtype: dtype of the intensity.
        classes: value, name and colour of each class; of the labels, or of the intensity if there is one.
    """

    axes: tuple[str, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    units: tuple[str, ...]
    is_physical: bool
    indices: tuple[str, ...]
    properties: tuple[str, ...]
    channels: tuple[str, ...]
    label_dtype: str
    intensity_dtype: str
    wide: bool = False
    classes: tuple[Any, ...] = ()

    @property
    def layout(self) -> RowLayout:
        """Layout of the rows that the columns are made of."""
        products = bool(OF_AXES & set(self.properties))
        return RowLayout(
            len(self.axes), len(self.indices), products, len(self.channels), self.intensity_dtype, self.wide
        )

    @property
    def dtypes(self) -> dict[str, np.dtype[Any]]:
        """Dtype of each column, in order."""
        return {name: values.dtype for name, values in self.columns(*_no_rows(self.layout)).items()}

    @property
    def spatial(self) -> list[str]:
        """Names of the centroid's columns as x, y, z; by the names of the axes, else the last axis first."""
        known = [axis for axis in "xyz" if axis in self.axes]
        order = known if len(known) == len(self.axes) else self.axes[::-1]
        return [f"centroid_{axis}" for axis in order]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TableSchema:
        """Return the schema that JSON stored."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)

    def columns(self, merged: Rows, rows: Rows, starts: Array) -> Columns:
        """Return the columns of objects.

        Args:
            merged: a row per object.
            rows: the sorted rows that they were merged of.
            starts: the first of these of each object.
        """
        result: Columns = {"label": merged["label"].astype("u8" if self.label_dtype == "uint64" else "i8")}
        for number, name in enumerate(self.indices):
            result[name] = merged["index"][:, number].astype(np.int64)
        voxel = math.prod(map(abs, self.scale))
        area = merged["count"] * voxel if self.is_physical else merged["count"].astype(np.int64)
        of_axes = self._principal_axes(merged, rows, starts) if self.layout.products else {}
        for name in self.properties:
            if name == "area":
                result[name] = area
            elif name == "bbox":
                result |= self._boxes(merged)
            elif name == "centroid":
                result |= self._centroids(merged)
            elif name == "equivalent_diameter":
                result[name] = _ball_diameter(area, len(self.axes))
            elif name == "principal_axes":
                result |= {k: v for k, v in of_axes.items() if k[5].isdigit()}
            elif name in OF_AXES:
                result[name] = of_axes[name]
        if self.channels:
            result |= self._intensities(merged, rows, starts)
        return result

    def _centroids(self, merged: Rows) -> Columns:
        result: Columns = {}
        for number, (name, scale, offset) in enumerate(zip(self.axes, self.scale, self.offset, strict=True)):
            # One division of a whole number: the result does not depend on how the sum came about.
            total = merged["sums"][:, number] + merged["count"] * merged["start"][:, number]
            result[f"centroid_{name}"] = offset + scale * (total / merged["count"])
        return result

    def _boxes(self, merged: Rows) -> Columns:
        result: Columns = {}
        for number, name in enumerate(self.axes):
            result[f"bbox_{name}_start"] = merged["start"][:, number].astype(np.int64)
            result[f"bbox_{name}_stop"] = merged["stop"][:, number].astype(np.int64)
        return result

    def _principal_axes(self, merged: Rows, rows: Rows, starts: Array) -> Columns:
        """Return the axes of the solid ellipsoid with the covariances of an object, the longest first."""
        ndim = len(self.axes)
        matrix = np.empty((len(merged), ndim, ndim))
        values = covariances(merged, rows, starts, self.layout)
        for number, (a, b) in enumerate(self.layout.pairs):
            matrix[:, a, b] = matrix[:, b, a] = values[:, number] * self.scale[a] * self.scale[b]
        eigenvalues, vectors = np.linalg.eigh(matrix)
        lengths = 2 * np.sqrt((ndim + 2) * np.maximum(eigenvalues[:, ::-1], 0))  # its variance is r^2 / (n + 2)
        vectors = vectors[:, :, ::-1]
        # Of the two directions of an axis, the one whose first component that is not zero is positive.
        leading = np.take_along_axis(vectors, np.argmax(np.abs(vectors) > 1e-9, axis=1)[:, None, :], axis=1)
        vectors = vectors * np.where(leading < 0, -1.0, 1.0)
        result = {"axis_major_length": lengths[:, 0], "axis_minor_length": lengths[:, -1]}
        if ndim == 2:
            spread, tilt = matrix[:, 0, 0] - matrix[:, 1, 1], matrix[:, 0, 1]
            undecided = np.where(tilt > 0, np.pi / 4, -np.pi / 4)
            result["orientation"] = np.where(spread == 0, undecided, np.arctan2(2 * tilt, spread) / 2)
        if "principal_axes" in self.properties:
            for k in range(ndim):
                result[f"axis_{k + 1}_length"] = lengths[:, k]
                result |= {f"axis_{k + 1}_{name}": vectors[:, a, k] for a, name in enumerate(self.axes)}
        return result

    def _intensities(self, merged: Rows, rows: Rows, starts: Array) -> Columns:
        mean, variance = variances(merged, rows, starts, self.layout)
        values = {"mean": mean, "min": merged["min"], "max": merged["max"], "std": np.sqrt(variance)}
        asked = [name for name in INTENSITY_PROPERTIES if name in self.properties] or INTENSITY_PROPERTIES
        result: Columns = {}
        for number, channel in enumerate(self.channels):
            suffix = f"_{channel}" if len(self.channels) > 1 else ""
            result |= {f"{name}{suffix}": np.ascontiguousarray(values[name][:, number]) for name in asked}
        return result


def _no_rows(layout: RowLayout) -> tuple[Rows, Rows, Array]:
    return np.empty(0, layout.dtype), np.empty(0, layout.dtype), np.empty(0, np.int64)


def _ball_diameter(area: Array, ndim: int) -> Array:
    """Return the diameter of the ball of an area or volume.

    >>> _ball_diameter(np.array([np.pi]), 2).tolist()
    [2.0]
    """
    unit = math.pi ** (ndim / 2) / math.gamma(ndim / 2 + 1)
    return np.asarray(2 * (area / unit) ** (1 / ndim))


def checked_properties(properties: Any, ndim: int, *, has_intensity: bool) -> tuple[str, ...]:
    """Return checked names of properties.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if isinstance(properties, str) or not isinstance(properties, Sequence):
        raise TypeError(f"properties must be names such as ('area', 'centroid'), got {properties!r}")
    known = (*SHAPE_PROPERTIES, *INTENSITY_PROPERTIES)
    names = tuple(dict.fromkeys(name for name in properties if name != "label"))
    for name in names:
        if name not in known:
            raise ValueError(f"properties must be among {', '.join(known)}, got {name!r}")
        if name in INTENSITY_PROPERTIES and not has_intensity:
            raise ValueError(f"properties must not have {name!r} without an intensity; pass intensity=")
        if name == "orientation" and ndim != 2:
            raise ValueError(
                f"properties must not have 'orientation' for {ndim} spatial axes, since one angle is not enough; ask "
                "for 'principal_axes'"
            )
    return names
