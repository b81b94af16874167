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

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.planning.box import Box, Ints

Array = npt.NDArray[Any]
Labels = npt.NDArray[np.unsignedinteger[Any]]
Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

TABLE = 4
"""Labels per voxel up to which a table finds the ones that occur faster than sorting does."""


@dataclass(frozen=True, slots=True)
class PatchObjects:
    """The objects of one patch.

    Attributes:
        labels: the objects 1 to `count` of the voxels that lie in the volume, 0 the background.
        extends: per object, whether it takes voxels that other patches own: it is seen whole, and its patch owns at
            least one of its voxels.
    """

    labels: Labels
    extends: Flags

    @property
    def count(self) -> int:
        """Number of objects; some may lie beyond the border of the volume."""
        return len(self.extends)


def patch_objects(labels: Array, box: Box, owned: Box, shape: Ints, looped: int = 0) -> PatchObjects:
    """Return the objects of a patch.

    Args:
        labels: labels of its voxels, `(*patch)`, numbered in any way, 0 the background.
        box: place of the patch, which may reach beyond the volume.
        owned: the voxels that the patch owns.
        shape: shape of the volume.
        looped: number of looped axes, along which a patch has one voxel.

    Raises:
        TypeError, ValueError: when these are no labels of objects.

    >>> objects = patch_objects(np.array([7, 7, 0, 3, 0, 9]), Box((0,), (6,)), Box((0,), (4,)), (10,))
    >>> objects.labels.tolist(), objects.extends.tolist()
    ([2, 2, 0, 1, 0, 3], [True, True, False])
    """
    compacted, count = compact(labels)
    extends = seen_whole(compacted, count, box, shape, looped)
    extends &= _present(compacted[owned.slices(box.start)], count)[1:]
    inside = (box & Box.of_shape(shape)).slices(box.start)
    return PatchObjects(np.ascontiguousarray(compacted[inside]), extends)


def compact(labels: Array) -> tuple[Labels, int]:
    """Number labels from 1 without gaps, in their order, in the smallest dtype; 0 stays 0.

    Returns:
        The labels, and the largest one.

    Raises:
        TypeError: when they are not integers.
        ValueError: when one is negative.

    >>> compact(np.array([0, 900, 0, 5]))
    (array([0, 2, 0, 1], dtype=uint8), 2)
    """
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels of objects must be integers, got {labels.dtype}")
    least, most = int(labels.min(initial=0)), int(labels.max(initial=0))
    if least < 0:
        raise ValueError(f"labels of objects must be 0 or more, 0 the background, got {least}")
    if most <= TABLE * labels.size:
        present = _present(labels, most)
        numbers = np.cumsum(present)
        return numbers.astype(np.min_scalar_type(numbers[-1]))[labels], int(numbers[-1])
    values, places = np.unique(labels, return_inverse=True)
    first = int(values[0] != 0)  # the number of the lowest label, if it is not the background
    count = len(values) - 1 + first
    return (places + first).astype(np.min_scalar_type(count)).reshape(labels.shape), count


def _present(labels: Array, most: int) -> Flags:
    """Return whether each label from 0 to `most` occurs; False for the background."""
    present = np.zeros(most + 1, np.bool_)
    present[labels.reshape(-1)] = True
    present[0] = False
    return present


def seen_whole(labels: Labels, count: int, box: Box, shape: Ints, looped: int = 0) -> Flags:
    """Return whether each object of a patch touches no face of it, except at or beyond the border of the volume.

    >>> seen_whole(np.array([1, 0, 2]), 2, Box((0,), (3,)), (10,)).tolist()
    [True, False]
    """
    cut = np.zeros(count + 1, np.bool_)
    for axis in range(looped, labels.ndim):
        for at, is_border in ((0, box.start[axis] <= 0), (-1, box.stop[axis] >= shape[axis])):
            if not is_border:
                cut[labels.take(at, axis).reshape(-1)] = True
    return ~cut[1:]


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

    >>> assembly = Assembly(Box((0,), (6,)))
    >>> assembly.paint(patch_objects(np.array([0, 1, 1, 0]), Box((0,), (4,)), Box((0,), (2,)), (6,)), Box((0,), (4,)),
    ...                Box((0,), (2,)), first=0)
    >>> assembly.paint(patch_objects(np.array([0, 0, 1, 0]), Box((2,), (6,)), Box((2,), (6,)), (6,)), Box((2,), (6,)),
    ...                Box((2,), (6,)), first=1)
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
