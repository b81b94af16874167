"""Statistics of a whole volume, per channel or over all channels, in streaming passes over its chunks.

They are the same numbers on every run. Values of at most 16 bits are counted one by one, and the statistics follow
exactly from the counts. Wider values are summed in float64, box by box, and merged in the order of the boxes. A
percentile is found digit by digit, as in a radix sort: the bits of a value are a key that sorts as the value does, and
each pass counts 16 bits of the keys that can still be the percentile. So it is exact too, in two passes for 32 bits and
four for 64:

```text
 keys of 32 bits    pass 1 counts the upper 16        pass 2 counts the lower 16 of keys that begin with 3f80
 3f80 0000          3f80: 2                           0000: 1
 3f80 0001    -->   4000: 1    wanted: the 2nd  -->   0001: 1    wanted: the 2nd  -->  3f80 0001
 4000 0000
```

The mean over all channels is exact as well: integers, and the integers that are the digits of floats, are summed as
integers. NaN and infinities are left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.planning.box import Box, worthwhile
from oocpatch.progress import OnProgress
from oocpatch.system import usable_cores
from oocpatch.volumes.passes import WAVE, run_pass
from oocpatch.volumes.volume import Volume

Array = npt.NDArray[Any]

BOX_BYTES = 4 << 20
"""Bytes of the voxels that one task reads, in whole chunks: worth a task, and small compared to any limit."""

PIECE = 1 << 18
"""Voxels that are converted at a time."""

PIECE_BYTES = 6 * 8 * PIECE
"""Bytes that converting a piece takes at most."""

DIGIT = 16
"""Bits of a key that one pass counts."""


@dataclass(frozen=True, slots=True)
class VolumeStatistics:
    """Statistics of a volume, computed on request.

    Attributes:
        volume: the volume.
        max_memory: limit in bytes, which bounds the number of threads; a single thread may take more.
        progress: how progress is shown; see `oocpatch.progress`.
        pooled: whether all channels count as one.
        prepare: function of the values of a box, `(C, *box)`, that returns what is measured; it may select channels.
        box: the part of the volume that is measured; None: all of it.

    >>> volume = Volume(np.arange(10.0).reshape(2, 5))
    >>> VolumeStatistics(volume).moments(), VolumeStatistics(volume).percentiles((0.0, 50.0))
    (((4.5, 2.8722813232690143),), ((0.0, 4.5),))
    """

    volume: Volume
    max_memory: int = 1 << 28
    progress: str | bool | OnProgress = False
    pooled: bool = False
    prepare: Callable[[Array], Array] | None = None
    box: Box | None = None

    @property
    def _sample(self) -> Array:
        """One voxel of what is measured: its channels and dtype."""
        shape = (self.volume.channels, *(1,) * len(self.volume.shape))
        return self._prepared(np.zeros(shape, self.volume.dtype))

    @property
    def _channels(self) -> int:
        return len(self._sample)

    @property
    def _dtype(self) -> np.dtype[Any]:
        return self._sample.dtype

    def means(self) -> tuple[Fraction, ...]:
        """Return the exact mean of each channel.

        Raises:
            ValueError: if a channel has no finite value.
        """
        sums = self._pass(_sums_of, np.add, 64 * self._channels)
        self._refuse_empty(sums[:, 0])
        return tuple(total / Fraction(count) for count, total in sums)

    def medians(self) -> tuple[Fraction, ...]:
        """Return the exact median of each channel: the mean of the two in the middle of an even number of values.

        Raises:
            ValueError: if a channel has no finite value.
        """
        return tuple(
            Fraction(low) + (Fraction(high) - Fraction(low)) * weight
            for [(low, high, weight)] in self._neighbours((50,))
        )

    def extremes(self) -> tuple[tuple[float, float], ...]:
        """Return the smallest and the largest value of each channel.

        Raises:
            ValueError: if a channel has no finite value.
        """
        found = self._pass(_extremes_of, np.maximum, 16 * self._channels)
        self._refuse_empty(np.isfinite(found[:, 0]))
        return tuple((-float(low), float(high)) for low, high in found)

    def minima(self) -> tuple[float, ...]:
        """Return the smallest value of each channel; an int for integers.

        Raises:
            ValueError: if a channel has no finite value.
        """
        return tuple(low for [(low, _, _)] in self._neighbours((0,)))

    def moments(self) -> tuple[tuple[float, float], ...]:
        """Return mean and standard deviation (of the population) of each channel.

        Raises:
            ValueError: if a channel has no finite value.
        """
        if self._dtype.itemsize * 8 <= DIGIT:
            counts = self._counts([[0]] * self._channels, 0)
            self._refuse_empty(counts.sum(axis=(1, 2)))
            return tuple(_moments_of_counts(of_channel[0], self._dtype) for of_channel in counts)
        moments = self._pass(_moments_of, _merge_moments, 24 * self._channels)
        self._refuse_empty(moments[:, 0])
        return tuple((float(mean), math.sqrt(squares / count)) for count, mean, squares in moments)

    def percentiles(self, ranks: Sequence[float]) -> tuple[tuple[float, ...], ...]:
        """Return percentiles of each channel, interpolated linearly as by `numpy.percentile`.

        Args:
            ranks: in percent, 0 to 100.

        Raises:
            ValueError: if a channel has no finite value.
        """
        return tuple(
            tuple(float(low) + (float(high) - float(low)) * float(weight) for low, high, weight in of_channel)
            for of_channel in self._neighbours(ranks)
        )

    def _neighbours(self, ranks: Sequence[float]) -> list[list[tuple[Any, Any, Fraction]]]:
        """Return, for each channel and rank, the two values next to it in sorted order and the weight of the second."""
        channels, bits = self._channels, self._dtype.itemsize * 8
        wanted: list[list[_OrderStatistic]] = []
        for shift in reversed(range(0, bits, DIGIT)):
            prefixes = [sorted({w.prefix for w in of_channel}) for of_channel in wanted] or [[0]] * channels
            counts = self._counts(prefixes, shift)
            if not wanted:
                totals = counts.sum(axis=(1, 2))
                self._refuse_empty(totals)
                positions = [[(int(n) - 1) * Fraction(rank) / 100 for rank in ranks] for n in totals]
                wanted = [  # the two neighbours of each position in sorted order
                    [_OrderStatistic(0, min(math.floor(p) + i, int(n) - 1)) for p in of_channel for i in (0, 1)]
                    for of_channel, n in zip(positions, totals, strict=True)
                ]
            wanted = [
                [w.refine(counts[channel, prefixes[channel].index(w.prefix)]) for w in of_channel]
                for channel, of_channel in enumerate(wanted)
            ]
        values = [_values(np.array([w.prefix for w in channel], np.uint64), self._dtype) for channel in wanted]
        return [
            [(*two, p % 1) for *two, p in zip(v[::2].tolist(), v[1::2].tolist(), of_channel, strict=True)]
            for v, of_channel in zip(values, positions, strict=True)
        ]

    def _refuse_empty(self, totals: Array) -> None:
        for channel, total in enumerate(totals):
            if not total:
                part = "the volume" if self.pooled else f"channel {channel} of the volume"
                raise ValueError(f"{part} has no finite value to take statistics of")

    def _counts(self, prefixes: Sequence[Sequence[int]], shift: int) -> Array:
        """Count how often each digit at `shift` follows each prefix: `(C, prefixes, digits)`, int64."""
        shape = (len(prefixes), max(map(len, prefixes)), 1 << min(DIGIT, self._dtype.itemsize * 8))

        def count(values: Array) -> Array:
            counts = np.zeros(shape, np.int64)
            for channel, piece in _pieces(values):
                keys = _keys(piece)
                for i, prefix in enumerate(prefixes[channel]):
                    matching = keys[keys >> (shift + DIGIT) == prefix] if shift + DIGIT < keys.itemsize * 8 else keys
                    digits = (matching >> shift & (shape[2] - 1)).astype(np.intp)
                    counts[channel, i] += np.bincount(digits, minlength=shape[2])
            return counts

        return self._pass(count, np.add, 8 * math.prod(shape))

    def _pass(
        self, summarize: Callable[[Array], Array], merge: Callable[[Array, Array], Array], summary_bytes: int
    ) -> Array:
        """Summarize all boxes, `(C, *box)` each, and merge the summaries in the order of the boxes."""
        volume = self.volume
        voxel = volume.channels * volume.dtype.itemsize
        step = worthwhile(volume.chunks, volume.shape, BOX_BYTES // voxel)
        box_bytes = voxel * math.prod(min(s, n) for s, n in zip(step, volume.shape, strict=True))
        box_bytes += 0 if self.prepare is None else 24 * (box_bytes // volume.dtype.itemsize)  # float64, and copies
        need = 3 * max(box_bytes, volume.chunk_bytes) + PIECE_BYTES + (WAVE + 1) * summary_bytes
        threads = max(1, min(self.max_memory // need, usable_cores()))
        reader, whole = volume.for_run(threads), self.box or Box.of_shape(volume.shape)
        summaries = run_pass(
            lambda box: summarize(self._prepared(reader.read(box))),
            whole.split(step),
            threads=threads,
            name="statistics",
            unit="voxels",
            size=lambda box: box.size,
            total=whole.size,
            progress=self.progress,
        )
        return functools.reduce(merge, summaries)

    def _prepared(self, values: Array) -> Array:
        values = values if self.prepare is None else self.prepare(values)
        return values.reshape(1, -1) if self.pooled else values


@dataclass(frozen=True, slots=True)
class _OrderStatistic:
    """The value at an index in the sorted order of the values whose keys begin with a prefix."""

    prefix: int
    index: int

    def refine(self, counts: Array) -> _OrderStatistic:
        """Return the same value with one more digit, given the counts of that digit."""
        below = np.cumsum(counts)
        digit = int(np.searchsorted(below, self.index, side="right"))
        before = int(below[digit - 1]) if digit else 0
        return _OrderStatistic(self.prefix << DIGIT | digit, self.index - before)


def _pieces(values: Array) -> Iterator[tuple[int, Array]]:
    """Yield the finite values of each channel, flat, in pieces."""
    for channel, of_channel in enumerate(values):
        flat = of_channel.reshape(-1)
        for start in range(0, flat.size, PIECE):
            piece = flat[start : start + PIECE]
            if piece.dtype.kind == "f" and not (finite := np.isfinite(piece)).all():
                piece = piece[finite]
            yield channel, piece


def _moments_of(values: Array) -> Array:
    """Return count, mean and sum of squared differences from the mean of each channel: `(C, 3)`, float64."""
    moments = np.zeros((len(values), 3))
    for channel, piece in _pieces(values):
        if piece.size:
            wide = piece.astype(np.float64)
            mean = wide.mean()
            wide -= mean
            part = np.array([[wide.size, mean, wide @ wide]])
            moments[channel] = _merge_moments(moments[channel : channel + 1], part)
    return moments


def _extremes_of(values: Array) -> Array:
    """Return the negative of the smallest value, and the largest one, of each channel: `(C, 2)`, float64."""
    found = np.full((len(values), 2), -np.inf)
    for channel, piece in _pieces(values):
        if piece.size:
            found[channel] = np.maximum(found[channel], (-float(piece.min()), float(piece.max())))
    return found


def _sums_of(values: Array) -> Array:
    """Return count and exact sum of each channel: `(C, 2)`, Python's numbers."""
    sums = np.full((len(values), 2), 0, object)
    for channel, piece in _pieces(values):
        sums[channel] += (piece.size, _exact_sum(piece))
    return sums


