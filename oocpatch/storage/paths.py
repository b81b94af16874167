"""Addresses: where volumes and outputs lie. A path, or a URL in an object store with as much of `Path` as is needed."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.errors import UnstableSpecificationWarning
from zarr.storage import LocalStore

from oocpatch.storage.object_store import BUCKETS, UrlStore, client, scheme_of, told

PIECE = 1 << 20
"""Bytes of an object that are read at a time."""

DELETED_AT_A_TIME = 1000
"""Objects that are deleted at a time."""


def describe_error(error: OSError) -> str:
    """What an error says, and of which address.

    >>> describe_error(PermissionError(13, "access denied", "s3://bucket/scan.zarr"))
    's3://bucket/scan.zarr: access denied'
    """
    return f"{error.filename}: {error.strerror}" if error.strerror and error.filename else str(error)


@dataclass(frozen=True, slots=True)
class ObjectPath:
    """An address in an object store, with as much of `Path` as is needed there. There are no directories.

    >>> path = ObjectPath.of("s3://bucket/results/out.zarr/")
    >>> str(path / "zarr.json"), path.name, str(path.parent), [str(p) for p in path.parents]
    ('s3://bucket/results/out.zarr/zarr.json', 'out.zarr', 's3://bucket/results', ['s3://bucket/results', 's3://bucket'])
    """

    url: str

    @classmethod
    def of(cls, url: str) -> ObjectPath:
        """The address of a URL."""
        return cls(url.rstrip("/"))

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self.url}/{name}".rstrip("/"))

    @property
    def root(self) -> str:
        """The bucket, or the server."""
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{rest.partition('/')[0]}"

    @property
    def key(self) -> str:
        """The name within the bucket."""
        return self.url.removeprefix(self.root).lstrip("/")

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(f"{self.root}/{self.key.rpartition('/')[0]}".rstrip("/"))

    @property
    def parents(self) -> Sequence[ObjectPath]:
        parts = self.key.split("/")
        return [ObjectPath("/".join([self.root, *parts[:i]])) for i in reversed(range(len(parts)))] if self.key else []

    def with_name(self, name: str) -> ObjectPath:
        """The address of another name beside this one."""
        return self.parent / name

    def check_readable(self) -> None:
        """See whether the store answers to a reader.

        Raises:
            OSError, ValueError: when it does not, or refuses.
        """
        import obstore  # noqa: PLC0415 - optional

        with contextlib.suppress(FileNotFoundError), told(self.url):
            obstore.head(client(self.url, hurried=True), "zarr.json")

    def check_writable(self) -> None:
        """See whether the store answers to somebody who wants to write.

        Raises:
            OSError, ValueError: when it does not, or refuses, or the bucket is not there.
        """
        asked = client(self.url, hurried=True)
        import obstore  # noqa: PLC0415 - optional

        with told(self.url):
            obstore.list_with_delimiter(asked)

    def files(self, *, after: str = "") -> Iterator[str]:
        """Names of all objects below, relative to this address.

        Args:
            after: only those that come after this name.
        """
        import obstore  # noqa: PLC0415 - optional

        offset = f"{self.key}/{after}" if after else None
        with told(self.url):
            for batch in obstore.list(client(self.root), prefix=self.key or None, offset=offset):
                for found in batch:
                    yield str(found["path"]).removeprefix(self.key).lstrip("/")

    def folders(self) -> list[str]:
        """Names of what stands right below and has objects below."""
        import obstore  # noqa: PLC0415 - optional

        with told(self.url):
            found = obstore.list_with_delimiter(client(self.root), prefix=self.key or None)["common_prefixes"]
        return sorted(str(path).rpartition("/")[2] for path in found)

    def siblings(self, start: str) -> Iterator[ObjectPath]:
        """Objects beside this one whose names begin with `start`, which is longer than the name."""
        import obstore  # noqa: PLC0415 - optional

        folder = self.parent
        with told(self.url):
            # After a key, and not a whole folder: a bucket may have millions of neighbours.
            for batch in obstore.list(client(self.root), prefix=folder.key or None, offset=self.key):
                for found in batch:
                    path = ObjectPath(f"{self.root}/{found['path']}")
                    if not path.url.startswith(f"{folder}/{start}"):
                        return
                    yield path

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        import obstore  # noqa: PLC0415 - optional

        try:
            with told(self.url):
                obstore.head(client(self.root), self.key)
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there is any object below."""
        return any(True for _ in self.files())

    def exists(self) -> bool:
        """Whether there is an object of this name, or any below."""
        return self.is_file() or self.is_dir()

    def pieces(self) -> Iterator[bytes]:
        """The bytes of the object, a piece at a time."""
        import obstore  # noqa: PLC0415 - optional

        with told(self.url):
            for piece in obstore.get(client(self.root), self.key).stream(min_chunk_size=PIECE):
                yield bytes(piece)

    def read_bytes(self) -> bytes:
        """The object whole."""
        return b"".join(self.pieces())

    def read_text(self) -> str:
        """The object as a text."""
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes | memoryview) -> None:
        """Put the object, in one request."""
        import obstore  # noqa: PLC0415 - optional

        with told(self.url):
            obstore.put(client(self.root), self.key, data, use_multipart=False)

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Delete the object."""
        import obstore  # noqa: PLC0415 - optional

        with contextlib.suppress(*[FileNotFoundError] if missing_ok else []), told(self.url):
            obstore.delete(client(self.root), self.key)

    def remove(self, names: Iterable[str] | None = None) -> None:
        """Delete objects below, many per request: those of these names, or all."""
        import obstore  # noqa: PLC0415 - optional

        keys = (f"{self.key}/{name}" for name in (self.files() if names is None else names))
        with told(self.url):
            while some := list(itertools.islice(keys, DELETED_AT_A_TIME)):
                obstore.delete(client(self.root), some)

    def state(self) -> tuple[bytes, str, float] | None:
        """Content, tag and time of the object in seconds since 1970; None: there is none."""
        import obstore  # noqa: PLC0415 - optional

        try:
            with told(self.url):
                found = obstore.get(client(self.root), self.key)
                tag, at = found.meta["e_tag"], found.meta["last_modified"]
                return bytes(found.bytes()), str(tag), at.timestamp()
        except FileNotFoundError:
            return None

    def put_if(self, content: bytes, tag: str | None) -> bool:
        """Put the object only if it has this tag; None: only if there is none. Whether that was so.

        An answer may be lost, and the request tried again: then the object is there, and it is the caller's.
        """
        import obstore  # noqa: PLC0415 - optional
        from obstore.exceptions import AlreadyExistsError, PreconditionError  # noqa: PLC0415 - optional

        try:
            with told(self.url):
                mode: Any = "create" if tag is None else {"e_tag": tag}
                try:
                    obstore.put(client(self.root), self.key, content, mode=mode, use_multipart=False)
                except (AlreadyExistsError, PreconditionError):
                    found = self.state()
                    return found is not None and found[0] == content
        except FileNotFoundError:  # it had a tag, and is gone
            return False
        return True


Address = Path | ObjectPath
"""Where an output, or what is kept until it is complete, lies."""


def address(text: str) -> Address:
    """The address that a text, which was one, stands for.

    >>> print(address("s3://bucket/out.zarr.oocpatch"), address("/data/out.zarr.oocpatch"))
    s3://bucket/out.zarr.oocpatch /data/out.zarr.oocpatch
    """
    return ObjectPath.of(text) if scheme_of(text) in BUCKETS else Path(text)


def says_nothing(error: Exception, path: Address) -> bool:
    """Whether an error tells that an object store does not answer, or refuses; and not what is there."""
    return isinstance(path, ObjectPath) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError)


def store_at(path: Address, *, read_only: bool = False) -> Store:
    """What lies at an address, as a store of Zarr's."""
    return UrlStore(path.url, read_only=read_only) if isinstance(path, ObjectPath) else LocalStore(path)


