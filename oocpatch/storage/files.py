"""Files that are there whole or not at all, and that stay there when the power goes."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

_LIBRARY = ctypes.CDLL(None, use_errno=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    aside = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    with aside.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def flush(path: Path) -> None:
    """Wait until everything that was written to a path's file system is on the disk.

    One call for any number of files, and for their names. It waits for what others write there, too. What another host
    has written through a shared file system, that host must flush.

    Raises:
        OSError: when the disk did not take something that was written before.

    >>> flush(Path())
    """
    place = os.open(path, os.O_RDONLY)
    try:
        if not hasattr(_LIBRARY, "syncfs"):
            os.sync()
        elif _LIBRARY.syncfs(place):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(place)
