"""Images of a subject: volumes on disk, volumes in memory, and images of TorchIO, which stay what they are.

An image of TorchIO is known by what it has, and TorchIO is never imported here. Its voxels are read by `Volume` where
its file is of a format that that reads in parts, else TorchIO loads them.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from oocpatch.planning.box import Ints
from oocpatch.volumes.affine import WORLD, Affine, orientation_of, spacing_of
from oocpatch.volumes.volume import Volume

MISSING = object()
"""The attribute that a value does not have."""

WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
"""Dtypes that TorchIO's images do not have, each with the one that they have instead."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class LoadedVolume:
    """A volume in memory.

    Attributes:
        data: tensor `(C, *spatial)`. A transform may put another in its place.
        affine: matrix from indices of voxels to the world; default: the identity.
        is_label: whether the values are labels, which transforms must not interpolate.

    >>> volume = LoadedVolume(torch.zeros(2, 8, 9), np.diag([0.5, 2.0, 1.0]))
    >>> volume.channels, volume.shape, volume.spacing
    (2, (8, 9), (0.5, 2.0))

    Raises:
        ValueError: if the tensor has no axis besides the channels.
    """

    data: torch.Tensor
    affine: Affine = field(default_factory=lambda: np.empty(0))
    is_label: bool = False

    def __post_init__(self) -> None:
        if self.data.ndim < 2:
            raise ValueError(f"a tensor must have shape (C, *spatial), got {tuple(self.data.shape)}")
        self.affine = np.asarray(self.affine, np.float64) if len(self.affine) else np.eye(self.data.ndim)

    def __repr__(self) -> str:
        return f"LoadedVolume({tuple(self.data.shape)}, {self.data.dtype})"

    @property
    def channels(self) -> int:
        return int(self.data.shape[0])

    @property
    def shape(self) -> Ints:
        """Spatial shape, in voxels."""
        return tuple(self.data.shape[1:])

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance of neighbouring voxels along each axis, in the world."""
        return spacing_of(self.affine)

    @property
    def origin(self) -> tuple[float, ...]:
        """Place of the first voxel in the world."""
        return tuple(self.affine[:-1, -1].tolist())

    @property
    def orientation(self) -> tuple[str, ...]:
        """Directions of three axes, as `("R", "A", "S")`."""
        return orientation_of(self.affine)


Image = Any
"""A `Volume`, a `LoadedVolume` or an image of TorchIO."""


def is_torchio_image(value: Any) -> bool:
    """Return whether a value is an image of TorchIO."""
    return all(hasattr(type(value), name) for name in ("new_like", "affine", "num_channels"))


def like_torchio_image(value: Any) -> bool:
    """Return whether a value has what an image needs: an affine, and a path or a tensor with channels and two axes.

    TorchIO's points and boxes have a tensor `(N, axes)` and an affine, and are none. Images with a path are not loaded.
    """
    has = {name for name in ("affine", "data", "path") if inspect.getattr_static(value, name, MISSING) is not MISSING}
    return "affine" in has and ("path" in has or ("data" in has and getattr(value.data, "ndim", 0) > 2))


def is_label_map(image: Image) -> bool:
    """Return whether an image holds labels: it is TorchIO's `LabelMap` or a subclass, or a volume that says so."""
    return bool(getattr(image, "is_label", False)) or any(c.__name__ == "LabelMap" for c in type(image).__mro__)


def from_duck(value: Any) -> LoadedVolume | Volume:
    """Return a value that only looks like an image of TorchIO as a volume."""
    data = getattr(value, "data", None)
    if data is None:
        return Volume(value.path)
    tensor = torch.as_tensor(data)
    return LoadedVolume(tensor, _matrix(value.affine), is_label_map(value))


def image_like(image: Image, data: torch.Tensor, affine: Affine) -> Image:
    """Return an image of the same kind with other voxels, in memory."""
    if is_torchio_image(image):
        return type(image)(data, affine=affine, **image.metadata)
    return LoadedVolume(data, affine, is_label_map(image))


def affine_of_image(image: Image) -> Affine:
    """Return the affine of an image as an array."""
    return _matrix(image.affine)


def _matrix(affine: Any) -> Affine:
    data = getattr(affine, "data", affine)  # TorchIO's matrix, or a tensor
    return np.asarray(data.numpy(force=True) if isinstance(data, torch.Tensor) else affine, np.float64)


_READERS: WeakKeyDictionary[Any, tuple[Any, Volume | LoadedVolume]] = WeakKeyDictionary()
"""Volumes by which images of TorchIO are read, each with the tensor or the path that it reads."""


def readable(image: Image) -> Volume | LoadedVolume:
    """Return a volume to read parts of an image, without loading it where its format allows that."""
    if isinstance(image, Volume | LoadedVolume):
        return image
    source = image.data if image.is_loaded else image.path
    if image not in _READERS or _READERS[image][0] is not source:
        volume: Volume | LoadedVolume | None = None if image.is_loaded or source is None else _open_file(image)
        if volume is None or image.is_loaded:  # a reader of the user's own loads an image when its shape is asked for
            source = image.data
            volume = LoadedVolume(source, affine_of_image(image), is_label_map(image))
        _READERS[image] = source, volume
    return _READERS[image][1]


def _open_file(image: Any) -> Volume | None:
    """Open the file of an image of TorchIO as a volume with its axes in the order I, J, K; None if that is not its own.

    A file with other axes or another shape than TorchIO reads is left to TorchIO.
    """
    with contextlib.suppress(ValueError, TypeError, ImportError, OSError):
        volume = Volume(os.fspath(image.path))
        if volume.axes.names == ("x", "y", "z", "t"):  # TorchIO takes time for the channels
            volume = Volume(volume.source, ("x", "y", "z", "c"))
        if sorted(volume.names) == list(WORLD):
            order = tuple(volume.axes.names.index(name) for name in WORLD)
            volume = Volume(volume.source, replace(volume.axes, sequence=order))
            return volume if (volume.channels, *volume.shape) == tuple(image.shape) else None
    return None


def is_known_to_torchio(image: Any) -> bool:
    """Return whether TorchIO can read an image, from its header."""
    try:
        return len(image.shape) > 0
    except Exception:  # noqa: BLE001 - those of its readers
        return False
