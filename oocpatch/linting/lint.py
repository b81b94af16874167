"""Lint an OME-Zarr of anybody: what validators of metadata do not see, since they do not look at the arrays.

```text
 container -> its images: itself, those of a series, a plate, a well, a list of labels, and labels beside each
           -> rules about one image, then about what lies beside it -> findings
```

Metadata are read, and 1-D coordinates; no voxel.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import zarr
from zarr.errors import UnstableSpecificationWarning
from zarr.storage import LocalStore

from oocpatch.linting import beside, levels
from oocpatch.linting.finding import Finding, ImageNode, group_at
from oocpatch.storage.paths import local_or_url
from oocpatch.volumes.ome_metadata import ome_attributes

Item = TypeVar("Item")
LISTS = ("multiscales", "labels", "plate", "well", "series", "bioformats2raw.layout")


@dataclass(frozen=True, slots=True)
class LintReport:
    """What was looked at and what was found.

    Attributes:
        path: the container.
        images: how many images there are, labels among them.
        levels: how many arrays they have, in total.
        findings: the faults.
    """

    path: str
    images: int
    levels: int
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return not self.findings

    def to_json(self) -> str:
        """The report as a JSON object."""
        return json.dumps({"passed": self.passed, **dataclasses.asdict(self)}, indent=1)

    def __str__(self) -> str:
        count = len(self.findings)
        told = "no findings" if not count else f"{count} finding{'s' if count > 1 else ''}"
        return "\n".join(
            [f"{self.path}: {self.images} images, {self.levels} levels, {told}", *(f"  {f}" for f in self.findings)]
        )


def lint(path: str | os.PathLike[str]) -> LintReport:
    """Look for faults of an OME-Zarr, written by whatever program, that make viewers show it wrongly or not at all.

    Axes, units, names of dimensions; whether levels are there, with the shapes that their scales say and at the right
    places; coordinates; sizes of chunks; listing, dtype, shape and place of labels; channels' settings; and whether
    consolidated metadata are those of the nodes. No voxel is read.

    Args:
        path: directory or URL of an image, a series, a plate, a well, or a list of labels.

    Raises:
        ValueError: when there is no OME-Zarr.

    >>> import tempfile
    >>> axes = [{"name": n, "type": "space", "unit": "um"} for n in "yx"]
    >>> transforms = [{"type": "scale", "scale": [1, 1]}]
    >>> images = [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": transforms}]}]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     group = zarr.create_group(folder, attributes={"ome": {"version": "0.5", "multiscales": images}})
    ...     array = group.create_array("0", shape=(8, 8), dtype="u1", dimension_names=("y", "x"))
    ...     print([(f.rule, f.message) for f in lint(folder).findings][0])
    ('units', "units must have the long names of the format, got 'um' of y; write micrometer")
    """
    address = local_or_url(path)
    if isinstance(address, Path) and not address.exists():
        raise ValueError(f"path not found: {address} does not exist")
    store = address if isinstance(address, str) else LocalStore(address, read_only=True)
    try:
        container = zarr.open_group(store, mode="r", use_consolidated=False)
        ome = ome_attributes(dict(container.attrs))
    except Exception as error:
        raise ValueError(f"path must be an OME-Zarr, got {os.fspath(path)}, which is no group of Zarr") from error
    if not any(name in ome for name in LISTS) and group_at(container, "OME") is None:
        raise ValueError(
            f"path must be an OME-Zarr, got {os.fspath(path)}, whose attributes describe no image and list none"
        )
    findings: list[Finding] = []
    images: dict[str, ImageNode] = {}
    with warnings.catch_warnings():
        # Texts as coordinates: Zarr v3 has no final specification of their dtype, and we only look.
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        for place in _guarded("", _places(container, ome, "", findings), findings):
            _enter(container, place, images, findings)
        for place, image in images.items():
            for rule in (*levels.RULES, *beside.RULES):
                findings += _guarded(place, rule(image), findings)
            findings += _guarded(place, beside.labels(image, images), findings)
        findings += _guarded("", _consolidated(container, images), findings)
    count = sum(len(image.arrays) for image in images.values())
    return LintReport(os.fspath(path), len(images), count, tuple(dict.fromkeys(findings)))


def _guarded(place: str, found: Iterator[Item], findings: list[Finding]) -> list[Item]:
    """What an iterator gives, until metadata are not even of the right types."""
    items: list[Item] = []
    try:
        items.extend(found)  # one by one: what came before is kept
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        findings.append(
            Finding(place, "metadata", f"metadata must have the form that the format says ({told}); correct them")
        )
    return items


def _enter(container: zarr.Group, place: str, images: dict[str, ImageNode], findings: list[Finding]) -> None:
    """Open an image and its labels."""
    if place in images:
        return
    group = group_at(container, place)
    if group is None:
        findings.append(
            Finding(place, "listed", "what is listed as an image must be a group, there is none; remove it")
        )
        return
    try:
        images[place] = ImageNode.of(group, place)
    except ValueError as error:
        findings.append(Finding(place, "metadata", f"{error}; correct the metadata"))
        return
    inside = group_at(group, "labels")
    listed = None if inside is None else ome_attributes(dict(inside.attrs)).get("labels")
    for name in listed if isinstance(listed, list) else ():
        label = images[place].at(f"labels/{name}")
        if group_at(container, label) is not None:  # else the rule about labels says so
            _enter(container, label, images, findings)


def _places(group: zarr.Group, ome: Any, place: str, findings: list[Finding]) -> Iterator[str]:
    """Where the images of a container are, apart from labels beside them."""

    def at(name: object) -> str:
        return f"{place}/{name}".strip("/")

    if "multiscales" in ome:
        yield place
    elif isinstance(ome.get("labels"), list):
        yield from map(at, ome["labels"])
    for image in (ome.get("well") or {}).get("images", ()):
        yield at(image.get("path"))
    for well in (ome.get("plate") or {}).get("wells", ()):
        found = group_at(group, str(well.get("path")))
        if found is None:
            findings.append(
                Finding(at(well.get("path")), "listed", "wells of a plate must be groups, there is none; remove it")
            )
        else:
            yield from _places(found, ome_attributes(dict(found.attrs)), at(well["path"]), findings)
    if "plate" not in ome and (inner := group_at(group, "OME")) is not None:
        listed = ome_attributes(dict(inner.attrs)).get("series")
        names = [str(n) for n in listed] if isinstance(listed, list) else []
        there = {n for n, member in group.groups() if "multiscales" in ome_attributes(dict(member.attrs))}
        if names and (missing := sorted(there - set(names))):
            findings.append(
                Finding(
                    at("OME"),
                    "listed",
                    f"the series must list each image, {', '.join(missing)} is not listed; add it to 'series'",
                )
            )
        yield from map(at, names or sorted(filter(str.isdecimal, there), key=int))


def _consolidated(container: zarr.Group, images: dict[str, ImageNode]) -> Iterator[Finding]:
    """Of the container, and of each image that is a group of its own."""
    for place in dict.fromkeys(["", *images]):
        below = {p: image for p, image in images.items() if p == place or not place or p.startswith(f"{place}/")}
        group = group_at(container, place)
        if group is None:
            continue
        nodes = itertools.chain.from_iterable(
            (p, *(image.at(level.path) for level in image.pyramid.levels)) for p, image in below.items()
        )
        used = [node.removeprefix(place).strip("/") for node in nodes]
        yield from beside.consolidated(group, place, used)
