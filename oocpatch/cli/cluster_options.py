"""Options that decide where a command computes: in threads, in processes, on a cluster, or as a part of a job."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import click
from click.core import ParameterSource

scheduler_option = click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Compute on a Dask cluster: tcp://HOST:PORT, file:scheduler.json, or slurm:cores=4,memory=16GB.",
)


@contextlib.contextmanager
def client_of(options: dict[str, Any], log: Any) -> Iterator[dict[str, Any]]:
    """Yield the arguments of `predict`, with the client that `--scheduler` or `--processes` ask for.

    Raises:
        click.UsageError: when they do not go together.
    """
    arguments, scheduler, processes = _split(options)
    if scheduler is None and not processes:
        yield arguments
        return
    from oocpatch.execution.dask_clients import connected, log_dashboard

    with connected(scheduler, options["workers"] or 0, options["device"]) as client:
        log(f"dashboard: {log_dashboard(client)}")
        yield {
            **arguments,
            "client": client,
            "processes": False,
            "workers": None if processes else options["workers"],
        }


@contextlib.contextmanager
def as_planned(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the arguments of `plan`, with the client of a running scheduler; nothing is started, and no job submitted.

    Raises:
        click.UsageError: when they do not go together.
    """
    arguments, scheduler, _ = _split(options)
    if scheduler is None:
        yield arguments
    elif is_slurm(scheduler):
        yield {**arguments, "processes": True}
    else:
        from oocpatch.execution.dask_clients import connected

        with connected(scheduler, 0) as client:
            yield {**arguments, "client": client}


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], str | None, bool]:
    """Return the arguments that were given, the scheduler, and whether tasks run in processes."""
    scheduler, processes = options["scheduler"], options["processes"]
    source = click.get_current_context().get_parameter_source
    arguments = {n: value for n, value in options.items() if source(n) != ParameterSource.DEFAULT and n != "scheduler"}
    if scheduler and processes:
        raise click.UsageError("--scheduler and --processes are two ways to the same: give one of them.")
    if (processes or is_slurm(scheduler)) and not options["workers"]:
        raise click.UsageError(
            f"--{'processes' if processes else 'scheduler slurm'} needs their number: give --workers N."
        )
    if (scheduler or processes) and options["part"]:
        raise click.UsageError("--part is for jobs without a scheduler: give one of the two.")
    return arguments, scheduler, processes


def is_slurm(scheduler: str | None) -> bool:
    """Return whether jobs are to be submitted."""
    return (scheduler or "").partition(":")[0] == "slurm"


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Handle SIGTERM, which schedulers send before they kill, as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set a handler
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
