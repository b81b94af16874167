"""Weighted samplers: the centre of a patch is drawn from a map, exactly, and without the whole map in memory.

The centre of a patch is its corner plus `patch_size // 2`. A draw takes three steps, each exact in float64, after the
choice of a map where there are several:

```text
 masses of all cells  -->  a cell  -->  its voxels, read  -->  a voxel: the centre
 (one pass, stored)
```

With `balance="voxels"`, a voxel weighs as its label or as its maps. With `balance="classes"`, each label or map has its
share of the draws, however many voxels it has.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.planning.box import Box, Ints
from oocpatch.sampling.images import readable
from oocpatch.sampling.map_cells import Cells, RecentCells, pick
from oocpatch.sampling.probability_map import (
    Masses,
    MassesOfMaps,
    MeasuredMap,
    count_labels,
    measure,
    stored_masses,
    sum_weights,
)
from oocpatch.sampling.subject import Subject, as_subject, as_volume
from oocpatch.sampling.uniform import UniformSampler
from oocpatch.volumes.volume import Volume

Generator = np.random.Generator
Values = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

RECENT_BYTES = 64 << 20
"""Bytes of the voxels of maps that a sampler caches."""

BALANCES = ("voxels", "classes")


class WeightedSampler(UniformSampler):
    """Random patches whose centre voxel is drawn from a probability map, or from several.

    A voxel's probability is proportional to the map's value there, among the voxels that can be the centre of a patch
    that lies in the volume. The first draw makes one pass over the map, whose result is stored beside a map on disk.
    A map that has changed is passed over again at the first draw of the next epoch.
    For a map in memory the pass is made, and the map checked, by the constructor.

    Args:
        subject: subject to draw patches from.
        patch_size: in voxels.
        probability_map: name of the map among the subject's volumes: one channel, finite values that are not negative.
            Several maps: a list of names, or a dict of names and weights.
        num_patches: patches per epoch; None: endless.
        balance: how several maps are mixed. `"voxels"`: a voxel's probability is proportional to the sum over the maps
            of weight times value. `"classes"`: each map has a share of the draws that is proportional to its weight.
        seed: as for `UniformSampler`.

    Raises:
        ValueError: also for a map that does not exist, has several channels, has a negative, infinite or undefined
            value, or is zero wherever a patch can be centred (with `"voxels"`: if all of them are).

    >>> subject = Subject(t1=np.arange(6), where=np.array([9, 0, 1, 0, 0, 9]))
    >>> sampler = WeightedSampler(subject, patch_size=3, probability_map="where", num_patches=1)
    >>> [patch.t1.data.tolist() for patch in sampler]
    [[[1, 2, 3]]]

    Half of the draws are centred on a vessel and half on a lesion, although there are three times as many vessels:

    >>> subject = Subject(vessel=np.array([1, 1, 1, 0, 0, 0]), lesion=np.array([0, 0, 0, 0, 1, 0]))
    >>> maps = {"vessel": 1, "lesion": 1}
    >>> sampler = WeightedSampler(subject, 1, maps, num_patches=1000, balance="classes", seed=0)
    >>> sum(int(patch.lesion.data) for patch in sampler)
    503
    """

    _parameter = "probability_map"

    def __init__(
        self,
        subject: Subject,
        patch_size: int | Sequence[int],
        probability_map: str | Sequence[str] | Mapping[str, float],
        num_patches: int | None = None,
        *,
        balance: str = "voxels",
        seed: int | None = None,
    ) -> None:
        subject = as_subject(subject)
        self.probability_map = probability_map
        if balance not in BALANCES:
            raise ValueError(f"balance must be one of {', '.join(BALANCES)}, got {balance!r}")
        self.balance = balance
        self._maps = _map_weights(probability_map)
        self._masses_of_maps = MassesOfMaps()
        self._recent = RecentCells(RECENT_BYTES)
        super().__init__(subject, patch_size, num_patches, seed=seed)
        if not any(as_volume(self.subject[name]).source.chunked for name in self._maps):
            self.prepare()

    def begin_pass(self) -> None:
        self._masses_of_maps.begin_pass()

    def prepare(self, subject: Subject | None = None) -> None:
        """Make the pass over each map now, in this process, rather than at the first draw.

        Call it before workers start if the result cannot be stored beside the map.
        """
        self._weights_of_maps(self.subject if subject is None else subject)

    def check(self, subject: Subject) -> None:
        super().check(subject)
        for name in self._maps:
            if name not in subject.images:
                raise ValueError(f"{self._parameter} must be one of {', '.join(subject.images)}, got {name!r}")
            if (channels := readable(subject[name]).channels) != 1:
                raise ValueError(f"{self._parameter} must have one channel, but {name!r} has {channels}")

    def _summarize(self, values: Values) -> tuple[Values, Values]:
        """Return the distinct values of some voxels of the map, and the mass of each."""
        return sum_weights(values)

    def _weigh(self, masses: Masses) -> dict[Any, float]:  # noqa: ARG002 - labels need it
        """Return the weight of a unit of mass by the value of the map."""
        return {0.0: 1.0}

    def draw(self, subject: Subject, random: Generator, count: int = 1) -> list[Ints]:
        name = next(iter(self._maps))
        if len(self._maps) > 1:
            weights = self._weights_of_maps(subject)
            name = list(weights)[pick(np.cumsum(list(weights.values())), random.random())]
        source, measured = readable(subject[name]), self._measured(subject, name)
        entry = pick(measured.sums, random.random())
        number, value = int(measured.masses.cells[entry]), measured.masses.values[entry]
        cell = measured.cells[number]
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
        # All from the same map: cells of maps differ, and only so has each draw the distribution of the mixture.
        values, masses = self._summarize(in_region)
        sums = np.cumsum(masses * measured.weights_of(values))
        others = (values[pick(sums, random.random())] for _ in range(count - 1))
        return [first, *(corner(self._draw_index(in_region, value, random), centres.start) for value in others)]

    def _draw_index(self, voxels: Values, value: Any, random: Generator) -> Ints:  # noqa: ARG002 - labels need it
        """Draw the index of one of some voxels of the map."""
        rows = voxels.reshape(-1, voxels.shape[-1])
        row = pick(np.cumsum(rows.sum(axis=1, dtype=np.float64)), random.random())
        column = pick(np.cumsum(rows[row], dtype=np.float64), random.random())
        return _unravel(row, column, voxels.shape)

    def _weights_of_maps(self, subject: Subject) -> dict[str, float]:
        """Return the probability of a draw from each map of a subject, up to a common factor."""
        totals = {name: float(self._measured(subject, name).sums[-1:].sum()) for name in self._maps}
        if not any(totals.values()):
            raise ValueError(self._no_mass(list(totals), np.empty(0)))
        return self._maps if self.balance == "classes" else {n: self._maps[n] * total for n, total in totals.items()}

    def _measured(self, subject: Subject, name: str) -> MeasuredMap:
        """Return a map of a subject with its masses."""
        return self._masses_of_maps.get(readable(subject[name]), lambda volume: self._measure(volume, name))

    def _measure(self, volume: Volume, name: str) -> MeasuredMap:
        self._recent.clear()  # of a map before it changed
        cells = Cells.of_centres(volume.shape, volume.chunks, self.patch_size)
        masses = stored_masses(volume, cells, self._parameter, lambda: measure(volume, cells, self._summarize, name))
        measured = MeasuredMap.of(cells, masses, self._weigh(masses))
        may_be_empty = len(self._maps) > 1 and self.balance == "voxels"
        if not may_be_empty and not measured.sums[-1:].any():
            raise ValueError(self._no_mass([name], np.unique(masses.values)))
        return measured

    def _no_mass(self, names: Sequence[str], labels: Values) -> str:  # noqa: ARG002 - a label sampler lists them
        return (
            f"{self._parameter} must be above zero somewhere that a patch of size {self.patch_size} can be centred, "
            f"but {' and '.join(map(repr, names))} {'is' if len(names) == 1 else 'are'} not"
        )


class LabelSampler(WeightedSampler):
    """Random patches whose centre voxel is drawn by its label.

    By default each voxel has the weight of its label: a label with twice the voxels is drawn twice as often at the same
    weight. With `balance="classes"` the weights are shares of the draws, whatever the number of voxels.

    Args:
        subject: subject to draw patches from.
        patch_size: in voxels.
        label_name: name of the label map among the subject's volumes; one channel.
        label_probabilities: weight of each label; those not in it weigh nothing. None: all labels but 0 alike.
        num_patches: patches per epoch; None: endless.
        balance: `"voxels"`: the probability of a voxel is proportional to the weight of its label. `"classes"`: that of
            a label is, and its voxels are alike.
        seed: as for `UniformSampler`.

    Warns:
        UserWarning: if values are no whole numbers, as those of a probability map.

    Raises:
        ValueError: also for weights that are negative, infinite or all zero, or when no patch can be centred on a label
            that has a weight; with `"classes"`, on any label that has one.

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
        balance: str = "voxels",
        seed: int | None = None,
    ) -> None:
        self.label_name = label_name
        self.label_probabilities = None if label_probabilities is None else _label_weights(label_probabilities)
        super().__init__(subject, patch_size, label_name, num_patches, balance=balance, seed=seed)

    def _summarize(self, values: Values) -> tuple[Values, Values]:
        return count_labels(values)

    def _weigh(self, masses: Masses) -> dict[Any, float]:
        labels, inverse = np.unique(masses.values, return_inverse=True)
        present = labels.tolist()
        weights = self.label_probabilities
        if broken := [label for label in present if label % 1 and label not in (weights or {})]:
            warnings.warn(
                f"{self.label_name!r} has values that are no whole numbers, such as {broken[0]:g}, each of which is a "
                "label of its own here: WeightedSampler draws by a probability map",
                stacklevel=2,
            )
        if weights is None:
            weights = {label: float(label != 0) for label in present}
        if self.balance == "voxels":
            return {label: weights.get(label, 0.0) for label in present}
        if absent := [label for label, weight in weights.items() if weight > 0 and label not in present]:
            raise ValueError(
                f"label_probabilities must give a share only to labels that a patch of size {self.patch_size} can be "
                f"centred on, got one for {', '.join(map(str, absent))}, which {self.label_name!r} does not have there"
            )
        voxels = np.bincount(inverse.ravel(), masses.masses, len(present))
        return {label: weights.get(label, 0.0) / n for label, n in zip(present, voxels.tolist(), strict=True)}

    def _draw_index(self, voxels: Values, value: Any, random: Generator) -> Ints:
        rows = voxels.reshape(-1, voxels.shape[-1]) == value
        counts = np.cumsum(np.count_nonzero(rows, axis=1))
        number = int(random.integers(counts[-1]))
        row = int(np.searchsorted(counts, number, side="right"))
        before = int(counts[row - 1]) if row else 0
        return _unravel(row, int(np.flatnonzero(rows[row])[number - before]), voxels.shape)

    def _no_mass(self, names: Sequence[str], labels: Values) -> str:
        listed = ", ".join(map(str, labels[:20].tolist())) + (", ..." if len(labels) > 20 else "")
        return (
            "label_probabilities must give weight to a label that a patch can be centred on, "
            f"got {self.label_probabilities or 'all but 0'}, but where {names[0]!r} can be a patch's centre, "
            f"for patches of size {self.patch_size}, it has only {listed}"
        )


