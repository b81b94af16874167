"""Sources: a common view of each kind of array that a volume can come from.

A source knows shape, dtype, names, chunks, coordinates and attributes, and loads a selection. Data on disk has stored
units, whose tags show without reading that they have not changed. A source travels to other processes: data on disk by
its address, data in memory by value.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import xarray
import zarr
from zarr.storage import LocalStore

from oocpatch.errors import error_line
from oocpatch.planning.box import Box, worthwhile
from oocpatch.planning.memory import READ_BYTES
from oocpatch.storage.checksums import checksum
from oocpatch.storage.object_store import BUCKETS, WEB, installed, scheme_of
from oocpatch.storage.paths import LocalPath, ObjectPath, StoragePath, describe_error, local_or_url, path_of
from oocpatch.storage.unit_tags import StoredUnits, WholeFiles, units_of
from oocpatch.storage.zip_store import ArchiveStore, root_of, split_archive
from oocpatch.system import is_url
from oocpatch.volumes.axes import Axes
from oocpatch.volumes.cf_decoding import (
    DECODED,
    DecodedReader,
    decoded,
    decoded_coordinate,
    warn_if_packed,
    zarr_attributes,
    zarr_decoding,
)
from oocpatch.volumes.dask_blocks import check_declared, load_blocks, refuse_masked
from oocpatch.volumes.formats.spec import ALL_SUFFIXES, FileReader, FileSpec, open_file, parse_address
from oocpatch.volumes.ome_metadata import (
    Multiscale,
    channel_display,
    choose_multiscale,
    images_inside,
    read_multiscales,
)

PICTURES = ("png", "jpg", "jpeg", "bmp", "gif", "webp")
"""Endings of pictures that Pillow reads, and oocpatch does not."""

TAGGED = 4096
"""Stored units whose tags are read at a time."""


DISPLAY = "ome_display"
"""Entry in xarray's encoding of a level of an OME-Zarr, which passes `Source.display` on."""


@runtime_checkable
class ClosableReader(Protocol):
    """A reader of selections that holds files open: of a format, or of the volumes that its array is computed from."""

    def __call__(self, selection: tuple[slice, ...], /) -> npt.NDArray[Any]:
        """Read a selection."""
        ...

    def for_run(self, threads: int) -> ClosableReader:
        """Return the same reader with its files opened anew; see `Volume.for_run`."""
        ...

    def close(self) -> None:
        """Close its files."""
        ...


@dataclass(frozen=True)
class Source:
    """An array that a volume reads from.

    Attributes:
        shape, dtype, chunks: those of the array, with one entry per axis.
        load: reads a selection of slices as a numpy array.
        names: dimension names, if there are any.
        chunked: whether reading part of a chunk costs as much as the chunk.
        location: address of the array on the local file system or in an object store, if it has one.
        array: the Zarr array, if it is one.
        files: the local directory that contains only the chunks of this array, if there is one.
        units: the stored units of the array; None: its values alone show that it has changed.
        coords: coordinates of xarray, or from the scale and translation of an OME-Zarr.
        attrs: the user's attributes.
        roles: names that determine the roles of the axes, if `names` do not.
        image: metadata of an OME-Zarr, with the one level that this is.
        packing: attributes by which `load` decodes what the array or file stores; see `cf_decoding`.
        read_bytes: bytes that reading a chunk takes, of an array that is computed from another one.
        display: colours of an OME-Zarr's channels by their names, empty if it has none; None: another source.
    """

    shape: tuple[int, ...]
    dtype: Any
    chunks: tuple[int, ...]
    load: Callable[[tuple[slice, ...]], npt.NDArray[Any]]
    names: tuple[str | None, ...] | None = None
    chunked: bool = True
    location: StoragePath | None = None
    array: zarr.Array[Any] | None = None
    files: LocalPath | None = None
    units: StoredUnits | None = None
    coords: Mapping[str, Any] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    roles: tuple[str, ...] | None = None
    image: Multiscale | None = None
    packing: Mapping[str, Any] = field(default_factory=dict)
    read_bytes: int = 0
    display: Mapping[str, Mapping[str, Any]] | None = None

    def computed(self, load: Callable[[tuple[slice, ...]], npt.NDArray[Any]], **changes: Any) -> Source:
        """Return this source with values that are computed from it, and with other changes, as `replace` takes them.

        It is no stored array any more: neither the array, nor its files, nor how it is packed are those of the values.
        """
        return replace(self, load=load, array=None, files=None, packing={}, **changes)

    @property
    def fingerprint(self) -> str:
        """Digest of the content: of the tags of its stored units, or of all values where it has none."""
        whole, crc = Box.of_shape(self.shape), 0
        if self.units is not None:
            read_tags = self.units.reader()
            for box in whole.split(worthwhile(self.units.unit, self.shape, TAGGED * math.prod(self.units.unit))):
                crc = checksum(read_tags(box), crc)
        else:
            for box in whole.split(worthwhile(self.chunks, self.shape, READ_BYTES)) if self.chunked else [whole]:
                crc = checksum(self.load(box.slices()), crc)
        return f"{self.dtype} {'x'.join(map(str, self.shape))} {crc:08x}"

    def close(self) -> None:
        """Close the file of another format than Zarr, if it is open."""
        load = self.load.load if isinstance(self.load, DecodedReader) else self.load
        if isinstance(load, ClosableReader):
            load.close()

    def reopened(self, threads: int = 0) -> Source:
        """Return the source with its file opened anew: it may have been replaced. Threads: see `Volume.for_run`."""
        return replace(self, load=_reopened(self.load, threads))


