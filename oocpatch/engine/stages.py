"""The two stages of a run: plain functions over block indices.

`predict_block` sweeps a block: read the next layer, run the model batch by batch, add to the partial of each head, let
go of what is final. `normalize_block` finishes the part of a core that neighbours spill into. Both are idempotent: they
write only what belongs to their block, whole write units, and may run twice, or halfway and again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from oocpatch.engine.buffers import FutureGroup, buffer, torch_dtype
from oocpatch.engine.device_transfer import CopyDone, HostStaging, Transfer
from oocpatch.engine.input_reader import Reader
from oocpatch.engine.normalize import NOTHING, Counts, Normalizer
from oocpatch.engine.partial_sums import FilledPiece, Partial, SlabPiece, SlabSums, open_name, seam_name
from oocpatch.engine.patch_selection import Selection
from oocpatch.models.predictor import Predictor
from oocpatch.outputs.output import Output
from oocpatch.outputs.write_units import WriteChecksums
from oocpatch.planning.blocks import Block
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.grid import GridAxis
from oocpatch.planning.heads import Head
from oocpatch.planning.memory import tile_voxels
from oocpatch.planning.plan import Plan
from oocpatch.planning.sweep import Group, capacity, groups
from oocpatch.planning.windows import axis_window
from oocpatch.volumes.volume import Volume
from oocpatch.workspace.ledger import NO_PARTIALS, PartialsRef
from oocpatch.workspace.partials import PartialReader, PartialWriter
from oocpatch.workspace.workspace import Workspace

HERE = Transfer("cpu", staged=False)
"""For what is in main memory already, as sums of the workspace are."""


@dataclass(frozen=True)
class TaskContext:
    """What the tasks of one process share.

    Attributes:
        plan: the plan.
        volume: where to read.
        selection: which patches to compute.
        predictor: the model.
        transfer: the way to its device and back.
        workspace: where partials go.
        windows: per head, the blending weights of a patch, `(1, *patch)` on the model's device; None: not weighed.
        output: where values go.
        normalizers: per head, makes output values of sums.
        read_pool: threads that read chunks.
        write_pool: threads that write chunks; separate, since input that is late costs more than output that is.
        allow_nonfinite: keep NaN and infinities instead of failing.
        skip_value: patches that hold nothing else are skipped; None: none is.
        on_patches: told the number of patches that are done with.
    """

    plan: Plan
    volume: Volume
    selection: Selection
    predictor: Predictor
    transfer: Transfer
    workspace: Workspace
    windows: tuple[torch.Tensor | None, ...]
    output: Output
    normalizers: tuple[Normalizer, ...]
    read_pool: Executor
    write_pool: Executor
    allow_nonfinite: bool
    skip_value: float | None
    on_patches: Callable[[int], None]


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a stage did.

    Attributes:
        partials_ref: its partials.
        uncovered: voxels of the output (of the first head) where no patch was, among those it is answerable for.
        nonfinite: voxels of all heads that are NaN or infinite, among the same.
        unit_checksums: the CRCs of the write units it is answerable for; see `storage.units`.
        halved: batches that did not fit into memory, as other processes tell.
    """

    partials_ref: PartialsRef = NO_PARTIALS
    uncovered: int = 0
    nonfinite: int = 0
    unit_checksums: str = ""
    halved: int = 0

    @classmethod
    def of(
        cls, heads: Sequence[Counts], written: WriteChecksums, partials_ref: PartialsRef = NO_PARTIALS
    ) -> TaskResult:
        """What was counted head by head, and written."""
        return cls(partials_ref, heads[0].uncovered, sum(head.nonfinite for head in heads), written.pack())


def patch_window(plan: Plan, head: Head, device: str) -> torch.Tensor | None:
    """The blending weights of a patch, float32 `(1, *patch)`; None where values are not weighed."""
    if not head.blended:
        return None
    product = torch.ones((), dtype=torch.float32)
    for axis, scale in zip(reversed(plan.grid.axes), reversed(head.scale), strict=True):
        factor = torch.from_numpy(axis_window(head.window, axis.scaled(scale).patch)).to(torch.float32)
        product = factor.reshape(-1, *(1,) * product.ndim) * product
    return product[None].to(device)


