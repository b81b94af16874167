"""Memory of a block: buffers that return to the operating system when they are dropped, and groups of their users.

A heap retains freed memory, in one arena per thread, so that a process grows beyond its use. Buffers of a block are
mapped instead: they have the size that the plan projects, and are zero without being touched.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import torch

from oocpatch.planning.memory import HEAP_LIMIT, LEAST_MAPPED
from oocpatch.system import c_function, gives_huge_pages_on_request, mapped_memory, resident_memory

logger = logging.getLogger("oocpatch")


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for the name of a numpy dtype."""
    return torch.from_numpy(np.empty(0, name)).dtype


SMALL = 1 << 20
"""Bytes below which a buffer is not mapped, since pages would be left half empty."""

HUGE = 16 << 20
"""Bytes from which a buffer asks for huge pages: each row of a patch is in another page, and looking these up takes 8%
of the CPU time of a run. Smaller buffers would be resident to the last page, and use up the projection's margin."""


def buffer(
    shape: Sequence[int], dtype: torch.dtype, device: str | torch.device, least_mapped: int = SMALL
) -> torch.Tensor:
    """Return a tensor of zeros, mapped if it is in main memory and has at least so many bytes."""
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < least_mapped:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    memory = mapped_memory(size, huge=size >= HUGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(tuple(shape))


MMAP_THRESHOLD, TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -3, -1, -4, -8
"""Parameters of glibc's `mallopt`, from its malloc.h."""

MMAP_MAX_DEFAULT, LARGEST = 1 << 16, (1 << 31) - 1
"""Chunks that glibc maps at most if it is not told otherwise, and the largest value of a parameter."""

HEAP_VARIABLES = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"}
"""Variables of the environment with which a user decides what glibc's heap retains."""

LEAST_TRIM = 4 << 20
"""Least bytes of free memory at the end of the heap before it is trimmed."""


def lean_heap(chunks: int = 0, largest: int = HEAP_LIMIT) -> None:
    """Limit the freed memory that the heap retains, where the C library is glibc, and the user has not decided on that.

    By default, glibc's threshold for mapping grows with the allocations it sees, and each of a dozen threads retains
    megabytes of freed chunks: 120 MiB were resident where 56 were in use. With these settings 56 are, at the same
    speed. They hold for later allocations only: a probe of the model before them cost another 18 MiB.

    Args:
        chunks: bytes of freed chunks that the heap may retain. Without any, the system maps each chunk anew, page by
            page, which took 0.4 of 3.9 s of CPU time.
        largest: bytes of the largest chunk that is retained. Larger tensors of a model are mapped: each one that is
            freed would leave a hole that the next one does not fit into, until there are dozens. Three steps on 1.5 MiB
            exceeded the projected memory by 31 MiB.
    """
    mapped = min(HEAP_LIMIT, max(LEAST_MAPPED, largest + largest // 64 + (1 << 16)))
    if (mallopt := c_function("mallopt")) is not None:
        mallopt(ARENA_MAX, 2)
        if not HEAP_VARIABLES & os.environ.keys():
            mallopt(MMAP_THRESHOLD, mapped)
            mallopt(TRIM_THRESHOLD, max(LEAST_TRIM, chunks // 2))  # of each arena


WATCH_SECONDS, WATCH_BYTES = 0.01, 128 << 20
"""Time between two looks at the resident memory, and more than what cores fill meanwhile: 10 MiB in a millisecond."""


@contextlib.contextmanager
def retaining_heap(retained: int, most: int) -> Iterator[None]:
    """Have the heap retain a model's tensors for its next call as long as the `with` block lasts.

    Mapped anew in each call, their pages take a fifth of the time of a network. Retained, they leave holes that the
    next ones do not fit into, of several times their size, also within one call. So a thread watches the resident
    memory, and returns what is free to the system before `most` is reached. Where the C library is not glibc, or
    the user has decided on its heap, nothing is changed.

    Args:
        retained: bytes that the heap may retain; 0: none.
        most: bytes that the process may add from now on, these included.
    """
    mallopt, trim = c_function("mallopt"), c_function("malloc_trim")
    if not retained or mallopt is None or HEAP_VARIABLES & os.environ.keys():
        yield
        return
    limit = resident_memory() + most - min(WATCH_BYTES, retained // 2)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_SECONDS):
            if resident_memory() > limit:
                trim(0)

    thread = threading.Thread(target=watch, name="oocpatch-heap", daemon=True)
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, LARGEST)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        mallopt(MMAP_MAX, MMAP_MAX_DEFAULT)
        mallopt(TRIM_THRESHOLD, LEAST_TRIM)
        trim(0)


@functools.cache
def warn_without_huge_pages() -> None:
    """Say, once, if torch does not ask for the huge pages that importing the package asks it to ask for.

    Torch reads the variable before its first tensor, and tells nobody. What it asks huge pages for begins with a page;
    the C library puts a header before all else.
    """
    if not gives_huge_pages_on_request() or os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":
        return
    if torch.empty(2 * HEAP_LIMIT, dtype=torch.uint8, device="cpu").data_ptr() % mmap.PAGESIZE:
        logger.warning(
            "torch made tensors before oocpatch was imported, so it does without huge pages in this process, and the "
            "model may take half as long again: restart Python, and import oocpatch first, or set the environment "
            "variable THP_MEM_ALLOC_ENABLE=1"
        )


class FutureGroup:
    """Calls in progress on the threads of a pool, to be waited for together."""

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._futures: list[Future[Any]] = []

    def submit(self, function: Callable[..., Any], /, *args: Any) -> None:
        """Begin a call."""
        self._futures.append(self._pool.submit(function, *args))

    def wait(self) -> None:
        """Wait until all calls are done, or one has failed; then the later ones are still in progress.

        Raises:
            Exception: of the call that failed.
        """
        while self._futures:
            self._futures.pop(0).result()

    def cancel_and_wait(self) -> None:
        """Cancel the calls that have not begun and wait for the others, whatever their result."""
        for future in self._futures:
            future.cancel()
        for future in self._futures:
            if not future.cancelled():
                future.exception()
