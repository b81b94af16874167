"""OME-Zarr (NGFF 0.4 and 0.5) as metadata: axes, levels of a pyramid, and the coordinates that they stand for.

Read from and written to plain dicts; no array is touched. In 0.4 the metadata are a group's attributes, in 0.5 they
are its attribute `ome`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray
import zarr

VERSIONS = ("0.5", "0.4")
METERS = {
    "angstrom": -10,
    "femtometer": -15,
    "picometer": -12,
    "nanometer": -9,
    "micrometer": -6,
    "millimeter": -3,
    "centimeter": -2,
    "decimeter": -1,
    "meter": 0,
    "kilometer": 3,
}
"""Powers of ten of units of space, by their long names."""

SHORT = {
    "pm": "picometer",
    "nm": "nanometer",
    "um": "micrometer",
    "\u00b5m": "micrometer",  # the micro sign
    "\u03bcm": "micrometer",  # the Greek letter
    "micron": "micrometer",
    "microns": "micrometer",
    "mm": "millimeter",
    "cm": "centimeter",
    "m": "meter",
    "km": "kilometer",
    "\u00e5": "angstrom",
    "ns": "nanosecond",
    "us": "microsecond",
    "ms": "millisecond",
    "s": "second",
    "sec": "second",
    "min": "minute",
    "h": "hour",
    "d": "day",
}


def long_unit(name: object) -> str | None:
    """The name of a unit as OME-Zarr wants it: viewers refuse short ones.

    >>> long_unit("um"), long_unit("micrometers"), long_unit("second"), long_unit(None)
    ('micrometer', 'micrometer', 'second', None)
    """
    if not isinstance(name, str) or not name.strip():
        return None
    text = name.strip()
    plain = text.lower().replace("metre", "meter")
    if text in SHORT or plain in SHORT:
        return SHORT.get(text, SHORT.get(plain))
    singular = plain.removesuffix("s")
    known = {*METERS, *SHORT.values()}
    return singular if singular in known else plain if plain in known else text


@dataclass(frozen=True, slots=True)
class OmeAxis:
    """One axis: its name, its kind (`space`, `time`, `channel` or another) and its unit, if it has one."""

    name: str
    kind: str | None = None
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class OmeLevel:
    """One level of a pyramid.

    Attributes:
        path: of its array, in the group.
        scale: distance of two voxels' centres, per axis.
        translation: where the centre of the first voxel lies, per axis.
    """

    path: str
    scale: tuple[float, ...]
    translation: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Multiscale:
    """One image as a pyramid: axes, and levels from the finest to the coarsest."""

    axes: tuple[OmeAxis, ...]
    levels: tuple[OmeLevel, ...]
    name: str = ""

    def find(self, level: int | str, shapes: Sequence[Sequence[int]], address: str) -> OmeLevel:
        """The level of a number (negative: from the end) or a path.

        Raises:
            ValueError: when there is none, with those that there are.
        """
        with contextlib.suppress(IndexError, StopIteration):
            if isinstance(level, str):
                return next(found for found in self.levels if found.path == level)
            return self.levels[level]
        told = ", ".join(
            f"{number} ({found.path}: {' x '.join(map(str, shape))})"
            for number, (found, shape) in enumerate(zip(self.levels, shapes, strict=True))
        )
        raise ValueError(f"level must be one of those of {address}, {told}; got {level!r}")

    def roles(self) -> tuple[str, ...]:
        """One name per axis that tells its role: `c` for channels, `t` for time, its own for all others."""
        return tuple({"channel": "c", "time": "t"}.get(axis.kind or "", axis.name) for axis in self.axes)

    def coords(self, level: OmeLevel, shape: Sequence[int]) -> dict[str, xarray.Variable]:
        """The coordinates that a level's scale, translation and units stand for; none where they say nothing.

        >>> axes = (OmeAxis("y", "space", "um"), OmeAxis("x", "space"))
        >>> coords = Multiscale(axes, ()).coords(OmeLevel("0", (2.0, 1.0), (5.0, 0.0)), (3, 4))
        >>> coords["y"].values.tolist(), coords["y"].attrs, "x" in coords
        ([5.0, 7.0, 9.0], {'units': 'micrometer'}, False)
        """
        found = {}
        for axis, n, scale, start in zip(self.axes, shape, level.scale, level.translation, strict=True):
            unit = long_unit(axis.unit)
            if axis.kind != "channel" and ((scale, start) != (1, 0) or unit):
                found[axis.name] = coordinate(axis.name, n, scale, start, unit)
        return found


def coordinate(name: str, n: int, scale: float, start: float, unit: str | None) -> xarray.Variable:
    """A 1-D coordinate of evenly spaced centres."""
    return xarray.Variable((name,), np.arange(n) * float(scale) + float(start), {"units": unit} if unit else {})


def ome_attributes(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The OME metadata among a group's attributes, those of 0.4 and of 0.5 alike."""
    ome = attributes.get("ome", attributes)
    return ome if isinstance(ome, Mapping) else {}


