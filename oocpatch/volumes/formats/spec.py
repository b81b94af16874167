"""Which file, which format, which array in it: plain values that travel to other processes.

An address is a path, and may go on after `::`, with the path of a dataset or with options:

```text
 scan.h5::/entry/data        a dataset of an HDF5 file
 cells.n5::setup0/s1         a dataset of an N5 container
 slide.svs::level=2          a level of a pyramid; 0, the largest, unless told
 stack.ome.tif::series=1     a series of a TIFF
 slide.tif::format=slide     a format other than the one that the name tells
 precomputed://gs://b/seg    precomputed (or n5) behind a URL
```
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xarray

from oocpatch.storage.checksums import checksum

SUFFIXES = {
    "tiff": (".tif", ".tiff", ".btf", ".tf8", ".tf2", ".svs", ".lsm", ".stk", ".qptiff"),
    "slide": (".scn", ".ndpi", ".mrxs", ".vms", ".vmu", ".svslide", ".bif"),
    "nifti": (".nii", ".nii.gz", ".img", ".hdr", ".mgh", ".mgz"),
    "hdf5": (".h5", ".hdf5", ".hdf", ".he5"),
    "n5": (".n5",),
    "precomputed": (".precomputed",),
}
"""Formats by the endings of their files."""

SCHEMES = {"n5://": "n5", "precomputed://": "precomputed"}

NOT_ZARR = frozenset({"zarr.json", ".zarray", ".zgroup"})
"""None of these lies in a directory of another format."""

END = 1 << 16
"""Bytes at each end of a file that its fingerprint is made of."""

UNITS = {
    "\u00b5m": "micrometer",
    "\u03bcm": "micrometer",
    "um": "micrometer",
    "micron": "micrometer",
    "microns": "micrometer",
    "\\u00b5m": "micrometer",  # as ImageJ writes it
    "nm": "nanometer",
    "mm": "millimeter",
    "cm": "centimeter",
    "m": "meter",
    "s": "second",
    "sec": "second",
    "ms": "millisecond",
    "msec": "millisecond",
    "usec": "microsecond",
}
"""Long names of units, by the short ones that files have."""


class UnreadableError(ValueError):
    """What was asked for is not in the file, or its library is missing; the message says what to do."""


@dataclass(frozen=True, slots=True)
class FileSpec:
    """An array in a file.

    Attributes:
        address: path or URL of the file or container.
        format: one of `SUFFIXES`.
        part: path of a dataset in it; empty: its only one.
        level: of a pyramid; 0 is the largest.
        series: of a TIFF.
    """

    address: str
    format: str
    part: str = ""
    level: int = 0
    series: int = 0

    def __str__(self) -> str:
        told = [f"{n}={v}" for n in ("level", "series") if (v := getattr(self, n))]
        told = [self.part, *told] if self.part else told
        return f"{self.address}::{','.join(told)}" if told else self.address


@dataclass(frozen=True, slots=True)
class FileMetadata:
    """What a file says of its array without a voxel being read.

    Attributes:
        shape, dtype, chunks, names, coords, attrs: as `Source` has them.
        chunked: whether reading part of a chunk costs as much as the chunk.
        content: what else tells this array from another one.
    """

    shape: tuple[int, ...]
    dtype: Any
    chunks: tuple[int, ...]
    names: tuple[str, ...] | None = None
    coords: Mapping[str, xarray.Variable] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    chunked: bool = True
    content: Mapping[str, Any] = field(default_factory=dict)


class OpenFile(Protocol):
    """An open file. `read` may be called by several threads."""

    metadata: FileMetadata

    def read(self, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        """The voxels of a selection, one slice per axis."""
        ...

    def close(self) -> None:
        """Give up what is held."""
        ...


def parse_address(address: Path | str) -> FileSpec | None:
    """The array that an address names; None: it has no other format than Zarr.

    Raises:
        UnreadableError: when what follows `::` cannot be understood.

    >>> parse_address("scan.h5::/entry/data")
    FileSpec(address='scan.h5', format='hdf5', part='/entry/data', level=0, series=0)
    >>> parse_address("slide.svs::level=2").level, parse_address("volume.zarr")
    (2, None)
    """
    text = str(address)
    told = text
    for scheme, name in SCHEMES.items():
        if text.startswith(scheme):
            text, told = text.removeprefix(scheme), f"{text.removeprefix(scheme)}::format={name}"
    path, marked, rest = told.partition("::") if not Path(told).exists() else (told, "", "")
    options = _options(str(address), rest)
    found = options.pop("format", None) or _format(path)
    if found is None and marked:
        endings = ", ".join(e for endings in SUFFIXES.values() for e in endings)
        raise UnreadableError(f"what follows '::' is for files that end in {endings}, got {str(address)!r}")
    return None if found is None else FileSpec(path, found, **options)


def _options(address: str, text: str) -> dict[str, Any]:
    """What follows `::`."""
    found: dict[str, Any] = {}
    for part in filter(None, text.replace("::", ",").split(",")):
        name, given, value = part.partition("=")
        if not given:
            found["part"] = part
        elif name in ("level", "series") and value.isdecimal():
            found[name] = int(value)
        elif name == "format" and value in SUFFIXES:
            found[name] = value
        else:
            raise UnreadableError(
                "what follows '::' must be the path of a dataset, level=NUMBER, series=NUMBER or "
                f"format=[{'|'.join(SUFFIXES)}], got {part!r} in {address!r}"
            )
    return found


def _format(path: str) -> str | None:
    """The format of a file by its name, of a directory by what lies in it."""
    place = Path(path)
    if place.is_dir():
        if any((place / name).exists() for name in NOT_ZARR):
            return None
        if (place / "attributes.json").exists():
            return "n5"
        with contextlib.suppress(OSError, ValueError):
            return "precomputed" if "scales" in json.loads((place / "info").read_text()) else None
    named = path.lower().rstrip("/")
    return next((name for name, endings in SUFFIXES.items() if named.endswith(endings)), None)


@contextlib.contextmanager
def require_extra(extra: str, spec: FileSpec) -> Iterator[None]:
    """Import what is not a requirement of oocpatch.

    Raises:
        UnreadableError: when it is not installed, naming the extra to install.
    """
    try:
        yield
    except ImportError as error:
        raise UnreadableError(
            f"reading {spec.address} needs {error.name or extra}, which is not installed; "
            f"pip install 'oocpatch[{extra}]'"
        ) from error


def file_digest(path: Path) -> dict[str, Any]:
    """What tells a file from another one at the same place: its size, and its first and last bytes.

    Not its time: a copy of a file, or one that was fetched again, is the same file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(END)
        file.seek(max(0, size - END))
        return {"bytes": size, "ends": checksum(np.frombuffer(first + file.read(END), np.uint8))}


def coordinate(name: str, size: int, step: float, start: float = 0.0, unit: str | None = None) -> xarray.Variable:
    """A 1-D coordinate: the place of each voxel's centre, in units.

    >>> coordinate("x", 3, 0.5, unit="um").attrs
    {'units': 'micrometer'}
    """
    attrs = {"units": UNITS.get(unit, unit)} if unit else {}
    return xarray.Variable((name,), start + np.arange(size) * float(step), attrs)


def to_json(value: Any) -> Any:
    """A value of an attribute as JSON can hold it, as far as it can."""
    if isinstance(value, bytes):
        return value.decode(errors="replace").rstrip("\0")
    if isinstance(value, (np.ndarray, np.generic)):
        return to_json(value.tolist())
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    return [to_json(v) for v in value] if isinstance(value, (list, tuple)) else value
