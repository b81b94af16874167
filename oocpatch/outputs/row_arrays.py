"""The arrays of vectors of patches: a row per patch, in the order of the grid, and where each patch starts.

```text
<output>/
    <head>     (patches, D)
    starts     (patches, spatial axes)   first voxel of the model's patch, in the volume's frame
    loops      (patches, looped axes)    its place on the looped axes, where there are any
```

They are there from the beginning, empty, and are written after the last block; skipped patches have no row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from oocpatch.errors import PlanTooLarge
from oocpatch.outputs.integrity import LEDGER, other_files
from oocpatch.outputs.write_units import COMPRESSOR
from oocpatch.planning.box import Ints
from oocpatch.planning.memory import ROWS_BYTES, ROWS_FILE_BYTES
from oocpatch.planning.plan import Plan, human
from oocpatch.storage.checksums import file_checksum
from oocpatch.storage.paths import StoragePath
from oocpatch.volumes.affine import affine_of
from oocpatch.volumes.volume import Volume

STARTS, LOOPS = "starts", "loops"
"""Names of the arrays beside the vectors."""

PLACE_BYTES = 40
"""Bytes per patch of a band while its rows are put in order: places, twice, and what sorting them takes."""


def row_members(plan: Plan) -> tuple[str, ...]:
    """Return the names of the arrays of rows of an output; none if the model gives no vectors."""
    if not plan.vectors:
        return ()
    return (*(head.name for head in plan.vectors), STARTS, *([LOOPS] if len(plan.axes) > plan.spatial else []))


def create_rows(path: StoragePath, plan: Plan, volume: Volume) -> None:
    """Create the arrays of rows, without a row; `starts` has the affine from voxels to the volume's coordinates."""
    looped, is_one = len(plan.axes) - plan.spatial, len({head.length for head in plan.vectors}) == 1
    rows: dict[str, tuple[int, str, str, dict[str, Any]]] = {
        head.name: (head.length, head.dtype, "feature" if is_one else f"feature_{head.name}", {})
        for head in plan.vectors
    }
    patch = {"patch_size": list(plan.patch_size[looped:]), "patch_overlap": list(plan.patch_overlap[looped:])}
    affine = affine_of(replace(volume.source, attrs={}), volume.axes).tolist()
    rows[STARTS] = plan.spatial, "int64", "axis", {"axes": list(plan.axes[looped:]), **patch, "affine": affine}
    rows[LOOPS] = looped, "int64", "looped_axis", {"axes": list(plan.axes[:looped])}
    for name in row_members(plan):
        length, dtype, dimension, attributes = rows[name]
        zarr.create_array(
            path.store(),
            name=name,
            shape=(0, length),
            chunks=_chunks(plan, length, dtype),
            dtype=dtype,
            compressors=COMPRESSOR,
            zarr_format=3,
            dimension_names=("patch", dimension),
            attributes=attributes,
        )


def _chunks(plan: Plan, length: int, dtype: str) -> Ints:
    rows = ROWS_BYTES // (length * np.dtype(dtype).itemsize)
    return max(1, min(rows, plan.grid.num_patches)), length


def row_files(path: StoragePath, plan: Plan) -> Mapping[str, int]:
    """Return the CRC of each file of the arrays of rows."""
    names = other_files(path, row_members(plan), ())
    return {name: file_checksum(path / name) for name in names if not name.endswith(LEDGER)}


def rows_memory(plan: Plan) -> int:
    """Return the bytes that writing the rows takes, when no block is at work."""
    if not plan.vectors:
        return 0
    chunks = [math.prod(_chunks(plan, h.length, h.dtype)) // h.length * h.row_bytes for h in plan.vectors]
    rows = 4 * (sum(chunks) + min(ROWS_BYTES, 8 * len(plan.axes) * plan.grid.num_patches))
    rows += max(ROWS_FILE_BYTES, *(head.row_bytes for head in plan.vectors))
    several = next((a for a, count in enumerate(plan.block_grid.counts) if count > 1), len(plan.axes))
    band = plan.grid.num_patches
    if several < len(plan.axes) and math.prod(plan.grid.counts[:several]) == 1:
        axis = plan.block_grid.axes[several]
        most = max(len(axis.patches(i)) for i in {0, 1, axis.count - 2, axis.count - 1} if 0 <= i < axis.count)
        band = (most + 1) * math.prod(plan.grid.counts[several + 1 :])
    return rows + band * PLACE_BYTES


def with_rows(plan: Plan, max_memory: int) -> Plan:
    """Return the plan with the memory that writing its rows needs.

    Raises:
        PlanTooLarge: if that exceeds the limit.
    """
    needed = rows_memory(plan)
    if needed > max_memory:
        raise PlanTooLarge(
            f"writing the vectors of patches in the order of the grid needs {human(needed, up=True)} but max_memory "
            f"is {human(max_memory)}; raise max_memory"
        )
    return replace(plan, projected_memory=max(plan.projected_memory, needed))


def row_appenders(path: StoragePath, plan: Plan, count: int) -> dict[str, RowAppender]:
    """Return what writes the arrays of rows, by their names; they get this number of rows."""
    arrays = {name: zarr.open_array(path.store(), path=name, mode="r+") for name in row_members(plan)}
    for array in arrays.values():
        array.resize((count, *array.shape[1:]))
    return {name: RowAppender(array) for name, array in arrays.items()}


class RowAppender:
    """Appends rows to an array from its beginning, whole chunks at a time."""

    def __init__(self, array: zarr.Array[Any]) -> None:
        self._array, self._at = array, 0
        self._buffer = np.empty(array.chunks, array.dtype)
        self._filled = 0

    @property
    def chunk(self) -> int:
        """Rows of a chunk."""
        return len(self._buffer)

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Add rows; what fills no chunk is kept."""
        at = 0
        while at < len(rows):
            part = rows[at : at + len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            at += len(part)
            if self._filled == len(self._buffer):
                self.flush()

    def flush(self) -> None:
        """Write what was appended since the last chunk."""
        if self._filled:
            self._array[self._at : self._at + self._filled] = self._buffer[: self._filled]
            self._at, self._filled = self._at + self._filled, 0