def read_multiscale(attributes: Mapping[str, Any], address: str) -> Multiscale | None:
    """The first image that a group's attributes describe; None when there is none.

    Raises:
        ValueError: when they cannot be understood.
    """
    found = ome_attributes(attributes).get("multiscales")
    if not found:
        return None
    try:
        return _parse(found[0])
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"OME-Zarr metadata of {address} cannot be read: {told}") from error


def _parse(multiscale: Mapping[str, Any]) -> Multiscale:
    axes = tuple(_axis(axis) for axis in multiscale.get("axes", ()))
    common = _transforms(multiscale.get("coordinateTransformations"), len(axes))
    levels = []
    for dataset in multiscale["datasets"]:
        scale, start = _transforms(dataset.get("coordinateTransformations"), len(axes))
        scale, start = (  # what is said of the whole image comes after what is said of the level
            tuple(a * b for a, b in zip(common[0], scale, strict=True)),
            tuple(a * b + c for a, b, c in zip(common[0], start, common[1], strict=True)),
        )
        levels.append(OmeLevel(str(dataset["path"]).strip("/"), scale, start))
    if not levels:
        raise ValueError("the pyramid has no levels")
    return Multiscale(axes, tuple(levels), str(multiscale.get("name") or ""))


def _axis(axis: Any) -> OmeAxis:
    if not isinstance(axis, Mapping):  # before 0.4 an axis was its name
        axis = {"name": str(axis)}
    name, kind, unit = str(axis["name"]), axis.get("type"), axis.get("unit")
    kind = str(kind) if kind else {"c": "channel", "t": "time"}.get(name, "space")
    return OmeAxis(name, kind, str(unit) if unit else None)


def _transforms(found: Sequence[Mapping[str, Any]] | None, ndim: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    by_type = {t["type"]: t for t in found or ()}
    values = {}
    for kind, neutral in (("scale", 1.0), ("translation", 0.0)):
        given = by_type.get(kind, {}).get(kind)
        values[kind] = (neutral,) * ndim if given is None else tuple(float(v) for v in given)
        if len(values[kind]) != ndim:
            raise ValueError(f"{kind} must have one value per axis, got {values[kind]} for {ndim} axes")
    return values["scale"], values["translation"]


def images_inside(group: zarr.Group) -> list[str]:
    """Paths of the images in a group that is not one itself: a plate, a well, a series, a list of labels.

    Only metadata that list images are read: a plate with thousands of wells is not walked through.
    """
    ome = ome_attributes(dict(group.attrs))
    return list(dict.fromkeys(_inside(group, ome)))


def _inside(group: zarr.Group, ome: Mapping[str, Any]) -> Iterator[str]:
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        for path in ome.get("labels") or ():
            yield str(path)
        for image in (ome.get("well") or {}).get("images") or ():
            yield str(image["path"])
        wells = [str(well["path"]) for well in (ome.get("plate") or {}).get("wells") or ()]
        for well in wells[:4]:
            inner = ome_attributes(dict(group[well].attrs))
            yield from (f"{well}/{image['path']}" for image in inner["well"]["images"])
        yield from (f"{well}/0" for well in wells[4:])
        if "bioformats2raw.layout" in ome or "OME" in group:
            listed = ome_attributes(dict(group["OME"].attrs)).get("series") if "OME" in group else None
            names = [str(n) for n in listed] if listed else sorted(filter(str.isdecimal, group.group_keys()), key=int)
            yield from names
