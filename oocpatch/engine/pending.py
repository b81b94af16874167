"""Reads and writes that are under way: waited for together, or given up together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class Pending:
    """Calls that threads of a pool are working on.

    Args:
        pool: the threads.
    """

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._futures: list[Future[Any]] = []

    def submit(self, function: Callable[..., Any], /, *args: Any) -> None:
        """Begin a call."""
        self._futures.append(self._pool.submit(function, *args))

    def wait(self) -> None:
        """Until all calls are done; the first that failed raises here."""
        futures, self._futures = self._futures, []
        for future in futures:
            future.result()

    def abandon(self) -> None:
        """Until no call is running any more; what failed is of no interest."""
        for future in self._futures:
            future.cancel()
        for future in self._futures:
            if not future.cancelled():
                future.exception()
