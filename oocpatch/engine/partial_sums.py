"""Partial sums of one block, which roll along the swept axis.

Patches are added at the front. Voxels that no later patch of the block touches are final and leave at the back, slab by
slab. A slab is as long as a step of the sweep, and each piece of it has one destination:

```text
             slab k-1      slab k        slab k+1
            +-----------+-------------+-----------+
    open    |  written  |   filling   |           |  sums    -> workspace
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
from oocpatch.engine.normalize import Counts, Normalizer
from oocpatch.engine.ring_buffer import RingBuffer
from oocpatch.planning.blocks import Block, BlockGrid, offsets
from oocpatch.planning.box import Box
from oocpatch.planning.heads import Head


@dataclass(frozen=True, slots=True)
class SlabPiece:
    """The part of a slab with one destination.

    Attributes:
        name: name of the array of sums in the workspace; None: the values go to the output.
        whole: the box of that array.
        head: position of the head in the plan.
    """

    name: str | None
    whole: Box
    box: Box
    head: int


@dataclass(frozen=True, slots=True)
class FilledPiece:
    """A piece with its data on the device: sums `(C, *box)`, or values of the output `(C', *box)`."""

    piece: SlabPiece
    data: torch.Tensor


def seam_name(offset: tuple[int, ...]) -> str:
    """Return the name of the seam for the neighbour at an offset, such as `seam-01`."""
    return "seam-" + "".join(map(str, offset))


def open_name(axis: int) -> str:
    """Return the name of the sums over the box of the core that is open on an axis."""
    return f"open-{axis}"


def destinations(blocks: BlockGrid, block: Block) -> list[tuple[str | None, Box]]:
    """Return the boxes of a block with one destination each, by name: they cover its reach exactly once."""
    boxes: list[tuple[str | None, Box]] = [(None, block.direct)]
    boxes += [(open_name(axis), box) for axis, box in enumerate(block.open_boxes)]
    boxes += [(seam_name(e), block.seam(e)) for e in offsets(len(blocks.axes))]
    return [(name, box) for name, box in boxes if not box.empty]


def slabs(blocks: BlockGrid, block: Block, head: int = 0) -> Iterator[tuple[Box, list[SlabPiece]]]:
    """Yield the slabs of a block's reach, in the order of the sweep, each with its pieces: they cover it exactly once.

    >>> from oocpatch.planning.grid import PatchGrid
    >>> blocks = BlockGrid.of(PatchGrid.of((24,), (4,), (2,)), core=(8,), unit=(4,), sweep=0, crop=False)
    >>> for slab, pieces in slabs(blocks, blocks[1]):
    ...     print(slab.start, slab.stop, [piece.name for piece in pieces])
    (8,) (12,) ['open-0']
    (12,) (16,) [None]
    (16,) (18,) ['seam-1']
    """
    boxes, axis = destinations(blocks, block), blocks.sweep
    core_stop = block.core.stop[axis]
    for region in (
        block.reach.along(axis, block.core.start[axis], core_stop),
        block.reach.along(axis, core_stop, block.reach.stop[axis]),
    ):
        for slab in blocks.steps(region):
            pieces = [SlabPiece(name, box, slab & box, head) for name, box in boxes]
            yield slab, [piece for piece in pieces if not piece.box.empty]


class PatchSums:
    """The sums of patches over a region, in the frame of one head.

    Args:
        region: the region.
        axis: the swept axis.
        capacity: planes of the ring that holds them; all of the region by default.
        window: `(1, *patch)` on the device; None where values are not weighed.
        check_finite: whether to raise on NaN and infinities.
        defer_check: whether a flag on the device says so instead, since reading one waits for all that was launched.

    Attributes:
        finite: False once a value was not finite, on the device; None where the check is not deferred.
        ring: the sums, `(C, *region)` of all planes or some.
        touched: end of the planes that have a patch.
    """

    def __init__(
        self,
        region: Box,
        *,
        head: Head,
        axis: int,
        window: torch.Tensor | None,
        device: str,
        check_finite: bool,
        defer_check: bool = False,
        capacity: int | None = None,
    ) -> None:
        dtype = torch_dtype(head.dtype)
        capacity = region.shape[axis] if capacity is None else capacity
        self.ring = RingBuffer.of(
            region, channels=head.stored_channels, capacity=capacity, axis=axis, dtype=dtype, device=device
        )
        self.touched = region.start[axis]
        self._axis = axis
        self._head = head
        self._window = window
        self._check = check_finite and dtype.is_floating_point
        self.finite = torch.ones((), dtype=torch.bool, device=device) if self._check and defer_check else None
        if head.takes_maximum:
            self._clear(self.ring.data)

    def add(self, start: tuple[int, ...], inside: Box, values: torch.Tensor) -> None:
        """Add the voxels `inside` of the patch whose corner is `start`; its `values` are `(C, *patch)`.

        Raises:
            ValueError: when maxima are taken and a value is not finite.
        """
        if inside.empty:
            return
        self.touched = max(self.touched, inside.stop[self._axis])
        for part, ring in self.ring.parts(inside):
            inner = (slice(None), *part.slices(start))
            sums, new = ring[: self._head.channels], values[inner]
            if self._window is not None:
                window = self._window[inner]
                sums.addcmul_(new, window)
            elif self._head.takes_maximum:
                if self._check:
                    self._check_values(new, part)
                torch.maximum(sums, new, out=sums)
            else:
                sums.copy_(new)
            if self._head.dense and self._window is not None:
                ring[-1:].add_(window)
            elif self._head.dense:
                ring[-1].fill_(1)

    def check_finite(self, planes: Box) -> None:
        """Check the sums of some planes, where that is asked for.

        Raises:
            ValueError: when one is not finite.
        """
        if not self._check or self._head.takes_maximum:
            return
        for part, sums in self.ring.parts(planes):
            self._check_values(sums, part)

    def _check_values(self, values: torch.Tensor, box: Box) -> None:
        if self.finite is not None:
            self.finite.logical_and_(torch.stack(torch.aminmax(values)).isfinite().all())
        # The sum is not finite if a value is not. It may overflow, too: only then is each value examined.
        elif not torch.isfinite(values.sum(dtype=torch.float32)) and not torch.isfinite(values).all():
            self._raise_nonfinite(values, box)

    def _clear(self, sums: torch.Tensor) -> None:
        """Set sums to the neutral element of adding a patch."""
        if self._head.takes_maximum:
            sums[: self._head.channels].fill_(-math.inf)
            sums[self._head.channels :].zero_()
        else:
            sums.zero_()

    def _raise_nonfinite(self, values: torch.Tensor, box: Box) -> NoReturn:
        bad = ~torch.isfinite(values).all(dim=0)
        voxel = tuple(a + b for a, b in zip(bad.nonzero()[0].tolist(), box.start, strict=True))
        raise nonfinite_error(f"at voxel {voxel} and in {int(bad.sum())} of the {box.size} voxels around it")


def nonfinite_error(where: str) -> ValueError:
    """Return the error for outputs of the model that are not finite."""
    return ValueError(
        f"the model's output must be finite, got NaN or infinity {where}; pass allow_nonfinite=True to keep such "
        "values where they are"
    )


class PartialSums(PatchSums):
    """The sums of one block over its reach, in the frame of one head, as far as they are not final.

    Slabs without a patch are skipped: they are not written, and count as zero where they are read.

    Args:
        blocks: the blocks in the head's frame.
        index: the block.
        number: position of the head in the plan.
        capacity: planes of the ring.
        window: `(1, *patch)` on the device; None where values are not weighed.
        normalizer: conversion of complete sums to output values.
        flush_slab: takes a complete slab, its pieces and the flag `finite`, and returns earlier pieces that are
            written, whose memory is used again.
        check_finite, defer_check: as of `PatchSums`; a deferred check is up to `flush_slab`.

    Attributes:
        counts: counts of the voxels of the output that have left.
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
        flush_slab: Callable[[Box, list[FilledPiece], torch.Tensor | None], list[FilledPiece]],
        check_finite: bool,
        defer_check: bool = False,
    ) -> None:
        block = blocks[index]
        super().__init__(
            block.reach,
            head=head,
            axis=blocks.sweep,
            window=window,
            device=device,
            check_finite=check_finite,
            defer_check=defer_check,
            capacity=capacity,
        )
        self._normalizer = normalizer
        self._flush_slab = flush_slab
        self._slabs = slabs(blocks, block, number)
        self._slab: tuple[Box, list[FilledPiece]] | None = None
        self._free: list[torch.Tensor] = []
        self._position = self.touched
        self.counts = Counts()

    def advance(self, to: int) -> None:
        """Move all voxels before `to` on the swept axis out of the ring: they are final.

        Raises:
            ValueError: when one is not finite.
        """
        while self._position < to:
            if self._slab is None:
                slab, pieces = next(self._slabs)
                if self.touched <= slab.start[self._axis] and slab.stop[self._axis] <= to:  # without a patch
                    self.counts += Counts(sum(piece.box.size for piece in pieces if piece.name is None))
                    self._position = slab.stop[self._axis]
                    continue
                self._slab = slab, [FilledPiece(piece, self._memory(piece)) for piece in pieces]
                self._free = []  # memory of other shapes must not stay beside the memory that replaces it
            slab, filled = self._slab
            stop = min(to, slab.stop[self._axis], self._position + self.ring.capacity)
            planes = slab.along(self._axis, self._position, stop)
            self.check_finite(planes)
            for piece in filled:
                self._move_out(planes & piece.piece.box, piece)
            for _, sums in self.ring.parts(planes):
                self._clear(sums)
            self._position = stop
            if stop == slab.stop[self._axis]:
                self._slab = None
                self._free = [piece.data for piece in self._flush_slab(slab, filled, self.finite)]
                self.finite = None if self.finite is None else torch.ones_like(self.finite)

    def close(self) -> None:
        """Do nothing: all that is final has left the ring."""

    def _memory(self, piece: SlabPiece) -> torch.Tensor:
        """Return memory for a piece, if possible that of a written one: new pages cost as much as filling them."""
        sums, head = self.ring.data, self._head
        out = (head.out_channels, torch_dtype(head.out_dtype))
        channels, dtype = out if piece.name is None else (sums.shape[0], sums.dtype)
        shape = (channels, *piece.box.shape)
        for i, data in enumerate(self._free):
            if data.shape == shape and data.dtype == dtype:
                return self._free.pop(i)
        return buffer(shape, dtype, sums.device)

    def _move_out(self, box: Box, filled: FilledPiece) -> None:
        """Copy the final sums of a box to a piece, normalized where it goes to the output."""
        if box.empty:
            return
        for part, sums in self.ring.parts(box):
            target = filled.data[(slice(None), *part.slices(filled.piece.box.start))]
            if filled.piece.name is None:
                self.counts += self._normalizer.normalize(sums, part, target)
            else:
                target.copy_(sums)


