"""The Zarr that a conversion writes: what it is made of, which write units are there, and when it is whole.

```text
OUT.partial/              renamed to OUT when it is whole: what is not finished never looks complete
    zarr.json             what it is made of, and the metadata of an OME-Zarr
    scale0/image/         the voxels, and coordinates beside them
    scale1/image/         coarser levels, made of the level above
    oocpatch.journal      the number of each write unit that is stored; made last, deleted last
    pyramids              which regions of coarser levels are stored
```

What an OME-Zarr cannot describe is a plain array, `OUT/volume`, with its coordinates beside it.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray
import zarr
from zarr.storage import LocalStore

from oocpatch.errors import OutputExists, RunMismatch
from oocpatch.outputs.coordinates import json_attributes, storable_coords, write_coords
from oocpatch.outputs.ome_zarr import (
    Image,
    axis_transform,
    checked_output_format,
    create_levels,
    image_attributes,
    image_of,
    ome_attribute,
)
from oocpatch.outputs.omero import image_settings
from oocpatch.outputs.pyramid import JOURNAL as PYRAMIDS
from oocpatch.outputs.pyramid import build_levels, levels_below
from oocpatch.outputs.write_units import COMPRESSOR
from oocpatch.planning.box import Box, Ints
from oocpatch.storage.journal import Journal, read_journal
from oocpatch.storage.paths import LocalPath, consolidate
from oocpatch.storage.zarrs_codec import sweep_staging
from oocpatch.volumes.affine import EVEN
from oocpatch.volumes.ome_metadata import ABBREVIATIONS, METERS, coordinate, long_unit, ome_attributes
from oocpatch.volumes.volume import Volume

NAME = "volume"
"""Name of the array in the group that is written."""

MARK = "oocpatch_convert"
"""Attribute of the group: what it was made of."""

JOURNAL = "oocpatch.journal"

FIELDS = {"identity": "volume", "axes": "axes", "level": "level", "chunks": "chunks", "shards": "shards"}
FIELDS |= {"levels": "levels", "labels": "labels"}
"""The facts by which two conversions are the same, and the parameters that they come from."""

FEW = 4
"""Channels up to this number, such as those of a picture, share a chunk."""


RGB = ("FF0000", "00FF00", "0000FF")
"""Colours of three channels of 8 bits."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The arrays that a conversion writes.

    Attributes:
        volume: the volume.
        chunk, unit: chunk and write unit of the finest array along looped and spatial axes, in voxels.
        image: the OME-Zarr; None: a plain array.
    """

    volume: Volume
    chunk: Ints
    unit: Ints
    image: Image | None

    @classmethod
    def of(cls, volume: Volume, chunk: Ints, unit: Ints, levels: int | None, *, labels: bool) -> Layout:
        """Return that of an OME-Zarr; of a plain array for one level, or where an OME-Zarr would lose facts.

        Raises:
            ValueError: if several levels are wanted, but there can be no OME-Zarr.
        """
        plain = cls(volume, chunk, unit, None)
        if levels == 1:
            return plain
        try:
            checked_output_format("ome-zarr", volume)
            is_described = all(_is_described(volume, str(name)) for name in volume.source.coords)
        except ValueError:
            is_described = False
        if not is_described:
            if levels is None:
                return plain
            raise ValueError(
                "levels must be 1 unless the volume has two or three axes in space, at most one of time, and evenly "
                f"spaced coordinates, in units of length or time if any, got {levels} for {volume!r}"
            )
        name = volume.channel_axis
        image = image_of(
            volume, NAME, str(volume.dtype),
            shape=volume.shape, chunks=chunk, unit=unit, scales=[(1, 1)] * len(volume.shape),
            channel=None if name is None else (name, volume.channels, plain.channels_in_chunk),
            labels=labels, levels=levels,
        )  # fmt: skip
        return cls(volume, chunk, unit, image)

    @property
    def array(self) -> str:
        """Path of the array of the volume."""
        return NAME if self.image is None else self.image.paths[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its axes."""
        if self.image is not None:
            return tuple(axis.name for axis in self.image.pyramid.axes)
        return self.insert(self.volume.channel_axis, self.volume.names)

    @property
    def channels_in_chunk(self) -> int:
        """Number of channels in a chunk."""
        return self.volume.channels if self.volume.channels <= FEW else 1

    def insert(self, channel: Any, values: Sequence[Any]) -> tuple[Any, ...]:
        """Return values per axis of the plain array, with that of the channel axis if it has one."""
        at = self.volume.channel_position
        return tuple(values) if self.volume.channel_axis is None else (*values[:at], channel, *values[at:])

    def record(self, level: int | str, address: str | None) -> dict[str, Any]:
        """Return the facts of a conversion, as JSON has them."""
        return {
            "source": address,
            "identity": self.volume.fingerprint,
            "axes": list(self.volume.axes.names),
            "level": str(level),
            "chunks": list(self.chunk),
            "shards": None if self.unit == self.chunk else list(self.unit),
            **({} if self.image is None else {"levels": len(self.image.shapes), "labels": self.image.labels}),
        }

    def open(self, path: LocalPath) -> xarray.DataArray:
        """Open the volume that was written, lazy."""
        group, _, name = self.array.rpartition("/")
        array: xarray.DataArray = xarray.open_zarr(path / group, consolidated=None if not group else False)[name]
        return array.rename(NAME)


