"""The plan of a call of `objects`: the blocks that are measured, and the memory that this takes. Reads metadata only.

It is a run whose patches are single voxels and which has no heads: blocks leave tables in the workspace, and their
merge writes the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from oocpatch.configuration.label_plan import voxel_plan
from oocpatch.configuration.run_config import RunConfig
from oocpatch.errors import PlanTooLarge
from oocpatch.planning.box import Ints
from oocpatch.planning.memory import READ_BYTES
from oocpatch.planning.plan import Plan, human
from oocpatch.system import usable_cores
from oocpatch.volumes.volume import default_chunks

COPIES = 3
"""Copies of a chunk that decoding it needs at most, including the encoded one."""

LARGEST_BLOCK = 1 << 24
"""Voxels from which on a block is not made larger."""

SMALLEST_SCRATCH, LARGEST_SCRATCH = 1 << 21, 1 << 26
"""Bytes that measuring a block takes beside the block itself: what fits is measured at a time."""


def make_table_plan(config: RunConfig, table: Mapping[str, Any]) -> Plan:
    """Choose blocks of whole chunks, as large as memory allows and as many as keep all workers busy.

    Raises:
        PlanTooLarge: when not even one block fits.
    """
    labels, looped, max_memory = config.volume, config.looped, config.limits.max_memory
    volumes = config.inputs.values()
    voxel = sum(volume.channels * volume.dtype.itemsize for volume in volumes)
    read = max(max(COPIES * volume.chunk_bytes, 2 * READ_BYTES) for volume in volumes)

    def needed(core: Ints, scratch: int) -> int:
        lengths = (min(2 * c, n) if n % c else c for c, n in zip(core, labels.shape, strict=True))
        return math.prod(lengths) * voxel + read + scratch

    def scratch_for(threads: int) -> int:
        return max(SMALLEST_SCRATCH, min(LARGEST_SCRATCH, max_memory // (4 * threads)))

    asked = config.limits.block_shape
    core = (*(1,) * looped, *(asked or _unit(config)))
    threads = config.execution.threads or usable_cores()
    while threads > 1 and threads * needed(core, scratch_for(threads)) > max_memory:
        threads -= 1
    scratch = scratch_for(threads)
    if needed(core, scratch) > max_memory:
        raise PlanTooLarge(
            f"a block of {' x '.join(map(str, core[looped:]))} voxels needs {human(needed(core, scratch), up=True)} "
            f"(chunks of the volumes included) but max_memory is {human(max_memory)}; raise max_memory"
        )
    while asked is None:
        shorter = (axis for axis in range(looped, len(core)) if core[axis] < labels.shape[axis])
        axis = min(shorter, key=lambda a: core[a], default=-1)
        if axis < 0:
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
    plan = voxel_plan(config, core, threads, needed(core, scratch))
    return replace(plan, memory_parts=(("scratch", scratch),), table=table)


def _unit(config: RunConfig) -> Ints:
    """Return the smallest block: chunks of the labels, or of the intensity where these are larger."""
    labels, intensity = config.volume, config.intensity
    unit = labels.chunks if labels.source.chunked else default_chunks(labels, labels.dtype.itemsize)
    unit = tuple(min(c, n) for c, n in zip(unit, labels.shape, strict=True))
    if intensity is not None and intensity.source.chunked:
        other = intensity.chunks[-len(unit) :]
        unit = tuple(b if b % a == 0 else a for a, b in zip(unit, other, strict=True))
    return tuple(int(n) for n in np.minimum(unit, labels.shape))[config.looped :]
