"""Copies between main memory and the model's device: one upload of the input, one download of the results.

On the CPU nothing is copied: chunks are decoded into the ring itself, and slabs are written from their own memory. With
a device, both directions use buffers in main memory. With CUDA these are pinned, and copied on one stream for each
direction, so that copies and the model's kernels overlap:

```text
 a block's thread    launches kernels | request: event | launches more kernels, on the current stream
 upload stream                        | waits for the event, copies |
 a reading thread    reads a chunk into its buffer .................| done when the copy is done
```

Two rules make it correct. A copy waits on the device for all kernels launched before it was requested: they may still
use the planes that it replaces, or compute the values that it downloads. And a thread waits for its copy, so that
whatever is launched afterwards sees the copy.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from oocpatch.engine.buffers import buffer
from oocpatch.planning.box import ceil_to
from oocpatch.planning.memory import pinned_bytes

Array = npt.NDArray[Any]

ALIGNMENT = np.dtype(np.float64).itemsize
"""Divisor of the offsets of tensors in common memory, in bytes: the size of the largest dtype."""

RUN_AHEAD = 2
"""Batches whose kernels a block's thread has launched at most, and which are not done."""

CopyDone = Callable[[], None]
"""A function that returns when a copy is done."""


def is_staged(device: str) -> bool:
    """Return whether input and results go through buffers in main memory: where the device has memory of its own."""
    return torch.device(device).type != "cpu"


CONTEXT = 512 << 20
"""Bytes that CUDA takes on a device for each process that uses it."""


