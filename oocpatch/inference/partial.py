"""Partials: sums of one block, rolling along the swept axis.

Patches are added at the front; what no later patch of the block touches leaves at the back, slab by slab. A slab is as
long as a step of the sweep, and each part of it has one destination:

```text
             slab k-1      slab k        slab k+1
            +-----------+-------------+-----------+
    own     |  written  |   filling   |           |  sums    -> workspace
    direct  |  written  |   filling   |  ring     |  values  -> output
    seam    |  written  |   filling   |           |  sums    -> workspace
            +-----------+-------------+-----------+
                                      ^ everything before has left the ring
```
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from oocpatch.inference.buffers import buffer
from oocpatch.inference.finish import Finisher
from oocpatch.inference.ring import Ring
from oocpatch.planning.blocks import Block, BlockGrid, offsets
from oocpatch.planning.box import Box


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a slab.

    Attributes:
        piece: name of the piece of the workspace it belongs to; None: it goes to the output.
        whole: the box of that piece.
        box: the part's own box.
    """

    piece: str | None
    whole: Box
    box: Box


@dataclass(frozen=True, slots=True)
class Staged:
    """A part that is complete, with its data on the host: sums `(C, *box)`, or values of the output `(C', *box)`."""

    part: Part
    data: torch.Tensor


def seam_name(offset: tuple[int, ...]) -> str:
    """Name of the piece for the neighbour at an offset."""
    return "seam-" + "".join(map(str, offset))


def own_name(axis: int) -> str:
    """Name of the piece of the core that is open on an axis."""
    return f"own-{axis}"


def destinations(blocks: BlockGrid, block: Block) -> list[tuple[str | None, Box]]:
    """Where each voxel of the block's reach goes: the boxes cover it exactly once."""
    found: list[tuple[str | None, Box]] = [(None, block.direct)]
    found += [(own_name(axis), box) for axis, box in enumerate(block.own)]
    found += [(seam_name(e), block.seam(e)) for e in offsets(len(blocks.axes))]
    return [(piece, box) for piece, box in found if not box.empty]


def slabs(blocks: BlockGrid, block: Block) -> Iterator[tuple[Box, list[Part]]]:
    """The slabs of a block's reach, in the order of the sweep, each with its parts: they cover it exactly once."""
    pieces, axis = destinations(blocks, block), blocks.sweep
    core_stop = block.core.stop[axis]
    for region in (
        block.reach.along(axis, block.core.start[axis], core_stop),
        block.reach.along(axis, core_stop, block.reach.stop[axis]),
    ):
        for slab in blocks.steps(region):
            parts = [Part(piece, box, slab & box) for piece, box in pieces]
            yield slab, [p for p in parts if not p.box.empty]


class Partial:
    """The sums of one block over its reach, as far as they are still open.

    Args:
        blocks: the block grid.
        block: the block.
        channels: channels of the sums.
        dtype: dtype of the sums: float32, or the model's for `crop`.
        out_channels, out_dtype: of the output.
        capacity: planes to hold.
        window: `(1, *patch_size)` on the device; None for `crop`, where values are copied.
        finisher: makes output values of complete sums.
        device: where sums are added.
        emit: takes the parts of a slab when it is complete; gives back those that it is done with, to be used again.
        check_finite: raise on NaN and infinities.
    """

    def __init__(
        self,
        blocks: BlockGrid,
        block: Block,
        *,
        channels: int,
        dtype: torch.dtype,
        out_channels: int,
        out_dtype: torch.dtype,
        capacity: int,
        window: torch.Tensor | None,
        finisher: Finisher,
        device: str,
        emit: Callable[[list[Staged]], list[Staged]],
        check_finite: bool,
    ) -> None:
        self._axis = blocks.sweep
        self._ring = Ring.of(
            block.reach, channels=channels, capacity=capacity, axis=blocks.sweep, dtype=dtype, device=device
        )
        self._window = window
        self._finisher = finisher
        self._emit = emit
        self._check = check_finite and dtype.is_floating_point
        self._out = (out_channels, out_dtype)
        self._slabs = slabs(blocks, block)
        self._slab: tuple[Box, list[Staged]] | None = None
        self._free: list[torch.Tensor] = []
        self._at = block.reach.start[blocks.sweep]

    def add(self, start: tuple[int, ...], keep: Box, values: torch.Tensor) -> None:
        """Add one patch.

        Args:
            start: corner of the patch.
            keep: the voxels of the patch to take: inside the volume, and for `crop` those it has the last word on.
            values: the model's output, `(C, *patch_size)`.
        """
        for part, sums in self._ring.parts(keep):
            inner = (slice(None), *part.slices(start))
            if self._window is None:
                sums.copy_(values[inner])
            else:
                sums.addcmul_(values[inner], self._window[inner])

    def advance(self, to: int) -> None:
        """Let all voxels before `to` on the swept axis leave: they are final."""
        while self._at < to:
            if self._slab is None:
                slab, parts = next(self._slabs)
                self._slab = slab, [Staged(p, self._empty(p)) for p in parts]
                self._free = []  # what did not fit must not take memory beside what was made instead
            slab, staged = self._slab
            stop = min(to, slab.stop[self._axis], self._at + self._ring.capacity)
            planes = slab.along(self._axis, self._at, stop)
            self._verify(planes)
            for item in staged:
                self._leave(planes & item.part.box, item)
            for _, sums in self._ring.parts(planes):
                sums.zero_()
            self._at = stop
            if stop == slab.stop[self._axis]:
                self._slab = None
                self._free = [item.data for item in self._emit(staged)]

    def _empty(self, part: Part) -> torch.Tensor:
        """Memory for a part: that of a part that is written, since new pages cost as much as what goes into them."""
        sums = self._ring.data
        channels, dtype = self._out if part.piece is None else (sums.shape[0], sums.dtype)
        shape = (channels, *part.box.shape)
        for i, data in enumerate(self._free):
            if data.shape == shape and data.dtype == dtype:
                return self._free.pop(i)
        return buffer(shape, dtype, sums.device)

    def _leave(self, box: Box, item: Staged) -> None:
        if box.empty:
            return
        for part, sums in self._ring.parts(box):
            target = item.data[(slice(None), *part.slices(item.part.box.start))]
            if item.part.piece is None:
                self._finisher.finish(sums, part, target)
            else:
                target.copy_(sums)

    def _verify(self, planes: Box) -> None:
        if not self._check:
            return
        for part, sums in self._ring.parts(planes):
            # The sum is not finite if a value is not; only then is it worth looking at each (it may have overflowed).
            if not torch.isfinite(sums.sum(dtype=torch.float32)) and not torch.isfinite(sums).all():
                where = (~torch.isfinite(sums)).nonzero()[0][1:].tolist()
                voxel = tuple(a + b for a, b in zip(where, part.start, strict=True))
                raise ValueError(
                    f"the model's output must be finite, got NaN or infinity at voxel {voxel}; "
                    "pass allow_nonfinite=True to keep such values where they are"
                )
