"""The list of places where TorchIO 2.0.0a2 is not right, or other: each row of the documentation has its evidence."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchio

import oocpatch
from tests.support.draws import torchio_subject

ROOT = Path(__file__).parents[2]
Location = torchio.data.patch.PatchLocation


def volumes(number: int = 1, shape: tuple[int, ...] = (10, 10, 10), dtype: str = "float32") -> list[Any]:
    return [torchio_subject(t1=np.zeros(shape, dtype)) for _ in range(number)]


def queue(**options: Any) -> Any:
    some = volumes(3)
    return torchio.Queue(some, torchio.UniformSampler(some[0], 2), patches_per_volume=4, **options)


def mixed_subjects() -> str:
    aggregator = torchio.PatchAggregator((4, 1, 1), "average")
    aggregator.add_batch(torch.ones(2, 1, 4, 1, 1), [Location((0, 0, 0), (4, 1, 1), index) for index in (0, 1)])
    return "mixed in silence"


def stride() -> str:
    return f"{len(torchio.GridSampler(volumes()[0], 4, 4))} patches of 4 in 10³ voxels"


def odd_overlap() -> str:
    assert len(torchio.GridSampler(volumes()[0], 4, 1)) == 27
    return "accepted in silence"


def large_patch() -> str:
    (patch,) = torchio.GridSampler(volumes()[0], 12)
    return f"a patch of 12 has {patch.t1.data.shape[1]} voxels; its location says {patch.patch_location.size[0]}"


def no_patches() -> str:
    sampler = torchio.UniformSampler(volumes()[0], 2, num_patches=5)
    endless = torchio.UniformSampler(volumes()[0], 2)
    assert len(list(sampler(volumes()[0], 0))) == 5
    assert len(list(itertools.islice(endless(volumes()[0], 0), 99))) == 99
    return "endless"


def even_patches() -> str:
    sampler = torchio.WeightedSampler(torchio_subject(map=np.ones((9, 9, 9), np.float32)), 4, "map")
    return f"{int((sampler._build_probability_map() > 0).sum())} of {6**3}"


def large_map() -> str:
    with pytest.raises(RuntimeError, match="2\\^24"):
        torch.multinomial(torch.zeros(1).expand(2**24 + 1), 1)
    return "`RuntimeError` beyond 2²⁴ voxels"


def channels() -> str:
    tensor = torch.stack([torch.zeros(3, 3, 3), torch.ones(3, 3, 3)])
    sampler = torchio.WeightedSampler(torchio.Subject(map=torchio.ScalarImage(tensor)), 1, "map")
    with pytest.raises(RuntimeError, match="all zeros"):
        next(iter(sampler))
    return "the first is taken"


def grid_in_a_queue() -> str:
    some = volumes(2)
    with pytest.raises(NotImplementedError):
        next(iter(torchio.Queue(some, torchio.GridSampler(some[0], 4))))
    return "`NotImplementedError`"


def transforms() -> str:
    calls = 0

    def counted(subject: Any) -> Any:
        nonlocal calls
        calls += 1
        return subject

    patches = len(list(queue(transform=counted)))
    return f"drawn {calls} times for {patches} patches of 3 subjects"


def seeds() -> str:
    orders = []
    for _ in range(3):
        torch.manual_seed(0)
        orders.append([patch.patch_location.index for patch in queue()])
    assert orders[0] != orders[1] or orders[1] != orders[2]
    return "the same `torch.manual_seed`, another order"


def memory() -> str:
    some = volumes(dtype="uint8")
    bytes_of_patches = torchio.Queue(some, torchio.UniformSampler(some[0], 2), max_length=1).max_memory
    return f"{bytes_of_patches // 2**3} bytes a voxel"


def subject_index() -> str:
    return str(next(iter(queue())).patch_location.subject_index)


AGGREGATOR = "tests/interop/test_aggregator_torchio.py::"
SAMPLING = "tests/unit/sampling/"
EVIDENCE: dict[str, str | Callable[[], str]] = {
    "`hann`": AGGREGATOR + "test_hann_of_constant_volume_is_that_constant_where_torchio_clamps_the_weights",
    "sums": AGGREGATOR + "test_integers_do_not_wrap_and_can_be_blended",
    "`padding_mode`": AGGREGATOR + "test_locations_of_a_padded_sampler_are_taken",
    "padding with statistics": "tests/interop/test_padding_torchio.py::"
    "test_statistics_leave_out_what_is_not_finite_where_torchio_pads_with_nan",
    "`output_shape` that is no multiple": AGGREGATOR + "test_any_output_shape_that_the_model_can_mean_is_filled",
    "patch added twice": AGGREGATOR + "test_a_patch_that_comes_again_counts_once_where_torchio_counts_it_twice",
    "order in `crop`": AGGREGATOR + "test_the_order_of_arrival_does_not_matter_where_it_does_to_torchio",
    "more outputs than locations": AGGREGATOR
    + "test_a_batch_longer_than_its_locations_is_refused_where_torchio_drops_the_rest",
    "two subjects in one aggregator": mixed_subjects,
    "overlap not smaller than the patch": stride,
    "odd overlap": odd_overlap,
    "patch larger than the volume": large_patch,
    "`num_patches=0` of a call": no_patches,
    "even patches of weighted samplers": even_patches,
    "their map": large_map,
    "map of several channels": channels,
    "labels below zero, without weights": SAMPLING
    + "test_weighted.py::test_labels_below_zero_are_labels_where_torchio_takes_them_for_background",
    "workers of a `DataLoader`": SAMPLING + "test_workers.py::test_workers_of_torchio_each_draw_all_patches",
    "grid in a `Queue`": grid_in_a_queue,
    "`Queue(max_length=20)`": SAMPLING + "test_queue.py::test_torchio_holds_all_patches_at_once",
    "`transform` of a `Queue`": transforms,
    "seed of a `Queue`": seeds,
    "`Queue.max_memory`": memory,
    "`subject_index` in a `Queue`": subject_index,
    "`patch_sampler`": SAMPLING + "test_queue.py::test_a_custom_sampler_chooses_the_patches",
}
"""By row of the table: a function that computes its figure with TorchIO, or the test that does."""


def rows() -> dict[str, str]:
    """What the documentation says of TorchIO, by row of its table of differences."""
    table = (ROOT / "docs" / "torchio.md").read_text().partition("\n## Differences\n")[2]
    cells = [re.split(r" *\| *", line.strip()) for line in table.splitlines() if line.startswith("| ")]
    return {row[1]: row[2] for row in cells if row[1]}


def test_each_difference_of_the_documentation_has_its_evidence() -> None:
    assert list(rows()) == list(EVIDENCE)


@pytest.mark.parametrize("row", EVIDENCE)
def test_the_figure_of_each_difference_is_what_torchio_gives(row: str) -> None:
    evidence = EVIDENCE[row]
    if isinstance(evidence, str):
        file, _, name = evidence.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text()
    else:
        assert evidence() in rows()[row]


def test_counterparts_of_two_of_them() -> None:
    """Those that no other test of ours has: as many draws as patches, and one order per seed."""
    some = [oocpatch.Subject(t1=np.zeros((10, 10, 10), np.float32)) for _ in range(3)]
    calls, orders = 0, []

    def counted(patch: Any) -> Any:
        nonlocal calls
        calls += 1
        return patch

    for _ in range(2):
        torch.manual_seed(0)
        both = oocpatch.Queue(some, oocpatch.UniformSampler(some[0], 2), patches_per_volume=4, transform=counted)
        orders.append([patch.patch_location.index for patch in both])
    assert calls == 24
    assert orders[0] == orders[1]
