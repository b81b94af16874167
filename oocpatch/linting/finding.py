"""What is found, and the image that rules look at."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import zarr

from oocpatch.volumes.ome_metadata import Multiscale, ome_attributes, read_multiscale


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault.

    Attributes:
        place: the group or array in the container; empty for the container itself.
        rule: short name of the rule that is broken.
        message: the rule, the values, and what to do.
    """

    place: str
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.place or '.'}: {self.message} [{self.rule}]"


@dataclass(frozen=True)
class ImageNode:
    """One image as its metadata describe it.

    Attributes:
        group: its group.
        place: the path of the group in the container.
        ome: its OME metadata.
        pyramid: axes and levels.
        arrays: of the levels; None where there is none.
    """

    group: zarr.Group
    place: str
    ome: Mapping[str, Any]
    pyramid: Multiscale
    arrays: tuple[zarr.Array[Any] | None, ...]

    @classmethod
    def of(cls, group: zarr.Group, place: str) -> ImageNode:
        """The image of a group.

        Raises:
            ValueError: when its metadata cannot be understood, or there is no image.
        """
        attributes = dict(group.attrs)
        pyramid = read_multiscale(attributes, place or "the container")
        if pyramid is None:
            raise ValueError(f"a group that is listed as an image must have multiscales, {place or '.'} has none")
        arrays = tuple(array_at(group, level.path) for level in pyramid.levels)
        return cls(group, place, ome_attributes(attributes), pyramid, arrays)

    def at(self, path: str) -> str:
        """A path of the group, in the container."""
        return f"{self.place}/{path}".strip("/")

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(axis.name for axis in self.pyramid.axes)

    @property
    def multiscale(self) -> Mapping[str, Any]:
        """The metadata that `pyramid` was read from."""
        found: Mapping[str, Any] = self.ome["multiscales"][0]
        return found

    def lengths(self) -> dict[str, int]:
        """Length of each axis, of the finest level."""
        finest = self.arrays[0]
        return {} if finest is None else dict(zip(self.axes, finest.shape, strict=False))


def node_at(group: zarr.Group, path: str) -> zarr.Array[Any] | zarr.Group | None:
    """What lies at a path; None where nothing does that can be read."""
    with contextlib.suppress(Exception):  # whatever is wrong with it, it is not there for a reader
        return group[path] if path else group
    return None


def array_at(group: zarr.Group, path: str) -> zarr.Array[Any] | None:
    """The array at a path, if there is one."""
    found = node_at(group, path)
    return found if isinstance(found, zarr.Array) else None


def group_at(group: zarr.Group, path: str) -> zarr.Group | None:
    """The group at a path, if there is one."""
    found = node_at(group, path)
    return found if isinstance(found, zarr.Group) else None
