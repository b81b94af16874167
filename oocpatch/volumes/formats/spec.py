"""Files of other formats than Zarr: the address of an array in a file, and reading it.

An address is a path. The path of a dataset or options may follow after `::`:

```text
 scan.h5::/entry/data        a dataset of an HDF5 file
 cells.n5::setup0/s1         a dataset of an N5 container
 slide.svs::level=2          a level of a pyramid; the default is 0, the largest
 stack.ome.tif::series=1     a series of a TIFF, a scene of a CZI, a position of an ND2, an image of a LIF
 slide.tif::format=slide     a format other than that of the file's name
 precomputed://gs://b/seg    precomputed (or n5) behind a URL
 scans::1.2.840.7            a series in a directory of DICOM files, by its UID
```

A `FileSpec` and a `FileReader` hold plain values and travel to other processes; the file is opened where it is read.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xarray

from oocpatch.errors import error_line
from oocpatch.storage.forks import refuse_fork
from oocpatch.system import import_extra

SUFFIXES = {
    "tiff": (".tif", ".tiff", ".btf", ".tf8", ".tf2", ".svs", ".lsm", ".stk", ".qptiff"),
    "slide": (".scn", ".ndpi", ".mrxs", ".vms", ".vmu", ".svslide", ".bif"),
    "nifti": (".nii", ".nii.gz", ".img", ".hdr", ".mgh", ".mgz"),
    "hdf5": (".h5", ".hdf5", ".hdf", ".he5"),
    "n5": (".n5",),
    "precomputed": (".precomputed",),
    "dicom": (".dcm",),
    "czi": (".czi",),
    "nd2": (".nd2",),
    "lif": (".lif",),
    "ims": (".ims",),
}
"""Formats by the suffixes of their files."""

ALL_SUFFIXES = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)

WITH_LEVELS = frozenset({"tiff", "slide", "precomputed", "czi", "ims"})
"""Formats whose files may be pyramids."""

READERS = {
    "tiff": "tiff.TiffFile",
    "slide": "slide.SlideFile",
    "nifti": "nifti.NiftiFile",
    "hdf5": "hdf5.Hdf5File",
    "n5": "tensors.TensorFile",
    "precomputed": "tensors.TensorFile",
    "dicom": "dicom.DicomFile",
    "czi": "czi.CziFile",
    "nd2": "nd2.Nd2File",
    "lif": "lif.LifFile",
    "ims": "imaris.ImarisFile",
}

SCANNED = 32
"""Entries of a directory that are looked at for files of DICOM."""

WHOLE_SLIDE = b"UI\x1e\x001.2.840.10008.5.1.4.1.1.77.1.6"
"""A UID and its length, at the start of each file of DICOM that holds a level of a slide."""

NOT_ZARR = frozenset({"zarr.json", ".zarray", ".zgroup"})
"""None of these lies in a directory of another format."""


class UnreadableError(ValueError):
    """The array is not in the file, or the library to read it is missing; the message says what to do."""


@dataclass(frozen=True, slots=True)
class FileSpec:
    """An array in a file.

    Attributes:
        address: path or URL of the file or container.
        format: one of `SUFFIXES`.
        part: path of a dataset in the file, UID of a series of DICOM, name of an image; empty for its only one.
        level: level of a pyramid; 0 is the largest.
        series: number of one of the images of a file.
    """

    address: str
    format: str
    part: str = ""
    level: int = 0
    series: int = 0

    def __str__(self) -> str:
        options = [f"{name}={value}" for name in ("level", "series") if (value := getattr(self, name))]
        options = [self.part, *options] if self.part else options
        return f"{self.address}::{','.join(options)}" if options else self.address


@dataclass(frozen=True, slots=True)
class FileMetadata:
    """Metadata of an array in a file.

    Attributes:
        shape, dtype, chunks, names, coords, attrs: as in `Source`.
        chunked: whether reading part of a chunk costs as much as the chunk.
        packing: as in `Source`; `read` returns what is stored. None: attributes have no agreed meaning.
    """

    shape: tuple[int, ...]
    dtype: Any
    chunks: tuple[int, ...]
    names: tuple[str, ...] | None = None
    coords: Mapping[str, xarray.Variable] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    chunked: bool = True
    packing: Mapping[str, Any] | None = None


class OpenFile(Protocol):
    """An open file. Several threads may call `read`."""

    metadata: FileMetadata

    def read(self, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Read the voxels of a selection, one slice per axis."""
        ...

    def files(self) -> Iterable[str | os.PathLike[str]]:
        """Yield the local files that hold the array: those of the address, and all that they refer to."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def parse_address(address: Path | str) -> FileSpec | None:
    """Return the array that an address names, or None for an address of a Zarr.

    Raises:
        UnreadableError: if the text after `::` is not an option.

    >>> parse_address("scan.h5::/entry/data")
    FileSpec(address='scan.h5', format='hdf5', part='/entry/data', level=0, series=0)
    >>> parse_address("slide.svs::level=2").level, parse_address("volume.zarr")
    (2, None)
    """
    text = str(address)
    if text.startswith(("n5://", "precomputed://")):
        name, _, text = text.partition("://")
        text = f"{text}::format={name}"
    path, separator, rest = text.partition("::") if not Path(text).exists() else (text, "", "")
    options = _options(str(address), rest)
    file_format = options.pop("format", None) or _format(path)
    if file_format is None and separator:
        raise UnreadableError(f"what follows '::' is for files that end in {ALL_SUFFIXES}, got {str(address)!r}")
    return None if file_format is None else FileSpec(path, file_format, **options)


def _options(address: str, text: str) -> dict[str, Any]:
    """Parse the text after `::`."""
    options: dict[str, Any] = {}
    for option in filter(None, text.replace("::", ",").split(",")):
        name, separator, value = option.partition("=")
        if not separator:
            options["part"] = option
        elif name in ("level", "series") and value.isdecimal():
            options[name] = int(value)
        elif name == "format" and value in SUFFIXES:
            options[name] = value
        else:
            raise UnreadableError(
                "what follows '::' must be the path of a dataset, level=NUMBER, series=NUMBER or "
                f"format=[{'|'.join(SUFFIXES)}], got {option!r} in {address!r}"
            )
    return options


def _format(path: str) -> str | None:
    """Return the format of a file by its name, of a directory by its content."""
    directory = Path(path)
    if directory.is_dir():
        if any((directory / name).exists() for name in NOT_ZARR):
            return None
        if (directory / "attributes.json").exists():
            return "n5"
        with contextlib.suppress(OSError, ValueError):
            if "scales" in json.loads((directory / "info").read_text()):
                return "precomputed"
        with contextlib.suppress(OSError):
            formats = map(dicom_format, itertools.islice(directory.iterdir(), SCANNED))
            if found := next(filter(None, formats), None):
                return found
    lower = path.lower().rstrip("/\\")
    name = next((name for name, suffixes in SUFFIXES.items() if lower.endswith(suffixes)), None)
    return dicom_format(directory) or name if name == "dicom" else name


def dicom_format(path: Path) -> str | None:
    """Return the format of a file of DICOM: a slide, which OpenSlide reads, or slices; None for any other file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(1024)
    return None if start[128:132] != b"DICM" else "slide" if WHOLE_SLIDE in start else "dicom"


