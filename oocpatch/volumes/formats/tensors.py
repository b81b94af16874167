"""N5 and Neuroglancer's precomputed by tensorstore, in directories and behind URLs, in C order."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray

from oocpatch.system import is_url
from oocpatch.volumes.formats.spec import FileMetadata, FileSpec, UnreadableError, import_reader
from oocpatch.volumes.ome_metadata import coordinate

DRIVERS = {"n5": "n5", "precomputed": "neuroglancer_precomputed"}


class TensorFile:
    """An array of an N5 container or a scale of a precomputed volume, `(z, y, x)` or `(c, z, y, x)`.

    Both formats store the fastest axis first; here it is last. A volume of one channel has no channel axis.
    """

    def __init__(self, spec: FileSpec) -> None:
        tensorstore = import_reader("tensorstore", "tensorstore", spec)
        url = f"{spec.address.rstrip('/')}/{spec.part.strip('/')}".rstrip("/") + "/"
        kvstore = url if is_url(spec.address) else {"driver": "file", "path": f"{Path(url).absolute().as_posix()}/"}
        description: dict[str, Any] = {"driver": DRIVERS[spec.format], "kvstore": kvstore}
        if spec.format == "precomputed":
            description["scale_index"] = spec.level
        try:
            store = tensorstore.open(description, read=True).result()
        except ValueError as error:
            reason = " ".join(str(error).partition("[")[0].split())[:200]  # locations in the source follow in brackets
            raise UnreadableError(f"volume cannot be read: {spec} ({reason}){_datasets(spec)}") from error
        self._directory = None if is_url(spec.address) else Path(url)
        origin, units, labels = store.domain.inclusive_min, store.dimension_units, store.domain.labels
        stored = store.spec(retain_context=False).to_json()
        store = store.T[tensorstore.d[:].translate_to[0]]
        names = tuple(label or "" for label in labels[::-1])
        steps = [(1.0, None) if u is None else (u.multiplier, u.base_unit) for u in units[::-1]]
        origins = list(zip(names, origin[::-1], steps, strict=True))
        chunks = tuple(store.chunk_layout.read_chunk.shape)
        if names[0] == "channel" and store.shape[0] == 1:
            store, names, origins, chunks = store[0], names[1:], origins[1:], chunks[1:]
        if self._directory is not None and spec.format == "precomputed":
            self._directory /= stored["scale_metadata"]["key"]
        self._store = store
        self.metadata = FileMetadata(
            shape=tuple(store.shape),
            dtype=store.dtype.numpy_dtype,
            chunks=tuple(min(c, n) for c, n in zip(chunks, store.shape, strict=True)),
            names=names if all(names) else None,
            coords=_coords(origins, tuple(store.shape)),
        )

    def read(self, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Read the voxels of a selection."""
        return np.asarray(self._store[selection].read().result())

    def files(self) -> list[Path]:
        """Return the files below the directory of the array, with its metadata."""
        if self._directory is None:
            return []
        return [Path(folder, name) for folder, _, names in os.walk(self._directory) for name in names]

    def close(self) -> None:
        """Do nothing: no file is held open."""


def _coords(
    origins: list[tuple[str, int, tuple[float, str | None]]], shape: tuple[int, ...]
) -> dict[str, xarray.Variable]:
    """Return the coordinates of axes that have an origin, a step or a unit."""
    coords = {}
    for (name, origin, (step, unit)), size in zip(origins, shape, strict=True):
        if name not in ("", "channel") and (origin, step, unit or None) != (0, 1.0, None):
            coords[name] = coordinate(name, size, step, origin * step, unit)
    return coords


def _datasets(spec: FileSpec) -> str:
    """List the arrays of a local N5 container for a message."""
    if is_url(spec.address) or spec.format != "n5":
        return ""
    root = Path(spec.address)
    files = [f for f in sorted(root.rglob("attributes.json")) if "dimensions" in json.loads(f.read_text())]
    datasets = [f"{root}::{file.parent.relative_to(root).as_posix()}" for file in files]
    return f"; it has {', '.join(datasets[:12])}" if datasets else ""