def readable(path: Address) -> Any:
    """What lies at an address, as xarray opens it: it notes the path of a directory, which a store has not."""
    return path if isinstance(path, Path) else store_at(path, read_only=True)


def address_of(store: Store) -> Address | None:
    """Where what is in a store of Zarr's lies; None where that is nowhere, or not known."""
    if isinstance(store, UrlStore):
        return ObjectPath.of(store.url)
    return Path(store.root) if isinstance(store, LocalStore) else None


def consolidate(path: Address) -> None:
    """Write consolidated metadata, which xarray looks for and warns of when there are none."""
    with warnings.catch_warnings():
        # Zarr v3 has no specification of them yet.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        zarr.consolidate_metadata(store_at(path))


def local_or_url(address: str | os.PathLike[str]) -> Path | str:
    """A local path as `Path`, anything else as it is.

    `file://` is taken for the path it names: through fsspec it would be written in place, and torn by a crash.
    """
    text = os.fspath(address)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return text if "://" in text else Path(text)


def local_path(name: str, value: str | os.PathLike[str]) -> Path:
    """A path on the local file system.

    Raises:
        ValueError: for a URL of anything else.
        TypeError: when it is no path.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {type(value).__name__}")
    address = local_or_url(value)
    if isinstance(address, str):
        raise ValueError(f"{name} must be a path on a local or shared file system, got {address}")
    return address.absolute()


def output_path(name: str, value: str | os.PathLike[str]) -> Address:
    """A place to write: a path on the local file system, or a URL in an object store.

    Raises:
        ValueError: for a URL of anything else.
        TypeError: when it is no path.
    """
    if not isinstance(value, str) or "://" not in value or value.startswith("file://"):
        return local_path(name, value)
    if scheme_of(value) not in BUCKETS:
        raise ValueError(
            f"{name} must be a path, or a URL that begins with {', '.join(f'{s}://' for s in BUCKETS)}, got {value}"
        )
    found = ObjectPath.of(value)
    if not found.key:
        raise ValueError(f"{name} must have a name in its bucket, such as {found}/out.zarr, got {value}")
    return found


def check_writable(name: str, path: Address) -> None:
    """Refuse a place where nothing can be written, before anything is.

    Raises:
        ValueError: in that case.
    """
    if isinstance(path, ObjectPath):
        try:
            path.check_writable()
        except OSError as error:
            where = "check the address, and AWS_ENDPOINT_URL if it is set"
            raise ValueError(f"{name} cannot be written: {describe_error(error)}; {where}") from error
        return
    found = next(p for p in path.parents if p.exists())
    if not found.is_dir():
        raise ValueError(f"{name} must be in a directory, got {path}, where {found} is a file")
    if not os.access(found, os.W_OK | os.X_OK):
        raise ValueError(f"{name} must be in a directory that can be written to, got {path}, where {found} cannot")


def spec_file(path: str, spec: str) -> pathlib.Path:
    """The file that a spec names.

    Raises:
        ValueError: when it is not there.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"the file of model spec {spec!r} does not exist: {str(file.absolute())!r}; check the path")
    return file
