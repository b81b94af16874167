"""Promises of the weighted and the label sampler: the exact distribution of the whole map, whatever its chunks."""

from __future__ import annotations

import itertools
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torchio
import zarr
from hypothesis import given
from hypothesis import strategies as st

import oocpatch
from oocpatch.sampling import map_cells as cells
from oocpatch.sampling import probability_map as masses
from oocpatch.sampling import weighted
from oocpatch.sampling.map_cells import Cells, RecentCells, pick
from oocpatch.sampling.subject import as_volume
from tests.support.cases import law, scratch
from tests.support.draws import assert_fits, centre_distribution, corners, drawn, torchio_subject
from tests.without_linux import needs_fork

Ints = tuple[int, ...]
Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def small_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells are one chunk of the small maps here, as they are of large ones."""
    monkeypatch.setattr(cells, "CELL_VOXELS", 1)
    monkeypatch.setattr(masses, "TASK_BYTES", 64)


def stored(root: Path, data: Array, chunks: Ints) -> oocpatch.Volume:
    names = "abde"[: data.ndim]
    zarr.create_array(root / "map.zarr", data=data, chunks=chunks, dimension_names=names)
    return oocpatch.Volume(root / "map.zarr")


def prior(shape: Ints, dtype: str = "float32") -> Array:
    """Weights of which some are zero, and of which those at the border are large."""
    weights = np.random.default_rng(1).integers(0, 4, shape).astype(np.float64)
    for axis, n in enumerate(shape):
        np.moveaxis(weights, axis, 0)[[0, n - 1]] += 3
    return weights.astype(dtype)


CASES = {
    "one-axis": ((17,), (4,), (5,)),
    "one-axis-odd": ((17,), (5,), (4,)),
    "one-voxel-patches": ((6, 7), (1, 1), (4, 3)),
    "two-axes": ((9, 8), (3, 4), (4, 3)),
    "three-axes-even": ((6, 7, 5), (2, 4, 2), (3, 4, 2)),
    "three-axes-odd": ((6, 7, 5), (3, 3, 3), (6, 2, 3)),
    "four-axes": ((3, 4, 5, 3), (2, 3, 2, 1), (2, 2, 3, 2)),
    "chunk-larger-than-map": ((5, 6), (2, 3), (9, 9)),
    "one-corner": ((4, 9), (4, 9), (2, 4)),
}


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("case", CASES)
def test_centres_follow_the_map_at_every_border(case: str, where: str, tmp_path: Path) -> None:
    shape, patch, chunks = CASES[case]
    data = prior(shape)
    volume = stored(tmp_path, data, chunks) if where == "disk" else oocpatch.Volume(data, "abde"[: data.ndim])
    sampler = oocpatch.WeightedSampler(oocpatch.Subject(map=volume), patch, "map")
    expected = centre_distribution(data, patch)
    if len(expected) == 1:
        assert drawn(sampler, 100) == dict.fromkeys(expected, 100)
        return
    for together, which in ((1, 0), (3, 0), (3, 2)) if where == "disk" else ((1, 0),):
        assert_fits(drawn(sampler, 2000, together=together, which=which), expected)


def test_corners_drawn_together_lie_in_two_chunks_per_axis(tmp_path: Path) -> None:
    subject = oocpatch.Subject(map=stored(tmp_path, np.ones((80, 80), np.uint8), (16, 16)))
    for sampler in (oocpatch.WeightedSampler(subject, (8, 5), "map"), oocpatch.LabelSampler(subject, (8, 5), "map")):
        for i in range(50):
            places = np.array(sampler.draw(subject, np.random.default_rng(i), 8))
            assert (places.min(0) // 16 == places.max(0) // 16).all()


@pytest.mark.parametrize("case", CASES)
def test_labels_weigh_voxel_by_voxel(case: str, tmp_path: Path) -> None:
    shape, patch, chunks = CASES[case]
    data = np.random.default_rng(2).integers(-1, 3, shape).astype(np.int16)
    probabilities = {-1: 5.0, 0: 1, 2: 2, 7: 100}
    sampler = oocpatch.LabelSampler(
        oocpatch.Subject(label=stored(tmp_path, data, chunks)), patch, "label", probabilities
    )
    expected = centre_distribution(np.vectorize(lambda label: float(probabilities.get(label, 0)))(data), patch)
    if len(expected) == 1:
        assert drawn(sampler, 100) == dict.fromkeys(expected, 100)
        return
    for together, which in ((1, 0), (3, 2)):
        assert_fits(drawn(sampler, 2000, together=together, which=which), expected)


def test_without_probabilities_all_labels_but_zero_weigh_alike() -> None:
    data = np.random.default_rng(2).integers(-2, 2, (9, 9)).astype(np.int8)
    sampler = oocpatch.LabelSampler(oocpatch.Subject(label=data), 3, "label")
    assert_fits(drawn(sampler, 3000), centre_distribution(data != 0, (3, 3)))


def test_a_map_of_probabilities_as_labels_is_warned_of() -> None:
    subject = oocpatch.Subject(shares=np.array([0, 0.25, 1], np.float32))
    with pytest.warns(UserWarning, match="'shares' has values that are no whole numbers, such as 0.25"):
        oocpatch.LabelSampler(subject, 1, "shares")
    oocpatch.LabelSampler(subject, 1, "shares", {0.25: 1})  # type: ignore[dict-item] # asked for by name
    oocpatch.LabelSampler(oocpatch.Subject(whole=np.array([0, 1, 2.0])), 1, "whole")


def test_labels_below_zero_are_labels_where_torchio_takes_them_for_background() -> None:
    data = np.full((3, 3, 3), -1)
    with pytest.raises(RuntimeError, match="all zeros"):
        next(iter(torchio.LabelSampler(torchio_subject(label=data), 1, "label")))
    assert len(drawn(oocpatch.LabelSampler(oocpatch.Subject(label=data), 1, "label"), 300)) == 27


def test_the_first_example_of_torchio() -> None:
    """Labels 0 0 1 1 2 1 0, patches of 5: centres 2, 3, 4, which weigh 50, 50, 25."""
    label = np.array([0, 0, 1, 1, 2, 1, 0]).reshape(1, 1, 7)
    sampler = oocpatch.LabelSampler(oocpatch.Subject(label=label), (1, 1, 5), "label", {0: 0, 1: 50, 2: 25, 3: 25})
    assert_fits(drawn(sampler, 4000), {(0, 0, 0): 2 / 5, (0, 0, 1): 2 / 5, (0, 0, 2): 1 / 5})


def torchio_distribution(sampler: torchio.WeightedSampler, shape: Ints, patch: Ints) -> dict[Ints, float]:
    """What TorchIO draws from, read from the map that it gives to `torch.multinomial`."""
    weights = sampler._build_probability_map().double()
    ranges = [range(n - p + 1) for n, p in zip(shape, patch, strict=True)]
    total = float(weights.sum())
    centre = [p // 2 for p in patch]
    return {
        c: float(weights[tuple(a + b for a, b in zip(c, centre, strict=True))]) / total
        for c in itertools.product(*ranges)
    }


@law(60)
@given(st.data())
def test_odd_patches_have_the_distribution_of_torchio(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 7)] * 3))
    patch = tuple(data.draw(st.sampled_from([p for p in (1, 3, 5, 7) if p <= n])) for n in shape)
    weights, labels = prior(shape), np.random.default_rng(3).integers(0, 3, shape)
    probabilities = {0: 1, 1: 4}
    theirs = torchio_subject(map=weights, label=labels)
    ours = oocpatch.Subject(map=weights, label=labels)
    inside = tuple(slice(p // 2, n - p + p // 2 + 1) for n, p in zip(shape, patch, strict=True))
    if weights[inside].any():
        reference = torchio.WeightedSampler(theirs, patch, "map")
        expected = torchio_distribution(reference, shape, patch)
        assert exact(oocpatch.WeightedSampler(ours, patch, "map")) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    if (labels[inside] < 2).any():
        reference = torchio.LabelSampler(theirs, patch, "label", probabilities)
        expected = torchio_distribution(reference, shape, patch)
        sampler = oocpatch.LabelSampler(ours, patch, "label", probabilities)
        assert exact(sampler) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def exact(sampler: oocpatch.WeightedSampler) -> dict[Ints, float]:
    """The probability of each corner, from the table of masses and the voxels of each cell."""
    patch, shape = sampler.patch_size, sampler.subject.spatial_shape
    found = dict.fromkeys(itertools.product(*(range(n - p + 1) for n, p in zip(shape, patch, strict=True))), 0.0)
    shares = sampler._weights_of_maps(sampler.subject)
    for name, share in shares.items():
        if not share:
            continue
        measured, source = sampler._measured(sampler.subject, name), as_volume(sampler.subject[name])
        volume = oocpatch.Volume(source.source.load((slice(None),) * len(patch)), source.names)
        weighed = np.diff(measured.sums, prepend=0.0)
        for number in range(len(measured.cells)):
            box = measured.cells[number]
            values = volume.read(box)[0].ravel()
            weights = measured.weights_of(values) if isinstance(sampler, oocpatch.LabelSampler) else values
            mass = weighed[measured.masses.cells == number].sum() / measured.sums[-1] * share / sum(shares.values())
            for index, weight in zip(np.ndindex(*box.shape), weights.astype(float), strict=True):
                corner = tuple(o + i - p // 2 for o, i, p in zip(box.start, index, patch, strict=True))
                found[corner] += mass * (weight / weights.sum() if weight else 0.0)
    return found


def centred(weights: Array, patch: Ints) -> Array:
    """Weights, of which those where no patch can be centred are 0."""
    inside = tuple(slice(p // 2, n - p + p // 2 + 1) for n, p in zip(weights.shape, patch, strict=True))
    masked = np.zeros(weights.shape)
    masked[inside] = weights[inside]
    return masked


@pytest.mark.parametrize("case", CASES)
def test_each_class_has_its_share_of_the_draws_at_every_border(case: str, tmp_path: Path) -> None:
    shape, patch, chunks = CASES[case]
    labels = np.random.default_rng(5).choice([-1, 0, 2], p=[0.2, 0.7, 0.1], size=shape).astype(np.int16)
    corner = next(np.ndindex(*shape))
    labels[tuple(p // 2 for p in patch)], labels[corner] = 2, 7  # seven can be no centre, but of patches of one voxel
    present = np.unique(labels[centred(np.ones(shape), patch) > 0]).tolist()
    shares = {label: 3.0 + label for label in present}
    sampler = oocpatch.LabelSampler(
        oocpatch.Subject(label=stored(tmp_path, labels, chunks)), patch, "label", shares, balance="classes"
    )
    weights = sum(share * (m := centred(labels == label, patch)) / m.sum() for label, share in shares.items())
    expected = centre_distribution(np.asarray(weights), patch)
    assert exact(sampler) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    if case in {"one-axis", "three-axes-even"}:
        assert_fits(drawn(sampler, 1500, together=3, which=2), expected)


def test_a_hundred_thousand_draws_have_the_shares_of_their_classes() -> None:
    label = np.zeros((24, 24), np.uint8)
    label[:, :3], label[2:4, 8], label[20, 5:20] = 1, 2, 3
    sampler = oocpatch.LabelSampler(
        oocpatch.Subject(label=label), (5, 4), "label", {1: 2, 2: 1, 3: 1}, balance="classes"
    )
    random = np.random.default_rng(16)
    drawn_corners = np.array([sampler.draw(sampler.subject, random)[0] for _ in range(100_000)])
    counts = np.bincount(label[tuple(drawn_corners.T + 2)])
    assert counts.sum() == 100_000
    assert not counts[0]
    assert scipy.stats.chisquare(counts[1:], [50_000, 25_000, 25_000]).pvalue > 0.01


def test_without_probabilities_all_classes_but_zero_have_equal_shares() -> None:
    label = np.array([0, 1, 1, 1, 1, 1, 1, 1, 5, 0])
    sampler = oocpatch.LabelSampler(oocpatch.Subject(label=label), 1, "label", balance="classes")
    assert exact(sampler) == pytest.approx({(0,): 0, (9,): 0, (8,): 1 / 2} | {(i,): 1 / 14 for i in range(1, 8)})


def test_voxels_weigh_as_their_label_unless_classes_are_balanced() -> None:
    """A hundredth of the voxels: their share of the draws is 1 of 100 with equal weights, and 1 of 2 as a class."""
    label = np.zeros(100, np.uint8)
    label[40] = 1
    subject, weights = oocpatch.Subject(label=label), {0: 1, 1: 1}
    voxels, classes = (
        oocpatch.LabelSampler(subject, 1, "label", weights, balance=balance) for balance in ("voxels", "classes")
    )
    assert exact(voxels)[40,] == pytest.approx(1 / 100)
    assert exact(classes)[40,] == pytest.approx(1 / 2)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_share_of_a_label_that_does_not_occur_is_refused_by_name(where: str, tmp_path: Path) -> None:
    label = np.zeros((9, 9), np.uint8)
    label[0, 0], label[4, 4] = 3, 1  # no patch of three voxels is centred on the corner
    volume = stored(tmp_path, label, (4, 4)) if where == "disk" else label
    for shares, absent in (({1: 1, 2: 1}, "2"), ({0: 1, 3: 1, 8: 2}, "3, 8")):
        message = rf"size \(3, 3\) can be centred on, got one for {absent}, which 'label' does not have there"
        with pytest.raises(ValueError, match=message):
            next(iter(oocpatch.LabelSampler(oocpatch.Subject(label=volume), 3, "label", shares, balance="classes")))
    sampler = oocpatch.LabelSampler(oocpatch.Subject(label=label), 3, "label", {1: 1, 2: 0}, balance="classes")
    assert next(iter(sampler)).patch_location.index == (3, 3)


@pytest.mark.parametrize("balance", ["voxels", "classes"])
@pytest.mark.parametrize("case", ["two-axes", "three-axes-even", "one-corner"])
def test_several_maps_are_mixed_by_voxels_or_by_shares(case: str, balance: str, tmp_path: Path) -> None:
    shape, patch, chunks = CASES[case]
    random = np.random.default_rng(6)
    a, b = random.random(shape) * (random.random(shape) < 0.5), random.integers(0, 2, shape).astype(np.uint8)
    centre = tuple(p // 2 for p in patch)
    a[centre] = b[centre] = 1
    subject = oocpatch.Subject(a=stored(tmp_path, a, chunks), b=oocpatch.Volume(b, "abde"[: b.ndim]))
    sampler = oocpatch.WeightedSampler(subject, patch, {"a": 3, "b": 1}, balance=balance)
    masked = centred(a, patch), centred(b, patch)
    scales = [3, 1] if balance == "voxels" else [3 / masked[0].sum(), 1 / masked[1].sum()]
    expected = centre_distribution(masked[0] * scales[0] + masked[1] * scales[1], patch)
    assert exact(sampler) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    if case == "two-axes":
        for together, which in ((1, 0), (3, 2)):
            assert_fits(drawn(sampler, 2000, together=together, which=which), expected)


def test_an_empty_map_among_several_is_refused_where_it_has_a_share() -> None:
    subject = oocpatch.Subject(a=np.ones(9), b=np.zeros(9))
    assert exact(oocpatch.WeightedSampler(subject, 1, ["a", "b"]))[0,] == pytest.approx(1 / 9)
    with pytest.raises(ValueError, match=r"can be centred, but 'b' is not"):
        oocpatch.WeightedSampler(subject, 1, ["a", "b"], balance="classes")
    with pytest.raises(ValueError, match=r"can be centred, but 'b' and 'c' are not"):
        oocpatch.WeightedSampler(oocpatch.Subject(b=np.zeros(9), c=np.zeros(9)), 1, ["b", "c"])


@pytest.mark.parametrize(
    ("maps", "error", "message"),
    [
        ([], ValueError, "must give a weight to some of the maps"),
        ({"a": -1}, ValueError, r"must not be negative, got \{'a': -1\}"),
        ({"a": 0}, ValueError, "must give a weight to some of the maps"),
        ({"a": "much"}, ValueError, "must hold finite numbers"),
        ({1: 1}, ValueError, "must hold names of volumes"),
        (3, TypeError, "must be a dict of maps and their weights, got 3"),
        (["a", "x"], ValueError, "must be one of a, got 'x'"),
    ],
)
def test_maps_that_cannot_be_mixed_are_refused(maps: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"probability_map {message}"):
        oocpatch.WeightedSampler(oocpatch.Subject(a=np.ones(9)), 1, maps)
    with pytest.raises(ValueError, match="balance must be one of voxels, classes, got 'labels'"):
        oocpatch.WeightedSampler(oocpatch.Subject(a=np.ones(9)), 1, "a", balance="labels")


def test_arguments_in_the_order_of_torchio_1_are_refused_with_what_is_missing() -> None:
    with pytest.raises(TypeError, match="subject must be a Subject of oocpatch or of TorchIO, got int"):
        oocpatch.LabelSampler(24, "label", {1: 2})  # type: ignore[arg-type]


def test_a_subject_of_a_queue_without_a_class_is_named() -> None:
    subjects = [oocpatch.Subject(label=np.arange(9) // 3), oocpatch.Subject(label=np.arange(9) // 5)]
    sampler = oocpatch.LabelSampler(subjects[0], 1, "label", {1: 1, 2: 1}, balance="classes")
    with pytest.raises(ValueError, match=r"subject 1: label_probabilities .* got one for 2, which"):
        list(oocpatch.Queue(subjects, sampler, patches_per_volume=2))


def test_the_last_corner_of_an_even_patch_is_reached_where_torchio_never_goes() -> None:
    data = np.ones((6, 1, 1), np.float32)
    theirs = torchio_distribution(torchio.WeightedSampler(torchio_subject(map=data), (4, 1, 1), "map"), (6, 1, 1), (4, 1, 1))  # fmt: skip # noqa: E501
    assert theirs == {(0, 0, 0): 0.5, (1, 0, 0): 0.5, (2, 0, 0): 0.0}
    sampler = oocpatch.WeightedSampler(oocpatch.Subject(map=data), (4, 1, 1), "map")
    assert exact(sampler) == pytest.approx(dict.fromkeys(theirs, 1 / 3))
    assert_fits(drawn(sampler, 3000), dict.fromkeys(theirs, 1 / 3))


def test_no_patches_are_none_where_torchio_has_no_end() -> None:
    data = np.ones((3, 3, 3), np.float32)
    theirs = torchio.WeightedSampler(torchio_subject(map=data), 1, "map")
    assert len(list(itertools.islice(theirs(theirs.subject, 0), 100))) == 100
    ours = oocpatch.WeightedSampler(oocpatch.Subject(map=data), 1, "map")
    assert list(ours(ours.subject, 0)) == []


def test_torchio_refuses_maps_beyond_two_to_the_24(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "CELL_VOXELS", 1 << 16)
    data = np.zeros((2, 2049, 4096), np.float32)
    data[1, 2000, 4000] = 1
    with pytest.raises(RuntimeError, match="2\\^24"):
        next(iter(torchio.WeightedSampler(torchio_subject(map=data), 1, "map")))
    sampler = oocpatch.WeightedSampler(oocpatch.Subject(map=data), 1, "map", num_patches=1)
    assert corners(sampler) == [(1, 2000, 4000)]


@law(80)
@given(st.data())
def test_masses_are_those_of_the_valid_centres_cell_by_cell(data: st.DataObject) -> None:
    """Against a plain sum over each chunk of a mask of the centres."""
    ndim = data.draw(st.integers(1, 3))
    shape = data.draw(st.tuples(*[st.integers(1, 9)] * ndim))
    patch = tuple(data.draw(st.integers(1, n)) for n in shape)
    chunks = tuple(data.draw(st.integers(1, n + 1)) for n in shape)
    dtype = data.draw(st.sampled_from(["bool", "uint8", "int8", "int16", "uint64", "float16", "float64"]))
    values = np.random.default_rng(4).integers(0, 4, shape).astype(dtype)
    centres = np.zeros(shape, bool)
    centres[tuple(slice(p // 2, n - p + p // 2 + 1) for n, p in zip(shape, patch, strict=True))] = True
    lattice = Cells.of_centres(shape, chunks, patch)
    boxes = [lattice[i] for i in range(len(lattice))]
    covered = np.zeros(shape, int)
    for box in boxes:
        covered[box.slices()] += 1
        assert all(a // c == (b - 1) // c for a, b, c in zip(box.start, box.stop, chunks, strict=True))
    assert np.array_equal(covered, centres)
    volume = oocpatch.Volume(values, "abd"[:ndim])
    weights = masses.measure(volume, lattice, masses.sum_weights, "map")
    for number, box in enumerate(boxes):
        assert weights.masses[weights.cells == number].sum() == values[box.slices()].astype(float).sum()
    labels = masses.measure(volume, lattice, masses.count_labels, "map")
    for number, box in enumerate(boxes):
        mine = labels.cells == number
        found = dict(zip(labels.values[mine].tolist(), labels.masses[mine].tolist(), strict=True))
        assert found == Counter(values[box.slices()].ravel().tolist())
    assert labels.values.dtype == values.dtype


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "int64", "uint64", "bool", "float32"])
def test_labels_are_counted_over_the_whole_range_of_a_dtype(dtype: str) -> None:
    kind = np.dtype(dtype)
    extremes: list[Any] = [0, 1]
    if kind.kind in "iu":
        info = np.iinfo(kind)
        extremes = [info.min, info.min + 1, info.max - 1, info.max]
    values = np.array([*extremes, *extremes, extremes[-1]], kind)
    for some in (values, values[values >= extremes[-2]]):
        labels, counts = masses.count_labels(some)
        assert dict(zip(labels.tolist(), counts.tolist(), strict=True)) == Counter(some.tolist())


def test_picking_never_gives_an_index_without_mass() -> None:
    below_one = np.nextafter(1.0, 0.0)
    for weights in ([0, 1, 0, 0, 2, 0], [1e-300, 0], [0, 1e300, 1e-300, 0], [0.1] * 10 + [0.0]):
        sums = np.cumsum(np.array(weights, float))
        assert {pick(sums, u) for u in (0.0, below_one, *RANDOM.random(200))} <= set(np.flatnonzero(weights).tolist())


def test_a_volume_without_a_map_of_its_own_is_read_only_around_patches(tmp_path: Path) -> None:
    """The map's chunks are read one by one, also by the pass."""
    read: list[int] = []

    class Watched(oocpatch.Volume):
        def read(self, box: Any, *args: Any) -> Any:
            read.append(box.size)
            return super().read(box, *args)

    zarr.create_array(tmp_path / "map.zarr", data=prior((40, 40)), chunks=(8, 8))
    sampler = oocpatch.WeightedSampler(oocpatch.Subject(map=Watched(tmp_path / "map.zarr")), 4, "map", 20)
    assert read == []
    assert len(corners(sampler)) == 20
    assert max(read) == 64


