"""Checks of arguments: numbers, switches, choices, dtypes, sizes per axis, limits in bytes.

Each function takes the parameter's name for its messages, and returns the value in the one form that the rest of the
package uses. It raises TypeError or ValueError, with the rule and then the value. Checks that need a volume or a model
are made where these are known.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from dask.utils import parse_bytes

from oocpatch.planning.box import Ints, ceil_to
from oocpatch.planning.choices import OVERLAP_MODES, PADDING_MODES, PADDING_SYNONYMS, WORKS

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""File in which Linux states the memory limit of a container."""


def one_of(name: str, value: str | None, allowed: Sequence[str]) -> str | None:
    """Return a value that is None or in a list."""
    if value is not None and value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def checked_padding_mode(value: str | None) -> str | None:
    """Return the one name of a checked `padding_mode`, NumPy's where it has several.

    >>> checked_padding_mode("replicate"), checked_padding_mode("mean"), checked_padding_mode(None)
    ('edge', 'mean', None)
    """
    name = one_of("padding_mode", value, PADDING_MODES)
    return None if name is None else PADDING_SYNONYMS.get(name, name)


def checked_overlap_mode(value: str) -> str:
    """Return a checked `overlap_mode`."""
    if value not in OVERLAP_MODES:
        raise ValueError(f"overlap_mode must be one of {', '.join(OVERLAP_MODES)}, got {value!r}")
    return str(value)


def per_head(value: Any, check: Callable[[Any], Any]) -> Any:
    """Check one value for all heads, or each value of a dict from head name to value.

    >>> per_head({"mask": "uint8"}, str.upper), per_head("uint8", str.upper)
    ({'mask': 'UINT8'}, 'UINT8')
    """
    return {str(k): check(v) for k, v in value.items()} if isinstance(value, Mapping) else check(value)


def of_head(value: Any, name: str, default: Any) -> Any:
    """Return the value for one head, from one value for all heads or from a dict.

    >>> of_head({"mask": 1}, "mask", 0), of_head({"mask": 1}, "edges", 0), of_head(2, "edges", 0)
    (1, 0, 2)
    """
    return value.get(name, default) if isinstance(value, Mapping) else value


def positive(name: str, value: int) -> int:
    """Return a positive integer."""
    if not _is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def checked_part(value: Any) -> tuple[int, int]:
    """Return a checked part of a run, `(i, n)`: the i-th of n, counted from 1."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"part must be two numbers (i, n), such as (3, 16), got {value!r}")
    number, count = (positive("part", item) for item in value)
    if number > count:
        raise ValueError(f"part must be (i, n) with i from 1 to n, got {tuple(value)}")
    return number, count


def per_axis(name: str, value: int | Sequence[int] | Mapping[str, int], axes: Sequence[str], *, least: int = 0) -> Ints:
    """Return one size per spatial axis, in voxels, at least `least`.

    Sizes are given as one for all axes, one per axis in order, or a dict by the axes' names.

    >>> per_axis("patch_size", 64, "zyx"), per_axis("patch_size", {"x": 32, "y": 16}, "yx")
    ((64, 64, 64), (16, 32))
    """
    if isinstance(value, Mapping):
        if set(value) != set(axes):
            raise ValueError(f"{name} must name each spatial axis ({', '.join(axes)}) and no other, got {dict(value)}")
        value = [value[axis] for axis in axes]
    sizes: Any = (value,) * len(axes) if _is_int(value) else value
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Sequence | np.ndarray) or not all(map(_is_int, sizes)):
        raise TypeError(f"{name} must be an int or one int per spatial axis, got {value!r}")
    if len(sizes) != len(axes):
        raise ValueError(f"{name} must have one value per spatial axis ({', '.join(axes)}), got {tuple(sizes)}")
    if any(n < least for n in sizes):
        raise ValueError(f"{name} must be at least {least} on every axis, got {tuple(sizes)}")
    return tuple(int(n) for n in sizes)


def real_number(name: str, value: float) -> float:
    """Return a number as Python's, which JSON can store; integers stay integers.

    >>> real_number("fill", np.float32(0.5)), real_number("fill", 3)
    (0.5, 3)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = _plain_number(value)
    return number if isinstance(number, int) else float(number)


def share(name: str, value: float) -> float:
    """Return a number above 0 and at most 1.

    >>> share("match", 1)
    1.0
    """
    number = float(real_number(name, value))
    if not 0 < number <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")
    return number


