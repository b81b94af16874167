"""The door: turns what users pass into checked values. Rule first, then the values, in every message."""

from __future__ import annotations

import contextlib
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from dask.utils import parse_bytes

from oocpatch.outputs.ome_zarr import placed
from oocpatch.planning.axis_sizes import per_axis
from oocpatch.planning.box import Box, Ints, ceil_to
from oocpatch.planning.windows import OVERLAP_MODES
from oocpatch.storage.object_store import BUCKETS, scheme_of
from oocpatch.storage.paths import Address, ObjectPath, words
from oocpatch.volumes.sources import local_or_url
from oocpatch.volumes.volume import PADDING_MODES, Volume

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def sizes(name: str, value: Any, volume: Volume, *, least: int = 0) -> Ints:
    """One size per spatial axis, in voxels; an `int` counts for all of them, a dict gives them by the axes' names.

    Raises:
        TypeError: when it is neither an `int` nor a sequence or dict of them.
        ValueError: for a wrong number of sizes, other names than the axes', or a size that is too small.
    """
    return per_axis(name, value, volume.names[-volume.spatial_ndim :], least=least)


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


def overlap_mode(value: str) -> str:
    """A checked `overlap_mode`."""
    if value is None:
        raise ValueError(f"overlap_mode must be one of {', '.join(OVERLAP_MODES)}, got None")
    return str(one_of("overlap_mode", value, OVERLAP_MODES))


def padding_mode(value: str | None) -> str | None:
    """A checked `padding_mode`."""
    return one_of("padding_mode", value, PADDING_MODES)


def positive(name: str, value: int) -> int:
    """A checked positive integer."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def part(value: Any) -> tuple[int, int]:
    """A checked part of a run, `(i, n)`: the i-th of n, counted from 1.

    >>> part((3, 16))
    (3, 16)

    Raises:
        ValueError, TypeError: when there is no such part.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"part must be two numbers (i, n), such as (3, 16), got {value!r}")
    number, count = (positive("part", item) for item in value)
    if number > count:
        raise ValueError(f"part must be (i, n) with i from 1 to n, got {tuple(value)}")
    return number, count


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