class Writes:
    """Writes of one head of a block that go on while the next slab is computed; at most one slab at a time."""

    def __init__(
        self, context: TaskContext, landing: HostStaging, partials: PartialWriter | None, written: WriteChecksums
    ) -> None:
        self._context = context
        self._landing = landing
        self._partials = partials
        self._written = written
        self._under_way: list[FilledPiece] = []
        self.pending = FutureGroup(context.write_pool)

    def flush_slab(self, staged: list[FilledPiece]) -> list[FilledPiece]:
        """Begin to write the parts of a slab, once those of the one before are written: which it gives back."""
        self.pending.wait()
        written, self._under_way = self._under_way, staged
        found, arrived = self._landing.take([item.data for item in staged])
        for item, data in zip(staged, found, strict=True):
            if item.part.piece is None:
                for request in self._context.output.split_writes(item.part.head, item.part.box):
                    inner = data[(slice(None), *request.slices(item.part.box.start))]
                    self.pending.submit(self._values, arrived, item.part.head, request, inner)
            else:
                self.pending.submit(self._partial, arrived, item.part, data)
        if not self._context.plan.io_strategy.prefetch:
            self.pending.wait()
            written, self._under_way = staged, []
        return written

    def _values(self, arrived: CopyDone, head: int, box: Box, data: npt.NDArray[np.generic]) -> None:
        arrived()
        self._context.output.write(head, box, data, self._written)

    def _partial(self, arrived: CopyDone, part: SlabPiece, data: npt.NDArray[np.generic]) -> None:
        assert self._partials is not None
        assert part.piece is not None
        arrived()
        self._partials.write(part.head, part.piece, part.whole, part.box, data)


def predict_block(context: TaskContext, index: int) -> TaskResult:
    """Sweep one block.

    Idempotent: writes only the direct part of its own core to the output, and a new directory in `blocks/<index>`.
    """
    plan = context.plan
    ranges = plan.block_grid.patches(plan.block_grid[index])
    layers = ranges[plan.sweep] if all(ranges) else range(0)
    axis = plan.input_grid.axes[plan.sweep]
    chunk = plan.in_chunks[plan.sweep] if plan.io_strategy.aligned_reads else 1
    planes, _ = capacity(axis, layers, plan.layers_per_group, chunk, prefetch=plan.io_strategy.prefetch)
    partials = context.workspace.writer(index)
    written = WriteChecksums(plan, "predict", index)
    landings = [HostStaging(context.transfer, size) for size in plan.slab_bytes]
    writes = [Writes(context, landing, partials, written) for landing in landings]
    sums = [_partial(context, index, number, layers, writes[number]) for number in range(len(plan.heads))]
    reader = Reader(
        context.volume,
        _extent(plan, ranges),
        axis=plan.sweep,
        capacity=planes,
        dtype=torch_dtype(plan.in_dtype),
        device=context.predictor.device,
        transfer=context.transfer,
        pool=context.read_pool,
        padding_mode=plan.padding_mode or "edge",
        fill=plan.fill,
    )
    steps = _steps(context, ranges, groups(axis, layers, plan.layers_per_group, chunk))
    try:
        step = next(steps, None)
        while step is not None:
            group, members = step
            reader.request(group, group.start)
            reader.pending.wait()
            for partial, frame in zip(sums, plan.frames, strict=True):
                partial.advance(frame.axes[plan.sweep].grid.start(group.layers[0]))
            step = next(steps, None)
            if plan.io_strategy.prefetch and step is not None and reader.fits(step[0], group.start):
                reader.request(step[0], group.start)
            _compute(context, index, sums, reader, members)
        for partial, frame in zip(sums, plan.frames, strict=True):
            partial.advance(frame[index].reach.stop[plan.sweep])
        for head in writes:
            head.pending.wait()
        partials_ref = partials.close()
    finally:
        reader.pending.cancel_and_wait()
        for head in writes:
            head.pending.cancel_and_wait()
        partials.discard()
    return TaskResult.of([partial.counts for partial in sums], written, partials_ref)


