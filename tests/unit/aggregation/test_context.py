"""Outputs that are smaller than their patches by a border, or at another scale with odd overlaps: every voxel right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import oocpatch
from oocpatch import GridSampler, PatchAggregator, PatchGrid, PatchLocation, Subject
from oocpatch.planning.heads import patch_grid
from tests.support.aggregation import Loop, add, assert_as_expected, location, loops_with_context
from tests.support.cases import MODES, law, scratch

Ints = tuple[int, ...]


@law(40)
@given(loop=loops_with_context(), on_disk=st.booleans())
def test_a_loop_with_a_context_gives_what_the_oracle_says(loop: Loop, on_disk: bool) -> None:
    with scratch() as root:
        aggregator = loop.aggregator(store=root / "out.zarr" if on_disk else None)
        add(aggregator, loop.patches, 3, context=loop.context)
        assert_as_expected(aggregator.get_output().numpy(), loop)
        if on_disk and (any(loop.overlap) or loop.mode == "crop"):
            assert not (root / "out.zarr.oocpatch").exists(), "all patches of a grid are there: the output is complete"
        aggregator.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("store", [None, "out.zarr"])
def test_convolutions_without_padding_give_those_of_the_whole_padded_volume(
    mode: str, store: str | None, tmp_path: Path
) -> None:
    """Three voxels are lost on each side; a loop that ends in the middle goes on."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 5), torch.nn.ReLU(), torch.nn.Conv2d(3, 2, 3)).requires_grad_(False)
    volume = np.random.default_rng(0).standard_normal((29, 23), np.float32)
    whole = torch.nn.functional.pad(torch.from_numpy(volume)[None, None], (3,) * 4, mode="reflect")
    sampler = GridSampler(Subject(t1=volume), 12, 8, "reflect")
    options: dict[str, Any] = {"context": 3, "output_chunks": 8, "store": store and tmp_path / store}
    if store is not None:
        with PatchAggregator(volume.shape, mode, 8, **options) as aggregator:
            for batch in list(DataLoader(sampler, batch_size=3))[:5]:
                aggregator.add_batch(net(batch.t1.data), batch.patch_location)
        assert len(sampler.without(PatchAggregator(volume.shape, mode, 8, **options).done)) == len(sampler) - 15
    aggregator = PatchAggregator(volume.shape, mode, 8, **options)
    for batch in DataLoader(sampler.without(aggregator.done), batch_size=3):
        aggregator.add_batch(net(batch.t1.data), batch.patch_location)
    torch.testing.assert_close(aggregator.get_output(), net(whole)[0], rtol=1e-4, atol=1e-5)
    assert all(place in aggregator.done for place in sampler.locations)
    aggregator.close()


def test_a_store_of_another_context_is_refused(tmp_path: Path) -> None:
    aggregator = PatchAggregator((20,), "hann", 8, context=2, store=tmp_path / "out.zarr")
    aggregator.add_batch(torch.ones(1, 1, 8), [PatchLocation((0,), (12,))])
    aggregator.close()
    with pytest.raises(oocpatch.RunMismatch, match="context"):
        PatchAggregator((20,), "hann", 8, context=3, store=tmp_path / "out.zarr")


def test_without_padding_the_border_that_no_output_reaches_is_zero() -> None:
    aggregator = PatchAggregator((10,), "crop", 4, context=1)
    for start in (0, 2, 4):
        aggregator.add_batch(torch.ones(1, 1, 4), [PatchLocation((start,), (6,))])
    assert aggregator.get_output()[0].tolist() == [0] + [1] * 8 + [0]


