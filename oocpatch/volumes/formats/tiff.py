"""TIFF, OME-TIFF and SVS by tifffile: series and levels as chunked arrays."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray
import zarr

from oocpatch.volumes.formats.spec import (
    FileMetadata,
    FileSpec,
    UnreadableError,
    coordinate,
    file_digest,
    require_extra,
    to_json,
)

CENTIMETER = 3
"""Of the tag ResolutionUnit. Inches are left alone: they are a printer's, and mostly a default."""


class TiffFile:
    """A series of a TIFF, at one of its levels. Chunks are its tiles or strips."""

    def __init__(self, spec: FileSpec) -> None:
        with require_extra("tiff", spec):
            tifffile: Any = importlib.import_module("tifffile")
        self._tiff = tifffile.TiffFile(spec.address)
        try:
            series = _chosen(self._tiff.series, spec.series, "series", spec)
            level = _chosen(series.levels, spec.level, "level", spec)
            self._store = self._tiff.aszarr(series=spec.series, level=spec.level)
            array = zarr.open(self._store, mode="r")
            if not isinstance(array, zarr.Array):
                raise UnreadableError(f"{spec} must be one array, got {type(array).__name__}")  # noqa: TRY301
            self._array = array
            names = axis_names(level.axes) if len(level.axes) == array.ndim else None
            grown = {n: a / b for n, a, b in zip(names or (), series.levels[0].shape, array.shape, strict=False)}
            self.metadata = FileMetadata(
                shape=array.shape,
                dtype=array.dtype,
                chunks=array.chunks,
                names=names,
                coords=_coords(self._tiff, spec.series, dict(zip(names or (), array.shape, strict=False)), grown),
                attrs=_attrs(self._tiff),
                content={"series": spec.series, "level": spec.level, **file_digest(Path(spec.address))},
            )
        except BaseException:
            self._tiff.close()
            raise

    def read(self, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        """The voxels of a selection."""
        return np.asarray(self._array[selection])

    def close(self) -> None:
        """Close the file."""
        self._store.close()
        self._tiff.close()


def axis_names(axes: str) -> tuple[str, ...]:
    """Our names of tifffile's axes: samples are channels where there are no others, unknown axes are planes.

    >>> axis_names("TZCYX"), axis_names("YXS"), axis_names("IYX"), axis_names("QZYX")
    (('t', 'z', 'c', 'y', 'x'), ('y', 'x', 'c'), ('z', 'y', 'x'), ('q', 'z', 'y', 'x'))
    """
    found = [a.lower() for a in axes]
    if "c" not in found:
        found = ["c" if a == "s" else a for a in found]
    if "z" not in found:
        first = next((i for i, a in enumerate(found) if a in "iq"), None)
        found = ["z" if i == first else a for i, a in enumerate(found)]
    return tuple(found)


def _chosen(items: Any, index: int, name: str, spec: FileSpec) -> Any:
    if index >= len(items):
        told = "; ".join(f"{i}: {' x '.join(map(str, item.shape))}" for i, item in enumerate(items))
        raise UnreadableError(f"{name} must be one of those of {spec.address} ({told or 'none'}), got {index}")
    return items[index]


def _coords(tiff: Any, series: int, sizes: dict[str, int], grown: dict[str, float]) -> dict[str, xarray.Variable]:
    """Voxel sizes as coordinates. A voxel of a level lies at the centre of those that it stands for."""
    found = {}
    for name, (step, unit) in _steps(tiff, series).items():
        if name in sizes and step > 0:
            times = grown[name]
            found[name] = coordinate(name, sizes[name], step * times, step * (times - 1) / 2, unit)
    return found


def _steps(tiff: Any, series: int) -> dict[str, tuple[float, str | None]]:
    """Voxel size and unit by the name of an axis, as far as the file tells them."""
    tags = tiff.pages[0].tags
    if tiff.is_ome:
        return _ome_steps(tiff.ome_metadata, series)
    if tiff.is_svs and (size := _svs_metadata(tiff).get("MPP")):
        return {"y": (float(size), "um"), "x": (float(size), "um")}
    found: dict[str, tuple[float, str | None]] = {}
    imagej = tiff.imagej_metadata or {}
    unit = str(imagej["unit"]) if "unit" in imagej else None
    in_centimeters = "ResolutionUnit" in tags and int(tags["ResolutionUnit"].value) == CENTIMETER
    if unit or in_centimeters:
        for name, tag in (("y", "YResolution"), ("x", "XResolution")):
            times, per = tags[tag].value if tag in tags else (0, 1)
            if times:
                found[name] = (per / times, unit) if unit else (1e4 * per / times, "um")
    if "spacing" in imagej:
        found["z"] = (float(imagej["spacing"]), unit)
    return found


def _ome_steps(xml: str, series: int) -> dict[str, tuple[float, str | None]]:
    images = importlib.import_module("tifffile").xml2dict(xml)["OME"].get("Image", [])
    images = images if isinstance(images, list) else [images]
    pixels = images[series]["Pixels"] if series < len(images) else {}
    names = {"z": "PhysicalSizeZ", "y": "PhysicalSizeY", "x": "PhysicalSizeX", "t": "TimeIncrement"}
    return {
        name: (float(pixels[key]), str(pixels.get(f"{key}Unit", "s" if name == "t" else "um")))
        for name, key in names.items()
        if key in pixels
    }


def _svs_metadata(tiff: Any) -> dict[str, Any]:
    found: dict[str, Any] = importlib.import_module("tifffile").tifffile.svs_description_metadata(
        tiff.pages[0].description
    )
    return found


def _attrs(tiff: Any) -> dict[str, Any]:
    """What the file tells people: of an SVS its scanner's record, else its description, unless it is XML or long."""
    if tiff.is_svs:
        return {str(k): to_json(v) for k, v in _svs_metadata(tiff).items() if isinstance(v, (str, int, float))}
    text = str(tiff.pages[0].description or "")
    machine = tiff.is_ome or tiff.is_imagej or tiff.is_shaped
    return {"description": text} if text and not machine and len(text) < 2000 else {}
