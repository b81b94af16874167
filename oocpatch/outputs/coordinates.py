"""Coordinates and attributes that an output inherits from its volume."""

from __future__ import annotations

import contextlib
import json
import operator
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray
from zarr.errors import UnstableSpecificationWarning

from oocpatch.planning.grid import Scale
from oocpatch.planning.heads import Head
from oocpatch.planning.plan import Plan
from oocpatch.storage.paths import StoragePath
from oocpatch.volumes.volume import Volume


def write_coords(path: StoragePath, coords: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
    """Write coordinates into a group; `attributes` replace those of the group."""
    if not coords:
        return
    with warnings.catch_warnings():
        # Zarr v3 has no final specification of a dtype for text, and no other way to store it.
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        dataset = xarray.Dataset(coords=coords, attrs=attributes)
        dataset.to_zarr(path.store(), mode="a", consolidated=False, zarr_format=3)


def json_attributes(volume: Volume) -> dict[str, Any]:
    """Return the volume's attributes that JSON can store."""
    attributes = {}
    for key, value in volume.source.attrs.items():
        with contextlib.suppress(TypeError, AttributeError):  # arrays and numbers of numpy have a method tolist
            attributes[str(key)] = json.loads(json.dumps(value, default=operator.methodcaller("tolist")))
    return attributes


def scaled_coords(volume: Volume, plan: Plan, head: Head) -> dict[str, Any]:
    """Return the coordinates of an output: those of the volume that fit, on scaled axes at the new centres."""
    scales = dict(zip(plan.axes, head.scale, strict=True))
    sizes = dict(zip(plan.axes, plan.shape, strict=True))
    if head.channel_axis is not None:
        sizes[head.channel_axis] = head.out_channels
    coords = {}
    for name, variable in volume.source.coords.items():
        if name == head.name or any(sizes.get(str(d)) != n for d, n in variable.sizes.items()):
            continue
        if any(scales.get(str(d), (1, 1)) != (1, 1) for d in variable.dims):
            if variable.ndim != 1 or variable.dtype.kind not in "iuf":
                continue
            axis = str(variable.dims[0])
            values = at_centres(np.asarray(variable.values, np.float64), scales[axis])
            coords[name] = xarray.Variable((axis,), values, variable.attrs)
            continue
        coords[name] = variable.copy(deep=False)
        coords[name].encoding = {}
    for axis, scale in scales.items():
        if scale != (1, 1) and axis not in coords:  # in voxels of the volume, so that heads can be overlaid
            coords[axis] = xarray.Variable((axis,), at_centres(np.arange(sizes[axis], dtype=np.float64), scale))
    return coords


def at_centres(values: npt.NDArray[np.float64], scale: Scale) -> npt.NDArray[np.float64]:
    """Return the coordinates of the centres of an output's voxels from those of the volume's voxels.

    Voxel `j` covers `[j, j + 1) / scale` in voxel edges, so that its centre lies at `(j + 1/2) / scale - 1/2`.

    >>> at_centres(np.array([0.0, 10.0, 20.0, 30.0]), (1, 2)).tolist()
    [5.0, 25.0]
    """
    times, per = scale
    n = len(values)
    centres = (np.arange(-(-n * times // per)) + 0.5) * per / times - 0.5
    if n == 1:
        return np.full(len(centres), values[0])
    low = np.clip(np.floor(centres).astype(int), 0, n - 2)  # extrapolate beyond the ends
    return np.asarray(values[low] + (centres - low) * (values[low + 1] - values[low]))
