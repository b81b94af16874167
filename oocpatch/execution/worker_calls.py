"""The call that a worker process has open: one at a time, so that memory is what the plan says.

What its tasks share is opened when the first of them comes, and closed when the call is over or a task of another call
arrives.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from oocpatch.errors import ClusterLost
from oocpatch.execution.dask_clients import MUST_AGREE, disagreement, versions_here
from oocpatch.execution.scheduler import Stopped
from oocpatch.storage.retries import transient

OpenContext = Callable[[threading.Event, contextlib.ExitStack], Any]
"""Opens what the tasks of a call share, on a stack that closes it; tasks stop once the event is set."""


@dataclass(frozen=True, slots=True)
class _OpenCall:
    """A call that is open: its context, and the stack that closes it."""

    token: str
    context: Any
    stack: contextlib.ExitStack
    stopped: threading.Event


_open_call: _OpenCall | None = None
_one_block = threading.Lock()
"""One block at a time, whatever the number of Dask's threads: the device and `max_memory` are those of the process."""
_closed: deque[str] = deque(maxlen=1000)


@contextlib.contextmanager
def opened_call(token: str, versions: dict[str, str | None], open_context: OpenContext, needs: str) -> Iterator[Any]:
    """Yield what the tasks of a call share, to one task at a time.

    Args:
        token: name of the call.
        versions: those of the client.
        open_context: opens it, when the first task of the call comes.
        needs: condition under which workers can open it, for the message where one cannot.

    Raises:
        ClusterLost: when this process cannot take part.
        Stopped: when the call is over.
    """
    with _one_block:
        call = _opened(token, versions, open_context, needs)
        try:
            yield call.context
        finally:
            if call.stopped.is_set():
                _close()


def open_token() -> str | None:
    """Return the name of the call that is open; None if there is none."""
    return None if _open_call is None else _open_call.token


def close_call(token: str) -> None:
    """Close a call; a task that is under way stops at its next patch, or is completed."""
    _closed.append(token)
    if _open_call is not None and _open_call.token == token:
        _open_call.stopped.set()
        if _one_block.acquire(blocking=False):
            try:
                _close()
            finally:
                _one_block.release()


def _close() -> None:
    global _open_call  # noqa: PLW0603 - one per process
    if _open_call is not None:
        _open_call.stack.close()
        _open_call = None


def _opened(token: str, versions: dict[str, str | None], open_context: OpenContext, needs: str) -> _OpenCall:
    """Return the open call; it is opened when its first task comes."""
    global _open_call  # noqa: PLW0603 - one per process
    if token in _closed:
        raise Stopped
    if _open_call is not None and _open_call.token == token:
        return _open_call
    _close()
    process = f"worker process {os.getpid()} on {socket.gethostname()} cannot take part"
    if differing := disagreement(versions, versions_here(), MUST_AGREE):
        raise ClusterLost(f"{process}: workers must have the client's versions: {differing}")
    with contextlib.ExitStack() as stack:
        stopped = threading.Event()
        try:
            context = open_context(stopped, stack)
        except Exception as error:
            if transient(error) and not isinstance(error, ClusterLost):
                raise
            raise ClusterLost(f"{process}: {type(error).__name__}: {error}; workers must {needs}") from error
        _open_call = _OpenCall(token, context, stack.pop_all(), stopped)
    return _open_call
