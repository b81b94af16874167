"""LIF by liffile: an image of the file."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray

from oocpatch.volumes.formats.planes import Selection, name_channels, read_planes
from oocpatch.volumes.formats.raw import read_box, row_chunk
from oocpatch.volumes.formats.spec import FileMetadata, FileSpec, UnreadableError, check_number, import_reader
from oocpatch.volumes.ome_metadata import coordinate

AXES = {"1": "x", "2": "y", "3": "z", "4": "t"}
"""Names of axes by their numbers in the file."""

UNITS = {"m": (1e6, "um"), "s": (1.0, "s")}
"""Factors and units of coordinates by the units of the file."""


class LifFile:
    """An image of a LIF, by its number or its name.

    Most are stored as one array, of which boxes are read. Those with colours are read in whole frames, since they may
    be stored with blue first, or with rows that are filled up.
    """

    def __init__(self, spec: FileSpec) -> None:
        liffile = import_reader("liffile", "microscopy", spec)
        self._path = Path(spec.address)
        self._lock = threading.Lock()
        self._file = liffile.LifFile(spec.address)
        try:
            self._image = image = _choose([i for i in self._file.images if not i.is_flim], spec)
            _check_complete(image, self._path)
            sizes, block, dtype = dict(image.sizes), image.memory_block, np.dtype(image.dtype)
            shape = tuple(sizes.values())
            self._is_array = "S" not in sizes and block.size == math.prod(shape) * dtype.itemsize
            self._outer = tuple(axis for axis in sizes if axis not in image.frames.frame_dims)
            rest = (*(1 for _ in shape[len(self._outer) : -1]), row_chunk(shape[-1], dtype))
            names = tuple("c" if axis == "S" and "C" not in sizes else axis.lower() for axis in sizes)
            self.metadata = FileMetadata(
                shape=shape,
                dtype=dtype,
                chunks=(*(1 for _ in self._outer), *(rest if self._is_array else image.frames.frame_shape)),
                names=names,
                coords=_coords(image.xml_element, dict(zip(names, shape, strict=True))),
                chunked=not self._is_array,
            )
            self._handle = self._path.open("rb")
        except BaseException:
            self._file.close()
            raise

    def read(self, selection: Selection) -> npt.NDArray[Any]:
        """Read the voxels of a selection."""
        if self._is_array:
            start = self._image.memory_block.offset
            return read_box(self._handle.fileno(), start, self.metadata.shape, self.metadata.dtype, selection)
        return read_planes(self.metadata, selection, len(self._outer), self._frame)

    def files(self) -> list[Path]:
        """Return the file."""
        return [self._path]

    def close(self) -> None:
        """Close the file."""
        self._handle.close()
        self._file.close()

    def _frame(self, index: tuple[int, ...], selection: Selection) -> npt.NDArray[Any]:
        with self._lock:  # frames are read at the one position of the file
            frame = self._image.frame(**dict(zip(self._outer, index, strict=True)))
        return np.asarray(frame[selection])


def _choose(images: list[Any], spec: FileSpec) -> Any:
    """Return the image of a name, else of a number.

    Raises:
        UnreadableError: if there is none, or several of that name; the message lists all.
    """
    if not spec.part:
        check_number("series", spec.series, [image.shape for image in images], spec)
        return images[spec.series]
    named = [image for image in images if spec.part in (image.name, image.path)]
    if len(named) != 1:
        listed = "; ".join(f"series={i}: {image.path} {image.shape}" for i, image in enumerate(images))
        raise UnreadableError(
            f"volume must be one image, but {spec.address} has {len(named)} of the name {spec.part}; it has {listed}"
        )
    return named[0]


def _check_complete(image: Any, path: Path) -> None:
    """Refuse an image whose voxels end behind the file.

    Raises:
        UnreadableError: in that case; the message has the sizes.
    """
    end, size = image.memory_block.offset + image.memory_block.size, path.stat().st_size
    if size < end:
        raise UnreadableError(f"volume cannot be read: {path} ends too early: it must have {end} bytes, got {size}")


def _coords(element: Any, sizes: dict[str, int]) -> dict[str, xarray.Variable]:
    """Return the places of voxels, as far as the file has them, and the names of channels by their lookup tables."""
    description = element.find("./Data/Image/ImageDescription")
    names = [str(channel.get("LUTName")) for channel in description.iterfind("./Channels/ChannelDescription")]
    coords = name_channels(names, sizes.get("c", 0))
    for dimension in description.iterfind("./Dimensions/DimensionDescription"):
        name, length = AXES.get(dimension.get("DimID"), ""), float(dimension.get("Length", 0))
        if (size := sizes.get(name, 1)) > 1 and length:
            factor, unit = UNITS.get(dimension.get("Unit"), (1.0, None))
            start = float(dimension.get("Origin", 0))
            coords[name] = coordinate(name, size, factor * length / (size - 1), factor * start, unit)
    return coords
