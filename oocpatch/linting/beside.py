"""Rules about what lies beside levels: labels, their listing, channels' settings, versions, consolidated metadata."""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import zarr

from oocpatch.linting.finding import Finding, ImageNode, group_at, node_at
from oocpatch.linting.levels import CLOSE
from oocpatch.volumes.ome_metadata import ome_attributes

FORMATS = {"0.4": 2, "0.5": 3}


def version(image: ImageNode) -> Iterator[Finding]:
    """Version 0.4 lies in Zarr 2, and 0.5 in Zarr 3."""
    said = str(image.ome.get("version") or image.multiscale.get("version") or "")
    format_ = image.group.metadata.zarr_format
    wanted = FORMATS.get(said)
    if wanted is not None and format_ != wanted:
        yield Finding(
            image.place,
            "version",
            f"OME-Zarr {said} must be Zarr {wanted}, got Zarr {format_}; write it anew in the other format",
        )


def channels(image: ImageNode) -> Iterator[Finding]:
    """`omero` describes as many channels as there are, with colours and windows that can be shown."""
    omero = image.ome.get("omero")
    if omero is None:
        return
    given = omero.get("channels") if isinstance(omero, Mapping) else None
    if not isinstance(given, list) or not all(isinstance(c, Mapping) for c in given):
        yield Finding(image.place, "omero", "omero must have a list of channels, got none; add it, or remove omero")
        return
    kinds = [axis.kind for axis in image.pyramid.axes]
    lengths = image.lengths()
    count = lengths.get(image.axes[kinds.index("channel")]) if "channel" in kinds else 1
    if count is not None and len(given) != count:
        yield Finding(
            image.place, "omero", f"omero must describe each of the {count} channels, got {len(given)}; correct it"
        )
    for number, channel in enumerate(given):
        color = channel.get("color")
        if color is not None and not re.fullmatch("[0-9a-fA-F]{6}", str(color)):
            yield Finding(
                image.place, "omero", f"colours must be six hexadecimal digits, got {color!r} of channel {number}"
            )
        window = channel.get("window")
        if window is not None:
            yield from _window(image.place, number, window)


