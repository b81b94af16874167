"""Coordinates and attributes that an output inherits from its volume."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray
from zarr.errors import UnstableSpecificationWarning

from oocpatch.planning.arguments import of_head
from oocpatch.planning.grid import Scale
from oocpatch.planning.heads import Head
from oocpatch.planning.plan import Plan
from oocpatch.storage.paths import StoragePath
from oocpatch.volumes.cf_decoding import DECODED
from oocpatch.volumes.resampling import values_at
from oocpatch.volumes.volume import Volume

SHORT_LIVED = frozenset({"uncovered_voxels", "nonfinite_voxels", "complete"})
"""Attributes of a result that say how it came about."""

OF_VALUES = frozenset(
    {"flag_values", "flag_meanings", "flag_masks", "valid_range", "valid_min", "valid_max", "actual_range"}
    | {"fill_value", "nodata", "nodatavals", "_NCProperties"}
)
"""Attributes about the values of a volume, which are not those of an output."""

REFERENCES = frozenset(
    {"bounds", "grid_mapping", "climatology", "geometry", "node_coordinates", "node_count", "part_node_count"}
    | {"interior_ring", "cell_measures", "formula_terms", "ancillary_variables"}
)
"""Attributes that name other variables."""

DURATIONS = frozenset({"weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds", "nanoseconds"})
"""Units that xarray before 2025 decodes as durations."""


def write_coords(path: StoragePath, coords: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
    """Write coordinates into a group; `attributes` replace those of the group."""
    if not coords:
        return
    with warnings.catch_warnings():
        # Zarr v3 has no final specification of a dtype for text, and no other way to store it.
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        dataset = xarray.Dataset(coords=coords, attrs=attributes)
        dataset.to_zarr(path.store(), mode="a", consolidated=False, zarr_format=3)


def storable_coords(coords: Mapping[str, xarray.Variable]) -> dict[str, xarray.Variable]:
    """Return coordinates that can be stored, as they are read back: with their values, and attributes that describe.

    Numbers with units of time, such as `days since 2000-01-01`, are times that were not decoded yet: they keep units
    and calendar where a reader can decode them, else under other names. Objects that Zarr has no dtype for, and the
    tuples of a multi-index, are left out.
    """
    storable = {}
    for name, variable in coords.items():
        kind = np.dtype(variable.dtype).kind if isinstance(variable.dtype, np.dtype) else "O"
        values = variable.data if kind != "O" else np.asarray(variable.values)
        is_time = kind in "mM" or (kind == "O" and all(hasattr(v, "calendar") for v in values.flat))
        if kind not in "biufSUTmM" and not is_time and not all(isinstance(v, str) for v in values.flat):
            continue
        attributes = {k: v for k, v in json_values(variable.attrs).items() if k not in DECODED}
        if is_time:
            attributes.pop("units", None)
        elif _since(attributes):
            calendar = {"calendar": variable.attrs["calendar"]} if "calendar" in variable.attrs else {}
            encoded = {"units": attributes.pop("units"), **calendar}
            is_readable = kind in "iuf" and _is_decoded(values, encoded)
            attributes |= encoded if is_readable else {f"encoded_{k}": v for k, v in encoded.items()}
        storable[name] = xarray.Variable(variable.dims, values, attributes)
    return storable


def _since(attributes: Mapping[str, Any]) -> bool:
    """Return whether values of an array with these attributes are read as dates."""
    return "since" in str(attributes.get("units", ""))


def _is_decoded(values: npt.NDArray[Any], attributes: Mapping[str, Any]) -> bool:
    """Return whether xarray decodes the values of a coordinate as times."""
    variable = xarray.Variable([f"axis{a}" for a in range(np.ndim(values))], values, dict(attributes))
    try:
        xarray.decode_cf(xarray.Dataset({"values": variable}))["values"].load()
    except Exception:  # noqa: BLE001 - xarray raises many kinds
        return False
    return True


def json_values(attributes: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the attributes that JSON can store; NaN, infinities and times, which it cannot, are text.

    >>> json_values({"a": np.arange(2), "b": float("nan"), "c": object(), "d": np.datetime64("2024-10-02")})
    {'a': [0, 1], 'b': 'NaN', 'd': '2024-10-02'}
    """
    values = {}
    for key, value in attributes.items():
        with contextlib.suppress(TypeError, AttributeError, ValueError):  # what is stored has a method tolist
            text = json.dumps(value, default=_plain)
            values[str(key)] = json.loads(text, parse_constant=str)
    return values


def _plain(value: Any) -> Any:
    """Return an object of numpy, or a point in time, as Python's own."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return np.asarray(value).astype(str).tolist() if value.dtype.kind in "mM" else value.tolist()


def json_attributes(volume: Volume) -> dict[str, Any]:
    """Return the volume's attributes for an array with its values.

    Attributes that readers decode, and would change the values by, are listed in the attribute `input_encoding`.
    """
    attributes = json_values(volume.source.attrs)
    decoded = {k for k in attributes if k in DECODED or (k == "units" and _since(attributes))}
    described = {k: v for k, v in attributes.items() if k not in decoded | SHORT_LIVED | REFERENCES}
    encoding = {k: attributes[k] for k in sorted(decoded - {"_ARRAY_DIMENSIONS", "coordinates"})}
    return {**described, **({"input_encoding": encoding} if encoding else {})}


def head_attributes(volume: Volume, plan: Plan, head: Head) -> dict[str, Any]:
    """Return the volume's attributes that are true of an output: those that describe, not those about its values.

    Units are kept by outputs that may have them: neither labels nor results of a postprocess.
    """
    attributes = json_attributes(volume)
    is_quantity = not head.labels and of_head(plan.parameters.get("postprocess"), head.name, None) is None
    dropped = {*OF_VALUES, "input_encoding"}
    if not is_quantity or attributes.get("units") in DURATIONS:
        dropped.add("units")
    described = {k: v for k, v in attributes.items() if k not in dropped}
    if plan.classes and len(plan.heads) == 1 and (head.labels or head.out_channels == len(plan.classes)):
        described["classes"] = list(plan.classes)
    reference = volume.source.attrs.get("grid_mapping")
    return {**described, "grid_mapping": reference} if reference in volume.source.coords else described


def scaled_coords(volume: Volume, plan: Plan, head: Head) -> dict[str, Any]:
    """Return the coordinates of an output: those of the volume that fit, on scaled axes at the new centres."""
    scales = dict(zip(plan.axes, head.scale, strict=True))
    sizes = dict(zip(plan.axes, plan.shape, strict=True))
    if head.channel_axis is not None:
        sizes[head.channel_axis] = head.out_channels
    coords = {}
    for name, variable in storable_coords(volume.source.coords).items():
        if name == head.name or any(sizes.get(str(d)) != n for d, n in variable.sizes.items()):
            continue
        if any(scales.get(str(d), (1, 1)) != (1, 1) for d in variable.dims):
            if variable.ndim != 1 or variable.dtype.kind not in "iuf":
                continue
            axis = str(variable.dims[0])
            values = at_centres(np.asarray(variable.values, np.float64), scales[axis])
            coords[name] = xarray.Variable((axis,), values, variable.attrs)
            continue
        coords[name] = variable
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
    centres = (np.arange(-(-len(values) * times // per)) + 0.5) * per / times - 0.5
    return values_at(values, centres)
