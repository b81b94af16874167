"""Checks of arguments: numbers, switches, choices, dtypes, limits in bytes. Messages give the rule, then the values."""

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
from oocpatch.planning.windows import OVERLAP_MODES

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def one_of(name: str, value: str | None, allowed: Sequence[str]) -> str | None:
    """A value from a list, or None.

    Raises:
        ValueError: for any other value.
    """
    if value is not None and value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def per_head(value: Any, check: Callable[[Any], Any]) -> Any:
    """A checked value, or a dict of them by the name of a head."""
    return {str(k): check(v) for k, v in value.items()} if isinstance(value, Mapping) else check(value)


def of_head(value: Any, name: str, default: Any) -> Any:
    """The value for a head: one for all, or its own."""
    return value.get(name, default) if isinstance(value, Mapping) else value


def checked_overlap_mode(value: str) -> str:
    """A checked `overlap_mode`."""
    if value is None:
        raise ValueError(f"overlap_mode must be one of {', '.join(OVERLAP_MODES)}, got None")
    return str(one_of("overlap_mode", value, OVERLAP_MODES))


def positive(name: str, value: int) -> int:
    """A checked positive integer."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def num_bytes(name: str, value: int | float | str) -> int:
    """A limit in bytes, given as a number or a text such as `"2GiB"`.

    >>> num_bytes("max_memory", "2GiB")
    2147483648

    Raises:
        ValueError: when it is not a positive number of bytes.
    """
    try:
        parsed = int(parse_bytes(_plain_number(value)))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} must be a number of bytes such as 4000000 or '2GiB', got {value!r}") from error
    if parsed <= 0:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return parsed


def memory_limit(value: int | float | str) -> int:
    """The bound on memory; `"auto"` is a quarter of what this machine, or this container, has in all.

    Not of what is free: the plan, and with it the bytes of the result, would change from one moment to the next.
    """
    if value != "auto":
        return num_bytes("max_memory", value)
    total = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # no limit on this container, or no container
        total = min(total, int(CGROUP_LIMIT.read_text()))
    return int(total // 4)


def dtype_name(name: str, value: Any) -> str | None:
    """The name of a dtype that an output can have, or None.

    Raises:
        ValueError: when there is no such dtype, or it does not hold real numbers.
    """
    if value is None:
        return None
    try:
        found = np.dtype(str(value).removeprefix("torch.") if not isinstance(value, type | np.dtype) else value)
    except TypeError as error:
        raise ValueError(f"{name} must be a dtype such as 'uint8' or 'float32', got {value!r}") from error
    if found.kind not in "buif":
        raise ValueError(f"{name} must be a dtype of booleans, integers or floats, got {value!r}")
    return str(found)


def clipped_chunks(chunks: Ints, shape: Ints) -> Ints:
    """Chunks that are not longer than the volume."""
    return tuple(min(c, n) for c, n in zip(chunks, shape, strict=True))


def write_unit(chunks: Ints, shards: Ints | None, shape: Ints) -> Ints:
    """The output's write unit: the shard if there is one, else the chunk, neither longer than the volume needs.

    Raises:
        ValueError: when a shard is not a multiple of a chunk.
    """
    if shards is None:
        return clipped_chunks(chunks, shape)
    if any(s % c for s, c in zip(shards, chunks, strict=True)):
        raise ValueError(f"output_shards must be multiples of output_chunks, got {shards} and {chunks}")
    return tuple(n if c >= n else min(s, ceil_to(n, c)) for s, c, n in zip(shards, chunks, shape, strict=True))


def real_number(name: str, value: float) -> float:
    """A checked number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    found = _plain_number(value)
    return found if isinstance(found, int) else float(found)


def _plain_number(value: Any) -> Any:
    """Of a number of numpy, Python's, which JSON can hold."""
    return value.item() if isinstance(value, np.number) else value


def check_fits(name: str, value: float, dtype: str) -> None:
    """Refuse a number that a dtype cannot hold.

    Raises:
        ValueError: in that case.

    >>> check_fits("fill", 255.0, "uint8"), check_fits("fill", 0.5, "float32")
    (None, None)
    """
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return
    low, high = (0, 1) if kind.kind == "b" else (int(np.iinfo(kind).min), int(np.iinfo(kind).max))
    if not (math.isfinite(value) and low <= value <= high and value == int(value)):
        raise ValueError(f"{name} must be a whole number from {low} to {high}, as {dtype} holds them, got {value}")


def switch(name: str, value: Any) -> bool:
    """A checked switch: the text "no" would be taken for True.

    Raises:
        TypeError: when it is neither True nor False.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def json_number(value: float) -> float | str:
    """A number as JSON can compare it: NaN is not equal to itself, its name is."""
    return "nan" if math.isnan(value) else value
