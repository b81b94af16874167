"""The input of one block: planes of the volume, read ahead along the sweep, each voxel once.

```text
   sweep ->    in use by this group | being read for the next | not yet requested
              [==== ring ==========================]
```

Patches are views of the ring, or copies of it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor

import torch

from oocpatch.engine.buffers import FutureGroup, buffer
from oocpatch.engine.device_transfer import Transfer
from oocpatch.engine.ring_buffer import RingBuffer
from oocpatch.planning.box import Box
from oocpatch.planning.sweep import Group
from oocpatch.volumes.content import VOLUME, InputStamps
from oocpatch.volumes.volume import Volume


class InputReader:
    """Reads the layers of a block into a ring.

    Args:
        region: bounding box of the block's patches; voxels outside the volume are padded.
        axis: the swept axis.
        capacity, dtype, device: of the ring, in planes, and where the model takes its patches.
        transfer: copies to that device.
        pool: threads that read chunks.
        batches: number of batches that are in use at a time.
        padding_mode, fill: rule for voxels outside the volume, and their value for `constant`.
        stamps: receives the stamps of the parts that are read; None: nobody needs them.

    Attributes:
        pending: the reads that are under way.
        stamps: of what was read; None: nobody needs them.
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
        batches: int,
        padding_mode: str,
        fill: float,
        stamps: InputStamps | None,
    ) -> None:
        self._volume = volume
        self._axis = axis
        self._ring = RingBuffer.of(
            region, channels=volume.channels, capacity=capacity, axis=axis, dtype=dtype, device=device
        )
        self._transfer = transfer
        self._padding = padding_mode, fill
        self.stamps = stamps
        self._requested = region.start[axis]
        self._batches: deque[torch.Tensor] = deque(maxlen=batches)
        self.pending = FutureGroup(pool)

    def fits(self, group: Group, in_use: int) -> bool:
        """Return whether a group can be read while planes from `in_use` on are still in use."""
        return group.read_stop - in_use <= self._ring.capacity

    def has_requested(self, group: Group) -> bool:
        """Return whether all planes of a group were requested."""
        return group.read_stop <= self._requested

    def request(self, group: Group, in_use: int) -> None:
        """Begin to read the planes of a group that were not requested before; those from `in_use` on are not replaced.

        Raises:
            RuntimeError: when the ring is too small, which the plan's capacity excludes.
        """
        if self.has_requested(group):
            return
        if not self.fits(group, in_use):
            raise RuntimeError(f"planes {in_use} to {group.read_stop} do not fit a ring of {self._ring.capacity}")
        box = self._ring.region.along(self._axis, max(self._requested, group.start), group.read_stop)
        self._requested = group.read_stop
        after = self._transfer.queued()
        for part, view in self._ring.parts(box):
            out = None if self._transfer.staged else view.numpy()
            for request, stamped in self._volume.split_reads(part, out):
                inner = (slice(None), *request.slices(part.start))
                self.pending.submit(self._read, request, stamped, view[inner], after)

    def batch(self, boxes: Sequence[Box], *, size: int, copy: bool, full: bool = False) -> torch.Tensor:
        """Return patches as `(B, C, *patch_size)`, at most `size` of them, as long as they are in use.

        With `copy` the model may write to them; without, a single patch that does not wrap is a view. With `full`, a
        smaller batch is filled up with copies of its last patch.
        """
        if len(boxes) == 1 and not copy:
            views = [view for _, view in self._ring.parts(boxes[0])]
            if len(views) == 1:
                return views[0][None]
        if len(self._batches) < (self._batches.maxlen or 1):
            shape = (size, self._ring.data.shape[0], *boxes[0].shape)
            self._batches.append(buffer(shape, self._ring.data.dtype, self._ring.data.device))
        self._batches.rotate()
        batch = self._batches[0]
        for target, box in zip(batch, boxes, strict=False):  # the last batch may be smaller
            for part, view in self._ring.parts(box):
                target[(slice(None), *part.slices(box.start))] = view
        if full and len(boxes) < size:
            batch[len(boxes) :] = batch[len(boxes) - 1]
        return batch if full else batch[: len(boxes)]

    def are_constant(self, value: float, boxes: Sequence[Box]) -> list[bool]:
        """Return for each box whether all of its voxels have a value; of a device, one wait tells it for all boxes."""
        parts = ([view for _, view in self._ring.parts(box)] for box in boxes)
        constant = [torch.stack([_equal(view, value).all() for view in views]).all() for views in parts]
        result: list[bool] = torch.stack(constant).tolist()
        return result

    def _read(self, box: Box, stamped: list[Box], view: torch.Tensor, after: torch.cuda.Event | None) -> None:
        stamps = self.stamps
        units = None if stamps is None else stamps.units
        if stamps is None or units is not None:
            stamped = []
        tags = [self._volume.tags(part, self._padding[0]) for part in stamped]
        with self._transfer.upload(view, after) as target:
            self._volume.read_into(target, box, *self._padding, units)
            for part, part_tags in zip(stamped, tags, strict=True):
                if stamps is not None:
                    stamps.add(VOLUME, part, target[(slice(None), *part.slices(box.start))], part_tags)


def _equal(values: torch.Tensor, value: float) -> torch.Tensor:
    return values.isnan() if math.isnan(value) else values == value
