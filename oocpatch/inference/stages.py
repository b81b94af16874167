"""The two stages of a run: plain functions over block indices.

`predict_block` sweeps a block: read the next layer, run the model batch by batch, add to the partial, let go of what
is final. `normalize_block` finishes the part of a core that neighbours spill into. Both are idempotent: they write only
what belongs to their block, whole write units, and may run twice, or halfway and again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from oocpatch.inference.buffers import buffer
from oocpatch.inference.finish import Finisher
from oocpatch.inference.partial import Part, Partial, Staged, own_name, seam_name
from oocpatch.inference.pending import Pending
from oocpatch.inference.predictor import Predictor
from oocpatch.inference.reader import Reader
from oocpatch.planning.blocks import Block
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.plan import Plan
from oocpatch.planning.sweep import Group, capacity, groups
from oocpatch.planning.window import axis_window
from oocpatch.storage.output import Output
from oocpatch.storage.volume import Volume
from oocpatch.storage.workspace import PartialReader, PartialWriter, Workspace


@dataclass(frozen=True)
class Job:
    """What the tasks of one process share.

    Attributes:
        plan: the plan.
        volume: where to read.
        predictor: the model.
        workspace: where partials go.
        window: the blending weights of a patch, `(1, *patch_size)` on the model's device; None for `crop`.
        output: where values go.
        finisher: makes output values of sums.
        reads: threads that read chunks.
        writes: threads that write them; of their own, since a model that waits for input costs more than a late write.
        allow_nonfinite: keep NaN and infinities instead of failing.
        on_patches: told the number of patches that were just computed.
    """

    plan: Plan
    volume: Volume
    predictor: Predictor
    workspace: Workspace
    window: torch.Tensor | None
    output: Output
    finisher: Finisher
    reads: Executor
    writes: Executor
    allow_nonfinite: bool
    on_patches: Callable[[int], None]

    @property
    def blended(self) -> bool:
        return self.plan.overlap_mode != "crop"


def torch_dtype(name: str) -> torch.dtype:
    """Torch's dtype of a numpy dtype's name.

    >>> torch_dtype("uint8")
    torch.uint8
    """
    return torch.from_numpy(np.empty(0, name)).dtype


def window(plan: Plan, device: str) -> torch.Tensor | None:
    """The blending weights of a patch, float32 `(1, *patch_size)`; None for `crop`."""
    if plan.overlap_mode == "crop":
        return None
    product = torch.ones((), dtype=torch.float32)
    for n in reversed(plan.patch_size):
        factor = torch.from_numpy(axis_window(plan.overlap_mode, n)).to(torch.float32)
        product = factor.reshape(-1, *(1,) * product.ndim) * product
    return product[None].to(device)


class Writes:
    """Writes of a block that go on while the next slab is computed; at most one slab is being written at a time."""

    def __init__(self, job: Job, partials: PartialWriter | None) -> None:
        self._job = job
        self._partials = partials
        self._under_way: list[Staged] = []
        self.pending = Pending(job.writes)

    def emit(self, staged: list[Staged]) -> list[Staged]:
        """Begin to write the parts of a slab, once those of the one before are written: which it gives back."""
        self.pending.wait()
        written, self._under_way = self._under_way, staged
        for item in staged:
            data = item.data.cpu().numpy()
            if item.part.piece is None:
                for request in self._job.output.requests(item.part.box):
                    inner = data[(slice(None), *request.slices(item.part.box.start))]
                    self.pending.submit(self._job.output.write, request, inner)
            else:
                self.pending.submit(self._partial, item.part, data)
        if not self._job.plan.way.ahead:
            self.pending.wait()
            written, self._under_way = staged, []
        return written

    def _partial(self, part: Part, data: npt.NDArray[np.generic]) -> None:
        assert self._partials is not None
        assert part.piece is not None
        self._partials.write(part.piece, part.whole, part.box, data)


def predict_block(job: Job, index: int) -> int:
    """Sweep one block. Returns the digest of its partials, 0 when it leaves none.

    Idempotent: writes only the direct part of its own core to the output, and `blocks/<index>` in the workspace.
    """
    plan, blocks = job.plan, job.plan.block_grid
    block = blocks[index]
    ranges = blocks.patches(block)
    chunk = plan.in_chunks[plan.sweep] if plan.way.aligned else 1
    layers, axis = ranges[plan.sweep], plan.grid.axes[plan.sweep]
    if not all(ranges):
        layers = range(0)
    schedule = groups(axis, layers, plan.layers_per_group, chunk)
    in_planes, sum_planes = capacity(axis, layers, plan.layers_per_group, chunk, ahead=plan.way.ahead)
    partials = job.workspace.writer(index)
    writes = Writes(job, partials)
    partial = Partial(
        blocks,
        block,
        channels=plan.head.channels,
        dtype=torch_dtype(plan.head.dtype),
        out_channels=plan.head.out_channels,
        out_dtype=torch_dtype(plan.head.out_dtype),
        capacity=sum_planes,
        window=job.window,
        finisher=job.finisher,
        device=job.predictor.device,
        emit=writes.emit,
        check_finite=not job.allow_nonfinite,
    )
    reader = Reader(
        job.volume,
        _extent(plan, ranges),
        axis=plan.sweep,
        capacity=in_planes,
        dtype=torch_dtype(plan.in_dtype),
        device=job.predictor.device,
        pool=job.reads,
        padding_mode=plan.padding_mode or "edge",
        fill=plan.fill,
    )
    try:
        for i, group in enumerate(schedule):
            reader.request(group, group.start)
            reader.pending.wait()
            partial.advance(group.start)
            if plan.way.ahead and i + 1 < len(schedule):
                reader.request(schedule[i + 1], group.start)
            _compute(job, block, partial, reader, _batches(plan, ranges, group))
        partial.advance(block.reach.stop[plan.sweep])
        writes.pending.wait()
    finally:
        reader.pending.abandon()
        writes.pending.abandon()
    return partials.close()


def _extent(plan: Plan, ranges: Sequence[range]) -> Box:
    """Bounding box of a block's patches."""
    if not all(ranges):
        return Box((0,) * len(ranges), (1,) * len(ranges))
    axes = plan.grid.axes
    return Box(
        tuple(a.start(r[0]) for a, r in zip(axes, ranges, strict=True)),
        tuple(a.start(r[-1]) + a.patch for a, r in zip(axes, ranges, strict=True)),
    )


