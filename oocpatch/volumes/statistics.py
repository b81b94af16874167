"""Statistics of a whole volume, per channel, in streaming passes over its chunks: the same numbers on every run.

Values of 16 bits or less are counted, each for itself: everything follows from the counts, exactly. Wider ones are
summed up in float64, box by box, and merged in the boxes' order. A percentile is found digit by digit, as in a radix
sort. The bits of a value make a key that sorts as the value does, and each pass counts 16 bits of the keys that still
matter, so that it is exact too, in two passes for 32 bits and four for 64:

```text
 keys of 32 bits    pass 1 counts the upper 16        pass 2 counts the lower 16 of what begins with 3f80
 3f80 0000          3f80: 2                           0000: 1
 3f80 0001    -->   4000: 1    wanted: the 2nd  -->   0001: 1    wanted: the 2nd  -->  3f80 0001
 4000 0000
```

Each pass is run by Dask's threads, a few boxes at a time. NaN and infinities are left out.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from dask.base import compute
from dask.delayed import delayed
from tqdm import tqdm

from oocpatch.planning.box import Box, worthwhile
from oocpatch.volumes.volume import Volume

Array = npt.NDArray[Any]

BOX_BYTES = 4 << 20
"""Voxels that one task looks at, in whole chunks: worth a task, and small beside any limit."""

PIECE = 1 << 18
"""Voxels that are converted at a time."""

PIECE_BYTES = 6 * 8 * PIECE
"""What they take meanwhile, at most."""

WAVE = 4
"""Tasks per thread that Dask gets at a time: its graph stays small, whatever the size of the volume."""

PATIENCE = 2.0
"""Seconds after which a terminal is shown progress."""

DIGIT = 16
"""Bits of a key that one pass counts."""


@dataclass(frozen=True, slots=True)
class VolumeStatistics:
    """How a volume is gone through.

    Attributes:
        volume: what to read.
        max_memory: bytes that may be taken, by as many threads as fit; one thread takes what it takes.
        hidden: whether no progress is shown; None: it is, on a terminal.

    >>> volume = Volume(np.arange(10.0).reshape(2, 5))
    >>> VolumeStatistics(volume).moments(), VolumeStatistics(volume).percentiles((0.0, 50.0))
    (((4.5, 2.8722813232690143),), ((0.0, 4.5),))
    """

    volume: Volume
    max_memory: int = 1 << 28
    hidden: bool | None = True

    def moments(self) -> tuple[tuple[float, float], ...]:
        """Mean and standard deviation (of the population) of each channel.

        Raises:
            ValueError: when a channel holds no finite value.
        """
        if self.volume.dtype.itemsize * 8 <= DIGIT:
            counts = self._counts([[0]] * self.volume.channels, 0)
            self._refuse_empty(counts.sum(axis=(1, 2)))
            return tuple(_moments_of_counts(counted[0], self.volume.dtype) for counted in counts)
        found = self._pass(_moments_in, _merged, 24 * self.volume.channels)
        self._refuse_empty(found[:, 0])
        return tuple((float(mean), math.sqrt(squares / count)) for count, mean, squares in found)

    def percentiles(self, ranks: Sequence[float]) -> tuple[tuple[float, ...], ...]:
        """Percentiles of each channel, as `numpy.percentile` has them: linear between two values.

        Args:
            ranks: in percent, 0 to 100.

        Raises:
            ValueError: when a channel holds no finite value.
        """
        channels, bits = self.volume.channels, self.volume.dtype.itemsize * 8
        wanted: list[list[_Wanted]] = []
        for shift in reversed(range(0, bits, DIGIT)):
            prefixes = [sorted({w.prefix for w in of_one}) for of_one in wanted] or [[0]] * channels
            counts = self._counts(prefixes, shift)
            if not wanted:
                totals = counts.sum(axis=(1, 2))
                self._refuse_empty(totals)
                wanted = [[_Wanted(0, index) for index in _neighbours(int(n), ranks)] for n in totals]
            wanted = [
                [w.refined(counts[channel, prefixes[channel].index(w.prefix)]) for w in of_one]
                for channel, of_one in enumerate(wanted)
            ]
        values = [_values(np.array([w.prefix for w in of_one], np.uint64), self.volume.dtype) for of_one in wanted]
        return tuple(
            tuple(
                _between(float(low), float(high), int(n), rank)
                for low, high, rank in zip(v[::2], v[1::2], ranks, strict=True)
            )
            for v, n in zip(values, totals, strict=True)
        )

    def _refuse_empty(self, totals: Array) -> None:
        for channel, total in enumerate(totals):
            if not total:
                raise ValueError(f"channel {channel} of the volume holds no finite value to take statistics of")

    def _counts(self, prefixes: Sequence[Sequence[int]], shift: int) -> Array:
        """How often each digit at `shift` follows each prefix: `(C, prefixes, digits)`, int64."""
        shape = (len(prefixes), max(map(len, prefixes)), 1 << min(DIGIT, self.volume.dtype.itemsize * 8))

        def count(values: Array) -> Array:
            counts = np.zeros(shape, np.int64)
            for channel, piece in _pieces(values):
                keys = _keys(piece)
                for i, prefix in enumerate(prefixes[channel]):
                    found = keys[keys >> (shift + DIGIT) == prefix] if shift + DIGIT < keys.itemsize * 8 else keys
                    digits = (found >> shift & (shape[2] - 1)).astype(np.intp)
                    counts[channel, i] += np.bincount(digits, minlength=shape[2])
            return counts

        return self._pass(count, np.add, 8 * math.prod(shape))

    def _pass(
        self, summarize: Callable[[Array], Array], merge: Callable[[Array, Array], Array], summary_bytes: int
    ) -> Array:
        """Sum up all boxes, `(C, *box)` each, and merge the sums in the order of the boxes."""
        volume = self.volume
        voxel = volume.channels * volume.dtype.itemsize
        step = worthwhile(volume.chunks, volume.shape, BOX_BYTES // voxel)
        box_bytes = voxel * math.prod(min(s, n) for s, n in zip(step, volume.shape, strict=True))
        need = 3 * max(box_bytes, volume.chunk_bytes) + PIECE_BYTES + (WAVE + 1) * summary_bytes
        threads = max(1, min(self.max_memory // need, len(os.sched_getaffinity(0))))
        source = volume.with_chunk_reader(threads)
        boxes = Box.of_shape(volume.shape).split(step)
        total: Array | None = None
        with (
            # a pool of our own: Dask's default one has as many threads as there are cores
            ThreadPoolExecutor(threads, thread_name_prefix="oocpatch-statistics") as pool,
            tqdm(
                total=math.prod(volume.shape), desc="statistics", unit="voxel", unit_scale=True, delay=PATIENCE,
                disable=self.hidden,
            ) as bar,
        ):  # fmt: skip
            while wave := list(itertools.islice(boxes, WAVE * threads)):
                tasks = [delayed(_summary, pure=False, traverse=False)(source, box, summarize) for box in wave]
                for part in compute(*tasks, scheduler="threads", pool=pool):  # type: ignore[no-untyped-call] # Dask gives it none
                    total = part if total is None else merge(total, part)
                bar.update(sum(box.size for box in wave))
        assert total is not None
        return total


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A value wanted by its place in the sorted order of those whose keys begin with the prefix."""

    prefix: int
    index: int

    def refined(self, counts: Array) -> _Wanted:
        """The same, with one digit more: the one below which too few values lie."""
        below = np.cumsum(counts)
        digit = int(np.searchsorted(below, self.index, side="right"))
        before = int(below[digit - 1]) if digit else 0
        return _Wanted(self.prefix << DIGIT | digit, self.index - before)


