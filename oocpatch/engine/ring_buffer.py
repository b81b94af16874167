"""Rings: a moving window of planes of a volume, in a buffer of fixed size.

Along the swept axis, voxel `v` lies at `v % capacity`, so that planes that are done with make room for new ones and
nothing is ever moved. A box that wraps around the end is seen as two parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from oocpatch.engine.buffers import buffer
from oocpatch.planning.box import Box


@dataclass(frozen=True, slots=True)
class Ring:
    """Planes of a region, as a tensor `(C, *region)` that holds `capacity` of them at a time.

    Attributes:
        data: the buffer.
        region: the box that the planes belong to.
        axis: the swept axis.

    >>> ring = Ring.of(Box((0, 0), (9, 2)), channels=1, capacity=4, axis=0, dtype=torch.float32, device="cpu")
    >>> [part.start[0] for part, _ in ring.parts(Box((2, 0), (6, 2)))]
    [2, 4]
    """

    data: torch.Tensor
    region: Box
    axis: int

    @classmethod
    def of(
        cls,
        region: Box,
        *,
        channels: int,
        capacity: int,
        axis: int,
        dtype: torch.dtype,
        device: str,
    ) -> Ring:
        """A ring of zeros of the given capacity."""
        shape = list(region.shape)
        shape[axis] = min(capacity, shape[axis])
        return cls(buffer((channels, *shape), dtype, device), region, axis)

    @property
    def capacity(self) -> int:
        return self.data.shape[self.axis + 1]

    def parts(self, box: Box) -> Iterator[tuple[Box, torch.Tensor]]:
        """The box as one part, or two where it wraps around: each with its view of the buffer, `(C, *part.shape)`."""
        start, stop = box.start[self.axis], box.stop[self.axis]
        if stop - start > self.capacity:
            raise ValueError(f"a ring of {self.capacity} planes cannot hold {stop - start}")
        while start < stop:
            at = start % self.capacity
            end = min(stop, start + self.capacity - at)
            part = box.along(self.axis, start, end)
            inner = part.slices(self.region.start)
            index = (*inner[: self.axis], slice(at, at + end - start), *inner[self.axis + 1 :])
            yield part, self.data[(slice(None), *index)]
            start = end