def local_path(name: str, value: str | os.PathLike[str]) -> Path:
    """A path on the local file system.

    Raises:
        ValueError: for a URL of anything else.
        TypeError: when it is no path.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {type(value).__name__}")
    address = local_or_url(value)
    if isinstance(address, str):
        raise ValueError(f"{name} must be a path on a local or shared file system, got {address}")
    return address.absolute()


def place(name: str, value: str | os.PathLike[str]) -> Address:
    """A place to write: a path on the local file system, or a URL in an object store.

    Raises:
        ValueError: for a URL of anything else.
        TypeError: when it is no path.
    """
    if not isinstance(value, str) or "://" not in value or value.startswith("file://"):
        return local_path(name, value)
    if scheme_of(value) not in BUCKETS:
        raise ValueError(
            f"{name} must be a path, or a URL that begins with {', '.join(f'{s}://' for s in BUCKETS)}, got {value}"
        )
    found = ObjectPath.of(value)
    if not found.key:
        raise ValueError(f"{name} must have a name in its bucket, such as {found}/out.zarr, got {value}")
    return found


def apart(name: str, path: Address, volume: Volume) -> None:
    """Refuse a place to write that is, holds or lies in the volume.

    Raises:
        ValueError: in that case.
    """
    location, target = volume.source.location, path.resolve() if isinstance(path, Path) else path
    if location is None:
        return
    if location == target or target in location.parents or location in target.parents:
        raise ValueError(f"{name} must not be, hold or lie in the volume, got {path} for the volume at {location}")


def writable(name: str, path: Address) -> None:
    """Refuse a place where nothing can be written, before anything is.

    Raises:
        ValueError: in that case.
    """
    if isinstance(path, ObjectPath):
        try:
            path.look()
        except OSError as error:
            where = "check the address, and AWS_ENDPOINT_URL if it is set"
            raise ValueError(f"{name} cannot be written: {words(error)}; {where}") from error
        return
    found = next(p for p in path.parents if p.exists())
    if not found.is_dir():
        raise ValueError(f"{name} must be in a directory, got {path}, where {found} is a file")
    if not os.access(found, os.W_OK | os.X_OK):
        raise ValueError(f"{name} must be in a directory that can be written to, got {path}, where {found} cannot")


def dtype(name: str, value: Any) -> str | None:
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


def box(name: str, value: Any, volume: Volume) -> Box:
    """A checked box, one span per spatial axis, over all indices of looped axes.

    Raises:
        ValueError: when it is no box within the volume.
    """
    looped = len(volume.shape) - volume.spatial_ndim
    names, shape = volume.names[looped:], volume.shape[looped:]
    spans = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(spans) != len(shape):
        raise ValueError(
            f"{name} must be a pair (start, stop) or a slice per spatial axis ({', '.join(names)}), got {value!r}"
        )
    found = []
    for span, n in zip(spans, shape, strict=True):
        try:
            start, stop = (span.start, span.stop) if isinstance(span, slice) and span.step in {None, 1} else span
            start, stop = operator.index(0 if start is None else start), operator.index(n if stop is None else stop)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be a pair (start, stop) or a slice per spatial axis, got {span!r}") from None
        if not 0 <= start < stop <= n:
            raise ValueError(f"{name} must lie within the volume and hold a voxel, got {start}:{stop} for {n} voxels")
        found.append((start, stop))
    whole = [(0, n) for n in volume.shape[:looped]]
    return Box(*zip(*whole, *found, strict=True))


def clipped(chunks: Ints, shape: Ints) -> Ints:
    """Chunks that are not longer than the volume."""
    return tuple(min(c, n) for c, n in zip(chunks, shape, strict=True))


def write_unit(chunks: Ints, shards: Ints | None, shape: Ints) -> Ints:
    """The output's write unit: the shard if there is one, else the chunk, neither longer than the volume needs.

    Raises:
        ValueError: when a shard is not a multiple of a chunk.
    """
    if shards is None:
        return clipped(chunks, shape)
    if any(s % c for s, c in zip(shards, chunks, strict=True)):
        raise ValueError(f"output_shards must be multiples of output_chunks, got {shards} and {chunks}")
    return tuple(n if c >= n else min(s, ceil_to(n, c)) for s, c, n in zip(shards, chunks, shape, strict=True))


FORMATS = ("auto", "zarr", "ome-zarr", "ome-zarr-0.4")


def output_format(value: str, volume: Volume) -> str:
    """A checked `output_format`; of `"auto"`, what it comes to.

    Raises:
        ValueError: when there is no such format, or the volume does not fit it.
    """
    one_of("output_format", value, FORMATS)
    if value == "auto":
        value = "zarr" if volume.source.image is None else "ome-zarr"
    if value != "zarr":
        looped = len(volume.shape) - volume.spatial_ndim
        if not 2 <= volume.spatial_ndim <= 3 or looped > 1:
            raise ValueError(
                "an OME-Zarr must have two or three axes in space and at most one for time, got "
                f"{', '.join(volume.axes.names)}; write output_format='zarr', or name the axes with `axes`"
            )
        for name in volume.names:
            placed(volume, name)
    return value


def number(name: str, value: float) -> float:
    """A checked number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    found = _plain_number(value)
    return found if isinstance(found, int) else float(found)


def _plain_number(value: Any) -> Any:
    """Of a number of numpy, Python's, which JSON can hold."""
    return value.item() if isinstance(value, np.number) else value


def held(name: str, value: float, dtype: str) -> None:
    """Refuse a number that a dtype cannot hold.

    Raises:
        ValueError: in that case.

    >>> held("fill", 255.0, "uint8"), held("fill", 0.5, "float32")
    (None, None)
    """
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return
    low, high = (0, 1) if kind.kind == "b" else (int(np.iinfo(kind).min), int(np.iinfo(kind).max))
    if not (math.isfinite(value) and low <= value <= high and value == int(value)):
        raise ValueError(f"{name} must be a whole number from {low} to {high}, as {dtype} holds them, got {value}")


def flag(name: str, value: Any) -> bool:
    """A checked switch: the text "no" would be taken for True.

    Raises:
        TypeError: when it is neither True nor False.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def plain(value: float) -> float | str:
    """A number as JSON can compare it: NaN is not equal to itself, its name is."""
    return "nan" if math.isnan(value) else value
