"""Paths as users pass them, converted once, on entry, into a `StoragePath`."""

from __future__ import annotations

import os
import pathlib
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import zarr
from zarr.abc.store import Store
from zarr.errors import UnstableSpecificationWarning
from zarr.storage import LocalStore

from oocpatch.storage.object_path import ObjectPath, describe_error
from oocpatch.storage.object_store import AT_A_TIME, BUCKETS, UrlStore, scheme_of
from oocpatch.storage.storage_path import LocalPath, StoragePath
from oocpatch.system import is_url

__all__ = [
    "LocalPath",
    "ObjectPath",
    "StoragePath",
    "check_is_zarr",
    "consolidate",
    "describe_error",
    "expand_home",
    "local_or_url",
    "local_path",
    "output_path",
    "path_of",
    "remove_trees",
    "spec_file",
    "storage_path",
]


ARCHIVES = (".zip", ".ozx")
"""Suffixes of zip files, which are read only."""


def remove_trees(paths: Sequence[StoragePath]) -> None:
    """Delete everything below paths; in an object store several at a time, since it is far away."""
    with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="oocpatch-delete") as pool:
        run = map if all(path.is_local for path in paths) else pool.map
        list(run(lambda path: path.remove_tree(), paths))


def consolidate(path: StoragePath) -> None:
    """Write consolidated metadata, which xarray looks for and warns of when there are none."""
    with warnings.catch_warnings():
        # Zarr v3 has no specification of them yet.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        zarr.consolidate_metadata(path.store())


def storage_path(text: str | os.PathLike[str]) -> StoragePath:
    """Return the path of a text that was written from one.

    >>> print(storage_path("s3://bucket/out.zarr.oocpatch"), storage_path("/data/out.zarr.oocpatch"))
    s3://bucket/out.zarr.oocpatch /data/out.zarr.oocpatch
    """
    text = os.fspath(text)
    return ObjectPath.of(text) if scheme_of(text) in BUCKETS else LocalPath(text)


def path_of(store: Store) -> StoragePath | None:
    """Return where a store of Zarr's lies; None where that is nowhere, or not known."""
    if isinstance(store, UrlStore):
        return ObjectPath.of(store.url)
    return LocalPath(store.root) if isinstance(store, LocalStore) else None


def local_or_url(address: str | os.PathLike[str]) -> LocalPath | str:
    """Return a local path as `LocalPath`, and any other URL as it is; a leading `~` is the home directory.

    `file://` is taken for the path it names: through fsspec it would be written in place, and torn by a crash.
    """
    text = os.fspath(address)
    if text.startswith("file://"):
        return LocalPath(file_url_path(text))
    return text if is_url(text) else LocalPath(expand_home(text))


def file_url_path(url: str, *, windows: bool = sys.platform == "win32") -> str:
    """Return the path that a `file://` URL names.

    >>> file_url_path("file:///data/scan.zarr", windows=False), file_url_path("file:///C:/scan.zarr", windows=True)
    ('/data/scan.zarr', 'C:/scan.zarr')
    """
    path = url.removeprefix("file://")
    if not windows:
        return path
    return path[1:] if path[2:3] == ":" else f"//{path}"


def expand_home(path: str | os.PathLike[str]) -> str:
    """Return a path with the home directory for a leading `~`; unchanged where there is no such user.

    >>> expand_home("~/scan.zarr") == str(pathlib.Path.home() / "scan.zarr"), expand_home("a~/b")
    (True, 'a~/b')
    """
    return os.path.expanduser(path)  # noqa: PTH111 - pathlib raises for names such as `~draft.zarr`


def local_path(name: str, value: str | os.PathLike[str]) -> LocalPath:
    """Return a checked path on the local file system, absolute.

    Raises:
        ValueError, TypeError: for a URL of anything else, and for what is no path.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {type(value).__name__}")
    address = local_or_url(value)
    if isinstance(address, str):
        raise ValueError(f"{name} must be a path on a local or shared file system, got {address}")
    if name in ("output", "store") and address.suffix.lower() in ARCHIVES and not address.is_dir():
        raise ValueError(
            f"{name} must be a directory, since a zip file cannot be written in parts, got {address}; write "
            f"{address.stem.removesuffix('.zarr')}.zarr and zip it"
        )
    return address.absolute()


def output_path(name: str, value: str | os.PathLike[str]) -> StoragePath:
    """Return a checked place to write: a path on the local file system, or a URL in an object store.

    Raises:
        ValueError, TypeError: as of `local_path`.
    """
    if not isinstance(value, str) or not is_url(value) or value.startswith("file://"):
        return local_path(name, value)
    if scheme_of(value) not in BUCKETS:
        raise ValueError(
            f"{name} must be a path, or a URL that begins with {', '.join(f'{s}://' for s in BUCKETS)}, got {value}"
        )
    path = ObjectPath.of(value)
    if not path.key:
        raise ValueError(f"{name} must have a name in its bucket, such as {path}/out.zarr, got {value}")
    return path


FILE_SUFFIXES = (
    *(".nii", ".nii.gz", ".img", ".hdr", ".mgh", ".mgz", ".tif", ".tiff", ".btf", ".tf8", ".svs", ".ndpi", ".czi"),
    *(".h5", ".hdf5", ".hdf", ".he5", ".nc", ".nrrd", ".mha", ".mrc", ".npy", ".npz", ".png", ".jpg", ".jpeg"),
    *(".zip", ".ozx", ".n5", ".precomputed", ".dcm"),
)
"""Endings of names of files and containers of other formats."""


EXPORTED = (".nii.gz", ".nii", ".ome.tiff", ".ome.tif", ".tiff", ".tif")
"""Endings of the files that `export` writes."""


def check_is_zarr(name: str, path: StoragePath) -> None:
    """Refuse to write a Zarr, a directory, under the name of a file of another format, which nothing would read.

    Raises:
        ValueError: in that case.
    """
    lower = path.name.lower()
    if suffix := next((s for s in EXPORTED if lower.endswith(s)), None):
        zarr = f"{path.name[: -len(suffix)] or 'out'}.zarr"
        raise ValueError(
            f"{name} must be a Zarr, such as {zarr}, got {path}: write a Zarr, and make a {suffix} of it with "
            f"oocpatch.export({zarr!r}, {path.name!r}), or `oocpatch export`"
        )
    if suffix := next((s for s in sorted(FILE_SUFFIXES, key=len, reverse=True) if lower.endswith(s)), None):
        raise ValueError(
            f"{name} must be a Zarr, such as {path.name[: -len(suffix)] or 'out'}.zarr, got {path}: oocpatch writes no "
            f"{suffix}; write a Zarr, and convert it with the library of that format"
        )


def spec_file(path: str, spec: str) -> pathlib.Path:
    """Return the file that a model spec names.

    Raises:
        ValueError: when it is not there.
    """
    file = pathlib.Path(expand_home(path))
    if not file.is_file():
        raise ValueError(f"the file of model spec {spec!r} does not exist: {str(file.absolute())!r}; check the path")
    return file