def _unravel(row: int, column: int, shape: Ints) -> Ints:
    return (*map(int, np.unravel_index(row, shape[:-1])), column)


def _map_weights(maps: Any) -> dict[str, float]:
    """Return the weight of each map from one name, several names, or a dict of names and weights."""
    if isinstance(maps, Sequence):
        maps = dict.fromkeys([maps] if isinstance(maps, str) else maps, 1.0)
    weights = _weights("probability_map", "maps", maps)
    if not all(isinstance(name, str) for name in maps):
        raise ValueError(f"probability_map must hold names of volumes, got {maps}")
    return {name: weight for name, weight in weights.items() if weight > 0}


def _label_weights(labels: Any) -> dict[int, float]:
    weights = _weights("label_probabilities", "labels", labels)
    if not all(map(_is_finite, labels)):
        raise ValueError(f"label_probabilities must hold finite numbers, got {dict(labels)}")
    return weights


def _weights(name: str, kind: str, weights: Any) -> dict[Any, float]:
    """Check a dict of weights, and return it."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"{name} must be a dict of {kind} and their weights, got {weights!r}")
    if not all(map(_is_finite, weights.values())):
        raise ValueError(f"{name} must hold finite numbers, got {dict(weights)}")
    if any(weight < 0 for weight in weights.values()):
        raise ValueError(f"{name} must not be negative, got {dict(weights)}")
    if not any(weight > 0 for weight in weights.values()):
        raise ValueError(f"{name} must give a weight to some of the {kind}, got {dict(weights)}")
    return {key: float(weight) for key, weight in weights.items()}


def _is_finite(number: Any) -> bool:
    return isinstance(number, Real | np.bool_) and math.isfinite(number)
