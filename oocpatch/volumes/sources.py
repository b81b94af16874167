"""Sources: one small view of each kind of array that a volume can come from.

A source knows shape, dtype, names, chunks, coordinates, attributes and a fingerprint, and loads a selection. The
fingerprint of data on disk comes from its address and metadata, that of data in memory from its bytes. A source travels
to other processes: data on disk by its address, data in memory by value.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray
import zarr

from oocpatch.storage.checksums import checksum
from oocpatch.storage.object_store import BUCKETS, WEB, installed, scheme_of
from oocpatch.storage.paths import Address, ObjectPath, address_of, describe_error, local_or_url, store_at
from oocpatch.volumes.formats.opening import FileReader, read_metadata
from oocpatch.volumes.formats.spec import SUFFIXES, FileSpec, parse_address
from oocpatch.volumes.ome_metadata import Multiscale, images_inside, read_multiscale

ENCODING_ATTRIBUTES = frozenset({"_FillValue", "scale_factor", "add_offset", "_ARRAY_DIMENSIONS", "coordinates"})


@dataclass(frozen=True)
class Source:
    """An array somewhere.

    Attributes:
        shape, dtype, chunks: as the array has them, one entry per axis.
        names: dimension names, if there are any.
        load: reads a selection of slices as a numpy array.
        compute_fingerprint: makes the digest that says two sources are the same; data in memory is read for it.
        chunked: whether reading part of a chunk costs as much as the chunk.
        location: where the array lies on the local file system or in an object store, if it does.
        array: the Zarr array, where it is one.
        files: the local directory that holds this array's chunks and nothing else, if there is one.
        coords: coordinates of xarray, or of an OME-Zarr's scale and translation.
        attrs: the user's attributes.
        roles: names that tell what the axes are for, where `names` may not.
        image: what an OME-Zarr says of it, with the one level that this is.
    """

    shape: tuple[int, ...]
    dtype: Any
    chunks: tuple[int, ...]
    names: tuple[str | None, ...] | None
    load: Callable[[tuple[slice, ...]], npt.NDArray[Any]]
    compute_fingerprint: Callable[[], str]
    chunked: bool = True
    location: Address | None = None
    array: zarr.Array[Any] | None = None
    files: Path | None = None
    coords: Mapping[str, Any] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    roles: tuple[str, ...] | None = None
    image: Multiscale | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest that says two sources are the same."""
        return self.compute_fingerprint()


def open_source(source: Any, level: int | str = 0) -> Source:
    """The source behind what a user gave.

    Args:
        source: a path, a URL or an array.
        level: which level of a pyramid, by its number; in an OME-Zarr also by its path.

    Raises:
        ValueError: when nothing can be read there, with the address and what was found instead.
        TypeError: when it is no kind of array.
    """
    if isinstance(level, bool) or not isinstance(level, (int, str)):
        raise TypeError(f"level must be an int or the path of a level, got {level!r}")
    level = int(level) if isinstance(level, str) and level.isdecimal() else level  # as the command line gives it
    if isinstance(source, (str, os.PathLike)):
        address = local_or_url(source)
        if (spec := parse_address(address)) is not None:
            return _from_file(spec if level == 0 else parse_address(f"{address}::level={level}") or spec)
        source = _at(address)
    if isinstance(source, zarr.Group):
        return _from_group(source, _address(source), level)
    if level != 0:
        raise ValueError(f"level must be 0 where the volume is an array and no OME-Zarr with levels, got {level!r}")
    if isinstance(source, zarr.Array):
        return _from_zarr(source)
    if isinstance(source, xarray.Dataset):
        if len(source.data_vars) != 1:
            raise ValueError(f"the dataset must hold one variable, got {list(source.data_vars)}; pass dataset[name]")
        source = next(iter(source.data_vars.values()))
    if isinstance(source, xarray.DataArray):
        return _from_xarray(source)
    if isinstance(source, np.ndarray):
        return _from_numpy(source)
    if hasattr(source, "dask") and hasattr(source, "chunksize"):
        return _from_dask(source)
    raise TypeError(
        "volume must be a path, a URL, a zarr.Array, an xarray.DataArray, a dask or a numpy array, "
        f"got {type(source).__name__}"
    )


def _at(address: Path | str) -> zarr.Array[Any] | zarr.Group:
    if isinstance(address, Path) and not address.exists():
        raise ValueError(f"volume not found: {address} does not exist")
    if isinstance(address, str) and (scheme_of(address) in BUCKETS or (scheme_of(address) in WEB and installed())):
        return _in_object_store(ObjectPath.of(address))
    try:
        return zarr.open(address, mode="r")
    except Exception as error:
        why = "" if isinstance(error, FileNotFoundError) else f" ({type(error).__name__}: {_line(error)})"
        raise ValueError(
            f"volume cannot be read: {address} must be a Zarr array or group{why}, "
            f"or a file that ends in {', '.join(e for endings in SUFFIXES.values() for e in endings)}"
        ) from error


