"""Preprocessing of patches: what is applied to them before the model sees them.

It is one step or several: named formulas per channel (`preprocess_steps`), or functions of patches. The numbers of a
formula are given (`scale`), or taken from the whole volume in one pass before the first block (`zscore`, `percentile`),
so that every patch and every process uses the same. A pass measures the volume as the steps before leave it.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from oocpatch.models.preprocess_steps import STEPS, Measured, Statistics, Step
from oocpatch.models.wrappers import as_module
from oocpatch.planning.box import Box
from oocpatch.progress import OnProgress
from oocpatch.volumes.statistics import VolumeStatistics
from oocpatch.volumes.volume import Volume

WIDE = (torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64)
"""Dtypes whose values float32 does not hold: formulas are computed in float64."""

PatchFunction = Callable[..., Any]
CheckedPreprocess = Step | PatchFunction | tuple[Step | PatchFunction, ...] | None

_OPTIONAL = {"channels": [], "epsilon": 0.0, "pooled": False, "nonzero": False}
"""Arguments of steps that are left out of their JSON where they have these values."""


def steps_of(preprocess: CheckedPreprocess) -> tuple[Step | PatchFunction, ...]:
    """Return the steps of a checked preprocess."""
    if isinstance(preprocess, tuple):
        return preprocess
    return () if preprocess is None else (preprocess,)


def step_json(step: Step) -> dict[str, Any]:
    """Return a step as the dict by which users ask for it.

    >>> from oocpatch.models.preprocess_steps import Percentile
    >>> step_json(Percentile(1, 99))
    {'name': 'percentile', 'low': 1, 'high': 99, 'clip': True}
    """
    arguments = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(step).items()}
    given = {key: v for key, v in arguments.items() if key not in _OPTIONAL or v != _OPTIONAL[key]}
    return {"name": step.name, **{key: v for key, v in given.items() if v not in ([math.inf], [-math.inf])}}


def checked_preprocess(preprocess: Any, dtype: np.dtype[Any], channels: int) -> CheckedPreprocess:
    """Check the argument `preprocess` of `predict`.

    Args:
        preprocess: a name, a dict of a name and arguments, a function of patches, or a sequence of these; `"none"`: as
            None.
        dtype: dtype of the volume.
        channels: channels of the volume.

    Raises:
        ValueError, TypeError: for anything else.

    >>> checked_preprocess("percentile", np.dtype("uint8"), 1).high
    99.5
    """
    if preprocess is None or (isinstance(preprocess, str) and preprocess == "none"):
        return None
    if not isinstance(preprocess, list | tuple):
        return _checked_step(preprocess, dtype, channels)
    steps: list[Step | PatchFunction] = []
    known: int | None = channels
    for value in preprocess:
        step = _checked_step(value, np.dtype("float32") if steps else dtype, known)
        if isinstance(step, Measured) and known is None:
            raise ValueError(f"preprocess {step.name} must come before functions: it is measured of the volume")
        known = known if isinstance(step, Step) else None
        steps.append(step)
    return tuple(steps) or None


def _checked_step(value: Any, dtype: np.dtype[Any], channels: int | None) -> Step | PatchFunction:
    """Return a step of a preprocess; `channels` is None where a function may have changed their number."""
    if isinstance(value, Step) or callable(value):
        return value  # type: ignore[no-any-return]
    mapping = {"name": value} if isinstance(value, str) else value
    if not isinstance(mapping, Mapping):
        raise TypeError(f"preprocess must be a name, a dict or a function, got {type(value).__name__}")
    name = mapping.get("name")
    if name not in STEPS:
        raise ValueError(f"preprocess must be one of {', '.join(STEPS)}, or a function of patches, got {name!r}")
    arguments: dict[str, Any] = {key: v for key, v in mapping.items() if key != "name"}
    kinds = {f.name: str(f.type) for f in fields(STEPS[name])}
    if unknown := sorted(arguments.keys() - kinds.keys(), key=str):
        raise ValueError(f"preprocess {name} takes {', '.join(kinds)}, got {', '.join(map(str, unknown))}")
    if name == "scale" and arguments.get("divide") is None:
        arguments["divide"] = _largest(dtype)
    chosen = arguments.get("channels", ())
    chosen = arguments["channels"] = _channel_numbers(name, chosen, channels)
    for key in arguments.keys() - {"channels"}:
        label, argument = f"preprocess {name}'s {key}", arguments[key]
        if kinds[key] == "bool":
            if not isinstance(argument, bool):
                raise TypeError(f"{label} must be true or false, got {argument!r}")
        elif kinds[key] == "Numbers":
            arguments[key] = _per_channel(label, argument, len(chosen) or channels)
        else:
            arguments[key] = _number(label, argument)
    return STEPS[name](**arguments)


def needs_statistics(preprocess: CheckedPreprocess) -> bool:
    """Return whether a preprocess depends on statistics of the whole volume."""
    return any(isinstance(step, Measured) for step in steps_of(preprocess))


def preprocess_statistics(
    preprocess: CheckedPreprocess,
    volume: Volume,
    max_memory: int,
    *,
    progress: str | bool | OnProgress,
    box: Box | None = None,
) -> Statistics:
    """Return the statistics of the whole volume, or of a box, that a preprocess needs; reads all of it, or nothing.

    Returns:
        Two numbers per channel of the volume for each step that needs them, step after step.
    """
    measured: list[tuple[float, float]] = []
    steps = steps_of(preprocess)
    for number, step in enumerate(steps):
        if not isinstance(step, Measured):
            continue
        before = preprocess_function(tuple(steps[:number]) or None, tuple(measured))
        chosen = step.channels or tuple(range(volume.channels))
        prepare = None
        if before is not None or step.nonzero or step.channels:
            prepare = functools.partial(_prepared, before=before, channels=chosen, nonzero=step.nonzero)
        statistics = VolumeStatistics(volume, max_memory, progress, pooled=step.pooled, prepare=prepare, box=box)
        of_step = step.measure(statistics) * (len(chosen) if step.pooled else 1)
        by_channel = dict(zip(chosen, of_step, strict=True))
        measured += [by_channel.get(channel, (0.0, 0.0)) for channel in range(volume.channels)]
    return tuple(measured)


def _prepared(
    values: npt.NDArray[Any], *, before: Callable[..., Any] | None, channels: Sequence[int], nonzero: bool
) -> npt.NDArray[Any]:
    """Return what is measured of a box `(C, *box)`: some channels after earlier steps, NaN for zeros left out."""
    if before is not None:
        with torch.inference_mode():
            values = before(torch.from_numpy(values)[None])[0].numpy()
    values = values[list(channels)]
    return np.where(values == 0, np.float32(np.nan), values.astype(np.float32, copy=False)) if nonzero else values


def preprocess_function(preprocess: CheckedPreprocess, statistics: Statistics) -> nn.Module | PatchFunction | None:
    """Return a preprocess as a function of patches.

    Args:
        preprocess: the checked argument.
        statistics: as `preprocess_statistics` returns them; empty as long as only shapes and memory matter.
    """
    if preprocess is None or not isinstance(preprocess, Step | tuple):
        return preprocess
    steps = steps_of(preprocess)
    count = sum(isinstance(step, Measured) for step in steps)
    channels, rest, known = len(statistics) // max(1, count), list(statistics), []
    for step in steps:
        if isinstance(step, Measured):
            of_step, rest = rest[:channels], rest[channels:]
            chosen = step.channels if of_step else ()
            step = step.scale(tuple(of_step[channel] for channel in chosen or range(len(of_step))))  # noqa: PLW2901
        known.append(step)
    return Preprocess(*known)


class Preprocess(nn.Module):
    """Steps applied to patches `(B, C, *patch)`; formulas return float32.

    >>> from oocpatch.models.preprocess_steps import Scale
    >>> Preprocess(Scale((1.0, 2.0), (2.0, 2.0)))(torch.tensor([[[1, 3], [2, 6]]])).tolist()
    [[[0.0, 1.0], [0.0, 2.0]]]
    """

    def __init__(self, *steps: Step | PatchFunction) -> None:
        super().__init__()
        self.steps = tuple(step if isinstance(step, Step) else as_module(step) for step in steps)
        self.functions = nn.ModuleList([step for step in self.steps if isinstance(step, nn.Module)])

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Apply the steps to patches, formulas in memory of their own."""
        values, is_own = patches, False
        for step in self.steps:
            if isinstance(step, nn.Module):
                values, is_own = step(values.to(torch.float32) if is_own else values), False
                continue
            if not is_own:
                values, is_own = values.to(torch.float64 if values.dtype in WIDE else torch.float32, copy=True), True
            step.apply(values)
        return values.to(torch.float32) if is_own else values


def _largest(dtype: np.dtype[Any]) -> float:
    """Return the number by which integers of a dtype are divided to lie in [0, 1]."""
    if dtype.kind == "f":
        raise ValueError(
            "preprocess scale needs to know what to divide floats by: "
            '{"name": "scale", "subtract": 0, "divide": 4095}, or use zscore or percentile'
        )
    return 1.0 if dtype.kind == "b" else float(np.iinfo(dtype).max)


def _channel_numbers(name: str, value: Any, channels: int | None) -> tuple[int, ...]:
    chosen = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    is_known = all(isinstance(c, int) and 0 <= c < (channels or math.inf) for c in chosen)
    if not is_known or len(set(chosen)) < len(chosen):
        limit = "" if channels is None else f" below {channels}, the number of channels"
        raise ValueError(f"preprocess {name}'s channels must be different numbers from 0{limit}, got {value!r}")
    return chosen


def _per_channel(label: str, value: Any, channels: int | None) -> tuple[float, ...]:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if channels is not None and len(values) not in (1, channels):
        raise ValueError(f"{label} must be one number, or one per channel ({channels}), got {value}")
    return tuple(_number(label, item) for item in values)


def _number(label: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise TypeError(f"{label} must be a finite number, got {value!r}")
    return float(value)
