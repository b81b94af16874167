"""The plan of a table: its columns, the blocks that are measured, and the memory that this takes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from oocpatch.errors import PlanTooLarge
from oocpatch.objects.columns import TableSchema
from oocpatch.objects.table_input import VoxelGrid, channel_names
from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.grid import PatchGrid
from oocpatch.planning.memory import READ_BYTES
from oocpatch.planning.plan import digest, human
from oocpatch.volumes.volume import Volume, default_chunks

FORMAT = 1
"""Version of the plan's JSON and of what is in the workspace."""

COPIES = 3
"""Copies of a chunk that decoding it needs at most, including the encoded one."""

LARGEST_BLOCK = 1 << 24
"""Voxels from which on a block is not made larger."""

SMALLEST_SCRATCH, LARGEST_SCRATCH = 1 << 21, 1 << 26
"""Bytes that measuring a block takes beside the block itself: what fits is measured at a time."""


@dataclass(frozen=True)
class TablePlan:
    """All decisions of a table.

    Attributes:
        parameters: the fingerprint, by the names of the parameters of `objects`.
        schema: the columns.
        suffix: ending of the file; empty for a data frame.
        names, spatial, shape: axes of boxes, how many of them are spatial, and their extents.
        channels: number of channels of the labels, each with objects of its own.
        core: shape of a block.
        concurrency: blocks measured at a time.
        task_memory: most bytes that a block takes.
        scratch: bytes of these for what is derived from voxels.
        max_memory: the limit, for the merge of the blocks' tables.
    """

    parameters: Mapping[str, Any]
    schema: TableSchema
    suffix: str
    names: tuple[str, ...]
    spatial: int
    shape: Ints
    channels: int
    core: Ints
    concurrency: int
    task_memory: int
    scratch: int
    max_memory: int

    @cached_property
    def block_grid(self) -> BlockGrid:
        """The blocks, which exchange nothing."""
        ones = (1,) * len(self.shape)
        return BlockGrid.of(PatchGrid.of(self.shape, ones, (0,) * len(self.shape)), self.core, self.core, 0, crop=False)

    @property
    def blocks(self) -> int:
        return self.block_grid.num_blocks

    @property
    def has_polygons(self) -> bool:
        """True where the file has polygons."""
        return self.suffix == ".geojson"

    @property
    def bytes_per_voxel(self) -> int:
        """Bytes of the labels of a voxel."""
        return self.channels * np.dtype(self.schema.label_dtype).itemsize

    @property
    def run_id(self) -> str:
        """Digest of everything the bytes of the table depend on."""
        return digest({"format": FORMAT, "parameters": self.parameters, "core": self.core})

    def core_of(self, block: int) -> Box:
        """Return the box of a block."""
        return self.block_grid[block].core

    def to_json(self) -> str:
        """Return the plan as JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps({"format": FORMAT, **values, "schema": asdict(self.schema)}, default=list)

    @classmethod
    def from_json(cls, text: str) -> TablePlan:
        """Return the plan that `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: when the text is something else.
        """
        record = json.loads(text)
        if record.pop("format") != FORMAT:
            raise ValueError(f"the plan must have format {FORMAT}")
        schema = TableSchema(**{k: _tuple(v) for k, v in record.pop("schema").items()})
        parameters = record.pop("parameters")
        return cls(parameters=parameters, schema=schema, **{k: _tuple(v) for k, v in record.items()})

    def resumed(self, max_memory: int, workers: int | None) -> TablePlan:
        """Return the plan with the concurrency that another call allows.

        Raises:
            PlanTooLarge: when even one block at a time needs more memory.
        """
        fitting = max_memory // self.task_memory
        if not fitting:
            raise PlanTooLarge(
                f"the run to be resumed was planned with blocks that need {human(self.task_memory, up=True)} but "
                f"max_memory is {human(max_memory)}; raise max_memory, or start afresh with overwrite=True"
            )
        return replace(self, concurrency=min(workers or self.concurrency, fitting), max_memory=max_memory)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def make_schema(labels: Volume, intensity: Volume | None, grid: VoxelGrid, properties: tuple[str, ...]) -> TableSchema:
    """Return the columns of a table."""
    looped = len(labels.shape) - labels.spatial_ndim
    indices = [name for name, n in zip(labels.names[:looped], labels.shape, strict=False) if n > 1]
    indices += [str(labels.channel_axis)] if labels.channels > 1 else []
    return TableSchema(
        axes=labels.names[looped:],
        scale=grid.scale,
        offset=grid.offset,
        units=grid.units,
        is_physical=grid.is_physical,
        indices=tuple(indices),
        properties=properties,
        channels=channel_names(intensity),
        label_dtype=str(labels.dtype),
        intensity_dtype="u1" if intensity is None else intensity.dtype.str,
        wide=max(labels.shape) >= 2**31,
    )


def make_table_plan(
    labels: Volume,
    intensity: Volume | None,
    schema: TableSchema,
    parameters: Mapping[str, Any],
    *,
    suffix: str,
    block_shape: Ints | None,
    max_memory: int,
    workers: int | None,
) -> TablePlan:
    """Choose blocks of whole chunks, as large as memory allows and as many as keep all workers busy.

    Raises:
        PlanTooLarge: when not even one block fits.
    """
    looped = len(labels.shape) - labels.spatial_ndim
    voxel = labels.channels * labels.dtype.itemsize
    voxel += 0 if intensity is None else intensity.channels * intensity.dtype.itemsize
    volumes = [labels] if intensity is None else [labels, intensity]
    read = max(max(COPIES * v.chunk_bytes, 2 * READ_BYTES) for v in volumes)

    def needed(core: Ints, scratch: int) -> int:
        return (
            math.prod(min(2 * c, n) if n % c else c for c, n in zip(core, labels.shape, strict=True)) * voxel
            + read
            + scratch
        )

    def scratch_for(threads: int) -> int:
        return max(SMALLEST_SCRATCH, min(LARGEST_SCRATCH, max_memory // (4 * threads)))

    core = (*(1,) * looped, *(block_shape or _unit(labels, intensity, looped)))
    threads = workers or os.cpu_count() or 1
    while threads > 1 and threads * needed(core, scratch_for(threads)) > max_memory:
        threads -= 1
    scratch = scratch_for(threads)
    if needed(core, scratch) > max_memory:
        raise PlanTooLarge(
            f"a block of {' x '.join(map(str, core[looped:]))} voxels needs {human(needed(core, scratch), up=True)} "
            f"(chunks of the volumes included) but max_memory is {human(max_memory)}; raise max_memory"
        )
    while block_shape is None:
        axis = min(
            (a for a in range(looped, len(core)) if core[a] < labels.shape[a]), key=lambda a: core[a], default=None
        )
        if axis is None:
            break
        grown = (*core[:axis], 2 * core[axis], *core[axis + 1 :])
        count = math.prod(-(-n // c) for n, c in zip(labels.shape, grown, strict=True))
        if (
            math.prod(grown) > LARGEST_BLOCK
            or threads * needed(grown, scratch) > max_memory
            or (count < 4 * threads and math.prod(grown) > LARGEST_BLOCK // 16)
        ):
            break
        core = grown
    core = tuple(min(c, n) for c, n in zip(core, labels.shape, strict=True))
    return TablePlan(
        parameters=parameters,
        schema=schema,
        suffix=suffix,
        names=labels.names,
        spatial=labels.spatial_ndim,
        shape=labels.shape,
        channels=labels.channels,
        core=core,
        concurrency=threads,
        task_memory=needed(core, scratch),
        scratch=scratch,
        max_memory=max_memory,
    )


def _unit(labels: Volume, intensity: Volume | None, looped: int) -> Ints:
    """Return the smallest block: chunks of the labels, or of the intensity where these are larger."""
    unit = default_chunks(labels, labels.dtype.itemsize) if not labels.source.chunked else labels.chunks
    unit = tuple(min(c, n) for c, n in zip(unit, labels.shape, strict=True))
    if intensity is not None and intensity.source.chunked:
        other = intensity.chunks[-len(unit) :]
        unit = tuple(b if b % a == 0 else a for a, b in zip(unit, other, strict=True))
    return tuple(int(n) for n in np.minimum(unit, labels.shape))[looped:]
