"""The operating system: calls that exist on Linux or on POSIX only, each with what takes its place elsewhere.

No other module makes such a call: `tests/unit/test_system.py` has the list, and runs the package without them.

Libraries that may not be installed are imported here, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

import psutil

OPEN_FILES_STAY = sys.platform == "win32"
"""True where a file that a process has open can neither be renamed or replaced nor deleted."""

CLOSING_SECONDS = 2.0
"""How long such a file is waited for."""

Result = TypeVar("Result")

_POSITION = threading.Lock()
"""Held while the position in a file is moved, where no call reads or writes at a place."""


def import_extra(library: str, extra: str, purpose: str, error: type[Exception] = ValueError) -> Any:
    """Import a library that is installed with an extra of this package.

    Args:
        library: name of the module.
        extra: name of the extra.
        purpose: what it is needed for; the message begins with it.
        error: class of the error.

    Raises:
        ValueError: or `error`, if the library is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(library)
    except ImportError as missing:
        raise error(
            f"{purpose} needs {missing.name or library}, which is not installed; pip install 'oocpatch[{extra}]'"
        ) from missing


def _module(name: str) -> Any:
    """Return a module of the standard library; None on systems that do not have it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_fcntl, _resource = _module("fcntl"), _module("resource")


def c_function(name: str) -> Any:
    """Return a function of the C library, which sets `ctypes.get_errno()`; None where there is none of this name."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # on Windows the library has no name
        return getattr(ctypes.CDLL(None, use_errno=True), name)
    return None


def sync_all() -> None:
    """Have all file systems take what was written to them, where there is such a call."""
    if hasattr(os, "sync"):
        os.sync()


def usable_cores() -> int:
    """Return the number of cores that this process may use: of its affinity, and of its container's quota."""
    from dask.system import cpu_count  # noqa: PLC0415 - not for commands that count no cores: it imports all of Dask

    return int(cpu_count())


def resident_memory() -> int:
    """Return the bytes that are resident in this process."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Return the most bytes that were resident in this process since its start."""
    if _resource is None:
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))  # of Windows
    peak = int(_resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def mapped_memory(size: int, *, huge: bool) -> mmap.mmap:
    """Return so many bytes of zeros that go back to the system when they are dropped; `huge` asks for huge pages."""
    flags = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    memory = mmap.mmap(-1, size, flags=flags) if flags else mmap.mmap(-1, size)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def gives_huge_pages_on_request() -> bool:
    """Return whether the system gives huge pages to programs that ask for them, and only to these."""
    try:
        return "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False


def after_fork(function: Callable[[], None]) -> None:
    """Call a function in each process that is forked from this one, where processes are forked."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def leave_interrupts_to_others() -> None:
    """Keep Ctrl-C from this thread and from the processes that it starts, where threads have such a mask.

    A terminal, and the stop button of a notebook, interrupt all processes of the group.
    """
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # which would undo the mask when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def open_to_read(path: Path) -> int:
    """Return the descriptor of a file, without waiting for one that is no file, such as a pipe."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))


def expect_random_reads(descriptor: int) -> None:
    """Tell the system, where it listens, that a file is read here and there: it then reads no further than asked."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def read_at(descriptor: int, out: memoryview, offset: int) -> int:
    """Read bytes at a place of a file, from any thread, and return their number: 0 at its end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [out], offset)
    with _POSITION:
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, len(out))
    out[: len(data)] = data
    return len(data)


def write_at(descriptor: int, data: memoryview, offset: int) -> int:
    """Write bytes at a place of a file, from any thread, and return their number."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    with _POSITION:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)


def when_closed(change: Callable[[], Result]) -> Result:
    """Rename or delete a file; on Windows wait for those that have it open for a moment, such as a scanner for viruses.

    Raises:
        PermissionError: when it is still open.
    """
    deadline = time.monotonic() + CLOSING_SECONDS
    while True:
        try:
            return change()
        except PermissionError:
            if not OPEN_FILES_STAY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def is_url(address: str) -> bool:
    """Return whether an address is a URL; a path of Windows may begin with the letter of a drive.

    >>> is_url("s3://bucket/scan.zarr"), is_url("C://scan.zarr"), is_url("scan.zarr")
    (True, False, False)
    """
    return "://" in address and address[1:2] != ":"


def move_if_absent(source: Path, target: Path) -> None:
    """Give a file a name that no other file has; of several processes that try at the same time, one succeeds.

    Where a file cannot have two names, the new one is there a moment before its content.

    Raises:
        FileExistsError: when there is a file of this name.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except (OSError, AttributeError):  # of file systems, and of systems, without hard links
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        source.replace(target)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a lock on a directory, for which others wait; without one where there are none."""
    with contextlib.ExitStack() as stack:
        if _fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                _fcntl.flock(handle, _fcntl.LOCK_EX)
        yield
