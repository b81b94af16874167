"""HDF5 by h5py: one dataset, with its dimension scales as coordinates."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray

from oocpatch.volumes.formats.spec import FileMetadata, FileSpec, UnreadableError, file_digest, require_extra, to_json

CACHE = 1 << 20
"""Bytes of chunks that the library keeps."""

SHOWN = 12
"""Datasets that a message names."""

INTERNAL = frozenset({"DIMENSION_LIST", "DIMENSION_LABELS", "REFERENCE_LIST", "CLASS", "NAME"})
"""Attributes by which the library keeps its dimension scales."""


class Hdf5File:
    """A dataset of an HDF5 file: the one that is named, else the only one with two axes or more."""

    def __init__(self, spec: FileSpec) -> None:
        with require_extra("hdf5", spec):
            h5py: Any = importlib.import_module("h5py")
        self._file = h5py.File(spec.address, "r", rdcc_nbytes=CACHE)
        try:
            self._data = _dataset(h5py, self._file, spec)
            data = self._data
            labels = [d.label for d in data.dims]
            names = [label or next(iter(d.keys()), "") for label, d in zip(labels, data.dims, strict=True)]
            told = tuple(str(n) for n in names) if all(names) else None
            self.metadata = FileMetadata(
                shape=data.shape,
                dtype=data.dtype,
                chunks=data.chunks or (1,) * data.ndim,
                names=told,
                coords=_coords(data, told or ()),
                attrs={str(k): to_json(v) for k, v in data.attrs.items() if k not in INTERNAL},
                chunked=data.chunks is not None,
                content={"dataset": data.name, **file_digest(Path(spec.address))},
            )
        except BaseException:
            self._file.close()
            raise

    def read(self, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        """The voxels of a selection."""
        return np.asarray(self._data[selection])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _dataset(h5py: Any, file: Any, spec: FileSpec) -> Any:
    if spec.part:
        found = file.get(spec.part)
        if isinstance(found, h5py.Dataset):
            return found
    datasets: dict[str, Any] = {}

    def look(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.ndim >= 2 and node.dtype.kind in "buif":
            datasets[name] = node

    file.visititems(look)
    if len(datasets) == 1 and not spec.part:
        return next(iter(datasets.values()))
    told = ", ".join(f"{spec.address}::/{n} {d.shape}" for n, d in list(datasets.items())[:SHOWN])
    asked = f"has no dataset {spec.part!r}" if spec.part else f"holds {len(datasets)} datasets"
    raise UnreadableError(f"volume must be one dataset, but {spec.address} {asked}; it has {told or 'none'}")


def _coords(data: Any, names: tuple[str, ...]) -> dict[str, xarray.Variable]:
    """Dimension scales that have a value per voxel."""
    found = {}
    for name, dimension, size in zip(names, data.dims, data.shape, strict=False):
        for scale in dimension.values():
            if scale.shape == (size,) and scale.dtype.kind in "iuf":
                attrs = {str(k): to_json(v) for k, v in scale.attrs.items() if k not in INTERNAL}
                found[name] = xarray.Variable((name,), scale[:], attrs)
                break
    return found
