"""Where a command's work is done: here, in processes of this machine, on a cluster, or in one part of an array job."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import click


@contextlib.contextmanager
def client_of(options: dict[str, Any], log: Any) -> Iterator[dict[str, Any]]:
    """The options of `predict`, with the client that `--scheduler` or `--processes` ask for.

    Raises:
        click.UsageError: when they do not go together.
    """
    given, scheduler, processes = _parted(options)
    if scheduler is None and not processes:
        yield given
        return
    from oocpatch.execution.dask_clients import connected, log_dashboard

    with connected(scheduler, given["workers"] or 0, given["device"]) as client:
        log(f"dashboard: {log_dashboard(client)}")
        yield {**given, "client": client, "workers": None if processes else given["workers"]}


def as_planned(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `plan`: what a cluster would do, without one."""
    given, scheduler, processes = _parted(options)
    return {**given, "workers": 1} if scheduler or processes else given


def _parted(options: dict[str, Any]) -> tuple[dict[str, Any], str | None, bool]:
    given = dict(options)
    scheduler, processes = given.pop("scheduler"), given.pop("processes")
    if scheduler and processes:
        raise click.UsageError("--scheduler and --processes are two ways to the same: give one of them.")
    if (processes or is_slurm(scheduler)) and not given["workers"]:
        raise click.UsageError(
            f"--{'processes' if processes else 'scheduler slurm'} needs their number: give --workers N."
        )
    if (scheduler or processes) and given["part"]:
        raise click.UsageError("--part is for jobs without a scheduler: give one of the two.")
    return given, scheduler, processes


def is_slurm(scheduler: str | None) -> bool:
    """Whether jobs are to be submitted."""
    return (scheduler or "").partition(":")[0] == "slurm"


def part(text: str | tuple[int, int]) -> tuple[int, int]:
    """Read `3/16`: the third of sixteen parts.

    >>> part("3/16")
    (3, 16)
    """
    if isinstance(text, tuple):
        return text
    number, _, count = text.partition("/")
    try:
        return int(number), int(count)
    except ValueError:
        raise click.BadParameter(f"parts are I/N, such as 3/16, got {text!r}.") from None


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM, which schedulers send before they kill, be what Ctrl-C is."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
