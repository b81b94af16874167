"""Promises on objects: whatever the shapes, blocks, connectivity and memory, they are those of the whole volume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oocpatch.objects import components, merge
from oocpatch.planning.labelling import Labelling
from tests.support.cases import law
from tests.support.objects import label_in_blocks, oracle, shapes_of_objects

LONGEST = {1: 40, 2: 16, 3: 10, 4: 6}


@dataclass(frozen=True)
class Objects:
    """A volume of objects, how they are found, and the blocks."""

    kind: str
    shape: tuple[int, ...]
    seed: int
    density: float
    rule: Labelling
    block: tuple[int, ...]

    @property
    def values(self) -> np.ndarray[Any, Any]:
        return shapes_of_objects(self.kind, self.shape, self.seed, self.density)


@st.composite
def objects(draw: st.DrawFn) -> Objects:
    ndim = draw(st.integers(1, 4))
    shape = tuple(draw(st.lists(st.integers(1, LONGEST[ndim]), min_size=ndim, max_size=ndim)))
    return Objects(
        kind=draw(st.sampled_from(("noise", "classes", "blobs", "comb", "spiral"))),
        shape=shape,
        seed=draw(st.integers(0, 1000)),
        density=draw(st.sampled_from((0.02, 0.2, 0.3116, 0.5, 0.8))),  # among them where noise percolates
        rule=Labelling(
            threshold=None,
            connectivity=draw(st.integers(1, ndim)),
            per_class=draw(st.booleans()),
            min_size=draw(st.sampled_from((0, 1, 2, 5))),
        ),
        block=tuple(draw(st.integers(1, n)) for n in shape),
    )


@given(case=objects(), scipy=st.booleans(), batch=st.sampled_from((3, 1 << 12)))
@law(120)
def test_objects_are_those_of_the_whole_volume_numbered_by_first_voxels(case: Objects, scipy: bool, batch: int) -> None:
    """With either library, and with memory for a few pairs at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(components, "PIECE", 10)
        patch.setattr(components, "ROW", 5)
        patch.setattr(merge, "SMALLEST_BATCH", batch)
        patch.setattr(merge, "MERGE_BATCH_BYTES", 1)
        patch.setattr(merge, "MERGE_NODE_BYTES", 0)
        if scipy:
            patch.setattr(components, "_cc3d", lambda: None)
        labels, count = label_in_blocks(case.values, case.rule, case.block, max_memory=batch)
    expected, number = oracle(case.values, case.rule)
    assert count == number
    np.testing.assert_array_equal(labels, expected)
    assert np.unique(labels[labels > 0]).tolist() == list(range(1, count + 1))
