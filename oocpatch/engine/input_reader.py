"""The input of one block: planes of patches, read ahead along the sweep, each voxel once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

import torch

from oocpatch.engine.buffers import FutureGroup, buffer
from oocpatch.engine.device_transfer import Transfer
from oocpatch.engine.ring_buffer import Ring
from oocpatch.planning.box import Box
from oocpatch.planning.sweep import Group
from oocpatch.volumes.volume import Volume


class Reader:
    """Reads the layers of a block into a ring.

    Args:
        volume: where to read.
        region: bounding box of the block's patches; what lies outside the volume is padded.
        axis: the swept axis.
        capacity: planes to hold.
        device: where the model takes its patches.
        transfer: the way there.
        pool: threads that read chunks.
        padding_mode, fill: what lies outside the volume.
    """

    def __init__(
        self,
        volume: Volume,
        region: Box,
        *,
        axis: int,
        capacity: int,
        dtype: torch.dtype,
        device: str,
        transfer: Transfer,
        pool: Executor,
        padding_mode: str,
        fill: float,
    ) -> None:
        self._volume = volume
        self._axis = axis
        self._ring = Ring.of(region, channels=volume.channels, capacity=capacity, axis=axis, dtype=dtype, device=device)
        self._transfer = transfer
        self._padding = padding_mode, fill
        self._at = region.start[axis]
        self._batch: torch.Tensor | None = None
        self.pending = FutureGroup(pool)

    def fits(self, group: Group, keep: int) -> bool:
        """Whether a group can be read while planes from `keep` on are still in use."""
        return group.read_stop - keep <= self._ring.capacity

    def request(self, group: Group, keep: int) -> None:
        """Begin to read what a group needs beyond what was read before; planes from `keep` on are still in use."""
        if group.read_stop <= self._at:
            return
        if not self.fits(group, keep):
            raise RuntimeError(f"planes {keep} to {group.read_stop} do not fit a ring of {self._ring.capacity}")
        box = self._ring.region.along(self._axis, max(self._at, group.start), group.read_stop)
        self._at = group.read_stop
        after = self._transfer.queued()
        for part, view in self._ring.parts(box):
            for request in self._volume.split_reads(part, None if self._transfer.staged else view.numpy()):
                inner = (slice(None), *request.slices(part.start))
                self.pending.submit(self._read, request, view[inner], after)

    def batch(self, boxes: Sequence[Box], *, size: int, copy: bool, full: bool = False) -> torch.Tensor:
        """Patches as `(B, C, *patch_size)`, valid until the next call.

        Args:
            boxes: the patches.
            size: most patches of a batch.
            copy: whether the model may write to them; else a single patch is a view, where it does not wrap around.
            full: whether to fill up a batch that is smaller, with copies of its last patch.
        """
        if len(boxes) == 1 and not copy:
            views = [view for _, view in self._ring.parts(boxes[0])]
            if len(views) == 1:
                return views[0][None]
        if self._batch is None:
            shape = (size, self._ring.data.shape[0], *boxes[0].shape)
            self._batch = buffer(shape, self._ring.data.dtype, self._ring.data.device)
        for target, box in zip(self._batch, boxes, strict=False):  # the last batch may be smaller
            for part, view in self._ring.parts(box):
                target[(slice(None), *part.slices(box.start))] = view
        if full and len(boxes) < size:
            self._batch[len(boxes) :] = self._batch[len(boxes) - 1]
        return self._batch if full else self._batch[: len(boxes)]

    def holds_only(self, value: float, box: Box) -> bool:
        """Whether a patch holds nothing but one value."""
        return all(bool((view == value).all()) for _, view in self._ring.parts(box))

    def _read(self, box: Box, view: torch.Tensor, after: torch.cuda.Event | None) -> None:
        with self._transfer.upload(view, after) as target:
            self._volume.read_into(target, box, *self._padding)
