"""Heads: what a model gives for one patch, and the frame that each of its outputs lives in.

Each head has its own frame: the volume's, with every length multiplied by the head's scale. Patches and cores are the
same in all frames, in the same order, so that one sweep of a block serves all heads:

```text
 volume        |   core 0    |   core 1    |      patches of 8, stride 4, cores of 16
 scale 1/2     |core 0|core 1|                     patches of 4, stride 2, cores of 8
```

A network without padding gives less than it takes. What it needs beyond its output on each side is its context: the
patches of the grid are those of the outputs, and the model is given patches that are larger by the context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oocpatch.planning.box import Ints
from oocpatch.planning.grid import GridAxis, PatchGrid, Scale


@dataclass(frozen=True, slots=True)
class Head:
    """One output of the model, and what becomes of it. Sizes are in the head's own voxels.

    Attributes:
        name: name of the output array.
        mode: how overlapping patches become one.
        scale: voxels of the output per voxel of the volume, per axis.
        trim: voxels at each side of the model's output that are not used.
        channels: channels of the sums.
        dtype: dtype of the sums (`crop`: of the model's output; else float32).
        dense: whether weights are kept voxel by voxel, as one more channel of the sums, since patches may be skipped.
        out_channels: channels after the postprocess.
        out_dtype: dtype of the output array.
        channel_axis: name of the output's channel axis; None: it has none.
        chunks, unit: the output's chunks, and its write unit.
        labels: whether its values are labels, of which a mean says nothing.
    """

    name: str
    mode: str
    scale: tuple[Scale, ...]
    trim: Ints
    channels: int
    dtype: str
    dense: bool
    out_channels: int
    out_dtype: str
    channel_axis: str | None
    chunks: Ints
    unit: Ints
    labels: bool = False

    @property
    def crop(self) -> bool:
        return self.mode == "crop"

    @property
    def blended(self) -> bool:
        """Whether patches are added, in float32, and divided by weights."""
        return self.mode not in ("crop", "max")

    @property
    def votes(self) -> bool:
        """Whether patches hold labels, of which the most frequent wins: they are added as one channel per class."""
        return self.mode == "vote"

    @property
    def window(self) -> str:
        """The kind of window."""
        return "average" if self.votes else self.mode

    @property
    def stored_channels(self) -> int:
        """Channels of the sums as they are kept: the weights are the last, if they are dense."""
        return self.channels + self.dense

    @property
    def max_channels(self) -> int:
        """The larger number of channels of sums and output."""
        return max(self.stored_channels, self.out_channels)

    @property
    def sum_voxel_bytes(self) -> int:
        """Bytes of one voxel of the sums, all channels."""
        return self.stored_channels * np.dtype(self.dtype).itemsize

    @property
    def out_voxel_bytes(self) -> int:
        """Bytes of one voxel of the output, all channels."""
        return self.out_channels * np.dtype(self.out_dtype).itemsize

    @property
    def scaled(self) -> bool:
        return any(s != (1, 1) for s in self.scale)


def patch_grid(
    shape: Ints, patch_size: Ints, patch_overlap: Ints, context: Ints, snap: Ints, *, padded: bool = False
) -> PatchGrid:
    """The grid of what the model gives, in the volume's frame.

    Args:
        shape: of the volume.
        patch_size: of the patches that the model takes.
        patch_overlap: of the patches that the model takes.
        context: what it takes beyond its output, on each side.
        snap: starts are multiples of it.
        padded: whether the frame grows by half an overlap on each side.

    >>> [loc.index for loc in patch_grid((20,), (10,), (0,), (2,), (1,))]
    [(0,), (6,), (12,), (14,)]
    """
    PatchGrid.of(shape, patch_size, patch_overlap)  # checks the sizes
    axes = []
    for n, patch, overlap, c, q in zip(shape, patch_size, patch_overlap, context, snap, strict=True):
        inner = patch - 2 * c
        stride = max(q, min(patch - overlap, inner) // q * q)
        first = -(-(-(overlap // 2) // q) * q) if padded else 0
        axes.append(GridAxis(n, inner, inner - stride, padded, q, begin=first if padded else None))
    return PatchGrid(tuple(axes))


def common_unit(heads: Sequence[Head]) -> Ints:
    """What cores are multiples of, in the volume's voxels: a whole number of write units in every head's frame."""
    found = []
    for a in range(len(heads[0].unit)):
        units = []
        for head in heads:
            times, per = head.scale[a]
            units.append(head.unit[a] * per // math.gcd(head.unit[a] * per, times))
        found.append(math.lcm(*units))
    return tuple(found)


def crops(heads: Sequence[Head]) -> bool:
    """Whether halos end where the next patch has the last word: only if all heads crop, in the volume's own frame."""
    return all(h.crop and all(s == (1, 1) for s in h.scale) for h in heads)
