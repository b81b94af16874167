"""Weighted samplers: the centre of a patch is drawn from a map, exactly, and without the whole map in memory.

The centre of a patch is its corner plus `patch_size // 2`. A draw takes three steps, each exact in float64:

```text
 masses of all cells  -->  a cell  -->  its voxels, read  -->  a voxel: the centre
 (one pass, stored)
```
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.planning.box import Box, Ints
from oocpatch.sampling.map_cells import Cells, RecentCells, pick
from oocpatch.sampling.probability_map import Masses, MassesOfMaps, count_labels, measure, stored_masses, sum_weights
from oocpatch.sampling.subject import Subject, as_volume
from oocpatch.sampling.uniform import UniformSampler
from oocpatch.volumes.volume import Volume

Generator = np.random.Generator
Values = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

RECENT_BYTES = 64 << 20
"""Bytes of the voxels of maps that a sampler caches."""


class WeightedSampler(UniformSampler):
    """Random patches whose centre voxel is drawn from a probability map.

    A voxel's probability is proportional to the map's value there, among the voxels that can be the centre of a patch
    that lies in the volume. The first draw makes one pass over the map, whose result is stored beside a map on disk.
    A map that has changed is passed over again at the first draw of the next epoch.
    For a map in memory the pass is made, and the map checked, by the constructor.

    Args:
        subject: subject to draw patches from.
        patch_size: in voxels.
        probability_map: name of the map among the subject's volumes: one channel, finite values that are not negative.
        num_patches: patches per epoch; None: endless.
        seed: as for `UniformSampler`.

    Raises:
        ValueError: also for a map that does not exist, has several channels, has a negative, infinite or undefined
            value, or is zero wherever a patch can be centred.

    >>> subject = Subject(t1=np.arange(6), where=np.array([9, 0, 1, 0, 0, 9]))
    >>> sampler = WeightedSampler(subject, patch_size=3, probability_map="where", num_patches=1)
    >>> [patch.t1.data.tolist() for patch in sampler]
    [[[1, 2, 3]]]
    """

    _parameter = "probability_map"

    def __init__(
        self,
        subject: Subject,
        patch_size: int | Sequence[int],
        probability_map: str,
        num_patches: int | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        self.probability_map = probability_map
        self._masses_of_maps = MassesOfMaps()
        self._recent = RecentCells(RECENT_BYTES)
        super().__init__(subject, patch_size, num_patches, seed=seed)
        if not as_volume(subject[probability_map]).source.chunked:
            self.prepare()

    def begin_pass(self) -> None:
        self._masses_of_maps.begin_pass()

    def prepare(self, subject: Subject | None = None) -> None:
        """Make the pass over the map now, in this process, rather than at the first draw.

        Call it before workers start if the result cannot be stored beside the map.
        """
        self._masses(self.subject if subject is None else subject)

    def check(self, subject: Subject) -> None:
        super().check(subject)
        name = self.probability_map
        if name not in subject.images:
            raise ValueError(f"{self._parameter} must be one of {', '.join(subject.images)}, got {name!r}")
        if subject[name].channels != 1:
            raise ValueError(f"{self._parameter} must have one channel, but {name!r} has {subject[name].channels}")

    def _summarize(self, values: Values) -> tuple[Values, Values]:
        """Return the distinct values of some voxels of the map, and the mass of each."""
        return sum_weights(values)

    def _weigh(self, values: Values) -> Floats:
        """Return the weight of a unit of mass by the value of the map: `(E,)` to `(E,)`."""
        return np.ones(len(values))

    def draw(self, subject: Subject, random: Generator, count: int = 1) -> list[Ints]:
        source = subject[self.probability_map]
        cells, masses_of_map, sums = self._masses(subject)
        entry = pick(sums, random.random())
        number, value = int(masses_of_map.cells[entry]), masses_of_map.values[entry]
        cell = cells[number]
        voxels = self._recent.get(source, number, lambda: as_volume(source).read(cell)[0])
        half = tuple(p // 2 for p in self.patch_size)

        def corner(index: Ints, origin: Ints) -> Ints:
            return tuple(o + i - h for o, i, h in zip(origin, index, half, strict=True))

        first = corner(self._draw_index(voxels, value, random), cell.start)
        if count == 1:
            return [first]
        region = self._region(subject, first)
        starts, stops = (tuple(a + h for a, h in zip(s, half, strict=True)) for s in (region.start, region.stop))
        centres = cell & Box(starts, stops)
        in_region = voxels[centres.slices(cell.start)]
        values, masses = self._summarize(in_region)
        sums = np.cumsum(masses * self._weigh(values))
        others = (values[pick(sums, random.random())] for _ in range(count - 1))
        return [first, *(corner(self._draw_index(in_region, value, random), centres.start) for value in others)]

    def _draw_index(self, voxels: Values, value: Any, random: Generator) -> Ints:  # noqa: ARG002 - labels need it
        """Draw the index of one of some voxels of the map."""
        rows = voxels.reshape(-1, voxels.shape[-1])
        row = pick(np.cumsum(rows.sum(axis=1, dtype=np.float64)), random.random())
        column = pick(np.cumsum(rows[row], dtype=np.float64), random.random())
        return _unravel(row, column, voxels.shape)

    def _masses(self, subject: Subject) -> tuple[Cells, Masses, Floats]:
        """Return the cells of a subject's map, their masses, and the cumulative sums of the weighted masses."""
        return self._masses_of_maps.get(subject[self.probability_map], self._measure)

    def _measure(self, volume: Volume) -> tuple[Cells, Masses, Floats]:
        self._recent.clear()  # of a map before it changed
        cells = Cells.of_centres(volume.shape, volume.chunks, self.patch_size)
        name, kind = self.probability_map, self._parameter
        masses = stored_masses(volume, cells, kind, lambda: measure(volume, cells, self._summarize, name))
        sums = np.cumsum(masses.masses * self._weigh(masses.values))
        if not len(sums) or sums[-1] <= 0:
            raise ValueError(self._no_mass(masses))
        return cells, masses, sums

    def _no_mass(self, masses: Masses) -> str:  # noqa: ARG002 - labels list those that there are
        return (
            f"{self._parameter} must be above zero somewhere that a patch of size {self.patch_size} can be centred, "
            f"but {self.probability_map!r} is not"
        )