class SlabSums:
    """Sums over the open boxes of one slab: those of the block itself, and the seams that are added in turn.

    Attributes:
        boxes: the open boxes, each with its sums `(C, *box)`; None: no patch has a voxel in it.
    """

    def __init__(self, head: Head) -> None:
        self.head = head
        self.boxes: list[tuple[Box, torch.Tensor | None]] = []

    def begin(self, box: Box, data: torch.Tensor | None) -> None:
        """Begin with the block's sums over a box; None: the block has no patch there."""
        if not box.empty:
            self.boxes.append((box, data))

    def add(self, box: Box, seam: torch.Tensor | None) -> None:
        """Add a seam over a box; for `crop` its values replace those of earlier patches."""
        if seam is None:
            return
        for i, (open_box, data) in enumerate(self.boxes):
            common = open_box & box
            if common.empty:
                continue
            if data is None:
                data = torch.zeros((self.head.stored_channels, *open_box.shape), dtype=seam.dtype, device="cpu")  # noqa: PLW2901
                if self.head.takes_maximum:
                    data[: self.head.channels] = -torch.inf
                self.boxes[i] = open_box, data
            target = data[(slice(None), *common.slices(open_box.start))]
            source = seam[(slice(None), *common.slices(box.start))]
            if self.head.blended:
                target.add_(source)
            elif self.head.takes_maximum:
                torch.maximum(target, source, out=target)  # of the last channel, too, which marks the voxels of patches
            elif self.head.dense:
                target.copy_(torch.where(source[-1:] != 0, source, target))
            else:
                target.copy_(source)
