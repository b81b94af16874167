"""`StoragePath`, the common interface of local paths and object stores, with pathlib's names; and the local path."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import pathlib
import secrets
import shutil
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from zarr.abc.store import Store
from zarr.storage import LocalStore

from oocpatch.storage.files import flush_file_system, write_file
from oocpatch.system import move_if_absent, when_closed

PIECE = 1 << 20
"""Bytes of a file or an object that are read at a time."""

Array = npt.NDArray[Any]
Skip = Callable[[str], bool]


class FileState(NamedTuple):
    """A small file or object as it was at one moment."""

    content: bytes
    tag: str
    """The store's tag of this content; empty for a file."""
    modified: float
    """When it was written or touched last, in seconds since 1970."""


class StoragePath(ABC):
    """A path on the local file system, or an address in an object store.

    Files and objects that are written by `write_atomic` and `put_if_absent` are there whole or not at all.
    """

    __slots__ = ()
    is_local: ClassVar[bool]

    @property
    @abstractmethod
    def name(self) -> str:
        """The last component."""

    @property
    @abstractmethod
    def parent(self) -> Self:
        """The path without its last component."""

    @property
    @abstractmethod
    def parents(self) -> Sequence[Self]:
        """All paths above this one, the nearest first."""

    @abstractmethod
    def __truediv__(self, key: str) -> Self: ...

    def with_name(self, name: str) -> Self:
        """Return the path of another name beside this one."""
        return self.parent / name

    def resolve(self) -> Self:
        """Return the same place without symbolic links."""
        return self

    def exists(self) -> bool:
        """Return whether there is a file or an object of this name, or anything below it."""
        return self.is_file() or self.is_dir()

    @abstractmethod
    def is_file(self) -> bool:
        """Return whether there is a file or an object of this name."""

    @abstractmethod
    def is_dir(self) -> bool:
        """Return whether there is a directory; in an object store whether there is any object below."""

    @abstractmethod
    def size(self) -> int:
        """Return the bytes of the file or object; 0 where there is none."""

    @abstractmethod
    def state(self) -> FileState | None:
        """Return content, tag and time of the file or object; None where there is none."""

    def read_bytes(self) -> bytes:
        """Read the file or object whole."""
        return b"".join(self.read_pieces())

    def read_text(self) -> str:
        """Read the file or object as a text."""
        return self.read_bytes().decode()

    @abstractmethod
    def read_pieces(self) -> Iterator[bytes]:
        """Read the file or object a piece at a time."""

    @abstractmethod
    def read_array(self, dtype: str, shape: tuple[int, ...]) -> Array | None:
        """Read numbers as they lie in memory, least byte first, into a writable array; None if not as many as fit."""

    @abstractmethod
    def list_files(self, *, skip: Skip | None = None) -> Iterator[str]:
        """List the relative names of all files or objects below, except in directories whose names `skip` accepts."""

    @abstractmethod
    def list_folders(self, depth: Literal[1, 2] = 1) -> list[str]:
        """List the names of directories right below, or two levels below, relative to this path."""

    @abstractmethod
    def list_siblings(self, start: str) -> list[Self]:
        """List files and objects beside this one whose names begin with `start`, which begins with this name."""

    @abstractmethod
    def make_folder(self) -> None:
        """Make the directory, with those above it; in an object store there are none."""

    @abstractmethod
    def write_plain(self, data: bytes | memoryview) -> None:
        """Write a file without waiting for the disk, of which a crash may leave a part; or put an object."""

    @abstractmethod
    def write_atomic(self, content: str | bytes | Iterable[bytes]) -> None:
        """Write a file or an object that is there whole or not at all, also after a power cut."""

    @abstractmethod
    def put_if(self, content: bytes, tag: str | None) -> bool:
        """Write, whole, in place of a file or an object of this tag, or with None of none; return whether it is so."""

    def put_if_absent(self, content: bytes) -> bool:
        """Write a file or an object, whole, only if there is none; return whether that was so."""
        return self.put_if(content, None)

    @abstractmethod
    def renew(self, content: bytes, tag: str) -> None:
        """Touch a file; put an object anew with this content, if it has this tag."""

    @abstractmethod
    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file or object."""

    @abstractmethod
    def remove_tree(self) -> None:
        """Delete everything below, if there is anything."""

    @abstractmethod
    def remove_if_empty(self) -> None:
        """Delete the directory if nothing is in it."""

    @abstractmethod
    def flush(self) -> None:
        """Wait until everything that this host wrote to the path's file system is on the disk; objects are at once.

        Raises:
            OSError: when the disk did not take something that was written before.
        """

    @abstractmethod
    def check_writable(self, name: str) -> None:
        """Check that the path can be written to, before anything is written.

        Raises:
            ValueError: when it cannot; the message calls it by the parameter's `name`.
        """

    def is_outage(self, error: Exception) -> bool:
        """Return whether an error says that the store does not answer, or refuses, and nothing about what is there."""
        return not self.is_local and isinstance(error, OSError) and not isinstance(error, FileNotFoundError)

    @abstractmethod
    def store(self, *, read_only: bool = False) -> Store:
        """Return what lies below as a store of Zarr's."""

    def xarray_source(self) -> Any:
        """Return what xarray opens: it notes the path of a directory, which a store has not."""
        return self if self.is_local else self.store(read_only=True)


