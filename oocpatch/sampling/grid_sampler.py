"""The grid sampler: patches on a regular grid, for dense inference in the user's own loop.

Locations are computed when needed: a grid of a million patches takes as much memory as a grid of two. They are in the
frame of the unpadded volume, so starts are negative if a `padding_mode` lets patches begin outside it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Self, overload

import numpy as np
from torch.utils.data import Dataset

from oocpatch.planning.arguments import one_of, per_axis
from oocpatch.planning.choices import PADDING_MODES
from oocpatch.planning.grid import PatchGrid, PatchLocation
from oocpatch.sampling.subject import Subject, read_patches


@dataclass(frozen=True, slots=True, eq=False)
class Locations(Sequence[PatchLocation]):
    """All or some locations of a grid, computed when they are needed.

    Attributes:
        grid: grid of patches.
        numbers: numbers of the patches in the grid; a range or an array of int64.

    >>> locations = Locations(PatchGrid.of((10,), (4,), (2,)), range(4))
    >>> [location.index for location in locations[1:3]]
    [(2,), (4,)]
    """

    grid: PatchGrid
    numbers: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> PatchLocation: ...
    @overload
    def __getitem__(self, index: slice) -> Locations: ...
    def __getitem__(self, index: int | slice) -> PatchLocation | Locations:
        if isinstance(index, slice):
            return Locations(self.grid, self.numbers[index])
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"patch index must be in [-{len(self)}, {len(self)}), got {position}")
        return self.grid[int(self.numbers[position])]


class GridSampler(Dataset[Subject]):
    """The patches of a regular grid: a map-style `Dataset` of known length, with random access.

    Args:
        subject: subject to read from, patch by patch.
        patch_size: in voxels.
        patch_overlap: voxels that adjacent patches share, in total; even.
        padding_mode: `constant`, `edge`, `reflect`, `symmetric` or `wrap`: patches begin half an overlap before the
            volume and end half an overlap behind it; None: all patches lie inside.
        fill: value of the voxels outside when `padding_mode` is `constant`.

    Raises:
        ValueError: for an overlap that is odd or not smaller than the patch, a patch larger than the volume without a
            padding mode, or an unknown padding mode.

    >>> sampler = GridSampler(Subject(t1=np.arange(10)), patch_size=4, patch_overlap=2)
    >>> len(sampler), sampler[1].t1.data.tolist(), sampler[1].patch_location.index
    (4, [[2, 3, 4, 5]], (2,))

    An interrupted loop continues with the remaining patches:

    >>> rest = sampler.without({sampler.locations[0], sampler.locations[2]})
    >>> [location.index for location in rest.locations]
    [(2,), (6,)]
    """

    def __init__(
        self,
        subject: Subject,
        patch_size: int | Sequence[int],
        patch_overlap: int | Sequence[int] = 0,
        padding_mode: str | None = None,
        fill: float = 0,
    ) -> None:
        axes, shape = subject.spatial_names, subject.spatial_shape
        self.subject = subject
        self.patch_size = per_axis("patch_size", patch_size, axes, least=1)
        self.patch_overlap = per_axis("patch_overlap", patch_overlap, axes)
        self.padding_mode = one_of("padding_mode", padding_mode, PADDING_MODES)
        self.fill = fill
        grid = PatchGrid.of(shape, self.patch_size, self.patch_overlap, padded=padding_mode is not None)
        if any(overlap % 2 for overlap in self.patch_overlap):
            raise ValueError(f"patch_overlap must be even on every axis, got {self.patch_overlap}")
        if padding_mode is None and any(p > n for p, n in zip(self.patch_size, shape, strict=True)):
            raise ValueError(
                f"patch_size must not be larger than the volume unless there is a padding_mode, got {self.patch_size} "
                f"for a volume of shape {shape}"
            )
        self.locations = Locations(grid, range(len(grid)))

    def __repr__(self) -> str:
        return (
            f"GridSampler({len(self):,} patches of {self.patch_size}, overlap {self.patch_overlap}, of {self.subject})"
        )

    def without(self, done: Container[PatchLocation]) -> Self:
        """Return the same sampler without the patches at some locations, such as those of an interrupted loop.

        Takes eight bytes per remaining patch.
        """
        numbers = self.locations.numbers
        remaining = (n for n, location in zip(numbers, self.locations, strict=True) if location not in done)
        sampler = copy.copy(self)
        sampler.locations = Locations(self.locations.grid, np.fromiter(remaining, np.int64))
        return sampler

    def __len__(self) -> int:
        return len(self.locations)

    def __getitem__(self, index: int) -> Subject:
        return read_patches(self.subject, [self.locations[index]], self.padding_mode, self.fill)[0]
