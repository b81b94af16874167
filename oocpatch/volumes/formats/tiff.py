"""TIFF, OME-TIFF and SVS by tifffile: series and levels as chunked arrays."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray
import zarr

from oocpatch.volumes.axes import DEFAULTS
from oocpatch.volumes.formats.spec import FileMetadata, FileSpec, check_number, import_reader, to_json
from oocpatch.volumes.formats.tiff_parts import check_complete
from oocpatch.volumes.ome_metadata import coordinate

CENTIMETER = 3
"""Value of the tag ResolutionUnit. Inches are ignored: they are mostly a default, meant for printers."""

GEO_KEYS = {"34735": "H", "34736": "d", "34737": "s"}
"""Tags that describe the coordinate system of a GeoTIFF, and the types of their values."""

PIXEL_SCALE, TIE_POINT = 33550, 33922
"""Tags of a GeoTIFF whose rows and columns are those of its coordinate system: sizes of a pixel, and a known place."""

TRANSFORMATION = 34264
"""Tag of a GeoTIFF whose axes do not lie as usual, with `y` upwards: a matrix."""

RASTER_TYPE, PIXEL_IS_POINT = 1025, 2
"""Key of the meaning of a place, and its value where it is the centre of a pixel and not its corner."""


class TiffFile:
    """A level of a series of a TIFF. Chunks are its tiles or strips."""

    def __init__(self, spec: FileSpec) -> None:
        tifffile = import_reader("tifffile", "tiff", spec)
        self._path = Path(spec.address)
        self._tiff = tifffile.TiffFile(spec.address)
        try:
            check_number("series", spec.series, [series.shape for series in self._tiff.series], spec)
            series = self._tiff.series[spec.series]
            check_number("level", spec.level, [level.shape for level in series.levels], spec)
            self._level = level = series.levels[spec.level]
            check_complete(self._tiff, level, self._path)
            self._store = self._tiff.aszarr(series=spec.series, level=spec.level)
            self._array = array = zarr.open_array(self._store, mode="r")
            names = axis_names(level.axes) if len(level.axes) == array.ndim else None
            factors = {n: a / b for n, a, b in zip(names or (), series.levels[0].shape, array.shape, strict=False)}
            sizes = dict(zip(names or (), array.shape, strict=False))
            self.metadata = FileMetadata(
                shape=array.shape,
                dtype=array.dtype,
                chunks=array.chunks,
                names=names,
                coords=_geo_coords(self._tiff, sizes, factors) or _coords(self._tiff, spec.series, sizes, factors),
                attrs=_attrs(self._tiff),
            )
        except BaseException:
            self._tiff.close()
            raise

    def read(self, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Read the voxels of a selection."""
        return np.asarray(self._array[selection])

    def files(self) -> set[str]:
        """Return the file, with those of a set that hold its other planes."""
        pages = self._level if self._level.is_multifile else ()
        return {str(self._path), *(str(page.parent.filehandle.path) for page in pages if page is not None)}

    def close(self) -> None:
        """Close the file."""
        self._store.close()
        self._tiff.close()


def axis_names(axes: str) -> tuple[str, ...]:
    """Translate tifffile's axes: samples are channels if there are no others, an unknown axis is that of planes.

    Several unknown axes have the default names of arrays.

    >>> axis_names("TZCYX"), axis_names("YXS"), axis_names("IYX"), axis_names("QZYX")
    (('t', 'z', 'c', 'y', 'x'), ('y', 'x', 'c'), ('z', 'y', 'x'), ('q', 'z', 'y', 'x'))
    >>> axis_names("QQYX"), axis_names("QQQYX")
    (('c', 'z', 'y', 'x'), ('t', 'c', 'z', 'y', 'x'))
    """
    if axes[:-2].strip("QI") == "" and len(axes) > 3:  # no names at all
        return tuple(DEFAULTS.get(len(axes), axes.lower()))
    names = [a.lower() for a in axes]
    if "c" not in names:
        names = ["c" if a == "s" else a for a in names]
    if "z" not in names:
        first = next((i for i, a in enumerate(names) if a in "iq"), None)
        names = ["z" if i == first else a for i, a in enumerate(names)]
    return tuple(names)


