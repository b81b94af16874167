"""Volumes whose values are preprocessed as they are read, and so before they are resampled, as nnU-Net does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from oocpatch.models.preprocess_steps import Statistics, Step
from oocpatch.models.preprocessing import (
    CheckedPreprocess,
    preprocess_function,
    preprocess_statistics,
    step_json,
    steps_of,
)
from oocpatch.planning.box import Box, worthwhile
from oocpatch.progress import OnProgress
from oocpatch.volumes.model_grid import ModelGrid
from oocpatch.volumes.passes import run_pass
from oocpatch.volumes.resampling import largest_read
from oocpatch.volumes.statistics import VolumeStatistics
from oocpatch.volumes.volume import Volume, read_selection


@dataclass(frozen=True)
class PreprocessedReader:
    """Reads selections of a volume and preprocesses them.

    Attributes:
        volume: the volume.
        function: maps patches `(B, C, *patch)` to patches.
    """

    volume: Volume
    function: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        return read_selection(self.volume.axes, self.volume.shape, self.volume.channels, selection, self.read)

    def read(self, box: Box) -> npt.NDArray[Any]:
        """Read a box, `(C, *box.shape)`."""
        values = self.function(torch.from_numpy(self.volume.read(box))[None])
        return np.asarray(values[0].numpy())

    def for_run(self, threads: int) -> PreprocessedReader:
        """Return the same reader for one run; see `Volume.for_run`."""
        return replace(self, volume=self.volume.for_run(threads))

    def close(self) -> None:
        """Close the file of the volume."""
        self.volume.source.close()


@dataclass(frozen=True)
class Normalization:
    """The steps of preprocessing that are applied to a volume as it is read, with the numbers that they need of it.

    Attributes:
        steps: the steps.
        statistics: as `preprocess_statistics` returns them.
        box: the part of the volume that has voxels other than zero, which is measured; None: all of it.
        limits: least and greatest value of each channel, which cubic resampling must not go beyond; may be empty.
    """

    steps: CheckedPreprocess
    statistics: Statistics
    box: Box | None = None
    limits: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(
        cls,
        volume: Volume,
        steps: CheckedPreprocess,
        box: Box | None,
        *,
        max_memory: int,
        progress: str | bool | OnProgress,
    ) -> Normalization:
        """Return the steps with statistics, for which the box is read once per step that needs them."""
        return cls(steps, preprocess_statistics(steps, volume, max_memory, progress=progress, box=box), box)

    def within_limits(self, volume: Volume, *, max_memory: int, progress: str | bool | OnProgress) -> Normalization:
        """Return the same with the limits of the preprocessed volume, which is read once."""
        return replace(self, limits=VolumeStatistics(self.over(volume), max_memory, progress, box=self.box).extremes())

    def over(self, volume: Volume) -> Volume:
        """Return a volume of preprocessed values."""
        function: Any = preprocess_function(self.steps, self.statistics)
        if function is None:
            return volume
        source = volume.source.computed(PreprocessedReader(volume, function), dtype=np.dtype(np.float32))
        result = Volume(source, volume.axes)
        voxel = volume.dtype.itemsize + 16  # as read, in float64, in float32 and where zeros are
        read_bytes = voxel * volume.channels * math.prod(largest_read(result)) + volume.chunk_bytes
        return Volume(replace(source, read_bytes=read_bytes), volume.axes)

    def to_json(self) -> list[Any]:
        """Return what identifies a run with these steps."""
        steps = [step_json(step) for step in steps_of(self.steps) if isinstance(step, Step)]
        box = None if self.box is None else [list(self.box.start), list(self.box.stop)]
        return [steps, [list(pair) for pair in self.statistics], [list(pair) for pair in self.limits], box]


SCANNED = 4 << 20
"""Bytes that are read at a time to find the voxels that are not zero."""


def nonzero_box(volume: Volume, *, max_memory: int, progress: str | bool | OnProgress) -> Box | None:
    """Return the box of the voxels that are not zero in all channels; None where it is the whole volume, or empty.

    Of a volume with such voxels at each of its sides, only these are read. Looped axes are not cut.
    """
    reader, shape = volume.for_run(), volume.shape
    whole, looped = Box.of_shape(shape), len(shape) - volume.spatial_ndim
    step = worthwhile(volume.chunks, shape, SCANNED // (volume.channels * volume.dtype.itemsize))

    def spans(box: Box) -> list[tuple[int, int]] | None:
        is_set = (reader.read(box) != 0).any(axis=0)
        at = [np.flatnonzero(is_set.any(axis=tuple(set(range(len(shape))) - {axis}))) for axis in range(len(shape))]
        return [(a + int(p[0]), a + int(p[-1]) + 1) for a, p in zip(box.start, at, strict=True)] if at[0].size else None

    def found(region: Box) -> Iterator[list[tuple[int, int]]]:
        parts = run_pass(
            spans,
            region.split(step),
            threads=max(1, min(2, max_memory // (8 * SCANNED))),
            name="extent",
            unit="voxels",
            size=lambda box: box.size,
            total=region.size,
            progress=progress,
        )
        return (part for part in parts if part is not None)

    sides = [whole.along(a, end, end + 1) for a, n in enumerate(shape) if a >= looped for end in (0, n - 1)]
    if all(any(True for _ in found(side)) for side in sides) or not (parts := list(found(whole))):
        return None
    low = [min(part[a][0] for part in parts) if a >= looped else 0 for a in range(len(shape))]
    high = [max(part[a][1] for part in parts) if a >= looped else n for a, n in enumerate(shape)]
    return Box(tuple(low), tuple(high))


def interpolates_beyond(grid: ModelGrid | None) -> bool:
    """Return whether resampling to a grid may give values that no voxel of the volume reaches."""
    orders = () if grid is None else grid.order.values() if isinstance(grid.order, dict) else (grid.order,)
    return any(order == 3 for order in orders)
