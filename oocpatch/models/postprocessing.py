"""Postprocessing: functions of blended scores `(C, *box)` that work voxel by voxel, some of them known by name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from oocpatch.planning.arguments import of_head

Postprocess = Callable[[torch.Tensor], torch.Tensor]


POSTPROCESSES: dict[str, Postprocess] = {
    # the same index as argmax, the first of equals, in a tenth of the time
    "argmax": lambda scores: scores.max(dim=0, keepdim=True).indices,
    "softmax": lambda scores: scores.softmax(dim=0),
    "sigmoid": lambda scores: scores.sigmoid(),
    "threshold": lambda scores: threshold(scores, 0.5),
}


def threshold(scores: torch.Tensor, at: float) -> torch.Tensor:
    """1 where a score is above a threshold, else 0, as uint8."""
    return (scores > at).to(torch.uint8)


def named_postprocess(name: str) -> Postprocess:
    """A postprocess by its name: one of `POSTPROCESSES`, or `threshold:0.3` for a threshold other than 0.5.

    Raises:
        ValueError: for any other name.

    >>> named_postprocess("threshold:0.3")(torch.tensor([0.2, 0.4]))
    tensor([0, 1], dtype=torch.uint8)
    """
    if name in POSTPROCESSES:
        return POSTPROCESSES[name]
    kind, _, at = name.partition(":")
    if kind == "threshold":
        with contextlib.suppress(ValueError):
            return functools.partial(threshold, at=float(at))
    raise ValueError(f"postprocess must be one of {', '.join(POSTPROCESSES)} or threshold:NUMBER, got {name!r}")


def postprocess_of(postprocess: Any, name: str, mode: str) -> Postprocess | None:
    """Return the postprocess of a head as a function; votes are counted by one of their own.

    Args:
        postprocess: a name or a function for all heads, or a dict of them by head.
        name: the head.
        mode: its overlap mode.

    Raises:
        ValueError: when there is one for a head of votes or objects.
    """
    value = of_head(postprocess, name, None)
    if mode not in {"vote", "instances"}:
        return value if value is None or callable(value) else named_postprocess(str(value))
    if value is not None:
        raise ValueError(f"postprocess must be None where overlap_mode is {mode!r}, got one for {name!r}")
    return POSTPROCESSES["argmax"] if mode == "vote" else None