def open_source(source: Any, level: int | str = 0) -> Source:
    """Open the array that a user passed.

    Args:
        source: a path, a URL or an array.
        level: level of a pyramid by its number; in an OME-Zarr also by its path.

    Raises:
        ValueError: if it cannot be read; the message names the address and what is there instead.
        TypeError: if it is not a path, a URL or an array.
    """
    if isinstance(level, bool) or not isinstance(level, (int, str)):
        raise TypeError(f"level must be an int or the path of a level, got {level!r}")
    level = int(level) if isinstance(level, str) and level.isdecimal() else level  # from the command line
    if isinstance(source, (str, os.PathLike)):
        address = local_or_url(source)
        if (spec := parse_address(address)) is not None:
            return _from_file(spec if level == 0 else parse_address(f"{address}::level={level}") or spec)
        source = open_zarr(address)
    if isinstance(source, zarr.Group):
        root = path_of(source.store)
        return _from_group(source, str(source.store_path if root is None else root / source.path), level)
    if level != 0 and not isinstance(source, xarray.DataTree):
        raise ValueError(f"level must be 0 unless the volume is an OME-Zarr or a file with levels, got {level!r}")
    return _from_zarr(source) if isinstance(source, zarr.Array) else _from_array(source, level)


def _from_array(source: Any, level: int | str) -> Source:
    """Return the source of an array of xarray, numpy, torch or dask."""
    if isinstance(source, xarray.DataTree | xarray.Dataset | xarray.DataArray):
        return _from_labelled(source, level)
    if isinstance(source, np.ndarray):
        return _from_numpy(refuse_masked(source))
    if type(source).__module__.partition(".")[0] == "torch" and hasattr(source, "detach"):
        return _from_numpy(_tensor_values(source))
    if hasattr(source, "dask") and hasattr(source, "chunksize"):
        return _from_dask(source)
    raise TypeError(
        "volume must be a path, a URL, a zarr.Array, an xarray.DataArray, a dask or a numpy array, or a torch.Tensor, "
        f"got {type(source).__name__}"
    )


def open_zarr(address: Path | str) -> zarr.Array[Any] | zarr.Group:
    """Open a Zarr array or group to read, in a directory, a zip file, or behind a URL.

    Raises:
        ValueError: if there is none; the message names the address and what it may be.
    """
    archive = split_archive(LocalPath(address)) if isinstance(address, Path) else None
    if archive is None and isinstance(address, Path) and not address.exists():
        raise ValueError(f"volume not found: {address} does not exist")
    if isinstance(address, str) and (scheme_of(address) in BUCKETS or (scheme_of(address) in WEB and installed())):
        return _in_object_store(ObjectPath.of(address))
    try:
        if archive is not None:
            store, inside = ArchiveStore(archive[0]), [root_of(archive[0]), archive[1]]
            return zarr.open(store, path="/".join(filter(None, inside)), mode="r")
        return zarr.open(address.absolute() if isinstance(address, Path) else address, mode="r")
    except Exception as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({error_line(error)})"
        raise ValueError(
            f"volume cannot be read: {address} must be a Zarr array or group{reason}, "
            f"or a file that ends in {ALL_SUFFIXES}{_advice(address)}"
        ) from error


def _advice(address: Any) -> str:
    """Return what to do with a picture of a format that is not read."""
    name = str(address).rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    if not dot or suffix.lower() not in PICTURES:
        return ""
    return (
        f"; make a TIFF of the picture: tifffile.imwrite('{stem}.tif', numpy.asarray(PIL.Image.open('{name}'))), or "
        "pass the array"
    )


