"""The Zarr that a conversion writes: what it is made of, which write units are there, and when it is whole.

```text
OUT.partial/              renamed to OUT when it is whole: what is not finished never looks complete
    zarr.json             says what it is made of
    volume/               the voxels, and coordinates beside them
    oocpatch.marks        a byte per write unit: 1 when it is stored; made last, deleted last
```
"""

from __future__ import annotations

import functools
import math
import mmap
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from oocpatch.errors import OutputExists, RunMismatch
from oocpatch.outputs.coordinates import json_attributes, write_coords
from oocpatch.planning.box import Box, Ints
from oocpatch.storage.paths import consolidate
from oocpatch.volumes.volume import Volume

NAME = "volume"
"""Of the array in the group that is written."""

MARK = "oocpatch_convert"
"""Attribute of the group: what it was made of."""

MARKS = "oocpatch.marks"

FIELDS = {"identity": "volume", "axes": "axes", "level": "level", "chunks": "chunks", "shards": "shards"}
"""What makes two conversions the same, by the names of the parameters."""

FEW = 4
"""So many channels, such as those of a picture, share a chunk."""


def record_of(volume: Volume, level: int | str, chunk: Ints, unit: Ints, address: str | None) -> dict[str, Any]:
    """What a conversion is made of, as JSON holds it."""
    return {
        "source": address,
        "identity": volume.fingerprint,
        "axes": list(volume.axes.names),
        "level": str(level),
        "chunks": list(chunk),
        "shards": None if unit == chunk else list(unit),
    }


