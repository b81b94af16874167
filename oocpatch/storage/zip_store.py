"""Zarr in a zip file: `.zarr.zip`, and `.ozx` of OME-Zarr, to read."""

from __future__ import annotations

import os
import zipfile
from typing import TYPE_CHECKING

from zarr.storage import ZipStore

from oocpatch.storage.paths import ARCHIVES, LocalPath

if TYPE_CHECKING:
    from zarr.abc.buffer import Buffer
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import BufferPrototype

METADATA = frozenset({"zarr.json", ".zarray", ".zgroup"})


class ArchiveStore(ZipStore):
    """A zip file to read, which each process opens for itself: a forked one shares the position in the file."""

    def __init__(self, path: LocalPath) -> None:
        super().__init__(path.absolute(), mode="r")
        self._process = os.getpid()

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if self._process != os.getpid():
            self._process = os.getpid()
            self.__setstate__(self.__getstate__())  # opens the file anew
        return await super().get(key, prototype, byte_range)

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__({**state, "_process": os.getpid()})


def split_archive(path: LocalPath) -> tuple[LocalPath, str] | None:
    """Return the zip file that a path is, or is inside of, and the path in it; None if there is none."""
    for part in (path, *path.parents):
        if part.name.lower().endswith(ARCHIVES) and part.is_file():
            return LocalPath(part), path.relative_to(part).as_posix().removeprefix(".")
    return None


def root_of(archive: LocalPath) -> str:
    """Return the path of the Zarr hierarchy in a zip file: its root, or the only directory in it."""
    with zipfile.ZipFile(archive) as file:
        names = [name for name in file.namelist() if not name.startswith("__MACOSX/")]
    tops = {name.partition("/")[0] for name in names}
    return "" if METADATA & tops or len(tops) != 1 else tops.pop()