def open_file(spec: FileSpec) -> OpenFile:
    """Open the file of a spec.

    Raises:
        UnreadableError: if it cannot be read, or its library is missing.
        RuntimeError: in a forked process that has lost the library's threads.
    """
    if spec.format in ("n5", "precomputed"):
        refuse_fork("tensorstore", spec)
    module, _, name = READERS[spec.format].partition(".")
    reader: Callable[[FileSpec], OpenFile] = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    try:
        return reader(spec)
    except UnreadableError:
        raise
    except Exception as error:
        raise UnreadableError(f"volume cannot be read: {spec} ({error_line(error)})") from error


class FileReader:
    """Reads selections of a file, which it opens once per process, when it is first called; pickled as its spec."""

    def __init__(self, spec: FileSpec) -> None:
        self.spec = spec
        self._lock = threading.Lock()
        self._open: tuple[int, OpenFile] | None = None
        self._close: Callable[[], Any] = lambda: None

    def __call__(self, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        with self._lock:
            # A forked process shares the position in the file with its parent.
            if self._open is None or self._open[0] != os.getpid():
                file = open_file(self.spec)
                self._close = weakref.finalize(self, file.close)
                self._open = os.getpid(), file
            _, file = self._open
        return file.read(selection)

    def for_run(self, _threads: int) -> FileReader:
        """Return the same reader with its file opened anew."""
        return FileReader(self.spec)

    def close(self) -> None:
        """Close the file, so that others may write to it; the next call opens it anew."""
        with self._lock:
            self._open = None
            self._close()

    def __reduce__(self) -> tuple[Any, ...]:
        return FileReader, (self.spec,)


def import_reader(library: str, extra: str, spec: FileSpec) -> Any:
    """Import the library that reads a file; without it, `UnreadableError` names the extra that has it."""
    return import_extra(library, extra, f"reading {spec.address}", UnreadableError)


def check_number(name: str, number: int, shapes: Sequence[tuple[int, ...]], spec: FileSpec) -> None:
    """Refuse the number of a level or a series that a file does not have.

    Raises:
        UnreadableError: in that case; the message lists those that it has.
    """
    if number >= len(shapes):
        listed = "; ".join(f"{i}: {' x '.join(map(str, shape))}" for i, shape in enumerate(shapes))
        raise UnreadableError(f"{name} must be one of those of {spec.address} ({listed or 'none'}), got {number}")


def to_json(value: Any) -> Any:
    """Convert the value of an attribute to plain Python values, as far as possible."""
    if isinstance(value, bytes):
        return value.decode(errors="replace").rstrip("\0")
    if isinstance(value, (np.ndarray, np.generic)):
        return to_json(value.tolist())
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    return [to_json(v) for v in value] if isinstance(value, (list, tuple)) else value