def is_complete(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the same conversion is finished at `path`.

    Raises:
        OutputExists: when there is something else.
        RunMismatch: when there is another conversion, naming what differs.
    """
    if not path.exists():
        return False
    found = _record(path)
    if found is None:
        raise OutputExists(
            f"output must be a new path, but {path} exists and is no conversion; choose another, or delete it first"
        )
    _compare(path, found, record)
    (path / MARKS).unlink(missing_ok=True)  # a call that was killed between its last two steps
    return True


def replaceable(path: Path) -> None:
    """Refuse to replace what no conversion wrote.

    Raises:
        OutputExists: in that case.
    """
    if path.exists() and not _ours(path):
        raise OutputExists(f"overwrite replaces only what convert wrote, but {path} holds something else; move it away")


class Conversion:
    """An unfinished conversion, with the write units that are there.

    Args:
        path: where it grows.
        array: for the voxels.
        marks: a byte per write unit.
        unit: a write unit, in voxels without channels.
    """

    def __init__(self, path: Path, array: zarr.Array[Any], unit: Ints, volume: Volume) -> None:
        self._path, self._array, self._unit = path, array, unit
        self._has_channels, self._shape = volume.channel_axis is not None, volume.shape
        self._grid = tuple(-(-n // u) for n, u in zip(self._shape, unit, strict=True))
        marks = path / MARKS
        if not marks.exists():
            aside = marks.with_name(f"{MARKS}.partial")
            with aside.open("wb") as file:
                file.truncate(math.prod(self._grid))
            aside.rename(marks)
        with marks.open("r+b") as file:
            # Mapped: what a process marked outlives it.
            self._marks = mmap.mmap(file.fileno(), math.prod(self._grid))

    @classmethod
    def open(cls, path: Path, volume: Volume, record: Mapping[str, Any], chunk: Ints, unit: Ints) -> Conversion:
        """Go on with what an interrupted call left, or begin.

        Raises:
            OutputExists: when something else has that name.
            RunMismatch: when it was left by another conversion, naming what differs.
        """
        if path.exists():
            if not _ours(path):
                raise OutputExists(f"unfinished output goes to {path}, which holds something else; move it away")
            found = _record(path)
            if found is not None and (path / MARKS).exists():
                _compare(path, found, record)
                for left in (path / NAME).rglob("*.partial"):  # of chunks that a killed process was writing
                    left.unlink()
                return cls(path, zarr.open_array(LocalStore(path), path=NAME, mode="r+"), unit, volume)
            remove(path)
        return cls(path, _create(path, volume, record, chunk, unit), unit, volume)

    @property
    def done(self) -> int:
        """Voxels that are there, channels apart."""
        marks = np.frombuffer(self._marks, np.uint8).reshape(self._grid).astype(np.int64)
        lengths = (
            np.minimum(u, n - u * np.arange(count))
            for n, u, count in zip(self._shape, self._unit, self._grid, strict=True)
        )
        return int(functools.reduce(lambda left, n: left @ n, reversed(list(lengths)), marks))

    def missing(self, box: Box) -> list[Box]:
        """The write units of a box that are not there."""
        return [part for part in box.split(self._unit) if not self._marks[self._index(part)]]

    def write(self, part: Box, values: Any) -> None:
        """Store a write unit, `(C, *part.shape)`, and mark it then. Idempotent: writes only its own, whole."""
        if not self._has_channels:
            self._array[part.slices()] = values[0]
        else:
            step = (self._array.shards or self._array.chunks)[0]
            for first in range(0, len(values), step):
                self._array[(slice(first, first + step), *part.slices())] = values[first : first + step]
        self._marks[self._index(part)] = 1

    def finish(self, target: Path) -> None:
        """Give the volume its name, now that all of it is there."""
        self._marks.close()
        consolidate(self._path)
        self._path.rename(target)
        (target / MARKS).unlink()

    def _index(self, part: Box) -> int:
        place = [a // u for a, u in zip(part.start, self._unit, strict=True)]
        return int(np.ravel_multi_index(place, self._grid))


def remove(path: Path) -> None:
    """Delete a conversion; what says that it is one goes last."""
    for left in [left for left in path.iterdir() if left.name != "zarr.json"]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    shutil.rmtree(path)


def _create(path: Path, volume: Volume, record: Mapping[str, Any], chunk: Ints, unit: Ints) -> zarr.Array[Any]:
    attributes = {MARK: dict(record)}
    store = LocalStore(path)
    zarr.create_group(store, attributes=attributes, overwrite=False)
    channel = () if volume.channel_axis is None else (volume.channel_axis,)
    channels = () if volume.channel_axis is None else (volume.channels,)
    together = tuple(n if n <= FEW else 1 for n in channels)
    names = {*channel, *volume.names} - {NAME}
    sizes = dict(zip((*channel, *volume.names), (*channels, *volume.shape), strict=True))
    coords = {
        name: variable
        for name, variable in volume.source.coords.items()
        if name != NAME
        and set(map(str, variable.dims)) <= names
        and all(sizes[str(d)] == n for d, n in variable.sizes.items())
    }  # fmt: skip
    for variable in coords.values():
        variable.encoding = {}
    write_coords(path, coords, attributes)
    return zarr.create_array(
        store,
        name=NAME,
        shape=(*channels, *volume.shape),
        chunks=(*together, *chunk),
        shards=(*together, *unit) if unit != chunk else None,
        dtype=volume.dtype,
        dimension_names=(*channel, *volume.names),
        attributes=json_attributes(volume),
    )


def _compare(path: Path, found: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    differ = [key for key in FIELDS if found.get(key) != record[key]]
    if differ:
        told = "; ".join(_told(key, found, record) for key in differ)
        raise RunMismatch(
            f"{path} belongs to a conversion with other parameters ({told}); "
            "repeat its call, choose another output, or start afresh with overwrite=True",
            tuple(FIELDS[key] for key in differ),
        )


def _told(key: str, found: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    if key != "identity":
        return f"{FIELDS[key]}: {found.get(key)!r} before, {record[key]!r} now"
    old, new = (values.get("source") or "an array in memory" for values in (found, record))
    return f"volume: {old} before, {f'{new}, which has changed, now' if new == old else f'{new} now'}"


def _ours(path: Path) -> bool:
    """Whether a conversion wrote it, or was about to."""
    if not path.is_dir():
        return False
    return _record(path) is not None or all(left.name.endswith(".partial") for left in path.iterdir())


def _record(path: Path) -> dict[str, Any] | None:
    try:
        found = zarr.open_group(LocalStore(path), mode="r", use_consolidated=False).attrs.get(MARK)
    except (OSError, ValueError, KeyError):
        return None
    return dict(found) if isinstance(found, dict) else None
