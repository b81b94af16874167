"""Heads: the outputs of a model, and the frame of each one.

The frame of a head is that of the volume with every length multiplied by the head's scale. Patches and cores are the
same in all frames, in the same order, so that one sweep of a block serves all heads:

```text
 volume        |   core 0    |   core 1    |      patches of 8, stride 4, cores of 16
 scale 1/2     |core 0|core 1|                     patches of 4, stride 2, cores of 8
```

The output of a network without padding is smaller than its input. The difference on each side is its context: the
patches of the grid are those of the outputs, and the model's input patches are larger by the context:

```text
 input patch   [  context  |     patch of the grid     |  context  ]
 output                    [===========================]
```

`configuration.output_heads` infers heads from a probe of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from oocpatch.planning.box import Ints
from oocpatch.planning.grid import GridAxis, PatchGrid, Scale


@dataclass(frozen=True, slots=True)
class Head:
    """One output of the model and its array. Sizes are in the head's own voxels.

    Attributes:
        name: name of the output array.
        mode: `overlap_mode`, by which overlapping patches become one.
        scale: voxels of the output per voxel of the volume, per axis.
        trim: unused voxels at each side of the model's output.
        channels, dtype: of the sums; in `crop` mode the dtype is that of the model's output, else float32.
        dense: whether the weights are one more channel of the sums, voxel by voxel, since patches may be skipped.
        out_channels, out_dtype: of the output array, after the postprocess.
        channel_axis: name of the output's channel axis; None: it has none.
        chunks, unit: chunks and write unit of the output.
        labels: whether the values are labels, which must not be averaged.
        channel_position: number of looped axes before the channel axis.
        match: least intersection over union of objects that are one, of a head of objects; None: it is no such head.
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
    channel_position: int = 0
    match: float | None = None

    @property
    def crop(self) -> bool:
        return self.mode == "crop"

    @property
    def blended(self) -> bool:
        """True where patches are added, in float32, and divided by weights."""
        return not (self.crop or self.takes_maximum or self.has_objects)

    @property
    def has_floor(self) -> bool:
        """True where weights are no product over the axes: they are `dense` then."""
        return self.mode == "monai"

    @property
    def has_objects(self) -> bool:
        """True where patches are labels of objects, which are matched: there are no sums, and no block is final."""
        return self.mode == "instances"

    @property
    def takes_maximum(self) -> bool:
        return self.mode == "max"

    @property
    def needs_weights(self) -> bool:
        """True where sums are divided by the weights of a full grid."""
        return self.blended and not self.dense

    @property
    def votes(self) -> bool:
        """True where patches are labels, of which the most frequent wins: they are added as one channel per class."""
        return self.mode == "vote"

    @property
    def window(self) -> str:
        """The mode of the window."""
        return "average" if self.votes else self.mode

    @property
    def stored_channels(self) -> int:
        """Channels of the sums in memory and in the workspace: dense weights are the last one."""
        return 0 if self.has_objects else self.channels + self.dense

    @property
    def max_channels(self) -> int:
        """The larger number of channels of sums and output."""
        return max(self.stored_channels, self.out_channels)

    @property
    def sum_voxel_bytes(self) -> int:
        return self.stored_channels * _itemsize(self.dtype)

    @property
    def out_voxel_bytes(self) -> int:
        return self.out_channels * _itemsize(self.out_dtype)

    @property
    def scaled(self) -> bool:
        return any(s != (1, 1) for s in self.scale)


@dataclass(frozen=True, slots=True)
class VectorHead:
    """One output of the model that is a vector per patch, and its array of rows.

    Attributes:
        name: name of the array.
        length: numbers of a vector.
        dtype: of the array.
    """

    name: str
    length: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        return self.length * _itemsize(self.dtype)


@cache
def _itemsize(dtype: str) -> int:
    return np.dtype(dtype).itemsize  # numpy takes a microsecond, and a planner compares thousands of candidates


def patch_grid(
    shape: Ints,
    patch_size: Ints,
    patch_overlap: Ints,
    context: Ints,
    snap: Ints,
    *,
    padded: bool = False,
    even: bool = False,
    extent: tuple[Ints, Ints] | None = None,
) -> PatchGrid:
    """Return the grid of the model's output patches, in the frame of a volume; all sizes in voxels per axis.

    `patch_size` and `patch_overlap` are those of the model's input, which is larger by `context` on each side. `snap`
    divides all starts; a `padded` frame grows by half an overlap on each side, unless starts are spaced evenly. Evenly
    spaced patches may cover only an `extent`, the start and the stop of a box.

    Raises:
        ValueError: when a size is not positive, or an overlap is not in `[0, patch_size)`.

    >>> [loc.index for loc in patch_grid((20,), (10,), (0,), (2,), (1,))]
    [(0,), (6,), (12,), (14,)]
    """
    PatchGrid.of(shape, patch_size, patch_overlap)  # checks the sizes
    axes = []
    for n, patch, overlap, c, q in zip(shape, patch_size, patch_overlap, context, snap, strict=True):
        inner = patch - 2 * c
        stride = max(q, min(patch - overlap, inner) // q * q)
        first = -(-(-(overlap // 2) // q) * q) if padded and not even else None
        axes.append(GridAxis(n, inner, inner - stride, padded, q, begin=first, even=even))
    if even and extent is not None:
        axes = [axis.within(start, stop) for axis, start, stop in zip(axes, *extent, strict=True)]
    return PatchGrid(tuple(axes))


def distinct_channel_axes(heads: Sequence[Head], in_channels: int) -> tuple[str | None, ...]:
    """Return a name of the channel axis of each head such that heads of one dataset with the same name have one size.

    Heads with as many channels as the volume keep the name, else those with the most; others add their own.
    """
    counts = [head.out_channels for head in heads if head.channel_axis is not None]
    count = in_channels if in_channels in counts else max(counts, default=0)
    return tuple(
        h.channel_axis if h.channel_axis is None or h.out_channels == count else f"{h.channel_axis}_{h.name}"
        for h in heads
    )


def common_unit(heads: Sequence[Head], ndim: int) -> Ints:
    """Return the divisor of all cores, in the volume's voxels: a whole number of write units in every head's frame."""
    if not heads:
        return (1,) * ndim
    per_axis = zip(*(zip(head.unit, head.scale, strict=True) for head in heads), strict=True)
    return tuple(math.lcm(*(n * per // math.gcd(n * per, times) for n, (times, per) in axis)) for axis in per_axis)


def crops(heads: Sequence[Head]) -> bool:
    """Return whether all heads crop in the volume's own frame: halos then end where the next patch decides."""
    return all(h.crop and all(s == (1, 1) for s in h.scale) for h in heads)
