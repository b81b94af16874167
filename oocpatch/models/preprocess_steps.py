"""Named steps of preprocessing: formulas of each channel's values.

A step that needs statistics of the volume (`zscore`, `percentile`) becomes a `Scale` of given numbers once they are
known. Numbers are one for all channels, or one per channel that the step applies to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from oocpatch.volumes.statistics import VolumeStatistics

Statistics = tuple[tuple[float, float], ...]
"""Two numbers per channel."""

Numbers = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A step of preprocessing.

    Attributes:
        channels: numbers of the channels that it applies to; empty: all.
    """

    name: ClassVar[str]
    channels: tuple[int, ...] = field(default=(), kw_only=True)

    def apply(self, values: torch.Tensor) -> None:
        """Apply the step to patches `(B, C, *patch)`, in place."""
        for position, channel in enumerate(self.channels or range(values.shape[1])):
            self._apply(values[:, channel], position)

    def _apply(self, values: torch.Tensor, position: int) -> None:
        """Apply the step to one channel, the `position`-th that it applies to."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Measured(Step):
    """A step that needs statistics of the volume.

    Attributes:
        epsilon: number that is added to the divisor.
        pooled: whether the channels have statistics in common.
        nonzero: whether voxels of value 0 neither count nor change.
    """

    epsilon: float = field(default=0.0, kw_only=True)
    pooled: bool = field(default=False, kw_only=True)
    nonzero: bool = field(default=False, kw_only=True)

    def measure(self, statistics: VolumeStatistics) -> Statistics:
        """Return the two numbers of each channel that `scale` takes."""
        raise NotImplementedError

    def scale(self, statistics: Statistics) -> Scale:
        """Return the step for statistics of the channels; without any, as before the pass over the volume, of ones."""
        raise NotImplementedError

    def _scaled(self, subtract: Sequence[float], spread: Sequence[float], *, clip: bool) -> Scale:
        """Return a scale by a spread; a channel without any is only shifted."""
        subtract, divide = subtract or (0.0,), [s + self.epsilon or 1.0 for s in spread] or (1.0,)
        return Scale(tuple(subtract), tuple(divide), clip=clip, nonzero=self.nonzero, channels=self.channels)


@dataclass(frozen=True, slots=True)
class ZScore(Measured):
    """Subtract the mean of the volume's channel and divide by its standard deviation."""

    name: ClassVar[str] = "zscore"

    def measure(self, statistics: VolumeStatistics) -> Statistics:
        """Return mean and standard deviation of each channel."""
        return statistics.moments()

    def scale(self, statistics: Statistics) -> Scale:
        """Return the step for mean and standard deviation of each channel.

        >>> ZScore().scale(((4.0, 2.0), (5.0, 0.0))).divide
        (2.0, 1.0)
        """
        return self._scaled([mean for mean, _ in statistics], [deviation for _, deviation in statistics], clip=False)


@dataclass(frozen=True, slots=True)
class Percentile(Measured):
    """Map two percentiles of the volume's channel to 0 and 1.

    Attributes:
        low, high: the percentiles, `0 <= low < high <= 100`.
        clip: whether values below 0 become 0, and those above 1 become 1.
    """

    name: ClassVar[str] = "percentile"
    low: float = 0.5
    high: float = 99.5
    clip: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 100:
            raise ValueError(f"preprocess percentile must have 0 <= low < high <= 100, got {self.low} and {self.high}")

    def measure(self, statistics: VolumeStatistics) -> Statistics:
        """Return the two percentiles of each channel."""
        return tuple((low, high) for low, high in statistics.percentiles((self.low, self.high)))

    def scale(self, statistics: Statistics) -> Scale:
        """Return the step for the two percentiles of each channel."""
        return self._scaled([low for low, _ in statistics], [high - low for low, high in statistics], clip=self.clip)


@dataclass(frozen=True, slots=True)
class Scale(Step):
    """Subtract and divide by given numbers.

    Attributes:
        subtract, divide: the numbers.
        clip: whether values below 0 become 0, and those above 1 become 1.
        nonzero: whether voxels of value 0 keep it.
    """

    name: ClassVar[str] = "scale"
    subtract: Numbers = (0.0,)
    divide: Numbers = (1.0,)
    clip: bool = False
    nonzero: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if 0 in self.divide:
            raise ValueError("preprocess scale must divide by numbers other than 0")

    def _apply(self, values: torch.Tensor, position: int) -> None:
        zeros = values == 0 if self.nonzero else None
        values.sub_(_at(self.subtract, position)).div_(_at(self.divide, position))
        if self.clip:
            values.clamp_(0, 1)
        if zeros is not None:
            values.masked_fill_(zeros, 0)


@dataclass(frozen=True, slots=True)
class Clip(Step):
    """Limit values to a range.

    Attributes:
        low, high: the least and the largest value.
    """

    name: ClassVar[str] = "clip"
    low: Numbers = (-math.inf,)
    high: Numbers = (math.inf,)

    def _apply(self, values: torch.Tensor, position: int) -> None:
        values.clamp_(_at(self.low, position), _at(self.high, position))


@dataclass(frozen=True, slots=True)
class Binarize(Step):
    """Map values above a threshold to 1, others to 0.

    Attributes:
        at: the threshold.
    """

    name: ClassVar[str] = "binarize"
    at: Numbers = (0.5,)

    def _apply(self, values: torch.Tensor, position: int) -> None:
        values.copy_(values > _at(self.at, position))


@dataclass(frozen=True, slots=True)
class Sigmoid(Step):
    """Map values to 0..1 by the logistic function."""

    name: ClassVar[str] = "sigmoid"

    def _apply(self, values: torch.Tensor, position: int) -> None:  # noqa: ARG002 - as the others
        values.sigmoid_()


STEPS: dict[str, type[Step]] = {step.name: step for step in (ZScore, Percentile, Scale, Clip, Binarize, Sigmoid)}
"""Steps by their names."""


def _at(numbers: Numbers, position: int) -> float:
    return numbers[0] if len(numbers) == 1 else numbers[position]
