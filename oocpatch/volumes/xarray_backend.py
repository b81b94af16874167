"""`xarray.open_datatree(path, engine="oocpatch")`: any OME-Zarr image as a tree, a node per level, with coordinates.

xarray's own engine needs coordinate arrays. Most OME-Zarrs have none: their groups hold arrays `0`, `1`, ... and their
scales are in the metadata, of NGFF 0.4 (Zarr 2) or 0.5 (Zarr 3).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xarray
import zarr
from xarray.backends import BackendArray, BackendEntrypoint

# Not in the list of xarray's public API, but its guide "How to add a new backend" has backends use it.
from xarray.core import indexing

from oocpatch.storage.paths import local_or_url
from oocpatch.volumes.ome_metadata import read_multiscales
from oocpatch.volumes.sources import DISPLAY, Source, open_source, open_zarr


class LazyLevel(BackendArray):  # type: ignore[misc,unused-ignore] # xarray exports it without a type
    """A level that is read when its values are needed."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.shape = source.shape
        self.dtype = np.dtype(source.dtype)

    def __getitem__(self, key: Any) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self.source.load)


class OmeZarrBackend(BackendEntrypoint):
    """Backend for OME-Zarr images: `open_datatree` opens all levels, `open_dataset` one of them."""

    description = "Open OME-Zarr images (NGFF 0.4 to 0.6), with coordinates from their scales"
    open_dataset_parameters = ("filename_or_obj", "drop_variables", "level")
    supports_groups = True

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Return False: xarray's own engine opens Zarr unless the user asks for this one."""
        del filename_or_obj
        return False

    def open_dataset(
        self, filename_or_obj: Any, *, drop_variables: str | Iterable[str] | None = None, level: int | str = 0
    ) -> xarray.Dataset:
        """Open one level as the variable `image`."""
        source = open_source(filename_or_obj, level)
        names = [str(name) for name in source.names or (f"dim_{a}" for a in range(len(source.shape)))]
        variable = xarray.Variable(names, indexing.LazilyIndexedArray(LazyLevel(source)), dict(source.attrs))
        chunks = source.array.shards or source.chunks if source.array is not None else source.chunks
        variable.encoding["preferred_chunks"] = dict(zip(names, chunks, strict=True))
        variable.encoding["source"] = str(source.location or filename_or_obj)
        if source.display is not None:
            variable.encoding[DISPLAY] = source.display
        dataset = xarray.Dataset({"image": variable}, coords=dict(source.coords))
        dropped = [drop_variables] if isinstance(drop_variables, str) else list(drop_variables or ())
        return dataset.drop_vars(dropped, errors="ignore")

    def open_datatree(
        self, filename_or_obj: Any, *, drop_variables: str | Iterable[str] | None = None
    ) -> xarray.DataTree:
        """Open all levels as nodes `scale0`, `scale1`, ..."""
        return xarray.DataTree.from_dict(self.open_groups_as_dict(filename_or_obj, drop_variables=drop_variables))

    def open_groups_as_dict(
        self, filename_or_obj: Any, *, drop_variables: str | Iterable[str] | None = None
    ) -> dict[str, xarray.Dataset]:
        """Open all levels by the names of their nodes; the node `/` has the image's own attributes.

        Raises:
            ValueError: if there is no image.
        """
        address = filename_or_obj
        if isinstance(address, (str, os.PathLike)):
            address = local_or_url(address)
        if isinstance(address, Path) and not address.exists():
            raise FileNotFoundError(f"{address} does not exist")
        node = open_zarr(address) if isinstance(address, (Path, str)) else zarr.open(address, mode="r")
        multiscales = [] if isinstance(node, zarr.Array) else read_multiscales(dict(node.attrs), str(address))
        if not multiscales:
            open_source(address)  # its error names what is there instead
            raise ValueError(f"engine 'oocpatch' opens OME-Zarr images, but {address} is another kind of Zarr")
        multiscale = multiscales[0]
        root = xarray.Dataset(attrs={"name": multiscale.name} if multiscale.name else {})
        levels = {
            f"/scale{number}": self.open_dataset(filename_or_obj, drop_variables=drop_variables, level=number)
            for number, level in enumerate(multiscale.levels)
            if isinstance(node, zarr.Group) and level.path in node  # others are listed and missing
        }
        return {"/": root, **levels}
