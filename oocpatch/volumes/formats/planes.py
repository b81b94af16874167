"""Volumes whose files hold planes, or arrays of a few axes, that are read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import xarray

from oocpatch.volumes.formats.spec import FileMetadata

Selection = tuple[slice, ...]


def read_planes(
    metadata: FileMetadata,
    selection: Selection,
    outer: int,
    read: Callable[[tuple[int, ...], Selection], npt.NDArray[np.generic]],
) -> npt.NDArray[np.generic]:
    """Read a selection plane by plane.

    Args:
        metadata: shape and dtype of the volume.
        selection: one slice per axis.
        outer: number of the first axes, whose indices choose a plane.
        read: reads the selection of a plane, by the plane's indices.
    """
    spans = [range(*s.indices(n)) for s, n in zip(selection, metadata.shape, strict=True)]
    out = np.empty([len(span) for span in spans], metadata.dtype)
    for place in np.ndindex(*out.shape[:outer]) if out.size else ():
        index = tuple(span[i] for span, i in zip(spans, place, strict=False))
        out[place] = read(index, selection[outer:])
    return out


def name_channels(names: Sequence[str], size: int) -> dict[str, xarray.Variable]:
    """Return the coordinate of channels, if each of them has a name of its own.

    >>> list(name_channels(["DAPI", "GFP"], 2)), name_channels(["Gray", "Gray"], 2)
    (['c'], {})
    """
    return {"c": xarray.Variable(("c",), list(names))} if size == len(names) == len(set(names)) else {}
