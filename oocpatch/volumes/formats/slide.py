"""Slides by OpenSlide, those of DICOM too: a level of the pyramid as `(y, x, c)` in RGB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.planning.box import Box
from oocpatch.volumes.formats.dicom import series_files
from oocpatch.volumes.formats.spec import (
    FileMetadata,
    FileSpec,
    UnreadableError,
    check_number,
    dicom_format,
    import_reader,
)
from oocpatch.volumes.ome_metadata import coordinate

TILE = 512
"""Edge of a tile if the slide is not tiled."""


class SlideFile:
    """A level of a slide, in RGB; voxels that were not scanned have the slide's background colour, else white.

    OpenSlide takes integer positions in the largest level, and interpolates if they are not a voxel of the level that
    is read. Whole tiles are read, each at its own position, so that a voxel has the same value in every box.
    """

    def __init__(self, spec: FileSpec) -> None:
        openslide = import_reader("openslide", "slide", spec)
        self._files = _files(spec)
        self._slide = openslide.OpenSlide(self._files[0])
        # The plan accounts for all memory, and neighbouring reads share no tile that is worth caching.
        self._slide.set_cache(openslide.OpenSlideCache(0))
        properties = dict(self._slide.properties)
        self._level = spec.level
        try:
            check_number("level", spec.level, [(h, w) for w, h in self._slide.level_dimensions], spec)
        except UnreadableError:
            self._slide.close()
            raise
        width, height = self._slide.level_dimensions[spec.level]
        tile = [int(properties.get(f"openslide.level[{spec.level}].tile-{n}", TILE)) for n in ("height", "width")]
        self._tile = min(tile[0], height), min(tile[1], width)
        # OpenSlide uses one factor for both axes; any other would shift the voxels.
        self._factor = float(self._slide.level_downsamples[spec.level])
        colour = properties.get("openslide.background-color", "FFFFFF")
        self._background = np.frombuffer(bytes.fromhex(colour), np.uint8)
        shape = (height, width, 3)
        coords = {}
        for name, size, full in zip("yx", shape, self._slide.dimensions[::-1], strict=False):
            if step := float(properties.get(f"openslide.mpp-{name}", 0)):
                factor = full / size
                coords[name] = coordinate(name, size, step * factor, step * (factor - 1) / 2, "um")
        names = ("openslide.vendor", "openslide.objective-power")
        self.metadata = FileMetadata(
            shape=shape,
            dtype=np.dtype(np.uint8),
            chunks=(*self._tile, 3),
            names=("y", "x", "c"),
            coords=coords,
            attrs={k.removeprefix("openslide."): properties[k] for k in names if k in properties},
        )

    def read(self, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Read the voxels of a selection."""
        spans = [s.indices(n) for s, n in zip(selection[:2], self.metadata.shape, strict=False)]
        box = Box(tuple(a for a, _, _ in spans), tuple(b for _, b, _ in spans))
        out = np.empty((*box.shape, 3), np.uint8)
        for part in box.split(self._tile):
            corner = tuple(s // t * t for s, t in zip(part.start, self._tile, strict=True))
            size = [min(t, n - c) for t, n, c in zip(self._tile, self.metadata.shape, corner, strict=False)]
            position = [round(c * self._factor) for c in corner]
            values = np.asarray(self._slide.read_region(tuple(position[::-1]), self._level, tuple(size[::-1])))
            tile = np.where(values[..., 3:] == 0, self._background, values[..., :3])
            out[part.slices(box.start)] = tile[part.slices(corner)]
        return out[..., selection[2]]

    def files(self) -> list[Path]:
        """Return the files of the slide."""
        return self._files

    def close(self) -> None:
        """Close the slide."""
        self._slide.close()


def _files(spec: FileSpec) -> list[Path]:
    """Return the file, which comes first, and those that hold other parts of the slide.

    These are the directory beside a `.mrxs`, the images that a `.vms` or `.vmu` names, and the levels in a series of
    DICOM, which is the one in a directory, or that of a file.
    """
    path = Path(spec.address)
    suffix = path.suffix.lower()
    if path.is_dir() or dicom_format(path):
        return series_files(spec)
    if suffix == ".mrxs":
        return [path, *(file for file in path.with_suffix("").rglob("*") if file.is_file())]
    if suffix in (".vms", ".vmu"):
        lines = path.read_text(errors="replace").splitlines()
        named = [path.parent / value for line in lines if (value := line.partition("=")[2].strip())]
        return [path, *(file for file in named if file.is_file())]
    return [path]
