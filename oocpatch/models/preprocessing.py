"""Preprocessing of patches: what is applied to them before the model sees them.

A named preprocess is one formula per channel, `(x - subtract) / divide`, optionally clipped to `[0, 1]`. Its numbers
are given (`scale`), or taken from the whole volume in one pass before the first block (`zscore`, `percentile`), so that
every patch and every process uses the same.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from oocpatch.progress import OnProgress
from oocpatch.volumes.statistics import VolumeStatistics
from oocpatch.volumes.volume import Volume

Statistics = tuple[tuple[float, float], ...]
"""Two numbers per channel."""

WIDE = (torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64)
"""Dtypes whose values float32 does not hold: numbers are subtracted in float64 first."""


@dataclass(frozen=True, slots=True)
class ZScore:
    """Subtract the mean of the volume's channel and divide by its standard deviation."""

    name: ClassVar[str] = "zscore"


@dataclass(frozen=True, slots=True)
class Percentile:
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


@dataclass(frozen=True, slots=True)
class Scale:
    """Subtract and divide by given numbers.

    Attributes:
        subtract, divide: one number per channel, or one for all.
        clip: whether values below 0 become 0, and those above 1 become 1.
    """

    name: ClassVar[str] = "scale"
    subtract: tuple[float, ...] = (0.0,)
    divide: tuple[float, ...] = (1.0,)
    clip: bool = False

    def __post_init__(self) -> None:
        if 0 in self.divide:
            raise ValueError("preprocess scale must divide by numbers other than 0")


NamedPreprocess = ZScore | Percentile | Scale
PatchFunction = Callable[..., Any]
NAMED: dict[str, type[NamedPreprocess]] = {kind.name: kind for kind in (ZScore, Percentile, Scale)}


def preprocess_json(preprocess: NamedPreprocess) -> dict[str, Any]:
    """Return a preprocess as the dict by which users ask for it.

    >>> preprocess_json(Percentile(1, 99))
    {'name': 'percentile', 'low': 1, 'high': 99, 'clip': True}
    """
    arguments = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(preprocess).items()}
    return {"name": preprocess.name, **arguments}


def checked_preprocess(
    preprocess: str | Mapping[str, Any] | PatchFunction | None, dtype: np.dtype[Any], channels: int
) -> NamedPreprocess | PatchFunction | None:
    """Check the argument `preprocess` of `predict`.

    Args:
        preprocess: a name, a dict of a name and arguments, or a function of patches.
        dtype: dtype of the volume.
        channels: channels of the volume.

    Raises:
        ValueError, TypeError: for anything else.

    >>> checked_preprocess("percentile", np.dtype("uint8"), 1)
    Percentile(low=0.5, high=99.5, clip=True)
    """
    if preprocess is None or callable(preprocess):
        return preprocess
    mapping = {"name": preprocess} if isinstance(preprocess, str) else preprocess
    if not isinstance(mapping, Mapping):
        raise TypeError(f"preprocess must be a name, a dict or a function, got {type(preprocess).__name__}")
    name = mapping.get("name")
    if name not in NAMED:
        raise ValueError(f"preprocess must be one of {', '.join(NAMED)}, or a function of patches, got {name!r}")
    arguments: dict[str, Any] = {key: value for key, value in mapping.items() if key != "name"}
    allowed = [field.name for field in fields(NAMED[name])]
    if unknown := sorted(arguments.keys() - set(allowed), key=str):
        raise ValueError(
            f"preprocess {name} takes {', '.join(allowed) or 'no arguments'}, got {', '.join(map(str, unknown))}"
        )
    if not isinstance(arguments.get("clip", False), bool):
        raise TypeError(f"preprocess {name}'s clip must be true or false, got {arguments['clip']!r}")
    if name == "scale" and arguments.get("divide") is None:
        arguments["divide"] = _largest(dtype)
    for key in arguments.keys() - {"clip"}:
        label = f"preprocess {name}'s {key}"
        value = arguments[key]
        arguments[key] = _per_channel(label, value, channels) if name == "scale" else _number(label, value)
    return NAMED[name](**arguments)


