"""The two stages of a run, as plain functions over block indices, and the context that they share.

`predict_block` sweeps a block: it reads the next layers, runs the model batch by batch, adds its outputs to the partial
sums of each head, and writes what is final, all at the same time:

```text
 read pool     | group 1 | group 2   | group 3   |
 task          |         | compute 1 | compute 2 | compute 3 |
 write pool    |         |           | slab 1    | slab 2    | slab 3 |
```

`normalize_block` completes the part of a core that neighbours spill into. Both stages are idempotent: they write only
whole write units of their own block, and may run twice, or halfway and again.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from oocpatch.engine.buffers import FutureGroup, buffer, torch_dtype
from oocpatch.engine.context_patches import ContextPatches
from oocpatch.engine.device_transfer import CopyDone, HostStaging, Transfer
from oocpatch.engine.input_reader import InputReader
from oocpatch.engine.normalize import Counts, Normalizer, outer_product
from oocpatch.engine.partial_sums import (
    FilledPiece,
    PartialSums,
    PatchSums,
    SlabPiece,
    SlabSums,
    nonfinite_error,
    open_name,
    seam_name,
)
from oocpatch.engine.patch_objects import PatchObjectsWriter
from oocpatch.engine.patch_rows import RowsWriter
from oocpatch.engine.patch_selection import Selection
from oocpatch.models.predictor import Predictor
from oocpatch.outputs.output import Output
from oocpatch.outputs.write_units import WriteChecksums
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.grid import PatchGrid
from oocpatch.planning.heads import Head
from oocpatch.planning.memory import tile_voxels
from oocpatch.planning.plan import Plan
from oocpatch.planning.sweep import Group, batches, capacity, groups
from oocpatch.planning.windows import FLOOR, axis_window
from oocpatch.progress import OnProgress, TaskDone
from oocpatch.storage.checksums import checksum
from oocpatch.volumes.content import InputStamps
from oocpatch.volumes.padding import reading_rule
from oocpatch.volumes.volume import Volume
from oocpatch.workspace.ledger import NO_PARTIALS, PartialsRef
from oocpatch.workspace.partials import PartialReader, PartialWriter
from oocpatch.workspace.workspace import Workspace

IN_MEMORY = Transfer("cpu", staged=False)
"""Transfer of tensors that are in main memory already, as sums of the workspace are."""

WRITE_SECONDS, WRITE_SECONDS_PER_BYTE = 1e-3, 3e-9
"""Seconds that a call of the model takes at least for its outputs to be stored: some three times what writing takes."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class PatchContext:
    """Context of computing patches in one process.

    Attributes:
        selection: the patches to compute.
        transfer: copies to and from the model's device.
        windows: per head, the result of `patch_window`.
        normalizers: per head, the conversion of sums to output values.
        read_pool: threads that read chunks.
        coarse: reads the context of patches; None: the model takes none.
    """

    plan: Plan
    volume: Volume
    selection: Selection
    predictor: Predictor
    transfer: Transfer
    windows: tuple[torch.Tensor | None, ...]
    normalizers: tuple[Normalizer, ...]
    read_pool: Executor
    coarse: ContextPatches | None

    def outputs(self, block: int, first: Ints, batch: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: ARG002 - as below
        """Return the model's outputs for a batch of a block that begins with a patch.

        Raises:
            ValueError: when they are not as they should be; see `Predictor`.
        """
        return self.predictor(batch)

    def report(self, block: int, patches: int) -> None:
        """Report patches of a block that were computed or skipped; nobody waits for them here."""


@dataclass(frozen=True)
class TaskContext(PatchContext):
    """Everything that the tasks of one process share.

    Attributes:
        write_pool: threads that write; not those that read, since late input costs more than late output.
        on_progress: receives an event for patches that were computed or skipped.
    """

    workspace: Workspace
    output: Output
    write_pool: Executor
    on_progress: OnProgress

    def outputs(self, block: int, first: Ints, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the model's outputs for a batch of a block that begins with a patch: stored ones, where it has them.

        Raises:
            ValueError: when they are not as they should be; see `Predictor`.
        """
        if not self.plan.stores_outputs:
            return self.predictor(batch)
        stored, crc = self.workspace.outputs(block), checksum(batch.cpu().numpy())
        values = stored.read(first, crc)
        if values is not None:
            return {head: torch.from_numpy(array).to(batch.device) for head, array in values.items()}
        began = time.monotonic()
        outputs = self.predictor(batch)
        size = sum(output.nbytes for output in outputs.values())
        # What is computed about as fast as it is written is no great loss. The calls of a device return early.
        if self.transfer.staged or time.monotonic() - began >= WRITE_SECONDS + WRITE_SECONDS_PER_BYTE * size:
            stored.write(first, crc, {head: output.detach().cpu().numpy() for head, output in outputs.items()})
        return outputs

    def report(self, block: int, patches: int) -> None:
        """Report patches of a block that were computed or skipped."""
        self.on_progress(TaskDone(block, patches, patches * self.plan.bytes_per_patch))


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The result of one task, for the ledger.

    Attributes:
        uncovered: voxels of the first head's output without a patch, among those that the task wrote.
        nonfinite: voxels of all heads that are NaN or infinite, among those that the task wrote.
        unit_checksums: packed CRCs of the write units that the task wrote; see `outputs.write_units`.
        input_stamps: packed stamps of the input that the task read; see `volumes.content`.
        halved: batches that did not fit into memory and were halved, as reported by other processes.
    """

    partials_ref: PartialsRef = NO_PARTIALS
    uncovered: int = 0
    nonfinite: int = 0
    unit_checksums: str = ""
    input_stamps: str = ""
    halved: int = 0

    @classmethod
    def of(
        cls,
        counts: Sequence[Counts],
        checksums: WriteChecksums,
        partials_ref: PartialsRef = NO_PARTIALS,
        stamps: InputStamps | None = None,
    ) -> TaskResult:
        """Return the result of a task from the counts of each head, the CRCs of its writes and the stamps of reads."""
        nonfinite = sum(head.nonfinite for head in counts)
        packed = "" if stamps is None else stamps.pack()
        uncovered = counts[0].uncovered if counts else 0
        return cls(partials_ref, uncovered, nonfinite, checksums.pack(), packed)


def patch_window(plan: Plan, head: Head, device: str) -> torch.Tensor | None:
    """Return the blending weights of a patch, float32 `(1, *patch)`; None where values are not weighed."""
    if not head.blended:
        return None
    axes = zip(plan.grid.axes, head.scale, strict=True)
    factors = [torch.from_numpy(axis_window(head.window, axis.scaled(scale).patch)) for axis, scale in axes]
    product = outer_product([factor.to(torch.float32) for factor in factors])
    if head.has_floor:
        product.clamp_(min=max(float(product.min()), FLOOR))
    return product[None].to(device)


class SlabWriter:
    """Writes the slabs of one head on threads while the next slab is computed; at most one slab at a time.

    Without `partials`, as in the normalize stage, it writes values only.
    """

    def __init__(
        self, context: TaskContext, staging: HostStaging, checksums: WriteChecksums, partials: PartialWriter | None
    ) -> None:
        self._context = context
        self._staging = staging
        self._checksums = checksums
        self.partials = partials
        self._in_flight: list[FilledPiece] = []
        self._finite: torch.Tensor | None = None
        self.pending = FutureGroup(context.write_pool)

    def flush_slab(self, slab: Box, pieces: list[FilledPiece], finite: torch.Tensor | None = None) -> list[FilledPiece]:
        """Begin to write the pieces of a slab, and return those of the slab before, which are written by then.

        Where `finite` is False, the slab has values that are not: the next call, or `pending.wait`, raises ValueError.
        """
        self.pending.wait()
        written, self._in_flight = self._in_flight, pieces
        self._finite = finite  # kept until it is copied
        flag = [] if finite is None else [finite]
        arrays, copy_done = self._staging.download([*flag, *(filled.data for filled in pieces)])
        if finite is not None:
            self.pending.submit(self._check_finite, copy_done, slab, arrays.pop(0))
        for filled, array in zip(pieces, arrays, strict=True):
            piece = filled.piece
            if piece.name is not None:
                self.pending.submit(self._write_sums, copy_done, piece, piece.name, array)
                continue
            for box in self._context.output.split_writes(piece.head, piece.box):
                values = array[(slice(None), *box.slices(piece.box.start))]
                self.pending.submit(self._write_values, copy_done, piece.head, box, values)
        if not self._context.plan.io_strategy.prefetch:
            self.pending.wait()
            written, self._in_flight = pieces, []
        return written

    def _check_finite(self, copy_done: CopyDone, slab: Box, finite: Array) -> None:
        copy_done()
        if not finite:
            raise nonfinite_error(f"in the voxels from {slab.start} to {slab.stop}")

    def _write_values(self, copy_done: CopyDone, head: int, box: Box, values: Array) -> None:
        copy_done()
        self._context.output.write(head, box, values, self._checksums)

    def _write_sums(self, copy_done: CopyDone, piece: SlabPiece, name: str, sums: Array) -> None:
        copy_done()
        if self.partials is None:
            raise RuntimeError(f"only the predict stage stores sums, got those of {name} over {piece.box}")
        self.partials.write(piece.head, name, piece.whole, piece.box, sums)


def predict_block(context: TaskContext, index: int) -> TaskResult:
    """Sweep one block.

    Idempotent: writes only the direct part of its own core to the output, and a new directory in `blocks/<index>`.

    Raises:
        ValueError: when the model's output is not as its probe's, or not finite.
    """
    plan = context.plan
    ranges = plan.block_grid.patches(plan.block_grid[index])
    layers = ranges[plan.sweep] if all(ranges) else range(0)
    axis, prefetch = plan.input_grid.axes[plan.sweep], plan.io_strategy.prefetch
    chunk = plan.in_chunks[plan.sweep] if plan.io_strategy.aligned_reads else 1
    planes, _ = capacity(axis, layers, plan.layers_per_group, chunk, prefetch=prefetch)
    partials = context.workspace.writer(index)
    checksums, region = WriteChecksums(plan, "predict", index), _input_region(plan, ranges)
    padding_mode, _ = reading_rule(plan.padding_mode, plan.fill)
    with contextlib.ExitStack() as stack:
        stack.callback(partials.discard)
        stamps = InputStamps(context.volume.unit_stamps(region, padding_mode))
        writers = [
            SlabWriter(context, HostStaging(context.transfer, size), checksums, partials) for size in plan.landing_bytes
        ]
        for writer in writers:
            stack.callback(writer.pending.cancel_and_wait)
        sums = [_head_sums(context, index, number, layers, writer) for number, writer in enumerate(writers)]
        rows = RowsWriter(partials, plan, index)
        targets = [(frame[index].reach, head_sums) for frame, head_sums in zip(plan.frames, sums, strict=True)]
        reader = reader_of(context, region, planes, stamps)
        stack.callback(reader.pending.cancel_and_wait)
        calls = PatchCalls(context, index, targets, reader, rows)

        def begin(group: Group, following: Group | None) -> None:
            """Begin a group, when the outputs of those before are added: their voxels are final, their planes free."""
            for head_sums, frame in zip(sums, plan.frames, strict=True):
                head_sums.advance(frame.axes[plan.sweep].grid.start(group.layers[0]))
            if prefetch and following is not None and reader.fits(following, group.start):
                reader.request(following, group.start)

        steps = _steps(context, index, ranges, groups(axis, layers, plan.layers_per_group, chunk), stamps)
        step = next(steps, None)
        while step is not None:
            group, members = step
            calls.finish(functools.partial(reader.has_requested, group))
            reader.request(group, group.start)
            reader.pending.wait()
            step = next(steps, None)
            calls.after_earlier(functools.partial(begin, group, None if step is None else step[0]))
            calls.submit(members)
        calls.finish()
        for head_sums, frame in zip(sums, plan.frames, strict=True):
            head_sums.advance(frame[index].reach.stop[plan.sweep])
        for writer in writers:
            writer.pending.wait()
        for head_sums in sums:
            head_sums.close()
        rows.close()
        partials_ref = partials.close()
    if plan.may_skip:
        context.output.remove_empty(checksums)
    counts = [*(head_sums.counts for head_sums in sums), rows.counts]
    return TaskResult.of(counts, checksums, partials_ref, stamps)


def reader_of(context: PatchContext, region: Box, planes: int, stamps: InputStamps | None) -> InputReader:
    """Return a reader of the patches in a region of the volume, with a ring of so many planes."""
    plan = context.plan
    padding_mode, fill = reading_rule(plan.padding_mode, plan.fill)
    return InputReader(
        context.volume,
        region,
        axis=plan.sweep,
        capacity=planes,
        dtype=torch_dtype(plan.in_dtype),
        device=context.predictor.device,
        transfer=context.transfer,
        pool=context.read_pool,
        batches=plan.calls,
        padding_mode=padding_mode,
        fill=fill,
        stamps=stamps,
    )


def _head_sums(
    context: TaskContext, index: int, number: int, layers: range, writer: SlabWriter
) -> PartialSums | PatchObjectsWriter:
    """Return the empty sums of one head over a block; of a head of objects, what stores them."""
    plan, frame, head = context.plan, context.plan.frames[number], context.plan.heads[number]
    if head.has_objects and writer.partials is not None:
        return PatchObjectsWriter(writer.partials, frame, index, number=number, looped=len(plan.axes) - plan.spatial)
    axis, prefetch = frame.axes[plan.sweep].grid, plan.io_strategy.prefetch
    _, planes = capacity(axis, layers, plan.layers_per_group, 1, prefetch=prefetch)
    tile = tile_voxels(head.max_channels, staged=context.transfer.staged)
    return PartialSums(
        frame,
        index,
        number=number,
        head=head,
        capacity=planes,
        window=context.windows[number],
        normalizer=context.normalizers[number].to(context.predictor.device, tile),
        device=context.predictor.device,
        flush_slab=writer.flush_slab,
        check_finite=not plan.allow_nonfinite,
        defer_check=context.transfer.staged,
    )


def _input_region(plan: Plan, ranges: Sequence[range]) -> Box:
    """Return the bounding box of the input of a block's patches; one voxel where there are none."""
    if not all(ranges):
        return Box((0,) * len(ranges), (1,) * len(ranges))
    first, last = (plan.input_grid.box(tuple(r[end] for r in ranges)) for end in (0, -1))
    return Box(first.start, last.stop)


def _steps(
    context: TaskContext, index: int, ranges: Sequence[range], schedule: list[Group], stamps: InputStamps
) -> Iterator[tuple[Group, list[Ints]]]:
    """Yield the groups that have patches to compute, with these in their one order: by layer, in C order within."""
    sweep = context.plan.sweep
    per_layer = math.prod(len(r) for a, r in enumerate(ranges) if a != sweep)
    for group in schedule:
        members: list[Ints] = []
        for layer in group.layers:
            one = (*ranges[:sweep], range(layer, layer + 1), *ranges[sweep + 1 :])
            members += context.selection.of(context.plan.grid, one, stamps)
        skipped = len(group.layers) * per_layer - len(members)
        if skipped and not context.plan.selected:  # else they are not among the plan's patches
            context.report(index, skipped)
        if members:
            yield group, members


class PatchCalls:
    """Calls of the model on patches of a block, batch by batch; outputs are added in the order of the patches.

    As many calls are in progress as the plan has at a time, across groups of layers.

    Args:
        targets: for each head, a region, and the sums to which the values in it are added.
        reader: has the patches until their outputs are added.
        rows: receives vectors; None: the model gives none.
    """

    def __init__(
        self,
        context: PatchContext,
        index: int,
        targets: Sequence[tuple[Box, PatchSums | PatchObjectsWriter]],
        reader: InputReader,
        rows: RowsWriter | None = None,
    ) -> None:
        self._context, self._index, self._targets, self._reader, self._rows = context, index, targets, reader, rows
        self._grids = [frame.grid for frame in context.plan.frames]
        self._in_order: deque[tuple[list[Ints], Callable[[], Any]]] = deque()
        self._in_progress = 0

    def submit(self, members: list[Ints]) -> None:
        """Begin to run the model on patches, and add the outputs of those before them, as the plan's calls allow."""
        context, index, plan = self._context, self._index, self._context.plan
        if plan.skip_value is not None:
            constant = self._reader.are_constant(plan.skip_value, [plan.input_grid.box(m) for m in members])
            computed = [m for m, skipped in zip(members, constant, strict=True) if not skipped]
            context.report(index, len(members) - len(computed))
            members = computed
        for part in batches(len(members), plan.patches_per_call, plan.lanes):
            batch = members[part.start : part.stop]
            inputs = [plan.input_grid.box(m) for m in batch]
            patches = self._reader.batch(
                inputs, size=plan.patches_per_call, copy=plan.copies_input, full=plan.fills_batches
            )
            if context.coarse is not None:
                patches = context.coarse.extend(patches, inputs, self._reader.stamps)
            outputs = context.predictor.submit(context.outputs, index, batch[0], patches)
            self._in_order.append((batch, outputs))
            self._in_progress += 1
            if self._in_progress == plan.calls:
                self._take()

    def after_earlier(self, function: Callable[[], object]) -> None:
        """Call a function once the outputs of all patches that were submitted before are added."""
        if self._in_progress:
            self._in_order.append(([], function))
        else:
            function()

    def finish(self, is_enough: Callable[[], bool] = lambda: False) -> None:
        """Wait for calls and add their outputs: of all, or until it is enough."""
        while self._in_order and not is_enough():
            self._take()

    def _take(self) -> None:
        """Wait for the first call in progress, add its outputs, and call what waits for them."""
        batch, outputs = self._in_order.popleft()
        self._add(batch, outputs())
        self._in_progress -= 1
        while self._in_order and not self._in_order[0][0]:
            self._in_order.popleft()[1]()

    def _add(self, batch: Sequence[Ints], outputs: Mapping[str, torch.Tensor]) -> None:
        context, plan = self._context, self._context.plan
        for head, grid, (region, head_sums) in zip(plan.heads, self._grids, self._targets, strict=True):
            values = _head_values(head, outputs, grid.patch_size)
            for member, patch in zip(batch, values, strict=not plan.fills_batches):  # what fills up a batch is dropped
                if isinstance(head_sums, PatchObjectsWriter):
                    head_sums.add(member, patch)
                    continue
                head_sums.add(grid.box(member).start, decided_box(head, grid, member) & region, patch)
        if self._rows is not None:
            self._rows.add(batch, outputs)
        context.transfer.limit_run_ahead()
        context.report(self._index, len(batch))


def decided_box(head: Head, grid: PatchGrid, member: Ints) -> Box:
    """Return the voxels that a patch has a say in, in the frame of a head."""
    return grid.crop_box(member) if head.crop else grid.box(member)


def _head_values(head: Head, outputs: Mapping[str, torch.Tensor], patch: Ints) -> torch.Tensor:
    """Return the values of one head from the model's outputs, `(B, C, *patch)`, as they are added.

    Raises:
        ValueError: when the model's output is not as it was for the probe.
    """
    if head.name not in outputs:
        raise ValueError(f"the model must give {head.name!r}, as it did for the probe, got {sorted(outputs)}")
    values = outputs[head.name]
    if any(head.trim):
        inner = tuple(slice(t, n - t) for t, n in zip(head.trim, values.shape[2:], strict=True))
        values = values[(slice(None), slice(None), *inner)]
    channels = 1 if head.votes else head.channels
    if values.shape[1:] != (channels, *patch):
        if values.shape[2:] == patch:
            raise ValueError(f"the model must give {channels} channels, as it did for the probe, got {values.shape[1]}")
        raise ValueError(
            f"the model must give {(channels, *patch)}, as it did for the probe, got {tuple(values.shape[1:])}"
        )
    if head.votes:
        return _one_hot(values, head.channels)
    return values if head.crop or head.has_objects else values.to(torch.float32)


def _one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return one channel per class, 1 where the label is that class: `(B, 1, *patch)` -> `(B, classes, *patch)`.

    Raises:
        ValueError: when a label is not a class.
    """
    # torch has few kernels for the larger unsigned integers; a NaN, which would be some integer, must reach `int`
    exact = labels if labels.is_floating_point() else labels.to(torch.int64)
    lowest, highest = map(int, torch.stack(torch.aminmax(exact)).tolist())  # of a device, one wait for both
    if lowest < 0 or highest >= classes:
        raise ValueError(f"labels must be in [0, {classes}) for overlap_mode='vote', got {lowest} to {highest}")
    votes = labels.new_zeros((labels.shape[0], classes, *labels.shape[2:]), dtype=torch.float32)
    return votes.scatter_(1, exact.to(torch.int64), 1.0)


Refs = Mapping[int, PartialsRef]
WriteObjects = Callable[[TaskContext, int, int, Refs, WriteChecksums], Counts]
"""Writes the objects of a block's core, of one head, by the block and the number of the head."""


def normalize_block(
    context: TaskContext, index: int, partials_refs: Refs, write_objects: WriteObjects | None = None
) -> TaskResult:
    """Add the seams that enter a block's core to its own sums, in one fixed order, and write the values.

    Idempotent: writes only the open part of its own core, whole write units; of a head of objects, all of its core. The
    references from the ledger are those of the block and of the blocks whose seams enter it.

    Raises:
        CorruptPartial: when a partial is not what the ledger refers to.
    """
    reader = functools.cache(lambda source: context.workspace.reader(source, partials_refs[source]))
    checksums = WriteChecksums(context.plan, "normalize", index)
    heads = range(len(context.plan.heads))
    counts = [
        write_objects(context, index, number, partials_refs, checksums)
        if write_objects is not None and context.plan.heads[number].has_objects
        else _normalize(context, index, number, reader, checksums)
        for number in heads
    ]
    if context.plan.may_skip or context.plan.has_objects:
        context.output.remove_empty(checksums)
    return TaskResult.of(counts, checksums)


def _normalize(
    context: TaskContext, index: int, number: int, reader: Callable[[int], PartialReader], checksums: WriteChecksums
) -> Counts:
    """Normalize the open part of a block's core for one head, slab by slab."""
    frame, head = context.plan.frames[number], context.plan.heads[number]
    block = frame[index]

    def read(source: int, name: str, whole: Box, part: Box) -> torch.Tensor | None:
        array = None if part.empty else reader(source).read(number, name, whole, part)
        return None if array is None else torch.from_numpy(array)

    counts = Counts()
    writer = SlabWriter(context, HostStaging(IN_MEMORY, 0), checksums, partials=None)
    try:
        for slab in frame.steps(block.core):
            sums = SlabSums(head)
            for axis, whole in enumerate(block.open_boxes):
                sums.begin(whole & slab, read(index, open_name(axis), whole, whole & slab))
            for offset, source in frame.sources(block):
                seam = source.seam(offset)
                sums.add(seam & slab, read(source.index, seam_name(offset), seam, seam & slab))
            pieces = []
            for box, data in sums.boxes:
                if data is None:  # no patch has a voxel here, and the output's fill value needs no writing
                    counts += Counts(box.size)
                    continue
                values = buffer((head.out_channels, *box.shape), torch_dtype(head.out_dtype), "cpu")
                counts += context.normalizers[number].normalize(data, box, values)
                pieces.append(FilledPiece(SlabPiece(None, block.core, box, number), values))
            del sums  # before the next slab is read
            writer.flush_slab(slab, pieces)
        writer.pending.wait()
    finally:
        writer.pending.cancel_and_wait()
    return counts
