"""Slides by OpenSlide: a level of the pyramid as `(y, x, c)` in RGB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.planning.box import Box
from oocpatch.volumes.formats.spec import FileMetadata, FileSpec, UnreadableError, import_extra
from oocpatch.volumes.ome_metadata import coordinate

TILE = 512
"""Edge of a tile if the slide is not tiled."""


class SlideFile:
    """A level of a slide, in RGB; voxels that were not scanned have the slide's background colour, else white.

    OpenSlide takes integer positions in the largest level, and interpolates if they are not a voxel of the level that
    is read. Whole tiles are read, each at its own position, so that a voxel has the same value in every box.
    """

    def __init__(self, spec: FileSpec) -> None:
        openslide = import_extra("openslide", "slide", spec)
        self._path = Path(spec.address)
        self._slide = openslide.OpenSlide(spec.address)
        # The plan accounts for all memory, and neighbouring reads share no tile that is worth caching.
        self._slide.set_cache(openslide.OpenSlideCache(0))
        properties = dict(self._slide.properties)
        self._level = spec.level
        if spec.level >= self._slide.level_count:
            levels = "; ".join(f"{i}: {w} x {h}" for i, (w, h) in enumerate(self._slide.level_dimensions))
            self._slide.close()
            raise UnreadableError(f"level must be one of those of {spec.address} ({levels}), got {spec.level}")
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

    def files(self) -> set[Path]:
        """Return the file, with the directory beside a `.mrxs` and the images that a `.vms` or `.vmu` names."""
        files = {self._path}
        suffix = self._path.suffix.lower()
        if suffix == ".mrxs":
            files.update(file for file in self._path.with_suffix("").rglob("*") if file.is_file())
        elif suffix in (".vms", ".vmu"):
            lines = self._path.read_text(errors="replace").splitlines()
            named = [self._path.parent / value for line in lines if (value := line.partition("=")[2].strip())]
            files.update(file for file in named if file.is_file())
        return files

    def close(self) -> None:
        """Close the slide."""
        self._slide.close()
