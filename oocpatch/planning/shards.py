"""Shards that an output gets where none are asked for: those of the input, or such that a large output has fewer files.

A shard is a write unit, so a block's core must hold whole ones. Where it does not, they get smaller by a whole number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from oocpatch.planning.arguments import write_unit
from oocpatch.planning.box import Ints
from oocpatch.planning.heads import Head

MOST_CHUNKS = 100_000
"""Number of chunks from which an output gets shards."""

SHARD_BYTES = 256 << 20
"""Most bytes of a shard that is chosen here."""

MEMORY_SHARE = 64
"""Divisor of the allowed memory for such a shard: several are encoded at a time, in up to three copies."""

SHRINKING = (1, 2, 4, 8)
"""Divisors of a block's core that shards are fitted to, in turn: smaller ones take less memory."""


def largest_fraction(shard: int, chunk: int, limit: int) -> int:
    """Return the largest whole fraction of a shard within a limit that consists of whole chunks; else one chunk.

    >>> largest_fraction(256, 32, 300), largest_fraction(256, 32, 200), largest_fraction(96, 32, 64)
    (256, 128, 32)
    """
    count = shard // chunk
    return next((shard // n for n in range(1, count + 1) if count % n == 0 and shard // n <= limit), chunk)


def shards_of_input(head: Head, shards: Ints) -> Ints:
    """Return the input's shards in the voxels of a head, in whole chunks of it."""
    sides = (n * times // per for n, (times, per) in zip(shards, head.scale, strict=True))
    return tuple(max(c, n // c * c) for n, c in zip(sides, head.chunks, strict=True))


def shards_of_many_chunks(head: Head, shape: Ints, itemsize: int, max_memory: int) -> Ints | None:
    """Return shards for an output of very many chunks, doubled along their shortest axis; None for other outputs."""
    if head.out_channels * math.prod(-(-n // c) for n, c in zip(shape, head.chunks, strict=True)) <= MOST_CHUNKS:
        return None
    shard, most = list(head.chunks), min(SHARD_BYTES, max_memory // MEMORY_SHARE // head.out_channels) // itemsize
    while 2 * math.prod(shard) <= most:
        longer = [a for a, n in enumerate(shape) if shard[a] < n]
        if not longer:
            break
        shard[min(longer, key=shard.__getitem__)] *= 2
    return tuple(shard)


def fitted_units(
    heads: Sequence[Head], shards: Sequence[Ints | None], core: Ints, shapes: Sequence[Ints], *, whole: bool
) -> Iterator[tuple[Ints, ...]]:
    """Yield write units to try for each head, the largest first.

    Args:
        heads: the outputs.
        shards: the shards that each should have; None: none.
        core: a block's core without shards, in voxels of the volume.
        shapes: of the heads.
        whole: whether to try whole shards first, though the core holds none.
    """
    limits: list[Ints | None] = [None] if whole else []
    limits += [tuple(side // divisor for side in core) for divisor in SHRINKING]
    seen = {tuple(head.unit for head in heads)}
    for limit in limits:
        units = []
        for head, shard, shape in zip(heads, shards, shapes, strict=True):
            unit = head.unit if shard is None else write_unit(head.chunks, shard, shape)
            if shard is not None and limit is not None:
                sides = (n * times // per for n, (times, per) in zip(limit, head.scale, strict=True))
                unit = tuple(map(largest_fraction, unit, head.chunks, sides))
            units.append(unit)
        if tuple(units) not in seen:
            seen.add(tuple(units))
            yield tuple(units)