def array_source(path: StoragePath, name: str) -> Source:
    """Return the source of an array of a Zarr group that oocpatch wrote."""
    return _from_zarr(zarr.open_array(path.store(), path=name, mode="r"))


def _in_object_store(path: ObjectPath) -> zarr.Array[Any] | zarr.Group:
    """Open the array or group at a URL to read."""
    is_bucket = scheme_of(path.url) in BUCKETS
    advice = "check the address, and AWS_ENDPOINT_URL if it is set" if is_bucket else "check the address"
    try:
        path.check_readable()
        return zarr.open(path.store(read_only=True), mode="r")
    except FileNotFoundError as error:
        problem = f"{path} holds no Zarr array or group"
        if is_bucket:
            try:
                problem = problem if any(path.list_files()) else f"nothing is at {path}"
            except OSError as cause:
                problem = describe_error(cause)
        raise ValueError(f"volume not found: {problem}; {advice}") from error
    except OSError as error:
        raise ValueError(f"volume cannot be read: {describe_error(error)}; {advice}") from error


def _from_file(spec: FileSpec) -> Source:
    """Return the source of an array in a file of another format, which each process opens for itself."""
    local = LocalPath(spec.address) if not is_url(spec.address) else None
    if local is not None and not local.exists():
        raise ValueError(f"volume not found: {local} does not exist")
    if local is None and spec.format not in ("n5", "precomputed"):
        raise ValueError(f"a volume behind a URL must be a Zarr, N5 or precomputed, got {spec.address}; copy the file")
    with contextlib.closing(open_file(spec)) as file:
        metadata = file.metadata
        files = tuple(sorted({os.path.abspath(path) for path in file.files()}))  # noqa: PTH100 - they are many
    address = str(local.resolve()) if local is not None else spec.address
    source = Source(
        shape=metadata.shape,
        dtype=metadata.dtype,
        chunks=metadata.chunks,
        names=metadata.names,
        load=FileReader(replace(spec, address=address)),  # a process with another working directory may open it
        units=WholeFiles(files, f"{spec.format}{replace(spec, address='')}", metadata.shape) if files else None,
        chunked=metadata.chunked,
        location=local.resolve() if local is not None else None,
        coords=metadata.coords,
        attrs=metadata.attrs,
    )
    if metadata.packing is None:
        warn_if_packed(metadata.attrs, metadata.dtype, str(spec), "its axes have no dimension scales")
    return _unpacked(source, metadata.packing)


def _from_group(group: zarr.Group, address: str, level: int | str) -> Source:
    """Return the source of a level of an OME-Zarr, else of the only array that is not a coordinate."""
    attributes: dict[str, Any] = dict(group.attrs)
    if multiscales := read_multiscales(attributes, address):
        return _from_ome(group, multiscales, address, level)
    images: list[str] | None = None
    try:
        arrays = dict(group.arrays())
    except Exception as error:
        images, arrays = images_inside(group), {}  # a web server lists nothing, but metadata may
        if not images:
            raise ValueError(f"volume cannot be read: {address} ({error_line(error)})") from error
    names = {n for a in arrays.values() for n in _dimension_names(a) or () if n}
    for node_attributes in (group.attrs, *(array.attrs for array in arrays.values())):
        names.update(str(node_attributes.asdict().get("coordinates", "")).split())
    candidates = {k: a for k, a in arrays.items() if k not in names}
    candidates = candidates if len(candidates) == 1 else {k: a for k, a in candidates.items() if a.ndim >= 2}
    if not candidates and (images := images or images_inside(group)):
        if len(images) == 1 and isinstance(image := _node(group, images[0]), zarr.Group):
            return _from_group(image, f"{address.rstrip('/')}/{images[0]}", level)
        listed = ", ".join(images[:12]) + (f" and {len(images) - 12} more" if len(images) > 12 else "")
        raise ValueError(
            f"volume must be one image, but {address} holds {len(images)}; pass the path of one of them, "
            f"such as {address.rstrip('/')}/{images[0]}: {listed}"
        )
    if len(candidates) != 1:
        advice = f"; pass the path of one of them: {', '.join(sorted(candidates))}" if candidates else ""
        raise ValueError(f"volume must be one array, but the group {address} holds {len(candidates)}{advice}")
    if level != 0:
        raise ValueError(
            f"level must be 0 unless the volume is an OME-Zarr or a file with levels, got {level!r} for {address}"
        )
    array = next(iter(candidates.values()))
    if not isinstance(_node(group, array.basename), zarr.Array):
        raise ValueError(f"volume cannot be read: {address} lists the array {array.basename!r}, which is missing")
    coords = {}
    for n, size in zip(_dimension_names(array) or (), array.shape, strict=False):
        if n in arrays and arrays[n].shape == (size,):
            coords[n] = decoded_coordinate(n, np.asarray(arrays[n][:]), zarr_attributes(arrays[n]))
    return _from_zarr(array, coords=coords)


