"""The user's own loop: patches go in, in any order, and come out as one volume, on disk if it is large.

```text
 sampler --> the user's model --> add_batch --> sums in memory --complete--> output
    ^                                               |    ^
    | without(done)                                 v    |
    +---------------------------------------- commits, sums in the workspace
```

It is the engine of `predict` with the loop turned inside out: sums in float32 over tiles of whole write units, divided
once by the weights, `crop` moving values without arithmetic. Memory stays under a limit. What is complete is written
early, where it is known: when patches come from the grid that `patch_overlap` tells.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import zarr

from oocpatch.aggregation.accumulation import Accumulation
from oocpatch.aggregation.aggregated import AggregatedOutput, ArraySpec
from oocpatch.aggregation.aggregator_batch import Batch, head_specs, read_batch
from oocpatch.aggregation.grid_guess import GridGuess
from oocpatch.aggregation.head_spec import HeadSpec
from oocpatch.engine.buffers import lean_heap
from oocpatch.planning.arguments import memory_limit, per_axis
from oocpatch.planning.grid import PatchLocation
from oocpatch.storage.paths import local_path

logger = logging.getLogger("oocpatch")

COMMIT_SECONDS, COMMIT_SHARE = 5.0, 0.1
"""What was added is made durable every so often, unless that would take more than this share of the time."""


class PatchAggregator:
    """Put patches together to a volume, as TorchIO's class of that name does, on volumes larger than memory.

    Args:
        spatial_shape: spatial shape of the volume that the patches are of, any number of axes.
        overlap_mode: `"crop"` keeps the middle of each patch and moves values without arithmetic; `"average"`, `"hann"`
            and `"gaussian"` blend in float32.
        patch_overlap: voxels shared by adjacent patches, in total, per axis, as for the sampler. `crop` trims half of
            it from each side; the other modes give the same without it, but learn at the end only what is complete.
        output_shape: spatial shape of the output, where the model gives another number of voxels than its patch has;
            default: that of the volume, and with a dict what each tensor's size says.
        store: path of the Zarr group to write; one that an interrupted loop left is resumed. None: the result is kept
            in memory while it fits, else in a temporary directory.
        max_memory: bytes to add to this process, e.g. `"2GiB"`; `"auto"`: a quarter of the machine's. A tensor that
            `get_output` gives comes on top.
        output_chunks: chunks of the output, spatial, in voxels.

    Attributes:
        done: the locations that need not be added again, with a fast `in`: what a loop that was stopped has behind it.

    Raises:
        ValueError, TypeError: for bad arguments.
        RunMismatch: when the store belongs to a loop with other parameters.
        OutputExists: when it holds other data.
        OutputBusy: when another process is writing to it.

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
        self._output_shape = None if output_shape is None else per_axis("output_shape", output_shape, axes, least=1)
        self._chunks = None if output_chunks is None else per_axis("output_chunks", output_chunks, axes, least=1)
        self._limit = memory_limit(max_memory)
        self._sums: Accumulation | None = None
        self._single = True
        self._closed = self._final = False
        self._repeats = 0
        self._committed_at, self._commit_cost = time.monotonic(), 0.0
        self.done = Done(self)
        self._output: AggregatedOutput | None = None
        self._durable = store is not None
        if store is not None:
            self._open(store)

    def __repr__(self) -> str:
        where = "in memory" if self._output is None else f"at {self._output.path}"
        return f"PatchAggregator({self._shape}, {self._mode!r}, patch_overlap={self._overlap}, {where})"

    # Patches

    def add_batch(
        self, batch: torch.Tensor | Mapping[str, torch.Tensor], locations: Sequence[PatchLocation] | PatchLocation
    ) -> None:
        """Add what the model gave for some patches. A patch that was added before is left out.

        Args:
            batch: `(B, C, *spatial)`, or a dict of such tensors, the same keys each time.
            locations: where the `B` patches lie in the volume; they may start below zero or end beyond it.

        Raises:
            ValueError: when they do not fit each other, or what was added before. Nothing is added then.
            PlanTooLarge: when `max_memory` is too small for even one patch.
            CorruptData: when what the workspace holds of earlier patches is damaged; `done` says what is lost.
        """
        if self._closed:
            raise ValueError("a closed aggregator takes no more patches; make a new one with the same store to go on")
        if self._output is not None:
            self._output.check_held()
        read = read_batch(batch, locations, self._shape, self._overlap)
        if not read.places:
            return
        if self._sums is None:
            self._begin(read)
        sums = self._sums
        assert sums is not None
        read.check(sums.heads, single=self._single)
        for size, given in read.given().items():
            sums.expect(size, given)
        repeats = 0
        for i, (start, size) in enumerate(read.places):
            if self._final or sums.has(start, size):
                repeats += 1
            else:
                sums.add(start, size, read.patch(i))
        if repeats:
            self._repeats += repeats
            logger.info("%d patches were added before, and are left out", repeats)
        self._commit_when_due()

    @property
    def num_repeated(self) -> int:
        """Number of patches that were left out because they had been added before."""
        return self._repeats

    # Results

    def get_output(self, key: str | None = None) -> torch.Tensor:
        """The output as a tensor `(C, *spatial)`, in memory as a whole; voxels that no patch covers are zero.

        Patches may still be added afterwards.

        Args:
            key: which of the outputs, when batches are dicts.

        Raises:
            KeyError: for an unknown key, or before the first batch.
        """
        name = self._name(key)
        assert self._sums is not None
        if self._output is None:
            return self._sums.tensor(name)
        self._finish()
        return torch.from_numpy(np.asarray(self._output.array(name)[...]))

    def get_array(self, key: str | None = None) -> zarr.Array[Any]:
        """The output as a Zarr array `(C, *spatial)` on disk; voxels that no patch covers are zero.

        Patches may still be added afterwards. Once all patches of a grid are there, the workspace is deleted.

        Args:
            key: which of the outputs, when batches are dicts.

        Raises:
            KeyError: for an unknown key, or before the first batch.
            CorruptData: when what the workspace holds is damaged; `done` says what is lost.
        """
        name = self._name(key)
        if self._output is None:
            self._attach_temporary()
        assert self._output is not None
        self._finish()
        return self._output.array(name)

    def flush(self) -> None:
        """Make all that was added durable, where there is a store: another process can go on from here."""
        if self._sums is not None and not self._closed:
            if self._output is not None:
                self._output.check_held()
            self._commit()

    def close(self) -> None:
        """Finish the output as it is, with what was added, and delete the workspace: no patch can be added any more."""
        if self._closed:
            return
        if self._sums is not None and self._output is not None:
            self._finish()
            self._complete(final=True)
        self._leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave everything durable, and the output as finished as it can be; a new aggregator can go on from here."""
        if self._closed:
            return
        if self._sums is not None and self._output is not None:
            if error is None:
                self._finish()
            else:
                self._commit()
        self._leave()

    # How it goes on disk

    def _open(self, store: str | os.PathLike[str]) -> None:
        path = local_path("store", store)
        path.check_writable("store")
        asked = {
            "spatial_shape": self._shape,
            "overlap_mode": self._mode,
            "patch_overlap": self._overlap,
            "output_shape": self._output_shape,
            "output_chunks": self._chunks,
        }
        self._output = AggregatedOutput(path, asked)
        record = self._output.record
        if record is None:
            return
        self._output.hold()
        self._single = record.details["single"]
        self._start([HeadSpec.from_json(value) for value in record.details["heads"]])
        sums = self._sums
        assert sums is not None
        arrays, there = self._output.arrays(_array_specs(sums))
        commits = self._output.commits()
        if not there:
            commits.clear()  # a crash came before the arrays, or they were deleted: nothing is done
        sums.attach(arrays, commits)
        if there and record.complete:
            self._output.complete({})
            self._final = record.details["final"]
            for name, known in record.details["given"].items():
                sums.heads[name].given = {tuple(size): tuple(given) for size, given in known}
            guess = GridGuess(self._shape, self._overlap)
            guess.read_json(record.details["grid"])
            sums.start_complete(guess.home)
        else:
            self._output.incomplete()
        sums.restore()

    def _begin(self, first: Batch) -> None:
        """Learn from the first batch what the heads are, and make the output."""
        specs = head_specs(
            first,
            shape=self._shape,
            output_shape=self._output_shape,
            trim=tuple(o // 2 for o in self._overlap) if self._mode == "crop" else None,
            blended=self._mode != "crop",
            chunks=self._chunks,
            limit=self._limit,
        )
        self._single = first.single
        self._start(specs)
        assert self._sums is not None
        try:
            self._sums.expect(*next(iter(first.given().items())))
            if self._output is not None:
                self._output.hold()
                self._attach()
        except BaseException:
            self._sums = None
            raise

    def _start(self, specs: list[HeadSpec]) -> None:
        lean_heap()
        self._sums = Accumulation(
            self._shape,
            self._overlap,
            mode=self._mode,
            specs=specs,
            limit=self._limit,
            on_full=self._attach_temporary,
        )

    def _attach_temporary(self) -> None:
        self._output = AggregatedOutput.temporary()
        self._attach()

    def _attach(self) -> None:
        assert self._output is not None
        assert self._sums is not None
        heads = [asdict(head.spec) for head in self._sums.heads.values()]
        self._output.create({"heads": heads, "single": self._single, "arrays": list(self._sums.heads)})
        arrays, _ = self._output.arrays(_array_specs(self._sums))
        self._sums.attach(arrays, self._output.commits())

    def _commit(self) -> None:
        assert self._sums is not None
        started = time.monotonic()
        self._sums.commit()
        if self._output is not None and self._sums.has_commits:
            self._output.incomplete()
        self._committed_at = time.monotonic()
        self._commit_cost = self._committed_at - started

    def _commit_when_due(self) -> None:
        pause = max(COMMIT_SECONDS, self._commit_cost / COMMIT_SHARE)
        if self._durable and time.monotonic() - self._committed_at >= pause:
            self._commit()

    def _finish(self) -> None:
        """Bring all that was added into the output; when that is complete, say so."""
        assert self._sums is not None
        assert self._output is not None
        assert self._output.record is not None
        if self._closed or (self._output.record.complete and not self._sums.changed):
            return
        self._output.check_held()
        self._commit()
        if self._sums.finish():
            self._complete(final=self._final)

    def _complete(self, *, final: bool) -> None:
        assert self._sums is not None
        assert self._output is not None
        given = {name: list(head.given.items()) for name, head in self._sums.heads.items()}
        details = {"given": given, "grid": self._sums.guess.to_json(), "final": final}
        self._output.complete({**details, "patches": len(self._sums.locations)})
        self._sums.attach({}, self._output.commits())
        self._sums.start_complete(None)

    def _leave(self) -> None:
        self._closed = True
        if self._output is not None:
            self._output.release()

    def _name(self, key: str | None) -> str:
        names = [] if self._sums is None else list(self._sums.heads)
        shown = [] if self._single else names
        if self._sums is None or (key is None) != self._single or (key is not None and key not in names):
            raise KeyError(f"no output for key {key!r}; there are {shown}" if names else "no batch was added yet")
        return names[0] if key is None else key


class Done:
    """The locations that an aggregator need not be given again.

    With a store: those that will be there after a crash. Without one: all that were added.

    Args:
        aggregator: the aggregator.
    """

    def __init__(self, aggregator: PatchAggregator) -> None:
        self._aggregator = aggregator

    def __contains__(self, location: object) -> bool:
        sums = self._aggregator._sums  # noqa: SLF001 - a view of it
        axes = len(self._aggregator._shape)  # noqa: SLF001
        if (
            sums is None
            or not isinstance(location, PatchLocation)
            or not len(location.index) == len(location.size) == axes
        ):
            return False
        durable = self._aggregator._durable  # noqa: SLF001
        final = self._aggregator._final  # noqa: SLF001
        return final or sums.has(location.index, location.size, durable=durable)


def _array_specs(sums: Accumulation) -> list[ArraySpec]:
    specs: Iterable[HeadSpec] = (head.spec for head in sums.heads.values())
    return [ArraySpec(s.name, (s.channels, *s.placement.shape), (1, *s.chunks), s.dtype) for s in specs]


MODES = ("crop", "average", "hann", "gaussian")
MOST_VOXELS = 1 << 60
"""More than any disk holds; ranks of patches stay below the largest integer."""