def _summary(volume: Volume, box: Box, summarize: Callable[[Array], Array]) -> Array:
    """Idempotent: reads only."""
    return summarize(volume.read(box))


def _pieces(values: Array) -> Iterator[tuple[int, Array]]:
    """The finite values of each channel, flat, a piece at a time."""
    for channel, of_one in enumerate(values):
        flat = of_one.reshape(-1)
        for start in range(0, flat.size, PIECE):
            piece = flat[start : start + PIECE]
            if piece.dtype.kind == "f" and not (finite := np.isfinite(piece)).all():
                piece = piece[finite]
            yield channel, piece


def _moments_in(values: Array) -> Array:
    """Count, mean and sum of squared distances from it of each channel: `(C, 3)`, float64."""
    found = np.zeros((len(values), 3))
    for channel, piece in _pieces(values):
        if piece.size:
            wide = piece.astype(np.float64)
            mean = wide.mean()
            wide -= mean
            part = np.array([[wide.size, mean, wide @ wide]])
            found[channel] = _merged(found[channel : channel + 1], part)
    return found


def _merged(one: Array, other: Array) -> Array:
    """Moments of two sets from those of each (Chan, Golub and LeVeque 1979, "Updating formulae")."""
    (n, mean, squares), (m, other_mean, other_squares) = one.T, other.T
    total = np.maximum(n + m, 1)
    distance = other_mean - mean
    return np.stack(
        [n + m, mean + distance * (m / total), squares + other_squares + distance**2 * (n * m / total)], axis=1
    )


def _moments_of_counts(counts: Array, dtype: np.dtype[Any]) -> tuple[float, float]:
    """Mean and standard deviation from how often each key occurs, rounded once."""
    keys = np.flatnonzero(counts)
    exact = [Fraction(value) for value in _values(keys, dtype).tolist()]
    times = counts[keys].tolist()
    total = sum(times)
    mean = sum(v * n for v, n in zip(exact, times, strict=True)) / total
    variance = sum(v * v * n for v, n in zip(exact, times, strict=True)) / total - mean**2
    return float(mean), math.sqrt(variance)


def _keys(values: Array) -> Array:
    """Unsigned integers that sort as the values do."""
    bits = 8 * values.itemsize
    keys: Array = values.view(f"u{values.itemsize}")
    sign = keys.dtype.type(1 << (bits - 1))
    if values.dtype.kind == "i":
        keys = keys ^ sign
    if values.dtype.kind == "f":
        keys = np.where(keys & sign, ~keys, keys | sign)
    return keys


def _values(keys: Array, dtype: np.dtype[Any]) -> Array:
    """What `_keys` made the keys of."""
    found = keys.astype(f"u{dtype.itemsize}")
    sign = found.dtype.type(1 << (8 * dtype.itemsize - 1))
    if dtype.kind == "i":
        found ^= sign
    if dtype.kind == "f":
        found = np.where(found & sign, found ^ sign, ~found)
    values: Array = found.view(dtype)
    return values


def _neighbours(total: int, ranks: Sequence[float]) -> Iterator[int]:
    """The two places in sorted order between which each percentile lies."""
    for rank in ranks:
        low = math.floor(_place(total, rank))
        yield from (low, min(low + 1, total - 1))


def _between(low: float, high: float, total: int, rank: float) -> float:
    return low + (high - low) * float(_place(total, rank) % 1)


def _place(total: int, rank: float) -> Fraction:
    """Where a percentile lies in sorted order."""
    return (total - 1) * Fraction(rank) / 100