def _is_described(volume: Volume, name: str) -> bool:
    """Return whether the metadata of an OME-Zarr give a coordinate of the volume back."""
    variable = volume.source.coords[name]
    if name == volume.channel_axis and variable.dtype.kind in "UT":
        return len(set(map(str, variable.values))) == variable.size and not variable.attrs
    if name not in volume.names or variable.dims != (name,) or variable.dtype.kind not in "iuf":
        return False
    axis, step, start = axis_transform(volume, name)
    even = coordinate(name, variable.size, step, start, axis.unit)
    attributes = {k: long_unit(v) if k == "units" else v for k, v in variable.attrs.items()}
    is_close = np.allclose(variable.values, even.values, rtol=0, atol=EVEN * abs(step))
    return is_close and attributes == even.attrs and (axis.unit is None or axis.unit in {*METERS, *ABBREVIATIONS})


def is_complete(path: LocalPath, record: Mapping[str, Any]) -> bool:
    """Return whether the same conversion is finished at `path`.

    Raises:
        OutputExists: when there is something else.
        RunMismatch: when there is another conversion, naming what differs.
    """
    if not path.exists():
        return False
    stored = _record(path)
    if stored is None:
        raise OutputExists(
            f"output must be a new path, but {path} exists and is no conversion; choose another, or delete it first"
        )
    _compare(path, stored, record)
    (path / JOURNAL).unlink(missing_ok=True)  # a call that was killed between its last two steps
    return True