class LabelSampler(WeightedSampler):
    """Random patches whose centre voxel is drawn by its label.

    Each voxel has the weight of its label: a label with twice the voxels is drawn twice as often at the same weight.

    Args:
        subject: subject to draw patches from.
        patch_size: in voxels.
        label_name: name of the label map among the subject's volumes; one channel.
        label_probabilities: weight of each label; those not in it weigh nothing. None: all labels but 0 alike.
        num_patches: patches per epoch; None: endless.
        seed: as for `UniformSampler`.

    Raises:
        ValueError: also for weights that are negative, infinite or all zero, or when no patch can be centred on a label
            that has a weight.

    >>> subject = Subject(label=np.array([0, 0, 1, 1, 2, 1, 0]))
    >>> sampler = LabelSampler(subject, 5, "label", {2: 1.0}, num_patches=2)
    >>> [patch.label.data.tolist() for patch in sampler]
    [[[1, 1, 2, 1, 0]], [[1, 1, 2, 1, 0]]]
    """

    _parameter = "label_name"

    def __init__(
        self,
        subject: Subject,
        patch_size: int | Sequence[int],
        label_name: str,
        label_probabilities: Mapping[int, float] | None = None,
        num_patches: int | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        self.label_name = label_name
        self.label_probabilities = None if label_probabilities is None else _weights(label_probabilities)
        super().__init__(subject, patch_size, label_name, num_patches, seed=seed)

    def _summarize(self, values: Values) -> tuple[Values, Values]:
        return count_labels(values)

    def _weigh(self, values: Values) -> Floats:
        if self.label_probabilities is None:
            return np.where(values != 0, 1.0, 0.0)
        labels, inverse = np.unique(values, return_inverse=True)
        weights: Floats = np.array([self.label_probabilities.get(label, 0.0) for label in labels.tolist()])[inverse]
        return weights

    def _draw_index(self, voxels: Values, value: Any, random: Generator) -> Ints:
        rows = voxels.reshape(-1, voxels.shape[-1]) == value
        counts = np.cumsum(np.count_nonzero(rows, axis=1))
        number = int(random.integers(counts[-1]))
        row = int(np.searchsorted(counts, number, side="right"))
        before = int(counts[row - 1]) if row else 0
        return _unravel(row, int(np.flatnonzero(rows[row])[number - before]), voxels.shape)

    def _no_mass(self, masses: Masses) -> str:
        labels = np.unique(masses.values)
        listed = ", ".join(map(str, labels[:20].tolist())) + (", ..." if len(labels) > 20 else "")
        return (
            "label_probabilities must give weight to a label that a patch can be centred on, "
            f"got {self.label_probabilities or 'all but 0'}, but where {self.label_name!r} can be a patch's centre, "
            f"for patches of size {self.patch_size}, it has only {listed}"
        )


def _unravel(row: int, column: int, shape: Ints) -> Ints:
    return (*map(int, np.unravel_index(row, shape[:-1])), column)


def _weights(probabilities: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(probabilities, Mapping):
        raise TypeError(f"label_probabilities must be a dict of labels and their weights, got {probabilities!r}")
    numbers: list[Any] = [*probabilities.keys(), *probabilities.values()]
    if not all(isinstance(number, Real | np.bool_) and math.isfinite(number) for number in numbers):
        raise ValueError(f"label_probabilities must hold finite numbers, got {dict(probabilities)}")
    if any(weight < 0 for weight in probabilities.values()):
        raise ValueError(f"label_probabilities must not be negative, got {dict(probabilities)}")
    if not any(weight > 0 for weight in probabilities.values()):
        raise ValueError(f"label_probabilities must give a weight to some label, got {dict(probabilities)}")
    return {label: float(weight) for label, weight in probabilities.items()}
