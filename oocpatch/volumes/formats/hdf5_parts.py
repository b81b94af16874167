"""Files that an HDF5 dataset consists of: sources of virtual datasets, external storage, targets of links."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def source_files(h5py: Any, data: Any, seen: set[tuple[Path, str]] | None = None) -> set[Path]:
    """Return the absolute paths of all files that hold a dataset, those of its virtual sources included."""
    seen = set() if seen is None else seen
    own = Path(data.file.filename).absolute()
    if (own, data.name) in seen:
        return set()
    seen.add((own, data.name))
    files = {own, *(external_path(os.fsdecode(name), own) for name, _, _ in data.external or ())}
    for name, dataset in dict.fromkeys(virtual_sources(data)):
        path = source_path(name, own)
        if path is None:
            continue
        files.add(path)
        with h5py.File(path, "r") as file:
            if isinstance(source := file.get(dataset), h5py.Dataset):
                files |= source_files(h5py, source, seen)
    return files


def virtual_sources(data: Any) -> Iterator[tuple[str, str]]:
    """Yield the file and dataset that each mapping of a virtual dataset names; `.` is the file itself."""
    for mapping in data.virtual_sources() if data.is_virtual else ():
        yield mapping.file_name, mapping.dset_name


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
    prefixes = [p.replace("${ORIGIN}", str(own)) for p in os.environ.get("HDF5_VDS_PREFIX", "").split(":") if p]
    candidates = [(folder / path).absolute() for folder in (*map(Path, prefixes), own, Path(), parent.resolve().parent)]
    return next((path for path in candidates if path.is_file()), None)


def external_path(name: str, parent: Path) -> Path:
    """Return where HDF5 looks for a file of external storage: in `HDF5_EXTFILE_PREFIX`, else the working directory."""
    prefix = os.environ.get("HDF5_EXTFILE_PREFIX", "").replace("${ORIGIN}", str(parent.parent))
    return Path(prefix, name).absolute()