def seams(patches: torch.Tensor, up: int, down: int, context: int) -> torch.Tensor:
    """A model of another scale whose values also say which voxel of the patch's output they are."""
    x = patches[..., *(slice(context, n - context) for n in patches.shape[2:])]
    for axis in range(2, x.ndim):
        x = x.unflatten(axis, (x.shape[axis] // down, down)).mean(axis + 1).repeat_interleave(up, axis)
    return x + 10 * sum(torch.arange(n).reshape(-1, *[1] * i) * 100**i for i, n in enumerate(x.shape[:1:-1]))


@pytest.mark.parametrize("mode", ["crop", "hann"])
@pytest.mark.parametrize(
    ("length", "patch", "overlap", "scale", "context"),
    [
        (20, 8, 2, (1, 2), 0),  # one voxel of overlap in the output
        (20, 8, 6, (1, 2), 0),  # three
        (24, 12, 4, (1, 4), 0),
        (15, 6, 3, (2, 1), 0),
        (15, 6, 1, (2, 1), 0),
        (16, 6, 3, (3, 1), 0),
        (17, 7, 5, (1, 1), 2),
        (17, 9, 4, (1, 1), 2),
        (17, 9, 7, (1, 1), 2),
        (17, 9, 5, (2, 1), 1),
        (20, 12, 6, (1, 2), 2),
    ],
)
def test_the_same_grid_gives_what_predict_gives_at_any_scale_context_and_overlap(  # noqa: PLR0917
    length: int, patch: int, overlap: int, scale: tuple[int, int], context: int, mode: str, tmp_path: Path
) -> None:
    up, down = scale
    shape = (length, length)
    volume = np.random.default_rng(0).random(shape, np.float32)
    expected = oocpatch.predict(
        volume,
        lambda patches: seams(patches, up, down, context),
        tmp_path / "out",
        patch_size=patch,
        patch_overlap=overlap,
        overlap_mode=mode,
        progress=False,
        model_id="seams",
    )
    sizes = ((patch,) * 2, (overlap,) * 2, (context,) * 2, (down,) * 2)
    grid = PatchGrid(tuple(axis.grown(context) for axis in patch_grid(shape, *sizes).axes))
    aggregator = PatchAggregator(shape, mode, overlap, expected.shape, context=context)
    source = oocpatch.Volume(volume)
    for place in grid:
        patches = torch.from_numpy(source.read(place.box, "edge"))[None]
        aggregator.add_batch(seams(patches, up, down, context), [place])
    found = aggregator.get_output()[0].numpy()
    if mode == "crop":
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@law(40)
@given(
    data=st.data(),
    mode=st.sampled_from(MODES),
    scale=st.sampled_from(((1, 2), (1, 3), (1, 4), (2, 3), (3, 2), (2, 1))),
)
def test_a_padded_grid_with_a_context_leaves_no_hole_at_any_scale(
    data: st.DataObject, mode: str, scale: tuple[int, int]
) -> None:
    up, down = scale
    inner, context = down * data.draw(st.integers(2, 24 // down)), data.draw(st.integers(0, 6))
    size = inner + 2 * context
    length = data.draw(st.integers(size, 80))
    overlap = data.draw(st.integers(2 * context, size - 1))
    grid = PatchGrid.of((length,), (size,), (overlap,), padded=True)
    out = data.draw(st.sampled_from(sorted({max(1, length * up // down), -(-length * up // down)})))
    aggregator = PatchAggregator((length,), mode, overlap, (out,), context=context)
    for place in grid:
        aggregator.add_batch(torch.ones(1, 1, inner * up // down), [place])
    assert aggregator.get_output()[0].tolist() == pytest.approx([1] * out, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 3, "patch_overlap": 4}, r"context must be at most half of patch_overlap, got \(3,\) and \(4,\)"),
        ({"context": 1}, r"context must be at most half of patch_overlap"),
        ({"context": -1}, "context must"),
    ],
)
def test_a_context_that_leaves_holes_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchAggregator((20,), **arguments)


def test_outputs_of_another_size_than_the_context_says_are_refused() -> None:
    place = PatchLocation((0,), (12,))
    with pytest.raises(ValueError, match=r"size of its locations less the context, got \(12,\) for \(8,\)"):
        PatchAggregator((20,), "hann", 8, context=2).add_batch(torch.ones(1, 1, 12), [place])
    with pytest.raises(ValueError, match=r"got \(8,\) for \(12,\); pass output_shape .* or context when it drops"):
        PatchAggregator((20,), "hann", 8).add_batch(torch.ones(1, 1, 8), [place])
    with pytest.raises(ValueError, match=r"context must be smaller than half of a patch on every axis, got \(2,\)"):
        PatchAggregator((20,), "hann", context=2).add_batch(torch.ones(1, 1, 8), [PatchLocation((0,), (4,))])


def test_patches_of_two_subjects_do_not_meet_in_one_aggregator() -> None:
    aggregator = PatchAggregator((8,), "average")
    places = [PatchLocation((4 * i,), (4,), i) for i in (0, 1)]
    with pytest.raises(ValueError, match=r"one subject, got subject_index 0 and 1; use an aggregator for each"):
        aggregator.add_batch(torch.ones(2, 1, 4), places)
    aggregator.add_batch(torch.ones(1, 1, 4), places[1:])
    with pytest.raises(ValueError, match=r"one subject, got subject_index 0 and 1"):
        aggregator.add_batch(torch.ones(1, 1, 4), places[:1])
    aggregator.add_batch(torch.ones(1, 1, 4), [location(((0,), np.ones((1, 4))))])
    assert aggregator.get_output()[0].tolist() == [1] * 8
