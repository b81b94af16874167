"""`PatchAggregator` beside that of TorchIO 2.0.0a2: the same where TorchIO is right, and right where it is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchio
from hypothesis import given
from hypothesis import strategies as st

import oocpatch
from oocpatch import PatchAggregator, PatchLocation
from tests.support import aggregation
from tests.support.aggregation import add
from tests.support.cases import law


def theirs(shape: tuple[int, ...], mode: str, overlap: Any, patches: list[aggregation.Patch]) -> torch.Tensor:
    """What TorchIO makes of patches, in this order."""
    aggregator = torchio.PatchAggregator(shape, mode, overlap)
    for start, values in patches:
        location = torchio.data.patch.PatchLocation(start, values.shape[1:])
        aggregator.add_batch(torch.from_numpy(values)[None], [location])
    output: torch.Tensor = aggregator.get_output()
    return output


@law(80)
@given(data=st.data(), mode=st.sampled_from(("crop", "average")), channels=st.integers(1, 3))
def test_crop_and_average_are_those_of_torchio_in_any_order(data: st.DataObject, mode: str, channels: int) -> None:
    shape = tuple(data.draw(st.integers(1, 12)) for _ in range(3))
    size = tuple(data.draw(st.integers(1, n)) for n in shape)
    overlap = tuple(2 * data.draw(st.integers(0, (p - 1) // 2)) for p in size)
    starts = aggregation.grid_starts(shape, size, overlap)
    patches = [(start, aggregation.values_at(start, size, channels, "float32")) for start in starts[:250]]
    expected = theirs(shape, mode, overlap, patches)
    aggregator = PatchAggregator(shape, mode, overlap, output_chunks=data.draw(st.integers(1, 12)))
    add(aggregator, data.draw(st.permutations(patches)), data.draw(st.integers(1, 4)))
    if mode == "crop":
        assert torch.equal(aggregator.get_output(), expected)
    else:
        torch.testing.assert_close(aggregator.get_output(), expected, rtol=1e-5, atol=1e-4)


def halves() -> list[aggregation.Patch]:
    starts = aggregation.grid_starts((64,) * 3, (32,) * 3, (16,) * 3)
    return [(start, np.ones((1, 32, 32, 32), np.float32)) for start in starts]


def test_hann_of_constant_volume_is_that_constant_where_torchio_clamps_the_weights() -> None:
    found = theirs((64,) * 3, "hann", 16, halves())
    assert found.mean().item() == pytest.approx(0.448, abs=5e-4)
    aggregator = PatchAggregator((64,) * 3, "hann", 16)
    add(aggregator, halves(), 4)
    torch.testing.assert_close(aggregator.get_output(), torch.ones(1, 64, 64, 64), rtol=1e-6, atol=0)


def bytes_of(value: int) -> list[aggregation.Patch]:
    return [((start, 0, 0), np.full((1, 8, 1, 1), value, np.uint8)) for start in (0, 4)]


def test_integers_do_not_wrap_and_can_be_blended() -> None:
    assert theirs((12, 1, 1), "average", 0, bytes_of(200)).flatten().tolist() == [200] * 4 + [72] * 4 + [200] * 4
    with pytest.raises(RuntimeError, match="can't be cast"):
        theirs((12, 1, 1), "hann", 0, bytes_of(200))
    for mode in ("average", "hann", "gaussian"):
        aggregator = PatchAggregator((12, 1, 1), mode)
        add(aggregator, bytes_of(200))
        assert aggregator.get_output().flatten().tolist() == pytest.approx([200] * 12, rel=1e-6)


@pytest.mark.parametrize("mode", ["crop", "average", "hann"])
def test_locations_of_a_padded_sampler_are_taken(mode: str) -> None:
    volume = np.random.default_rng(0).standard_normal((18, 12, 10)).astype(np.float32)
    subject = torchio.Subject(t1=torchio.ScalarImage(torch.from_numpy(volume)[None]))
    aggregator = torchio.PatchAggregator(volume.shape, mode, 4)
    last = torchio.GridSampler(subject, 8, 4, padding_mode="reflect")[-1]
    with pytest.raises(RuntimeError, match="size"):
        aggregator.add_batch(last.t1.data[None], [last.patch_location])
    ours = PatchAggregator(volume.shape, mode, 4)
    for found in oocpatch.GridSampler(oocpatch.Subject(t1=volume), 8, 4, padding_mode="reflect"):
        ours.add_batch(found.t1.data[None], [found.patch_location])
    torch.testing.assert_close(ours.get_output()[0], torch.from_numpy(volume), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "out", "size", "given_size", "overlap", "torchio_makes"),
    [
        (129, 33, 16, 4, 0, "holes at [24]"),
        (125, 32, 16, 4, 0, "holes at [24]"),
        (9, 3, 8, 2, 0, "an error"),
        (100, 33, 32, 10, 8, "an error"),
    ],
)
def test_any_output_shape_that_the_model_can_mean_is_filled(
    *, length: int, out: int, size: int, given_size: int, overlap: int, torchio_makes: str
) -> None:
    starts = aggregation.grid_starts((length, 1, 1), (size, 1, 1), (overlap, 0, 0))
    batch = torch.ones(1, 1, given_size, 1, 1)

    def filled(aggregator: Any, location: Any) -> list[float]:
        for start in starts:
            aggregator.add_batch(batch, [location(start, (size, 1, 1))])
        found: list[float] = aggregator.get_output().flatten().tolist()
        return found

    arguments: Any = ((length, 1, 1), "average", (overlap, 0, 0), (out, 1, 1))
    try:
        values = filled(torchio.PatchAggregator(*arguments), torchio.data.patch.PatchLocation)
    except RuntimeError:
        assert torchio_makes == "an error"
    else:
        assert torchio_makes == f"holes at {[i for i, v in enumerate(values) if v == 0]}"
    assert filled(PatchAggregator(*arguments), PatchLocation) == [1] * out


def constant(start: int, value: float) -> aggregation.Patch:
    return (start, 0, 0), np.full((1, 4, 1, 1), value, np.float32)


def test_a_patch_that_comes_again_counts_once_where_torchio_counts_it_twice() -> None:
    patches = [constant(0, 1), constant(0, 1), constant(2, 5)]
    assert theirs((6, 1, 1), "average", 0, patches).flatten()[2].item() == pytest.approx(7 / 3)
    aggregator = PatchAggregator((6, 1, 1), "average")
    add(aggregator, patches)
    assert aggregator.get_output().flatten().tolist() == [1, 1, 3, 3, 5, 5]


def test_the_order_of_arrival_does_not_matter_where_it_does_to_torchio() -> None:
    patches = [constant(0, 1), constant(2, 5)]
    orders = (patches, patches[::-1])
    assert [theirs((6, 1, 1), "crop", 0, p).flatten()[2].item() for p in orders] == [5, 1]
    for order in orders:
        aggregator = PatchAggregator((6, 1, 1), "crop")
        add(aggregator, order)
        assert aggregator.get_output().flatten().tolist() == [1, 1, 5, 5, 5, 5]


def test_a_batch_longer_than_its_locations_is_refused_where_torchio_drops_the_rest() -> None:
    batch = torch.ones(2, 1, 4, 1, 1)
    torchio.PatchAggregator((6, 1, 1)).add_batch(batch, [torchio.data.patch.PatchLocation((0, 0, 0), (4, 1, 1))])
    with pytest.raises(ValueError, match="batch must have one entry per location, got 2 and 1"):
        PatchAggregator((6, 1, 1)).add_batch(batch, [PatchLocation((0, 0, 0), (4, 1, 1))])


def test_locations_of_torchio_are_taken() -> None:
    subject = torchio.Subject(t1=torchio.ScalarImage(torch.arange(512.0).reshape(1, 8, 8, 8)))
    aggregator = PatchAggregator((8, 8, 8), "crop", 2)
    for patch in torchio.GridSampler(subject, 4, 2):
        aggregator.add_batch(patch.t1.data[None], [patch.patch_location])
    assert torch.equal(aggregator.get_output(), subject.t1.data)
