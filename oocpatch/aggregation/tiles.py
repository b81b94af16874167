"""Tiles: sums over one part of the output, and the patches that are in them.

A tile takes each patch once, in any order. In the blending modes window times values is added to it. In `crop` mode
values are copied, and where claims overlap the greater key holds the voxel.

A tile stores nothing per voxel besides its sums. The weights follow from its patches. Where these are a product of
starts, as on a grid, the weights are the outer product of one array per axis, and the engine's `Normalizer` divides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch

from oocpatch.aggregation.placement import Key, Patch
from oocpatch.engine.buffers import buffer
from oocpatch.engine.normalize import Normalizer
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.memory import tile_voxels
from oocpatch.planning.windows import axis_window

Span = Callable[[Patch], tuple[Ints, Ints]]
"""Start and size of a patch's output, in voxels of the output."""


class Tile:
    """The sums over one tile.

    Args:
        box: the tile, in voxels of the output.
        channels: channels of the sums.
        dtype: dtype of the sums: float32, or the model's for `crop`.

    Attributes:
        data: the sums, `(C, *box.shape)`.
        patches: the patches that are in the sums.
        claims: in `crop` mode, the claims on its voxels.
        changed: whether a patch was added since the tile was stored.
    """

    def __init__(self, box: Box, channels: int, dtype: torch.dtype) -> None:
        self.box = box
        self.data = buffer((channels, *box.shape), dtype, "cpu")
        self.patches: dict[Patch, None] = {}
        self.claims: list[tuple[Key, Box]] = []
        self.changed = False

    def add(self, start: Ints, values: torch.Tensor, window: torch.Tensor, extent: Box) -> None:
        """Add window `(1, *given)` times values `(C, *given)` that start somewhere and lie in the output's extent."""
        part = extent & self.box
        inner = (slice(None), *part.slices(start))
        self._view(part).addcmul_(values[inner], window[inner])

    def claim(self, key: Key, box: Box, start: Ints, values: torch.Tensor) -> None:
        """Copy the values of a claim, `(C, *given)` from `start` on, where no greater claim holds the voxels."""
        part = box & self.box
        if part.empty:
            return
        target = self._view(part)
        others = [b & part for k, b in self.claims if k > key and not (b & part).empty]
        before = target.clone() if others else target
        target.copy_(values[(slice(None), *part.slices(start))])
        for other in others:
            inner = (slice(None), *other.slices(part.start))
            target[inner] = before[inner]
        self.claims.append((key, part))

    def _view(self, box: Box) -> torch.Tensor:
        return self.data[(slice(None), *box.slices(self.box.start))]

    def normalized(self, mode: str, span: Span) -> torch.Tensor:
        """Return the sums divided by the weights of the patches where these are above zero, else zero."""
        out = torch.empty_like(self.data)
        factors = axis_weights(mode, self.box, self.patches, span)
        if factors is None:
            return torch.div(self.data, _above_zero(self.weights(mode, span)), out=out)
        normalizer = Normalizer(tuple(map(_above_zero, factors)), None, 0, tile_voxels(len(out)))
        normalizer.normalize(self.data, Box.of_shape(self.box.shape), out)
        return out

    def weights(self, mode: str, span: Span) -> torch.Tensor:
        """Return the sum of the windows of the patches, float32 `(*box.shape)`."""
        factors = axis_weights(mode, self.box, self.patches, span)
        if factors is not None:
            return outer(factors)
        total = torch.zeros(self.box.shape, dtype=torch.float32)
        for start, given in map(span, self.patches):
            part = Box(start, tuple(a + m for a, m in zip(start, given, strict=True))) & self.box
            if not part.empty:
                total[part.slices(self.box.start)] += patch_window(mode, given)[0][part.slices(start)]
        return total


def axis_weights(mode: str, box: Box, patches: Collection[Patch], span: Span) -> list[torch.Tensor] | None:
    """Return the sum of all windows over a box as one float32 array per axis, when it is their outer product."""
    if len({size for _, size in patches}) != 1:
        return None
    spans = list(map(span, patches))
    columns = zip(
        zip(*(start for start, _ in patches), strict=True), zip(*(at for at, _ in spans), strict=True), strict=True
    )
    starts = [dict(zip(*pair, strict=True)) for pair in columns]
    if math.prod(map(len, starts)) != len(patches):
        return None
    sums = []
    for column, m, low, high in zip(starts, spans[0][1], box.start, box.stop, strict=True):
        window, total = axis_window(mode, m), np.zeros(high - low)
        for at in sorted(column.values()):
            a, b = max(low, at), min(high, at + m)
            if a < b:
                total[a - low : b - low] += window[a - at : b - at]
        sums.append(torch.from_numpy(total).to(torch.float32))
    return sums


def patch_window(mode: str, given: Ints) -> torch.Tensor:
    """Return the blending weights of a patch, float32 `(1, *given)`.

    >>> patch_window("hann", (1, 3)).tolist()
    [[[0.5, 1.0, 0.5]]]
    """
    return outer([torch.from_numpy(axis_window(mode, n)).to(torch.float32) for n in given])[None]


def outer(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the outer product of one array per axis."""
    product = torch.ones((), dtype=torch.float32)
    for factor in reversed(factors):
        product = factor.reshape(-1, *(1,) * product.ndim) * product
    return product


def _above_zero(weights: torch.Tensor) -> torch.Tensor:
    """Return weights to divide by: one where no patch lies, where the sums are zero."""
    return torch.where(weights > 0, weights, 1)
