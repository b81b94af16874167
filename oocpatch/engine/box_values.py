"""The values of a box of the output, from the patches that reach it and no others: for results that are not written.

A box lies in the core of one block. Patches are added as in a run, block by block: those of the box's own block, then
those of each lower neighbour whose seam enters the box. So the values are those that a run of the same plan writes:

```text
            neighbour (1, 1) | neighbour (1, 0)
           ------------------+--------------------
                             |  [ box ]
            neighbour (0, 1) |       own block
```
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from oocpatch.engine.buffers import buffer, torch_dtype
from oocpatch.engine.partial_sums import PatchSums, SlabSums
from oocpatch.engine.stages import PatchCalls, PatchContext, decided_box, reader_of
from oocpatch.planning.blocks import Block, offsets
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.grid import Scale
from oocpatch.planning.heads import Head
from oocpatch.planning.plan import Plan
from oocpatch.planning.sweep import Group


def box_values(context: PatchContext, box: Box) -> list[npt.NDArray[Any]]:
    """Compute the values of each head over a box of the volume, as arrays `(C', *box)` in the head's own voxels.

    The box lies in one core, and begins and ends at whole voxels of every head.

    Raises:
        ValueError: when the model's output is not as its probe's, or not finite.
    """
    plan = context.plan
    own = tuple(
        min(a // n, count - 1) for a, n, count in zip(box.start, plan.core, plan.block_grid.counts, strict=True)
    )
    boxes = [scaled_box(box, head.scale) & Box.of_shape(f.grid.shape) for head, f in _frames(plan)]
    totals = [SlabSums(head) for head in plan.heads]
    for offset in [(0,) * len(own), *offsets(len(own))]:
        position = tuple(p - e for p, e in zip(own, offset, strict=True))
        if min(position) < 0:
            continue
        index = int(np.ravel_multi_index(position, plan.block_grid.counts))
        regions = [frame[index].seam(offset) & b for frame, b in zip(plan.frames, boxes, strict=True)]
        for total, region, sums in zip(totals, regions, _sums(context, box, index, regions), strict=True):
            if any(offset):
                total.add(region, sums)
            else:
                total.begin(region, sums)
    return [_values(context, number, total) for number, total in enumerate(totals)]


def scaled_box(box: Box, scale: Sequence[Scale]) -> Box:
    """Return a box of the volume in an output at another scale; a part of a voxel at its end counts as a whole one.

    >>> scaled_box(Box((4, 8), (8, 11)), ((1, 2), (2, 1)))
    Box(start=(2, 16), stop=(4, 22))
    """
    start = tuple(a * times // per for a, (times, per) in zip(box.start, scale, strict=True))
    return Box(start, tuple(-(-b * times // per) for b, (times, per) in zip(box.stop, scale, strict=True)))


def _frames(plan: Plan) -> Iterator[tuple[Head, Any]]:
    return zip(plan.heads, plan.frames, strict=True)


def _sums(context: PatchContext, box: Box, index: int, regions: Sequence[Box]) -> list[torch.Tensor | None]:
    """Return the sums of a block's patches over a region for each head, in main memory; None where there are none."""
    plan = context.plan
    members = _members(context, box, plan.block_grid[index], regions)
    if not members:
        return [None] * len(regions)
    inputs = [plan.input_grid.box(member) for member in members]
    whole = Box(
        tuple(min(b.start[a] for b in inputs) for a in range(len(plan.axes))),
        tuple(max(b.stop[a] for b in inputs) for a in range(len(plan.axes))),
    )
    start, stop, device = whole.start[plan.sweep], whole.stop[plan.sweep], context.predictor.device
    reader = reader_of(context, whole, stop - start, None)
    sums = [
        PatchSums(
            region, head=head, axis=plan.sweep, window=window, device=device, check_finite=not plan.allow_nonfinite
        )
        for head, region, window in zip(plan.heads, regions, context.windows, strict=True)
    ]
    try:
        reader.request(Group(range(0), start, stop, stop), start)
        reader.pending.wait()
        calls = PatchCalls(context, index, list(zip(regions, sums, strict=True)), reader)
        calls.submit(members)
        calls.finish()
    finally:
        reader.pending.cancel_and_wait()
    for head_sums, region in zip(sums, regions, strict=True):
        head_sums.check_finite(region)
    return [s.ring.data.cpu() if s.touched > r.start[plan.sweep] else None for s, r in zip(sums, regions, strict=True)]


def _members(context: PatchContext, box: Box, block: Block, regions: Sequence[Box]) -> list[Ints]:
    """Return the patches of a block that have a say in a region of some head, in the order in which a run adds them."""
    plan = context.plan
    ranges = []
    spans = zip(plan.grid.axes, plan.block_grid.patches(block), box.start, box.stop, strict=True)
    for axis, of_block, start, stop in spans:
        meeting = axis.meeting(start, stop)
        ranges.append(range(max(of_block.start, meeting.start), min(of_block.stop, meeting.stop)))
    if not all(ranges):
        return []
    layers = [(*ranges[: plan.sweep], range(n, n + 1), *ranges[plan.sweep + 1 :]) for n in ranges[plan.sweep]]
    chosen = itertools.chain.from_iterable(context.selection.of(plan.grid, layer) for layer in layers)
    return [
        member
        for member in chosen
        if any(
            not (decided_box(head, frame.grid, member) & region).empty
            for (head, frame), region in zip(_frames(plan), regions, strict=True)
        )
    ]


def _values(context: PatchContext, number: int, total: SlabSums) -> npt.NDArray[Any]:
    """Return the values of a head over the one box of its sums."""
    plan, head = context.plan, context.plan.heads[number]
    [(box, sums)] = total.boxes
    if sums is None:
        return np.full((head.out_channels, *box.shape), plan.output_fill, head.out_dtype)
    values = buffer((head.out_channels, *box.shape), torch_dtype(head.out_dtype), "cpu")
    context.normalizers[number].normalize(sums, box, values)
    return values.numpy()
