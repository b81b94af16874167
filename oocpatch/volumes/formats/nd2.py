"""ND2 by nd2: a position of the stage, frame by frame."""

from __future__ import annotations

import contextlib
import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray

from oocpatch.volumes.formats.planes import Selection, name_channels, read_planes
from oocpatch.volumes.formats.spec import FileMetadata, FileSpec, check_number, import_reader
from oocpatch.volumes.ome_metadata import coordinate

FRAME = frozenset("CYXS")
"""Axes of a frame: channels, rows, columns, colours."""


class Nd2File:
    """A position of an ND2. Frames hold all channels of a plane, and are read whole."""

    def __init__(self, spec: FileSpec) -> None:
        nd2 = import_reader("nd2", "microscopy", spec)
        self._path = Path(spec.address)
        with contextlib.ExitStack() as stack:
            # nd2 would map a file of Python's own into memory, and the pages of a map count as memory.
            opener = importlib.import_module("fsspec").filesystem("file")
            handle = stack.enter_context(opener.open(spec.address, "rb"))
            self._file = stack.enter_context(contextlib.closing(nd2.ND2File(handle)))
            sizes = dict(self._file.sizes)
            self._loops = {axis: size for axis, size in sizes.items() if axis not in FRAME}
            frame = [size for axis, size in sizes.items() if axis in FRAME]
            check_number("series", spec.series, [tuple(frame)] * self._loops.get("P", 1), spec)
            self._position = spec.series
            sizes.pop("P", None)
            names = tuple("c" if axis == "S" and "C" not in sizes else axis.lower() for axis in sizes)
            self.metadata = FileMetadata(
                shape=tuple(sizes.values()),
                dtype=self._file.dtype,
                chunks=(*(1 for _ in sizes), *frame)[-len(sizes) :],
                names=names,
                coords=self._coords(dict(zip(names, sizes.values(), strict=True))),
            )
            self._stack = stack.pop_all()

    def read(self, selection: Selection) -> npt.NDArray[Any]:
        """Read the voxels of a selection."""
        return read_planes(self.metadata, selection, len(self._loops) - ("P" in self._loops), self._frame)

    def files(self) -> list[Path]:
        """Return the file."""
        return [self._path]

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    def _frame(self, index: tuple[int, ...], selection: Selection) -> npt.NDArray[Any]:
        others = iter(index)
        number = 0
        for axis, size in self._loops.items():
            number = number * size + (self._position if axis == "P" else next(others))
        return np.asarray(self._file.read_frame(number))[selection]

    def _coords(self, sizes: dict[str, int]) -> dict[str, xarray.Variable]:
        """Return the coordinates of axes whose steps are known, and the names of channels."""
        channels = self._file.metadata.channels or []
        steps: dict[str, tuple[float, str]] = {}
        for channel in channels[:1]:
            volume = channel.volume
            known = zip("xyz", volume.axesCalibrated, volume.axesCalibration, strict=False)
            steps |= {axis: (step, "um") for axis, is_known, step in known if is_known}
        for loop in self._file.experiment:
            if loop.type == "ZStackLoop" and loop.parameters.stepUm:
                steps["z"] = loop.parameters.stepUm, "um"
            elif loop.type == "TimeLoop":
                steps["t"] = (loop.parameters.periodDiff.avg or loop.parameters.periodMs) / 1000, "s"
        return {
            **name_channels([channel.channel.name for channel in channels], sizes.get("c", 0)),
            **{
                axis: coordinate(axis, sizes[axis], step, unit=unit)
                for axis, (step, unit) in steps.items()
                if axis in sizes and step > 0 and math.isfinite(step)
            },
        }
