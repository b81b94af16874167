"""Tiles: sums over one part of the output, and the patches that are in them.

A tile takes each patch once, in any order. In the blending modes window times values is added to it. In `crop` mode
values are copied, and where claims overlap the greater key holds the voxel. Weights are not stored: they follow from
the patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch

from oocpatch.aggregation.placement import Key, Patch
from oocpatch.engine.buffers import buffer
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.windows import axis_window

Span = tuple[Ints, Ints]
"""Start and size of a patch's output, in voxels of the output."""


class Tile:
    """Sums `data (C, *box.shape)` over a box of the output, the patches in them, and for `crop` their claims."""

    def __init__(self, box: Box, channels: int, dtype: torch.dtype) -> None:
        self.box = box
        self.data = buffer((channels, *box.shape), dtype, "cpu")
        self.patches: dict[Patch, None] = {}
        self.claims: list[tuple[Key, Box]] = []
        self.changed = False  # since it was stored

    def add(self, start: Ints, values: torch.Tensor, window: torch.Tensor, box: Box) -> None:
        """Add window `(*out_size)` times values `(C, *out_size)`, from `start` on, in a box."""
        part = box & self.box
        inner = part.slices(start)
        self._view(part).addcmul_(values[(slice(None), *inner)], window[inner])

    def claim(self, key: Key, box: Box, start: Ints, values: torch.Tensor) -> None:
        """Copy the values of a claim, `(C, *out_size)` from `start` on, where no greater claim holds the voxels."""
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

    def values(self, mode: str, span: Callable[[Patch], Span]) -> torch.Tensor:
        """Return the sums divided by the weights where these are above zero; in `crop` mode, the data."""
        if mode == "crop":
            return self.data
        weights = self.weights(mode, span)
        return self.data / weights.masked_fill_(weights <= 0, 1)

    def weights(self, mode: str, span: Callable[[Patch], Span]) -> torch.Tensor:
        """Return the sum of the windows of the patches, float32 `(*box.shape)`.

        On a grid the starts are a product along the axes, and the sum is an outer product.
        """
        spans = set(map(span, self.patches))
        columns = [set(column) for column in zip(*(start for start, _ in spans), strict=True)]
        sizes = {out_size for _, out_size in spans}
        if len(sizes) != 1 or not math.prod(map(len, columns)) == len(spans) == len(self.patches):
            return sum_windows(mode, self.box, list(map(span, self.patches)))
        bounds = zip(columns, *sizes, self.box.start, self.box.stop, strict=True)
        return outer([sum_windows(mode, Box((a,), (b,)), [((s,), (m,)) for s in sorted(c)]) for c, m, a, b in bounds])


def sum_windows(mode: str, box: Box, spans: Collection[Span]) -> torch.Tensor:
    """Return the sum over a box of the windows of some outputs of patches, float32 `(*box.shape)`.

    >>> sum_windows("hann", Box((0,), (5,)), [((0,), (3,)), ((2,), (3,))])
    tensor([0.5000, 1.0000, 1.0000, 1.0000, 0.5000])
    """
    total = torch.zeros(box.shape, dtype=torch.float32)
    for start, out_size in spans:
        part = Box(start, tuple(a + m for a, m in zip(start, out_size, strict=True))) & box
        if not part.empty:
            total[part.slices(box.start)] += patch_window(mode, out_size)[part.slices(start)]
    return total


def patch_window(mode: str, out_size: Ints) -> torch.Tensor:
    """Return the blending weights of a patch, float32 `(*out_size)`.

    >>> patch_window("hann", (1, 3))
    tensor([[0.5000, 1.0000, 0.5000]])
    """
    return outer([torch.from_numpy(axis_window(mode, n)).to(torch.float32) for n in out_size])


def outer(factors: Collection[torch.Tensor]) -> torch.Tensor:
    """Return the outer product of one array per axis."""
    product = torch.ones((), dtype=torch.float32)
    for factor in factors:
        product = product[..., None] * factor
    return product