def needs_statistics(preprocess: NamedPreprocess | PatchFunction | None) -> bool:
    """Return whether a preprocess depends on statistics of the whole volume."""
    return isinstance(preprocess, ZScore | Percentile)


def preprocess_statistics(
    preprocess: NamedPreprocess | PatchFunction | None,
    volume: Volume,
    max_memory: int,
    *,
    progress: str | bool | OnProgress,
) -> Statistics:
    """Return the statistics of the whole volume that a preprocess needs; reads all of it, or nothing."""
    if not isinstance(preprocess, ZScore | Percentile):
        return ()
    statistics = VolumeStatistics(volume, max_memory, progress)
    if isinstance(preprocess, ZScore):
        return statistics.moments()
    return tuple((low, high) for low, high in statistics.percentiles((preprocess.low, preprocess.high)))


def preprocess_function(
    preprocess: NamedPreprocess | PatchFunction | None, statistics: Statistics
) -> nn.Module | PatchFunction | None:
    """Return a preprocess as a function of patches.

    Args:
        preprocess: the checked argument.
        statistics: as `scale_of` takes them; empty as long as only shapes and memory matter.
    """
    return Preprocess(scale_of(preprocess, statistics)) if isinstance(preprocess, NamedPreprocess) else preprocess


def scale_of(preprocess: NamedPreprocess, statistics: Statistics) -> Scale:
    """Return the numbers to subtract and to divide by for a named preprocess.

    Args:
        preprocess: the checked argument.
        statistics: per channel, mean and standard deviation for `zscore`, the two percentiles for `percentile`; a
            channel without spread is only shifted. Without any, as before the pass over the volume, zeros and ones.

    >>> scale_of(ZScore(), ((4.0, 2.0), (5.0, 0.0)))
    Scale(subtract=(4.0, 5.0), divide=(2.0, 1.0), clip=False)
    """
    if isinstance(preprocess, Scale):
        return preprocess
    clip = isinstance(preprocess, Percentile) and preprocess.clip
    if not statistics:
        return Scale(clip=clip)
    spread = [second - first if isinstance(preprocess, Percentile) else second for first, second in statistics]
    return Scale(tuple(float(first) for first, _ in statistics), tuple(float(s) or 1.0 for s in spread), clip)


class Preprocess(nn.Module):
    """A formula applied to patches `(B, C, *patch)`; returns float32.

    >>> Preprocess(Scale((1.0, 2.0), (2.0, 2.0)))(torch.tensor([[[1, 3], [2, 6]]])).tolist()
    [[[0.0, 1.0], [0.0, 2.0]]]
    """

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Apply the formula to patches, in memory of their own."""
        values = patches.to(torch.float64 if patches.dtype in WIDE else torch.float32, copy=True)
        subtract, divide = (
            values.new_tensor(numbers).reshape(-1, *(1,) * (patches.ndim - 2))
            for numbers in (self.scale.subtract, self.scale.divide)
        )
        values.sub_(subtract).div_(divide)
        if self.scale.clip:
            values.clamp_(0, 1)
        return values.to(torch.float32)


def _largest(dtype: np.dtype[Any]) -> float:
    """Return the number by which integers of a dtype are divided to lie in [0, 1]."""
    if dtype.kind == "f":
        raise ValueError(
            "preprocess scale needs to know what to divide floats by: "
            '{"name": "scale", "subtract": 0, "divide": 4095}, or use zscore or percentile'
        )
    return 1.0 if dtype.kind == "b" else float(np.iinfo(dtype).max)


def _per_channel(label: str, value: Any, channels: int) -> tuple[float, ...]:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if len(values) not in (1, channels):
        raise ValueError(f"{label} must be one number, or one per channel ({channels}), got {value}")
    return tuple(_number(label, item) for item in values)


def _number(label: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise TypeError(f"{label} must be a finite number, got {value!r}")
    return float(value)
