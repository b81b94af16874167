"""Clients of Dask, as a command asks for them: of a scheduler that is there, of processes of this machine, of Slurm."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import torch

from oocpatch.execution.devices import visible


@contextlib.contextmanager
def connected(scheduler: str | None, processes: int, device: str = "cpu") -> Iterator[distributed.Client]:
    """A client of a scheduler that is there, or of worker processes that end with the `with` block.

    Args:
        scheduler: `tcp://host:port`, `file:scheduler.json`, `slurm` or `slurm:name=value,...`; None: processes of
            this machine.
        processes: how many, for Slurm and for this machine.
        device: where models are to run; with `"auto"` or `"cuda"`, each process of this machine sees one device.

    Raises:
        ValueError: when there is no such scheduler.
    """
    kind, _, rest = (scheduler or "").partition(":")
    if scheduler is None:
        found = _local(processes, device)
    elif kind == "slurm":
        from oocpatch.execution.slurm import slurm_client  # noqa: PLC0415 - for Slurm only

        found = slurm_client(rest, processes)
    else:
        found = _remote(scheduler, kind, rest)
    with found as client:
        yield client


@contextlib.contextmanager
def _local(processes: int, device: str) -> Iterator[distributed.Client]:
    devices = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    given = os.environ.get("CUDA_VISIBLE_DEVICES")

    class Nanny(distributed.Nanny):
        """Starts a process that sees its own device only, if there are any."""

        def __init__(self, *args: Any, name: int, **options: Any) -> None:
            if devices:
                options["env"] = {"CUDA_VISIBLE_DEVICES": visible(name, devices, given)}
            super().__init__(*args, **{**options, "name": name})

    # No limits of Dask's own: max_memory bounds what a run adds, and a worker that is paused finishes nothing.
    local = distributed.LocalCluster(  # type: ignore[no-untyped-call]  # so has distributed, in places
        n_workers=processes,
        threads_per_worker=1,
        processes=True,
        worker_class=Nanny,
        memory_limit=None,
        dashboard_address=":0",
        # What fails comes back with its task, and a process that dies is reported; the rest is the noise of an end:
        # a heartbeat that meets a scheduler which has just closed prints its stack.
        silence_logs=logging.CRITICAL,
    )
    with local, distributed.Client(local, set_as_default=False) as client:  # type: ignore[no-untyped-call]
        yield client


@contextlib.contextmanager
def _remote(scheduler: str, kind: str, rest: str) -> Iterator[distributed.Client]:
    where = {"scheduler_file": rest} if kind == "file" else {"address": scheduler}
    if kind not in ("tcp", "tls", "ucx", "ws", "wss", "file") or not rest.strip("/"):
        raise ValueError(f"scheduler must be tcp://host:port, file:scheduler.json or slurm, got {scheduler!r}")
    if kind == "file" and not Path(rest).is_file():  # Dask would wait for it
        raise ValueError(f"no scheduler has written {rest}; start one with `dask scheduler --scheduler-file {rest}`")
    try:
        client = distributed.Client(**where, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise ValueError(f"no scheduler can be reached at {scheduler}; start one with `dask scheduler`") from error
    with client:
        yield client
