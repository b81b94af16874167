"""Promise: what a model frees goes back to the system, unless the user set glibc's variables for that."""

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
