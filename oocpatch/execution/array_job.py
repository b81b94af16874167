"""Array jobs: one run divided into parts that need no scheduler, each with its own range of blocks.

```text
 part 1 of 3   lock .part-1-of-3   blocks 0 .. 4    ledger.1-of-3  --+
 part 2 of 3   lock .part-2-of-3   blocks 5 .. 9    ledger.2-of-3  --+--> every part reads them all
 part 3 of 3   lock .part-3-of-3   blocks 10 .. 14  ledger.3-of-3  --+
```

The blocks of a part are consecutive, and have about as many patches to compute as those of the others.
Each part is the driver of its blocks: it predicts them, and normalizes those among them whose partials are all there.
At its end it takes the lock of the output, which parts hold in turn and for a short while, and normalizes the blocks
that have become possible of parts that are not running. So the last one leaves nothing to do, and completes the
output. Blocks that two parts both compute have the same bytes (law 2).
"""

from __future__ import annotations

from dataclasses import dataclass

from oocpatch.planning.schedule import Counts, division
from oocpatch.storage.locks import holder, locks, part_lock
from oocpatch.storage.paths import StoragePath
from oocpatch.workspace.run_progress import BlockSet


@dataclass(frozen=True, slots=True)
class ArrayJobPart:
    """Part `number` of `count`, counted from 1.

    >>> import numpy as np
    >>> [ArrayJobPart(i, 3).blocks_of(np.array([8, 8, 0, 0, 8])) for i in (1, 2, 3)]
    [range(0, 1), range(1, 3), range(3, 5)]
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def segment(self) -> str:
        """Name of the part's segment of the ledger."""
        return f"ledger.{self.number}-of-{self.count}"

    def blocks_of(self, counts: Counts) -> range:
        """Return the part's blocks, of blocks with so many patches each. All parts cover every block exactly once."""
        return division(counts, self.count)[self.number - 1]

    def lock(self, output: StoragePath) -> StoragePath:
        """Return the path of the part's lock."""
        return part_lock(output, (self.number, self.count))

    def unattended_blocks(self, output: StoragePath, counts: Counts) -> BlockSet:
        """Return the blocks that it normalizes at its end: its own, and those of parts that are not running."""
        unattended = BlockSet(len(counts))
        for number, blocks in enumerate(division(counts, self.count), 1):
            part = ArrayJobPart(number, self.count)
            if part == self or holder(part.lock(output)) is None:
                for index in blocks:
                    unattended.add(index)
        return unattended


def busy_holder(output: StoragePath, part: ArrayJobPart | None) -> str | None:
    """Describe the whole run, same part, or part of another division that keeps a call off an output, or None."""
    whole, *parts = locks(output)
    for path in parts:
        blocks_it = part is None or path == part.lock(output) or not path.name.endswith(f"-of-{part.count}")
        if blocks_it and (process := holder(path)) is not None:
            return process
    process = holder(whole)
    return None if part is not None and process is not None and " for part " in process else process
