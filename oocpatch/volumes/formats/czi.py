"""CZI by pylibCZIrw: a level of a scene, composed of its tiles, `(t, c, z, y, x)` as far as there are such axes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.volumes.formats.planes import Selection, name_channels, read_planes
from oocpatch.volumes.formats.spec import FileMetadata, FileSpec, UnreadableError, check_number, import_reader
from oocpatch.volumes.ome_metadata import coordinate

DTYPES = {"Gray8": "u1", "Gray16": "u2", "Gray32Float": "f4", "Bgr24": "u1", "Bgr48": "u2", "Bgr96Float": "f4"}

LOOPS = "TVRIHBCZ"
"""Axes of planes, in the order of the volume's."""


class CziFile:
    """A level of a scene of a CZI. Pixels of no tile are 0; colours are the last axis, as RGB."""

    def __init__(self, spec: FileSpec) -> None:
        czi = import_reader("pylibCZIrw.czi", "microscopy", spec)
        self._path = Path(spec.address)
        self._file = czi.CziReader(spec.address)
        try:
            scenes = self._file.scenes_bounding_rectangle_no_pyramid
            places = sorted(scenes.items()) or [(None, self._file.total_bounding_rectangle_no_pyramid)]
            check_number("series", spec.series, [(place.h, place.w) for _, place in places], spec)
            self._scene, self._place = places[spec.series]
            factors, tile = self._tiles()
            check_number("level", spec.level, [(self._place.h // f, self._place.w // f) for f in factors], spec)
            self._factor = factors[spec.level]
            self.metadata = self._metadata(tile)
        except BaseException:
            self._file.close()
            raise

    def read(self, selection: Selection) -> npt.NDArray[Any]:
        """Read the voxels of a selection."""
        return read_planes(self.metadata, selection, len(self._loops), self._region)

    def files(self) -> list[Path]:
        """Return the file."""
        return [self._path]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _region(self, index: tuple[int, ...], selection: Selection) -> npt.NDArray[Any]:
        rows, columns = (range(*s.indices(n)) for s, n in zip(selection, self._shape, strict=False))
        factor, place = self._factor, self._place
        region = (
            place.x + columns.start * factor,
            place.y + rows.start * factor,
            len(columns) * factor,
            len(rows) * factor,
        )
        # Rounded up, since libCZI rounds the number of pixels down.
        zoom = min(1.0, float(np.nextafter(np.float32(1 / factor), np.float32(2))))
        plane = dict(zip(self._loops, index, strict=True))
        values = self._file.read(roi=region, plane=plane, scene=self._scene, zoom=zoom)
        return np.asarray(values[..., ::-1][..., selection[2]] if self._is_rgb else values[..., 0])

    def _tiles(self) -> tuple[list[int], tuple[int, int]]:
        """Return the factors by which the levels of the scene are smaller, and the size of the largest one's tiles."""
        ratios: set[float] = set()
        tile = (1, 1)

        def look(_: int, info: Any) -> bool:
            nonlocal tile
            logical, stored = info.logicalRect, info.physicalSize
            ratios.add(logical.w / stored.w)
            if logical.w == stored.w:
                tile = max(tile, (stored.h, stored.w), key=math.prod)
            return True

        self._file.enumerate_subblocks_subset(look, roi=self._place)
        # Tiles of odd sizes are not smaller by a whole number, so the levels are powers of the first one's factor.
        base = round(min((r for r in ratios if r > 1.5), default=2))
        powers = {round(math.log(r, base)) for r in ratios if r > 1.5}
        return [1, *(base**p for p in sorted(powers) if base**p <= min(self._place.h, self._place.w))], tile

    def _metadata(self, tile: tuple[int, int]) -> FileMetadata:
        bounds = self._file.total_bounding_box_no_pyramid
        sizes = {axis: bounds[axis][1] for axis in LOOPS if axis in bounds and bounds[axis][1] > 1}
        kinds = set(self._file.pixel_types.values())
        self._is_rgb = any(kind.startswith("Bgr") for kind in kinds)
        if not kinds <= DTYPES.keys() or (self._is_rgb and "C" in sizes):
            raise UnreadableError(
                f"{self._path} cannot be read: pixels must be of {', '.join(DTYPES)}, and colours in one channel, "
                f"got {', '.join(sorted(kinds))} in {sizes.get('C', 1)} channels"
            )
        self._loops = tuple(sizes)
        self._shape = self._place.h // self._factor, self._place.w // self._factor
        colours = (3,) if self._is_rgb else ()
        names = (*(axis.lower() for axis in sizes), "y", "x", *("c" for _ in colours))
        shape = (*sizes.values(), *self._shape, *colours)
        document = self._file.metadata.get("ImageDocument")
        scales = _nodes(document, "Metadata", "Scaling", "Items", "Distance")
        steps = {str(scale["@Id"]).lower(): 1e6 * float(scale["Value"]) for scale in scales if scale.get("Value")}
        channels = _nodes(document, "Metadata", "Information", "Image", "Dimensions", "Channels", "Channel")
        coords = name_channels([str(channel.get("@Name", "")) for channel in channels], sizes.get("C", 0))
        for name, size in zip(names, shape, strict=True):
            if step := steps.get(name):
                factor = self._factor if name in "xy" else 1
                coords[name] = coordinate(name, size, step * factor, step * (factor - 1) / 2, "um")
        return FileMetadata(
            shape=shape,
            dtype=np.result_type(*(DTYPES[kind] for kind in kinds)),
            chunks=(*(1 for _ in sizes), *(min(t, n) for t, n in zip(tile, self._shape, strict=True)), *colours),
            names=names,
            coords=coords,
        )


def _nodes(node: Any, *path: str) -> list[Mapping[str, Any]]:
    """Return the elements at a path in parsed XML, where one element is itself, and several are a list."""
    for name in path:
        node = node.get(name) if isinstance(node, Mapping) else None
    return node if isinstance(node, list) else [node] if node else []
