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

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch

from oocpatch.engine.buffers import buffer, torch_dtype
from oocpatch.engine.normalize import NOTHING, Counts, Normalizer
from oocpatch.engine.ring_buffer import Ring
from oocpatch.planning.blocks import Block, BlockGrid, offsets
from oocpatch.planning.box import Box
from oocpatch.planning.heads import Head


@dataclass(frozen=True, slots=True)
class SlabPiece:
    """A part of a slab.

    Attributes:
        piece: name of the piece of the workspace it belongs to; None: it goes to the output.
        whole: the box of that piece.
        box: the part's own box.
        head: which of the model's outputs it belongs to.
    """

    piece: str | None
    whole: Box
    box: Box
    head: int


@dataclass(frozen=True, slots=True)
class FilledPiece:
    """A part that is complete, with its data on the device: sums `(C, *box)`, or values of the output `(C', *box)`."""

    part: SlabPiece
    data: torch.Tensor


def seam_name(offset: tuple[int, ...]) -> str:
    """Name of the piece for the neighbour at an offset."""
    return "seam-" + "".join(map(str, offset))


def open_name(axis: int) -> str:
    """Name of the piece of the core that is open on an axis."""
    return f"open-{axis}"


def destinations(blocks: BlockGrid, block: Block) -> list[tuple[str | None, Box]]:
    """Where each voxel of the block's reach goes: the boxes cover it exactly once."""
    found: list[tuple[str | None, Box]] = [(None, block.direct)]
    found += [(open_name(axis), box) for axis, box in enumerate(block.open_boxes)]
    found += [(seam_name(e), block.seam(e)) for e in offsets(len(blocks.axes))]
    return [(piece, box) for piece, box in found if not box.empty]


def slabs(blocks: BlockGrid, block: Block, head: int = 0) -> Iterator[tuple[Box, list[SlabPiece]]]:
    """The slabs of a block's reach, in the order of the sweep, each with its parts: they cover it exactly once."""
    pieces, axis = destinations(blocks, block), blocks.sweep
    core_stop = block.core.stop[axis]
    for region in (
        block.reach.along(axis, block.core.start[axis], core_stop),
        block.reach.along(axis, core_stop, block.reach.stop[axis]),
    ):
        for slab in blocks.steps(region):
            parts = [SlabPiece(piece, box, slab & box, head) for piece, box in pieces]
            yield slab, [p for p in parts if not p.box.empty]


