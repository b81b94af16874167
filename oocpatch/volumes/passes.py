"""Passes over a volume or a map: many small tasks, run by Dask's threads, a few at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from dask.base import compute
from dask.delayed import delayed
from dask.threaded import get

from oocpatch.progress import OnProgress, show_progress

Item = TypeVar("Item")
Result = TypeVar("Result")

WAVE = 4
"""Tasks per thread that Dask gets at a time: its graph stays small, whatever the size of the volume."""

DELAY = 2.0
"""Seconds before a terminal shows progress."""


def run_pass(
    task: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    threads: int,
    name: str,
    unit: str,
    size: Callable[[Item], int],
    total: int,
    progress: str | bool | OnProgress = "auto",
) -> Iterator[Result]:
    """Run a task over items by Dask's threads, and yield the results in the order of the items.

    A task must be idempotent and only read. Progress is counted in units, named in the plural: `size` returns their
    number in an item, `total` is that in all items.

    >>> list(run_pass(abs, [-1, 2], threads=2, name="absolutes", unit="numbers", size=lambda _: 1, total=2))
    [1, 2]
    """
    remaining = iter(items)
    with (
        # a pool of its own: Dask's default one has a thread per core, and does not survive the fork of a process
        ThreadPoolExecutor(threads, thread_name_prefix="oocpatch-pass") as pool,
        show_progress(progress, name, unit, total, delay=DELAY) as on_units,
    ):
        while wave := list(itertools.islice(remaining, WAVE * threads)):
            tasks = [delayed(task, pure=False, traverse=False)(item) for item in wave]
            # The scheduler itself: given its name, Dask imports all of distributed to look for a client.
            yield from compute(*tasks, scheduler=get, pool=pool)  # type: ignore[no-untyped-call] # Dask gives it none
            on_units(sum(map(size, wave)))
