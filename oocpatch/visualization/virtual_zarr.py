"""An OME-Zarr that is not stored: metadata of a layer's levels, and chunks that are read when they are asked for.

```text
zarr.json      axes, voxel sizes and levels
0/zarr.json    the array of the finest level: looped axes, channel, spatial axes
0/c/0/1/2/3    one of its chunks
```
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd  # type: ignore[import-untyped]  # it has no types of its own

from oocpatch.outputs.ome_zarr import axis_transform, ome_attribute
from oocpatch.planning.box import Box, Ints
from oocpatch.visualization.anatomy import anatomical_planes
from oocpatch.visualization.layers import Layer
from oocpatch.volumes.ome_metadata import METERS
from oocpatch.volumes.volume import Volume, default_chunks

LARGEST = 4 << 20
"""Bytes of a chunk at most."""

MIXED = 6
"""Channels up to this number are mixed, and share a chunk; of more, one is shown."""

SECONDS = {"nanosecond": 1e-9, "microsecond": 1e-6, "millisecond": 1e-3, "second": 1.0, "minute": 60.0, "hour": 3600.0}
UNITS = {"m": "meter", "s": "second"}


def axis_step(volume: Volume, name: str) -> tuple[float, str, float]:
    """Return the voxel size along an axis in meters or seconds, `m` or `s`, and the first voxel's centre.

    Both are in voxels, without a unit, along the axes of an affine, and where coordinates are no lengths.
    """
    if anatomical_planes(volume) and name in volume.names[-volume.spatial_ndim :]:
        return 1.0, "", 0.0
    try:
        axis, step, start = axis_transform(volume, name)
    except ValueError:  # coordinates that are all the same
        return 1.0, "", 0.0
    if step < 0:
        if volume.source.image is None:
            return 1.0, "", 0.0
        step, start = -step, -start  # as the image stores it
    if axis.unit in METERS:
        factor, unit = 10.0 ** METERS[axis.unit], "m"
    else:
        factor, unit = (SECONDS[axis.unit], "s") if axis.unit in SECONDS else (1.0, "")
    return step * factor, unit, start * factor if math.isfinite(start) else 0.0


class VirtualZarr:
    """The files of an OME-Zarr with the levels of a layer, as `get` returns them."""

    def __init__(self, layer: Layer) -> None:
        volume = layer.volume
        self._levels, self._looped = layer.levels, len(volume.shape) - volume.spatial_ndim
        self._together = volume.channels if volume.channels <= MIXED else 1
        as_browsers_have = {"float64": "float32", "float16": "float32", "bool": "uint8"}
        as_browsers_have["int64"] = "uint64" if layer.kind == "labels" else "float32"
        self._dtype = np.dtype(as_browsers_have.get(str(volume.dtype), volume.dtype)).newbyteorder("<")
        self._codec = Zstd(level=1)
        steps, units, starts = zip(*(axis_step(volume, name) for name in volume.names), strict=True)
        kinds = ["time"] * self._looped + ["space"] * volume.spatial_ndim
        self._names = self.insert(volume, volume.channel_axis, volume.names)
        axes = [
            {"name": name, "type": kind, **({"unit": UNITS[unit]} if unit else {})}
            for name, kind, unit in zip(
                self._names, self.insert(volume, "channel", kinds), self.insert(volume, "", units), strict=True
            )
        ]
        datasets = []
        for number in range(len(layer.levels)):
            factors = layer.factors(number)
            scale = [s * f for s, f in zip(steps, factors, strict=True)]
            start = [a + s * (f - 1) / 2 for a, s, f in zip(starts, steps, factors, strict=True)]
            transformations = [
                {"type": "scale", "scale": self.insert(volume, 1.0, scale)},
                {"type": "translation", "translation": self.insert(volume, 0.0, start)},
            ]
            datasets.append({"path": str(number), "coordinateTransformations": transformations})
        self._image = ome_attribute({"multiscales": [{"name": layer.name, "axes": axes, "datasets": datasets}]})

    @staticmethod
    def insert(volume: Volume, channel: Any, values: Any) -> list[Any]:
        """Return values per axis with that of the channel axis, which is the first one after looped axes."""
        looped = len(volume.shape) - volume.spatial_ndim
        return [*values[:looped], *([] if volume.channel_axis is None else [channel]), *values[looped:]]

    def get(self, key: str) -> bytes | None:
        """Return a file by its path; None where there is none."""
        if key == "zarr.json":
            return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": self._image}).encode()
        level, _, rest = key.partition("/")
        if not level.isdecimal() or int(level) >= len(self._levels):
            return None
        volume = self._levels[int(level)]
        if rest == "zarr.json":
            return json.dumps(self._metadata(volume)).encode()
        first, *numbers = rest.split("/")
        if first != "c" or len(numbers) != len(self._names) or not all(map(str.isdecimal, numbers)):
            return None
        return self._chunk(volume, [int(number) for number in numbers])

    def _chunk_shape(self, volume: Volume) -> Ints:
        """Return the looped and spatial shape of chunks: those of the volume, if a browser can have them."""
        chunk = list(default_chunks(volume, volume.dtype.itemsize))
        while math.prod(chunk) * self._together * self._dtype.itemsize > LARGEST:
            longest = chunk.index(max(chunk))
            chunk[longest] = -(-chunk[longest] // 2)
        return tuple(chunk)

    def _metadata(self, volume: Volume) -> dict[str, Any]:
        chunk = self.insert(volume, self._together, self._chunk_shape(volume))
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": self.insert(volume, volume.channels, volume.shape),
            "data_type": str(self._dtype.newbyteorder("=")),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "zstd", "configuration": {"level": 1, "checksum": False}},
            ],
            "dimension_names": self._names,
            "attributes": {},
        }

    def _chunk(self, volume: Volume, numbers: list[int]) -> bytes | None:
        """Return a chunk, filled up with zeros at the border of the volume; None outside of it."""
        first = numbers.pop(self._looped) * self._together if volume.channel_axis is not None else 0
        chunk = self._chunk_shape(volume)
        start = tuple(i * c for i, c in zip(numbers, chunk, strict=True))
        if first >= volume.channels or any(a >= n for a, n in zip(start, volume.shape, strict=True)):
            return None
        box = Box(start, tuple(min(a + c, n) for a, c, n in zip(start, chunk, volume.shape, strict=True)))
        out = np.zeros((self._together, *chunk), self._dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            values = volume.read(box)[first : first + self._together].astype(self._dtype)
        out[(slice(len(values)), *(slice(n) for n in box.shape))] = values
        encoded: bytes = self._codec.encode(np.ascontiguousarray(np.moveaxis(out, 0, self._looped)))
        return encoded
