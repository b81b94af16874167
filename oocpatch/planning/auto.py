"""Sizes that nobody asked for: patches and batches chosen from the model, the volume and the memory.

Integers in, integers out: the same call chooses the same on every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from oocpatch.planning.box import Ints, ceil_to

LARGEST = {1: 1 << 16, 2: 512, 3: 128, 4: 32}
"""Longest side of a patch by number of spatial axes: a good deal of context, and a few million voxels at most."""

MULTIPLE, SMALL_MULTIPLE = 32, 8
"""Sides are multiples of it, as networks that halve five times need, as long as there is memory for that."""

MODEL_SHARE = 4
"""The model may take this part of the memory with one patch, and half of it with a batch chosen here."""

BATCH_VOXELS = 1 << 21
"""Voxels that make a call of the model worth its overhead."""

LARGEST_BATCH = 64


def patch_sizes(shape: Ints, chunks: Ints, fixed: tuple[int | None, ...] | None = None) -> Iterator[Ints]:
    """Patch sizes to try, the largest first.

    Sides are whole chunks where that suits, and no longer than the volume needs.

    Args:
        shape: of the volume, spatial.
        chunks: of the volume, spatial.
        fixed: sides that the model fixes, None where it does not.

    >>> list(patch_sizes((4000, 3000), (256, 256)))[:3]
    [(512, 512), (256, 256), (192, 192)]
    >>> next(patch_sizes((20, 300, 300), (48, 48, 48), (None, 64, 64)))
    (32, 64, 64)
    """
    seen = None
    largest = LARGEST.get(len(shape), SMALL_MULTIPLE * 2)
    limits = (limit for k in range(largest.bit_length()) for limit in (largest >> k, (largest >> k) * 3 // 4))
    for limit in limits:
        if limit % SMALL_MULTIPLE:
            return
        sides = tuple(_side(n, c, limit) for n, c in zip(shape, chunks, strict=True))
        sides = tuple(s or f for s, f in zip(fixed or (None,) * len(shape), sides, strict=True))
        if sides != seen:
            yield sides
        seen = sides


def _side(length: int, chunk: int, limit: int) -> int:
    multiple = MULTIPLE if limit >= MULTIPLE else SMALL_MULTIPLE
    step = math.lcm(multiple, chunk)
    step = step if step <= limit else multiple
    return min(limit // step * step, ceil_to(length, multiple))


def batch_size(
    voxels: int, patch_bytes: int, max_memory: int, *, patches: int, least: int = 1, most: int | None = None
) -> int:
    """Patches per call of the model.

    Args:
        voxels: of a patch.
        patch_bytes: memory that the model and a batch take per patch.
        max_memory: the run's.
        patches: of the volume.
        least: fewest that the model takes.
        most: most that the model takes.

    >>> batch_size(64**3, 40 << 20, 1 << 30, patches=500), batch_size(64**3, 0, 1 << 30, patches=500, most=3)
    (2, 3)
    """
    wanted = min(BATCH_VOXELS // voxels, max_memory // (2 * MODEL_SHARE) // max(1, patch_bytes), patches, LARGEST_BATCH)
    power = 1 << max(1, wanted).bit_length() - 1
    return max(least, min(power, most or power))