class Partial:
    """The sums of one block over its reach, in the frame of one head, as far as they are still open.

    What no patch was added to does not leave: it is not written, and what is not there counts as nothing.

    Args:
        blocks: the blocks in the head's frame.
        index: the block.
        number: which of the model's outputs it is.
        head: what becomes of it.
        capacity: planes to hold.
        window: `(1, *patch)` on the device; None where values are not weighed.
        normalizer: makes output values of complete sums.
        device: where sums are added.
        flush_slab: takes the pieces of a complete slab, and returns earlier ones that are written, whose memory is
            used again.
        check_finite: raise on NaN and infinities.

    Attributes:
        counts: of the voxels of the output, among those that have left.
    """

    def __init__(
        self,
        blocks: BlockGrid,
        index: int,
        *,
        number: int,
        head: Head,
        capacity: int,
        window: torch.Tensor | None,
        normalizer: Normalizer,
        device: str,
        flush_slab: Callable[[list[FilledPiece]], list[FilledPiece]],
        check_finite: bool,
    ) -> None:
        block = blocks[index]
        dtype = torch_dtype(head.dtype)
        self._axis = blocks.sweep
        self._head = head
        self._ring = Ring.of(
            block.reach, channels=head.stored_channels, capacity=capacity, axis=blocks.sweep, dtype=dtype, device=device
        )
        self._window = window
        self._normalizer = normalizer
        self._flush_slab = flush_slab
        self._check = check_finite and dtype.is_floating_point
        self._slabs = slabs(blocks, block, number)
        self._slab: tuple[Box, list[FilledPiece]] | None = None
        self._free: list[torch.Tensor] = []
        self._at = self._touched = block.reach.start[blocks.sweep]
        self.counts = NOTHING
        if head.mode == "max":
            self._clear(self._ring.data)

    def add(self, start: tuple[int, ...], keep: Box, values: torch.Tensor) -> None:
        """Add one patch.

        Args:
            start: corner of the patch.
            keep: the voxels of the patch to take: inside the volume, and for `crop` those it has the last word on.
            values: the model's output, `(C, *patch)`.
        """
        if keep.empty:
            return
        self._touched = max(self._touched, keep.stop[self._axis])
        for part, ring in self._ring.parts(keep):
            inner = (slice(None), *part.slices(start))
            sums, new = ring[: self._head.channels], values[inner]
            if self._window is not None:
                window = self._window[inner]
                sums.addcmul_(new, window)
            elif self._head.mode == "max":
                if self._check and not torch.isfinite(new).all():
                    self._refuse(new, part)
                torch.maximum(sums, new, out=sums)
            else:
                sums.copy_(new)
            if self._head.dense and self._window is not None:
                ring[-1:].add_(window)
            elif self._head.dense:
                ring[-1].fill_(1)

    def advance(self, to: int) -> None:
        """Let all voxels before `to` on the swept axis leave: they are final."""
        while self._at < to:
            if self._slab is None:
                slab, parts = next(self._slabs)
                if self._touched <= slab.start[self._axis] and slab.stop[self._axis] <= to:  # no patch came near it
                    self.counts += Counts(sum(p.box.size for p in parts if p.piece is None))
                    self._at = slab.stop[self._axis]
                    continue
                self._slab = slab, [FilledPiece(p, self._empty(p)) for p in parts]
                self._free = []  # what did not fit must not take memory beside what was made instead
            slab, staged = self._slab
            stop = min(to, slab.stop[self._axis], self._at + self._ring.capacity)
            planes = slab.along(self._axis, self._at, stop)
            self._verify(planes)
            for item in staged:
                self._leave(planes & item.part.box, item)
            for _, sums in self._ring.parts(planes):
                self._clear(sums)
            self._at = stop
            if stop == slab.stop[self._axis]:
                self._slab = None
                self._free = [item.data for item in self._flush_slab(staged)]

    def _clear(self, sums: torch.Tensor) -> None:
        """Put in place what adding a patch to gives that patch."""
        if self._head.mode == "max":
            sums[: self._head.channels].fill_(-math.inf)
            sums[self._head.channels :].zero_()
        else:
            sums.zero_()

    def _empty(self, part: SlabPiece) -> torch.Tensor:
        """Memory for a part: that of a part that is written, since new pages cost as much as what goes into them."""
        sums, head = self._ring.data, self._head
        out = (head.out_channels, torch_dtype(head.out_dtype))
        channels, dtype = out if part.piece is None else (sums.shape[0], sums.dtype)
        shape = (channels, *part.box.shape)
        for i, data in enumerate(self._free):
            if data.shape == shape and data.dtype == dtype:
                return self._free.pop(i)
        return buffer(shape, dtype, sums.device)

    def _leave(self, box: Box, item: FilledPiece) -> None:
        if box.empty:
            return
        for part, sums in self._ring.parts(box):
            target = item.data[(slice(None), *part.slices(item.part.box.start))]
            if item.part.piece is None:
                self.counts += self._normalizer.normalize(sums, part, target)
            else:
                target.copy_(sums)

    def _verify(self, planes: Box) -> None:
        if not self._check or self._head.mode == "max":
            return
        for part, sums in self._ring.parts(planes):
            # The sum is not finite if a value is not; only then is it worth looking at each (it may have overflowed).
            if not torch.isfinite(sums.sum(dtype=torch.float32)) and not torch.isfinite(sums).all():
                self._refuse(sums, part)

    def _refuse(self, values: torch.Tensor, box: Box) -> NoReturn:
        unlike = ~torch.isfinite(values).all(dim=0)
        voxel = tuple(a + b for a, b in zip(unlike.nonzero()[0].tolist(), box.start, strict=True))
        raise ValueError(
            f"the model's output must be finite, got NaN or infinity at voxel {voxel} and in {int(unlike.sum())} of "
            f"the {box.size} voxels around it; pass allow_nonfinite=True to keep such values where they are"
        )


class SlabSums:
    """Own sums over the open parts of one slab, and the seams that are added to them in turn.

    Args:
        head: what they are sums of.
    """

    def __init__(self, head: Head) -> None:
        self.head = head
        self.out_dtype = torch_dtype(head.out_dtype)
        self.parts: list[tuple[Box, torch.Tensor | None]] = []

    def own(self, box: Box, data: torch.Tensor | None) -> None:
        """Begin with the block's own sums over a box; None: it has none there."""
        if not box.empty:
            self.parts.append((box, data))

    def add(self, box: Box, seam: torch.Tensor | None) -> None:
        """Add a seam over a box; for `crop` its values replace what is there."""
        if seam is None:
            return
        for i, (own, data) in enumerate(self.parts):
            common = own & box
            if common.empty:
                continue
            if data is None:
                data = torch.zeros((self.head.stored_channels, *own.shape), dtype=seam.dtype)  # noqa: PLW2901
                if self.head.mode == "max":
                    data[: self.head.channels] = -torch.inf
                self.parts[i] = own, data
            target = data[(slice(None), *common.slices(own.start))]
            self._merge(target, seam[(slice(None), *common.slices(box.start))])

    def _merge(self, target: torch.Tensor, seam: torch.Tensor) -> None:
        head = self.head
        if head.blended:
            target.add_(seam)
        elif head.mode == "max":
            torch.maximum(target, seam, out=target)  # of the last channel, too, if it says where patches were
        elif head.dense:
            target.copy_(torch.where(seam[-1:] != 0, seam, target))
        else:
            target.copy_(seam)
