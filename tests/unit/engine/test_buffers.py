"""Promises: what a model frees goes back to the system, unless there is memory to retain it, or the user decided."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from oocpatch.engine import buffers
from oocpatch.system import c_function

CHILD = """
import ctypes, resource
from oocpatch.engine.buffers import lean_heap
lean_heap()
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def use():
    block = library.malloc(ctypes.c_size_t(8 << 20))
    ctypes.memset(ctypes.c_void_p(block), 1, 8 << 20)
    library.free(block)

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(c_function("mallopt") is None, reason="the C library is not glibc")
@pytest.mark.parametrize(("variables", "is_mapped"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "33554432"}, False)])
def test_freed_memory_is_mapped_anew_unless_the_user_has_glibc_retain_it(
    variables: dict[str, str], is_mapped: bool
) -> None:
    """Of 8 MiB, ten times, each page is either touched anew or there already."""
    kept = {name: value for name, value in os.environ.items() if name not in buffers.HEAP_VARIABLES}
    variables |= {"MALLOC_TRIM_THRESHOLD_": "1073741824"} if variables else {}
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(command, env=kept | variables, capture_output=True, text=True, check=True)
    pages = 10 * (8 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert int(done.stdout) >= pages if is_mapped else int(done.stdout) < pages // 10


RETAINING = """
import sys, time, torch
from oocpatch.engine import buffers
from oocpatch.system import resident_memory

def use():
    torch.ones(64 << 20, dtype=torch.uint8)

buffers.lean_heap()
use()
before, sizes = resident_memory(), []
with buffers.retaining_heap(*map(int, sys.argv[1:])):
    use()
    time.sleep(50 * buffers.WATCH_SECONDS)
    sizes.append(resident_memory() - before)
sizes.append(resident_memory() - before)
use()
sizes.append(resident_memory() - before)
print(*(round(size / 2**20) for size in sizes))
"""


@pytest.mark.skipif(c_function("malloc_trim") is None, reason="the C library is not glibc")
@pytest.mark.parametrize(
    ("retained", "most", "is_retained"),
    [(0, 96, False), (64, 80, False), (64, 112, True)],
    ids=["none may be", "more than may be", "it may be"],
)
def test_freed_memory_is_retained_within_a_limit_and_until_the_end(retained: int, most: int, is_retained: bool) -> None:
    """64 MiB: a while after they were freed, at the end, and when they are freed once more."""
    clean = {name: value for name, value in os.environ.items() if name not in buffers.HEAP_VARIABLES}
    command = [sys.executable, "-c", RETAINING, str(retained << 20), str(most << 20)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    sizes = [int(size) for size in done.stdout.split()]
    assert [size >= 63 for size in sizes] == [is_retained, False, False], sizes
    assert all(size >= 63 or size <= 2 for size in sizes), sizes