if sys.platform == "win32":
    _PlatformPath = pathlib.WindowsPath
else:
    _PlatformPath = pathlib.PosixPath


class LocalPath(_PlatformPath, StoragePath):
    """A path on the local file system: pathlib's, with what a `StoragePath` has besides.

    >>> LocalPath("/data") / "out.zarr" == pathlib.Path("/data/out.zarr"), LocalPath("/data/a").with_name("b")
    (True, LocalPath('/data/b'))
    """

    __slots__ = ()
    is_local = True

    def size(self) -> int:
        try:
            return self.stat().st_size
        except FileNotFoundError:
            return 0

    def state(self) -> FileState | None:
        try:
            return FileState(self.read_bytes(), "", self.stat().st_mtime)
        except FileNotFoundError:
            return None

    def read_text(self, encoding: str | None = "utf-8", errors: str | None = None, newline: str | None = None) -> str:
        with self.open(encoding=encoding, errors=errors, newline=newline) as file:
            return file.read()

    def read_pieces(self) -> Iterator[bytes]:
        with self.open("rb", buffering=0) as file:
            while piece := file.read(PIECE):
                yield piece

    def read_array(self, dtype: str, shape: tuple[int, ...]) -> Array | None:
        values: Array = np.fromfile(self, np.dtype(dtype).newbyteorder("<"))
        return values.reshape(shape) if values.size == math.prod(shape) else None

    def list_files(self, *, skip: Skip | None = None) -> Iterator[str]:
        for folder, folders, files in os.walk(self):
            inside = pathlib.PurePosixPath(pathlib.Path(folder).relative_to(self).as_posix())
            folders[:] = sorted(name for name in folders if skip is None or not skip(str(inside / name)))
            yield from (str(inside / name) for name in sorted(files))

    def list_folders(self, depth: Literal[1, 2] = 1) -> list[str]:
        return sorted(path.relative_to(self).as_posix() for path in self.glob("/".join("*" * depth)) if path.is_dir())

    def list_siblings(self, start: str) -> list[Self]:
        return sorted(self.parent.glob(f"{glob.escape(start)}*"))

    def make_folder(self) -> None:
        self.mkdir(parents=True, exist_ok=True)

    def write_plain(self, data: bytes | memoryview) -> None:
        write_file(self, data)

    def write_atomic(self, content: str | bytes | Iterable[bytes]) -> None:
        staging = self.with_name(f"{self.name}.{os.getpid()}-{threading.get_ident()}.partial")
        with staging.open("wb") as file:
            file.writelines(lines_of(content))
            file.flush()
            os.fsync(file.fileno())
        staging.replace(self)

    def put_if(self, content: bytes, tag: str | None) -> bool:
        staging = self.with_name(f"{self.name}.{os.getpid()}-{secrets.token_hex(16)}")
        if tag is not None:
            # Renaming is atomic: of two processes that replace the same file one moves it away.
            with contextlib.suppress(FileNotFoundError):
                self.rename(staging)
        staging.write_bytes(content)
        try:
            move_if_absent(staging, self)
        except FileExistsError:
            return False
        finally:
            staging.unlink(missing_ok=True)
        return True

    def replace(self, target: str | os.PathLike[str]) -> Self:
        return when_closed(lambda: super(LocalPath, self).replace(target))

    def rename(self, target: str | os.PathLike[str]) -> Self:
        return when_closed(lambda: super(LocalPath, self).rename(target))

    def unlink(self, missing_ok: bool = False) -> None:
        when_closed(lambda: super(LocalPath, self).unlink(missing_ok))

    def renew(self, content: bytes, tag: str) -> None:  # noqa: ARG002 - as of an object store
        os.utime(self)

    def remove_tree(self) -> None:
        shutil.rmtree(self, ignore_errors=True)

    def remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            self.rmdir()

    def flush(self) -> None:
        flush_file_system(self)

    def check_writable(self, name: str) -> None:
        above = next((path for path in self.parents if path.exists()), self.parent)
        if not above.is_dir():
            raise ValueError(f"{name} must be in a directory, got {self}, where {above} is a file")
        if not os.access(above, os.W_OK | os.X_OK):
            raise ValueError(f"{name} must be in a directory that can be written to, got {self}, where {above} cannot")

    def store(self, *, read_only: bool = False) -> Store:
        return LocalStore(self, read_only=read_only)


def lines_of(content: str | bytes | Iterable[bytes]) -> Iterable[bytes]:
    """Return what is to be written as pieces of bytes."""
    if isinstance(content, str):
        return [content.encode()]
    return [content] if isinstance(content, bytes) else content
