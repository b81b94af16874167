"""Object stores: S3 and its like, through obstore, as stores of Zarr's.

An object is put whole in one request, and is there whole or not at all, as a file is that gets its name by renaming.
Faults that may pass (5xx, timeouts, connections that are refused or dropped) are tried again with growing pauses, first
by obstore and then by whoever runs tasks. What is left of them becomes an `OSError` of its kind. Settings come from the
environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...); only addresses travel to other processes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from zarr.storage import ObjectStore

from oocpatch.storage.forks import refuse_fork
from oocpatch.system import is_url

if TYPE_CHECKING:
    from zarr.abc.buffer import Buffer
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import BufferPrototype

BUCKETS = ("s3", "gs", "az")
"""Schemes of stores whose objects can be listed and written."""
WEB = ("http", "https")
"""Schemes of servers that are only read from, by names that are known."""

RETRIES, HURRIED_RETRIES, RETRY_SECONDS = 10, 3, 60
"""How often a request is tried again, also before anything has begun, and for how long at most."""

AT_A_TIME = 16
"""Requests that are under way at a time, where there are many to make."""


def scheme_of(address: str) -> str:
    """Return the scheme of a URL; empty for anything else.

    >>> scheme_of("s3://bucket/scan.zarr"), scheme_of("scan.zarr")
    ('s3', '')
    """
    return address.partition("://")[0] if is_url(address) else ""


def installed() -> bool:
    """Return whether obstore is installed."""
    return importlib.util.find_spec("obstore") is not None


def client(url: str, *, hurried: bool = False) -> Any:
    """Return the obstore store of what lies below a URL, by the environment's settings.

    With `hurried` it gives up early, for a user who waits to learn that the address is wrong.

    Raises:
        ValueError: when obstore is missing, or there is no such kind of store.
    """
    if not installed():
        raise ValueError(f"{url} needs obstore; install it with `pip install 'oocpatch[s3]'`")
    with translated_errors(url):
        return _client(url, hurried=hurried)


@functools.lru_cache(maxsize=64)
def _client(url: str, *, hurried: bool) -> Any:
    from obstore.store import from_url  # noqa: PLC0415 - optional, and not for paths

    # Options that are given here switch off those of the environment: AWS_ALLOW_HTTP, AWS_TIMEOUT, AWS_PROXY_URL ...
    options: dict[str, Any] = {"client_options": {"allow_http": True}} if scheme_of(url) == "http" else {}
    scheme, _, path = url.partition("://")
    return from_url(
        # Names of objects are meant as they stand: a `#` would end a URL, and `%20` is no blank.
        f"{scheme}://{quote(path)}" if scheme in BUCKETS else url,
        **options,
        retry_config={
            "max_retries": HURRIED_RETRIES if hurried else RETRIES,
            "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=10), "base": 2},
            "retry_timeout": timedelta(seconds=RETRY_SECONDS),
        },
    )


@contextlib.contextmanager
def translated_errors(url: str) -> Iterator[None]:
    """Raise obstore's errors as an `OSError` of their kind, or a `ValueError`, with the address in it.

    Raises:
        RuntimeError: in a process that was forked from one that has used obstore, whose threads are not there.
    """
    refuse_fork("obstore", url)
    try:
        yield
    except Exception as error:
        if type(error) is not FileNotFoundError and not type(error).__module__.startswith("obstore"):
            raise
        raise _plain(error, url) from error


def _plain(error: Exception, url: str) -> Exception:
    """Return the builtin error for one of obstore's; where a setting is the cause, the message names it."""
    text, kind = str(error).partition("\n\nDebug source")[0], type(error).__name__
    answer = re.search(r"status code: (\d+) ?([\w ]*)", text)
    status = int(answer[1]) if answer else 0
    code = re.search(r"<Code>(\w+)</Code>", text)
    reason = ", ".join(filter(None, [f"{status} {answer[2]}".strip() if answer else "", code[1] if code else ""]))
    reason = reason or " ".join(text.rpartition(" - ")[2].split())[:200]
    if "Missing" in text and "AccessKey" in text:
        return PermissionError(
            errno.EACCES, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must be set, or AWS_SKIP_SIGNATURE=true", url
        )
    if "builder error" in text:
        return ValueError(f"{url} cannot be reached: an endpoint with http:// needs AWS_ALLOW_HTTP=true")
    if kind in ("InvalidPathError", "NotSupportedError", "UnknownConfigurationKeyError") or "URL error" in text:
        return ValueError(f"{url}: {reason}")
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(errno.ENOENT, f"not found ({reason})", url)
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or status in (401, 403):
        return PermissionError(errno.EACCES, f"access denied ({reason})", url)
    may_pass = status in (408, 429) or not 300 <= status < 500
    no_answer = ConnectionError(errno.EIO, f"no answer ({reason})", url)
    return no_answer if may_pass else OSError(errno.EINVAL, f"request refused ({reason})", url)


class UrlStore(ObjectStore[Any]):
    """A store of Zarr's for what lies below a URL; it is pickled as its address."""

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        super().__init__(client(url), read_only=read_only)
        self.url = url

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(UrlStore, read_only=self.read_only), (self.url,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UrlStore) and (self.url, self.read_only) == (other.url, other.read_only)

    def __hash__(self) -> int:
        return hash((self.url, self.read_only))

    def __str__(self) -> str:
        return self.url

    def with_read_only(self, read_only: bool = False) -> UrlStore:
        return UrlStore(self.url, read_only=read_only)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        with translated_errors(f"{self.url}/{key}"):
            return await super().get(key, prototype, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        with translated_errors(self.url):
            return await super().get_partial_values(prototype, key_ranges)

    async def exists(self, key: str) -> bool:
        with translated_errors(f"{self.url}/{key}"):
            return await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        """Put an object, in one request: what a killed process left of several would stay, unseen, and be paid for."""
        self._check_writable()
        with translated_errors(f"{self.url}/{key}"):
            await self.store.put_async(key, value.as_buffer_like(), use_multipart=False)

    async def delete(self, key: str) -> None:
        with translated_errors(f"{self.url}/{key}"):
            await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        with translated_errors(f"{self.url}/{prefix}"):
            await super().delete_dir(prefix)

    def list(self) -> AsyncGenerator[str, None]:
        return self._each(super().list())

    def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        return self._each(super().list_prefix(prefix))

    def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        return self._each(super().list_dir(prefix))

    async def _each(self, names: AsyncIterator[str]) -> AsyncGenerator[str, None]:
        with translated_errors(self.url):
            async for name in names:
                yield name
