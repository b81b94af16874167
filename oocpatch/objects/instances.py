"""Objects of models that find them patch by patch: which objects of two patches are one, and which voxels each has.

Two patches see the voxels that they share in the same way, up to the numbers of the objects and to what is cut off at
their borders. So objects are compared where both patches saw them:

```text
 patch p   [  1 1 1    2 2 2 . 3 ]                the voxels that both saw:   p   2 2 2 . 3
 patch q               [ 1 1 1 . 2 2 2    3 3 ]                               q   1 1 1 . 2
                                                  2 and 1 are one object, 3 and 2 another
```

Each voxel comes from the patch that owns it, as with `crop`. An object that its patch saw whole also takes the voxels
that its patch gives it where the owner has background:

```text
 owned by p    . . 1 1 1 | 2 2 2 . .    q did not find the right end of 1
 p gives         . 1 1 1 | 1 . .
 together      . . 1 1 1 | 2 2 2 . .    the owner's object wins; had q background there, the voxel would be of 1
```
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.engine.patch_objects import Labels, PatchObjects
from oocpatch.planning.box import Box

Array = npt.NDArray[Any]
Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def matches(one: Labels, other: Labels, threshold: float) -> tuple[Numbers, Numbers]:
    """Return the pairs of objects of two patches that are one object.

    Each is the other's best match, the one with the largest intersection over union, of equals the lower one; and that
    is at least `threshold`. Only the voxels that both patches saw count.

    Args:
        one: labels of one patch, of the voxels that both saw.
        other: labels of the other patch, of the same voxels.
        threshold: in (0, 1].

    >>> matches(np.array([1, 1, 1, 2, 2]), np.array([3, 3, 0, 0, 1]), 0.5)
    (array([1, 2]), array([3, 1]))
    """
    ones, others, common = _common_voxels(one, other)
    if not len(ones):
        return ones, others
    union = np.bincount(one.reshape(-1))[ones] + np.bincount(other.reshape(-1))[others] - common
    ratio = common / union
    is_pair = ratio >= threshold
    for own, their in ((ones, others), (others, ones)):
        order = np.lexsort((their, -ratio, own))
        is_best = np.zeros(len(ones), np.bool_)
        is_best[order[np.flatnonzero(np.diff(own[order], prepend=0))]] = True  # objects are numbered from 1
        is_pair &= is_best
    return ones[is_pair], others[is_pair]


def _common_voxels(one: Labels, other: Labels) -> tuple[Numbers, Numbers, Numbers]:
    """Return the pairs of objects that have voxels in common, in ascending order, and how many."""
    both = (one != 0) & (other != 0)
    width = int(other.max(initial=0)) + 1
    keys = one[both].astype(np.int64) * width + other[both]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))  # of runs, which are fewer than voxels
    lengths = np.diff(starts, append=len(keys))
    pairs, places = np.unique(keys[starts], return_inverse=True)
    ones, others = np.divmod(pairs, width)
    return ones, others, np.bincount(places, lengths, len(pairs)).astype(np.int64)


class Assembly:
    """The objects of the voxels of a box, painted patch by patch.

    Objects are named by numbers of their own: those of a patch are `first + label`, in any dtype. Patches come in the
    order of the grid; where several objects extend to one voxel, the first one has it.

    >>> from oocpatch.engine.patch_objects import patch_objects
    >>> assembly = Assembly(Box((0,), (6,)))
    >>> for number, (labels, seen, owned) in enumerate([
    ...     (np.array([0, 1, 1, 0]), Box((0,), (4,)), Box((0,), (2,))),
    ...     (np.array([0, 0, 1, 0]), Box((2,), (6,)), Box((2,), (6,))),
    ... ]):
    ...     assembly.paint(patch_objects(labels, seen, owned, (6,)), seen, owned, first=number)
    >>> assembly.objects().tolist()
    [0, 1, 1, 0, 2, 0]
    """

    def __init__(self, box: Box) -> None:
        self.box = box
        self._owned = np.zeros(box.shape, np.uint32)
        self._extensions = np.zeros(box.shape, np.uint32)

    def paint(self, objects: PatchObjects, seen: Box, owned: Box, first: int) -> None:
        """Add a patch.

        Args:
            objects: its objects.
            seen: the voxels of the volume that it sees, of which the labels are.
            owned: the voxels that it owns.
            first: number of the object before its first one.
        """
        mine = owned & self.box
        if not mine.empty:
            labels = objects.labels[mine.slices(seen.start)]
            np.add(labels, np.uint32(first), out=self._owned[mine.slices(self.box.start)], where=labels != 0)
        common = seen & self.box
        if common.empty or not objects.extends.any():
            return
        numbers = np.zeros(objects.count + 1, np.uint32)
        numbers[1:] = np.where(objects.extends, np.arange(first + 1, first + 1 + objects.count), 0)
        values = numbers[objects.labels[common.slices(seen.start)]]
        target = self._extensions[common.slices(self.box.start)]
        np.copyto(target, values, where=target == 0)

    def objects(self) -> npt.NDArray[np.uint32]:
        """Return the number of the object of each voxel, 0 for the background."""
        np.copyto(self._owned, self._extensions, where=self._owned == 0)
        return self._owned