def _window(place: str, number: int, window: Any) -> Iterator[Finding]:
    names = ("min", "start", "end", "max")
    values = [window.get(n) if isinstance(window, Mapping) else None for n in names]
    numbers = [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    if len(numbers) < len(names) or not (numbers[0] <= numbers[1] < numbers[2] <= numbers[3]):
        told = ", ".join(f"{n} {v}" for n, v in zip(names, values, strict=True))
        yield Finding(
            place, "omero", f"a window must have min <= start < end <= max, got {told} of channel {number}; correct it"
        )


def labels(image: ImageNode, every: Mapping[str, ImageNode]) -> Iterator[Finding]:
    """Labels are listed, all of them, and each fits the image.

    Args:
        image: whose labels to look at.
        every: all images, by place.
    """
    group = group_at(image.group, "labels")
    if group is None:
        return
    place = image.at("labels")
    listed = ome_attributes(dict(group.attrs)).get("labels")
    names = [str(n) for n in listed] if isinstance(listed, list) else []
    there = {name for name, member in group.groups() if "multiscales" in ome_attributes(dict(member.attrs))}
    if missing := sorted(there - {n.strip("/") for n in names}):
        yield Finding(
            place,
            "labels",
            f"the group of labels must list each of them, {', '.join(missing)} is not listed: no viewer shows it; "
            "add it to the attribute 'labels'",
        )
    for name in names:
        found = every.get(f"{place}/{name}")
        if found is None:
            yield Finding(
                place, "labels", f"labels that are listed must be images, {name} is none; remove it from the list"
            )
        else:
            yield from _label(image, found)


def _label(image: ImageNode, label: ImageNode) -> Iterator[Finding]:
    for level, array in zip(label.pyramid.levels, label.arrays, strict=True):
        if array is not None and array.dtype.kind not in "iu":
            yield Finding(
                label.at(level.path), "labels", f"labels must be integers, got {array.dtype}; convert the array"
            )
    told = label.ome.get("image-label")
    if told is None:
        yield Finding(
            label.place,
            "labels",
            "a listed label must have the attribute 'image-label', there is none: napari shows it as an image; add it",
        )
    elif isinstance(told, Mapping):
        yield from _described(image, label, told)
    own, theirs = image.lengths(), label.lengths()
    if wrong := {a: n for a, n in theirs.items() if a in own and n not in (own[a], 1)}:
        pairs = ", ".join(f"{a} {n} for {own[a]}" for a, n in wrong.items())
        yield Finding(
            label.place,
            "labels",
            f"labels must have the shape of their image, got {pairs}; resample them, or store them as an image",
        )
    elif own and theirs:
        yield from _lies_over(image, label, [a for a in theirs if a in own and theirs[a] == own[a]])
    if len(label.arrays) != len(image.arrays):
        yield Finding(
            label.place,
            "labels",
            f"labels must have as many levels as their image, got {len(label.arrays)} for {len(image.arrays)}; "
            "make the missing ones",
        )


def _lies_over(image: ImageNode, label: ImageNode, axes: list[str]) -> Iterator[Finding]:
    above, below = label.pyramid.levels[0], image.pyramid.levels[0]
    for axis in axes:
        a, b = label.axes.index(axis), image.axes.index(axis)
        size = below.scale[b]
        if abs(above.scale[a] - size) > CLOSE * size or abs(above.translation[a] - below.translation[b]) > CLOSE * size:
            yield Finding(
                label.place,
                "labels",
                f"labels must lie where their image lies, got scale {above.scale[a]:g} and translation "
                f"{above.translation[a]:g} along {axis} for {size:g} and {below.translation[b]:g}; correct them",
            )


def _described(image: ImageNode, label: ImageNode, told: Mapping[str, Any]) -> Iterator[Finding]:
    source = told.get("source")
    path = source.get("image") if isinstance(source, Mapping) else None
    if isinstance(path, str):
        meant = posixpath.normpath(posixpath.join("/", label.place, path)).strip("/")
        if meant != image.place:
            yield Finding(
                label.place,
                "labels",
                f"the source of labels must be the path of their image, got {path!r}; write '../../'",
            )
    for name in ("colors", "properties"):
        values = [entry.get("label-value") for entry in told.get(name) or () if isinstance(entry, Mapping)]
        if len(set(map(str, values))) < len(values):
            yield Finding(
                label.place, "labels", f"{name} must name each label once, got some twice; remove the second ones"
            )


def consolidated(container: zarr.Group, place: str, used: list[str]) -> Iterator[Finding]:
    """Consolidated metadata, if there are any, say what the nodes say, and leave out nothing that images list.

    Args:
        container: a group without its consolidated metadata.
        place: the path of the group in the container.
        used: paths of groups and arrays that must be there, in the group.
    """
    try:
        group = zarr.open_group(container.store, path=container.path, mode="r", use_consolidated=True)
    except Exception:  # noqa: BLE001 - there are none, or no reader can use them
        return
    metadata = group.metadata.consolidated_metadata
    listed = {} if metadata is None else metadata.flattened_metadata
    for path, said in listed.items():
        found = node_at(container, path)
        where = f"{place}/{path}".strip("/")
        if found is None:
            yield Finding(
                where,
                "consolidated",
                "what consolidated metadata list must be there, there is nothing; consolidate them again",
            )
        elif _plain(said) != _plain(found.metadata):
            yield Finding(
                where,
                "consolidated",
                "consolidated metadata must be what the node itself says, got others; consolidate them again",
            )
    for path in used:
        if path and path not in listed and node_at(container, path) is not None:
            yield Finding(
                f"{place}/{path}".strip("/"),
                "consolidated",
                "consolidated metadata must list all nodes of images, this one is missing: xarray does not see it; "
                "consolidate them again",
            )


def _plain(metadata: Any) -> Any:
    found = json.loads(json.dumps(metadata.to_dict(), default=_json))
    found.pop("consolidated_metadata", None)
    return found


def _json(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)


RULES: tuple[Callable[[ImageNode], Iterator[Finding]], ...] = (version, channels)
