"""Promises of the uniform sampler, and of all random samplers: counts, seeds, epochs."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchio
import zarr
from hypothesis import given
from hypothesis import strategies as st

import oocpatch
from tests.support.cases import law
from tests.support.draws import assert_fits, corners, drawn, torchio_subject

Ints = tuple[int, ...]
SUBJECT = oocpatch.Subject(t1=np.arange(40 * 30).reshape(40, 30))


@pytest.mark.parametrize(
    ("shape", "patch"), [((9,), 4), ((9,), 9), ((7, 6), (3, 2)), ((5, 6, 7), (2, 3, 4)), ((3, 4, 3, 4), 2)]
)
@pytest.mark.parametrize("together", [(1, 0), (3, 0), (3, 2)], ids=["alone", "first-of-three", "last-of-three"])
def test_every_valid_corner_is_equally_likely(shape: Ints, patch: int | Ints, together: tuple[int, int]) -> None:
    volume = oocpatch.Volume(np.zeros(shape), "abde"[: len(shape)])
    sampler = oocpatch.UniformSampler(oocpatch.Subject(t1=volume), patch)
    valid = list(itertools.product(*(range(n - p + 1) for n, p in zip(shape, sampler.patch_size, strict=True))))
    counts = drawn(sampler, 4000, together=together[0], which=together[1])
    if len(valid) == 1:
        assert counts == {valid[0]: 4000}
    else:
        assert_fits(counts, dict.fromkeys(valid, 1 / len(valid)))


def test_corners_drawn_together_lie_in_two_chunks_per_axis(tmp_path: Path) -> None:
    for name, chunks in (("large", (16, 8)), ("small", (4, 2))):
        zarr.create_array(tmp_path / name, shape=(40, 40), chunks=chunks, dtype="uint8")
        sampler = oocpatch.UniformSampler(oocpatch.Subject(t1=tmp_path / name), (8, 4))
        wide = tuple(max(c, p) for c, p in zip(chunks, (8, 4), strict=True))
        for i in range(50):
            places = np.array(sampler.draw(sampler.subject, np.random.default_rng(i), 8))
            assert (places.min(0) // wide == places.max(0) // wide).all()
            assert (places >= 0).all()
            assert (places <= (32, 36)).all()


def test_patches_hold_the_voxels_at_their_location() -> None:
    data = np.arange(40 * 30).reshape(40, 30)
    for patch in oocpatch.UniformSampler(SUBJECT, (7, 8), num_patches=20):
        assert np.array_equal(patch.t1.data[0].numpy(), data[patch.patch_location.to_slices()])


def test_torchio_draws_from_the_same_corners() -> None:
    data = np.zeros((5, 6, 4), np.float32)
    torch.manual_seed(0)
    theirs = Counter(corners(torchio.UniformSampler(torchio_subject(t1=data), (3, 4, 4), num_patches=600)))
    ours = drawn(oocpatch.UniformSampler(oocpatch.Subject(t1=data), (3, 4, 4)), 600)
    assert set(ours) == set(theirs)
    assert_fits(theirs, dict.fromkeys(ours, 1 / len(ours)))


@law(50)
@given(st.integers(0, 30), st.integers(1, 30))
def test_counts_are_those_of_torchio(in_all: int, asked_for: int) -> None:
    small = np.zeros((3, 3, 3), np.float32)
    theirs = torchio.UniformSampler(torchio_subject(t1=small), 2, num_patches=in_all or None)
    ours = oocpatch.UniformSampler(oocpatch.Subject(t1=small), 2, num_patches=in_all or None)
    assert len(list(ours(ours.subject, asked_for))) == len(list(theirs(theirs.subject, asked_for))) == asked_for
    if in_all:
        assert len(list(ours)) == len(list(theirs)) == len(list(ours(ours.subject))) == in_all
    else:
        assert len(list(itertools.islice(ours, 50))) == len(list(itertools.islice(theirs, 50))) == 50


def test_no_patches_are_none_where_torchio_has_no_end() -> None:
    theirs = torchio.UniformSampler(torchio_subject(t1=np.zeros((3, 3, 3), np.float32)), 2)
    assert len(list(itertools.islice(theirs(theirs.subject, 0), 1000))) == 1000
    sampler = oocpatch.UniformSampler(SUBJECT, 2, num_patches=0)
    assert list(sampler) == []
    assert list(sampler(SUBJECT)) == []
    assert list(oocpatch.UniformSampler(SUBJECT, 2)(SUBJECT, 0)) == []


def test_the_same_seed_gives_the_same_patches_whatever_torch_does() -> None:
    one, other = (oocpatch.UniformSampler(SUBJECT, 4, num_patches=20, seed=3) for _ in range(2))
    torch.manual_seed(0)
    first = corners(one)
    torch.manual_seed(1)
    assert corners(other) == first
    assert corners(oocpatch.UniformSampler(SUBJECT, 4, num_patches=20, seed=4)) != first


def test_without_a_seed_torch_manual_seed_governs() -> None:
    sampler = oocpatch.UniformSampler(SUBJECT, 4, num_patches=20)
    torch.manual_seed(0)
    first, second = corners(sampler), corners(sampler)
    torch.manual_seed(0)
    assert [corners(sampler), corners(sampler)] == [first, second]
    torch.manual_seed(1)
    assert corners(sampler) != first
    assert first != second


def test_more_patches_begin_with_the_same_ones() -> None:
    few, many = (oocpatch.UniformSampler(SUBJECT, 4, num_patches=n, seed=0) for n in (5, 9))
    assert corners(many)[:5] == corners(few)


def test_each_pass_is_another_epoch_and_set_epoch_goes_to_one() -> None:
    sampler = oocpatch.UniformSampler(SUBJECT, 4, num_patches=20, seed=0)
    passes = [corners(sampler) for _ in range(3)]
    assert passes[0] != passes[1] != passes[2] != passes[0]
    sampler.set_epoch(1)
    assert [corners(sampler), corners(sampler)] == passes[1:]
    sampler.set_epoch(0)
    assert corners(sampler) == passes[0]
    copy = pickle.loads(pickle.dumps(sampler))  # noqa: S301 - our own
    assert corners(copy) == passes[0]
    unseeded = oocpatch.UniformSampler(SUBJECT, 4, num_patches=20)
    drawn_at = {}
    for epoch in (0, 1):
        torch.manual_seed(0)
        unseeded.set_epoch(epoch)
        drawn_at[epoch] = corners(unseeded)
    assert drawn_at[0] != drawn_at[1]


def test_a_sampler_draws_from_any_subject() -> None:
    template = oocpatch.UniformSampler(SUBJECT, 4, seed=0)
    other = oocpatch.Subject(label=np.ones((4, 5), np.uint8), name="other")
    patches = list(template(other, 10))
    assert {patch.patch_location.index for patch in patches} == {(0, 0), (0, 1)}
    assert {patch.name for patch in patches} == {"other"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 31}, r"not be larger than the volume, got \(31, 31\) for a volume of shape \(40, 30\)"),
        ({"patch_size": (4, 4, 4)}, "one value per spatial axis"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"patch_size": 4, "num_patches": -1}, "num_patches must be an int of at least 0, or None .* got -1"),
        ({"patch_size": 4, "num_patches": 2.5}, "num_patches must be an int"),
        ({"patch_size": 4, "seed": -1}, "seed must be an int of at least 0, got -1"),
        ({"patch_size": 4, "seed": "a"}, "seed must be an int of at least 0, got 'a'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oocpatch.UniformSampler(SUBJECT, **arguments)


def test_a_call_on_a_subject_that_does_not_fit_is_refused_at_once() -> None:
    sampler = oocpatch.UniformSampler(SUBJECT, 8)
    for shape in ((7, 9), (9,), (9, 9, 9)):
        with pytest.raises(ValueError, match="not be larger than the volume"):
            sampler(oocpatch.Subject(t1=np.zeros(shape)))
    with pytest.raises(ValueError, match="epoch must be an int of at least 0"):
        sampler.set_epoch(-1)
