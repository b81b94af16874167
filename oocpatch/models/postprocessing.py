"""Postprocessing: functions of blended scores `(C, *box)` that work voxel by voxel, some of them known by name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from oocpatch.planning.arguments import of_head

Postprocess = Callable[[torch.Tensor], torch.Tensor]


def threshold(scores: torch.Tensor, at: float) -> torch.Tensor:
    """1 where a score is above a threshold, else 0, as uint8."""
    return (scores > at).to(torch.uint8)


def classes_to_label(scores: torch.Tensor, at: float | None) -> torch.Tensor:
    """Return the classes whose connected voxels become objects, 0 the background: those of scores, or what is given.

    Args:
        scores: classes, as integers in one channel, or scores.
        at: threshold of scores in one channel; None: 0.5.

    Raises:
        ValueError: for integers in several channels, and for a threshold of scores in several channels.
    """
    if not scores.dtype.is_floating_point and len(scores) == 1:
        return scores
    if not scores.dtype.is_floating_point or (at is not None and len(scores) > 1):
        raise ValueError(
            f"'label' needs classes in one channel, or scores, of which a threshold needs one channel, too: got "
            f"{len(scores)} channels of {str(scores.dtype).removeprefix('torch.')}"
        )
    return POSTPROCESSES["argmax"](scores) if len(scores) > 1 else threshold(scores, 0.5 if at is None else at)


RESAMPLE = "resample"
"""Name of the step at which scores are resampled to the grid of the volume, if they are."""

POSTPROCESSES: dict[str, Postprocess] = {
    # the same index as argmax, the first of equals, in a tenth of the time
    "argmax": lambda scores: scores.max(dim=0, keepdim=True).indices,
    "softmax": lambda scores: scores.softmax(dim=0),
    "sigmoid": lambda scores: scores.sigmoid(),
    "threshold": lambda scores: threshold(scores, 0.5),
    "label": functools.partial(classes_to_label, at=None),
    RESAMPLE: lambda scores: scores,
}


def joins_voxels(value: Any) -> bool:
    """Return whether connected voxels of what a postprocess gives become objects: its name, or last step, is `label`.

    >>> joins_voxels("label:0.3"), joins_voxels(["argmax", "label"]), joins_voxels("argmax")
    (True, True, False)
    """
    last = value[-1] if isinstance(value, list | tuple) and value else value
    return isinstance(last, str) and last.partition(":")[0] == "label"


def classes_of(value: Any) -> Any:
    """Return a postprocess that gives the classes whose connected voxels one with `label` joins."""
    if isinstance(value, Mapping):
        return {head: classes_of(of_head) for head, of_head in value.items()}
    if isinstance(value, list | tuple):
        return (*value[:-1], classes_of(value[-1]))
    return _Classes(named_postprocess(value)) if joins_voxels(value) else value


def around_resampling(value: Any) -> tuple[Any, Any]:
    """Return the parts of a postprocess before and after the step `resample`; without one, all of it comes after.

    >>> around_resampling(("softmax", "resample", "argmax")), around_resampling("argmax")
    (('softmax', 'argmax'), (None, 'argmax'))
    """
    if isinstance(value, Mapping):
        parts = {head: around_resampling(of_head) for head, of_head in value.items()}
        before = {head: part for head, (part, _) in parts.items() if part is not None}
        return before or None, {head: part for head, (_, part) in parts.items()}
    steps = value if isinstance(value, tuple) else (value,)
    at = steps.index(RESAMPLE) if RESAMPLE in steps else 0
    return checked_postprocess(steps[:at]), checked_postprocess([step for step in steps[at:] if step != RESAMPLE])


@dataclass(frozen=True)
class _Classes:
    """The classes that are labelled, as a postprocess that does not label."""

    function: Postprocess

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        return self.function(scores)


def checked_postprocess(value: Any) -> Any:
    """Check the postprocess of a head: a name, a function, a sequence of these, or `"none"`, as None.

    Raises:
        ValueError: for anything else.
    """
    if value is None or callable(value) or (isinstance(value, str) and value == "none"):
        return value if callable(value) else None
    if isinstance(value, list | tuple):
        steps = tuple(step for step in map(checked_postprocess, value) if step is not None)
        if any(map(joins_voxels, steps[:-1])):
            raise ValueError(f"postprocess 'label' must be the last step, got {list(value)}")
        return (steps if len(steps) > 1 else steps[0]) if steps else None
    named_postprocess(str(value))
    return value


def named_postprocess(name: str) -> Postprocess:
    """A postprocess by its name: one of `POSTPROCESSES`, or one with numbers.

    These are `threshold:0.3` and `label:0.3` for a threshold other than 0.5, `clip:0:1` for a range, and `linear:2:1`
    for a factor and a number that is added.

    Raises:
        ValueError: for any other name.

    >>> named_postprocess("threshold:0.3")(torch.tensor([0.2, 0.4]))
    tensor([0, 1], dtype=torch.uint8)
    """
    if name in POSTPROCESSES:
        return POSTPROCESSES[name]
    kind, *texts = name.split(":")
    with contextlib.suppress(ValueError):
        numbers = [float(text) for text in texts]
        if kind == "threshold" and len(numbers) == 1:
            return functools.partial(threshold, at=numbers[0])
        if kind == "label" and len(numbers) == 1:
            return functools.partial(classes_to_label, at=numbers[0])
        if kind in _RANGES and len(numbers) == 2:
            return functools.partial(_RANGES[kind], one=numbers[0], other=numbers[1])
    raise ValueError(
        f"postprocess must be one of {', '.join(POSTPROCESSES)}, threshold:NUMBER, label:NUMBER, clip:LOW:HIGH or "
        f"linear:FACTOR:SUMMAND, got {name!r}"
    )


def _clip(scores: torch.Tensor, one: float, other: float) -> torch.Tensor:
    return scores.clamp(one, other)


def _linear(scores: torch.Tensor, one: float, other: float) -> torch.Tensor:
    return scores * one + other


_RANGES: dict[str, Callable[..., torch.Tensor]] = {"clip": _clip, "linear": _linear}


def is_argmax(postprocess: Postprocess | None, channels: int) -> bool:
    """Return whether a postprocess gives the index of the largest of several scores, after other steps or at once."""
    steps = postprocess.args[0] if isinstance(postprocess, functools.partial) and postprocess.args else (postprocess,)
    if isinstance(steps[-1], _Classes):
        steps = steps[:-1] or (POSTPROCESSES["argmax" if channels > 1 else "threshold"],)
    return steps[-1] is POSTPROCESSES["argmax"]


def _in_steps(steps: tuple[Postprocess, ...], scores: torch.Tensor) -> torch.Tensor:
    for step in steps:
        scores = torch.as_tensor(step(scores))
    return scores


def postprocess_of(postprocess: Any, name: str, mode: str) -> Postprocess | None:
    """Return the postprocess of a head as a function; votes are counted by one of their own.

    Args:
        postprocess: a name, a function or a sequence of these for all heads, or a dict of them by head.
        name: the head.
        mode: its overlap mode.

    Raises:
        ValueError: when there is one for a head of votes or objects.
    """
    value = of_head(postprocess, name, None)
    if isinstance(value, list | tuple):
        value = tuple(step for step in value if step != RESAMPLE)
    if mode not in {"vote", "instances"}:
        if not isinstance(value, list | tuple):
            return value if value is None or callable(value) else named_postprocess(str(value))
        steps = tuple(step if callable(step) else named_postprocess(str(step)) for step in value)
        return functools.partial(_in_steps, steps)
    if value is not None and not (mode == "vote" and isinstance(value, _Classes)):
        raise ValueError(f"postprocess must be None where overlap_mode is {mode!r}, got one for {name!r}")
    return POSTPROCESSES["argmax"] if mode == "vote" else None