def _exact_sum(piece: Array) -> Fraction:
    """Return the sum of at most `PIECE` finite values.

    >>> _exact_sum(np.array([1e300, 1.0, -1e300]))
    Fraction(1, 1)
    """
    if piece.dtype.kind != "f":
        halves = (piece >> 32, piece & 0xFFFFFFFF) if piece.itemsize == 8 else (np.zeros(1), piece)
        upper, lower = (int(np.sum(half, dtype=np.int64)) for half in halves)
        return Fraction((upper << 32) + lower)
    mantissas, exponents = np.frexp(piece.astype(np.float64))
    high = np.floor(np.ldexp(mantissas, 26))
    low = np.ldexp(mantissas, 53) - np.ldexp(high, 27)  # both integers, whose sums float64 holds
    least = int(exponents.min(initial=0))
    by_exponent = [np.bincount(exponents - least, part).tolist() for part in (high, low)]
    return sum(
        ((int(h) << 27) + int(w)) * Fraction(2) ** (least + i - 53)
        for i, (h, w) in enumerate(zip(*by_exponent, strict=True))
        if h or w
    ) + Fraction(0)


def _merge_moments(one: Array, other: Array) -> Array:
    """Merge the moments of two sets (Chan, Golub and LeVeque 1979, "Updating formulae")."""
    (n, mean, squares), (m, other_mean, other_squares) = one.T, other.T
    total = np.maximum(n + m, 1)
    distance = other_mean - mean
    return np.stack(
        [n + m, mean + distance * (m / total), squares + other_squares + distance**2 * (n * m / total)], axis=1
    )


