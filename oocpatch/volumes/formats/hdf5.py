"""HDF5 by h5py: one dataset, with its dimension scales as coordinates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray

from oocpatch.volumes.cf_decoding import decoded_coordinate, decoding
from oocpatch.volumes.formats.hdf5_parts import Hdf5Parts, broken_link
from oocpatch.volumes.formats.spec import FileMetadata, FileSpec, UnreadableError, import_reader, to_json

CACHE = 1 << 20
"""Bytes of h5py's cache of chunks."""

SHOWN = 12
"""Datasets that a message lists at most."""

INTERNAL = frozenset(
    {"DIMENSION_LIST", "DIMENSION_LABELS", "REFERENCE_LIST", "CLASS", "NAME", "_Netcdf4Dimid", "_Netcdf4Coordinates"}
)
"""Attributes by which HDF5 and netCDF-4 store dimension scales."""


class Hdf5File:
    """A dataset of an HDF5 file: the named one, else the only one with at least two axes."""

    def __init__(self, spec: FileSpec) -> None:
        h5py = import_reader("h5py", "hdf5", spec)
        self._file = h5py.File(spec.address, "r", rdcc_nbytes=CACHE)
        try:
            self._data = data = _dataset(h5py, self._file, spec)
            self._parts = Hdf5Parts.of(h5py, data)
            labelled = [d.label or next(iter(d.keys()), "") for d in data.dims]
            names = tuple(str(n) for n in labelled) if all(labelled) else None
            self.metadata = FileMetadata(
                shape=data.shape,
                dtype=data.dtype,
                chunks=data.chunks or (1,) * data.ndim,
                names=names,
                coords=_coords(data, names or ()),
                attrs=_attrs(data),
                chunked=data.chunks is not None,
                packing=_packing(data, f"{spec.address}::{data.name}"),
            )
        except BaseException:
            self._file.close()
            raise

    def read(self, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Read the voxels of a selection."""
        values = np.asarray(self._data[selection])
        self._parts.check(selection, self._data.shape)
        return values

    def files(self) -> set[Path]:
        """Return the file, with those that hold the targets of links, virtual sources and external storage."""
        return {Path(self._file.filename), *self._parts.files}

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _dataset(h5py: Any, file: Any, spec: FileSpec) -> Any:
    """Return the named dataset, or the only one of numbers with at least two axes."""
    if spec.part and isinstance(named := file.get(spec.part), h5py.Dataset):
        return named
    datasets: dict[str, Any] = {}

    def collect(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.ndim >= 2 and node.dtype.kind in "buif":
            datasets[name] = node

    file.visititems(collect)
    links: list[str] = []
    if not datasets and not spec.part:
        file.visititems_links(lambda name, link: None if isinstance(link, h5py.HardLink) else links.append(name))
        for name in links:
            collect(name, file.get(name))
    if len(datasets) == 1 and not spec.part:
        return next(iter(datasets.values()))
    listed = ", ".join(f"{spec.address}::/{n} {d.shape}" for n, d in list(datasets.items())[:SHOWN])
    for name in [spec.part] if spec.part else [] if datasets else links:
        if message := broken_link(h5py, file, name):
            raise UnreadableError(f"volume cannot be read: in {spec.address}, {message}")
    problem = f"has no dataset {spec.part!r}" if spec.part else f"holds {len(datasets)} datasets"
    raise UnreadableError(f"volume must be one dataset, but {spec.address} {problem}; it has {listed or 'none'}")


def _coords(data: Any, names: tuple[str, ...]) -> dict[str, xarray.Variable]:
    """Return the dimension scales that have one value per voxel."""
    coords = {}
    for name, dimension, size in zip(names, data.dims, data.shape, strict=False):
        fitting = [s for s in dimension.values() if s.shape == (size,) and s.dtype.kind in "iuf"]
        for scale in fitting[:1]:
            coords[name] = decoded_coordinate(name, scale[:], _scalars(scale))
    return coords


def _scalars(node: Any) -> dict[str, Any]:
    """Return attributes with arrays of one value, as netCDF-4 stores numbers, as that value of numpy."""
    values = {k: np.asarray(v) for k, v in node.attrs.items() if k not in INTERNAL}
    return {
        str(k): v.reshape(())[()] if v.size == 1 and v.dtype.kind in "biuf" else to_json(v) for k, v in values.items()
    }


def _packing(data: Any, place: str) -> dict[str, Any] | None:
    """Return the attributes by which the dataset is decoded; only netCDF-4 says how: its axes have dimension scales."""
    is_variable = any(len(dimension) for dimension in data.dims)
    return decoding(_scalars(data), data.dtype, place) if is_variable else None


def _attrs(node: Any) -> dict[str, Any]:
    return {str(k): to_json(v) for k, v in node.attrs.items() if k not in INTERNAL}