def _coords(tiff: Any, series: int, sizes: dict[str, int], factors: dict[str, float]) -> dict[str, xarray.Variable]:
    """Return coordinates from voxel sizes; a voxel of a level lies at the centre of the voxels it replaces."""
    return {
        name: coordinate(name, sizes[name], step * factors[name], step * (factors[name] - 1) / 2, unit)
        for name, (step, unit) in _steps(tiff, series).items()
        if name in sizes and step > 0
    }


def _steps(tiff: Any, series: int) -> dict[str, tuple[float, str | None]]:
    """Return voxel size and unit by the name of an axis, as far as the file has them."""
    tags = tiff.pages[0].tags
    if tiff.is_ome:
        return _ome_steps(tiff.ome_metadata, series)
    if tiff.is_svs and (size := _svs_metadata(tiff).get("MPP")):
        return {"y": (float(size), "um"), "x": (float(size), "um")}
    steps: dict[str, tuple[float, str | None]] = {}
    imagej = tiff.imagej_metadata or {}
    unit = str(imagej["unit"]) if "unit" in imagej else None
    in_centimeters = "ResolutionUnit" in tags and int(tags["ResolutionUnit"].value) == CENTIMETER
    if unit or in_centimeters:
        for name, tag in (("y", "YResolution"), ("x", "XResolution")):
            pixels, lengths = tags[tag].value if tag in tags else (0, 1)
            if pixels:
                steps[name] = (lengths / pixels, unit) if unit else (1e4 * lengths / pixels, "um")
    if "spacing" in imagej:
        steps["z"] = (float(imagej["spacing"]), unit)
    return steps


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


def _svs_metadata(tiff: Any) -> Any:
    return importlib.import_module("tifffile").tifffile.svs_description_metadata(tiff.pages[0].description)


def geo_raster_type(keys: Any) -> int:
    """Return the meaning of places by the key directory of a GeoTIFF.

    >>> geo_raster_type([1, 1, 0, 2, 1024, 0, 1, 1, 1025, 0, 1, 2])
    2
    """
    entries = {int(keys[i]): int(keys[i + 3]) for i in range(4, len(keys) - 3, 4)}
    return entries.get(RASTER_TYPE, 1)


def _geo_coords(tiff: Any, sizes: dict[str, int], factors: dict[str, float]) -> dict[str, xarray.Variable]:
    """Return the coordinates of a GeoTIFF whose rows and columns are those of its coordinate system."""
    tags = tiff.pages[0].tags
    place: Any = ()
    if TRANSFORMATION in tags:
        xx, xy, _, x, yx, yy, _, y = tags[TRANSFORMATION].value[:8]
        steps, place = (xx, yy), () if xy or yx else (0, 0, 0, x, y, 0)
    elif PIXEL_SCALE in tags and TIE_POINT in tags:
        (width, height, *_), place = tags[PIXEL_SCALE].value, tags[TIE_POINT].value
        steps = (width, -height)
    if 34735 not in tags or len(place) != 6:
        return {}
    half = 0.0 if geo_raster_type(tags[34735].value) == PIXEL_IS_POINT else 0.5
    coords = {}
    for axis, (name, step) in enumerate(zip("xy", steps, strict=True)):
        if name in sizes and step:
            factor = factors[name]
            start = place[axis + 3] + step * (half - place[axis] + (factor - 1) / 2)
            coords[name] = coordinate(name, sizes[name], step * factor, start)
    return coords


def _attrs(tiff: Any) -> dict[str, Any]:
    """Return what the file says of itself, and the keys of a GeoTIFF."""
    tags = tiff.pages[0].tags
    keys = {code: to_json(tags[int(code)].value) for code in GEO_KEYS if int(code) in tags}
    return {**_description(tiff), **({"geotiff_keys": keys} if "34735" in keys else {})}


def _description(tiff: Any) -> dict[str, Any]:
    """Return the scanner's record of an SVS, else the description of the file, unless it is XML or long."""
    if tiff.is_svs:
        return {str(k): to_json(v) for k, v in _svs_metadata(tiff).items() if isinstance(v, (str, int, float))}
    text = str(tiff.pages[0].description or "")
    is_structured = tiff.is_ome or tiff.is_imagej or tiff.is_shaped
    return {"description": text} if text and not is_structured and len(text) < 2000 else {}
