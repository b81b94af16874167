"""Between main memory and the model's device: input goes up once, results come down once.

On the CPU nothing moves: what is read goes into the ring itself, and what leaves it is written from where it lies.
Elsewhere both ways lead through buffers in main memory. With CUDA these are pinned, and copied on a stream for each
way, so that copies and the model's kernels overlap:

```text
 a block's thread    launches kernels | request: event | launches more kernels, on the current stream
 upload stream                        | waits for the event, copies |
 a reading thread    reads a chunk into its buffer .................| done when the copy is done
```

Two rules make it right. A copy waits on the device for all that was launched when it was asked for: kernels may still
use the planes that it replaces, or make the values that it takes away. And a thread says that it is done when its copy
is done, so that whatever is launched afterwards finds the copy there.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from oocpatch.engine.buffers import buffer
from oocpatch.planning.memory import pinned_bytes

Array = npt.NDArray[Any]
CopyDone = Callable[[], None]
"""Returns when a copy is done."""


def is_staged(device: str) -> bool:
    """Whether what is read and written goes through buffers in main memory: where the device has memory of its own.

    >>> is_staged("cpu"), is_staged("cuda:1")
    (False, True)
    """
    return torch.device(device).type != "cpu"


class Transfer:
    """The way to the model's device and back, for all threads of a process.

    Args:
        device: where the model takes its patches.
        staged: whether to go through buffers; without, the device must be the CPU. With them it may be, too.
        read_bytes: of the buffer that each reading thread begins with; what one read gives should fit.

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
        self._of_thread = threading.local()
        self._up: torch.cuda.Stream | None = None
        self._down: torch.cuda.Stream | None = None
        if staged and self._device.type == "cuda":
            self._up, self._down = _stream(self._device), _stream(self._device)

    def queued(self) -> torch.cuda.Event | None:
        """All that was launched so far on this thread's current stream, for a copy to wait for."""
        return None if self._up is None else _recorded(torch.cuda.current_stream(self._device))

    @contextlib.contextmanager
    def upload(self, view: torch.Tensor, after: torch.cuda.Event | None) -> Iterator[Array]:
        """An array of a tensor's shape and dtype to be filled, whose values are in the tensor when the block is left.

        Args:
            view: of memory on the device, with any strides.
            after: what `queued` gave when nothing that is launched later was to need the old values.
        """
        if not self.staged:
            yield view.numpy()
            return
        size = _size(view)
        memory: torch.Tensor | None = getattr(self._of_thread, "memory", None)
        if memory is None or memory.numel() < size:
            memory = self._of_thread.memory = self.memory(max(size, self._read_bytes))
        source = _as(memory, view)
        yield source.numpy()
        self._copy(self._up, after, [(view, source)])()

    def memory(self, size: int) -> torch.Tensor:
        """Bytes of main memory that the device reads and writes by itself, if it can."""
        if self._device.type == "cuda":
            return torch.empty(pinned_bytes(size), dtype=torch.uint8, pin_memory=True)
        return buffer((pinned_bytes(size),), torch.uint8, "cpu")

    def download(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> CopyDone:
        """Begin to copy into the first of each pair, in main memory; what is given back waits for the end."""
        return self._copy(self._down, self.queued(), pairs)

    def _copy(
        self,
        stream: torch.cuda.Stream | None,
        after: torch.cuda.Event | None,
        pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
    ) -> CopyDone:
        """Copy into the first of each pair; what is given back returns when that is done.

        By `data`, which does not count: a patch that is a view of the ring must not seem to be written by the model
        because planes beside it are read meanwhile.
        """
        if stream is None:
            for target, source in pairs:
                target.data.copy_(source)
            return _nothing
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            for target, source in pairs:
                target.data.copy_(source, non_blocking=True)
            return _recorded(stream).synchronize


class HostStaging:
    """Where the parts of a slab come down, one slab at a time: the next one goes to the same memory.

    Args:
        transfer: the way.
        size: bytes of the largest slab.
    """

    def __init__(self, transfer: Transfer, size: int) -> None:
        self._transfer = transfer
        self._size = size
        self._memory: torch.Tensor | None = None

    def take(self, tensors: Sequence[torch.Tensor]) -> tuple[list[Array], CopyDone]:
        """Arrays that hold what tensors hold, as soon as the function beside them returns.

        They are valid until the next call. The tensors must not change before the function has returned.
        """
        if not self._transfer.staged:
            return [tensor.numpy() for tensor in tensors], _nothing
        offsets = _offsets(tensors)
        needed = offsets.pop()
        if self._memory is None or self._memory.numel() < needed:
            self._memory = None  # before there is another
            self._memory = self._transfer.memory(max(needed, self._size))
        found = [_as(self._memory[at:], tensor) for at, tensor in zip(offsets, tensors, strict=True)]
        return [one.numpy() for one in found], self._transfer.download(zip(found, tensors, strict=True))


def _offsets(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Where each of the tensors begins, as its dtype needs it, and where the last one ends."""
    found, end = [], 0
    for tensor in tensors:
        start = math.ceil(end / ALIGNMENT) * ALIGNMENT
        found.append(start)
        end = start + _size(tensor)
    return [*found, end]


ALIGNMENT = np.dtype(np.float64).itemsize
"""Bytes that the places of values in memory are multiples of: the largest dtype's."""


def _size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def _as(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The first bytes as values of a tensor's dtype and shape."""
    return memory[: _size(like)].view(like.dtype).view(like.shape)


def _stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of its own, which waits for no other unless told to."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch does not annotate it


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """All that was launched so far on a stream; a thread that waits for it leaves its core to those that decode."""
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch does not annotate it
    stream.record_event(event)
    return event


def _nothing() -> None:
    """Nothing to wait for."""
