"""The grid sampler: patches on a regular grid, for dense inference in the user's own loop.

Locations are computed when needed: a grid of a million patches takes as much memory as a grid of two. They are in the
frame of the unpadded volume, so starts are negative if a `padding_mode` lets patches begin outside it. The grids of
several subjects follow each other:

```text
 subject_index   |     0     | 1 |      2      |
 patch           0 1 2 3 4 5 6 7 8 9 10 11 12 13
```
"""

from __future__ import annotations

import bisect
import copy
import itertools
import operator
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self, overload

import numpy as np
from torch.utils.data import Dataset

from oocpatch.planning.arguments import checked_padding_mode, per_axis
from oocpatch.planning.grid import PatchGrid, PatchLocation
from oocpatch.sampling.subject import Rule, Subject, as_subject, read_patches, reading_rules


@dataclass(frozen=True, slots=True, eq=False)
class Locations(Sequence[PatchLocation]):
    """All or some locations of one or several grids, computed when they are needed.

    Attributes:
        grids: grids of patches.
        ends: number of patches up to the end of each grid.
        numbers: numbers of the patches, counted over all grids; a range or an array of int64.
        subject_index: index of the first grid's subject, that locations have; None: they have none.

    >>> locations = Locations.of([PatchGrid.of((10,), (4,), (2,))])
    >>> [location.index for location in locations[1:3]]
    [(2,), (4,)]
    """

    grids: tuple[PatchGrid, ...]
    ends: tuple[int, ...]
    numbers: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]]
    subject_index: int | None = None

    @classmethod
    def of(cls, grids: Sequence[PatchGrid], subject_index: int | None = None) -> Self:
        """Return all locations of some grids."""
        ends = tuple(itertools.accumulate(grid.num_patches for grid in grids))
        return cls(tuple(grids), ends, range(ends[-1]), subject_index)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> PatchLocation: ...
    @overload
    def __getitem__(self, index: slice) -> Locations: ...
    def __getitem__(self, index: int | slice) -> PatchLocation | Locations:
        if isinstance(index, slice):
            return replace(self, numbers=self.numbers[index])
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"patch index must be in [-{len(self)}, {len(self)}), got {position}")
        number = int(self.numbers[position])
        which = bisect.bisect_right(self.ends, number)
        location = self.grids[which][number - (self.ends[which - 1] if which else 0)]
        return location if self.subject_index is None else replace(location, subject_index=self.subject_index + which)


