"""Files that an HDF5 dataset consists of: sources of virtual datasets, external storage, targets of links.

HDF5 reads the fill value where a virtual dataset's source cannot be opened. So all of them are looked for before
anything is read, and those that a selection needs after it was read.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.errors import error_line
from oocpatch.volumes.formats.spec import UnreadableError


@dataclass(frozen=True, slots=True)
class Hdf5Parts:
    """The files that hold a dataset, and what each mapping of a virtual dataset needs.

    Attributes:
        files: absolute paths of all files.
        starts, stops: bounds of each mapping, `(mappings, axes)`.
        needed: the files of each mapping.
    """

    files: frozenset[Path]
    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]
    needed: tuple[frozenset[Path], ...]

    @classmethod
    def of(cls, h5py: Any, data: Any) -> Hdf5Parts:
        """Find the parts of a dataset.

        Raises:
            UnreadableError: if one is missing, cannot be read, or is too short; the message names it.
        """
        mappings = list(_mappings(h5py, data, frozenset()))
        bounds = np.array([(m[0], m[1]) for m in mappings], np.int64).reshape(len(mappings), 2, data.ndim)
        needed = tuple(m[2] for m in mappings)
        files = {_path(data), *_external(data)}.union(*needed)
        return cls(frozenset(files), bounds[:, 0], bounds[:, 1], needed)

    def check(self, selection: tuple[slice, ...], shape: tuple[int, ...]) -> None:
        """Refuse what was read of a selection if a file that it needs is missing.

        Raises:
            FileNotFoundError: in that case.
        """
        if not self.needed:
            return
        spans = np.array([s.indices(n)[:2] for s, n in zip(selection, shape, strict=True)])
        touched = ((self.starts < spans[:, 1]) & (self.stops > spans[:, 0])).all(1)
        for path in frozenset().union(*(self.needed[i] for i in np.flatnonzero(touched))):
            if not os.access(path, os.R_OK):
                raise FileNotFoundError(f"{path}, a part of the virtual dataset, is missing or cannot be read")


def _path(data: Any) -> Path:
    return Path(data.file.filename).absolute()


def _mappings(
    h5py: Any, data: Any, above: frozenset[tuple[Path, str]]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], frozenset[Path]]]:
    """Yield bounds and files of the mappings of a virtual dataset, those of its sources included."""
    own = _path(data)
    opened: dict[tuple[str, str], tuple[frozenset[Path], tuple[int, ...]]] = {}
    for mapping in data.virtual_sources() if data.is_virtual else ():
        start, stop, blocks = _bounds(h5py, mapping.vspace, data.shape)
        names = [(mapping.file_name, mapping.dset_name)]
        if any("%b" in name for name in names[0]):
            _refuse_gap(mapping.file_name, own, blocks)
            names = [(_numbered(names[0][0], i), _numbered(names[0][1], i)) for i in range(blocks)]
        for name in names:
            if name not in opened:
                opened[name] = _source(h5py, *name, data, above | {(own, data.name)})
            files, shape = opened[name]
            if blocks == 1 and not _fits(h5py, mapping, shape):
                raise UnreadableError(
                    f"volume cannot be read: {data.name} of {own} is virtual, and its source {name[0]}::{name[1]} has "
                    f"shape {shape}, which is not that of the mapping"
                )
            yield start, stop, files


def _bounds(h5py: Any, space: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return the bounds of a selection, and the number of its blocks along an unlimited axis, else 1."""
    if space.get_select_type() == h5py.h5s.SEL_HYPERSLABS and space.is_regular_hyperslab():
        start, stride, count, _ = space.get_regular_hyperslab()
        for axis, number in enumerate(count):
            if number == h5py.h5s.UNLIMITED:
                return (0,) * len(shape), shape, -(-(shape[axis] - start[axis]) // stride[axis])
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        return (0,) * len(shape), shape, 1
    low, high = space.get_select_bounds()
    return tuple(low), tuple(n + 1 for n in high), 1


def _fits(h5py: Any, mapping: Any, shape: tuple[int, ...]) -> bool:
    space = mapping.src_space
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        return bool(math.prod(shape) == mapping.vspace.get_select_npoints())
    if space.is_regular_hyperslab() and h5py.h5s.UNLIMITED in space.get_regular_hyperslab()[2]:
        return True
    high = space.get_select_bounds()[1]
    return len(high) == len(shape) and all(a < n for a, n in zip(high, shape, strict=True))


def _numbered(name: str, number: int) -> str:
    return re.sub("%[b%]", lambda m: str(number) if m[0] == "%b" else "%", name)


def _refuse_gap(name: str, own: Path, blocks: int) -> None:
    """Refuse numbered sources where HDF5 stops at one that is missing, although there are later ones."""
    pattern = re.compile(re.escape(Path(name).name).replace("%b", r"(\d+)"))
    folder = own.parent / Path(name).parent
    numbers = {int(m[1]) for file in folder.glob("*") if (m := pattern.fullmatch(file.name))} if "%b" in name else set()
    if any(number > blocks for number in numbers):
        raise UnreadableError(f"volume cannot be read: {_numbered(name, blocks)}, a part of {own}, is missing")


def _source(
    h5py: Any, name: str, dataset: str, data: Any, above: frozenset[tuple[Path, str]]
) -> tuple[frozenset[Path], tuple[int, ...]]:
    """Open a source of a virtual dataset; return its files and its shape."""
    own = _path(data)
    path = source_path(name, own)
    problem = ""
    if path is None:
        problem = "is missing"
    elif (path, "/" + dataset.lstrip("/")) in above:
        problem = "contains itself"
    else:
        try:
            with h5py.File(path, "r") as file:
                source = file.get(dataset)
                if isinstance(source, h5py.Dataset):
                    inner = (files for _, _, files in _mappings(h5py, source, above))
                    return frozenset({path, _path(source), *_external(source)}).union(*inner), source.shape
            problem = "is missing"
        except OSError as error:
            problem = f"cannot be read ({error_line(error)})"
    raise UnreadableError(
        f"volume cannot be read: {data.name} of {own} is virtual, and its part {name}::{dataset} {problem}; "
        "restore it, since HDF5 would read the fill value there"
    )


def source_path(name: str, parent: Path) -> Path | None:
    """Return where HDF5 finds a file that a virtual dataset names; None if it does not.

    An absolute path comes first. A relative one, or the name of an absolute one that is missing, is looked up in
    `HDF5_VDS_PREFIX`, in the directory of the file that names it, in the working directory, and in the directory of
    the file that a symbolic link leads to.
    """
    if name == ".":
        return parent
    path = Path(name)
    if path.is_absolute():
        if path.exists():
            return path
        path = Path(path.name)
    own = parent.parent
    prefixes = [p.replace("${ORIGIN}", str(own)) for p in os.environ.get("HDF5_VDS_PREFIX", "").split(os.pathsep) if p]
    candidates = [(folder / path).absolute() for folder in (*map(Path, prefixes), own, Path(), parent.resolve().parent)]
    return next((path for path in candidates if path.is_file()), None)


def _external(data: Any) -> Iterator[Path]:
    """Yield the files of external storage, which HDF5 looks for in `HDF5_EXTFILE_PREFIX`, else the working directory.

    Raises:
        UnreadableError: if one is missing or too short, where HDF5 would read zeros.
    """
    own, left = _path(data), math.prod(data.shape) * data.dtype.itemsize
    prefix = os.environ.get("HDF5_EXTFILE_PREFIX", "").replace("${ORIGIN}", str(own.parent))
    for name, offset, size in data.external or ():
        path = Path(prefix, os.fsdecode(name)).absolute()
        end, left = offset + min(size, left), max(0, left - size)
        if not path.is_file():
            raise UnreadableError(
                f"volume cannot be read: {path}, where {own} stores the values of {data.name}, does not exist; "
                "relative names are looked up in HDF5_EXTFILE_PREFIX, else in the working directory"
            )
        if path.stat().st_size < end:
            raise UnreadableError(
                f"volume cannot be read: {path}, where {own} stores the values of {data.name}, must have {end} bytes, "
                f"got {path.stat().st_size}"
            )
        yield path


def broken_link(h5py: Any, file: Any, part: str) -> str | None:
    """Return a message about the link on the way to a dataset whose target is missing, if there is one."""
    node, names = file, [name for name in part.split("/") if name]
    for number, name in enumerate(names):
        link = node.get(name, getlink=True) if isinstance(node, h5py.Group) else None
        node = node.get(name) if link is not None else None
        if node is None and isinstance(link, h5py.ExternalLink | h5py.SoftLink):
            target = f"{link.filename}::{link.path}" if isinstance(link, h5py.ExternalLink) else link.path
            return f"/{'/'.join(names[: number + 1])} is a link to {target}, which is missing or cannot be read"
    return None
