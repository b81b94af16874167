"""The Zarr that a conversion writes: what it is made of, which write units are there, and when it is whole.

```text
OUT.partial/              renamed to OUT when it is whole: what is not finished never looks complete
    zarr.json             what it is made of
    volume/               the voxels, and coordinates beside them
    oocpatch.journal      the number of each write unit that is stored; made last, deleted last
```
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from oocpatch.errors import OutputExists, RunMismatch
from oocpatch.outputs.coordinates import json_attributes, storable_coords, write_coords
from oocpatch.planning.box import Box, Ints
from oocpatch.storage.journal import Journal, read_journal
from oocpatch.storage.paths import LocalPath, consolidate
from oocpatch.volumes.volume import Volume

NAME = "volume"
"""Name of the array in the group that is written."""

MARK = "oocpatch_convert"
"""Attribute of the group: what it was made of."""

JOURNAL = "oocpatch.journal"

FIELDS = {"identity": "volume", "axes": "axes", "level": "level", "chunks": "chunks", "shards": "shards"}
"""The facts by which two conversions are the same, and the parameters that they come from."""

FEW = 4
"""Channels up to this number, such as those of a picture, share a chunk."""


def record_of(volume: Volume, level: int | str, chunk: Ints, unit: Ints, address: str | None) -> dict[str, Any]:
    """Return the facts of a conversion, as JSON has them."""
    return {
        "source": address,
        "identity": volume.fingerprint,
        "axes": list(volume.axes.names),
        "level": str(level),
        "chunks": list(chunk),
        "shards": None if unit == chunk else list(unit),
    }


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

    def __init__(self, path: LocalPath, array: zarr.Array[Any], unit: Ints, volume: Volume) -> None:
        self._path, self._array, self._unit = path, array, unit
        self._channel = None if volume.channel_axis is None else volume.channel_position
        self._shape = volume.shape
        self._grid = tuple(-(-n // u) for n, u in zip(self._shape, unit, strict=True))
        self._stored = np.zeros(self._grid, np.uint8)
        for (index,) in read_journal(path / JOURNAL):
            self._stored.flat[index] = 1
        self._journal = Journal(path / JOURNAL)

    @classmethod
    def open(cls, path: LocalPath, volume: Volume, record: Mapping[str, Any], chunk: Ints, unit: Ints) -> Conversion:
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
                for left in (path / NAME).rglob("*.partial"):  # of chunks that a killed process was writing
                    left.unlink()
                array: Any = zarr.open_array(LocalStore(path), path=NAME, mode="r+")
                if array.metadata.dimension_names == _insert(volume, volume.channel_axis, volume.names):
                    return cls(path, array, unit, volume)
            _remove(path)
        return cls(path, _create(path, volume, record, chunk, unit), unit, volume)

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

    def finish(self, target: LocalPath) -> None:
        """Give the volume its name, now that all of it is there and the conversion is closed."""
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


def _create(path: LocalPath, volume: Volume, record: Mapping[str, Any], chunk: Ints, unit: Ints) -> zarr.Array[Any]:
    attributes = {MARK: dict(record)}
    store = LocalStore(path)
    zarr.create_group(store, attributes=attributes, overwrite=False, zarr_format=3)
    together = volume.channels if volume.channels <= FEW else 1
    names = _insert(volume, volume.channel_axis, volume.names)
    sizes = dict(zip(names, _insert(volume, volume.channels, volume.shape), strict=True))
    coords = {
        name: variable
        for name, variable in storable_coords(volume.source.coords).items()
        if name != NAME and all(sizes.get(str(d)) == n and d != NAME for d, n in variable.sizes.items())
    }
    write_coords(path, coords, attributes)
    return zarr.create_array(
        store,
        name=NAME,
        shape=tuple(sizes.values()),
        chunks=_insert(volume, together, chunk),
        shards=_insert(volume, together, unit) if unit != chunk else None,
        dtype=volume.dtype,
        zarr_format=3,
        dimension_names=names,
        attributes=json_attributes(volume),
    )


def _insert(volume: Volume, channel: Any, values: Sequence[Any]) -> tuple[Any, ...]:
    """Return values per axis with that of the channel axis, if the volume has one."""
    at = volume.channel_position
    return tuple(values) if volume.channel_axis is None else (*values[:at], channel, *values[at:])


def _compare(path: LocalPath, stored: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Refuse another conversion, and name what differs."""
    differences = {}
    for key, parameter in FIELDS.items():
        old, new = stored.get(key), record[key]
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
