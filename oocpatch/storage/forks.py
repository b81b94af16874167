"""Libraries in forked processes, which have none of their parent's threads, and would wait for them for ever."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from oocpatch.system import after_fork

THREADED = ("torch", "zarrs")
"""Libraries that keep threads, and that can be used otherwise, or not at all, where those are lost."""

Result = TypeVar("Result")

_lost: set[str] = set()
_process_of: dict[str, int] = {}


def _remember() -> None:
    _lost.update(name for name in THREADED if name in sys.modules)
    if (threaded := sys.modules.get("dask.threaded")) is not None:  # else `result.values` waits for the parent's pool
        vars(threaded)["default_pool"] = None
        vars(threaded).get("pools", {}).clear()


after_fork(_remember)
if multiprocessing.parent_process() is not None:  # a fork before this was imported, or an interpreter started anew
    _remember()


def threads_lost(library: str) -> bool:
    """Return whether this process was forked from one that had loaded a library of `THREADED`."""
    return library in _lost


def refuse_fork(library: str, address: object) -> None:
    """Refuse a library in a process that was forked from one that has used it.

    Raises:
        RuntimeError: in such a process; the message says how to start processes.
    """
    if _process_of.setdefault(library, os.getpid()) != os.getpid():
        raise RuntimeError(
            f"{address} cannot be read in a process that was forked from one that has used {library}, whose threads "
            "it does not have; start processes anew, as DataLoader(..., multiprocessing_context='spawn') does"
        )


def in_new_thread_if_forked(compute: Callable[[], Result]) -> Result:
    """Return the result of a function that computes by torch, which has a pool of threads for each thread.

    In a forked process the calling thread has lost its pool. A new thread gets a new one.
    """
    if not threads_lost("torch"):
        return compute()
    with ThreadPoolExecutor(1, "oocpatch-forked") as executor:
        return executor.submit(compute).result()
