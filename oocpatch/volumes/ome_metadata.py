"""Metadata of OME-Zarr (NGFF 0.4 to 0.6): axes, levels of a pyramid, units and the coordinates they define.

Metadata are read from plain dicts; no array is read. In 0.4 they are the attributes of a group, from 0.5 on its
attribute `ome`. In 0.6 a coordinate system has the axes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray
import zarr

from oocpatch.errors import error_line

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
"""Powers of ten of units of space, by their names in OME-Zarr."""

ABBREVIATIONS = {
    "angstrom": "\u00e5",
    "picometer": "pm",
    "nanometer": "nm",
    "micrometer": "um \u00b5m \u03bcm \\u00b5m micron microns",  # micro sign, Greek letter, ImageJ's escape
    "millimeter": "mm",
    "centimeter": "cm",
    "meter": "m",
    "kilometer": "km",
    "nanosecond": "ns",
    "microsecond": "us usec",
    "millisecond": "ms msec",
    "second": "s sec",
    "minute": "min",
    "hour": "h",
    "day": "d",
}
LONG_NAMES = {short: name for name, abbreviations in ABBREVIATIONS.items() for short in abbreviations.split()}


def long_unit(name: object) -> str | None:
    """Return the name of a unit in OME-Zarr, since viewers refuse abbreviations; an unknown unit is returned as it is.

    >>> long_unit("um"), long_unit("micrometers"), long_unit("second"), long_unit(None)
    ('micrometer', 'micrometer', 'second', None)
    """
    if not isinstance(name, str) or not name.strip():
        return None
    text = name.strip()
    lower = text.lower().replace("metre", "meter")
    if name_of_unit := LONG_NAMES.get(text, LONG_NAMES.get(lower)):
        return name_of_unit
    known = {*METERS, *ABBREVIATIONS}
    return next((name for name in (lower.removesuffix("s"), lower) if name in known), text)


@dataclass(frozen=True, slots=True)
class OmeAxis:
    """An axis: its name, its kind (`space`, `time`, `channel` or another) and its unit, if it has one."""

    name: str
    kind: str | None = None
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class OmeLevel:
    """A level of a pyramid.

    Attributes:
        path: path of its array in the group.
        scale: distance of adjacent voxels' centres, per axis.
        translation: coordinate of the first voxel's centre, per axis.
    """

    path: str
    scale: tuple[float, ...]
    translation: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Multiscale:
    """An image as a pyramid: axes, and levels from the finest to the coarsest.

    Attributes:
        negated: names of axes whose stored scales and translations are those of the opposite direction, since NGFF has
            no negative ones. Those of `levels` are negative where the image was read.
    """

    axes: tuple[OmeAxis, ...]
    levels: tuple[OmeLevel, ...]
    name: str = ""
    negated: tuple[str, ...] = ()

    def find(self, level: int | str, shapes: Sequence[Sequence[int] | None], address: str) -> OmeLevel:
        """Return a level by its path, or by its number, which counts from the end if negative.

        Raises:
            ValueError: if there is none; the message lists the levels.
        """
        with contextlib.suppress(IndexError, StopIteration):
            if isinstance(level, str):
                return next(item for item in self.levels if item.path == level)
            return self.levels[level]
        raise ValueError(f"level must be one of those of {address}, {self.listed(shapes)}; got {level!r}")

    def listed(self, shapes: Sequence[Sequence[int] | None]) -> str:
        """Return the numbers, paths and shapes of the levels; None is the shape of one that is missing."""
        return ", ".join(
            f"{number} ({item.path}: {'is missing' if shape is None else ' x '.join(map(str, shape))})"
            for number, (item, shape) in enumerate(zip(self.levels, shapes, strict=True))
        )

    def roles(self) -> tuple[str, ...]:
        """Return the role of each axis: `c` for channels, `t` for time, the name for all others."""
        return tuple({"channel": "c", "time": "t"}.get(axis.kind or "", axis.name) for axis in self.axes)

    def coords(self, level: OmeLevel, shape: Sequence[int]) -> dict[str, xarray.Variable]:
        """Return the coordinates that a level's scale, translation and units define; none for an axis without them.

        >>> axes = (OmeAxis("y", "space", "um"), OmeAxis("x", "space"))
        >>> coords = Multiscale(axes, ()).coords(OmeLevel("0", (2.0, 1.0), (5.0, 0.0)), (3, 4))
        >>> coords["y"].values.tolist(), coords["y"].attrs, "x" in coords
        ([5.0, 7.0, 9.0], {'units': 'micrometer'}, False)
        """
        coords = {}
        for axis, n, scale, start in zip(self.axes, shape, level.scale, level.translation, strict=True):
            if axis.kind != "channel" and ((scale, start) != (1, 0) or long_unit(axis.unit)):
                coords[axis.name] = coordinate(axis.name, n, scale, start, axis.unit)
        return coords


def coordinate(name: str, n: int, step: float, start: float = 0.0, unit: str | None = None) -> xarray.Variable:
    """Return a 1-D coordinate of `n` evenly spaced centres.

    >>> coordinate("x", 3, 0.5, unit="um").values.tolist(), coordinate("x", 3, 0.5, unit="um").attrs
    ([0.0, 0.5, 1.0], {'units': 'micrometer'})
    """
    attrs = {"units": name_of_unit} if (name_of_unit := long_unit(unit)) else {}
    return xarray.Variable((name,), np.arange(n) * float(step) + float(start), attrs)


def ome_attributes(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the OME metadata among the attributes of a group, in 0.4 or 0.5."""
    ome = attributes.get("ome", attributes)
    return ome if isinstance(ome, Mapping) else {}


