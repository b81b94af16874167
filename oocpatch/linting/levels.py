"""Rules about an image: axes, units, and the shapes, scales, places, chunks and coordinates of its levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import zarr

from oocpatch.linting.finding import Finding, ImageNode, array_at
from oocpatch.planning.plan import human
from oocpatch.storage.chunk_guard import ChunkGuard
from oocpatch.volumes.ome_metadata import SHORT, long_unit

LARGE_CHUNK = 256 << 20
"""Bytes of a chunk, decoded: to show one voxel a viewer holds all of it."""

MANY_FILES, SMALL_FILE = 100_000, 16 << 10
"""More write units than this, of fewer bytes each before compression, burden a file system more than they help."""

COORDINATE_BYTES = 16 << 20
"""Longer coordinates are not read."""

SAMPLED = ("nearest", "sampl", "strid", "decimat", "slic", "pick")
"""Parts of what `type` says where levels hold single voxels of those above, and not means or modes."""

CLOSE = 1e-4
"""Share of a voxel by which places may differ: scales are rounded when they are written."""

PREFIXES = (
    *("yocto", "zepto", "atto", "femto", "pico", "nano", "micro", "milli", "centi", "deci", "", "hecto", "kilo"),
    *("mega", "giga", "tera", "peta", "exa", "zetta", "yotta"),
)
UNITS = {
    "space": frozenset({*(f"{p}meter" for p in PREFIXES), "angstrom", "foot", "inch", "mile", "parsec", "yard"}),
    "time": frozenset({*(f"{p}second" for p in PREFIXES), "day", "hour", "minute"}),
}
"""What the format takes, of each kind."""

ORDER = {"time": 0, "channel": 1, "space": 2}


def axes(image: ImageNode) -> Iterator[Finding]:
    """Two or three axes in space, after time and channels, in the order z, y, x; each once."""
    found, names = image.pyramid.axes, image.axes
    told = ", ".join(f"{axis.name} ({axis.kind})" for axis in found)
    if len(set(names)) < len(names):
        yield Finding(image.place, "axes", f"names of axes must differ, got {told}; rename one")
    kinds = [axis.kind or "" for axis in found]
    space = [axis.name for axis in found if axis.kind == "space"]
    if not 2 <= len(space) <= 3 or any(kinds.count(k) > 1 for k in ("time", "channel")):
        yield Finding(
            image.place,
            "axes",
            f"there must be two or three axes in space, and at most one of time and one of channels, got {told}; "
            "correct the types, or split the image",
        )
    order = [ORDER.get(kind, 1) for kind in kinds]
    if order != sorted(order):
        yield Finding(
            image.place, "axes", f"axes must be time, then channel, then space, got {told}; transpose the arrays"
        )
    if set(space) <= set("zyx") and space != sorted(space, reverse=True):
        yield Finding(
            image.place, "axes", f"axes in space must come as z, y, x, got {', '.join(space)}; transpose the arrays"
        )
    given = image.multiscale.get("axes", ())
    for axis in given:
        if not (isinstance(axis, dict) and axis.get("type")):
            yield Finding(image.place, "axes", f"each axis must have a type, got {axis}; add space, time or channel")


def units(image: ImageNode) -> Iterator[Finding]:
    """Units have the long names of the format."""
    for axis in image.pyramid.axes:
        known = UNITS.get(axis.kind or "")
        if axis.unit and known and axis.unit not in known:
            better = long_unit(axis.unit)
            do = f"write {better}" if better in known else f"write one of them, such as {_example(axis.kind)}"
            yield Finding(
                image.place,
                "units",
                f"units must have the long names of the format, got {axis.unit!r} of {axis.name}; {do}",
            )


def _example(kind: str | None) -> str:
    return SHORT["um" if kind == "space" else "s"]


def arrays(image: ImageNode) -> Iterator[Finding]:
    """Every level is there, with one length per axis, the dtype of the first, the names of the axes, larger first."""
    finest = image.arrays[0]
    for level, array in zip(image.pyramid.levels, image.arrays, strict=True):
        place = image.at(level.path)
        if array is None:
            yield Finding(
                place, "level", "each level that is listed must be an array, there is none; remove it from datasets"
            )
            continue
        if array.ndim != len(image.axes):
            yield Finding(
                place,
                "level",
                f"arrays must have as many axes as are listed ({', '.join(image.axes)}), got shape {array.shape}; "
                "correct the list of axes",
            )
            continue
        if finest is not None and array.dtype != finest.dtype:
            yield Finding(
                place, "dtype", f"levels must have one dtype, got {array.dtype} below {finest.dtype}; make it anew"
            )
        yield from _names(image, place, array)
        yield from _chunks(place, array)


def _names(image: ImageNode, place: str, array: zarr.Array[Any]) -> Iterator[Finding]:
    names: Any
    if array.metadata.zarr_format == 3:
        names, kept = array.metadata.dimension_names, "dimension_names"
    else:
        names, kept = array.attrs.get("_ARRAY_DIMENSIONS"), "_ARRAY_DIMENSIONS"  # not of the format, but xarray's
        if names is None:
            return
    if tuple(names or ()) != image.axes:
        told = ", ".join(map(str, names)) if names else "none"
        yield Finding(
            place,
            "names",
            f"{kept} must be the names of the axes ({', '.join(image.axes)}), got {told}; write them into the array",
        )


def _chunks(place: str, array: zarr.Array[Any]) -> Iterator[Finding]:
    itemsize = np.dtype(array.dtype).itemsize
    chunk = math.prod(array.chunks) * itemsize
    if chunk > LARGE_CHUNK:
        yield Finding(
            place,
            "chunks",
            f"a chunk must not be larger than {human(LARGE_CHUNK)}, got {human(chunk)} ({array.chunks}): viewers load "
            "all of it; write smaller chunks, in shards if need be",
        )
    unit = array.shards or array.chunks
    files = math.prod(-(-n // u) for n, u in zip(array.shape, unit, strict=True))
    if files > MANY_FILES and math.prod(unit) * itemsize < SMALL_FILE:
        yield Finding(
            place,
            "chunks",
            f"more than {MANY_FILES:,} files must have {human(SMALL_FILE)} each, got {files:,} of "
            f"{human(math.prod(unit) * itemsize)} ({unit}); write larger chunks, or shards",
        )


def levels(image: ImageNode) -> Iterator[Finding]:
    """Shapes follow from scales, and levels lie where their voxels come from."""
    pyramid = image.pyramid
    for level in pyramid.levels:
        if not all(math.isfinite(s) and s > 0 for s in level.scale):
            yield Finding(
                image.at(level.path), "scale", f"scales must be positive numbers, got {list(level.scale)}; correct them"
            )
            return
    finest, first = pyramid.levels[0], image.arrays[0]
    if first is None or first.ndim != len(image.axes):
        return
    above = first.shape
    for level, array in zip(pyramid.levels[1:], image.arrays[1:], strict=True):
        if array is None or array.ndim != len(image.axes):
            continue
        place, ratios = image.at(level.path), [s / t for s, t in zip(level.scale, finest.scale, strict=True)]
        if any(n > m for n, m in zip(array.shape, above, strict=True)):
            yield Finding(
                place,
                "order",
                f"levels must come from the finest to the coarsest, got {array.shape} after {above}; sort datasets",
            )
        above = array.shape
        fitting = [n / r for n, r in zip(first.shape, ratios, strict=True)]
        # Halves may be rounded up, down or to the nearest, and again at each level: all that stays below one voxel.
        if wrong := [a for a, (n, f) in enumerate(zip(array.shape, fitting, strict=True)) if abs(n - f) >= 1]:
            told = ", ".join(f"{image.axes[a]} {array.shape[a]} for {fitting[a]:g}" for a in wrong)
            yield Finding(
                place,
                "shape",
                f"a level's shape must be that of the finest one ({first.shape}) divided by the ratio of their scales, "
                f"got {told}; correct the scale, or make the level anew",
            )
        yield from _place(image, place, ratios, level.translation)


def _place(image: ImageNode, place: str, ratios: list[float], translation: tuple[float, ...]) -> Iterator[Finding]:
    finest = image.pyramid.levels[0]
    shifts = [
        (t - t0) / s0 for t, t0, s0 in zip(translation, finest.translation, finest.scale, strict=True)
    ]  # in voxels of the finest level
    method = str(image.multiscale.get("type") or "").lower()
    for name, shift, ratio in zip(image.axes, shifts, ratios, strict=True):
        centre, allowance = (ratio - 1) / 2, CLOSE * max(1.0, ratio)
        if any(word in method for word in SAMPLED):
            if not -allowance <= shift <= ratio - 1 + allowance:
                yield Finding(
                    place,
                    "place",
                    f"a level's first voxel must lie within those that it was sampled from (0 to {ratio - 1:g} voxels "
                    f"of the finest level along {name}), got {shift:g}; correct the translation",
                )
        elif abs(shift - centre) > allowance:
            known = "" if method else ", or give the multiscale the type 'nearest' if voxels are single ones"
            yield Finding(
                place,
                "place",
                "a level's first voxel must lie at the centre of those that it stands for, (ratio - 1) / 2 = "
                f"{centre:g} voxels of the finest level along {name}, got {shift:g}; correct the translation{known}",
            )


def coordinates(image: ImageNode) -> Iterator[Finding]:
    """1-D coordinates beside a level's array say what its scale and translation say."""
    seen: set[str] = set()
    for level, array in zip(image.pyramid.levels, image.arrays, strict=True):
        parent = level.path.rpartition("/")[0]
        if array is None or array.ndim != len(image.axes) or parent in seen:
            continue
        seen.add(parent)  # where levels lie side by side, coordinates are those of the finest one
        for axis, n, scale, start in zip(image.pyramid.axes, array.shape, level.scale, level.translation, strict=True):
            path = f"{parent}/{axis.name}".strip("/")
            found = array_at(image.group, path)
            if found is None or axis.kind == "channel" or found.dtype.kind not in "iuf" or found.ndim != 1:
                continue
            expected = f"{n} evenly spaced values from {start:g} on by {scale:g}, as scale and translation say"
            do = "correct one of them"
            if found.shape != (n,):
                told = f"{found.shape[0]} values"
            elif found.nbytes > COORDINATE_BYTES or math.prod(found.chunks) > COORDINATE_BYTES:
                continue
            else:
                values = _read(found)
                if values is None:
                    told = "values that cannot be read"
                elif np.abs(values - (start + scale * np.arange(n))).max(initial=0) <= CLOSE * scale:
                    continue
                else:
                    told = f"{values[0]:g} to {values[-1]:g}"
                    steps = np.diff(values)
                    if steps.max() - steps.min() > CLOSE * scale:
                        told += ", not evenly spaced"
                        do = "no viewer sees such places; resample the image"
            yield Finding(image.at(path), "coordinates", f"coordinates must be {expected}, got {told}; {do}")


def _read(array: zarr.Array[Any]) -> np.ndarray[Any, Any] | None:
    try:
        if (guard := ChunkGuard.of(array)) is not None:
            guard.check((slice(None),))
        return np.asarray(array[...], np.float64)
    except Exception:  # noqa: BLE001 - any codec may raise anything; that it cannot be read is the finding
        return None


RULES: tuple[Callable[[ImageNode], Iterator[Finding]], ...] = (axes, units, arrays, levels, coordinates)
