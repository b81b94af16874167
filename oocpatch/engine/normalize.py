"""Normalization: sums become output values.

```text
 sums --/ weights--> values --postprocess--> values --cast--> output dtype      tile by tile, in the cache
```

Weights are those of a full grid, as one 1-D array per axis, or the last channel of the sums where patches may be
skipped.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from oocpatch.models.postprocessing import Postprocess
from oocpatch.planning.box import Box, Ints, cut


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of voxels of an output that a result reports.

    Attributes:
        uncovered: voxels without a patch.
        nonfinite: voxels that are NaN or infinite before the postprocess.
    """

    uncovered: int = 0
    nonfinite: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.uncovered + other.uncovered, self.nonfinite + other.nonfinite)


@dataclass(frozen=True, slots=True)
class Normalizer:
    """The conversion of sums to output values.

    Attributes:
        weights: per axis, the sum of all windows, float32 `(length,)`; None where none are needed, or `dense` is set.
        postprocess: a function of `(C, *spatial)`, applied to blended values.
        looped: number of looped axes, which a postprocess does not see.
        tile: voxels that are normalized at a time.
        dense: whether the last channel of the sums is the weights, zero without a patch.
        divide: whether sums are divided by dense weights, which otherwise mark the voxels of patches.
        fill: value of voxels without a patch.
        nan_is_empty: whether a voxel with NaN in a channel counts as one without a patch.
        allow_nonfinite: whether values may be NaN or infinite; they are counted then.

    >>> normalizer = Normalizer((torch.tensor([1.0, 2.0, 4.0]),), postprocess=None, looped=0, tile=64)
    >>> out = torch.zeros((1, 2))
    >>> normalizer.normalize(torch.tensor([[3.0, 8.0]]), Box((1,), (3,)), out)
    Counts(uncovered=0, nonfinite=0)
    >>> out
    tensor([[1.5000, 2.0000]])
    """

    weights: tuple[torch.Tensor, ...] | None
    postprocess: Postprocess | None
    looped: int
    tile: int
    dense: bool = False
    divide: bool = True
    fill: float = 0.0
    allow_nonfinite: bool = False
    nan_is_empty: bool = False

    def to(self, device: str, tile: int) -> Normalizer:
        """Return the same conversion for sums on a device, in tiles of so many voxels."""
        weights = None if self.weights is None else tuple(w.to(device) for w in self.weights)
        return replace(self, weights=weights, tile=tile)

    def normalize(self, sums: torch.Tensor, box: Box, out: torch.Tensor) -> Counts:
        """Write the values of a box into `out`, `(C', *box.shape)`, and return the counts of its voxels.

        Raises:
            ValueError: when the postprocess returns another shape than it did for the probe.
        """
        factors = [w[part] for w, part in zip(self.weights or (), box.slices(), strict=bool(self.weights))]
        size = min(self.tile, box.size)
        plain = self.postprocess is None and out.dtype == torch.float32
        rounds = bool(factors) and self.postprocess is None and rounds_in_place(out.dtype)
        weights_memory = _memory(sums, size if len(factors) > 1 else 0)
        values_memory = _memory(sums, size * sums.shape[0] if rounds else 0)
        counts = Counts()
        for inner, weights in _with_weights(tiles(box.shape, self.tile, self.looped), factors, weights_memory):
            values, target = sums[(slice(None), *inner)], out[(slice(None), *inner)]
            if self.dense:
                counts += self._normalize_dense(values, target)
                continue
            if self.nan_is_empty and values.is_floating_point():
                marks = (~values.isnan().any(dim=0, keepdim=True)).to(values.dtype)
                counts += self._normalize_dense(torch.cat([values, marks]), target)
                continue
            if weights is not None:
                if plain:
                    torch.div(values, weights, out=target)
                    counts += self._count(target)
                    continue
                if rounds:
                    values = torch.div(values, weights, out=values_memory(values.shape))
                    counts += self._count(values)
                    target.copy_(round_in_place(values, out.dtype, nan=self.allow_nonfinite))
                    continue
                values = values / weights
            counts += self._count(values) + self._store(values, target)
        return counts

    def _count(self, values: torch.Tensor) -> Counts:
        if not self.allow_nonfinite or not values.dtype.is_floating_point:
            return Counts()
        return Counts(nonfinite=int((~values.isfinite()).any(dim=0).sum()))

    def _normalize_dense(self, sums: torch.Tensor, target: torch.Tensor) -> Counts:
        """Normalize a tile whose last channel is the weights."""
        values, weights = sums[:-1], sums[-1]
        empty = weights == 0
        uncovered = int(empty.sum())
        if uncovered == empty.numel():
            target.fill_(self.fill)
            return Counts(uncovered)
        if uncovered:  # a postprocess must not meet the infinities and NaNs that no patch has overwritten
            values = torch.where(empty, values.new_zeros(()), values)
            weights = torch.where(empty, weights.new_ones(()), weights)
        values = values / weights if self.divide else values
        counts = Counts(uncovered) + self._count(values) + self._store(values, target)
        if uncovered:
            filled = torch.where(empty, _signed(target.new_full((), self.fill)), _signed(target))
            _signed(target).copy_(filled)
        return counts

    def _store(self, values: torch.Tensor, target: torch.Tensor) -> Counts:
        """Postprocess the values of a tile, without its looped axes, and cast them; count those too large for floats.

        Raises:
            ValueError: when the postprocess returns another shape than it did for the probe, or values are too large.
        """
        if self.postprocess is not None:
            looped = tuple(range(1, 1 + self.looped))  # tiles have one index of each
            result = torch.as_tensor(
                self.postprocess(values.squeeze(looped) if looped else values), device=values.device
            )
            for axis in looped:
                result = result.unsqueeze(axis)
            if result.shape != target.shape:
                raise ValueError(
                    f"postprocess must keep the spatial shape and give {target.shape[0]} channel(s), as it did for the "
                    f"probe: got {tuple(result.shape)} for {tuple(values.shape)}"
                )
            values = result
        target.copy_(cast(values, target.dtype))
        if not narrows(values.dtype, target.dtype):
            return Counts()
        too_large = target.isinf() & values.isfinite()
        if not (count := int(too_large.any(dim=0).sum())):
            return Counts()
        if not self.allow_nonfinite:
            dtype_text = str(target.dtype).removeprefix("torch.")
            raise ValueError(
                f"{dtype_text} holds numbers up to {torch.finfo(target.dtype).max:g}, but {count} voxels of the output "
                f"are larger, up to {float(values[too_large].abs().max()):g}; choose a wider output_dtype, or pass "
                "allow_nonfinite=True to have them infinite"
            )
        return Counts(nonfinite=count)


