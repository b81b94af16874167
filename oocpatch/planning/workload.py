"""The work of a model, and the bounds that it sets on blocks.

A crash costs the blocks that its process was at. Blocks of a light model are large, since their cost is traffic. Those
of a heavy one are small, down to where the seams of more blocks would cost a noticeable share of the model's work.
All times follow from counted operations and the nominal speeds below, so that plans do not vary with a measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Speed:
    """Nominal speed of a kind of device, and the seconds that a block of a heavy model may take there."""

    operations_per_second: float
    block_seconds: float


CPU, ACCELERATOR = Speed(5e10, 200.0), Speed(2e13, 10.0)

HEAVY = 1e11
"""Operations of a patch that are assumed where they cannot be counted: a network on 64^3 voxels, two seconds here."""

LIGHT_SECONDS = 10.0
"""Nominal seconds that a crash may cost whatever their share of a run: blocks of no more work stay as they are."""

CRASH_SHARE, CRASH_PATCHES = 0.02, 32
"""Share of all patches, or number of patches, whichever is more, that a crash of a process may cost."""

SEAM_SHARE = 0.03
"""Share of the model's work that smaller blocks may add in seams and in overhead."""

BYTES_PER_SECOND = 1e9
"""Nominal speed of traffic with volume, workspace and output."""

TASK_SECONDS = 0.02
"""Nominal overhead of a block: its first read and its last write overlap with no computation."""

MOST_BLOCKS = 100_000
"""Number of blocks above which blocks are not made smaller for their work: each costs the driver some milliseconds."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of a model.

    Attributes:
        operations: operations of one patch, counted, given or assumed.
        speed: that of the model's device.
        is_assumed: whether they were assumed: then what seams cost beside them is unknown, too.
        note: how the work is known, in words; empty: it was counted or given.
    """

    operations: float = 0.0
    speed: Speed = CPU
    is_assumed: bool = False
    note: str = ""

    def seconds(self, patches: int) -> float:
        """Return the nominal seconds of so many patches."""
        return patches * self.operations / self.speed.operations_per_second

    def is_light(self, patches: int) -> bool:
        """Return whether so many patches are no great loss."""
        return not self.is_assumed and self.seconds(patches) <= LIGHT_SECONDS

    def seam_seconds(self, patches: int) -> float:
        """Return the nominal seconds that smaller blocks may add to a run of so many patches."""
        return math.inf if self.is_assumed else SEAM_SHARE * self.seconds(patches)

    def most_patches(self, patches: int) -> int:
        """Return the number of patches, of so many in all, that a block should not exceed."""
        block = max(self.speed.block_seconds / self.seconds(1), patches / MOST_BLOCKS, 1.0)
        return min(int(block), crash_limit(patches))

    def __str__(self) -> str:
        if self.note:
            return self.note
        return f"{readable(self.operations)}operations a patch" if self.operations else "no operations counted"


def crash_limit(patches: int) -> int:
    """Return the number of patches, of so many in all, that a crash of a process may cost.

    >>> crash_limit(343), crash_limit(10_000)
    (32, 200)
    """
    return max(CRASH_PATCHES, int(CRASH_SHARE * patches))


def readable(number: float) -> str:
    """Return a number of operations with a prefix, for `operations` to follow.

    >>> readable(26.2e9), readable(120)
    ('26.2 giga-', '120 ')
    """
    for exponent, prefix in ((15, "peta"), (12, "tera"), (9, "giga"), (6, "mega")):
        if number >= 10**exponent:
            return f"{number / 10**exponent:.1f} {prefix}-"
    return f"{number:.0f} "
