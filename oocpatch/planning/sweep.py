"""The sweep of one block: in which order its layers of patches are read, computed and let go.

```text
   sweep ->      done and written | rolling partial | not yet read
                 =================|  [ layer n  ]   |
                                  |     [ layer n+1 ]
```

A layer holds the patches of a block that share one start on the swept axis. Layers are taken in groups of just enough
patches to fill a batch. When a group is done, the voxels before the next group's start are final and leave the partial.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from oocpatch.planning.box import ceil_to
from oocpatch.planning.grid import GridAxis


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive layers that are computed together.

    Attributes:
        layers: grid indices of the layers.
        start: first voxel the group's patches touch.
        stop: end of the last voxel they touch.
        read_stop: end of what must have been read; `stop`, or beyond it up to a chunk border of the input.
        done: everything before it is final once the group is computed.
    """

    layers: range
    start: int
    stop: int
    read_stop: int
    done: int


def groups(axis: GridAxis, layers: range, layers_per_group: int, chunk: int, end: int | None = None) -> list[Group]:
    """The groups of a block's layers, in order.

    Args:
        axis: the swept axis.
        layers: grid indices of the block's layers.
        layers_per_group: how many layers are computed together.
        chunk: reads end at multiples of it (1: at the voxel).
        end: where the block's last layer ends; default: the last of `layers` does.

    >>> [g.read_stop for g in groups(GridAxis(10, 4, 2), range(0, 4), 1, 3)]
    [6, 6, 9, 10]
    """
    if not layers:
        return []
    found = []
    reach_stop = axis.start(layers[-1]) + axis.patch if end is None else end
    for i in range(0, len(layers), layers_per_group):
        members = layers[i : i + layers_per_group]
        following = i + layers_per_group
        done = axis.start(layers[following]) if following < len(layers) else reach_stop
        stop = axis.start(members[-1]) + axis.patch
        # Beyond the border there are no chunks: padding is read to the voxel.
        aligned = max(stop, min(ceil_to(stop, chunk), reach_stop, max(axis.length, stop)))
        found.append(Group(members, axis.start(members[0]), stop, aligned, done))
    return found


@lru_cache(maxsize=4096)
def capacity(axis: GridAxis, layers: range, layers_per_group: int, chunk: int, *, ahead: bool) -> tuple[int, int]:
    """Planes that the input ring and the sums ring of a block must hold: `(input, sums)`.

    With `ahead`, the input of the next group is read while the current one is computed. Of many groups one period of
    the pattern that strides and chunks make is looked at, and the end.

    >>> capacity(GridAxis(10, 4, 2), range(0, 4), 1, 1, ahead=True)
    (6, 4)
    """
    reads, sums = 1, 1
    end = axis.start(layers[-1]) + axis.patch if layers else 0
    for part in _excerpts(layers, layers_per_group, math.lcm(axis.stride, chunk) // axis.stride):
        schedule = groups(axis, part, layers_per_group, chunk, end)
        for i, group in enumerate(schedule):
            following = schedule[min(i + ahead, len(schedule) - 1)]
            reads = max(reads, following.read_stop - group.start)
            sums = max(sums, group.stop - group.start)
    return reads, sums


def _excerpts(layers: range, layers_per_group: int, period: int) -> list[range]:
    """All layers; of many, the first period of whole groups and the last ones."""
    head = (min(period, 512) + 2) * layers_per_group
    if len(layers) <= 2 * head:
        return [layers]
    tail = len(layers) // layers_per_group * layers_per_group - 2 * layers_per_group
    return [layers[:head], layers[tail:]]