def _from_ome(group: zarr.Group, multiscales: Sequence[Multiscale], address: str, level: int | str) -> Source:
    """Return the source of a level of an image; a group may have several images.

    Raises:
        ValueError: if there is no such level, or its array is missing; the message lists those that are there.
    """
    multiscale, level = choose_multiscale(multiscales, level, address)
    arrays = [_node(group, item.path) for item in multiscale.levels]
    sizes = [array.shape if isinstance(array, zarr.Array) else None for array in arrays]
    if not any(sizes):
        raise ValueError(f"OME-Zarr metadata of {address} list no level that is there: {multiscale.listed(sizes)}")
    chosen = multiscale.find(level, sizes, address)
    array = arrays[multiscale.levels.index(chosen)]
    axes = tuple(axis.name for axis in multiscale.axes)
    if not isinstance(array, zarr.Array):
        raise ValueError(
            f"level must be one that is there, but the array of level {level!r} of {address} is missing: "
            f"{multiscale.listed(sizes)}"
        )
    if axes and len(axes) != array.ndim:
        raise ValueError(
            f"OME-Zarr metadata of {address} must name one axis per dimension of its arrays, got {list(axes)}"
        )
    if not axes:  # metadata before 0.4
        return _from_zarr(array)
    coords, image = multiscale.coords(chosen, array.shape), replace(multiscale, levels=(chosen,))
    display, channel = channel_display(dict(group.attrs)), Axes(axes, multiscale.roles()).channel
    if channel is not None and len(display) == array.shape[channel]:
        coords[axes[channel]] = xarray.Variable((axes[channel],), list(display))
    return _from_zarr(array, names=axes, coords=coords, roles=multiscale.roles(), image=image, display=display)


def _node(group: zarr.Group, path: str) -> zarr.Array[Any] | zarr.Group | None:
    """Return a member of a group, or None if it is missing or cannot be read.

    It is opened by itself: consolidated metadata may list what is not there any more.
    """
    try:
        return zarr.open(group.store, path=f"{group.path}/{path}".strip("/"), mode="r", use_consolidated=False)
    except Exception:  # noqa: BLE001 - whatever is wrong with one member, the others can be read
        return None


def _dimension_names(array: zarr.Array[Any]) -> tuple[str | None, ...] | None:
    names: Any = getattr(array.metadata, "dimension_names", None)
    names = names or array.attrs.asdict().get("_ARRAY_DIMENSIONS")
    return tuple(names) if names else None


def _from_zarr(array: zarr.Array[Any], **others: Any) -> Source:
    """Return the source of a Zarr array; other fields replace those that the array has."""
    array = _current(array)
    root = path_of(array.store)
    location = (root / array.path).resolve() if root is not None else None
    units = units_of(array)
    if isinstance(array.store, ArchiveStore):
        location = LocalPath(array.store.path)
        units = WholeFiles((str(array.store.path),), array.path, array.shape)
    source = Source(
        shape=array.shape,
        dtype=array.dtype,
        chunks=array.chunks,
        names=_dimension_names(array),
        load=functools.partial(_load, array),
        units=units,
        location=location,
        array=array,
        files=location if isinstance(array.store, LocalStore) and isinstance(location, LocalPath) else None,
        attrs={k: v for k, v in array.attrs.asdict().items() if k not in {"_ARRAY_DIMENSIONS", "coordinates"}},
    )
    packing = zarr_decoding(array, is_named=bool(source.names), is_image="image" in others)
    return _unpacked(replace(source, **others), packing)


def _reopened(load: Callable[..., Any], threads: int) -> Callable[..., Any]:
    if isinstance(load, DecodedReader):
        return replace(load, load=_reopened(load.load, threads))
    return load.for_run(threads) if isinstance(load, ClosableReader) else load


def _unpacked(source: Source, packing: Mapping[str, Any] | None) -> Source:
    """Return a source whose values are decoded by the attributes in `packing`; None: attributes have no meaning."""
    if packing is None:
        return source
    source = replace(source, attrs={k: v for k, v in source.attrs.items() if k not in DECODED})
    if not packing:
        return source
    return replace(
        source,
        dtype=decoded(np.zeros(1, source.dtype), packing).dtype,
        load=DecodedReader(source.load, packing),
        packing=packing,
    )