def device_memory(device: str, processes: int = 1) -> int | None:
    """Return the bytes that each of some processes may take on CUDA devices; None: the device is none.

    What torch keeps of freed memory, such as that of a probe, is given back.
    """
    place = torch.device(device)
    if place.type != "cuda":
        return None
    torch.cuda.empty_cache()
    sharing = -(-processes // max(1, torch.cuda.device_count()))
    model = torch.cuda.memory_allocated(place)
    return usable(torch.cuda.mem_get_info(place)[0], 0 if processes == 1 else CONTEXT + model, sharing)


def usable(free: int, each: int = 0, sharing: int = 1) -> int:
    """Return the bytes of free memory that each of some processes may plan with, beside so many that it needs anyway.

    An eighth is left for holes between tensors, and the rest rounded down to a power of two: the blocks of a run, and
    with them the last bits of its result, do not change with a few more or fewer bytes that are free.

    >>> usable(79 << 30) >> 30, usable(79 << 30, 1 << 30, sharing=2) >> 30
    (64, 32)
    """
    share = free // sharing - each
    return 1 << (share - share // 8).bit_length() - 1 if share > 0 else 0


class Transfer:
    """Copies to the model's device and back, for all threads of a process.

    Args:
        device: device of the model's input.
        staged: whether to copy through buffers; without them, the device must be the CPU. With them it may be, too.
        read_bytes: bytes of the first buffer of each reading thread; the result of one read should fit into it.

    >>> ring = torch.zeros(2, 3)
    >>> transfer = Transfer("cpu", staged=True)
    >>> with transfer.upload(ring[:, 1:], transfer.queued()) as target:
    ...     target[...] = 7
    >>> ring.tolist()
    [[0.0, 7.0, 7.0], [0.0, 7.0, 7.0]]
    """

    def __init__(self, device: str, *, staged: bool, read_bytes: int = 0) -> None:
        self.staged = staged
        self._device = torch.device(device)
        self._read_bytes = read_bytes
        self._thread_local = threading.local()
        self._up: torch.cuda.Stream | None = None
        self._down: torch.cuda.Stream | None = None
        if staged and self._device.type == "cuda":
            self._up, self._down = _stream(self._device), _stream(self._device)

    def queued(self) -> torch.cuda.Event | None:
        """Return an event after all kernels launched so far on this thread's current stream, for a copy to wait for."""
        return None if self._up is None else _record_event(torch.cuda.current_stream(self._device))

    def limit_run_ahead(self) -> None:
        """Wait until the device has done all that this thread has launched before its last but one call.

        Kernels of more batches would fill the queue of launches, and copies that are requested wait for all of them.
        """
        if self._up is not None:
            events = self._thread_local.__dict__.setdefault("events", deque(maxlen=RUN_AHEAD + 1))
            events.append(self.queued())
            if len(events) > RUN_AHEAD:
                events[0].synchronize()

    @contextlib.contextmanager
    def upload(self, view: torch.Tensor, after: torch.cuda.Event | None) -> Iterator[Array]:
        """Yield an array to fill, whose values are in `view`, of any strides, when the context is left.

        `after` is the event from `queued` at a time when no later kernel needs the old values.
        """
        if not self.staged:
            yield view.numpy()
            return
        size = _size(view)
        memory: torch.Tensor | None = getattr(self._thread_local, "memory", None)
        if memory is None or memory.numel() < size:
            memory = self._thread_local.memory = self.allocate(max(size, self._read_bytes))
        source = _as(memory, view)
        yield source.numpy()
        self._copy(self._up, after, [(view, source)])()

    def allocate(self, size: int) -> torch.Tensor:
        """Return so many bytes of main memory, pinned where the device can copy from it by itself."""
        if self._device.type == "cuda":
            return torch.empty(pinned_bytes(size), dtype=torch.uint8, device="cpu", pin_memory=True)
        return buffer((pinned_bytes(size),), torch.uint8, "cpu")

    def close(self) -> None:
        """Give back pinned memory, which torch keeps otherwise; only when no tensor of it is used any more."""
        if self._up is not None and hasattr(torch, "accelerator") and hasattr(torch.accelerator, "empty_host_cache"):
            torch.accelerator.empty_host_cache()

    def download(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> CopyDone:
        """Begin to copy into the first tensor of each pair, in main memory; the returned function waits for the end."""
        return self._copy(self._down, self.queued(), pairs)

    def _copy(
        self,
        stream: torch.cuda.Stream | None,
        after: torch.cuda.Event | None,
        pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
    ) -> CopyDone:
        """Begin to copy into the first tensor of each pair; the returned function waits for the end.

        Values are copied through `data`, which leaves the tensor's version alone: it would otherwise seem that the
        model writes to a patch that is a view of the ring, when planes beside it are read meanwhile.
        """
        if stream is None:
            for target, source in pairs:
                target.data.copy_(source)
            return _no_wait
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            for target, source in pairs:
                target.data.copy_(source, non_blocking=True)
            return _record_event(stream).synchronize


class HostStaging:
    """Main memory for the pieces of one slab at a time, of at most `size` bytes: the next slab replaces it."""

    def __init__(self, transfer: Transfer, size: int) -> None:
        self._transfer = transfer
        self._size = size
        self._memory: torch.Tensor | None = None

    def download(self, tensors: Sequence[torch.Tensor]) -> tuple[list[Array], CopyDone]:
        """Begin to copy tensors, and return the arrays that have their values once the returned function returns.

        The arrays are valid until the next call. The tensors must not change before the function has returned.
        """
        if not self._transfer.staged:
            return [tensor.numpy() for tensor in tensors], _no_wait
        offsets, needed = [], 0
        for tensor in tensors:
            offsets.append(ceil_to(needed, ALIGNMENT))
            needed = offsets[-1] + _size(tensor)
        if self._memory is None or self._memory.numel() < needed:
            self._memory = None  # free it before more is allocated
            self._memory = self._transfer.allocate(max(needed, self._size))
        copies = [_as(self._memory[start:], tensor) for start, tensor in zip(offsets, tensors, strict=True)]
        return [copy.numpy() for copy in copies], self._transfer.download(zip(copies, tensors, strict=True))


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _as(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the first bytes of memory as a tensor of the dtype and shape of another."""
    return memory[: _size(like)].view(like.dtype).view(like.shape)


def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return a new stream, which waits for no other by itself."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch does not annotate it


def _record_event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Return an event after all work launched so far on a stream; a thread that waits for it does not spin."""
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch does not annotate it
    stream.record_event(event)
    return event


def _no_wait() -> None:
    """Wait for nothing: the copy is done."""