def _partial(context: TaskContext, index: int, number: int, layers: range, writes: Writes) -> Partial:
    """The sums of one head."""
    plan, frame, head = context.plan, context.plan.frames[number], context.plan.heads[number]
    tile = tile_voxels(head.max_channels, staged=context.transfer.staged)
    _, planes = capacity(
        frame.axes[plan.sweep].grid, layers, plan.layers_per_group, 1, prefetch=plan.io_strategy.prefetch
    )
    return Partial(
        frame,
        index,
        number=number,
        head=head,
        capacity=planes,
        window=context.windows[number],
        normalizer=context.normalizers[number].to(context.predictor.device, tile),
        device=context.predictor.device,
        flush_slab=writes.flush_slab,
        check_finite=not context.allow_nonfinite,
    )


def _extent(plan: Plan, ranges: Sequence[range]) -> Box:
    """Bounding box of what a block's patches read."""
    if not all(ranges):
        return Box((0,) * len(ranges), (1,) * len(ranges))
    axes = plan.input_grid.axes
    return Box(
        tuple(a.start(r[0]) for a, r in zip(axes, ranges, strict=True)),
        tuple(a.start(r[-1]) + a.patch for a, r in zip(axes, ranges, strict=True)),
    )


def _steps(context: TaskContext, ranges: Sequence[range], schedule: list[Group]) -> Iterator[tuple[Group, list[Ints]]]:
    """The groups that have patches to compute, with these in their one order: layer by layer, in C order within."""
    sweep = context.plan.sweep
    for group in schedule:
        members: list[Ints] = []
        for layer in group.layers:
            one = (*ranges[:sweep], range(layer, layer + 1), *ranges[sweep + 1 :])
            members += context.selection.of(context.plan.grid, one)
        skipped = len(group.layers) * _patches(ranges, sweep) - len(members)
        if skipped:
            context.on_patches(skipped)
        if members:
            yield group, members


def _patches(ranges: Sequence[range], sweep: int) -> int:
    """Patches of one layer."""
    return math.prod(len(r) for a, r in enumerate(ranges) if a != sweep)


def _compute(context: TaskContext, index: int, sums: list[Partial], reader: Reader, members: list[Ints]) -> None:
    """Run the model on the patches of a group, batch by batch, and add what it gives, in the order of the patches."""
    plan = context.plan
    blocks = [frame[index] for frame in plan.frames]
    if context.skip_value is not None:
        kept = [m for m in members if not reader.holds_only(context.skip_value, _box(plan.input_grid.axes, m))]
        context.on_patches(len(members) - len(kept))
        members = kept
    full = plan.fills_batches
    for i in range(0, len(members), plan.batch_size):
        batch = members[i : i + plan.batch_size]
        boxes = [_box(plan.input_grid.axes, m) for m in batch]
        outputs = context.predictor(reader.batch(boxes, size=plan.batch_size, copy=plan.copies_input, full=full))
        for head, frame, block, partial in zip(plan.heads, plan.frames, blocks, sums, strict=True):
            axes = [a.grid for a in frame.axes]
            values = _values(head, outputs, tuple(a.patch for a in axes))
            for member, one in zip(batch, values, strict=not full):  # what a batch was filled up with is thrown away
                box = _box(axes, member)
                partial.add(box.start, _kept(head, frame.grid.shape, axes, block, member, box), one)
        context.on_patches(len(batch))


def _values(head: Head, outputs: Mapping[str, torch.Tensor], patch: Ints) -> torch.Tensor:
    """What a head takes of the model's outputs, `(B, C, *patch)`, as it is added.

    Raises:
        ValueError: when it is not as it was for the probe.
    """
    if head.name not in outputs:
        raise ValueError(f"the model must give {head.name!r}, as it did for the probe, got {sorted(outputs)}")
    values = outputs[head.name]
    if any(head.trim):
        inner = tuple(slice(t, n - t) for t, n in zip(head.trim, values.shape[2:], strict=True))
        values = values[(slice(None), slice(None), *inner)]
    given = 1 if head.votes else head.channels
    if values.shape[1:] != (given, *patch):
        if values.shape[2:] == patch:
            raise ValueError(f"the model must give {given} channels, as it did for the probe, got {values.shape[1]}")
        raise ValueError(
            f"the model must give {(given, *patch)}, as it did for the probe, got {tuple(values.shape[1:])}"
        )
    if head.votes:
        return _ballots(values, head.channels)
    return values if head.crop else values.to(torch.float32)


