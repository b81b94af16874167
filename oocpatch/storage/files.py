"""Local files: write them without a buffer in between, and have the disk take them."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from oocpatch.system import c_function, sync_all

_start_writing, _sync_file_system = c_function("sync_file_range"), c_function("syncfs")

SYNC_FILE_RANGE_WRITE = 2
"""Flag of Linux's `sync_file_range`: begin to write, wait for nothing."""

WORTH_STARTING = 1 << 18
"""Bytes of a file from which on it is worth a request of its own to the disk."""


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file in place, without waiting for the disk; a crash may leave a part of it."""
    with path.open("wb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]


def start_writing(path: Path, size: int) -> None:
    """Have the disk begin with a file of `size` bytes, so that there is little to wait for at the end."""
    if size < WORTH_STARTING or _start_writing is None:
        return
    file = os.open(path, os.O_RDONLY)
    try:  # a hint: whether it failed is found when all is flushed
        _start_writing(file, ctypes.c_int64(0), ctypes.c_int64(0), SYNC_FILE_RANGE_WRITE)
    finally:
        os.close(file)


def flush_file_system(path: Path) -> None:
    """Wait until everything that was written to a path's file system is on the disk.

    One call for any number of files, and for their names. It waits for what others write there, too. Windows has no
    such call.

    Raises:
        OSError: when the disk did not take something that was written before.

    >>> flush_file_system(Path())
    """
    if _sync_file_system is None:
        sync_all()
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        if _sync_file_system(folder):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(folder)
