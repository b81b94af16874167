"""The padding of a volume: how voxels outside it are read, resolved to a rule that needs nothing but the box."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from oocpatch.planning.choices import STATISTIC_PADDING
from oocpatch.progress import OnProgress
from oocpatch.volumes.statistics import VolumeStatistics
from oocpatch.volumes.volume import Volume


def padding_value(
    volume: Volume, padding_mode: str, *, max_memory: int = 1 << 28, progress: str | bool | OnProgress = False
) -> float:
    """Return the mean, the median or the minimum of a volume, which is read once or a few times.

    It is exact, over all channels, and then has the volume's dtype: integers lose what is behind the point, as in
    TorchIO. NaN and infinities are left out.

    Args:
        volume: the volume.
        padding_mode: `mean`, `median` or `minimum`.
        max_memory: limit in bytes.
        progress: how progress is shown.

    Raises:
        ValueError: if the volume has no finite value.

    >>> volume = Volume(np.array([[-2, 0], [0, -5]], np.int16))
    >>> padding_value(volume, "mean"), padding_value(volume, "median"), padding_value(volume, "minimum")
    (-1, -1, -5)
    """
    statistics = VolumeStatistics(volume, max_memory, progress, pooled=True)
    compute: Mapping[str, Callable[[], tuple[Fraction | float, ...]]] = {
        "mean": statistics.means,
        "median": statistics.medians,
        "minimum": statistics.minima,
    }
    [value] = compute[padding_mode]()
    return _as_dtype(value, volume.dtype)


def reading_rule(padding_mode: str | None, fill: float) -> tuple[str, float]:
    """Return the rule and the value by which `Volume.read` pads.

    Args:
        padding_mode: a checked mode; None reads no voxels outside the volume.
        fill: for `constant`; for a statistic, its value.

    >>> reading_rule("median", 7), reading_rule("edge", 0), reading_rule(None, 0)
    (('constant', 7), ('edge', 0), ('edge', 0))
    """
    return ("constant" if padding_mode in STATISTIC_PADDING else padding_mode or "edge"), fill


def _as_dtype(value: Fraction | float, dtype: np.dtype[Any]) -> float:
    """Return a number as a dtype holds it, as Python's, which JSON can store."""
    if dtype.kind == "f":
        return float(dtype.type(float(value)))
    return bool(value) if dtype.kind == "b" else int(value)