_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def _signed(values: torch.Tensor) -> torch.Tensor:
    """Return a view that torch has all kernels for, on every device: it has few for the larger unsigned integers."""
    return values.view(_SIGNED.get(values.dtype, values.dtype))


def _memory(like: torch.Tensor, size: int) -> Callable[[Ints], torch.Tensor]:
    """Return a function that gives the same memory, of so many float32 values, in any shape: for one tile at a time."""
    memory = like.new_empty(size, dtype=torch.float32)
    return functools.cache(lambda shape: memory[: math.prod(shape)].view(shape))


Tile = tuple[slice, ...]


def tiles(shape: Ints, voxels: int, looped: int = 0) -> list[list[Tile]]:
    """Cut a box into tiles of at most so many voxels, long in the last axes; looped axes one index at a time.

    Returns:
        One list for each set of tiles that differ along the first axis only.

    >>> [[tuple((s.start, s.stop) for s in tile) for tile in row] for row in tiles((3, 4), 8)]
    [[((0, 2), (0, 4)), ((2, 3), (0, 4))]]
    """
    size = [1] * len(shape)
    for axis in reversed(range(len(size))):
        size[axis] = max(1, min(shape[axis], voxels // math.prod(size[axis + 1 :]))) if axis >= looped else 1
    cuts = [[slice(*span) for span in cut(0, n, step)] for n, step in zip(shape, size, strict=True)]
    return [[(first, *rest) for first in cuts[0]] for rest in itertools.product(*cuts[1:])]


def _with_weights(
    rows: list[list[Tile]], factors: list[torch.Tensor], memory: Callable[[Ints], torch.Tensor]
) -> Iterator[tuple[Tile, torch.Tensor | None]]:
    """Yield each tile with its weights: the outer product of a part of each factor, in `memory`; None without factors.

    Tiles of a row, which differ along the first axis only, share the product of all factors but the first.
    """
    if not factors:
        yield from ((tile, None) for row in rows for tile in row)
        return
    column = factors[0].reshape(-1, *(1,) * (len(factors) - 1))
    for row in rows:
        rest = outer_product([factor[part] for factor, part in zip(factors[1:], row[0][1:], strict=True)])
        for tile in row:
            first = column[tile[0]]
            yield tile, first if not rest.ndim else torch.mul(first, rest, out=memory((first.shape[0], *rest.shape)))


def outer_product(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the product of 1-D float32 factors, one per axis, multiplied from the last to the first.

    >>> outer_product([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]).tolist()
    [[3.0, 4.0], [6.0, 8.0]]
    """
    product = torch.ones((), dtype=torch.float32, device="cpu")
    for factor in reversed(factors):
        product = factor.reshape(-1, *(1,) * product.ndim) * product
    return product


def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert to a dtype; to integers, round half to even and saturate (NaN becomes 0).

    >>> cast(torch.tensor([0.5, 1.5, 300.0, -1.0]), torch.uint8).tolist()
    [0, 2, 255, 0]
    """
    if values.dtype in (dtype, torch.bool) or dtype.is_floating_point:
        return values.to(dtype)
    if dtype == torch.bool:
        return values != 0
    info = torch.iinfo(dtype)
    if not values.dtype.is_floating_point:
        source = torch.iinfo(values.dtype)
        if info.min <= source.min and source.max <= info.max:
            return values.to(dtype)
        return values.to(torch.int64).clamp(info.min, min(info.max, 2**63 - 1)).to(dtype)
    return _round(values, dtype)


def _round(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if rounds_in_place(dtype) and values.dtype == torch.float32:
        return round_in_place(values.clone(), dtype).to(dtype)
    info = torch.iinfo(dtype)
    # float64 holds every 32-bit limit exactly; the 64-bit ones are put right by hand
    rounded = values.to(torch.float64).nan_to_num(0.0, math.inf, -math.inf).round()
    if dtype.itemsize < 8:
        return rounded.clamp(info.min, info.max).to(torch.int64).to(dtype)
    high = rounded >= float(info.max)
    result = rounded.clamp(float(info.min), float(2 ** (63 if info.min else 64) - 2048)).to(dtype)
    return torch.where(high, torch.tensor(info.max, dtype=dtype, device=result.device), result)


def narrows(source: torch.dtype, target: torch.dtype) -> bool:
    """Return whether a float dtype has a smaller range than another dtype, so that finite values become infinite.

    >>> narrows(torch.float32, torch.float16), narrows(torch.float16, torch.float32)
    (True, False)
    """
    if not target.is_floating_point or source == torch.bool:
        return False
    largest = torch.finfo(source).max if source.is_floating_point else torch.iinfo(source).max
    return largest > torch.finfo(target).max


def rounds_in_place(dtype: torch.dtype) -> bool:
    """Return whether `round_in_place` is exact: float32 represents every limit of 16 bits."""
    return not (dtype.is_floating_point or dtype.is_complex) and dtype != torch.bool and dtype.itemsize <= 2


def round_in_place(values: torch.Tensor, dtype: torch.dtype, *, nan: bool = True) -> torch.Tensor:
    """Round float32 values in place to the range of a small integer dtype, as floats or int16; see `cast`.

    A conversion of float32 directly to uint8 takes torch five times as long. With `nan` there may be NaNs.
    """
    info = torch.iinfo(dtype)
    rounded = values.round_().clamp_(info.min, info.max)
    rounded = rounded.nan_to_num_(0.0) if nan else rounded
    return rounded.to(torch.int16) if dtype.itemsize == 1 else rounded
