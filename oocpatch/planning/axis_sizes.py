"""Sizes in voxels, as users give them: one `int` for all spatial axes, or one per axis, in order or by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from oocpatch.planning.box import Ints


def per_axis(name: str, value: int | Sequence[int] | Mapping[str, int], axes: Sequence[str], *, least: int = 0) -> Ints:
    """One size per spatial axis, in voxels; an `int` counts for all of them, a dict gives them by the axes' names.

    Args:
        name: the parameter's name, for messages.
        value: what the user gave.
        axes: names of the spatial axes.
        least: the smallest size that is allowed.

    Raises:
        TypeError: when it is neither an `int` nor a sequence or dict of them.
        ValueError: for a wrong number of sizes, other names than the axes', or a size that is too small.

    >>> per_axis("patch_size", 64, "zyx"), per_axis("patch_size", {"x": 32, "y": 16}, "yx")
    ((64, 64, 64), (16, 32))
    """
    if isinstance(value, Mapping):
        if set(value) != set(axes):
            raise ValueError(f"{name} must name each spatial axis ({', '.join(axes)}) and no other, got {dict(value)}")
        value = [value[axis] for axis in axes]
    given = (value,) * len(axes) if isinstance(value, (int, np.integer)) and not isinstance(value, bool) else value
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence | np.ndarray):
        raise TypeError(f"{name} must be an int or one int per spatial axis, got {value!r}")
    if any(isinstance(v, bool) or not isinstance(v, (int, np.integer)) for v in given):
        raise TypeError(f"{name} must be an int or one int per spatial axis, got {value!r}")
    if len(given) != len(axes):
        raise ValueError(f"{name} must have one value per spatial axis ({', '.join(axes)}), got {tuple(given)}")
    if any(v < least for v in given):
        raise ValueError(f"{name} must be at least {least} on every axis, got {tuple(given)}")
    return tuple(int(v) for v in given)
