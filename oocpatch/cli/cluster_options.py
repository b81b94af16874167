"""Options that choose where a command computes: threads, processes, a cluster, or one part of an array job."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import click


@contextlib.contextmanager
def client_of(options: dict[str, Any], log: Any) -> Iterator[dict[str, Any]]:
    """Replace `--scheduler` and `--processes` by a client among the options of `predict`.

    Raises:
        click.UsageError: when they do not go together.
    """
    rest, scheduler, processes = _split_options(options)
    if scheduler is None and not processes:
        yield rest
        return
    from oocpatch.execution.dask_clients import connected, log_dashboard

    with connected(scheduler, rest["workers"] or 0, rest["device"]) as client:
        log(f"dashboard: {log_dashboard(client)}")
        yield {**rest, "client": client, "workers": None if processes else rest["workers"]}


def as_planned(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `plan` for a run on a cluster, without connecting to it."""
    rest, scheduler, processes = _split_options(options)
    return {**rest, "workers": 1} if scheduler or processes else rest


def _split_options(options: dict[str, Any]) -> tuple[dict[str, Any], str | None, bool]:
    rest = dict(options)
    scheduler, processes = rest.pop("scheduler"), rest.pop("processes")
    if scheduler and processes:
        raise click.UsageError("--scheduler and --processes are two ways to the same: give one of them.")
    if (processes or is_slurm(scheduler)) and not rest["workers"]:
        raise click.UsageError(
            f"--{'processes' if processes else 'scheduler slurm'} needs their number: give --workers N."
        )
    if (scheduler or processes) and rest["part"]:
        raise click.UsageError("--part is for jobs without a scheduler: give one of the two.")
    return rest, scheduler, processes


def is_slurm(scheduler: str | None) -> bool:
    """Return True if the option asks for jobs of Slurm."""
    return (scheduler or "").partition(":")[0] == "slurm"


def part(text: str | tuple[int, int]) -> tuple[int, int]:
    """Parse the number and count of a part, such as `3/16`.

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
    """Handle SIGTERM, which batch systems send before they kill, as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set the handler of a signal
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