def read_multiscales(attributes: Mapping[str, Any], address: str) -> list[Multiscale]:
    """Return the images that the attributes of a group describe, mostly one or none.

    Raises:
        ValueError: if the metadata are invalid.
    """
    ome = ome_attributes(attributes)
    try:
        return [_parse(multiscale) for multiscale in ome.get("multiscales") or ()]
    except Exception as error:
        version = f" (version {ome['version']})" if "version" in ome else ""
        raise ValueError(f"OME-Zarr metadata of {address}{version} cannot be read: {error_line(error)}") from error


def choose_multiscale(
    multiscales: Sequence[Multiscale], level: int | str, address: str
) -> tuple[Multiscale, int | str]:
    """Return an image of a group, and the level in it.

    The first image is taken, with a warning if there are several; `level` may be the path of a level of another one, or
    its name, for its level 0.
    """
    if isinstance(level, str):
        for multiscale in multiscales:
            if any(item.path == level for item in multiscale.levels):
                return multiscale, level
        for multiscale in multiscales:
            if level and multiscale.name == level:
                return multiscale, 0
    if len(multiscales) > 1:
        images = [f"{m.name or 'without a name'} ({', '.join(item.path for item in m.levels)})" for m in multiscales]
        warnings.warn(
            f"{address} holds {len(images)} images; the first of them was opened: {'; '.join(images)}. "
            "Pass level= with the path of a level, or the name, to open another one",
            stacklevel=2,
        )
    return multiscales[0], level


def _parse(multiscale: Mapping[str, Any]) -> Multiscale:
    systems = multiscale.get("coordinateSystems")
    if systems:
        return _parse_systems(multiscale, systems)
    axes = tuple(_axis(axis) for axis in multiscale.get("axes", ()))
    metadata = multiscale.get("metadata")
    is_ours = isinstance(metadata, Mapping) and metadata.get("method") == "oocpatch"
    negated = metadata.get("negated_axes", ()) if isinstance(metadata, Mapping) and is_ours else ()
    common = _transforms(multiscale.get("coordinateTransformations"), len(axes))
    levels = []
    for dataset in multiscale["datasets"]:
        scale, start = _transforms(dataset.get("coordinateTransformations"), len(axes))
        scale, start = (  # the transformations of the image apply after those of the level
            tuple(a * b for a, b in zip(common[0], scale, strict=True)),
            tuple(a * b + c for a, b, c in zip(common[0], start, common[1], strict=True)),
        )
        signs = [-1.0 if axis.name in negated else 1.0 for axis in axes]
        scale = tuple(a * sign for a, sign in zip(scale, signs, strict=True))
        start = tuple(a * sign for a, sign in zip(start, signs, strict=True))
        levels.append(OmeLevel(str(dataset["path"]).strip("/"), scale, start))
    if not levels:
        raise ValueError("the pyramid has no levels")
    return Multiscale(axes, tuple(levels), str(multiscale.get("name") or ""))


def _parse_systems(multiscale: Mapping[str, Any], systems: Sequence[Mapping[str, Any]]) -> Multiscale:
    """Parse an image of version 0.6: its levels lie in one coordinate system, which has the axes.

    Transformations of the image lead from that system to others, and do not apply.
    """
    by_name = {str(system["name"]): system for system in systems}
    levels: list[OmeLevel] = []
    names: list[str] = []
    for dataset in multiscale["datasets"]:
        transformations: Sequence[Mapping[str, Any]] = dataset.get("coordinateTransformations") or ()
        if len(transformations) != 1:
            raise ValueError(f"a level must have one transformation, got {len(transformations)}")
        output = transformations[0].get("output")
        names.append(str(output.get("name") if isinstance(output, Mapping) else output))
        if names[-1] not in by_name or names[-1] != names[0]:
            raise ValueError(f"all levels must lie in one of the coordinate systems {list(by_name)}, got {names[-1]!r}")
        ndim = len(by_name[names[0]]["axes"])
        scale, start = _composed(transformations[0], (1.0,) * ndim, (0.0,) * ndim)
        levels.append(OmeLevel(str(dataset["path"]).strip("/"), scale, start))
    if not levels:
        raise ValueError("the pyramid has no levels")
    axes = tuple(_axis(axis) for axis in by_name[names[0]]["axes"])
    return Multiscale(axes, tuple(levels), str(multiscale.get("name") or ""))