BAD_MAPS = {
    "zero": (np.zeros((6, 6)), "must be above zero somewhere that a patch of size"),
    "zero-inside": (np.pad(np.zeros((2, 2)), 2, constant_values=1), "must be above zero somewhere"),
    "negative": (np.pad([[-1.0]], [(3, 2), (3, 2)]), "map: .* not negative, got -1.0 in the box from"),
    "nan": (np.pad([[np.nan]], [(3, 2), (3, 2)]), "map: .* finite values .* got nan"),
    "infinite": (np.pad([[np.inf]], [(3, 2), (3, 2)]), "map: .* finite values .* got inf"),
}


@pytest.mark.parametrize("bad", BAD_MAPS)
def test_a_map_that_is_no_distribution_is_refused(bad: str, tmp_path: Path) -> None:
    data, message = BAD_MAPS[bad]
    with pytest.raises(ValueError, match=message):
        oocpatch.WeightedSampler(oocpatch.Subject(map=data), 5, "map")
    # on disk nothing is read yet
    sampler = oocpatch.WeightedSampler(oocpatch.Subject(map=stored(tmp_path, data, (3, 3))), 5, "map")
    with pytest.raises(ValueError, match=message):
        next(iter(sampler))


@pytest.mark.parametrize(
    ("probabilities", "error", "message"),
    [
        ({1: -1}, ValueError, r"must not be negative, got \{1: -1\}"),
        ({}, ValueError, "must give a weight to some of the labels"),
        ({1: 0, 2: 0.0}, ValueError, "must give a weight to some of the labels"),
        ({1: float("nan")}, ValueError, "must hold finite numbers"),
        ({1: "much"}, ValueError, "must hold finite numbers"),
        ({"one": 1}, ValueError, "must hold finite numbers"),
        ([1, 2], TypeError, "must be a dict"),
        ({5: 1}, ValueError, r"got \{5: 1.0\}, but .* 'label' .* it has only 0, 1"),
    ],
)
def test_label_probabilities_that_give_no_distribution_are_refused(
    probabilities: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        oocpatch.LabelSampler(oocpatch.Subject(label=np.eye(6, dtype=np.uint8)), 2, "label", probabilities)


def test_without_labels_there_is_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match=r"got all but 0, but .* only 0"):
        oocpatch.LabelSampler(oocpatch.Subject(label=np.zeros((6, 6), int)), 2, "label")
    with pytest.raises(ValueError, match="must hold numbers, got nan"):
        oocpatch.LabelSampler(oocpatch.Subject(label=np.full((6, 6), np.nan)), 2, "label")


