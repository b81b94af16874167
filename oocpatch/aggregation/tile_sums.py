"""Sums over one tile of an output, and how values are made of them.

A tile takes patches in any order. In the blending modes window times output is added to it. In `crop` mode values are
copied, and where claims overlap the greater key holds the voxel: what it held is put back after a lesser one came.

Nothing is kept per voxel besides the sums. The weights follow from the patches: on a full grid, and whenever the starts
of a tile's patches are a product of one set per axis, they are the outer product of one array per axis, and the engine
that divides for `predict` divides here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from oocpatch.aggregation.placement import Key
from oocpatch.engine.buffers import buffer
from oocpatch.engine.normalize import Normalizer
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.memory import tile_voxels
from oocpatch.planning.windows import axis_window


def patch_window(mode: str, given: Ints) -> torch.Tensor:
    """The blending weights of a patch, float32 `(1, *given)`.

    >>> patch_window("hann", (1, 3)).tolist()
    [[[0.5, 1.0, 0.5]]]
    """
    product = torch.ones((), dtype=torch.float32)
    for n in reversed(given):
        factor = torch.from_numpy(axis_window(mode, n)).to(torch.float32)
        product = factor.reshape(-1, *(1,) * product.ndim) * product
    return product[None]


class TileSums:
    """What has been added to a tile since it was opened.

    Args:
        box: the tile, in voxels of the output.
        channels: channels of the sums.
        dtype: dtype of the sums: float32, or the model's for `crop`.

    Attributes:
        data: the sums, `(C, *box.shape)`.
        touched: the box that holds all that is not zero.
        claims: in `crop` mode, who holds which voxels.
        changed: whether anything was added since the sums were last written.
    """

    def __init__(self, box: Box, channels: int, dtype: torch.dtype) -> None:
        self.box = box
        self.data = buffer((channels, *box.shape), dtype, "cpu")
        self.touched = Box(box.start, box.start)
        self.claims: list[tuple[Key, Box]] = []
        self.changed = False

    def view(self, box: Box) -> torch.Tensor:
        """The sums over a part of the tile, `(C, *box.shape)`."""
        return self.data[(slice(None), *box.slices(self.box.start))]

    def add(self, start: Ints, values: torch.Tensor, window: torch.Tensor, extent: Box) -> None:
        """Add window times values.

        Args:
            start: where the values lie in the output.
            values: float32 `(C, *given)`.
            window: float32 `(1, *given)`.
            extent: which of them lie in the output.
        """
        part = extent & self.box
        inner = (slice(None), *part.slices(start))
        self.view(part).addcmul_(values[inner], window[inner])
        self._touch(part)

    def claim(self, key: Key, box: Box, start: Ints, values: torch.Tensor) -> None:
        """Copy the values of a claim, `(C, *given)` from `start` on, where no greater claim holds the voxels."""
        part = box & self.box
        if part.empty:
            return
        target = self.view(part)
        held = [b & part for k, b in self.claims if k > key and not (b & part).empty]
        before = target.clone() if held else target
        target.copy_(values[(slice(None), *part.slices(start))])
        for other in held:
            inner = (slice(None), *other.slices(part.start))
            target[inner] = before[inner]
        self.claims.append((key, part))
        self._touch(part)

    def restore(self, part: Box, data: torch.Tensor, claims: list[tuple[Key, Box]]) -> None:
        """Take over sums that were written."""
        self.view(part).copy_(data)
        self.claims = claims
        self._touch(part)
        self.changed = False

    def _touch(self, part: Box) -> None:
        a, b = self.touched, part
        if not a.empty:
            b = Box(
                tuple(min(x, y) for x, y in zip(a.start, b.start, strict=True)),
                tuple(max(x, y) for x, y in zip(a.stop, b.stop, strict=True)),
            )
        self.touched = b
        self.changed = True


@dataclass(frozen=True, slots=True)
class PatchSet:
    """Patches of one size, by where what they gave lies in the output.

    Attributes:
        given: the size of what each gave, in voxels of the output.
        starts: where that starts, one array `(n, axes)`, or a tuple of one list per axis, of which it is the product.
    """

    given: Ints
    starts: npt.NDArray[np.int64] | tuple[list[int], ...]

    def factors(self, mode: str, box: Box) -> list[torch.Tensor] | None:
        """The sum of the windows over a box as one float32 array per axis, when it is their outer product."""
        if not isinstance(self.starts, tuple):
            return None
        found = []
        for starts, m, low, high in zip(self.starts, self.given, box.start, box.stop, strict=True):
            window, total = axis_window(mode, m), np.zeros(high - low)
            for at in starts:
                a, b = max(low, at), min(high, at + m)
                if a < b:
                    total[a - low : b - low] += window[a - at : b - at]
            found.append(torch.from_numpy(total).to(torch.float32))
        return found

    def weights(self, mode: str, box: Box) -> torch.Tensor:
        """The sum of the windows over a box, float32 `(*box.shape)`."""
        if (factors := self.factors(mode, box)) is not None:
            product = torch.ones((), dtype=torch.float32)
            for factor in reversed(factors):
                product = factor.reshape(-1, *(1,) * product.ndim) * product
            return product
        total, window = torch.zeros(box.shape, dtype=torch.float32), patch_window(mode, self.given)[0]
        for row in np.asarray(self.starts).tolist():
            part = Box(tuple(row), tuple(a + m for a, m in zip(row, self.given, strict=True))) & box
            if not part.empty:
                total[part.slices(box.start)] += window[part.slices(tuple(row))]
        return total


def divided(mode: str, sums: torch.Tensor, box: Box, patches: Sequence[PatchSet]) -> torch.Tensor:
    """Sums divided by the weights of the patches behind them, where those are above zero, else zero.

    Args:
        mode: a blending mode.
        sums: float32 `(C, *box.shape)`.
        box: where they lie in the output.
        patches: all patches that lie there; there may be others.

    >>> divided("hann", torch.tensor([[0.5, 2.0, 0.0]]), Box((0,), (3,)), [PatchSet((1,), ([0, 1],))]).tolist()
    [[0.5, 2.0, 0.0]]
    """
    out = torch.empty_like(sums)
    factors = patches[0].factors(mode, box) if len(patches) == 1 else None
    if factors is not None:
        tile = tile_voxels(len(sums))
        Normalizer(tuple(map(_above_zero, factors)), None, 0, tile).normalize(sums, Box.of_shape(box.shape), out)
        return out
    total = torch.zeros(box.shape, dtype=torch.float32)
    for found in patches:
        total += found.weights(mode, box)
    return torch.div(sums, _above_zero(total), out=out)


def _above_zero(values: torch.Tensor) -> torch.Tensor:
    """Weights to divide by: where no patch lies they are one, and the sums are zero."""
    return torch.where(values > 0, values, 1)


def merged(
    out: torch.Tensor, box: Box, sources: Sequence[tuple[Box, npt.NDArray[np.generic], list[tuple[Key, Box]]]]
) -> None:
    """Bring claims of several sources together, in `out` `(C, *box.shape)`: the greatest key holds a voxel.

    Args:
        out: zeros, where nothing was claimed.
        box: where `out` lies.
        sources: where data lies, the data `(C, *part.shape)`, and the claims behind it.
    """
    claims = [(key, claim, part, data) for part, data, found in sources for key, claim in found]
    # Where a source's lesser claim lies under a greater one of its own, the greater one's value is copied too early,
    # and once more in its turn.
    for _, claim, part, data in sorted(claims, key=lambda item: item[0]):
        common = claim & part & box
        if not common.empty:
            inner = torch.from_numpy(data[(slice(None), *common.slices(part.start))])
            out[(slice(None), *common.slices(box.start))] = inner
