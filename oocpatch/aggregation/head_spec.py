"""Heads of an aggregator: what they are, how their outputs are cut, and what memory that takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from oocpatch.aggregation.placement import AxisPlacement, Placement
from oocpatch.planning.box import Ints, worthwhile
from oocpatch.volumes.volume import DEFAULT_CHUNKS


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """What a head is, and where its patches lie.

    Attributes:
        name: its name in the output.
        channels: its channels.
        dtype: dtype of its sums and of its output, as numpy calls it.
        axes: where patches lie, per axis.
        chunks: chunks of the output, spatial.
        tile: what is summed and written at a time, whole chunks, spatial.
    """

    name: str
    channels: int
    dtype: str
    axes: tuple[AxisPlacement, ...]
    chunks: Ints
    tile: Ints

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What `dataclasses.asdict` gave, back from JSON."""
        axes = tuple(AxisPlacement(**axis) for axis in value["axes"])
        return cls(value["name"], value["channels"], value["dtype"], axes, tuple(value["chunks"]), tuple(value["tile"]))

    @property
    def placement(self) -> Placement:
        """Where patches lie."""
        return Placement(self.axes, self.tile)

    @property
    def voxel_bytes(self) -> int:
        """Bytes of one voxel, all channels."""
        return self.channels * np.dtype(self.dtype).itemsize

    @property
    def tile_bytes(self) -> int:
        """Bytes of the sums of one tile."""
        return self.voxel_bytes * math.prod(self.tile)


def memory_needed(specs: list[HeadSpec], given: Mapping[str, Ints]) -> int:
    """Bytes that adding one patch takes: the tiles it lies in, its values and window, and the writing of one tile."""
    patch = sum(2 * s.voxel_bytes * math.prod(given[s.name]) + 4 * math.prod(given[s.name]) for s in specs)
    return sum(tile_set_bytes(s, given[s.name]) for s in specs) + patch + WRITING * max(s.tile_bytes for s in specs)


def tile_set_bytes(spec: HeadSpec, given: Ints) -> int:
    """Bytes of all tiles that one patch may lie in."""
    return spec.tile_bytes * spec.placement.most_tiles(given)


WRITING = 6
"""Tiles' worth of bytes while one is written: its sums, a piece, its values, and chunks on their way through zarr."""


def laid_out(spec: HeadSpec, given: Ints, chunks: Ints | None, limit: int) -> HeadSpec:
    """The head with chunks and tiles: default chunks get smaller until a patch takes half of the limit at most."""
    shape = spec.placement.shape
    side = DEFAULT_CHUNKS.get(len(shape), 16)
    options = [chunks] if chunks is not None else [(side >> k,) * len(shape) for k in range(side.bit_length())]
    for option in options:
        clipped = tuple(min(c, n) for c, n in zip(option, shape, strict=True))
        voxels = min(TILE_BYTES, limit // 64) // spec.voxel_bytes
        tile = tuple(min(t, n) for t, n in zip(worthwhile(clipped, shape, voxels), shape, strict=True))
        spec = HeadSpec(spec.name, spec.channels, spec.dtype, spec.axes, clipped, tile)
        if memory_needed([spec], {spec.name: given}) <= limit // 2 or math.prod(clipped) <= LEAST_CHUNK:
            break
    return spec


TILE_BYTES = 1 << 20
"""Sums of one tile, where the limit is large: enough to be worth a write."""
LEAST_CHUNK = 64
"""Voxels below which default chunks are not made smaller."""