def _moments_of_counts(counts: Array, dtype: np.dtype[Any]) -> tuple[float, float]:
    """Return mean and standard deviation from the count of each key, rounded once."""
    keys = np.flatnonzero(counts)
    exact = [Fraction(value) for value in _values(keys, dtype).tolist()]
    times = counts[keys].tolist()
    total = sum(times)
    mean = sum(v * n for v, n in zip(exact, times, strict=True)) / total
    variance = sum(v * v * n for v, n in zip(exact, times, strict=True)) / total - mean**2
    return float(mean), math.sqrt(variance)


def _keys(values: Array) -> Array:
    """Return unsigned integers that sort as the values do."""
    bits = 8 * values.itemsize
    keys: Array = values.view(f"u{values.itemsize}")
    sign = keys.dtype.type(1 << (bits - 1))
    if values.dtype.kind == "i":
        keys = keys ^ sign
    if values.dtype.kind == "f":
        keys = np.where(keys & sign, ~keys, keys | sign)
    return keys


def _values(keys: Array, dtype: np.dtype[Any]) -> Array:
    """Return the values of keys: the inverse of `_keys`."""
    bits = keys.astype(f"u{dtype.itemsize}")
    sign = bits.dtype.type(1 << (8 * dtype.itemsize - 1))
    if dtype.kind == "i":
        bits ^= sign
    if dtype.kind == "f":
        bits = np.where(bits & sign, bits ^ sign, ~bits)
    values: Array = bits.view(dtype)
    return values
