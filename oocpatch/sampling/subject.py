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

import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
import xarray
import zarr

from oocpatch.planning.box import Box, Ints
from oocpatch.planning.choices import STATISTIC_PADDING
from oocpatch.planning.grid import PatchLocation
from oocpatch.sampling.images import (
    WIDER,
    Image,
    LoadedVolume,
    affine_of_image,
    from_duck,
    image_like,
    is_known_to_torchio,
    is_label_map,
    is_torchio_image,
    like_torchio_image,
    readable,
)
from oocpatch.volumes.affine import WORLD, shifted
from oocpatch.volumes.alignment import align
from oocpatch.volumes.padding import padding_value, reading_rule
from oocpatch.volumes.volume import Volume

Rule = tuple[str, float]
"""The rule and the value by which a volume is read outside of itself."""

ARRAYS = (np.ndarray, zarr.Array, zarr.Group, xarray.DataArray, xarray.Dataset)


class Subject:
    """Named volumes of one spatial shape, lazy, plus metadata.

    Arrays (numpy, Zarr, Xarray, Dask), `Volume`s and `Path`s are volumes, with their axes as `Volume` takes them. So
    are torch tensors, which are always `(C, *spatial)`, and images of TorchIO (`ScalarImage`, `LabelMap`), which are
    always `(C, I, J, K)`, also in their patches. All else is metadata, strings included. Axes that have names take the
    order of the first volume with names, and x, y, z beside images of TorchIO; others are laid over it by position.

    Volumes and metadata are attributes and items, which can be set and deleted: `subject.t1`, `subject["t1"]`,
    `subject.images["t1"]`. A volume has `channels`, a `shape` (spatial, in voxels) and an `affine`. Those of patches,
    and of any subject after `load()`, have their voxels in `data`, a tensor `(C, *spatial)`.

    Raises:
        ValueError: when there is no volume, a volume cannot be opened, has looped axes such as time, or differs from
            the others in spatial shape or, where both have them, in the names or the extent of axes, or a name is one
            that `Subject` needs itself.

    >>> subject = Subject(t1=np.zeros((8, 9)), label=np.zeros((8, 9), np.uint8), age=45)
    >>> subject.spatial_shape, list(subject.images), subject.metadata
    ((8, 9), ['t1', 'label'], {'age': 45})

    A tensor replaces the voxels of a volume, whose affine stays:

    >>> subject.t1 = torch.ones(2, 8, 9)
    >>> subject.age = 46
    >>> subject
    Subject(t1 (2, 8, 9), label (1, 8, 9); age)
    """

    _images: dict[str, Image]
    _labels: frozenset[str]
    _metadata: dict[str, Any]
    applied_transforms: list[Any]
    """The history that TorchIO's transforms have recorded."""

    def __init__(self, **volumes_and_metadata: Any) -> None:
        self._images, self._metadata, self._labels = {}, {}, frozenset()
        self.applied_transforms = []
        for name, value in volumes_and_metadata.items():
            if name in RESERVED:
                raise ValueError(f"names of a subject must not be one of {', '.join(sorted(RESERVED))}, got {name!r}")
            if is_image(value):
                self._images[name] = self._opened(name, value)
            else:
                self._metadata[name] = value
        if not self._images:
            has_text = any(isinstance(value, str) for value in self._metadata.values())
            hint = "; strings are metadata, pass a path as pathlib.Path" if has_text else ""
            raise ValueError(
                f"a subject must have at least one volume, got only {list(self._metadata) or 'nothing'}{hint}"
            )
        self._align()
        _ = self.spatial_shape

    def _opened(self, name: str, value: Any) -> Image:
        """Return a value as an image."""
        if is_torchio_image(value) and not is_known_to_torchio(value):
            self._labels |= {name} if is_label_map(value) else set()
            return open_volume(name, value.path)
        return value if is_torchio_image(value) else open_volume(name, value)

    def _align(self) -> None:
        """Give all volumes whose axes have names the order of the first of them, or of the images of TorchIO."""
        opened = {name: image for name, image in self._images.items() if isinstance(image, Volume)}
        names = [name for name, volume in opened.items() if not volume.axes.is_default]
        torchio = next((image for image in self._images.values() if is_torchio_image(image)), None)
        first = opened[names.pop(0)] if names and torchio is None else _frame(torchio) if names else None
        for name in names:
            if first is not None and sorted(opened[name].shape) == sorted(first.shape):  # else their shapes are refused
                self._images[name] = align(name, opened[name], first)[0]

    @property
    def images(self) -> MutableMapping[str, Image]:
        """Volumes by name; setting or deleting one changes the subject."""
        return Images(self._images, self._set_image, self.__delitem__)

    @property
    def metadata(self) -> dict[str, Any]:
        """All values that are not volumes, by name."""
        return self._metadata

    @property
    def spatial_shape(self) -> Ints:
        """Common shape of all volumes, without channels, in voxels.

        Raises:
            ValueError: if the volumes differ in it, as they may in a patch that a transform has changed.
        """
        shapes = {name: readable(image).shape for name, image in self._images.items()}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise ValueError(f"the volumes of a subject must have one spatial shape, got {listed}")
        return next(iter(shapes.values()))

    @property
    def spatial_names(self) -> tuple[str, ...]:
        """Names of the spatial axes of the first volume."""
        return as_volume(next(iter(self._images.values()))).names

    def load(self) -> None:
        """Read all volumes into memory, where `subject.t1.data` is a tensor `(C, *spatial)`."""
        for name, image in self._images.items():
            if is_torchio_image(image):
                image.load()
            elif isinstance(image, Volume):
                tensor = _read(image, Box.of_shape(image.shape))
                self._images[name] = LoadedVolume(tensor, image.affine, name in self._labels)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast all tensors in memory in place, as `torch.Tensor.to` does, and return the subject."""
        for image in self._images.values():
            if isinstance(image, LoadedVolume):
                image.data = image.data.to(*args, **kwargs)
            elif is_torchio_image(image):
                image.to(*args, **kwargs)
        return self

    def is_label(self, name: str) -> bool:
        """Return whether a volume is known to hold labels: one of TorchIO's label maps, or of booleans."""
        image = readable(self._images[name])
        dtype = image.dtype if isinstance(image, Volume) else image.data.dtype
        return name in self._labels or is_label_map(self._images[name]) or dtype in {torch.bool, np.dtype(bool)}

    @property  # type: ignore[misc] # `object` lets it be set
    def __class__(self) -> type[Any]:
        """Class for `isinstance`: TorchIO's as well where all images are its own, since its transforms ask for it."""
        torchio, images = sys.modules.get("torchio"), self.__dict__.get("_images")
        return torchio.Subject if torchio and images and all(map(is_torchio_image, images.values())) else Subject

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.__dict__,)  # pickle compares the class otherwise

    def __setitem__(self, name: str, value: Any) -> None:
        if name in RESERVED or name.startswith("_"):
            raise AttributeError(f"{name!r} of a subject cannot be set; set its volumes and metadata by their names")
        if name in self._images or is_image(value):
            self._set_image(name, value)
        else:
            self._metadata[name] = value

    def _set_image(self, name: str, value: Any) -> None:
        if not is_image(value):
            raise TypeError(
                f"{name!r} is a volume and must be a tensor (C, *spatial), an array or an image, "
                f"got {type(value).__name__}; delete it first to use its name for metadata"
            )
        self._images[name] = self._replacement(name, value)
        self._metadata.pop(name, None)

    def _replacement(self, name: str, value: Any) -> Image:
        """Return a value that is set as an image: a tensor or an array takes kind and affine of the one it replaces."""
        like = self._images.get(name, next(iter(self._images.values())))
        ndim = len(readable(like).shape)
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value.copy())
            value = value[None] if value.ndim == ndim else value
        if not isinstance(value, torch.Tensor):
            return self._opened(name, value)
        if value.ndim != ndim + 1:
            raise ValueError(
                f"{name!r} must have shape (C, *spatial) with {ndim} spatial axes, got {tuple(value.shape)}"
            )
        if name not in self._images and not is_torchio_image(like):
            return LoadedVolume(value, affine_of_image(like))
        if name in self._labels:
            return LoadedVolume(value, affine_of_image(like), is_label=True)
        return image_like(like, value, affine_of_image(like))

    def __delitem__(self, name: str) -> None:
        if name in self._metadata:
            del self._metadata[name]
        elif list(self._images) == [name]:
            raise ValueError(f"a subject must have at least one volume, and {name!r} is its last")
        else:
            del self._images[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name == "applied_transforms":
            object.__setattr__(self, name, value)
        else:
            self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise AttributeError(f"the subject has no {name!r}")
        del self[name]

    def __getattr__(self, name: str) -> Any:
        # No stored name begins with an underscore; pickle looks up such names before `_images` exists.
        if not name.startswith("_") and name in self:
            return self[name]
        if name == "shape":
            first = readable(next(iter(self._images.values())))
            return (first.channels, *first.shape)
        if name in {"affine", "spacing", "orientation", "origin", "device"} and self._images:  # as TorchIO's subjects
            return getattr(next(iter(self._images.values())), name)
        raise AttributeError(f"the subject has no {name!r}")

    def __getitem__(self, name: str) -> Any:
        return self._images[name] if name in self._images else self._metadata[name]

    def __contains__(self, name: object) -> bool:
        return name in self._images or name in self._metadata

    def __iter__(self) -> Iterator[str]:
        return iter(self._images)

    def __repr__(self) -> str:
        volumes = ", ".join(
            f"{name} ({v.channels}, {', '.join(map(str, v.shape))})"
            for name, v in ((name, readable(image)) for name, image in self._images.items())
        )
        return f"Subject({volumes}; {', '.join(self._metadata) or 'no metadata'})"


RESERVED = frozenset(name for name in dir(Subject) if not name.startswith("_"))


class Images(MutableMapping[str, Image]):
    """The volumes of a subject or a batch by name; they are set and deleted by its own rules."""

    def __init__(
        self, images: Mapping[str, Image], set_image: Callable[[str, Any], None], delete: Callable[[str], None]
    ) -> None:
        self._images, self._set_image, self._delete = images, set_image, delete

    def __getitem__(self, name: str) -> Image:
        return self._images[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._set_image(name, value)

    def __delitem__(self, name: str) -> None:
        if name not in self._images:
            raise KeyError(name)
        self._delete(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._images)

    def __len__(self) -> int:
        return len(self._images)

    def __repr__(self) -> str:
        return repr(self._images)


def is_image(value: Any) -> bool:
    """Return whether a subject takes a value as a volume rather than as metadata."""
    kinds = (*ARRAYS, torch.Tensor, Volume, LoadedVolume, os.PathLike)
    return (
        isinstance(value, kinds)
        or (hasattr(value, "dask") and hasattr(value, "chunksize"))
        or is_torchio_image(value)
        or like_torchio_image(value)
    )


def as_subject(value: Any, name: str = "subject") -> Subject:
    """Return a subject, from one of TorchIO as well: with its images and metadata, without points and boxes.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(value, Subject):
        return value
    if isinstance(getattr(value, "images", None), Mapping) and isinstance(getattr(value, "metadata", None), Mapping):
        subject = Subject(**value.images, **value.metadata)
        subject.applied_transforms = list(getattr(value, "applied_transforms", ()))
        return subject
    raise TypeError(f"{name} must be a Subject of oocpatch or of TorchIO, got {type(value).__name__}")


def open_volume(name: str, value: Any) -> Volume | LoadedVolume:
    """Return a value as a volume without looped axes."""
    if isinstance(value, LoadedVolume):
        return value
    try:
        if isinstance(value, torch.Tensor):
            return LoadedVolume(value)
        if not isinstance(value, Volume) and like_torchio_image(value):
            value = from_duck(value)
        if isinstance(value, LoadedVolume):
            return value
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


def _restored(state: dict[str, Any]) -> Subject:
    """Return a subject from its attributes, whose dicts and lists become its own: it may be a copy."""
    subject = object.__new__(Subject)
    subject.__dict__.update({name: copy.copy(value) for name, value in state.items()})
    return subject


def _frame(image: Image) -> Volume:
    """Return a volume with the axes of an image of TorchIO."""
    volume = readable(image)
    return volume if isinstance(volume, Volume) else Volume(volume.data.numpy(force=True), ("c", *WORLD))


def volumes_of(subject: Subject) -> dict[str, Volume | LoadedVolume]:
    """Return the volumes by which the images of a subject are read."""
    return {name: readable(image) for name, image in subject.images.items()}


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
    data = {name: _read(image, box, *padding.get(name, ())) for name, image in subject.images.items()}
    affines = {name: affine_of_image(image) for name, image in subject.images.items()}
    like = {
        name: LoadedVolume(data[name], affines[name], subject.is_label(name)) if isinstance(image, Volume) else image
        for name, image in subject.images.items()
    }
    patches = []
    for location in locations:
        part = (slice(None), *location.box.slices(box.start))
        # clones: a view would keep the whole box in memory
        tensors = data if len(locations) == 1 else {name: tensor[part].clone() for name, tensor in data.items()}
        images = {
            name: image_like(like[name], tensor, shifted(affines[name], location.index))
            for name, tensor in tensors.items()
        }
        metadata = {**subject.metadata, "patch_location": location}
        # without the checks of a new subject, which are those of the subject that is read
        patches.append(
            _restored({"_images": images, "_metadata": metadata, "_labels": frozenset(), "applied_transforms": []})
        )
    return patches


def reading_rules(subject: Subject, padding_mode: str | None, fill: float) -> dict[str, Rule]:
    """Return how each volume of a subject is read outside of itself; a statistic of the whole volume is computed.

    >>> reading_rules(Subject(t1=np.arange(5), mask=np.ones(5, bool)), "median", 0)
    {'t1': ('constant', 2), 'mask': ('constant', True)}
    """
    mode = padding_mode if padding_mode in STATISTIC_PADDING else None
    return {
        name: reading_rule(padding_mode, fill if mode is None else _statistic(volume, mode))
        for name, volume in volumes_of(subject).items()
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


def as_volume(image: Image) -> Volume:
    """Return a volume to read boxes of."""
    volume = readable(image)
    if isinstance(volume, Volume):
        return volume
    return Volume(volume.data.numpy(force=True), ("c", *(f"axis{i}" for i in range(len(volume.shape)))))


def _read(image: Image, box: Box, padding_mode: str = "edge", fill: float = 0.0) -> torch.Tensor:
    """Read a box as a new tensor `(C, *box.shape)`."""
    volume = readable(image)
    if isinstance(volume, LoadedVolume) and box in Box.of_shape(volume.shape):
        return volume.data[(slice(None), *box.slices())].detach().to("cpu", copy=True).contiguous()
    tensor = torch.from_numpy(as_volume(volume).read(box, padding_mode, fill))
    return tensor.to(WIDER.get(tensor.dtype, tensor.dtype)) if is_torchio_image(image) else tensor
