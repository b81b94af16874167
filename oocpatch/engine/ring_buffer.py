"""Ring buffers: a moving window of planes of a volume, in memory of fixed size.

Along the swept axis, plane `v` of the region lies at `v % capacity`, so that new planes replace old ones and nothing is
ever moved. A box that wraps around the end is seen as two parts:

```text
 planes of the region      4   5   6   7   8   9
 capacity 6            +---+---+---+---+---+---+
                       | 6 | 7 | 8 | 9 | 4 | 5 |      box 5 to 8: planes 5, and 6 to 7
                       +---+---+---+---+---+---+
```
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from oocpatch.engine.buffers import buffer
from oocpatch.planning.box import Box


@dataclass(frozen=True, slots=True)
class RingBuffer:
    """Planes of a region, in a tensor `(C, *region)` of `capacity` planes.

    Attributes:
        region: box of all planes that pass through the ring.
        axis: the swept axis.

    >>> ring = RingBuffer.of(Box((0, 0), (9, 2)), channels=1, capacity=4, axis=0, dtype=torch.float32, device="cpu")
    >>> [part.start[0] for part, _ in ring.parts(Box((2, 0), (6, 2)))]
    [2, 4]
    """

    data: torch.Tensor
    region: Box
    axis: int

    @classmethod
    def of(cls, region: Box, *, channels: int, capacity: int, axis: int, dtype: torch.dtype, device: str) -> RingBuffer:
        """Return a ring of zeros of the given capacity, at most the region."""
        shape = list(region.shape)
        shape[axis] = min(capacity, shape[axis])
        return cls(buffer((channels, *shape), dtype, device), region, axis)

    @property
    def capacity(self) -> int:
        """Number of planes."""
        return self.data.shape[self.axis + 1]

    def parts(self, box: Box) -> Iterator[tuple[Box, torch.Tensor]]:
        """Yield a box as one part, or two where it wraps around: each with its view of the memory, `(C, *part.shape)`.

        Raises:
            ValueError: when the box has more planes than the ring.
        """
        start, stop = box.start[self.axis], box.stop[self.axis]
        if stop - start > self.capacity:
            raise ValueError(f"a ring of {self.capacity} planes cannot hold {stop - start}")
        while start < stop:
            plane = (start - self.region.start[self.axis]) % self.capacity
            end = min(stop, start + self.capacity - plane)
            part = box.along(self.axis, start, end)
            inner = part.slices(self.region.start)
            index = (*inner[: self.axis], slice(plane, plane + end - start), *inner[self.axis + 1 :])
            yield part, self.data[(slice(None), *index)]
            start = end
