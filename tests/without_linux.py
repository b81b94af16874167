"""The package without what Linux or POSIX alone have, as on Windows or macOS: for one test, or for many.

pytest -p tests.without_linux tests/unit
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import mmap
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

NAMES: dict[ModuleType, tuple[str, ...]] = {
    os: (
        "O_NONBLOCK",
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

    stack.callback(setattr, ctypes, "CDLL", library)
    ctypes.CDLL = named  # type: ignore[assignment, misc] # a function in place of a class
    for module, names in NAMES.items():
        for name in filter(functools.partial(hasattr, module), names):
            stack.callback(setattr, module, name, getattr(module, name))
            delattr(module, name)
    for name in MODULES:
        stack.callback(sys.modules.__setitem__, name, importlib.import_module(name))
        sys.modules[name] = None  # type: ignore[assignment] # importing it then fails


def pytest_load_initial_conftests() -> None:
    """Hide the names before the package is imported; only a plugin that `-p` names is asked so early."""
    for name in ("psutil", "torch", "zarr"):  # which go by the name of the system
        importlib.import_module(name)
    stack = contextlib.ExitStack()
    hide(stack)
    importlib.import_module("oocpatch.system")
    for name in MODULES:  # which asyncio and others need
        del sys.modules[name]
