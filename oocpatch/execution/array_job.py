"""Parts: one run shared out to jobs that need no scheduler, each with its own range of blocks.

```text
 part 1 of 3   lock .part-1-of-3   blocks 0 .. 4    ledger.1-of-3  --+
 part 2 of 3   lock .part-2-of-3   blocks 5 .. 9    ledger.2-of-3  --+--> every part reads them all
 part 3 of 3   lock .part-3-of-3   blocks 10 .. 14  ledger.3-of-3  --+
```

Each part is the driver of its blocks: it predicts them, and normalizes those among them whose partials are all there.
At its end it takes the lock of the output, which parts hold in turn and for a short while, and normalizes what has
become possible for parts that are not at work. So the last one leaves nothing to do, and completes the output. Whatever
two parts may both do has the same bytes (law 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oocpatch.storage.locks import holder, locks, part_lock
from oocpatch.storage.paths import Address


@dataclass(frozen=True, slots=True)
class ArrayJobPart:
    """ArrayJobPart `number` of `count`, counted from 1.

    >>> [ArrayJobPart(i, 3).own(10) for i in (1, 2, 3)]
    [range(0, 3), range(3, 6), range(6, 10)]
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def segment(self) -> str:
        """Name of its segment of the ledger."""
        return f"ledger.{self.number}-of-{self.count}"

    def own(self, blocks: int) -> range:
        """Its blocks. Those of all parts cover every block exactly once."""
        return range((self.number - 1) * blocks // self.count, self.number * blocks // self.count)

    def lock(self, output: Address) -> Address:
        """Its lock."""
        return part_lock(output, (self.number, self.count))

    def left_to(self, output: Address, blocks: int) -> Ranges:
        """The blocks that it finishes at its end: its own, and those of parts that are not at work."""
        every = [ArrayJobPart(i, self.count) for i in range(1, self.count + 1)]
        return Ranges([p.own(blocks) for p in every if p == self or holder(p.lock(output)) is None])


@dataclass(frozen=True, slots=True)
class Ranges:
    """Blocks of several ranges."""

    ranges: Sequence[range]

    def __contains__(self, index: object) -> bool:
        return any(index in r for r in self.ranges)


def busy_holder(output: Address, part: ArrayJobPart | None) -> str | None:
    """Who keeps a call from working on an output, in words: a whole run, the same part, or another division's parts."""
    whole, *parts = locks(output)
    for path in parts:
        if part is None or path == part.lock(output) or not path.name.endswith(f"-of-{part.count}"):
            who = holder(path)
            if who is not None:
                return who
    who = holder(whole)
    return None if part is not None and who is not None and " for part " in who else who
