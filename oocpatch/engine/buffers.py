"""Big buffers that go back to the operating system when they are dropped.

A heap keeps what is freed for later, in one arena per thread, so that a process grows beyond what it uses. Buffers of a
block are mapped instead: what they take is what the plan says, and they are zero without being touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import torch

from oocpatch.planning.memory import HEAP_LIMIT


def torch_dtype(name: str) -> torch.dtype:
    """Torch's dtype of a numpy dtype's name.

    >>> torch_dtype("uint8")
    torch.uint8
    """
    return torch.from_numpy(np.empty(0, name)).dtype


SMALL = 1 << 20
"""Bytes below which a mapping of its own is not worth its pages."""


HUGE = 16 << 20
"""Bytes from which on a buffer asks for huge pages: rows of a patch lie in a page each, and finding these takes 8% of
the CPU time of a run. Smaller buffers would be resident to the last page, and leave no room for what nobody counts."""


def buffer(shape: Sequence[int], dtype: torch.dtype, device: str | torch.device) -> torch.Tensor:
    """A tensor of zeros.

    >>> buffer((2, 3), torch.float32, "cpu").sum()
    tensor(0.)
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < SMALL:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(tuple(shape))


MMAP_THRESHOLD, TRIM_THRESHOLD, ARENA_MAX = -3, -1, -8
"""Names of glibc's settings, from its malloc.h."""


LEAST_TRIM = 4 << 20
"""Bytes of free memory at the end of the heap that it may keep at least."""


LEAST_MAPPED = 11 << 17
"""Bytes up to which nothing is mapped by itself: what zstd takes for coding a chunk, again and again, is 1.3 MiB."""


def lean_heap(chunks: int = 0, largest: int = HEAP_LIMIT) -> None:
    """Keep the heap from holding on to what is freed, where the C library is glibc.

    Left alone, its threshold for mapping grows with the blocks it sees, and each of a dozen threads keeps megabytes of
    freed chunks: 120 MiB were resident where 56 were in use, and are with these settings, at the same speed. They count
    for what is allocated from then on: a probe of the model before them cost another 18 MiB.

    Args:
        chunks: bytes of chunks that it may keep: what is allocated and freed for each chunk would else be fetched from
            the system anew each time, page by page, which took 0.4 of 3.9 s of CPU time.
        largest: bytes of the largest chunk, which is kept. What a model allocates beyond is not: each tensor that is
            freed leaves a hole that the next one of its size does not fit into, until there are dozens. Three steps on
            1.5 MiB went over the promised memory by 31 MiB.
    """
    mapped = min(HEAP_LIMIT, max(LEAST_MAPPED, largest + largest // 64 + (1 << 16)))
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, mapped)
        mallopt(TRIM_THRESHOLD, max(LEAST_TRIM, chunks // 2))  # of each arena
        mallopt(ARENA_MAX, 2)


class FutureGroup:
    """Calls that threads of a pool are working on.

    Args:
        pool: the threads.
    """

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._futures: list[Future[Any]] = []

    def submit(self, function: Callable[..., Any], /, *args: Any) -> None:
        """Begin a call."""
        self._futures.append(self._pool.submit(function, *args))

    def wait(self) -> None:
        """Until all calls are done; the first that failed raises here."""
        futures, self._futures = self._futures, []
        for future in futures:
            future.result()

    def cancel_and_wait(self) -> None:
        """Until no call is running any more; what failed is of no interest."""
        for future in self._futures:
            future.cancel()
        for future in self._futures:
            if not future.cancelled():
                future.exception()