class GridSampler(Dataset[Subject]):
    """The patches of a regular grid: a map-style `Dataset` of known length, with random access.

    `GridSampler.of` has those of several subjects. Also callable on any other subject, as the sampler of a `Queue` is.

    Args:
        subject: subject to read from, patch by patch.
        patch_size: in voxels.
        patch_overlap: voxels that adjacent patches share, in total; even.
        padding_mode: `constant`, `edge` or `replicate`, `reflect`, `symmetric`, `wrap` or `circular`, or the `mean`,
            `median` or `minimum` of each whole volume, which is then read first: patches begin half an overlap before
            the volume and end half an overlap behind it; None: all patches lie inside.
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

    Attributes:
        subjects: all subjects; one, unless `of` made the sampler.
        locations: the location of each patch, a lazy sequence.
    """

    def __init__(
        self,
        subject: Subject,
        patch_size: int | Sequence[int],
        patch_overlap: int | Sequence[int] = 0,
        padding_mode: str | None = None,
        fill: float = 0,
    ) -> None:
        subject = as_subject(subject)
        axes, shape = subject.spatial_names, subject.spatial_shape
        self.subjects: tuple[Subject, ...] = (subject,)
        self.patch_size = per_axis("patch_size", patch_size, axes, least=1)
        self.patch_overlap = per_axis("patch_overlap", patch_overlap, axes)
        self.padding_mode = checked_padding_mode(padding_mode)
        self.fill = fill
        grid = PatchGrid.of(shape, self.patch_size, self.patch_overlap, padded=padding_mode is not None)
        if any(overlap % 2 for overlap in self.patch_overlap):
            raise ValueError(f"patch_overlap must be even on every axis, got {self.patch_overlap}")
        if padding_mode is None and any(p > n for p, n in zip(self.patch_size, shape, strict=True)):
            raise ValueError(
                f"patch_size must not be larger than the volume unless there is a padding_mode, got {self.patch_size} "
                f"for a volume of shape {shape}"
            )
        self.locations = Locations.of([grid])
        is_inside = all(a.first >= 0 and a.last + a.patch <= a.length for a in grid.axes)
        padding = {} if is_inside else reading_rules(subject, self.padding_mode, fill)
        self.paddings: tuple[Mapping[str, Rule], ...] = (padding,)

    @classmethod
    def of(
        cls,
        subjects: Sequence[Subject],
        patch_size: int | Sequence[int],
        patch_overlap: int | Sequence[int] = 0,
        padding_mode: str | None = None,
        fill: float = 0,
    ) -> Self:
        """Return one sampler of the grids of several subjects, whose volumes may differ in shape.

        The grids follow each other, and `patch_location.subject_index` is the index of the patch's subject.

        Raises:
            ValueError: if there is no subject, or a grid does not fit its subject, which the message names.

        >>> subjects = [Subject(t1=np.zeros(4)), Subject(t1=np.zeros(6))]
        >>> [(place.subject_index, place.index) for place in GridSampler.of(subjects, 2).locations]
        [(0, (0,)), (0, (2,)), (1, (0,)), (1, (2,)), (1, (4,))]
        """
        samplers = []
        for index, subject in enumerate(subjects):
            try:
                samplers.append(cls(subject, patch_size, patch_overlap, padding_mode, fill))
            except ValueError as error:
                raise ValueError(f"subject {index}: {error}") from error
        if not samplers:
            raise ValueError("subjects must hold at least one subject, got none")
        sampler = copy.copy(samplers[0])
        sampler.subjects = tuple(sampler.subject for sampler in samplers)
        sampler.paddings = tuple(padding for sampler in samplers for padding in sampler.paddings)
        sampler.locations = Locations.of([sampler.locations.grids[0] for sampler in samplers], subject_index=0)
        return sampler

    @property
    def subject(self) -> Subject:
        """The subject; the first one where there are several."""
        return self.subjects[0]

    def __repr__(self) -> str:
        subjects = str(self.subject) if len(self.subjects) == 1 else f"{len(self.subjects):,} subjects"
        return f"GridSampler({len(self):,} patches of {self.patch_size}, overlap {self.patch_overlap}, of {subjects})"

    def without(self, *done: Container[PatchLocation]) -> Self:
        """Return the same sampler without the patches at some locations, such as those of an interrupted loop.

        Takes eight bytes per remaining patch.

        Args:
            done: locations of all subjects, or one container for each subject, as `aggregator.done` is.

        Raises:
            ValueError: for another number of containers.
        """
        if len(done) not in {1, len(self.subjects)}:
            raise ValueError(
                f"done must be one container of locations, or one for each of {len(self.subjects)} subjects, "
                f"got {len(done)}"
            )
        by_subject = done * len(self.subjects) if len(done) == 1 else done
        remaining = (
            number
            for number, location in zip(self.locations.numbers, self.locations, strict=True)
            if location not in by_subject[self._which(location)]
        )
        sampler = copy.copy(self)
        sampler.locations = replace(self.locations, numbers=np.fromiter(remaining, np.int64))
        return sampler

    def over(self, subject: Subject, subject_index: int | None = None) -> Self:
        """Return the grid of another subject, with the same sizes; its locations have that index."""
        sampler = type(self)(subject, self.patch_size, self.patch_overlap, self.padding_mode, self.fill)
        sampler.locations = replace(sampler.locations, subject_index=subject_index)
        return sampler

    def __call__(self, subject: Subject, num_patches: int | None = None) -> Iterator[Subject]:
        """Return the first patches of the grid of another subject; default: all."""
        sampler = self.over(subject)
        return (sampler[i] for i in range(len(sampler) if num_patches is None else min(num_patches, len(sampler))))

    def __len__(self) -> int:
        return len(self.locations)

    def __getitem__(self, index: int) -> Subject:
        return self._read([self.locations[index]])[0]

    def read(self, numbers: slice) -> list[Subject]:
        """Read some patches; consecutive ones of a row of the grid at once."""
        rows = itertools.groupby(self.locations[numbers], lambda place: (place.subject_index, place.index[:-1]))
        return [patch for _, row in rows for patch in self._read(list(row))]

    def _read(self, locations: Sequence[PatchLocation]) -> list[Subject]:
        which = self._which(locations[0])
        return read_patches(self.subjects[which], locations, self.paddings[which])

    def _which(self, location: PatchLocation) -> int:
        """Return the position of a location's subject in `subjects`."""
        return (location.subject_index or 0) - (self.locations.subject_index or 0)