class Conversion:
    """An unfinished conversion, with the write units that are there."""

    def __init__(self, path: LocalPath, array: zarr.Array[Any], layout: Layout) -> None:
        self._path, self._array, self._unit, self._layout = path, array, layout.unit, layout
        volume = layout.volume
        self._channel = None if volume.channel_axis is None else layout.names.index(volume.channel_axis)
        self._shape = volume.shape
        self._grid = tuple(-(-n // u) for n, u in zip(self._shape, self._unit, strict=True))
        self._stored = np.zeros(self._grid, np.uint8)
        for (index,) in read_journal(path / JOURNAL):
            self._stored.flat[index] = 1
        self._journal = Journal(path / JOURNAL)

    @classmethod
    def open(cls, path: LocalPath, layout: Layout, record: Mapping[str, Any]) -> Conversion:
        """Continue what an interrupted call left, or begin.

        Raises:
            OutputExists: when something else has that name.
            RunMismatch: when it was left by another conversion, naming what differs.
        """
        if path.exists():
            if not _ours(path):
                raise OutputExists(f"unfinished output goes to {path}, which holds something else; move it away")
            stored = _record(path)
            if stored is not None and (path / JOURNAL).is_file():
                _compare(path, stored, record)
                for left in list(path.rglob("*.partial")):  # of chunks that a killed process was writing
                    sweep_staging(left) if left.is_dir() else left.unlink(missing_ok=True)
                array: Any = zarr.open_array(LocalStore(path), path=layout.array, mode="r+")
                if array.metadata.dimension_names == layout.names:
                    return cls(path, array, layout)
            _remove(path)
        return cls(path, _create(path, layout, record), layout)

    def close(self) -> None:
        """Make durable what is recorded, and give the conversion up."""
        self._journal.close()

    @property
    def done(self) -> int:
        """The number of voxels that are there, channels apart."""
        lengths = (
            np.minimum(u, n - u * np.arange(count))
            for n, u, count in zip(self._shape, self._unit, self._grid, strict=True)
        )
        return int(functools.reduce(lambda left, n: left @ n, reversed(list(lengths)), self._stored.astype(np.int64)))

    def missing(self, box: Box) -> list[Box]:
        """Return the write units of a box that are not there."""
        return [part for part in box.split(self._unit) if not self._stored.flat[self._index(part)]]

    def write(self, part: Box, values: Any) -> None:
        """Store a write unit, `(C, *part.shape)`, and record it then. Idempotent: writes only its own, whole."""
        if (at := self._channel) is None:
            self._array[part.slices()] = values[0]
        else:
            spans = part.slices()
            step = (self._array.shards or self._array.chunks)[at]
            for first in range(0, len(values), step):
                selection = (*spans[:at], slice(first, first + step), *spans[at:])
                self._array[selection] = np.moveaxis(values[first : first + step], 0, at)
        index = self._index(part)
        self._journal.append([index])
        self._journal.commit(if_due=True)
        self._stored.flat[index] = 1

    def finish(self, target: LocalPath, *, max_memory: int, threads: int, progress: str | bool) -> None:
        """Make the coarser levels, and give the volume its name, now that its units are there and it is closed."""
        if (image := self._layout.image) is not None:
            levels, journal = list(levels_below(self._path, image.paths, image.method)), self._path / PYRAMIDS
            build_levels(levels, journal, max_memory=max_memory, workers=threads, progress=progress)
            if not image.labels:
                display = _display(self._layout.volume)
                omero = image_settings(self._path, "", NAME, image.paths, display, fractions=False)
                group = zarr.open_group(LocalStore(self._path), mode="r+", use_consolidated=False)
                group.attrs.update(ome_attribute({**ome_attributes(dict(group.attrs)), "omero": omero}))
            journal.unlink(missing_ok=True)
        consolidate(self._path)
        self._path.rename(target)
        (target / JOURNAL).unlink()

    def _index(self, part: Box) -> int:
        place = [a // u for a, u in zip(part.start, self._unit, strict=True)]
        return int(np.ravel_multi_index(place, self._grid))


def remove_conversions(*paths: LocalPath) -> None:
    """Delete conversions, finished or not.

    Raises:
        OutputExists: when there is anything else; then nothing is deleted.
    """
    for path in paths:
        if path.exists() and not _ours(path):
            rule = "overwrite replaces only what convert wrote"
            raise OutputExists(f"{rule}, but {path} holds something else; move it away")
    for path in paths:
        if path.exists():
            _remove(path)


def _remove(path: LocalPath) -> None:
    """Delete a conversion, the metadata by which it is known as one last."""
    for left in [left for left in path.iterdir() if left.name != "zarr.json"]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    shutil.rmtree(path)


def _create(path: LocalPath, layout: Layout, record: Mapping[str, Any]) -> zarr.Array[Any]:
    volume, image = layout.volume, layout.image
    attributes = {MARK: dict(record), **({} if image is None else image_attributes(image))}
    store = LocalStore(path)
    zarr.create_group(store, attributes=attributes, overwrite=False, zarr_format=3)
    sizes = {**dict(zip(volume.names, volume.shape, strict=True)), str(volume.channel_axis): volume.channels}
    coords = {
        name: variable
        for name, variable in storable_coords(volume.source.coords).items()
        if name != NAME and all(sizes.get(str(d)) == n and d != NAME for d, n in variable.sizes.items())
    }
    if image is not None:
        create_levels(path, image, coords, json_attributes(volume), 0)
        return zarr.open_array(store, path=layout.array, mode="r+")
    write_coords(path, coords, attributes)
    together = layout.channels_in_chunk
    return zarr.create_array(
        store,
        name=NAME,
        shape=layout.insert(volume.channels, volume.shape),
        chunks=layout.insert(together, layout.chunk),
        shards=layout.insert(together, layout.unit) if layout.unit != layout.chunk else None,
        dtype=volume.dtype,
        compressors=COMPRESSOR,
        zarr_format=3,
        dimension_names=layout.names,
        attributes=json_attributes(volume),
    )


def _display(volume: Volume) -> dict[str, Any]:
    """Return the display settings of channels by their names: those of an OME-Zarr, or of red, green and blue."""
    if volume.source.display or volume.channels != len(RGB) or volume.dtype != np.uint8:
        return dict(volume.source.display or {})
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    return {f"channel {c}": {"color": colour, "window": window} for c, colour in enumerate(RGB)}


def _compare(path: LocalPath, stored: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Refuse another conversion, and name what differs."""
    differences = {}
    for key, parameter in FIELDS.items():
        old, new = stored.get(key), record.get(key)
        if old != new and key == "identity":
            old, new = (values.get("source") or "an array in memory" for values in (stored, record))
            differences[parameter] = f"{old} before, {new}{', which has changed,' if new == old else ''} now"
        elif old != new:
            differences[parameter] = f"{old!r} before, {new!r} now"
    if differences:
        message = "; ".join(f"{parameter}: {text}" for parameter, text in differences.items())
        raise RunMismatch(
            f"{path} belongs to a conversion with other parameters ({message}); "
            "repeat its call, choose another output, or start afresh with overwrite=True",
            tuple(differences),
        )


def _ours(path: LocalPath) -> bool:
    """Return whether a conversion wrote a directory, or was about to."""
    if not path.is_dir():
        return False
    return _record(path) is not None or all(left.name.endswith(".partial") for left in path.iterdir())


def _record(path: LocalPath) -> dict[str, Any] | None:
    try:
        record = zarr.open_group(LocalStore(path), mode="r", use_consolidated=False).attrs.get(MARK)
    except (OSError, ValueError, KeyError):
        return None
    return dict(record) if isinstance(record, dict) else None
