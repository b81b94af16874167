"""Promises on the order of blocks, their division among parts, and the use of many workers."""

from __future__ import annotations

import heapq
import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from oocpatch.planning.schedule import TASK, division, in_order, occupancy

COUNTS = st.lists(st.integers(0, 60), max_size=40)


def largest_of_best_division(weights: list[float], parts: int) -> float:
    """The weight of the largest part in the best division into consecutive blocks, by trying all of them."""
    best = [0.0, *[float("inf")] * len(weights)]
    for _ in range(parts):
        best = [
            min(max(best[i], sum(weights[i:j])) for i in range(j + 1)) if j else 0.0 for j in range(len(weights) + 1)
        ]
    return best[-1]


@given(counts=COUNTS, parts=st.integers(1, 12))
def test_parts_cover_every_block_once_and_the_largest_is_as_small_as_can_be(counts: list[int], parts: int) -> None:
    array = np.array(counts, np.int32)
    ranges = division(array, parts)
    assert list(itertools.chain(*ranges)) == list(range(len(counts)))
    largest = max(sum(counts[i] + TASK for i in r) for r in ranges)
    assert largest <= largest_of_best_division([c + TASK for c in counts], parts) + TASK


@given(blocks=st.integers(0, 1000), count=st.integers(1, 40), patches=st.integers(0, 64))
def test_parts_of_equal_blocks_differ_by_one_block_at_most(blocks: int, count: int, patches: int) -> None:
    array = np.full(blocks, patches, np.int32)
    sizes = list(map(len, division(array, count)))
    assert sum(sizes) == blocks
    assert max(sizes) - min(sizes) <= 1


@given(counts=COUNTS, last=st.integers(0, 50))
def test_the_order_has_every_block_once_and_ends_with_the_smallest_of_the_last(counts: list[int], last: int) -> None:
    order = list(in_order(np.array(counts, np.int32), range(len(counts)), last))
    assert sorted(order) == list(range(len(counts)))
    first = max(0, len(counts) - last)
    assert order[:first] == list(range(first))
    assert [counts[i] for i in order[first:]] == sorted(counts[first:], reverse=True)


@given(counts=st.lists(st.integers(1, 60), min_size=1, max_size=40), workers=st.integers(1, 9))
def test_the_expected_use_is_that_of_workers_who_take_the_next_block_when_they_are_free(
    counts: list[int], workers: int
) -> None:
    seen = occupancy(np.array(counts, np.int32), len(counts), workers, 9.0)
    free = [0.0] * workers
    for count in sorted(counts, reverse=True):
        heapq.heappush(free, heapq.heappop(free) + count + TASK)
    assert np.isclose(1 - seen.idle, sum(c + TASK for c in counts) / (workers * max(free)))
    assert (seen.workers, seen.blocks, seen.bytes_each) == (workers, len(counts), 9.0 / workers)
