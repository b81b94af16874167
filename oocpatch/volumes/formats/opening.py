"""Opening a file where it is read: a loader travels as its spec, and opens what the spec names when it is called."""

from __future__ import annotations

import importlib
import os
import threading
import weakref
from typing import Any

import numpy.typing as npt

from oocpatch.volumes.formats.spec import FileMetadata, FileSpec, OpenFile, UnreadableError

READERS = {
    "tiff": "tiff.TiffFile",
    "slide": "slide.SlideFile",
    "nifti": "nifti.NiftiFile",
    "hdf5": "hdf5.Hdf5File",
    "n5": "tensors.TensorFile",
    "precomputed": "tensors.TensorFile",
}


def open_file(spec: FileSpec) -> OpenFile:
    """Open what a spec names.

    Raises:
        UnreadableError: when it cannot be read, or its library is missing.
    """
    module, _, name = READERS[spec.format].partition(".")
    reader = getattr(importlib.import_module(f"oocpatch.volumes.formats.{module}"), name)
    try:
        found: OpenFile = reader(spec)
    except UnreadableError:
        raise
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        raise UnreadableError(f"volume cannot be read: {spec} ({type(error).__name__}: {told})") from error
    return found


def read_metadata(spec: FileSpec) -> FileMetadata:
    """What a file says of its array."""
    file = open_file(spec)
    try:
        return file.metadata
    finally:
        file.close()


class FileReader:
    """Reads selections of a file that it opens when it is first called, once per process.

    What open files are made of does not travel: a loader is pickled as its spec.

    Args:
        spec: what to open.
    """

    def __init__(self, spec: FileSpec) -> None:
        self.spec = spec
        self._turn = threading.Lock()
        self._open: tuple[int, OpenFile] | None = None

    def __call__(self, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        return self._file().read(selection)

    def __reduce__(self) -> tuple[Any, ...]:
        return FileReader, (self.spec,)

    def _file(self) -> OpenFile:
        with self._turn:
            # A process that was forked shares the place in the file with the one it comes from.
            if self._open is None or self._open[0] != os.getpid():
                file = open_file(self.spec)
                weakref.finalize(self, file.close)
                self._open = os.getpid(), file
            return self._open[1]
