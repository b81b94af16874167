"""Imaris' IMS by h5py: a level of the image, `(t, c, z, y, x)` as far as there are such axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.volumes.formats.hdf5 import CACHE
from oocpatch.volumes.formats.planes import Selection, name_channels, read_planes
from oocpatch.volumes.formats.spec import FileMetadata, FileSpec, check_number, import_reader
from oocpatch.volumes.ome_metadata import coordinate


class ImarisFile:
    """A level of an IMS, whose datasets hold a channel at a time each, and are filled up to whole chunks."""

    def __init__(self, spec: FileSpec) -> None:
        h5py = import_reader("h5py", "hdf5", spec)
        self._path = Path(spec.address)
        self._file = h5py.File(spec.address, "r", rdcc_nbytes=CACHE)
        try:
            levels = [self._file[f"DataSet/ResolutionLevel {i}"] for i in range(len(self._file["DataSet"]))]
            shapes = [_shape(level) for level in levels]
            check_number("level", spec.level, shapes, spec)
            self._level = levels[spec.level]
            self.metadata = self._metadata(shapes[spec.level])
        except BaseException:
            self._file.close()
            raise

    def read(self, selection: Selection) -> npt.NDArray[Any]:
        """Read the voxels of a selection."""
        return read_planes(self.metadata, selection, len(self._outer), self._box)

    def files(self) -> list[Path]:
        """Return the file."""
        return [self._path]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _box(self, index: tuple[int, ...], selection: Selection) -> npt.NDArray[Any]:
        place = dict(zip(self._outer, index, strict=True))
        data = self._level[f"TimePoint {place.get('t', 0)}/Channel {place.get('c', 0)}/Data"]
        # A slice may end in the filling, so it is taken within the volume.
        inner = [slice(*s.indices(n)) for s, n in zip(selection, self.metadata.shape[-len(selection) :], strict=True)]
        return np.asarray(data[(*(0,) * (3 - len(inner)), *inner)])

    def _metadata(self, shape: tuple[int, ...]) -> FileMetadata:
        times, channels = len(self._level), len(self._level["TimePoint 0"])
        self._outer = tuple(axis for axis, size in (("t", times), ("c", channels)) if size > 1)
        data = self._level["TimePoint 0/Channel 0/Data"]
        sizes = {"t": times, "c": channels, **dict(zip("zyx", shape, strict=True))}
        sizes = {axis: size for axis, size in sizes.items() if size > 1 or axis in "yx"}
        info = self._file["DataSetInfo"]
        coords = name_channels([_text(info.get(f"Channel {i}"), "Name") for i in range(channels)], sizes.get("c", 0))
        for number, axis in enumerate("xyz"):
            low, high = (_text(info["Image"], f"{bound}{number}") for bound in ("ExtMin", "ExtMax"))
            if axis in sizes and low and high and low != high:
                step = (float(high) - float(low)) / sizes[axis]
                coords[axis] = coordinate(axis, sizes[axis], step, float(low) + step / 2, _text(info["Image"], "Unit"))
        return FileMetadata(
            shape=tuple(sizes.values()),
            dtype=data.dtype,
            chunks=(*(1 for _ in self._outer), *(data.chunks or data.shape)[len(self._outer) - len(sizes) :]),
            names=tuple(sizes),
            coords=coords,
        )


def _shape(level: Any) -> tuple[int, ...]:
    """Return the size of a level without what its chunks are filled up with."""
    channel = level["TimePoint 0/Channel 0"]
    return tuple(int(_text(channel, f"ImageSize{axis}")) for axis in "ZYX")


def _text(node: Any, name: str) -> str:
    """Return an attribute, which Imaris stores as an array of characters; empty if it is missing."""
    value = node.attrs.get(name, b"") if node is not None else b""
    return b"".join(np.atleast_1d(value).astype("S")).decode(errors="replace").strip("\0 ")