def _batches(plan: Plan, ranges: Sequence[range], group: Group) -> Iterator[list[Ints]]:
    """The patches of a group in their one order, as grid indices, in batches."""
    indices = (
        (*cross[: plan.sweep], layer, *cross[plan.sweep :])
        for layer in group.layers
        for cross in itertools.product(*(r for a, r in enumerate(ranges) if a != plan.sweep))
    )
    while members := list(itertools.islice(indices, plan.batch_size)):
        yield members


def _compute(job: Job, block: Block, partial: Partial, reader: Reader, batches: Iterator[list[Ints]]) -> None:
    """Run the model on the batches of a group and add what it gives, in the order of the patches."""
    channels = job.plan.head.channels
    for members in batches:
        boxes = [_box(job.plan, index) for index in members]
        outputs = job.predictor(reader.batch(boxes, copy=job.predictor.copies_input))
        if outputs.shape[1] != channels:
            raise ValueError(
                f"the model must give {channels} channels, as it did for the probe, got {outputs.shape[1]}"
            )
        if job.blended:
            outputs = outputs.to(torch.float32)
        for index, box, values in zip(members, boxes, outputs, strict=True):
            partial.add(box.start, _kept(job, block, index, box), values)
        job.on_patches(len(members))


def _box(plan: Plan, index: Ints) -> Box:
    start = tuple(a.start(i) for a, i in zip(plan.grid.axes, index, strict=True))
    return Box(start, tuple(a + n for a, n in zip(start, plan.patch_size, strict=True)))


def _kept(job: Job, block: Block, index: Ints, box: Box) -> Box:
    """The voxels of a patch that count: inside the volume, and for `crop` those it has the last word on."""
    if job.blended:
        return box & Box.of_shape(job.plan.shape)
    spans = [a.kept(i) for a, i in zip(job.plan.grid.axes, index, strict=True)]
    return Box(tuple(a for a, _ in spans), tuple(b for _, b in spans)) & block.reach


def normalize_block(job: Job, index: int, digests: dict[int, int]) -> None:
    """Add the seams that enter a block's core to its own sums, in one fixed order, and write the values.

    Idempotent: writes only the open part of its own core, whole write units.

    Args:
        job: what tasks share.
        index: the block.
        digests: from the ledger, for the block and those whose seams enter it.

    Raises:
        CorruptPartial: when a partial is not what the ledger promised.
    """
    blocks = job.plan.block_grid
    block = blocks[index]
    readers: dict[int, PartialReader] = {}
    writes = Writes(job, None)
    try:
        for slab in blocks.steps(block.core):
            staged = []
            sums = _own_sums(job, block, slab, digests, readers)
            for offset, source in blocks.sources(block):
                seam = source.seam(offset)
                part = seam & slab
                if part.empty:
                    continue
                data = torch.from_numpy(
                    _reader(job, source.index, digests, readers).read(seam_name(offset), seam, part)
                )
                for box, own in sums:
                    _merge(job, own, box, data, part)
            for box, own in sums:
                head = job.plan.head
                values = buffer((head.out_channels, *box.shape), torch_dtype(head.out_dtype), "cpu")
                job.finisher.finish(own, box, values)
                staged.append(Staged(Part(None, block.core, box), values))
            del sums
            writes.emit(staged)
            writes.pending.wait()
    finally:
        writes.pending.abandon()


def _own_sums(
    job: Job, block: Block, slab: Box, digests: dict[int, int], readers: dict[int, PartialReader]
) -> list[tuple[Box, torch.Tensor]]:
    """The block's own sums over the open parts of one slab."""
    found = []
    for axis, whole in enumerate(block.own):
        part = whole & slab
        if not part.empty:
            data = _reader(job, block.index, digests, readers).read(own_name(axis), whole, part)
            found.append((part, torch.from_numpy(data)))
    return found


def _reader(job: Job, index: int, digests: dict[int, int], readers: dict[int, PartialReader]) -> PartialReader:
    if index not in readers:
        readers[index] = job.workspace.reader(index, digests[index])
    return readers[index]


def _merge(job: Job, own: torch.Tensor, box: Box, seam: torch.Tensor, part: Box) -> None:
    """Add the common voxels of a seam to own sums; for `crop` they replace them."""
    common = box & part
    if common.empty:
        return
    target = own[(slice(None), *common.slices(box.start))]
    values = seam[(slice(None), *common.slices(part.start))]
    if job.blended:
        target.add_(values)
    else:
        target.copy_(values)
