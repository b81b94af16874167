"""Preprocessing: what is done to patches before the model sees them.

Whatever its name, a named preprocess is one formula per channel, `(x - subtract) / divide`, which may be clipped to
`[0, 1]`. Its numbers are given (`scale`), or taken from the whole volume in one pass before the first block (`zscore`,
`percentile`), so that every patch and every process uses the same.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from oocpatch.volumes.statistics import Passes
from oocpatch.volumes.volume import Volume

NAMES = ("zscore", "percentile", "scale")
PARAMETERS: dict[str, dict[str, Any]] = {
    "zscore": {},
    "percentile": {"low": 0.5, "high": 99.5, "clip": True},
    "scale": {"subtract": 0.0, "divide": None, "clip": False},
}
"""Arguments of each named preprocess, and their defaults."""

Statistics = tuple[tuple[float, float], ...]
"""Two numbers per channel."""

WIDE = (torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64)
"""Dtypes whose values float32 does not hold: numbers are subtracted in float64 first."""


@dataclass(frozen=True, slots=True)
class Formula:
    """`(x - subtract) / divide`, per channel, clipped to `[0, 1]` if asked for.

    Attributes:
        subtract, divide: one number per channel, or one for all.
        clip: whether values below 0 become 0, and those above 1 become 1.
    """

    subtract: tuple[float, ...]
    divide: tuple[float, ...]
    clip: bool

    def __str__(self) -> str:
        def shown(values: tuple[float, ...]) -> str:
            return " ".join(f"{value:.6g}" for value in values[:4]) + (" ..." if len(values) > 4 else "")

        return f"(x - {shown(self.subtract)}) / {shown(self.divide)}{', clipped to 0..1' if self.clip else ''}"


class Preprocess(nn.Module):
    """A formula applied to patches `(B, C, *patch)`; gives float32.

    >>> Preprocess(Formula((1.0, 2.0), (2.0, 2.0), clip=False))(torch.tensor([[[1, 3], [2, 6]]])).tolist()
    [[[0.0, 1.0], [0.0, 2.0]]]
    """

    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches by the formula, in memory of their own."""
        values = patches.to(torch.float64 if patches.dtype in WIDE else torch.float32, copy=True)
        subtract, divide = (
            values.new_tensor(numbers).reshape(-1, *(1,) * (patches.ndim - 2))
            for numbers in (self.formula.subtract, self.formula.divide)
        )
        values.sub_(subtract).div_(divide)
        if self.formula.clip:
            values.clamp_(0, 1)
        return values.to(torch.float32)


def checked_preprocess(
    preprocess: str | Mapping[str, Any] | Callable[..., Any] | None, dtype: np.dtype[Any], channels: int
) -> dict[str, Any] | Callable[..., Any] | None:
    """A preprocess as asked for, in one form: a function, or a dict of its name and all its arguments.

    Args:
        preprocess: a name, a dict of a name and arguments, or a function of patches.
        dtype: of the volume.
        channels: of the volume.

    Raises:
        ValueError, TypeError: for anything else.

    >>> checked_preprocess("percentile", np.dtype("uint8"), 1)
    {'name': 'percentile', 'low': 0.5, 'high': 99.5, 'clip': True}
    """
    if preprocess is None or callable(preprocess):
        return preprocess
    given = {"name": preprocess} if isinstance(preprocess, str) else preprocess
    if not isinstance(given, Mapping):
        raise TypeError(f"preprocess must be a name, a dict or a function, got {type(preprocess).__name__}")
    name = given.get("name")
    if name not in NAMES:
        raise ValueError(f"preprocess must be one of {', '.join(NAMES)}, or a function of patches, got {name!r}")
    allowed = PARAMETERS[name]
    unknown = sorted(given.keys() - allowed.keys() - {"name"})
    if unknown:
        raise ValueError(
            f"preprocess {name} takes {', '.join(allowed) or 'no arguments'}, got {', '.join(map(str, unknown))}"
        )
    found = {"name": name, **allowed, **given}
    if name == "percentile":
        low, high = (_number(f"preprocess percentile's {key}", found[key]) for key in ("low", "high"))
        if not 0 <= low < high <= 100:
            raise ValueError(f"preprocess percentile must have 0 <= low < high <= 100, got {low} and {high}")
        found.update(low=low, high=high)
    if name == "scale":
        if found["divide"] is None:
            found["divide"] = _largest(dtype)
        found.update({key: _per_channel(key, found[key], channels) for key in ("subtract", "divide")})
        if 0 in found["divide"]:
            raise ValueError("preprocess scale must divide by numbers other than 0")
    if "clip" in found and not isinstance(found["clip"], bool):
        raise TypeError(f"preprocess {name}'s clip must be true or false, got {found['clip']!r}")
    return found


def preprocess_statistics(
    preprocess: Mapping[str, Any] | Callable[..., Any] | None, volume: Volume, max_memory: int, *, hidden: bool | None
) -> Statistics:
    """What a preprocess, as `checked` gives it, needs to know of the whole volume; reads it all, if anything."""
    if not isinstance(preprocess, Mapping) or preprocess["name"] == "scale":
        return ()
    passes = Passes(volume, max_memory, hidden)
    if preprocess["name"] == "zscore":
        return passes.moments()
    return tuple((low, high) for low, high in passes.percentiles((preprocess["low"], preprocess["high"])))


def applied(
    preprocess: Mapping[str, Any] | Callable[..., Any] | None, found: Statistics
) -> nn.Module | Callable[..., Any] | None:
    """A preprocess as a function of patches.

    Args:
        preprocess: as `checked` gives it.
        found: what `statistics` gave for it; empty as long as only shapes and memory matter.
    """
    return Preprocess(formula(preprocess, found)) if isinstance(preprocess, Mapping) else preprocess


def formula(preprocess: Mapping[str, Any], found: Statistics) -> Formula:
    """The formula of a named preprocess.

    Args:
        preprocess: as `checked` gives it.
        found: per channel, mean and standard deviation for `zscore`, the two percentiles for `percentile`; a
            channel without spread is only shifted. Without any, as before the pass over the volume, zeros and ones.

    >>> formula({"name": "zscore"}, [(4.0, 2.0), (5.0, 0.0)])
    Formula(subtract=(4.0, 5.0), divide=(2.0, 1.0), clip=False)
    """
    if preprocess["name"] == "scale":
        return Formula(tuple(preprocess["subtract"]), tuple(preprocess["divide"]), preprocess["clip"])
    if not found:
        return Formula((0.0,), (1.0,), preprocess.get("clip", False))
    subtract = tuple(float(first) for first, _ in found)
    spread = [second if preprocess["name"] == "zscore" else second - first for first, second in found]
    return Formula(subtract, tuple(float(s) or 1.0 for s in spread), preprocess.get("clip", False))


def _largest(dtype: np.dtype[Any]) -> float:
    """What an image of integers is divided by to lie in [0, 1]."""
    if dtype.kind == "f":
        raise ValueError(
            "preprocess scale needs to know what to divide floats by: "
            '{"name": "scale", "subtract": 0, "divide": 4095}, or use zscore or percentile'
        )
    return 1.0 if dtype.kind == "b" else float(np.iinfo(dtype).max)


def _per_channel(key: str, value: Any, channels: int) -> list[float]:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if len(values) not in (1, channels):
        raise ValueError(f"preprocess scale's {key} must be one number, or one per channel ({channels}), got {value}")
    return [_number(f"preprocess scale's {key}", item) for item in values]


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise TypeError(f"{name} must be a finite number, got {value!r}")
    return float(value)