def _composed(
    transformation: Mapping[str, Any], scale: tuple[float, ...], start: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return scale and translation after another transformation.

    >>> steps = [{"type": "scale", "scale": [2.0]}, {"type": "translation", "translation": [3.0]}]
    >>> _composed({"type": "sequence", "transformations": steps}, (1.0,), (0.0,))
    ((2.0,), (3.0,))
    """
    kind = str(transformation.get("type"))
    if kind == "sequence":
        for step in transformation["transformations"]:
            scale, start = _composed(step, scale, start)
        return scale, start
    if kind == "identity":
        return scale, start
    if kind not in ("scale", "translation") or kind not in transformation:
        raise ValueError(f"a level must be scaled and translated, got a transformation of type {kind!r}")
    numbers = tuple(float(v) for v in transformation[kind])
    if len(numbers) != len(scale):
        raise ValueError(f"{kind} must have one value per axis, got {numbers} for {len(scale)} axes")
    if kind == "translation":
        return scale, tuple(a + b for a, b in zip(start, numbers, strict=True))
    return (
        tuple(a * b for a, b in zip(scale, numbers, strict=True)),
        tuple(a * b for a, b in zip(start, numbers, strict=True)),
    )


def _axis(axis: Any) -> OmeAxis:
    if not isinstance(axis, Mapping):  # before 0.4 an axis was its name
        axis = {"name": str(axis)}
    name, kind, unit = str(axis["name"]), axis.get("type"), axis.get("unit")
    kind = str(kind) if kind else {"c": "channel", "t": "time"}.get(name, "space")
    return OmeAxis(name, kind, str(unit) if unit else None)


def _transforms(stored: Sequence[Mapping[str, Any]] | None, ndim: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    by_type = {t["type"]: t for t in stored or ()}
    values = {}
    for kind, neutral in (("scale", 1.0), ("translation", 0.0)):
        numbers = by_type.get(kind, {}).get(kind)
        values[kind] = (neutral,) * ndim if numbers is None else tuple(float(v) for v in numbers)
        if len(values[kind]) != ndim:
            raise ValueError(f"{kind} must have one value per axis, got {values[kind]} for {ndim} axes")
    return values["scale"], values["translation"]


def channel_display(attributes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return colour and visibility of channels by their names, from the `omero` metadata of an image.

    >>> channel_display({"omero": {"channels": [{"label": "DAPI", "color": "0000ff", "active": True}]}})
    {'DAPI': {'color': '0000FF', 'active': True}}
    """
    omero = ome_attributes(attributes).get("omero")
    channels = omero.get("channels") if isinstance(omero, Mapping) else None
    display: dict[str, dict[str, Any]] = {}
    for number, channel in enumerate(channels if isinstance(channels, list) else ()):
        settings = channel if isinstance(channel, Mapping) else {}
        label, colour = str(settings.get("label") or f"channel {number}"), str(settings.get("color", "")).lstrip("#")
        is_colour = len(colour) == len("RRGGBB") and not set(colour.upper()) - set("0123456789ABCDEF")
        label = label if label not in display else f"{label} ({number})"
        display[label] = {"color": colour.upper()} if is_colour else {}
        display[label] |= {"active": settings["active"]} if isinstance(settings.get("active"), bool) else {}
    return display


def images_inside(group: zarr.Group) -> list[str]:
    """Return the paths of the images in a group that is a plate, a well, a series or a list of labels.

    Only metadata that list images are read: a plate with thousands of wells is not walked through. Of the first wells,
    those that are missing are left out.
    """
    return list(dict.fromkeys(_image_paths(group, ome_attributes(dict(group.attrs)))))


def _image_paths(group: zarr.Group, ome: Mapping[str, Any]) -> Iterator[str]:
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        yield from map(str, ome.get("labels") or ())
        yield from _fields(ome)
        wells = [str(well["path"]) for well in (ome.get("plate") or {}).get("wells") or ()]
        shown = 0
        for number, well in enumerate(wells):
            if shown == 4:
                yield from (f"{other}/0" for other in wells[number:])
                break
            with contextlib.suppress(KeyError, TypeError, AttributeError, OSError, ValueError):
                fields = list(_fields(ome_attributes(dict(group[well].attrs))))
                shown += 1
                yield from (f"{well}/{field}" for field in fields)
        if "bioformats2raw.layout" in ome or "OME" in group:
            series = ome_attributes(dict(group["OME"].attrs)).get("series") if "OME" in group else None
            yield from map(str, series or sorted(filter(str.isdecimal, group.group_keys()), key=int))


def _fields(ome: Mapping[str, Any]) -> Iterator[str]:
    """Yield the paths of the images of a well."""
    for image in (ome.get("well") or {}).get("images") or ():
        yield str(image["path"])
