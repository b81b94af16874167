"""OME-TIFF by tifffile: tiles, a pyramid in SubIFDs, sizes and channels in OME-XML, written in one pass.

```text
 pieces of planes --> rows of tiles --> tiles --deflate, in parallel--> level 0, in the file
      2 x 2 of these --> rows of level 1 --> tiles --> temporary file, appended when level 0 is written
           2 x 2 of these --> rows of level 2 ...
```
"""

from __future__ import annotations

import itertools
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt

from oocpatch.conversion.file_order import THREADS, FileOrder, ahead, in_order
from oocpatch.conversion.geometry import SECONDS, factor_of, spatial_axes, time_spacing
from oocpatch.outputs.pyramid import METHODS
from oocpatch.planning.box import Ints, ceil_to
from oocpatch.volumes.affine import Spacing, spacing_along
from oocpatch.volumes.formats.tiff import (
    GEO_KEYS,
    PIXEL_IS_POINT,
    PIXEL_SCALE,
    TIE_POINT,
    TRANSFORMATION,
    geo_raster_type,
)
from oocpatch.volumes.ome_metadata import METERS
from oocpatch.volumes.volume import Volume

Array = npt.NDArray[Any]

TILE = 256
"""Rows and columns of a tile; a multiple of 16."""

SMALLEST = 256
"""A pyramid ends with the first level that has at most so many rows and columns."""

COLUMNS = 4096
"""Columns of which a mean is taken at a time; an even number."""

COMPRESSION = 4

BIG = (1 << 32) - (1 << 26)
"""Bytes above which a file has 64-bit offsets."""

BAND_METADATA = 42112
"""Tag of GDAL: XML in UTF-8, whose values GDAL escapes a second time."""

RGB = 3
"""Channels of a picture."""

DTYPES = {"bool": "uint8", "float16": "float32", "int64": "int32", "uint64": "uint32"}
"""Dtypes that OME-TIFF does not have, and those that are written instead; integers that do not fit are refused."""

UNITS = {
    "nanometer": "nm",
    "micrometer": "\u00b5m",
    "millimeter": "mm",
    "centimeter": "cm",
    "meter": "m",
    "nanosecond": "ns",
    "microsecond": "\u00b5s",
    "millisecond": "ms",
    "second": "s",
    "minute": "min",
    "hour": "h",
    "day": "d",
}


@dataclass
class Level:
    """A level of the pyramid while it is made.

    Attributes:
        plane: shape of a plane.
        file: tiles of a coarser level, each after its length; None for level 0.
        rows: rows of the plane that do not fill a row of tiles yet.
        high: number of these rows.
        done: number of rows of the plane that are in tiles.
    """

    plane: Ints
    file: IO[bytes] | None = None
    rows: list[Array] = field(default_factory=list)
    high: int = 0
    done: int = 0