def _ballots(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """One channel per class, 1 where the label is that class: `(B, 1, *patch)` -> `(B, classes, *patch)`."""
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= classes:
        raise ValueError(f"labels must be in [0, {classes}) for overlap_mode='vote', got {lowest} to {highest}")
    ballots = labels.new_zeros((labels.shape[0], classes, *labels.shape[2:]), dtype=torch.float32)
    return ballots.scatter_(1, labels.to(torch.int64), 1.0)


def _box(axes: Sequence[GridAxis], index: Ints) -> Box:
    start = tuple(a.start(i) for a, i in zip(axes, index, strict=True))
    return Box(start, tuple(s + a.patch for a, s in zip(axes, start, strict=True)))


def _kept(head: Head, shape: Ints, axes: Sequence[GridAxis], block: Block, index: Ints, box: Box) -> Box:  # noqa: PLR0917
    """The voxels of a patch that count: inside the output, and for `crop` those it has the last word on."""
    if not head.crop:
        return box & Box.of_shape(shape)
    spans = [a.crop_span(i) for a, i in zip(axes, index, strict=True)]
    return Box(tuple(a for a, _ in spans), tuple(b for _, b in spans)) & block.reach


def normalize_block(context: TaskContext, index: int, partials_refs: Mapping[int, PartialsRef]) -> TaskResult:
    """Add the seams that enter a block's core to its own sums, in one fixed order, and write the values.

    Idempotent: writes only the open part of its own core, whole write units.

    Args:
        context: what tasks share.
        index: the block.
        partials_refs: from the ledger, for the block and those whose seams enter it.

    Raises:
        CorruptPartial: when a partial is not what the ledger promised.
    """
    reader = functools.cache(lambda source: context.workspace.reader(source, partials_refs[source]))
    written = WriteChecksums(context.plan, "normalize", index)
    return TaskResult.of(
        [_normalize(context, index, number, reader, written) for number in range(len(context.plan.heads))], written
    )


def _normalize(
    context: TaskContext, index: int, number: int, reader: Callable[[int], PartialReader], written: WriteChecksums
) -> Counts:
    """The normalize stage of one head."""
    frame = context.plan.frames[number]
    block = frame[index]

    def read(source: int, piece: str, whole: Box, part: Box) -> torch.Tensor | None:
        if part.empty:
            return None
        found = reader(source).read(number, piece, whole, part)
        return None if found is None else torch.from_numpy(found)

    counts = NOTHING
    writes = Writes(context, HostStaging(HERE, 0), None, written)
    try:
        for slab in frame.steps(block.core):
            sums = SlabSums(context.plan.heads[number])
            for axis, whole in enumerate(block.open_boxes):
                sums.own(whole & slab, read(index, open_name(axis), whole, whole & slab))
            for offset, source in frame.sources(block):
                seam = source.seam(offset)
                sums.add(seam & slab, read(source.index, seam_name(offset), seam, seam & slab))
            staged = []
            for box, data in sums.parts:
                if data is None:  # no patch came near it, and the output's fill value needs no writing
                    counts += Counts(box.size)
                    continue
                values = buffer((context.plan.heads[number].out_channels, *box.shape), sums.out_dtype, "cpu")
                counts += context.normalizers[number].normalize(data, box, values)
                staged.append(FilledPiece(SlabPiece(None, block.core, box, number), values))
            del sums
            writes.flush_slab(staged)  # which go on while the next slab is read
        writes.pending.wait()
    finally:
        writes.pending.cancel_and_wait()
    return counts
