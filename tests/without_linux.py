"""The package without what Linux or POSIX alone have, and with the rules of Windows: for one test, or for many.

pytest -p tests.without_linux tests/unit

The rules hold for all of Python in the process: a file that is open or mapped can neither be renamed or replaced nor
deleted, `rename` replaces nothing, directories cannot be opened, what was opened to read cannot be flushed, names have
no `:` and the like, and processes start anew, since there is no fork.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import fcntl
import functools
import importlib
import io
import mmap
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NAMES: dict[ModuleType, tuple[str, ...]] = {
    os: (
        "O_NONBLOCK",
        "fork",
        "posix_fadvise",
        "pread",
        "preadv",
        "pwrite",
        "readv",
        "register_at_fork",
        "sched_getaffinity",
        "sync",
    ),
    mmap: ("MADV_HUGEPAGE", "MAP_ANONYMOUS", "MAP_PRIVATE"),
}
MODULES = ("fcntl", "resource")
FORBIDDEN = re.compile(r'[<>:"|?*\0-\x1f\\]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)
"""What a name of a file must not have on Windows."""
LASTING = contextlib.ExitStack()
"""What the plugin has hidden and refuses; without a name that lasts, the rules would end when they are set."""
needs_fork = pytest.mark.skipif("not hasattr(os, 'fork')", reason="no process can be forked here")


@contextlib.contextmanager
def without_linux() -> Iterator[None]:
    """Hide the names, and load anew what has looked for them when it was imported."""
    from oocpatch import system  # noqa: PLC0415 - not before a plugin hides names
    from oocpatch.storage import files  # noqa: PLC0415

    with contextlib.ExitStack() as stack:
        hide(stack)
        importlib.reload(system)
        importlib.reload(files)
        yield
    importlib.reload(system)
    importlib.reload(files)


def hide(stack: contextlib.ExitStack) -> None:
    """Hide the names, until the stack is closed."""
    library = ctypes.CDLL

    def named(name: str | None, *args: Any, **kwargs: Any) -> ctypes.CDLL:
        if name is None:
            raise TypeError("LoadLibrary() argument 1 must be str, not None")
        return library(name, *args, **kwargs)

    put(stack, ctypes, "CDLL", named)
    for module, names in NAMES.items():
        for name in filter(functools.partial(hasattr, module), names):
            stack.callback(setattr, module, name, getattr(module, name))
            delattr(module, name)
    # from Python 3.13 on; it calls `sched_getaffinity` if that was there at the import
    if hasattr(os, "process_cpu_count"):
        put(stack, os, "process_cpu_count", os.cpu_count)
    for name in MODULES:
        stack.callback(sys.modules.__setitem__, name, importlib.import_module(name))
        sys.modules[name] = None  # type: ignore[assignment] # importing it then fails


def put(stack: contextlib.ExitStack, module: ModuleType, name: str, value: Any) -> None:
    """Put a value in place of a module's, until the stack is closed."""
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, value)


@contextlib.contextmanager
def rules_of_windows() -> Iterator[None]:
    """Refuse what Windows refuses."""
    from oocpatch import system  # noqa: PLC0415 - not before a plugin hides names

    with contextlib.ExitStack() as stack:
        for name in ("unlink", "remove", "rename", "replace"):
            put(stack, os, name, functools.partial(change_closed, getattr(os, name)))
        put(stack, os, "open", functools.partial(open_number, os.open))
        put(stack, os, "fsync", functools.partial(flush_written, os.fsync))
        named = functools.partial(open_file, io.open)
        put(stack, io, "open", named)
        put(stack, builtins, "open", named)
        for module in (tempfile, importlib.import_module("_pytest.capture")):
            put(stack, module, "TemporaryFile", tempfile.NamedTemporaryFile)  # as tempfile itself has it there
        put(stack, shutil, "_use_fd_functions", value=False)
        put(stack, system, "OPEN_FILES_STAY", value=True)
        stack.callback(multiprocessing.set_start_method, multiprocessing.get_start_method(allow_none=True), force=True)
        multiprocessing.set_start_method("spawn", force=True)
        yield


def change_closed(change: Callable[..., Any], *paths: Any, **options: Any) -> Any:
    """Delete or rename a file that nobody has open."""
    for path in paths:
        if user := user_of(path):
            raise PermissionError(errno.EACCES, f"The process cannot access the file, which is {user}", path)
    if len(paths) > 1:
        check_name(paths[1])
        if change.__name__ == "rename" and os.path.lexists(paths[1]):
            raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", paths[1])
    return change(*paths, **options)


def user_of(path: Any) -> str:
    """Say how this process uses a file, or a file below a directory; empty if it does not."""
    file = Path(os.fsdecode(path))
    real = str(file.parent.resolve() / file.name)
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(link.readlink())
            if target.startswith(f"{real}/") or (target == real and not file.is_dir()):
                return f"open as {link.name}"
    with io.FileIO("/proc/self/maps") as maps:
        return "mapped" if f" {real}\n".encode() in maps.read() else ""


def open_file(opened: Callable[..., Any], file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
    """Open a file whose name may be one."""
    if not isinstance(file, int) and set(mode) & set("wax"):
        check_name(file)
    return opened(file, mode, *args, **options)


def open_number(opened: Callable[..., int], path: Any, flags: int, *args: Any, **options: Any) -> int:
    """Open a file, but no directory."""
    if Path(os.fsdecode(path)).is_dir():
        raise PermissionError(errno.EACCES, "Permission denied", path)
    if flags & os.O_CREAT:
        check_name(path)
    return opened(path, flags, *args, **options)


def flush_written(flush: Callable[[int], None], number: int) -> None:
    """Flush a file that may be written to."""
    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    flush(number)


def check_name(path: Any) -> None:
    """Refuse a name that Windows does not have."""
    if FORBIDDEN.search(Path(os.fsdecode(path)).name):
        raise OSError(errno.EINVAL, "The filename, directory name, or volume label syntax is incorrect", path)


def pytest_load_initial_conftests() -> None:
    """Hide the names before the package is imported; only a plugin that `-p` names is asked so early."""
    for name in ("psutil", "torch", "zarr"):  # which go by the name of the system
        importlib.import_module(name)
    hide(LASTING)
    importlib.import_module("oocpatch.system")
    for name in MODULES:  # which asyncio and others need
        del sys.modules[name]
    LASTING.enter_context(rules_of_windows())