class TiffWriter:
    """Writes a volume to an OME-TIFF.

    Args:
        volume: the volume.
        labels: whether its values are labels, so that coarser levels have only values that were there.
        mark: text for the tag `Software`.
        limit: bytes of memory.
    """

    def __init__(self, volume: Volume, *, labels: bool, mark: str, limit: int) -> None:
        axes = spatial_axes(volume)
        time = [volume.axes.names[a] for a in volume.axes.looped]
        channel = [] if volume.channel_axis is None else [volume.channel_axis]
        self._is_rgb = is_rgb(volume) and not time
        space = [axes[role] for role in "zyx" if role in axes]
        names = [*space, *channel] if self._is_rgb else [*time, *channel, *space]
        letters = ("T" * len(time), "C" * (len(channel) - self._is_rgb), "ZYX"[-len(axes) :], "S" * self._is_rgb)
        self._dtype = np.dtype(DTYPES.get(volume.dtype.name, volume.dtype))
        self._method = METHODS["mode" if labels or volume.dtype == np.bool_ else "mean"]
        self._predictor = not labels and self._dtype.kind in "iu"
        self._mark = mark
        inner = 2 + self._is_rgb
        sizes = tuple(volume.source.shape[volume.axes.names.index(name)] for name in names)
        self._tile = tuple(min(TILE, ceil_to(n, 16)) for n in sizes[-inner:][:2])
        tile = int(np.prod(self._tile)) * max(1, RGB * self._is_rgb) * self._dtype.itemsize
        # tiles in flight; rows of tiles that are cast; those of coarser levels, collected and joined; a part of a mean
        row = tile * -(-sizes[-inner + 1] // self._tile[1])
        coding = 3 * (ahead(THREADS) + 1) * tile + (2 + (self._dtype != volume.dtype)) * row
        coding += TILE * COLUMNS * max(1, RGB * self._is_rgb) * 8
        self.order = FileOrder.plan(volume, names, inner, limit, rows=self._tile[0], coding=coding)
        self._levels = [Level(plane) for plane in level_shapes(self.order.plane, inner)]
        self._geo_tags = geo_tags(volume, axes)
        # readers of GeoTIFF take the pages of a file for different pictures, and samples for bands
        self._has_bands = bool(self._geo_tags) and letters == ("", "C", "YX", "") and volume.channels > 1
        self._metadata = {"axes": "".join(letters), **_ome_metadata(volume, axes, mark)}
        if self._has_bands:
            self._geo_tags += band_names(volume)
        elif not self._is_rgb and (channels := names_of_channels(volume)):
            self._metadata["Channel"] = {"Name": channels}
        self._resolution = _resolution(self._metadata)

    def write(self, path: Path, advance: Callable[[int], None]) -> None:
        """Write the file."""
        import tifffile  # noqa: PLC0415 - an extra

        size = sum(self.order.planes * int(np.prod(level.plane, dtype=object)) for level in self._levels)
        with ExitStack() as stack:
            for level in self._levels[1:]:
                level.file = stack.enter_context(tempfile.TemporaryFile(prefix="oocpatch-", dir=path.parent))
            file = stack.enter_context(tifffile.TiffWriter(path, bigtiff=size * self._dtype.itemsize > BIG, ome=True))
            tiles = self._tiles(path.parent, advance)
            for number, level in enumerate(self._levels):
                file.write(
                    # not the generator itself, which tifffile would close after the last tile of level 0
                    _stored_tiles(level) if number else itertools.islice(tiles, None),
                    shape=(*self.order.volume.shape[: -self.order.inner], *level.plane),
                    dtype=self._dtype,
                    tile=self._tile,
                    photometric="rgb" if self._is_rgb else "minisblack",
                    planarconfig="contig" if self._is_rgb else "separate" if self._has_bands else None,
                    compression="adobe_deflate",
                    predictor=2 if self._predictor else None,
                    subifds=len(self._levels) - 1 if not number else 0,
                    subfiletype=min(number, 1),
                    metadata=self._metadata if not number else None,
                    software=self._mark if not number else None,
                    extratags=self._geo_tags if not number else None,
                    **(self._resolution if not number else {}),
                )
                if not number:  # the last tiles of the other levels
                    for _ in tiles:
                        raise RuntimeError("an OME-TIFF has more tiles than it was made for: a fault of oocpatch")

    def _tiles(self, folder: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
        """Yield the tiles of level 0; those of other levels go to their files."""
        for level, tile in in_order(self._encoded, self._plain_tiles(folder, advance), self.order.threads):
            if level.file is None:
                yield tile
            else:
                level.file.write(len(tile).to_bytes(4, "little") + tile)

    def _plain_tiles(self, folder: Path, advance: Callable[[int], None]) -> Iterator[tuple[Level, Array]]:
        for piece in self.order.pieces(folder):
            for rows in piece.values:
                for start in range(0, len(rows), self._tile[0]):
                    yield from self._add(0, self._cast(rows[start : start + self._tile[0]]))
            advance(piece.values.size)

    def _add(self, number: int, rows: Array) -> Iterator[tuple[Level, Array]]:
        """Yield the tiles that are complete with some more rows of a level, and those of the levels below."""
        level = self._levels[number]
        level.rows.append(rows)
        level.high += len(rows)
        if level.high < self._tile[0] and level.done + level.high < level.plane[0]:
            return
        rows = level.rows[0] if len(level.rows) == 1 else np.concatenate(level.rows)
        level.rows, level.done, level.high = [], (level.done + level.high) % level.plane[0], 0
        for start in range(0, level.plane[1], self._tile[1]):
            yield level, rows[:, start : start + self._tile[1]].copy()
        if number + 1 < len(self._levels):
            step = (2, 2, 1)[: rows.ndim]
            parts = [self._method(rows[:, a : a + COLUMNS], step) for a in range(0, rows.shape[1], COLUMNS)]
            yield from self._add(number + 1, np.concatenate(parts, axis=1))

    def _cast(self, values: Array) -> Array:
        """Return values in the dtype of the file.

        Raises:
            ValueError: if it cannot hold them.
        """
        if values.dtype == self._dtype:
            return values
        if values.dtype.kind in "iu":
            low, high = int(values.min()), int(values.max())
            limits = np.iinfo(self._dtype)
            if low < limits.min or high > limits.max:
                raise ValueError(
                    f"OME-TIFF has no integers of 64 bits, and {self._dtype} holds none from {low} to {high}; export "
                    "to .nii.gz, or number the labels anew"
                )
        return values.astype(self._dtype)

    def _encoded(self, item: tuple[Level, Array]) -> tuple[Level, bytes]:
        """Return a tile as it is stored: filled up with the nearest pixels, as differences, compressed."""
        level, tile = item
        short = [(0, whole - n) for whole, n in zip(self._tile, tile.shape, strict=False)]
        tile = np.pad(tile, [*short, (0, 0)][: tile.ndim], mode="edge")
        if self._predictor:
            tile[:, 1:] -= tile[:, :-1].copy()
        return level, zlib.compress(tile.astype(self._dtype.newbyteorder("<"), copy=False).tobytes(), COMPRESSION)


def software_of(path: Path) -> str:
    """Return the tag `Software` of a TIFF."""
    import tifffile  # noqa: PLC0415 - an extra

    with tifffile.TiffFile(path) as file:
        return str(file.pages.first.tags["Software"].value)


def _stored_tiles(level: Level) -> Iterator[bytes]:
    """Yield the tiles in the file of a level."""
    if level.file is not None:
        level.file.seek(0)
        while length := level.file.read(4):
            yield level.file.read(int.from_bytes(length, "little"))


def level_shapes(plane: Ints, inner: int) -> list[Ints]:
    """Return the shapes of a plane in the levels of a pyramid.

    >>> level_shapes((1000, 400), 2), level_shapes((200, 100, 3), 3)
    ([(1000, 400), (500, 200), (250, 100)], [(200, 100, 3)])
    """
    shapes = [plane]
    while max(shapes[-1][:2]) > SMALLEST:
        shapes.append((*(-(-n // 2) for n in shapes[-1][:2]), *plane[2:inner]))
    return shapes


def is_rgb(volume: Volume) -> bool:
    """Return whether a volume is a picture: two spatial axes, and three channels of 8 bits that have no other names."""
    names = [name.lower() for name in names_of_channels(volume)]
    is_named = bool(names) and names not in (["r", "g", "b"], ["red", "green", "blue"])
    is_picture = volume.dtype == np.uint8 and volume.spatial_ndim == len("yx") and volume.channels == RGB
    return is_picture and volume.channel_axis is not None and not is_named


def names_of_channels(volume: Volume) -> list[str]:
    """Return the names of channels by the coordinate of their axis; none where it has none, or has numbers."""
    coordinate: Any = volume.source.coords.get(volume.channel_axis or "")
    if coordinate is None or coordinate.ndim != 1 or coordinate.dtype.kind in "biufmM":
        return []
    return [str(name) for name in coordinate.values]


def geo_tags(volume: Volume, axes: dict[str, str]) -> list[tuple[int, str, int, Any, bool]]:
    """Return the tags of a GeoTIFF, where the volume comes from one, at the place that its coordinates say.

    Raises:
        ValueError: if coordinates are not evenly spaced.
    """
    keys: Any = volume.source.attrs.get("geotiff_keys")
    x, y = (spacing_along(volume.source, axes[role]) for role in "xy")
    if not isinstance(keys, dict) or x is None or y is None or x.step is None or y.step is None:
        return []
    half = 0.0 if geo_raster_type(keys["34735"]) == PIXEL_IS_POINT else 0.5
    left, top = x.start - half * x.step, y.start - half * y.step
    tags: list[tuple[int, str, int, Any, bool]] = []
    if x.step > 0 > y.step:
        tags += [
            (PIXEL_SCALE, "d", 3, (x.step, -y.step, 0.0), True),
            (TIE_POINT, "d", 6, (0.0, 0.0, 0.0, left, top, 0.0), True),
        ]
    else:
        matrix = (x.step, 0.0, 0.0, left, 0.0, y.step, 0.0, top, *(0.0,) * 7, 1.0)
        tags.append((TRANSFORMATION, "d", 16, matrix, True))
    for code, kind in GEO_KEYS.items():
        if code in keys:
            tags.append((int(code), kind, 0 if kind == "s" else len(keys[code]), keys[code], True))
    return tags


def band_names(volume: Volume) -> list[tuple[int, str, int, Any, bool]]:
    """Return the tag with the names of channels that readers of GeoTIFF know, if they have names.

    >>> import xarray
    >>> scores = xarray.DataArray(np.zeros((1, 4, 4)), {"c": ["R & D"]}, ("c", "y", "x"))
    >>> band_names(Volume(scores))[0][3]
    b'<GDALMetadata><Item name="DESCRIPTION" sample="0" role="description">R &amp;amp; D</Item></GDALMetadata>'
    """
    items = "".join(
        f'<Item name="DESCRIPTION" sample="{number}" role="description">{escape(escape(name))}</Item>'
        for number, name in enumerate(names_of_channels(volume))
    )
    return [(BAND_METADATA, "s", 0, f"<GDALMetadata>{items}</GDALMetadata>".encode(), True)] if items else []


def _ome_metadata(volume: Volume, axes: dict[str, str], mark: str) -> dict[str, Any]:
    """Return what tifffile writes as OME-XML about sizes."""
    metadata: dict[str, Any] = {"UUID": str(uuid.uuid5(uuid.NAMESPACE_OID, mark))}
    for role, name in axes.items():
        axis = spacing_along(volume.source, name)
        if axis is not None and axis.step:
            size, unit = _known_size(axis)
            metadata |= {f"PhysicalSize{role.upper()}": size, f"PhysicalSize{role.upper()}Unit": unit}
    frames = time_spacing(volume)
    if frames is not None and frames.step and frames.unit in SECONDS:
        metadata |= {"TimeIncrement": abs(frames.step), "TimeIncrementUnit": UNITS[frames.unit]}
    return metadata


def _known_size(axis: Spacing) -> tuple[float, str]:
    """Return the size of a voxel and its unit as OME-XML has them.

    >>> _known_size(Spacing(-250.0, 0.0, "micrometer")), _known_size(Spacing(2.0))
    ((250.0, 'µm'), (2.0, 'pixel'))
    """
    size = abs(axis.step or 0.0)
    if axis.unit in METERS:
        unit = axis.unit if axis.unit in UNITS else "micrometer"
        return size * factor_of(axis.unit, unit), UNITS[unit]
    return size, "pixel" if axis.unit is None else "reference frame"


def _resolution(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the pixels per centimetre, for readers that do not know OME."""
    lengths = {short: long for long, short in UNITS.items() if long in METERS}
    steps = [
        metadata[f"PhysicalSize{role}"] * factor_of(lengths[unit], "centimeter")
        for role in "XY"
        if (unit := metadata.get(f"PhysicalSize{role}Unit")) in lengths
    ]
    return {"resolution": tuple(1 / step for step in steps), "resolutionunit": 3} if len(steps) == 2 else {}
