"""Vectors of patches: how a block stores those of its patches, and how the rows of all blocks are put in order.

```text
 block 0   patches 0 1   4 5                          rows of the output, in the order of the grid
 block 1   patches   2 3   6 7     --all stored-->    0 1 2 3 4 5 6 7        a skipped patch has none
```

A block stores its rows in the order of the grid, so those that lie between two patches are next to each other:

```text
 <attempt>/<number>/places      the places of its patches in the grid
 <attempt>/<number>/rows-<n>    rows of one output, some to a file
```

Blocks at one place along the first axis that has several are a band: their patches are consecutive in the grid. Memory
goes with the number of patches of a band, a few bytes each, and with a few chunks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from oocpatch.engine.normalize import Counts
from oocpatch.errors import CorruptPartial
from oocpatch.outputs.row_arrays import LOOPS, STARTS, RowAppender, row_appenders
from oocpatch.planning.box import Ints
from oocpatch.planning.memory import ROWS_FILE_BYTES
from oocpatch.planning.plan import Plan
from oocpatch.storage.packed_arrays import pack_arrays, unpack_arrays
from oocpatch.storage.paths import StoragePath
from oocpatch.workspace.partials import PartialReader, PartialWriter

Array = npt.NDArray[Any]
Places = npt.NDArray[np.int64]
Read = Callable[[int], PartialReader]
"""Returns the partials of a block."""

PLACES = "places"


def rows_per_file(row_bytes: int) -> int:
    """Return the rows of a full file."""
    return max(1, ROWS_FILE_BYTES // row_bytes)


class RowsWriter:
    """Collects the vectors of the patches of one block, and stores them. There may be none, as the plan says.

    Attributes:
        counts: vectors that are not finite.
    """

    def __init__(self, partials: PartialWriter, plan: Plan, index: int) -> None:
        self._partials, self._plan = partials, plan
        self.counts = Counts()
        ranges = plan.block_grid.patches(plan.block_grid[index]) if plan.vectors else ()
        self._first, self._shape = tuple(r.start for r in ranges), tuple(map(len, ranges))
        size = int(np.prod(self._shape)) if ranges else 0
        self._rows = [np.empty((size, head.length), head.dtype) for head in plan.vectors]
        self._present = np.zeros(size, np.bool_)

    def add(self, batch: Sequence[Ints], outputs: Mapping[str, torch.Tensor]) -> None:
        """Add the vectors of patches, given by their indices on each axis; what fills up a batch is left out.

        Raises:
            ValueError: when the model's output is not as it was for the probe, or not finite.
        """
        if not self._plan.vectors:
            return
        places = np.ravel_multi_index(tuple(np.subtract(batch, self._first).T), self._shape)
        for head, rows in zip(self._plan.vectors, self._rows, strict=True):
            if head.name not in outputs or outputs[head.name].shape[1:] != (head.length,):
                shapes = {name: tuple(output.shape[1:]) for name, output in outputs.items()}
                raise ValueError(
                    f"the model must give {head.name!r} of {head.length} numbers, as for the probe, got {shapes}"
                )
            vectors = outputs[head.name][: len(batch)]
            self._check_finite(head.name, batch, vectors)
            rows[places] = vectors.numpy(force=True)
        self._present[places] = True

    def _check_finite(self, name: str, batch: Sequence[Ints], vectors: torch.Tensor) -> None:
        bad = ~vectors.isfinite().all(dim=1) if vectors.is_floating_point() else torch.zeros(0, dtype=torch.bool)
        if not bad.any():
            return
        if not self._plan.allow_nonfinite:
            start = self._plan.input_grid.box(batch[int(bad.nonzero()[0])]).start
            raise ValueError(
                f"the model's output must be finite, got NaN or infinity in {name!r} for the patch that starts at "
                f"{start}; pass allow_nonfinite=True to keep such values"
            )
        self.counts += Counts(nonfinite=int(bad.sum()))

    def close(self) -> None:
        """Store the rows."""
        kept = np.flatnonzero(self._present)
        if not len(kept):
            return
        indices = zip(np.unravel_index(kept, self._shape), self._first, strict=True)
        places = np.ravel_multi_index(tuple(i + first for i, first in indices), self._plan.grid.counts)
        number = len(self._plan.heads)
        self._partials.write_file(number, PLACES, pack_arrays({PLACES: places.astype(np.int64)}))
        for head, rows in zip(self._plan.vectors, self._rows, strict=True):
            count = rows_per_file(head.row_bytes)
            for file, at in enumerate(range(0, len(kept), count)):
                self._partials.write_file(number, f"rows-{file}", rows[kept[at : at + count]].tobytes())
            number += 1


class StoredRows:
    """The rows of one block, as they are stored.

    Attributes:
        places: the places of its patches in the grid, in ascending order.
    """

    def __init__(self, reader: PartialReader, plan: Plan) -> None:
        self._reader, self._plan = reader, plan
        content = reader.read_file(len(plan.heads), PLACES)
        self.places: Places = np.zeros(0, np.int64) if content is None else unpack_arrays(content)[PLACES]

    def read(self, vector: int, start: int, stop: int, out: Array) -> None:
        """Read rows of one of the vectors.

        Raises:
            CorruptPartial: when they are damaged.
        """
        head = self._plan.vectors[vector]
        count, at = rows_per_file(head.row_bytes), start
        while at < stop:
            file, first = divmod(at, count)
            content = self._reader.read_file(len(self._plan.heads) + vector, f"rows-{file}")
            if content is None:
                raise self._reader.missing(f"rows-{file}")
            rows = np.frombuffer(content, head.dtype).reshape(-1, head.length)[first : first + stop - at]
            out[at - start : at - start + len(rows)] = rows
            at += len(rows)


def write_rows(path: StoragePath, plan: Plan, read: Read) -> list[CorruptPartial]:
    """Write the rows of all blocks to the arrays of an output.

    Idempotent: writes only these arrays, from what the blocks have stored.

    Returns:
        What is wrong with the blocks that are damaged or missing: they must be computed again. Without any, all is
        written.
    """
    damaged, count = [], 0
    for block in range(plan.blocks):
        try:
            count += len(StoredRows(read(block), plan).places)
        except CorruptPartial as error:
            damaged.append(error)
    if damaged:
        return damaged
    appenders = row_appenders(path, plan, count)
    step = min(appender.chunk for appender in appenders.values())
    try:
        for places, blocks in _bands(plan, read):
            for at in range(0, len(places), step):
                _append(plan, places[at : at + step], blocks, appenders)
    except CorruptPartial as error:
        return [error]
    for appender in appenders.values():
        appender.flush()
    return []


def _bands(plan: Plan, read: Read) -> Iterator[tuple[Places, list[StoredRows]]]:
    """Yield the places of all patches of each band, in ascending order, with the rows of its blocks."""
    several = next((a for a, count in enumerate(plan.block_grid.counts) if count > 1), 0)
    is_first = all(count == 1 for count in plan.grid.counts[:several])  # else bands are not consecutive
    size = plan.block_grid.layer if is_first else plan.blocks
    for first in range(0, plan.blocks, size):
        blocks = [StoredRows(read(block), plan) for block in range(first, first + size)]
        yield np.sort(np.concatenate([rows.places for rows in blocks])), blocks


def _append(plan: Plan, places: Places, blocks: list[StoredRows], appenders: Mapping[str, RowAppender]) -> None:
    """Append the rows of consecutive patches of a band."""
    ends = [np.searchsorted(rows.places, (places[0], places[-1] + 1)).tolist() for rows in blocks]
    for number, head in enumerate(plan.vectors):
        values = np.empty((len(places), head.length), head.dtype)
        for rows, (start, stop) in zip(blocks, ends, strict=True):
            if start < stop:
                own = np.empty((stop - start, head.length), head.dtype)
                rows.read(number, start, stop, own)
                values[np.searchsorted(places, rows.places[start:stop])] = own
        appenders[head.name].append(values)
    looped = len(plan.axes) - plan.spatial
    indices = zip(plan.input_grid.axes, np.unravel_index(places, plan.grid.counts), strict=True)
    starts = np.stack([_starts(axis.start, index) for axis, index in indices], axis=1)
    appenders[STARTS].append(starts[:, looped:])
    if looped:
        appenders[LOOPS].append(starts[:, :looped])


def _starts(start: Callable[[int], int], indices: npt.NDArray[np.intp]) -> Places:
    """Return where the patches with these indices along one axis start."""
    found, back = np.unique(indices, return_inverse=True)
    return np.array([start(int(index)) for index in found], np.int64)[back]