def test_unknown_names_and_several_channels_are_refused() -> None:
    subject = oocpatch.Subject(t1=np.zeros((2, 4, 4, 4)), name="t2")
    for name in ("t2", "name"):
        with pytest.raises(ValueError, match=f"probability_map must be one of t1, got '{name}'"):
            oocpatch.WeightedSampler(subject, 2, name)
        with pytest.raises(ValueError, match=f"label_name must be one of t1, got '{name}'"):
            oocpatch.LabelSampler(subject, 2, name)
    with pytest.raises(ValueError, match="one channel, but 't1' has 2"):
        oocpatch.WeightedSampler(subject, 2, "t1")
    with pytest.raises(ValueError, match="patch_size must not be larger than the volume"):
        oocpatch.WeightedSampler(subject, 5, "t1")


# The table of masses beside the map


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The passes over maps that were made, by name of the map."""
    made: list[str] = []
    measure = masses.measure

    def counted(volume: Any, lattice: Any, summarize: Any, name: str) -> Any:
        made.append(name)
        return measure(volume, lattice, summarize, name)

    monkeypatch.setattr("oocpatch.sampling.weighted.measure", counted)
    return made


def sample(path: Path, patch: int = 3) -> list[Ints]:
    return corners(oocpatch.WeightedSampler(oocpatch.Subject(map=path), patch, "map", 20, seed=0))


def tables(root: Path) -> list[Path]:
    return sorted(root.rglob("*.npz"))


def test_the_pass_is_made_once_and_stored_beside_the_map(tmp_path: Path, passes: list[str]) -> None:
    stored(tmp_path, prior((12, 12)), (4, 4))
    first = sample(tmp_path / "map.zarr")
    assert sample(tmp_path / "map.zarr") == first
    assert passes == ["map"]
    assert [table.parent.name for table in tables(tmp_path)] == ["map.zarr.oocpatch-masses"]
    sample(tmp_path / "map.zarr", patch=4)  # other voxels can be centres
    assert passes == ["map", "map"]


def test_other_label_probabilities_need_no_second_pass(tmp_path: Path, passes: list[str]) -> None:
    data = np.arange(144).reshape(12, 12).astype(np.uint8) % 5
    volume = stored(tmp_path, data, (4, 4))
    for label in (1, 3):
        sampler = oocpatch.LabelSampler(oocpatch.Subject(label=volume), 3, "label", {label: 1}, 20)
        assert {int(patch.label.data[0, 1, 1]) for patch in sampler} == {label}
    assert passes == ["label"]


def test_a_map_that_changed_is_measured_again(tmp_path: Path, passes: list[str]) -> None:
    data = np.zeros((12, 12), np.uint8)
    data[5, 5] = 1
    stored(tmp_path, data, (4, 4))
    assert set(sample(tmp_path / "map.zarr")) == {(4, 4)}
    array = zarr.open_array(tmp_path / "map.zarr", mode="r+")
    array[5, 5], array[7, 7] = 0, 1
    assert set(sample(tmp_path / "map.zarr")) == {(6, 6)}
    assert len(passes) == 2
    assert len(tables(tmp_path)) == 1


@pytest.mark.parametrize("fault", ["flip", "cut", "empty", "other"])
def test_a_damaged_table_counts_as_absent(fault: str, tmp_path: Path, passes: list[str]) -> None:
    stored(tmp_path, prior((12, 12)), (4, 4))
    first = sample(tmp_path / "map.zarr")
    [table] = tables(tmp_path)
    content = table.read_bytes()
    spoiled = {"cut": [content[: len(content) // 2]], "empty": [b""], "other": [b"{}"]}.get(fault) or [
        content[:i] + bytes([content[i] ^ 64]) + content[i + 1 :] for i in range(0, len(content), 29)
    ]
    for bad in spoiled:
        table.write_bytes(bad)
        assert sample(tmp_path / "map.zarr") == first
    assert len(passes) > 1 + len(spoiled) // 2  # a flip where nobody looks does no harm


def test_a_place_that_cannot_be_written_does_without(tmp_path: Path, passes: list[str]) -> None:
    stored(tmp_path, prior((12, 12)), (4, 4))
    # a file in the way, since a directory without permissions does not stop root
    (tmp_path / "map.zarr.oocpatch-masses").write_text("in the way")
    sampler = oocpatch.WeightedSampler(oocpatch.Subject(map=tmp_path / "map.zarr"), 3, "map", 20, seed=0)
    first = corners(sampler)
    sampler.set_epoch(0)
    assert corners(sampler) == first
    assert passes == ["map"]
    travelled = pickle.loads(pickle.dumps(sampler))  # noqa: S301 - our own
    assert corners(travelled) == first
    assert passes == ["map"], "what is known travels along"


def test_masses_are_stored_outside_the_hierarchy_of_their_map(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "study.zarr")
    group.create_array("labels", data=prior((12, 12)), chunks=(4, 4))
    sample(tmp_path / "study.zarr" / "labels")
    assert [table.parent for table in tables(tmp_path)] == [tmp_path / "study.zarr.oocpatch-masses"]
    assert [name for name, _ in zarr.open_group(tmp_path / "study.zarr", mode="r").members()] == ["labels"]
    assert [path.name for path in (tmp_path / "study.zarr").iterdir()] == ["labels", "zarr.json"]


def test_masses_of_weights_and_of_labels_of_one_map_are_stored_separately(tmp_path: Path, passes: list[str]) -> None:
    data = np.zeros((12, 12), np.uint8)
    data[5, 5], data[7, 7] = 1, 200
    subject = oocpatch.Subject(map=stored(tmp_path, data, (4, 4)))
    assert_fits(drawn(oocpatch.WeightedSampler(subject, 3, "map"), 2000), {(4, 4): 1 / 201, (6, 6): 200 / 201})
    assert_fits(drawn(oocpatch.LabelSampler(subject, 3, "map"), 2000), {(4, 4): 1 / 2, (6, 6): 1 / 2})
    assert passes == ["map", "map"]


def test_a_pass_can_be_made_ahead(tmp_path: Path, passes: list[str]) -> None:
    sampler = oocpatch.WeightedSampler(oocpatch.Subject(map=stored(tmp_path, prior((12, 12)), (4, 4))), 3, "map", 5)
    assert passes == []
    sampler.prepare()
    assert passes == ["map"]
    assert len(corners(sampler)) == 5
    assert passes == ["map"]


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@needs_fork
def test_processes_that_ask_at_once_make_one_pass() -> None:
    with scratch() as root:
        stored(root, prior((12, 12)), (4, 4))
        measure = masses.measure

        def noted(*arguments: Any) -> Any:
            (root / f"pass{os.getpid()}").touch()
            return measure(*arguments)

        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                weighted.measure = noted
                sample(root / "map.zarr")
                os._exit(0)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
        assert len(list(root.glob("pass*"))) == 1


def test_recent_cells_keep_to_their_limit_and_give_what_was_read() -> None:
    recent, read = RecentCells(100), []

    def cell(number: int) -> Array:
        def make() -> Array:
            read.append(number)
            return np.full(40, number, np.uint8)

        return recent.get("map", number, make)

    for number in (0, 1, 0, 2, 0, 1):
        assert (cell(number) == number).all()
    assert read == [0, 1, 2, 1], "the least recently used goes first"
    assert recent.get("map", 9, lambda: np.zeros(500, np.uint8)).size == 500
    assert recent.get("map", 9, lambda: np.ones(500, np.uint8)).max() == 0, "the last one stays, even if too large"


def test_loaded_volumes_and_tensors_can_be_maps() -> None:
    data = prior((9, 8))
    subject = oocpatch.Subject(map=torch.from_numpy(data)[None], t1=data)
    assert_fits(drawn(oocpatch.WeightedSampler(subject, 3, "map"), 2000), centre_distribution(data, (3, 3)))
    subject.load()
    assert_fits(drawn(oocpatch.WeightedSampler(subject, 3, "t1"), 2000), centre_distribution(data, (3, 3)))


def test_labels_are_counted_block_by_block() -> None:
    values = np.random.default_rng(5).integers(-5, 60_000, (3, masses.COUNTED_AT_ONCE // 2 + 17)).astype(np.int32)
    labels, counts = masses.count_labels(values)
    expected, numbers = np.unique(values, return_counts=True)
    assert np.array_equal(labels, expected)
    assert np.array_equal(counts, numbers)
    assert labels.dtype == np.int32


class ChangingMap:
    """A map of one voxel, in memory, in a tensor or on disk, and a sampler of it."""

    def __init__(self, kind: Any, dtype: str, place: str, folder: Path) -> None:
        values = np.zeros((40, 40), dtype)
        self._values: Any = values
        source: Any = values
        if place == "tensor":
            source = torch.from_numpy(values[None])
        elif place != "array":
            self._values = zarr.create_array(
                folder / "map.zarr", data=values, chunks=(8, 8), shards=(16, 16) if place == "sharded" else None
            )
            source = self._values if place == "zarr" else folder / "map.zarr"
        self._at = (10, 10)
        self._values[self._at] = 1
        self.subject = oocpatch.Subject(t1=np.zeros((40, 40)), chances=source)
        self.sampler = kind(self.subject, 3, "chances", num_patches=6, seed=0)

    def move(self, at: tuple[int, int]) -> None:
        self._values[self._at] = 0
        self._values[at] = 1
        self._at = at

    def centres(self, patches: Any) -> set[tuple[int, ...]]:
        return {tuple(i + 1 for i in patch.patch_location.index) for patch in patches}


@pytest.mark.parametrize("place", ["array", "tensor", "path", "zarr", "sharded"])
@pytest.mark.parametrize(("kind", "dtype"), [(oocpatch.WeightedSampler, "f4"), (oocpatch.LabelSampler, "u1")])
def test_each_epoch_draws_from_the_map_as_it_is_then(kind: Any, dtype: str, place: str, tmp_path: Path) -> None:
    """A training loop may update its map: hard examples, or what an annotator has just marked."""
    chances = ChangingMap(kind, dtype, place, tmp_path)
    subject, sampler = chances.subject, chances.sampler
    assert chances.centres(sampler) == {(10, 10)}
    for at in ((30, 30), (10, 11), (38, 38)):
        chances.move(at)
        assert chances.centres(sampler) == {at}
    chances.move((5, 6))
    assert chances.centres(sampler(subject, 3)) == {(5, 6)}
    queue = oocpatch.Queue([subject], sampler, patches_per_volume=3, num_workers=2)
    assert chances.centres(queue) == {(5, 6)}
    chances.move((7, 8))
    assert chances.centres(queue) == {(7, 8)}
    loader = torch.utils.data.DataLoader(sampler, batch_size=None, num_workers=1)
    chances.move((20, 20))
    assert chances.centres(loader) == {(20, 20)}


def test_a_map_that_has_not_changed_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chances = ChangingMap(oocpatch.LabelSampler, "u1", "path", tmp_path)
    reads: list[Any] = []
    read = oocpatch.Volume.read
    monkeypatch.setattr(oocpatch.Volume, "read", lambda self, *a: (reads.append(a), read(self, *a))[1])
    assert len(list(chances.sampler)) == 6
    assert len([box for box, *_ in reads if box.shape != (3, 3)]) == 26  # 25 cells, and one of them to draw from
    reads.clear()
    assert len(list(chances.sampler)) == len(reads) // 2 == 6
