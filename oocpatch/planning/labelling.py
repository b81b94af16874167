"""The rule by which voxels become objects: what is foreground, which voxels touch, and which objects count."""

from __future__ import annotations

from dataclasses import dataclass

MERGE_NODE_BYTES, MERGE_BATCH_BYTES = 40, 160
"""Bytes of the merge of objects: per object at a border between blocks, and per pair of a batch or object in order."""

LEAST_MERGE_BYTES = 1 << 21
"""Bytes of a merge with few objects: half of it is for pairs, some thousands of them at least."""

DTYPES = ("uint32", "uint64")
"""Dtypes of ids: the first that holds the number of objects."""


@dataclass(frozen=True, slots=True)
class Labelling:
    """How `oocpatch.label` finds objects.

    Attributes:
        threshold: foreground is what is larger; None: every voxel that is not zero.
        connectivity: axes in which two touching voxels may differ by one.
        per_class: whether an object has voxels of one value only.
        min_size: voxels of the smallest object that counts.

    >>> Labelling(0.5, 1, per_class=True, min_size=0)
    Traceback (most recent call last):
    ...
    ValueError: threshold must be None with per_class=True: classes are labels, and scores have none, got 0.5
    """

    threshold: float | None
    connectivity: int
    per_class: bool
    min_size: int

    def __post_init__(self) -> None:
        if self.threshold is not None and self.per_class:
            raise ValueError(
                "threshold must be None with per_class=True: classes are labels, and scores have none, got "
                f"{self.threshold}"
            )

    def __str__(self) -> str:
        kind = "nonzero voxels" if self.threshold is None else f"voxels above {self.threshold:g}"
        parts = ["equal labels" if self.per_class else kind, f"connectivity {self.connectivity}"]
        return ", ".join(parts + ([f"at least {self.min_size:,} voxels"] if self.min_size > 1 else []))
