"""Subjects: named volumes of one spatial shape, and what else is known about them.

Volumes are read when a patch is. A patch is a subject, too, whose volumes are in memory:

```text
 Subject                                     a patch
   t1     Volume, on disk          --read-->   t1     LoadedVolume, .data (C, *patch)
   label  Volume, on disk          --read-->   label  LoadedVolume, .data (C, *patch)
   age    45                                   age    45
                                               patch_location
```
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import xarray
import zarr

from oocpatch.planning.box import Box, Ints
from oocpatch.planning.choices import STATISTIC_PADDING
from oocpatch.planning.grid import PatchLocation
from oocpatch.volumes.alignment import align
from oocpatch.volumes.padding import padding_value, reading_rule
from oocpatch.volumes.volume import Volume

Rule = tuple[str, float]
"""The rule and the value by which a volume is read outside of itself."""

ARRAYS = (np.ndarray, zarr.Array, zarr.Group, xarray.DataArray, xarray.Dataset)


@dataclass(slots=True, eq=False, weakref_slot=True)
class LoadedVolume:
    """A volume in memory.

    Attributes:
        data: tensor `(C, *spatial)`. A transform may put another in its place.

    >>> LoadedVolume(torch.zeros(2, 8, 9)).shape
    (8, 9)

    Raises:
        ValueError: if the tensor has no axis besides the channels.
    """

    data: torch.Tensor

    def __post_init__(self) -> None:
        if self.data.ndim < 2:
            raise ValueError(f"a tensor must have shape (C, *spatial), got {tuple(self.data.shape)}")

    def __repr__(self) -> str:
        return f"LoadedVolume({tuple(self.data.shape)}, {self.data.dtype})"

    @property
    def channels(self) -> int:
        return int(self.data.shape[0])

    @property
    def shape(self) -> Ints:
        """Spatial shape, in voxels."""
        return tuple(self.data.shape[1:])


class Subject:
    """Named volumes of one spatial shape, lazy, plus metadata.

    Arrays (numpy, Zarr, Xarray, Dask), `Volume`s and `Path`s are volumes, with their axes as `Volume` takes them. So
    are torch tensors, which are always `(C, *spatial)`. All else is metadata, strings included. Axes that have names
    take the order of the first volume with names; others are laid over it by position.

    Volumes and metadata are attributes and items: `subject.t1`, `subject["t1"]`. A volume has `channels` and a `shape`
    (spatial, in voxels). Those of patches, and of any subject after `load()`, have their voxels in `data`,
    a tensor `(C, *spatial)`.

    Raises:
        ValueError: when there is no volume, a volume cannot be opened, has looped axes such as time, or differs from
            the others in spatial shape or, where both have them, in the names or the extent of axes, or a name is one
            that `Subject` needs itself.

    >>> subject = Subject(t1=np.zeros((8, 9)), label=np.zeros((8, 9), np.uint8), age=45)
    >>> subject.spatial_shape, list(subject.images), subject.metadata
    ((8, 9), ['t1', 'label'], {'age': 45})
    """

    def __init__(self, **volumes_and_metadata: Any) -> None:
        self._volumes: dict[str, Volume | LoadedVolume] = {}
        self._metadata: dict[str, Any] = {}
        for name, value in volumes_and_metadata.items():
            if name in RESERVED:
                raise ValueError(f"names of a subject must not be one of {', '.join(sorted(RESERVED))}, got {name!r}")
            if is_volume(value):
                self._volumes[name] = _open_volume(name, value)
            else:
                self._metadata[name] = value
        if not self._volumes:
            raise ValueError(f"a subject must have at least one volume, got only {list(self._metadata) or 'nothing'}")
        self._align()
        shapes = {name: volume.shape for name, volume in self._volumes.items()}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise ValueError(f"the volumes of a subject must have one spatial shape, got {listed}")

    def _align(self) -> None:
        """Give all volumes whose axes have names the order of the first of them."""
        opened = {name: volume for name, volume in self._volumes.items() if isinstance(volume, Volume)}
        names = [name for name, volume in opened.items() if not volume.axes.is_default]
        for name in names[1:]:
            if sorted(opened[name].shape) == sorted(opened[names[0]].shape):  # else their shapes are refused
                self._volumes[name] = align(name, opened[name], opened[names[0]])[0]

    @property
    def images(self) -> dict[str, Volume | LoadedVolume]:
        """Volumes by name."""
        return dict(self._volumes)

    @property
    def metadata(self) -> dict[str, Any]:
        """All values that are not volumes, by name."""
        return self._metadata

    @property
    def spatial_shape(self) -> Ints:
        """Common shape of all volumes, without channels, in voxels."""
        return next(iter(self._volumes.values())).shape

    @property
    def spatial_names(self) -> tuple[str, ...]:
        """Names of the spatial axes of the first volume."""
        return as_volume(next(iter(self._volumes.values()))).names

    def load(self) -> None:
        """Read all volumes into memory, where `subject.t1.data` is a tensor `(C, *spatial)`."""
        for name, volume in self._volumes.items():
            if isinstance(volume, Volume):
                self._volumes[name] = LoadedVolume(_read(volume, Box.of_shape(volume.shape)))

    def __getattr__(self, name: str) -> Any:
        # No stored name begins with an underscore; pickle looks up such names before `_volumes` exists.
        if not name.startswith("_") and name in self:
            return self[name]
        raise AttributeError(f"the subject has no {name!r}")

    def __getitem__(self, name: str) -> Any:
        return self._volumes[name] if name in self._volumes else self._metadata[name]

    def __contains__(self, name: object) -> bool:
        return name in self._volumes or name in self._metadata

    def __repr__(self) -> str:
        volumes = ", ".join(f"{n} ({v.channels}, {', '.join(map(str, v.shape))})" for n, v in self._volumes.items())
        return f"Subject({volumes}; {', '.join(self._metadata) or 'no metadata'})"


RESERVED = frozenset(name for name in dir(Subject) if not name.startswith("_"))


def is_volume(value: Any) -> bool:
    """Return whether a subject takes a value as a volume rather than as metadata."""
    kinds = (*ARRAYS, torch.Tensor, Volume, LoadedVolume, os.PathLike)
    return isinstance(value, kinds) or (hasattr(value, "dask") and hasattr(value, "chunksize"))


def _open_volume(name: str, value: Any) -> Volume | LoadedVolume:
    """Return a value as a volume without looped axes."""
    if isinstance(value, LoadedVolume):
        return value
    try:
        if isinstance(value, torch.Tensor):
            return LoadedVolume(value)
        volume = value if isinstance(value, Volume) else Volume(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if volume.axes.looped:
        looped = ", ".join(volume.names[: len(volume.axes.looped)])
        raise ValueError(
            f"{name}: the volumes of a subject must have no looped axes, got {looped}; select one index of them, or "
            f"make them spatial by another name, as in Volume(source, axes=...)"
        )
    return volume


def read_patches(
    subject: Subject,
    locations: Sequence[PatchLocation],
    padding: Mapping[str, Rule] = MappingProxyType({}),
) -> list[Subject]:
    """Read the patches of a subject at locations in voxels of the unpadded volume; their bounding box is read once.

    Args:
        subject: the subject.
        locations: of the patches.
        padding: how each volume is read outside of itself, as `reading_rules` returns it.

    Returns:
        One subject per location, with that location as `patch_location`; each owns its memory.
    """
    box = Box(
        tuple(map(min, zip(*(location.index_ini for location in locations), strict=True))),
        tuple(map(max, zip(*(location.index_fin for location in locations), strict=True))),
    )
    data = {name: _read(volume, box, *padding.get(name, ())) for name, volume in subject.images.items()}
    patches = []
    for location in locations:
        part = (slice(None), *location.box.slices(box.start))
        # clones: a view would keep the whole box in memory
        tensors = data if len(locations) == 1 else {name: tensor[part].clone() for name, tensor in data.items()}
        volumes = {name: LoadedVolume(tensor) for name, tensor in tensors.items()}
        patches.append(Subject(**volumes, **{**subject.metadata, "patch_location": location}))
    return patches


def reading_rules(subject: Subject, padding_mode: str | None, fill: float) -> dict[str, Rule]:
    """Return how each volume of a subject is read outside of itself; a statistic of the whole volume is computed.

    >>> reading_rules(Subject(t1=np.arange(5), mask=np.ones(5, bool)), "median", 0)
    {'t1': ('constant', 2), 'mask': ('constant', True)}
    """
    mode = padding_mode if padding_mode in STATISTIC_PADDING else None
    return {
        name: reading_rule(padding_mode, fill if mode is None else _statistic(volume, mode))
        for name, volume in subject.images.items()
    }


_STATISTICS: WeakKeyDictionary[Volume | LoadedVolume, tuple[Any, dict[str, float]]] = WeakKeyDictionary()
"""Statistics of volumes by their names, with the tensor of a loaded volume that they are of."""


def _statistic(volume: Volume | LoadedVolume, name: str) -> float:
    """Return a statistic of a whole volume; it is computed once, since each grid of a queue asks for it."""
    data = None if isinstance(volume, Volume) else volume.data
    if volume not in _STATISTICS or _STATISTICS[volume][0] is not data:
        _STATISTICS[volume] = data, {}
    _, values = _STATISTICS[volume]
    if name not in values:
        values[name] = padding_value(as_volume(volume), name)
    return values[name]


def as_volume(volume: Volume | LoadedVolume) -> Volume:
    """Return a volume to read boxes of."""
    if isinstance(volume, Volume):
        return volume
    return Volume(volume.data.numpy(force=True), ("c", *(f"axis{i}" for i in range(len(volume.shape)))))


def _read(volume: Volume | LoadedVolume, box: Box, padding_mode: str = "edge", fill: float = 0.0) -> torch.Tensor:
    """Read a box as a new tensor `(C, *box.shape)`."""
    return torch.from_numpy(as_volume(volume).read(box, padding_mode, fill))
