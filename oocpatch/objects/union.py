"""Union of objects that touch, in bounded memory: pairs come in batches, each of which is contracted at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Union:
    """Sets of nodes, numbered from 0, that pairs of them join.

    Memory is 8 bytes per node and `MERGE_BATCH_BYTES` per pair of a batch.

    Args:
        count: number of nodes.
        batch: pairs that are contracted at a time.

    >>> union = Union(5, batch=2)
    >>> union.add(np.array([0, 3]), np.array([4, 4]))
    >>> union.roots().tolist()
    [0, 1, 2, 0, 0]
    """

    def __init__(self, count: int, *, batch: int) -> None:
        self._parents = np.arange(count, dtype=np.int64)
        self._batch = batch
        self._waiting: list[tuple[Ints, Ints]] = []
        self._count = 0

    def add(self, ones: Ints, others: Ints) -> None:
        """Join nodes pair by pair."""
        for start in range(0, len(ones), self._batch):
            part = slice(start, start + self._batch)
            if self._count + len(ones[part]) > self._batch:
                self._contract()
            self._waiting.append((ones[part], others[part]))
            self._count += len(ones[part])

    def roots(self) -> Ints:
        """Return the smallest node of each node's set; the array is the union's own."""
        self._contract()
        for start in range(0, len(self._parents), self._batch):  # parents are smaller, and have their roots by now
            part = self._parents[start : start + self._batch]
            part[...] = self._find(part)
        return self._parents

    def _contract(self) -> None:
        """Join the waiting pairs."""
        from scipy.sparse import coo_array, csgraph  # type: ignore[import-untyped]  # noqa: PLC0415 - an extra

        if not self._waiting:
            return
        ends = [self._find(np.concatenate(column)) for column in zip(*self._waiting, strict=True)]
        self._waiting, self._count = [], 0
        nodes, places = np.unique(np.concatenate(ends), return_inverse=True)
        half, count = len(ends[0]), len(nodes)
        edges: Any = coo_array((np.ones(half, np.uint8), (places[:half], places[half:])), shape=(count, count))
        _, members = csgraph.connected_components(edges, directed=False)
        _, first = np.unique(members, return_index=True)  # nodes ascend, so the first member is the smallest
        self._parents[nodes] = nodes[first[members]]

    def _find(self, nodes: Ints) -> Ints:
        """Return the roots of nodes."""
        while True:
            above = self._parents[nodes]
            if np.array_equal(above, nodes):
                return above
            nodes = above