def _current(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """Return an array by its own metadata and an absolute path.

    Consolidated metadata may be older than the array, and a relative path means another place in another working
    directory, where chunks that are not there count as the fill value.
    """
    store = array.store
    if isinstance(store, LocalStore) and not store.root.is_absolute():
        store = LocalStore(store.root.absolute(), read_only=True)
    mode: Any = "r" if store.read_only else "r+"  # another mode would make another store
    return zarr.open_array(store, path=array.path, mode=mode, zarr_format=array.metadata.zarr_format)


def _load(array: Any, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
    return np.asarray(array[selection])


def _from_labelled(data: xarray.DataTree | xarray.Dataset | xarray.DataArray, level: int | str) -> Source:
    """Return the source of an object of xarray that has one array, or one per level."""
    if isinstance(data, xarray.DataTree):
        return _from_tree(data, level)
    if isinstance(data, xarray.Dataset):
        if len(data.data_vars) != 1:
            raise ValueError(f"the dataset must hold one variable, got {list(data.data_vars)}; pass dataset[name]")
        data = next(iter(data.data_vars.values()))
    return _from_xarray(data)


def _from_tree(tree: xarray.DataTree, level: int | str) -> Source:
    """Return the source of a level of an image, whose levels are the children of a tree, or of its only variable."""
    nodes = {n: node for n, node in {"": tree, **tree.children}.items() if len(node.data_vars) == 1}
    names = list(nodes)
    is_pyramid = "" not in nodes and all(name.startswith("scale") for name in names)
    if not names or (len(names) > 1 and not is_pyramid):
        raise ValueError(
            f"the tree must have one variable, or one per level, got {list(tree.subtree_keys())}; pass one"
        )
    try:
        name = level if isinstance(level, str) else names[level]
        source = _from_labelled(nodes[name].to_dataset(), 0)
    except (KeyError, IndexError):
        raise ValueError(f"level must be one of {', '.join(names)}, or its number, got {level!r}") from None
    is_image = is_pyramid or "ome" in tree.attrs
    attributes = {str(k): v for k, v in tree.attrs.items()}
    return replace(source, display=channel_display(attributes)) if is_image and source.display is None else source


def _from_xarray(array: xarray.DataArray) -> Source:
    """Return the source of an array of xarray, whose data are dask's, lazily opened, or in memory."""
    if array.chunks is not None:
        data = _from_dask(array.data)
    elif array.encoding.keys() & {"source", "preferred_chunks"}:
        data = _from_lazy(array)
    else:
        data = _from_numpy(array.values)
    return replace(
        data,
        names=tuple(str(d) for d in array.dims),
        coords={str(k): v.variable for k, v in array.coords.items()},
        attrs=dict(array.attrs),
        display=array.encoding.get(DISPLAY),
    )


def _from_lazy(array: xarray.DataArray) -> Source:
    """Return the source of an array that xarray opened from a file without dask."""
    encoding = array.encoding
    chunks = encoding.get("preferred_chunks") or {}
    address = str(encoding.get("source", ""))
    return Source(
        shape=array.shape,
        dtype=array.dtype,
        chunks=tuple(int(chunks.get(d, n)) for d, n in zip(array.dims, array.shape, strict=True)),
        load=functools.partial(_load, array.variable),
        location=LocalPath(address).resolve() if address and not is_url(address) else None,
    )


def _from_numpy(array: npt.NDArray[Any]) -> Source:
    return Source(
        shape=array.shape,
        dtype=array.dtype,
        chunks=(1,) * array.ndim,
        load=functools.partial(_load, array),
        chunked=False,
    )


def _tensor_values(tensor: Any) -> npt.NDArray[Any]:
    """Return the values of a torch tensor, which are shared where they are in memory and numpy has the dtype.

    Raises:
        TypeError: if it is no dense tensor with values.
    """
    if "strided" not in str(tensor.layout) or tensor.is_quantized or tensor.is_meta:
        raise TypeError(f"a tensor must be dense and have values, got {tensor.layout} on {tensor.device}")
    tensor = tensor.detach().cpu().resolve_neg()
    try:
        return np.asarray(tensor.numpy())
    except TypeError:  # bfloat16 and float8, all of whose values float32 has
        return np.asarray(tensor.float().numpy())


def _from_dask(array: Any) -> Source:
    check_declared(array)
    return Source(
        shape=tuple(int(n) for n in array.shape),
        dtype=array.dtype,
        chunks=tuple(int(n) for n in array.chunksize),
        load=functools.partial(load_blocks, array),
    )