def _in_object_store(path: ObjectPath) -> zarr.Array[Any] | zarr.Group:
    """The array or group at a URL, to read only."""
    buckets = scheme_of(path.url) in BUCKETS
    where = "check the address, and AWS_ENDPOINT_URL if it is set" if buckets else "check the address"
    try:
        path.check_readable()
        return zarr.open(store_at(path, read_only=True), mode="r")
    except FileNotFoundError as error:
        told = f"{path} holds no Zarr array or group"
        if buckets:
            try:
                told = told if any(path.files()) else f"nothing is at {path}"
            except OSError as cause:
                told = describe_error(cause)
        raise ValueError(f"volume not found: {told}; {where}") from error
    except OSError as error:
        raise ValueError(f"volume cannot be read: {describe_error(error)}; {where}") from error


def _address(group: zarr.Group) -> str:
    """Where a group lies, as a user would write it."""
    place = address_of(group.store)
    return str(group.store_path) if place is None else str(place / group.path)


def _from_file(spec: FileSpec) -> Source:
    """An array in a file of another format, opened anew wherever it is read."""
    local = Path(spec.address) if "://" not in spec.address else None
    if local is not None and not local.exists():
        raise ValueError(f"volume not found: {local} does not exist")
    if local is None and spec.format not in ("n5", "precomputed"):
        raise ValueError(f"a volume behind a URL must be a Zarr, N5 or precomputed, got {spec.address}; copy the file")
    metadata = read_metadata(spec)
    place = str(local.resolve()) if local is not None else spec.address
    content = {
        "address": place,
        "part": spec.part,
        "shape": metadata.shape,
        "dtype": str(metadata.dtype),
        **metadata.content,
    }
    return Source(
        shape=metadata.shape,
        dtype=metadata.dtype,
        chunks=metadata.chunks,
        names=metadata.names,
        load=FileReader(replace(spec, address=place)),  # it may be opened by a process that is elsewhere
        compute_fingerprint=functools.partial(_digest, content),
        chunked=metadata.chunked,
        location=local.resolve() if local is not None else None,
        coords=metadata.coords,
        attrs=metadata.attrs,
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _from_group(group: zarr.Group, address: str, level: int | str) -> Source:
    """A level of an OME-Zarr, else the only array that is not a coordinate."""
    attributes: dict[str, Any] = dict(group.attrs)
    if (multiscale := read_multiscale(attributes, address)) is not None:
        return _from_ome(group, multiscale, address, level)
    try:
        arrays = dict(group.arrays())
    except Exception as error:
        raise ValueError(f"volume cannot be read: {address} ({type(error).__name__}: {_line(error)})") from error
    names = {n for a in arrays.values() for n in _dimension_names(a) or () if n}
    found = {k: a for k, a in arrays.items() if k not in names}
    found = found if len(found) == 1 else {k: a for k, a in found.items() if a.ndim >= 2}
    if not found and (images := images_inside(group)):
        told = ", ".join(images[:12]) + (f" and {len(images) - 12} more" if len(images) > 12 else "")
        raise ValueError(
            f"volume must be one image, but {address} holds {len(images)}; pass the path of one of them, "
            f"such as {address.rstrip('/')}/{images[0]}: {told}"
        )
    if len(found) != 1:
        hint = f"; pass the path of one of them: {', '.join(sorted(found))}" if found else ""
        raise ValueError(f"volume must be one array, but the group {address} holds {len(found)}{hint}")
    if level != 0:
        raise ValueError(f"level must be 0 where the volume is no OME-Zarr with levels, got {level!r} for {address}")
    array = next(iter(found.values()))
    coords = {}
    for n, size in zip(_dimension_names(array) or (), array.shape, strict=False):
        if n in arrays and arrays[n].shape == (size,):
            coords[n] = xarray.Variable((n,), np.asarray(arrays[n][:]), _user_attributes(arrays[n]))
    return _from_zarr(array, coords=coords)


def _from_ome(group: zarr.Group, multiscale: Multiscale, address: str, level: int | str) -> Source:
    try:
        arrays = [group[found.path] for found in multiscale.levels]
        shapes = [array.shape for array in arrays if isinstance(array, zarr.Array)]
    except Exception as error:
        raise ValueError(f"OME-Zarr metadata of {address} cannot be read: {_line(error)}") from error
    axes = tuple(axis.name for axis in multiscale.axes)
    if len(shapes) != len(arrays) or any(axes and len(axes) != len(shape) for shape in shapes):
        raise ValueError(
            f"OME-Zarr metadata of {address} must name one axis per dimension of its arrays, got {list(axes)}"
        )
    chosen = multiscale.find(level, shapes, address)
    array = arrays[multiscale.levels.index(chosen)]
    assert isinstance(array, zarr.Array)
    if not axes:  # metadata before 0.4
        return _from_zarr(array)
    source = _from_zarr(array, names=axes, coords=multiscale.coords(chosen, array.shape))
    return replace(source, roles=multiscale.roles(), image=replace(multiscale, levels=(chosen,)))


def _dimension_names(array: zarr.Array[Any]) -> tuple[str | None, ...] | None:
    names: Any = getattr(array.metadata, "dimension_names", None)
    names = names or array.attrs.asdict().get("_ARRAY_DIMENSIONS")
    return tuple(names) if names else None


def _from_zarr(
    array: zarr.Array[Any],
    names: tuple[str | None, ...] | None = None,
    coords: Mapping[str, Any] | None = None,
) -> Source:
    place = address_of(array.store)
    location = place / array.path if place is not None else None
    location = location.resolve() if isinstance(location, Path) else location
    return Source(
        shape=array.shape,
        dtype=array.dtype,
        chunks=array.chunks,
        names=names or _dimension_names(array),
        load=functools.partial(_load, array),
        compute_fingerprint=functools.partial(_zarr_fingerprint, array, str(location or array.store_path)),
        location=location,
        array=array,
        files=location if isinstance(location, Path) else None,
        coords=coords or {},
        attrs=_user_attributes(array),
    )


def _user_attributes(array: zarr.Array[Any]) -> dict[str, Any]:
    """Attributes without those by which xarray says how it stored the values; it refuses to write them again."""
    return {k: v for k, v in array.attrs.asdict().items() if k not in ENCODING_ATTRIBUTES}


def _load(array: Any, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
    return np.asarray(array[selection])


def _zarr_fingerprint(array: zarr.Array[Any], address: str) -> str:
    metadata = array.metadata.to_dict()
    metadata.pop("attributes", None)
    return _digest({"address": address, "metadata": json.loads(json.dumps(metadata, default=str))})


def _from_xarray(array: xarray.DataArray) -> Source:
    if array.chunks is not None:
        inner = _from_dask(array.data)
    elif array.encoding.keys() & {"source", "preferred_chunks"}:
        inner = _from_lazy(array)
    else:
        inner = _from_numpy(array.values)
    return Source(
        shape=inner.shape,
        dtype=inner.dtype,
        chunks=inner.chunks,
        names=tuple(str(d) for d in array.dims),
        load=inner.load,
        compute_fingerprint=inner.compute_fingerprint,
        chunked=inner.chunked,
        location=inner.location,
        coords={str(k): v.variable for k, v in array.coords.items()},
        attrs=dict(array.attrs),
    )


def _from_lazy(array: xarray.DataArray) -> Source:
    """An array of xarray's own lazy indexing, opened from a file without dask."""
    encoding = array.encoding
    chunks = encoding.get("preferred_chunks") or {}
    address = str(encoding.get("source", ""))
    content = {"source": address, "name": str(array.name), "shape": array.shape, "dtype": str(array.dtype)}
    return Source(
        shape=array.shape,
        dtype=array.dtype,
        chunks=tuple(int(chunks.get(d, n)) for d, n in zip(array.dims, array.shape, strict=True)),
        names=None,
        load=functools.partial(_load_lazy, array.variable),
        compute_fingerprint=functools.partial(_digest, content),
        location=Path(address).resolve() if address and "://" not in address else None,
    )


def _load_lazy(variable: xarray.Variable, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
    return np.asarray(variable[selection].values)


def _from_numpy(array: npt.NDArray[Any]) -> Source:
    return Source(
        shape=array.shape,
        dtype=array.dtype,
        chunks=(1,) * array.ndim,
        names=None,
        load=functools.partial(_load, array),
        compute_fingerprint=functools.partial(_numpy_fingerprint, array),
        chunked=False,
    )


def _numpy_fingerprint(array: npt.NDArray[Any]) -> str:
    return _digest({"shape": array.shape, "dtype": str(array.dtype), "content": _content(array)})


def _content(array: npt.NDArray[Any]) -> Any:
    """A digest of an array in memory; a memory map is on disk, and known by its file."""
    if isinstance(array, np.memmap) and array.filename is not None:
        status = Path(array.filename).stat()
        return [str(array.filename), int(array.offset), status.st_size, status.st_mtime_ns]
    crc = 0
    for part in array:  # one slice at a time: a copy of a non-contiguous array would double its memory
        crc = checksum(part, crc)
    return crc


def _from_dask(array: Any) -> Source:
    content = {"dask": str(array.name), "shape": [int(n) for n in array.shape]}
    return Source(
        shape=tuple(int(n) for n in array.shape),
        dtype=array.dtype,
        chunks=tuple(int(n) for n in array.chunksize),
        names=None,
        load=functools.partial(_load_dask, array),
        compute_fingerprint=functools.partial(_digest, content),
    )


def _load_dask(array: Any, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
    return np.asarray(array[selection].compute(scheduler="synchronous"))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:20]
