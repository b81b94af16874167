"""Paths in an object store."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from zarr.abc.store import Store

from oocpatch.storage.object_store import UrlStore, client, translated_errors
from oocpatch.storage.storage_path import PIECE, Array, FileState, Skip, StoragePath, lines_of

DELETED_AT_A_TIME = 1000
"""Objects that are deleted by one request."""


def describe_error(error: OSError) -> str:
    """Return the message of an error, and the address it is about.

    >>> describe_error(PermissionError(13, "access denied", "s3://bucket/scan.zarr"))
    's3://bucket/scan.zarr: access denied'
    """
    return f"{error.filename}: {error.strerror}" if error.strerror and error.filename else str(error)


@dataclass(frozen=True, slots=True)
class ObjectPath(StoragePath):
    """An address in an object store. There are no directories.

    >>> path = ObjectPath.of("s3://bucket/results/out.zarr/")
    >>> str(path / "zarr.json"), path.name, str(path.parent), [str(p) for p in path.parents]
    ('s3://bucket/results/out.zarr/zarr.json', 'out.zarr', 's3://bucket/results', ['s3://bucket/results', 's3://bucket'])
    """

    url: str
    is_local = False

    @classmethod
    def of(cls, url: str) -> Self:
        """Return the address of a URL."""
        return cls(url.rstrip("/"))

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, key: str) -> Self:
        return type(self)(f"{self.url}/{key}".rstrip("/"))

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
    def parent(self) -> Self:
        return type(self)(f"{self.root}/{self.key.rpartition('/')[0]}".rstrip("/"))

    @property
    def parents(self) -> Sequence[Self]:
        parts = self.key.split("/")
        return [type(self)("/".join([self.root, *parts[:i]])) for i in reversed(range(len(parts)))] if self.key else []

    def is_file(self) -> bool:
        return self._head() is not None

    def is_dir(self) -> bool:
        return any(True for _ in self.list_files())

    def size(self) -> int:
        head = self._head()
        return 0 if head is None else int(head["size"])

    def state(self) -> FileState | None:
        try:
            with translated_errors(self.url):
                answer = self._bucket.get(self.key)
                tag, modified = answer.meta["e_tag"], answer.meta["last_modified"]
                return FileState(bytes(answer.bytes()), str(tag), modified.timestamp())
        except FileNotFoundError:
            return None

    def read_pieces(self) -> Iterator[bytes]:
        with translated_errors(self.url):
            for piece in self._bucket.get(self.key).stream(min_chunk_size=PIECE):
                yield bytes(piece)

    def read_array(self, dtype: str, shape: tuple[int, ...]) -> Array | None:
        kind, data = np.dtype(dtype).newbyteorder("<"), self.read_bytes()
        if len(data) != math.prod(shape) * kind.itemsize:
            return None
        return np.frombuffer(data, kind).reshape(shape).copy()

    def list_files(self, *, skip: Skip | None = None, after: str = "") -> Iterator[str]:
        """List the relative names of all objects below, in order, that come after one."""
        offset = f"{self.key}/{after}" if after else None
        with translated_errors(self.url):
            for batch in self._bucket.list(prefix=self.key or None, offset=offset):
                for entry in batch:
                    name = str(entry["path"]).removeprefix(self.key).lstrip("/")
                    folders = itertools.accumulate(name.split("/")[:-1], lambda above, part: f"{above}/{part}")
                    if skip is None or not any(skip(folder) for folder in folders):
                        yield name

    def list_tags(self) -> Iterator[tuple[str, str]]:
        """List the relative names of all objects below, each with its ETag, or with size and time where it has none."""
        with translated_errors(self.url):
            for batch in self._bucket.list(prefix=self.key or None):
                for entry in batch:
                    tag = entry["e_tag"] or f"{entry['size']} {entry['last_modified']}"
                    yield str(entry["path"]).removeprefix(self.key).lstrip("/"), str(tag)

    def list_folders(self, depth: Literal[1, 2] = 1) -> list[str]:
        if depth == 2:  # one listing of everything instead of one for each of many directories
            return sorted({"/".join(parts[:2]) for name in self.list_files() if len(parts := name.split("/")) > 2})
        with translated_errors(self.url):
            prefixes = self._bucket.list_with_delimiter(prefix=self.key or None)["common_prefixes"]
        return sorted(str(prefix).rpartition("/")[2] for prefix in prefixes)

    def list_siblings(self, start: str) -> list[Self]:
        siblings: list[Self] = []
        with translated_errors(self.url):
            # After a key, and not a whole folder: a bucket may have millions of neighbours.
            for batch in self._bucket.list(prefix=self.parent.key or None, offset=self.key):
                for entry in batch:
                    path = type(self)(f"{self.root}/{entry['path']}")
                    if not path.url.startswith(f"{self.parent}/{start}"):
                        return siblings
                    siblings.append(path)
        return siblings

    def make_folder(self) -> None:
        pass

    def write_plain(self, data: bytes | memoryview) -> None:
        with translated_errors(self.url):
            self._bucket.put(self.key, data, use_multipart=False)

    def write_atomic(self, content: str | bytes | Iterable[bytes]) -> None:
        self.write_plain(b"".join(lines_of(content)))

    def put_if(self, content: bytes, tag: str | None) -> bool:
        from obstore.exceptions import AlreadyExistsError, PreconditionError  # noqa: PLC0415 - optional

        try:
            with translated_errors(self.url):
                mode: Any = "create" if tag is None else {"e_tag": tag}
                try:
                    self._bucket.put(self.key, content, mode=mode, use_multipart=False)
                except (AlreadyExistsError, PreconditionError):
                    # An answer may be lost, and the request tried again: then the object is there.
                    there = self.state()
                    return there is not None and there.content == content
        except FileNotFoundError:  # it had a tag, and is gone
            return False
        return True

    def renew(self, content: bytes, tag: str) -> None:
        self.put_if(content, tag)

    def unlink(self, missing_ok: bool = False) -> None:
        with contextlib.suppress(*[FileNotFoundError] if missing_ok else []), translated_errors(self.url):
            self._bucket.delete(self.key)

    def remove_tree(self) -> None:
        self.remove(self.list_files())

    def remove(self, names: Iterable[str]) -> None:
        """Delete objects below, many per request."""
        keys = (f"{self.key}/{name}" for name in names)
        with translated_errors(self.url):
            while some := list(itertools.islice(keys, DELETED_AT_A_TIME)):
                self._bucket.delete(some)

    def remove_if_empty(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def check_readable(self) -> None:
        """Raise an `OSError` or a `ValueError` when the store does not answer to a reader, or refuses."""
        with contextlib.suppress(FileNotFoundError), translated_errors(self.url):
            client(self.url, hurried=True).head("zarr.json")

    def check_writable(self, name: str) -> None:
        try:
            with translated_errors(self.url):
                client(self.url, hurried=True).list_with_delimiter()
        except OSError as error:
            where = "check the address, and AWS_ENDPOINT_URL if it is set"
            raise ValueError(f"{name} cannot be written: {describe_error(error)}; {where}") from error

    def store(self, *, read_only: bool = False) -> Store:
        return UrlStore(self.url, read_only=read_only)

    @property
    def _bucket(self) -> Any:
        """The obstore store of the bucket, or of the server."""
        return client(self.root)

    def _head(self) -> Any:
        """Size, tag and time of the object; None where there is none."""
        try:
            with translated_errors(self.url):
                return self._bucket.head(self.key)
        except FileNotFoundError:
            return None
