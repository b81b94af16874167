"""Files and objects that are there whole or not at all, and that stay there when the power goes."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.storage.object_store import AT_A_TIME
from oocpatch.storage.paths import Address, ObjectPath

_LIBRARY = ctypes.CDLL(None, use_errno=True)


def write_atomically(path: Address, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    data = content.encode() if isinstance(content, str) else content
    if isinstance(path, ObjectPath):
        path.write_bytes(data)
        return
    aside = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def make_folder(path: Address) -> None:
    """Make a directory, with those above it; in an object store there are none."""
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)


def folders_in_folders(path: Address) -> set[tuple[str, str]]:
    """Names of the directories below those that are right below an address; in an object store of one listing."""
    if isinstance(path, ObjectPath):
        split = (name.split("/") for name in path.files())
        return {(parts[0], parts[1]) for parts in split if len(parts) > 2}
    return {(found.parent.name, found.name) for found in path.glob("*/*")}


def read_array(path: Address, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
    """Numbers as they lie in memory, least byte first, that may be written to; None where there are not so many.

    Raises:
        OSError: when they cannot be read.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    if isinstance(path, ObjectPath):
        data = path.read_bytes()
        found = np.frombuffer(data, kind).copy() if len(data) % kind.itemsize == 0 else np.empty(0)
    else:
        found = np.fromfile(path, kind)
    return found.reshape(shape) if found.size == math.prod(shape) else None


def remove_tree(path: Address) -> None:
    """Delete what lies below an address, if anything."""
    if isinstance(path, ObjectPath):
        path.remove()
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_folder(path: Address) -> None:
    """Delete what lies below an address, and the directory that it is in when nothing else is."""
    remove_tree(path)
    if isinstance(path, Path):
        with contextlib.suppress(OSError):
            path.parent.rmdir()


def remove_trees(paths: Sequence[Address]) -> None:
    """Delete what lies below addresses; in an object store several at a time, since it is far away."""
    with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="oocpatch-delete") as pool:
        run = pool.map if any(isinstance(path, ObjectPath) for path in paths) else map
        list(run(remove_tree, paths))


SYNC_FILE_RANGE_WRITE = 2
"""Of Linux: begin to write, wait for nothing."""


WORTH_STARTING = 1 << 18
"""Bytes of a file from which on it is worth a request of its own to the disk."""


def start_writing(path: Path, size: int) -> None:
    """Have the disk begin with a file of so many bytes, so that there is little to wait for at the end."""
    if size < WORTH_STARTING or not hasattr(_LIBRARY, "sync_file_range"):
        return
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:  # a hint: whether it failed is found when all is flushed
        _LIBRARY.sync_file_range(file, ctypes.c_int64(0), ctypes.c_int64(0), SYNC_FILE_RANGE_WRITE)
    finally:
        os.close(file)


def write_soon(path: Path, data: bytes) -> None:
    """Write a file that the disk begins with at once."""
    write_plainly(path, data)
    start_writing(path, len(data))


def write_plainly(path: Address, data: bytes | memoryview) -> None:
    """Write a file that may be there in part, and is not waited for; or an object."""
    if isinstance(path, ObjectPath):
        path.write_bytes(data)
        return
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
    finally:
        os.close(file)


def flush(path: Address) -> None:
    """Wait until everything that was written to a path's file system is on the disk.

    One call for any number of files, and for their names. It waits for what others write there, too. What another host
    has written through a shared file system, that host must flush. An object is there for good once it is put.

    Raises:
        OSError: when the disk did not take something that was written before.

    >>> flush(Path())
    """
    if isinstance(path, ObjectPath):
        return
    place = os.open(path, os.O_RDONLY)
    try:
        if not hasattr(_LIBRARY, "syncfs"):
            os.sync()
        elif _LIBRARY.syncfs(place):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(place)
