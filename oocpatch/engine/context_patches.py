"""Patches of a coarser level of a pyramid, around the centres of the patches that a model gets.

```text
 volume      . . . . [ p a t c h ] . . . . .          sizes in voxels are equal, so a patch of a level that is
 level 1   [  c   o   n   t   e   x   t  ]            half as fine covers twice the extent
```
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from oocpatch.planning.box import Box, Ints
from oocpatch.volumes.content import CONTEXT, InputStamps
from oocpatch.volumes.volume import Volume


def level_factors(shape: Ints, level: Ints) -> tuple[float, ...]:
    """Return the voxels of a volume per voxel of its level: a whole number where the level may have been rounded.

    >>> level_factors((1001, 1000, 5), (501, 250, 5))
    (2.0, 4.0, 1.0)
    """
    ratios = [n / m for n, m in zip(shape, level, strict=True)]
    is_whole = [abs(n - round(r) * m) < round(r) for n, m, r in zip(shape, level, ratios, strict=True)]
    return tuple(float(round(r)) if whole else r for r, whole in zip(ratios, is_whole, strict=True))


def context_box(box: Box, factors: Sequence[float]) -> Box:
    """Return the box of a level, of the same size in voxels, with the centre of a box of the volume.

    Of two boxes that are equally near, it is the later one.

    >>> context_box(Box((16,), (24,)), (4.0,)), context_box(Box((0,), (8,)), (1.0,))
    (Box(start=(1,), stop=(9,)), Box(start=(0,), stop=(8,)))
    """
    sizes = [b - a for a, b in zip(box.start, box.stop, strict=True)]
    middles = [(a + b) / 2 / f for a, b, f in zip(box.start, box.stop, factors, strict=True)]
    start = tuple(math.floor(m - n / 2 + 0.5) for m, n in zip(middles, sizes, strict=True))
    return Box(start, tuple(a + n for a, n in zip(start, sizes, strict=True)))


class ContextPatches:
    """Reads the patches of a level around those of a volume.

    Args:
        level: the level, open for a run.
        shape: shape of the volume.
        padding: padding mode and fill value of voxels beyond the level.
    """

    def __init__(self, level: Volume, shape: Ints, padding: tuple[str, float]) -> None:
        self._level, self._padding = level, padding
        self._factors = level_factors(shape, level.shape)

    def extend(self, patches: torch.Tensor, boxes: Sequence[Box], stamps: InputStamps | None) -> torch.Tensor:
        """Return patches `(B, C, *patch)` with the channels of their contexts behind their own.

        What is read is added to `stamps`, if there are any. There may be more patches than boxes, to fill up a batch.
        """
        values = np.empty((len(boxes), self._level.channels, *boxes[0].shape), self._level.dtype)
        for target, box in zip(values, boxes, strict=True):
            around = context_box(box, self._factors)
            tags = self._level.tags(around, self._padding[0])
            self._level.read_into(target, around, *self._padding)
            if stamps is not None:
                stamps.add(CONTEXT, around, target, tags)
        context = torch.from_numpy(values).to(patches.device, patches.dtype)
        missing = len(patches) - len(context)
        context = torch.cat([context, context[-1:].expand(missing, *context.shape[1:])]) if missing else context
        return torch.cat([patches, context], 1)