def checked_work(value: float | str) -> float | str:
    """Return the argument `work` of `predict`: a name, or a number of operations.

    Raises:
        ValueError, TypeError: for anything else.

    >>> checked_work("heavy"), checked_work(5e9)
    ('heavy', 5000000000.0)
    """
    if isinstance(value, str) and value in WORKS:
        return value
    number = -1.0 if isinstance(value, str) else float(real_number("work", value))
    if not 0 <= number < math.inf:
        raise ValueError(f"work must be 'light', 'heavy' or a number of operations from 0 on, got {value!r}")
    return number


def switch(name: str, value: Any) -> bool:
    """Return True or False, and refuse anything else: a text such as "no" would count as True."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def num_bytes(name: str, value: int | float | str) -> int:
    """Return a limit in bytes, from a number or a text such as `"2GiB"`.

    >>> num_bytes("max_memory", "2GiB")
    2147483648
    """
    try:
        size = int(parse_bytes(_plain_number(value)))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} must be a number of bytes such as 4000000 or '2GiB', got {value!r}") from error
    if size <= 0:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return size


def memory_limit(value: int | float | str) -> int:
    """Return `max_memory` in bytes; `"auto"` is a quarter of the memory of this machine or container.

    The limit depends on the total and not on what is free: with the latter the plan, and with it the bytes of the
    result, would change from one moment to the next.
    """
    if value != "auto":
        return num_bytes("max_memory", value)
    total = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # no limit on this container, or no container
        total = min(total, int(CGROUP_LIMIT.read_text()))
    return int(total // 4)


def dtype_name(name: str, value: Any) -> str | None:
    """Return the numpy name of an output's dtype, of real numbers; None for None.

    >>> dtype_name("output_dtype", "torch.float16"), dtype_name("output_dtype", np.uint8)
    ('float16', 'uint8')
    """
    if value is None:
        return None
    try:
        dtype = np.dtype(value if isinstance(value, type | np.dtype) else str(value).removeprefix("torch."))
    except TypeError as error:
        raise ValueError(f"{name} must be a dtype such as 'uint8' or 'float32', got {value!r}") from error
    if dtype.kind not in "buif":
        raise ValueError(f"{name} must be a dtype of booleans, integers or floats, got {value!r}")
    return str(dtype)


def check_fits(name: str, value: float, dtype: str) -> None:
    """Refuse a number that a dtype cannot represent."""
    kind = np.dtype(dtype)
    if kind.kind == "f":
        if math.isfinite(value) and abs(value) > (largest := float(np.finfo(kind).max)):
            raise ValueError(f"{name} must be from {-largest:g} to {largest:g}, as {dtype} holds them, got {value:g}")
        return
    low, high = (0, 1) if kind.kind == "b" else (int(np.iinfo(kind).min), int(np.iinfo(kind).max))
    if not (math.isfinite(value) and low <= value <= high and value == int(value)):
        raise ValueError(f"{name} must be a whole number from {low} to {high}, as {dtype} holds them, got {value}")


def clipped_chunks(chunks: Ints, shape: Ints) -> Ints:
    """Return chunks that are not longer than the volume."""
    return tuple(min(c, n) for c, n in zip(chunks, shape, strict=True))


def write_unit(chunks: Ints, shards: Ints | None, shape: Ints) -> Ints:
    """Return the output's write unit: the shard if there is one, else the chunk, not longer than the volume needs.

    >>> write_unit((32, 32), (128, 128), (100, 300)), write_unit((32, 32), None, (100, 30))
    ((128, 128), (32, 30))
    """
    if shards is None:
        return clipped_chunks(chunks, shape)
    if any(s % c for s, c in zip(shards, chunks, strict=True)):
        raise ValueError(f"output_shards must be multiples of output_chunks, got {shards} and {chunks}")
    return tuple(n if c >= n else min(s, ceil_to(n, c)) for s, c, n in zip(shards, chunks, shape, strict=True))


def json_number(value: float) -> float | str:
    """Return a number as JSON has it, which has no NaN and no infinities: they become text that `float` reads.

    >>> json_number(0), json_number(float("nan")), json_number(float("-inf"))
    (0, 'nan', '-inf')
    """
    return value if math.isfinite(value) else str(float(value))


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _plain_number(value: Any) -> Any:
    return value.item() if isinstance(value, np.number) else value
