"""Packed arrays: attributes by which CF conventions store other numbers than those that are meant.

`value = stored * scale_factor + add_offset`, and `_FillValue` and `missing_value` mark voxels without a value. What
xarray would decode is decoded by its own code, box by box: arrays with names of dimensions in a Zarr group, and
variables of HDF5 (netCDF-4) with dimension scales. For others these attributes have no agreed meaning.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import logging
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray
import zarr

from oocpatch.errors import error_line
from oocpatch.storage.paths import path_of

logger = logging.getLogger("oocpatch")

PACKING = ("scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned")
"""Attributes that change the numbers."""

DECODED = frozenset({*PACKING, "dtype", "calendar", "coordinates", "_ARRAY_DIMENSIONS", "_Encoding"})
"""Attributes that readers consume when they decode a variable."""

Selection = tuple[slice, ...]


def decoded(values: npt.NDArray[Any], attributes: Mapping[str, Any]) -> npt.NDArray[Any]:
    """Return values as xarray decodes them, times excepted.

    >>> decoded(np.array([1, 2, -1], np.int16), {"scale_factor": 0.5, "_FillValue": -1}).tolist()
    [0.5, 1.0, nan]
    """
    dims = tuple(f"axis{a}" for a in range(values.ndim))
    dataset = xarray.Dataset({"values": xarray.Variable(dims, values, dict(attributes))})
    return np.asarray(xarray.decode_cf(dataset, decode_times=False, decode_coords=False)["values"].values)


@dataclass(frozen=True)
class DecodedReader:
    """Reads selections of a packed array and decodes them; travels to other processes as its reader does."""

    load: Callable[[Selection], npt.NDArray[Any]]
    attributes: Mapping[str, Any]

    def __call__(self, selection: Selection) -> npt.NDArray[Any]:
        return decoded(self.load(selection), self.attributes)


def decoding(attributes: Mapping[str, Any], dtype: npt.DTypeLike, place: object) -> dict[str, Any]:
    """Return those attributes of a variable by which its values are decoded; none if its values are what they are.

    Raises:
        ValueError: if they cannot be decoded.
    """
    dtype = np.dtype(dtype)
    packing = {name: attributes[name] for name in PACKING if name in attributes}
    if attributes.get("dtype") == "bool" and dtype.kind in "iu":
        packing["dtype"] = "bool"
    if dtype.kind not in "iufb" or not packing:
        return {}
    try:
        numbers = [np.add(packing[name], 0.0) for name in PACKING[:4] if name in packing]  # raises for text
        is_masked = dtype.kind == "f" and not packing.keys() - {"_FillValue", "missing_value"}
        if is_masked and np.isnan(np.hstack(numbers)).all():
            return {}  # a voxel that is NaN has no value already
        decoded(np.zeros(1, dtype), packing)
    except Exception as error:
        raise ValueError(
            f"volume cannot be decoded: the attributes of {place}, {packing}, must be such as xarray applies "
            f"({error_line(error)}); mend them, or open it with xarray and pass the DataArray"
        ) from error
    return packing


def zarr_attributes(array: zarr.Array[Any], *, masks_fill: bool = True) -> dict[str, Any]:
    """Return the attributes of a Zarr array as xarray reads them.

    In Zarr 3 a fill value of floats is text in base64. In Zarr 2 it is the array's own (`masks_fill`); there a 0 of an
    array without other packing is no sign of absence, since every array has it that does not say otherwise.
    """
    attributes: dict[str, Any] = array.attrs.asdict()
    fill = attributes.get("_FillValue")
    if array.metadata.zarr_format == 3 and isinstance(fill, str) and array.dtype.kind == "f":
        with contextlib.suppress(ValueError, struct.error):  # it is refused as text
            attributes["_FillValue"] = struct.unpack("<d", base64.standard_b64decode(fill))[0]
    elif array.metadata.zarr_format == 2 and masks_fill:
        value = array.fill_value
        if value is not None and (value != 0 or any(name in attributes for name in PACKING)):
            attributes["_FillValue"] = value.item() if isinstance(value, np.generic) else value
    return attributes


def zarr_decoding(array: zarr.Array[Any], *, is_named: bool, is_image: bool = False) -> dict[str, Any] | None:
    """Return the attributes by which a Zarr array is decoded, as `xarray.open_zarr` does; None if that cannot open it.

    Args:
        array: the array.
        is_named: whether its dimensions have names.
        is_image: whether it is a level of an OME-Zarr, where fill values are no sign of absence.

    Raises:
        ValueError: if they cannot be decoded.
    """
    root = path_of(array.store)
    place = str(array.store_path if root is None else root / array.path)
    if is_named and _in_group(array):
        return decoding(zarr_attributes(array, masks_fill=not is_image), array.dtype, place)
    warn_if_packed(array.attrs.asdict(), array.dtype, place, "it is not in a group, or its dimensions have no names")
    return None


def warn_if_packed(attributes: Mapping[str, Any], dtype: npt.DTypeLike, place: str, reason: str) -> None:
    """Log that values are read as they are stored, if attributes of no agreed meaning would change them."""
    try:
        packing = decoding(attributes, dtype, place)
    except ValueError:
        packing = {name: attributes[name] for name in PACKING if name in attributes}
    if packing:
        logger.warning(
            "%s is read as it is stored, without applying %s, since xarray would not open it (%s); to apply them, "
            "pass an xarray.DataArray", place, ", ".join(packing), reason,
        )  # fmt: skip


def _in_group(array: zarr.Array[Any]) -> bool:
    """Return whether an array is a member of a Zarr group."""
    if array.path:
        store, path = array.store, array.path.rpartition("/")[0]
    elif (root := path_of(array.store)) is not None:
        store, path = root.parent.store(), ""
    else:
        return False
    try:
        zarr.open_group(store, path=path, mode="r", zarr_format=array.metadata.zarr_format, use_consolidated=False)
    except (OSError, KeyError, ValueError):
        return False
    return True


def decoded_coordinate(name: str, values: npt.NDArray[Any], attributes: Mapping[str, Any]) -> xarray.Variable:
    """Return a coordinate as xarray decodes it; one that cannot be decoded keeps its numbers, without a meaning.

    >>> decoded_coordinate("t", np.arange(2), {"units": "days since 2000-01-01"}).values[1].astype("datetime64[D]")
    np.datetime64('2000-01-02')
    """
    dataset = xarray.Dataset({name: xarray.Variable((name,), values, dict(attributes))})
    decode = functools.partial(xarray.decode_cf, dataset, decode_coords=False)
    for times in (True, False):
        try:
            variable = decode(decode_times=times)[name].variable.load()
        except Exception:  # noqa: BLE001, S112 - whatever the attributes hold, the voxels can be read
            continue
        return xarray.Variable((name,), variable.values, variable.attrs)
    return xarray.Variable((name,), values, {k: v for k, v in attributes.items() if k not in DECODED})
