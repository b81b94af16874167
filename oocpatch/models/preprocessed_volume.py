"""Volumes whose values are preprocessed as they are read, and so before they are resampled, as nnU-Net does."""

from __future__ import annotations

from collections.abc import Callable
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
from oocpatch.planning.box import Box
from oocpatch.progress import OnProgress
from oocpatch.volumes.model_grid import ModelGrid
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
        limits: least and greatest value of each channel, which cubic resampling must not go beyond; may be empty.
    """

    steps: CheckedPreprocess
    statistics: Statistics
    limits: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(
        cls, volume: Volume, steps: CheckedPreprocess, *, max_memory: int, progress: str | bool | OnProgress
    ) -> Normalization:
        """Return the steps with statistics, for which the volume is read once per step that needs them."""
        return cls(steps, preprocess_statistics(steps, volume, max_memory, progress=progress))

    def within_limits(self, volume: Volume, *, max_memory: int, progress: str | bool | OnProgress) -> Normalization:
        """Return the same with the limits of the preprocessed volume, which is read once."""
        return replace(self, limits=VolumeStatistics(self.over(volume), max_memory, progress).extremes())

    def over(self, volume: Volume) -> Volume:
        """Return a volume of preprocessed values."""
        function: Any = preprocess_function(self.steps, self.statistics)
        if function is None:
            return volume
        voxel = 3 * max(8, volume.dtype.itemsize)  # as read, in float64, and in float32
        source = replace(
            volume.source,
            load=PreprocessedReader(volume, function),
            dtype=np.dtype(np.float32),
            array=None,
            files=None,
            packing={},
            read_bytes=voxel * volume.channels * int(np.prod(volume.chunks)) + volume.chunk_bytes,
        )
        return Volume(source, volume.axes)

    def to_json(self) -> list[Any]:
        """Return what identifies a run with these steps."""
        steps = [step_json(step) for step in steps_of(self.steps) if isinstance(step, Step)]
        return [steps, [list(pair) for pair in self.statistics], [list(pair) for pair in self.limits]]


def interpolates_beyond(grid: ModelGrid | None) -> bool:
    """Return whether resampling to a grid may give values that no voxel of the volume reaches."""
    orders = () if grid is None else grid.order.values() if isinstance(grid.order, dict) else (grid.order,)
    return any(order == 3 for order in orders)
