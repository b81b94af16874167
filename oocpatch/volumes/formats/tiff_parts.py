"""Planes that a TIFF promises: tifffile reads zeros where a file of a set, a plane or the end of a file is missing."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np

from oocpatch.volumes.formats.spec import UnreadableError

SHOWN = 6
"""Files that a message lists at most."""


def check_complete(tiff: Any, level: Any, path: Path) -> None:
    """Refuse a level of which a plane is missing, or a file that was cut short.

    Segments without an offset are sparse: TIFF has them read as its background.

    Raises:
        UnreadableError: in that case; the message names the first plane that is missing, and the files.
    """
    contiguous = level.dataoffset is not None
    if level.kind in ("generic", "uniform") or not contiguous:
        _check_chain(tiff, path)
    if level.kind in ("generic", "uniform", ""):
        _check_promises(tiff, level, path)
    shape, names = _unsqueezed(level)
    if contiguous:
        _check_end(level[0], level.dataoffset + math.prod(shape) * level.dtype.itemsize)
        return
    count, present = max(1, math.prod(shape) // level.keyframe.size), 0
    missing = []
    for number, page in enumerate(_pages(level)):
        present += 1
        if page is None:
            missing.append(number)
        elif len(page.dataoffsets):
            _check_end(page, max(a + b for a, b in zip(page.dataoffsets, page.databytecounts, strict=False)))
    missing.extend(range(present, count))
    if missing:
        axes = [(name, n) for name, n in zip(names.lower(), shape, strict=True) if name not in "yxs"]
        sizes = tuple(n for _, n in axes)
        index = np.unravel_index(missing[0], sizes) if math.prod(sizes) == count else ()
        first = ", ".join(f"{name}={i}" for (name, n), i in zip(axes, index, strict=False) if n > 1)
        files = _missing_files(tiff, level)
        raise UnreadableError(
            f"volume cannot be read: {path} must have {count} planes, but the data of {len(missing)} are missing, the "
            f"first at {first or f'plane {missing[0]}'}{f' (missing or unreadable: {files})' if files else ''}; "
            "restore them, or write those that exist to another file"
        )


def _pages(level: Any) -> Any:
    try:
        yield from level
    except IndexError:  # a series of fewer pages than its metadata say
        return


def _check_end(page: Any, end: int) -> None:
    file = page.parent.filehandle
    if end > file.size:
        raise UnreadableError(
            f"volume cannot be read: {file.path} ends too early: it must have {end} bytes, got {file.size}"
        )


def _check_chain(tiff: Any, path: Path) -> None:
    """Refuse a file whose last page refers to another one that cannot be read."""
    position = tiff.pages.next_page_offset
    if position is None:
        return
    with tiff.filehandle.lock:
        tiff.filehandle.seek(position)
        data = tiff.filehandle.read(tiff.tiff.offsetsize)
    following = struct.unpack(tiff.tiff.offsetformat, data)[0] if len(data) == tiff.tiff.offsetsize else -1
    if following and following not in {page.offset for page in tiff.pages}:
        raise UnreadableError(
            f"volume cannot be read: {path} ends too early: page {len(tiff.pages)} is missing after the first "
            f"{len(tiff.pages)}"
        )


def _check_promises(tiff: Any, level: Any, path: Path) -> None:
    """Refuse a file whose metadata tifffile did not follow, because it has fewer planes than they say."""
    pages, promised, source = len(tiff.pages), 0, ""
    if tiff.is_ome:
        root = _ome(tiff)
        for element in root if root is not None else ():
            if element.tag.endswith("BinaryOnly"):
                raise UnreadableError(
                    f"volume cannot be read: {path} is one file of a set that "
                    f"{element.get('MetadataFile') or 'another file'} describes; pass that one if it is a TIFF, or "
                    "convert the set"
                )
        sizes = [
            element.attrib for element in (root.iter() if root is not None else ()) if element.tag.endswith("Pixels")
        ]
        samples = max(1, level.keyframe.samplesperpixel)
        promised = sum(math.prod(int(a.get(f"Size{n}", 1)) for n in "ZCT") // samples for a in sizes)
        source = "OME metadata"
    elif tiff.is_imagej:
        metadata: Mapping[str, Any] = tiff.imagej_metadata or {}
        promised = math.prod(int(metadata.get(name, 1)) for name in ("frames", "slices", "channels"))
        promised //= max(1, level.keyframe.samplesperpixel)
        source = "ImageJ metadata"
    if promised > pages:
        raise UnreadableError(
            f"volume cannot be read: the {source} of {path} promise {promised} planes, but the file has {pages}"
        )


def _ome(tiff: Any) -> ET.Element | None:
    try:
        return ET.fromstring(tiff.ome_metadata or "")  # noqa: S314 - tifffile has parsed it before
    except ET.ParseError:
        return None


def _missing_files(tiff: Any, level: Any) -> str:
    """Return the names of the files of a set that hold none of the planes."""
    root = _ome(tiff) if tiff.is_ome else None
    if root is None:
        return ""
    names = dict.fromkeys(e.get("FileName", "") for e in root.iter() if e.tag.endswith("UUID"))
    loaded = {Path(page.parent.filehandle.path).name for page in level if page is not None}
    missing = [name for name in names if name and Path(name).name not in loaded]
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    return ", ".join(itertools.islice(missing, SHOWN)) + more


def _unsqueezed(level: Any) -> tuple[tuple[int, ...], str]:
    """Return shape and axes of a series with those of length 1; tifffile has no others since 2026.11."""
    if hasattr(level, "get_shape"):
        return level.get_shape(False), level.get_axes(False)
    return level.shape, level.axes
