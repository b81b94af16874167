"""Chunks of lazy results: what computes them in a process, how it travels to others, and their Dask arrays.

```text
 blocks of objects    one task per chunk, with the values of all heads: the model is called once for all
   array of a head      picks that head's values
   array of a head
```

The graph has one entry for what computes chunks, which each process gets once. It makes the model ready when the first
of its tasks arrives, and puts it back after the last.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dask.array
import numpy as np
import numpy.typing as npt
import torch
from dask.delayed import delayed

from oocpatch.engine.box_values import box_values, scaled_box
from oocpatch.engine.stages import PatchContext
from oocpatch.errors import ClusterLost
from oocpatch.execution.task_context import RunInputs
from oocpatch.models.predictor import use_threads
from oocpatch.outputs.output import channel_position
from oocpatch.planning.box import Box, Ints, cut
from oocpatch.planning.plan import Plan
from oocpatch.planning.windows import axis_weights

if TYPE_CHECKING:
    from oocpatch.execution.payload import WorkerPayload

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Parcel:
    """A source of chunks on its way to another process.

    Attributes:
        plan: the plan as JSON.
        payload: the pickled `WorkerPayload`: it needs the modules of the client, and so is unpacked later.
        versions: versions of the client; a process with other ones refuses.
        folders: directories where the client finds modules, besides what is installed.
    """

    token: str
    plan: str
    cell: Ints
    at_a_time: int
    payload: bytes
    versions: dict[str, str | None]
    folders: tuple[str, ...]

    def load(self) -> RunInputs:
        """Load the model and open the arrays.

        Raises:
            ClusterLost: when this process has other versions. ValueError: when model or volume are not the client's.
        """
        from oocpatch.execution.dask_clients import MUST_AGREE, disagreement, versions_here  # noqa: PLC0415
        from oocpatch.execution.payload import importable  # noqa: PLC0415

        if differing := disagreement(self.versions, versions_here(), MUST_AGREE):
            process = f"process {os.getpid()} on {socket.gethostname()}"
            raise ClusterLost(f"{process} must have the client's versions to compute a lazy result: {differing}")
        with importable(self.folders):
            payload: WorkerPayload = pickle.loads(self.payload)  # noqa: S301 - of a graph, which is code anyway
            return payload.open(0)[1]

    def source(self) -> ChunkSource:
        """Return the source in this process: the one that was sent, where it was not sent to another one."""
        with _LOCK:
            source = _SOURCES.get(self.token)
            if source is None:
                source = ChunkSource(Plan.from_json(self.plan), self.load, self.cell, self.at_a_time, self.token)
                _RECEIVED.append(source)
            return source


_SOURCES: weakref.WeakValueDictionary[str, ChunkSource] = weakref.WeakValueDictionary()
_RECEIVED: deque[ChunkSource] = deque(maxlen=2)
"""Sources that came from another process: kept between calls of `compute`, so that the model is loaded once."""
_LOCK = threading.Lock()


class ChunkSource:
    """Computes chunks of a lazy result, in any thread of any process.

    Args:
        plan: the plan.
        inputs: model and arrays; or a function that loads them here, when the first chunk is computed.
        cell: shape of a chunk, in voxels of the volume.
        at_a_time: chunks that a process computes at the same time.
        token: name of the result.
    """

    def __init__(
        self,
        plan: Plan,
        inputs: RunInputs | Callable[[], RunInputs],
        cell: Ints,
        at_a_time: int,
        token: str | None = None,
    ) -> None:
        self.plan = plan
        self.cell = cell
        self.token = token or secrets.token_hex(8)
        self._inputs = inputs
        self._at_a_time = at_a_time
        self._turns = threading.BoundedSemaphore(at_a_time)
        self._lock = threading.Lock()
        self._tasks: ChunkTasks | None = None
        self._parcel: Parcel | None = None
        _SOURCES[self.token] = self

    def chunk(self, position: Ints) -> list[Array]:
        """Return the values of all heads over a chunk, with their axes in the order of the result."""
        start = tuple(p * n for p, n in zip(position, self.cell, strict=True))
        box = Box(start, tuple(a + n for a, n in zip(start, self.cell, strict=True))) & Box.of_shape(self.plan.shape)
        with self._turns, self._loaded().opened() as context:
            threads = torch.get_num_threads()
            use_threads(1)
            try:
                chunks = box_values(context, box)
            finally:
                use_threads(threads)
        place = channel_position(self.plan)
        return [
            chunk[0] if head.channel_axis is None else np.moveaxis(chunk, 0, place)
            for head, chunk in zip(self.plan.heads, chunks, strict=True)
        ]

    def _loaded(self) -> ChunkTasks:
        with self._lock:
            if self._tasks is None:
                inputs = self._inputs if isinstance(self._inputs, RunInputs) else self._inputs()
                self._tasks = ChunkTasks(self.plan, inputs)
            return self._tasks

    def __reduce__(self) -> tuple[Callable[..., ChunkSource], tuple[Any, ...]]:
        """Travel by addresses, the plan, and the model's spec or pickle.

        Raises:
            ValueError: when the model, or a function around it, cannot be sent to other processes.
        """
        from oocpatch.execution import payload  # noqa: PLC0415 - a second of imports, for other processes only
        from oocpatch.execution.dask_clients import versions_here  # noqa: PLC0415
        from oocpatch.execution.dask_cluster import pickled  # noqa: PLC0415

        if self._parcel is None:
            inputs = self._loaded().inputs
            try:
                data = pickled(payload.WorkerPayload.of(self.plan, inputs, lambda volume, _: payload.as_given(volume)))
            except Exception:
                payload.check_cluster(inputs.options, None)  # which names the part that cannot be sent
                raise
            folders, text = payload.import_folders(), self.plan.to_json()
            self._parcel = Parcel(self.token, text, self.cell, self._at_a_time, data, versions_here(), folders)
        return Parcel.source, (self._parcel,)


class ChunkTasks:
    """Model and arrays that the chunks of a result share in one process, open while one is computed."""

    def __init__(self, plan: Plan, inputs: RunInputs) -> None:
        self.inputs = inputs
        self._plan = plan
        self._predictor = inputs.predictor(plan)
        self._weights = [
            [axis_weights(head.window, axis) for axis in frame.grid.axes] if head.needs_weights else None
            for head, frame in zip(plan.heads, plan.frames, strict=True)
        ]
        self._lock = threading.Lock()
        self._users = 0
        self._stack = contextlib.ExitStack()
        self._context: PatchContext | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[PatchContext]:
        """Yield the context; the first of those who use it opens it, and the last one closes it."""
        with self._lock:
            if self._context is None:
                opened = self.inputs.opened(self._plan, self._predictor, self._weights)
                self._context = self._stack.enter_context(opened)
            context = self._context
            self._users += 1
        try:
            yield context
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._context = None
                    self._stack.close()


def head_arrays(source: ChunkSource) -> list[dask.array.Array]:
    """Return the Dask array of each head, with its axes in the order of the result."""
    plan, cells = source.plan, []
    for length, size in zip(plan.shape, source.cell, strict=True):
        cells.append(tuple(b - a for a, b in cut(0, length, size)))
    name = f"oocpatch-{source.token}"
    shared = delayed(source, name=f"{name}-model", traverse=False)
    blocks = dask.array.map_blocks(  # type: ignore[no-untyped-call] # Dask gives it none
        _chunk, shared, name=f"{name}-chunks", chunks=tuple(cells), dtype=object, meta=np.empty((0,) * len(cells), "O")
    )
    arrays, place = [], channel_position(plan)
    for number, head in enumerate(plan.heads):
        has_channels = head.channel_axis is not None
        whole = scaled_box(Box.of_shape(plan.shape), head.scale)
        step = scaled_box(Box.of_shape(source.cell), head.scale).stop
        chunks: list[Sequence[int]] = [
            tuple(b - a for a, b in cut(0, n, s)) for n, s in zip(whole.stop, step, strict=True)
        ]
        if has_channels:
            chunks.insert(place, (head.out_channels,))
        array = blocks.map_blocks(
            _of_head,
            number,
            name=f"{name}-{head.name}",
            chunks=tuple(chunks),
            new_axis=place if has_channels else None,
            dtype=head.out_dtype,
            meta=np.empty((0,) * len(chunks), head.out_dtype),
        )
        arrays.append(array)
    return arrays


def _chunk(source: ChunkSource, block_id: Ints = ()) -> list[Array]:
    return source.chunk(block_id)


def _of_head(chunk: Sequence[Array], number: int) -> Array:
    return chunk[number]
