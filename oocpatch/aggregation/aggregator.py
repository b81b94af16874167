"""The user's own loop: patches go in, in any order, and come out as one volume, on disk if it is large.

```text
 sampler --> the user's model --> add_batch --> sums in memory --complete--> output
    ^                                               |    ^
    | without(done)                                 v    |
    +---------------------------------------- commits, sums in the workspace
```

It is the engine of `predict` with the loop turned inside out: sums in float32 over tiles of whole write units, divided
once by the weights, `crop` moving values without arithmetic. Memory stays under a limit. Complete tiles are written
early where patches come from the grid that `patch_overlap` implies.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
import zarr

from oocpatch.aggregation.accumulation import Accumulation
from oocpatch.aggregation.aggregated_output import AggregatedOutput
from oocpatch.aggregation.batches import Batch, head_specs, read_batch, without_context
from oocpatch.aggregation.placement import HeadSpec, Lattice
from oocpatch.engine.buffers import lean_heap
from oocpatch.errors import CorruptData
from oocpatch.planning.arguments import memory_limit, per_axis
from oocpatch.planning.grid import PatchLocation
from oocpatch.storage.paths import local_path

logger = logging.getLogger("oocpatch")

COMMIT_SECONDS, COMMIT_SHARE = 5.0, 0.1
"""Patches are made durable every so many seconds, unless that would take more than this share of the time."""
MODES = ("crop", "average", "hann", "gaussian")
MOST_VOXELS = 1 << 60
"""More than any disk holds; ranks of patches stay below the largest integer."""


class PatchAggregator:
    """Assemble patches into a volume that may be larger than memory, with the interface of TorchIO's class.

    Patches may arrive in any order, from any grid or none; a patch that is added twice counts once.

    Args:
        spatial_shape: shape of the volume in voxels, one size per axis, any number of axes.
        overlap_mode: `"crop"` keeps the middle of each patch, in its dtype and bit by bit; `"average"`, `"hann"` and
            `"gaussian"` blend in float32.
        patch_overlap: voxels that adjacent patches share per axis, both sides together, as for the sampler. `crop`
            trims half of it from each side. The other modes give the same result without it, but can then write
            complete parts only at the end.
        output_shape: spatial shape of the output, for a model that changes the number of voxels. Default: the shape of
            the volume; with a dict, the scale of each tensor.
        context: voxels of a patch that its output lacks on each side, as after convolutions without padding; a part of
            `patch_overlap // 2`. With the sampler's `padding_mode`, no border of the volume is missing.
        store: local path of the Zarr group to write. A store that an interrupted loop left is resumed. None keeps the
            result in memory while it fits, and else in a temporary directory.
        max_memory: bytes that this process may use in addition, e.g. `"2GiB"`; `"auto"` is a quarter of the machine's
            memory. The tensor that `get_output` returns is not included.
        output_chunks: spatial chunks of the output, in voxels.

    Attributes:
        done: locations that need not be added again, for `location in aggregator.done`; with a store, those that
            survive a crash.

    Raises:
        ValueError, TypeError: if an argument is invalid.
        RunMismatch: if the store belongs to a loop with other parameters.
        OutputExists: if the store contains other data.
        OutputBusy: if another process is writing to the store.

    >>> aggregator = PatchAggregator((4, 4), "average", patch_overlap=(0, 2))
    >>> locations = [PatchLocation((0, 0), (4, 3)), PatchLocation((0, 1), (4, 3))]
    >>> aggregator.add_batch(torch.stack([torch.zeros(1, 4, 3), torch.ones(1, 4, 3)]), locations)
    >>> aggregator.get_output()[0, 0]
    tensor([0.0000, 0.5000, 0.5000, 1.0000])
    """

    def __init__(
        self,
        spatial_shape: Sequence[int],
        overlap_mode: str = "crop",
        patch_overlap: int | Sequence[int] = 0,
        output_shape: Sequence[int] | None = None,
        *,
        context: int | Sequence[int] = 0,
        store: str | os.PathLike[str] | None = None,
        max_memory: int | float | str = "auto",
        output_chunks: int | Sequence[int] | None = None,
    ) -> None:
        if isinstance(spatial_shape, (int, np.integer)) or not len(spatial_shape):
            raise ValueError(f"spatial_shape must have one size per axis, got {spatial_shape!r}")
        axes = [str(axis) for axis in range(len(spatial_shape))]
        self._shape = per_axis("spatial_shape", spatial_shape, axes, least=1)
        if math.prod(self._shape) >= MOST_VOXELS:
            raise ValueError(f"spatial_shape must have fewer than 2**60 voxels, got {self._shape}")
        if overlap_mode not in MODES:
            raise ValueError(f"overlap_mode must be one of {', '.join(MODES)}, got {overlap_mode!r}")
        self._mode = overlap_mode
        self._overlap = per_axis("patch_overlap", patch_overlap, axes)
        self._context = per_axis("context", context, axes)
        both = zip(self._context, self._overlap, strict=True)
        if any(2 * c > o for c, o in both if o or overlap_mode == "crop"):  # the others do without an overlap
            raise ValueError(f"context must be at most half of patch_overlap, got {self._context} and {self._overlap}")
        self._output_shape = None if output_shape is None else per_axis("output_shape", output_shape, axes, least=1)
        self._chunks = None if output_chunks is None else per_axis("output_chunks", output_chunks, axes, least=1)
        self._limit = memory_limit(max_memory)
        self._sums: Accumulation | None = None
        self._store: AggregatedOutput | None = None
        self._closed = self._final = False
        self._subjects: set[int] = set()
        self._committed_at, self._commit_cost = time.monotonic(), 0.0
        self.done = Done(self)
        self.num_repeated = 0
        """Number of patches that were left out because they had been added before."""
        if store is not None:
            self._open(store)

    def __repr__(self) -> str:
        where = "in memory" if self._output is None else f"at {self._output.path}"
        return f"PatchAggregator({self._shape}, {self._mode!r}, patch_overlap={self._overlap}, {where})"

    # Patches

    def add_batch(
        self, batch: torch.Tensor | Mapping[str, torch.Tensor], locations: Sequence[PatchLocation] | PatchLocation
    ) -> None:
        """Add the model's output for some patches. Patches that were added before are left out.

        Args:
            batch: `(B, C, *spatial)`, or a dict of such tensors, with the same keys each time.
            locations: locations of the `B` patches in the volume; they may start below zero or end beyond it.

        Raises:
            ValueError: if they do not fit each other, or earlier batches. Nothing is added then.
            PlanTooLarge: if `max_memory` is too small for one patch.
            CorruptData: if the workspace is damaged; the patches that are not in `done` must be added again.
        """
        if self._closed:
            raise ValueError("a closed aggregator takes no more patches; make a new one with the same store to go on")
        if self._output is not None:
            self._output.check_held()
        checked = read_batch(batch, locations, self._shape, self._overlap, self._context)
        if not checked.patches:
            return
        subjects = self._subjects | checked.subjects
        if len(subjects) > 1:
            listed = " and ".join(map(str, sorted(subjects)))
            raise ValueError(
                f"locations must be of one subject, got subject_index {listed}; use an aggregator for each"
            )
        sums = self._sums or self._begin(checked)
        checked.check(sums.heads, single=sums.single)
        for size in {size for _, size in checked.patches}:
            sums.expect(size, checked.out_size)
        self._subjects = subjects
        if self._sums is None:
            if self._store is not None:
                self._store.hold()
                sums.create_output()
            self._sums = sums
        repeats = 0
        for i, patch in enumerate(checked.patches):
            repeats += self._final or not sums.add(patch, functools.partial(checked.patch, i))
        if repeats:
            self.num_repeated += repeats
            logger.info("%d patches were added before, and are left out", repeats)
        started = time.monotonic()
        if started - self._committed_at >= max(COMMIT_SECONDS, self._commit_cost / COMMIT_SHARE):
            sums.commit()
            self._committed_at = time.monotonic()
            self._commit_cost = self._committed_at - started

    # Results

    def get_output(self, key: str | None = None) -> torch.Tensor:
        """Return an output as a tensor `(C, *spatial)`, in memory as a whole; see `get_array`."""
        sums, name = self._find(key)
        if sums.output is None:
            return sums.tensor(name)
        self._finish()
        return torch.from_numpy(np.asarray(sums.output.array(name)[...]))

    def get_array(self, key: str | None = None) -> zarr.Array[Any]:
        """Return an output as a Zarr array `(C, *spatial)` on disk; voxels that no patch covers are zero.

        Patches may still be added afterwards. Once all patches of a grid are there, the workspace is deleted.

        Args:
            key: the output's key, when batches are dicts.

        Raises:
            KeyError: for an unknown key, or before the first batch.
            CorruptData: if the workspace is damaged; the patches that are not in `done` must be added again.
        """
        sums, name = self._find(key)
        output = sums.output or sums.create_output()
        self._finish()
        return output.array(name)

    def flush(self) -> None:
        """Make all patches durable, if there is a store: another process can then resume from here."""
        if not self._closed and self._sums is not None and self._output is not None:
            self._output.check_held()
            self._sums.commit()

    def close(self) -> None:
        """Finish the output with the patches so far and delete the workspace: no patch can be added any more."""
        self._finish()
        if not self._closed and self._sums is not None and self._output is not None and not self._output.is_complete:
            self._sums.complete(None)
            self._final = True
        self._leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Make all patches durable, and without an error bring them into the output; a new aggregator can resume."""
        if kind is None:
            self._finish()
        elif not self._closed and self._sums is not None:
            self._sums.commit()
        self._leave()

    # The output on disk

    def _open(self, store: str | os.PathLike[str]) -> None:
        """Resume from a store, if it has an output."""
        path = local_path("store", store)
        path.check_writable("store")
        parameters = {
            "spatial_shape": self._shape,
            "overlap_mode": self._mode,
            "patch_overlap": self._overlap,
            "context": self._context,
            "output_shape": self._output_shape,
            "output_chunks": self._chunks,
        }
        self._store = output = AggregatedOutput(path, parameters)
        if output.record is None:
            return
        output.hold()
        details = output.record.details
        specs = [HeadSpec.from_json(spec) for spec in details["heads"]]
        self._sums = sums = self._accumulation(specs, single=details["single"])
        is_whole = output.open_arrays(specs)
        for name, sizes in details.get("out_size", {}).items():
            sums.heads[name].out_size = {tuple(size): tuple(out_size) for size, out_size in sizes}
        if is_whole and output.record.complete:
            output.update(complete=True)  # a crash may have come before the workspace was deleted
            self._final = details["final"]
        lattice, commits = details.get("lattice"), []
        try:
            commits = output.commits() if is_whole else []
        except CorruptData as error:
            logger.warning("%s: all patches must be added again", error)
        if not is_whole or not (commits or output.record.complete):  # arrays were deleted, or all commits are lost
            lattice, commits = None, []
            output.clear()
            output.update(complete=False, lattice=None)
        sums.restore(lattice and Lattice.from_json(lattice), commits)

    def _begin(self, first: Batch) -> Accumulation:
        """Return empty sums for the heads that the first batch shows."""
        inner = zip(self._overlap, self._context, strict=True)
        overlaps = [o - 2 * c if self._mode == "crop" else None for o, c in inner]
        specs = head_specs(first, self._shape, self._output_shape, overlaps, self._context)
        limit = self._limit // len(specs)
        specs = [spec.cut(first.out_size[spec.name], self._chunks, limit) for spec in specs]
        return self._accumulation(specs, single=first.single)

    def _accumulation(self, specs: Sequence[HeadSpec], *, single: bool) -> Accumulation:
        lean_heap()
        geometry = self._shape, self._overlap, self._context, self._mode
        return Accumulation(*geometry, specs, single=single, limit=self._limit, output=self._store)

    @property
    def _output(self) -> AggregatedOutput | None:
        """The output on disk, if there is one."""
        return self._store if self._sums is None else self._sums.output

    def _finish(self) -> None:
        """Bring all patches into the output."""
        if not self._closed and self._sums is not None and self._output is not None:
            self._output.check_held()
            self._sums.finish()

    def _leave(self) -> None:
        self._closed = True
        if self._output is not None:
            self._output.release()

    def _find(self, key: str | None) -> tuple[Accumulation, str]:
        """Return the sums, and the name of the output with a key."""
        if self._sums is None:
            raise KeyError("no batch was added yet")
        names = list(self._sums.heads)
        single = self._sums.single
        if (key is None) != single or (key is not None and key not in names):
            raise KeyError(f"no output for key {key!r}; there are {[] if single else names}")
        return self._sums, names[0] if key is None else key


class Done:
    """The locations that need not be added again: all that were added; with a store, those that survive a crash."""

    def __init__(self, aggregator: PatchAggregator) -> None:
        self._aggregator = aggregator

    def __contains__(self, location: object) -> bool:
        aggregator = self._aggregator
        sums, axes = aggregator._sums, len(aggregator._shape)  # noqa: SLF001 - a view of it
        if not (sums and isinstance(location, PatchLocation) and len(location.index) == len(location.size) == axes):
            return False
        patch = without_context(location.index, location.size, aggregator._context)  # noqa: SLF001
        return aggregator._final or sums.has(patch)  # noqa: SLF001
