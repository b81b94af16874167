"""Promises of the grid sampler: TorchIO's grid where TorchIO is right, in the volume's own frame, lazily."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest
import torch
import torchio
import zarr
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import oocpatch
from tests.support.cases import law
from tests.support.draws import torchio_subject

Ints = tuple[int, ...]
VOLUME = np.arange(10 * 9 * 8, dtype=np.float32).reshape(10, 9, 8)


def indices(sampler: oocpatch.GridSampler) -> list[Ints]:
    return [location.index for location in sampler.locations]


@st.composite
def grids(draw: st.DrawFn) -> tuple[Ints, Ints, Ints]:
    """A volume, a patch that fits, an even overlap that is smaller: what TorchIO gets right."""
    shape = draw(st.tuples(*[st.integers(1, 12)] * 3))
    patch = tuple(draw(st.integers(1, n)) for n in shape)
    overlap = tuple(2 * draw(st.integers(0, (p - 1) // 2)) for p in patch)
    return shape, patch, overlap


@law(200)
@given(grids())
def test_locations_are_those_of_torchio(case: tuple[Ints, Ints, Ints]) -> None:
    shape, patch, overlap = case
    data = np.zeros(shape, np.float32)
    ours = oocpatch.GridSampler(oocpatch.Subject(t1=data), patch, overlap)
    theirs = torchio.GridSampler(torchio_subject(t1=data), patch, overlap)
    assert indices(ours) == [location.index for location in theirs.locations]
    assert len(ours) == len(ours.locations) == len(theirs)
    assert [location.index_fin for location in ours.locations] == [location.index_fin for location in theirs.locations]


@law(100)
@given(grids(), st.sampled_from(["constant", "edge", "reflect"]))
def test_padded_patches_are_those_of_torchio_in_the_frame_of_the_volume(
    case: tuple[Ints, Ints, Ints], mode: str
) -> None:
    """TorchIO's locations are in the padded frame: half an overlap further."""
    shape, patch, overlap = case
    data = np.random.default_rng(0).random(shape, np.float32)
    if mode == "reflect" and any(o // 2 >= n for o, n in zip(overlap, shape, strict=True)):
        return  # torch cannot reflect further than the volume is long
    ours = oocpatch.GridSampler(oocpatch.Subject(t1=data), patch, overlap, mode, fill=5)
    padded = np.pad(data, [(o // 2, o // 2) for o in overlap], mode=mode, **({"constant_values": 5} if mode == "constant" else {}))  # fmt: skip # noqa: E501
    theirs = torchio.GridSampler(torchio_subject(t1=padded), patch, overlap)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        shifted = tuple(i + o // 2 for i, o in zip(mine.patch_location.index, overlap, strict=True))
        assert shifted == other.patch_location.index
        assert np.array_equal(mine.t1.data.numpy(), other.t1.data.numpy())


def test_torchio_gives_padded_locations_in_another_frame() -> None:
    """The divergence: with padding, the first patch begins before the volume; TorchIO says it begins at 0."""
    theirs = torchio.GridSampler(torchio_subject(t1=VOLUME), 4, 2, padding_mode="constant")
    ours = oocpatch.GridSampler(oocpatch.Subject(t1=VOLUME), 4, 2, padding_mode="constant")
    assert theirs.locations[0].index == (0, 0, 0)
    assert theirs.subject.spatial_shape == (12, 11, 10)
    assert ours.locations[0].index == (-1, -1, -1)
    assert ours[0].t1.data[0, 1, 1, 1] == VOLUME[0, 0, 0]
    assert ours[0].t1.data[0, 0].abs().sum() == 0


def test_the_first_example_of_torchio() -> None:
    sampler = oocpatch.GridSampler(oocpatch.Subject(t1=np.zeros((10, 20, 30))), (5, 20, 20), (2, 4, 6))
    assert indices(sampler) == [(z, 0, x) for z in (0, 3, 5) for x in (0, 10)]


@pytest.mark.parametrize(
    ("patch", "overlap", "message", "torchio_makes"),
    [
        (4, 4, "smaller than patch_size", 7 * 6 * 5),
        (4, 6, "smaller than patch_size", 7 * 6 * 5),
        (4, (0, 1, 0), r"even on every axis, got \(0, 1, 0\)", 3 * 3 * 2),
        ((4, 12, 4), 0, r"not be larger than the volume .* got \(4, 12, 4\) for .* \(10, 9, 8\)", 3 * 1 * 2),
    ],
)
def test_what_torchio_lets_pass_in_silence_is_refused(
    patch: int | Ints, overlap: int | Ints, message: str, torchio_makes: int
) -> None:
    assert len(torchio.GridSampler(torchio_subject(t1=VOLUME), patch, overlap)) == torchio_makes
    with pytest.raises(ValueError, match=message):
        oocpatch.GridSampler(oocpatch.Subject(t1=VOLUME), patch, overlap)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1"),
        ({"patch_size": (4, 4)}, ValueError, r"one value per spatial axis .* got \(4, 4\)"),
        ({"patch_size": 2.5}, TypeError, "patch_size must be an int"),
        ({"patch_size": 4, "patch_overlap": -2}, ValueError, "patch_overlap must be at least 0"),
        ({"patch_size": 4, "padding_mode": "mirror"}, ValueError, "padding_mode must be one of constant, .* 'mirror'"),
    ],
)
def test_bad_sizes_are_refused(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        oocpatch.GridSampler(oocpatch.Subject(t1=VOLUME), **arguments)


def test_with_padding_a_patch_may_be_larger_than_the_volume() -> None:
    sampler = oocpatch.GridSampler(oocpatch.Subject(t1=np.arange(3)), 8, 4, padding_mode="edge")
    assert indices(sampler) == [(-2,)]
    assert sampler[0].t1.data.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2]]


def test_every_voxel_comes_back_in_any_number_of_axes() -> None:
    for shape in ((9,), (9, 7), (5, 6, 7), (3, 4, 5, 4)):
        data = np.arange(np.prod(shape)).reshape(shape)
        names = "abcd".replace("c", "e")[: len(shape)]
        sampler = oocpatch.GridSampler(oocpatch.Subject(t1=oocpatch.Volume(data, names)), 3, 2)
        seen = np.full(shape, -1)
        for patch in sampler:
            seen[patch.patch_location.to_slices()] = patch.t1.data[0].numpy()
        assert np.array_equal(seen, data)


def test_locations_are_a_sequence() -> None:
    locations = oocpatch.GridSampler(oocpatch.Subject(t1=np.zeros(10)), 4, 2).locations
    assert [location.index for location in locations] == [(0,), (2,), (4,), (6,)]
    assert locations[-1] == locations[3] == locations[np.int64(3)]
    assert [location.index for location in locations[1::2]] == [(2,), (6,)]
    assert locations.index(locations[2]) == 2
    assert locations[2] in locations
    assert [location.index for location in reversed(locations)] == [(6,), (4,), (2,), (0,)]
    for outside in (4, -5):
        with pytest.raises(IndexError, match=r"\[-4, 4\)"):
            _ = locations[outside]


def test_patches_are_in_the_order_of_the_locations_with_random_access() -> None:
    sampler = oocpatch.GridSampler(oocpatch.Subject(t1=VOLUME, age=45), 4, 2)
    for i in (0, 17, len(sampler) - 1, -1):
        patch = sampler[i]
        assert patch.patch_location == sampler.locations[i]
        assert np.array_equal(patch.t1.data[0].numpy(), VOLUME[patch.patch_location.to_slices()])
        assert patch.age == 45
    assert len(list(sampler)) == len(sampler)


def test_a_million_patches_cost_nothing(tmp_path) -> None:
    zarr.create_array(tmp_path / "a.zarr", shape=(6400,) * 3, chunks=(64,) * 3, dtype="uint8")
    tracemalloc.start()
    sampler = oocpatch.GridSampler(oocpatch.Subject(t1=tmp_path / "a.zarr"), 64)
    assert len(sampler) == 10**6
    assert sampler.locations[-1].index == (6336,) * 3
    assert sampler.locations[123_456].index == (12 * 64, 34 * 64, 56 * 64)
    assert len(sampler.locations[10:]) == 10**6 - 10
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    assert len(pickle.dumps(sampler)) < 2**14


@law(50)
@given(grids(), st.sets(st.integers(0, 200)), st.sets(st.integers(0, 200)))
def test_an_interrupted_loop_goes_on_with_exactly_what_is_left(
    case: tuple[Ints, Ints, Ints], done: set[int], more: set[int]
) -> None:
    shape, patch, overlap = case
    sampler = oocpatch.GridSampler(oocpatch.Subject(t1=np.zeros(shape)), patch, overlap)
    everything = list(sampler.locations)
    first = {location for i, location in enumerate(everything) if i in done}
    second = {location for i, location in enumerate(everything) if i in more}
    rest = sampler.without(first)
    assert list(rest.locations) == [location for location in everything if location not in first]
    assert [patch.patch_location for patch in rest] == list(rest.locations)
    assert list(rest.without(second).locations) == [l for l in everything if l not in first | second]  # noqa: E741
    assert list(sampler.locations) == everything


def test_what_is_left_takes_eight_bytes_a_patch() -> None:
    sampler = oocpatch.GridSampler(oocpatch.Subject(t1=np.zeros(100_000, np.uint8)), 1)
    rest = sampler.without({sampler.locations[7]})
    assert len(rest) == 99_999
    assert rest.locations[7].index == (8,)
    assert rest.locations.numbers.nbytes == 8 * 99_999
    assert torch.equal(rest[-1].t1.data, torch.zeros(1, 1, dtype=torch.uint8))


# Grids of several subjects


def several() -> list[oocpatch.Subject]:
    """Subjects of different shapes, whose voxels all differ."""
    random, shapes = np.random.default_rng(0), [(9, 7, 8), (5, 12, 6), (6, 6, 6)]
    return [oocpatch.Subject(t1=random.random(shape, np.float32), name=i) for i, shape in enumerate(shapes)]


def test_the_grids_of_several_subjects_follow_each_other_with_the_index_of_each() -> None:
    subjects = several()
    together = oocpatch.GridSampler.of(subjects, (4, 3, 5), 2)
    alone = [
        (i, patch.patch_location.index, patch.t1.data, patch.name)
        for i, subject in enumerate(subjects)
        for patch in oocpatch.GridSampler(subject, (4, 3, 5), 2)
    ]
    assert len(together) == len(together.locations) == len(alone) > 30
    for number, (i, index, data, name) in enumerate(alone):
        patch = together[number]
        assert (patch.patch_location.subject_index, patch.patch_location.index, patch.name) == (i, index, name)
        assert patch.patch_location == together.locations[number]
        assert torch.equal(patch.t1.data, data)
    assert together.locations[-1].subject_index == 2
    assert [place.subject_index for place in together.locations[: len(alone) : 10]] == [a[0] for a in alone[::10]]
    with pytest.raises(IndexError, match="patch index must be in"):
        together[len(alone)]


@pytest.mark.parametrize(("mode", "padding"), [("crop", None), ("crop", "reflect"), ("average", "edge")])
def test_aggregators_by_subject_get_each_voxel_of_each_subject_once(mode: str, padding: str | None) -> None:
    subjects = several()
    sampler = oocpatch.GridSampler.of(subjects, (4, 3, 5), 2, padding)
    aggregators = [oocpatch.PatchAggregator(s.spatial_shape, mode, 2, output_chunks=4) for s in subjects]
    for batch in DataLoader(sampler, batch_size=7, shuffle=True):
        for data, place in zip(batch.t1.data, batch.patch_location, strict=True):
            aggregators[place.subject_index].add_batch(data[None], [place])
    for subject, aggregator in zip(subjects, aggregators, strict=True):
        expected = subject.t1.read(oocpatch.planning.box.Box.of_shape(subject.spatial_shape))
        np.testing.assert_allclose(aggregator.get_output(), expected, rtol=1e-6 if mode == "average" else 0)
        assert aggregator.num_repeated == 0


def test_a_loop_over_several_subjects_goes_on_with_what_is_left() -> None:
    subjects = several()
    sampler = oocpatch.GridSampler.of(subjects, (4, 3, 5), 2)
    done: list[set[oocpatch.PatchLocation]] = [set(), set(), set()]
    for place in list(sampler.locations)[::3]:
        done[place.subject_index or 0].add(place)
    rest = sampler.without(*done)
    assert list(rest.locations) == [place for i, place in enumerate(sampler.locations) if i % 3]
    assert list(sampler.without(set().union(*done)).locations) == list(rest.locations)
    assert torch.equal(
        rest[-1].t1.data, sampler[len(sampler) - 2].t1.data if len(sampler) % 3 == 1 else sampler[-1].t1.data
    )
    with pytest.raises(ValueError, match="one for each of 3 subjects, got 2"):
        sampler.without(done[0], done[1])


def test_grids_of_many_large_subjects_cost_nothing() -> None:
    volume = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (4000, 4000, 4000), (0, 0, 0))
    subjects = [
        oocpatch.Subject(t1=oocpatch.Volume(zarr.create_array({}, shape=volume.shape, chunks=(64,) * 3, dtype="u1")))
    ] * 20
    tracemalloc.start()
    sampler = oocpatch.GridSampler.of(subjects, 8, 4)
    assert len(sampler) == 20 * 999**3
    assert sampler.locations[19 * 999**3 + 5] == oocpatch.PatchLocation((0, 0, 20), (8, 8, 8), 19)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert len(pickle.dumps(sampler.locations)) < 5000


def test_a_subject_that_a_grid_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"subject 1: patch_size must not be larger .* got \(6, 6, 6\)"):
        oocpatch.GridSampler.of(several(), 6)
    with pytest.raises(ValueError, match="at least one subject, got none"):
        oocpatch.GridSampler.of([], 6)


def test_a_grid_can_be_asked_for_another_subject() -> None:
    first, second, _ = several()
    sampler = oocpatch.GridSampler(first, 4, 2, "edge")
    expected = [patch.patch_location.index for patch in oocpatch.GridSampler(second, 4, 2, "edge")]
    assert [patch.patch_location.index for patch in sampler(second)] == expected
    assert [patch.patch_location.index for patch in sampler(second, 3)] == expected[:3]
    assert not list(sampler(second, 0))
