"""Clients of Dask: of a running scheduler, of worker processes on this machine, of jobs of Slurm; and their checks.

```text
 --scheduler tcp://host:8786      Client(address)
 --scheduler file:scheduler.json  Client(scheduler_file=...)
 --scheduler slurm:cores=4,...    SLURMCluster(cores=4, ...).adapt(minimum=workers, maximum=workers)
 --processes                      LocalCluster(n_workers=workers), one device per process where there are several
```
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dask
import distributed
import torch
from distributed.versions import get_versions  # not documented; `Client.get_versions` runs it in each worker

from oocpatch.execution.dask_cluster import NO_MORE_WORKERS, call_bounded
from oocpatch.system import leave_interrupts_to_others

logger = logging.getLogger("oocpatch")

LIST_OPTIONS = frozenset({"job_extra_directives", "job_script_prologue", "worker_extra_args", "job_directives_skip"})
"""Options of a Slurm job that are lists; each mention adds a value."""
SLURM_SECONDS = 30.0
"""Time limit for one call of `sbatch` or `squeue`."""

START_SECONDS = 300.0
"""Time limit for the start of the first worker process of this machine, and for the end of all."""

MUST_AGREE, SHOULD_AGREE = ("oocpatch", "torch"), ("numpy", "python", "zarr")
"""Packages whose versions the bytes of a result depend on, and those on which they might."""


@contextlib.contextmanager
def connected(scheduler: str | None, processes: int, device: str = "cpu") -> Iterator[distributed.Client]:
    """Connect to a running scheduler, or start worker processes that end with the `with` block.

    Args:
        scheduler: `tcp://host:port`, `file:scheduler.json`, `slurm` or `slurm:name=value,...`; None: processes of
            this machine.
        processes: their number, for Slurm and for this machine.
        device: the device models run on; with `"auto"` or `"cuda"`, each process of this machine sees one device.

    Raises:
        ValueError: when there is no such scheduler.
    """
    kind, _, rest = (scheduler or "").partition(":")
    if scheduler is None:
        connection = _local(processes, device)
    else:
        connection = _slurm(rest, processes) if kind == "slurm" else _remote(scheduler, kind, rest)
    with _quiet(), connection as client:
        yield client


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep distributed from printing its stack when a scheduler goes away: the run ends with an error that says so."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.CRITICAL)
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


@contextlib.contextmanager
def _local(processes: int, device: str) -> Iterator[distributed.Client]:
    devices = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")

    class Nanny(distributed.Nanny):
        """Starts a process that sees one device only, if there are any, and that Ctrl-C does not reach."""

        def __init__(self, *args: Any, name: int, **options: Any) -> None:
            leave_interrupts_to_others()  # of the thread of the cluster's loop, which processes inherit
            if devices:
                options["env"] = {"CUDA_VISIBLE_DEVICES": visible_devices(name, devices, inherited)}
            super().__init__(*args, **{**options, "name": name})

    # No limits of Dask's own: max_memory bounds what a run adds, and a worker that is paused finishes nothing.
    local = distributed.LocalCluster(  # type: ignore[no-untyped-call]  # so has distributed, in places
        n_workers=0,
        threads_per_worker=1,
        processes=True,
        worker_class=Nanny,
        memory_limit=None,
        dashboard_address=":0",
        # What fails comes back with its task, and a process that dies is reported; the rest is the noise of an end:
        # a heartbeat that meets a scheduler which has just closed prints its stack.
        silence_logs=logging.CRITICAL,
    )
    with contextlib.ExitStack() as stack:
        # In a thread of its own: a second interrupt does not keep processes from being ended.
        stack.callback(call_bounded, local.close, START_SECONDS)
        client = stack.enter_context(distributed.Client(local, set_as_default=False))  # type: ignore[no-untyped-call]
        # Not before: an interrupt while they start must end them.
        local.scale(processes)  # type: ignore[no-untyped-call]
        with contextlib.suppress(TimeoutError):  # the run then says that there are none
            client.wait_for_workers(1, timeout=START_SECONDS)
        yield client


@contextlib.contextmanager
def _remote(scheduler: str, kind: str, rest: str) -> Iterator[distributed.Client]:
    target = {"scheduler_file": rest} if kind == "file" else {"address": scheduler}
    if kind not in ("tcp", "tls", "ucx", "ws", "wss", "file") or not rest.strip("/"):
        raise ValueError(f"scheduler must be tcp://host:port, file:scheduler.json or slurm, got {scheduler!r}")
    if kind == "file" and not Path(rest).is_file():  # Dask would wait for it
        raise ValueError(f"no scheduler has written {rest}; start one with `dask scheduler --scheduler-file {rest}`")
    try:
        client = distributed.Client(**target, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise ValueError(f"no scheduler can be reached at {scheduler}; start one with `dask scheduler`") from error
    with client:
        yield client


@contextlib.contextmanager
def _slurm(text: str, workers: int) -> Iterator[distributed.Client]:
    """Submit a job per worker process by dask-jobqueue; lost ones are submitted again, and the end cancels all."""
    before = signal.getsignal(signal.SIGINT)
    try:
        from dask_jobqueue.slurm import SLURMCluster, SLURMJob  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ValueError("scheduler slurm needs dask-jobqueue: pip install 'oocpatch[slurm]'") from error
    finally:
        # Its import lets Ctrl-C end the process at once, with exit code 0 (dask_jobqueue.runner).
        signal.signal(signal.SIGINT, before)
    job_class: Any = SLURMJob
    configured, options = dask.config.get("jobqueue.slurm"), slurm_options(text)
    options.setdefault("processes", configured.get("processes") or 1)
    # Slurm bounds the memory of a job; a worker that Dask pauses finishes nothing.
    extra = options.get("worker_extra_args", configured.get("worker-extra-args")) or ()
    options["worker_extra_args"] = ["--memory-limit", "0", *extra]
    try:
        script = job_class("tcp://scheduler:8786", "worker", **options).job_script()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"scheduler slurm takes the arguments of SLURMCluster, such as slurm:cores=4,memory=16GB; got {text!r}: "
            f"{' '.join(str(error).split())}"
        ) from error
    refusal = _slurm_command("sbatch", "--test-only", script=script)[1]
    if refusal:
        raise ValueError(f"Slurm takes no job: {refusal}")
    scheduler_options = {"dashboard_address": ":0", **configured.get("scheduler-options", {})}
    cluster: Any = SLURMCluster(scheduler_options=scheduler_options, **options)
    with cluster, distributed.Client(cluster, set_as_default=False) as client:  # type: ignore[no-untyped-call]
        # Equal bounds: the driver submits a task only when there is a process for it, so Dask's estimate would be 0.
        cluster.adapt(minimum=workers, maximum=workers)
        NO_MORE_WORKERS[client] = lambda: _no_more_jobs({str(job.job_id) for job in list(cluster.workers.values())})
        yield client


def slurm_options(text: str) -> dict[str, Any]:
    """Parse the options of jobs, arguments of `dask_jobqueue.SLURMCluster`.

    >>> slurm_options("cores=4,memory=16GB,job-extra-directives=--gres=gpu:1,nanny=false")
    {'cores': 4, 'memory': '16GB', 'job_extra_directives': ['--gres=gpu:1'], 'nanny': False}
    """
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ValueError(f"scheduler slurm takes NAME=VALUE,..., such as slurm:cores=4,memory=16GB; got {item!r}")
        if name in LIST_OPTIONS:
            options.setdefault(name, []).append(value)
        else:
            options[name] = dask.config.interpret_value(value)
    return options


def _slurm_command(*command: str, script: str | None = None) -> tuple[str, str]:
    """Run a command of Slurm; return its output, and the reason when it failed."""
    try:
        done = subprocess.run(  # noqa: S603 - commands are given above and below
            command, input=script, capture_output=True, text=True, timeout=SLURM_SECONDS, check=False
        )
    except FileNotFoundError:
        raise ValueError(
            f"scheduler slurm submits jobs by {command[0]}, which is not found here; start the command where Slurm's "
            "commands are, such as on a login node"
        ) from None
    except subprocess.TimeoutExpired:
        return "", f"{command[0]} did not answer for {SLURM_SECONDS:.0f} s"
    return done.stdout, " ".join(done.stderr.split()) or f"exit code {done.returncode}" if done.returncode else ""


def _no_more_jobs(jobs: set[str]) -> str:
    """Return the reason why no job will start a worker any more; empty while one may."""
    listed, unknown = _slurm_command("squeue", "--noheader", "--format=%A", f"--user={os.getuid()}")
    if unknown or jobs & set(listed.split()):
        return ""
    return (
        f"no worker is left, and no job in the queue ({', '.join(sorted(jobs)[-3:]) or 'all'} have ended; their output "
        "is where Slurm put it, such as slurm-ID.out)"
    )


def visible_devices(number: int, count: int, inherited: str | None) -> str:
    """Return `CUDA_VISIBLE_DEVICES` for process `number` of this machine, where the variable may be set already.

    >>> [visible_devices(number, 2, None) for number in range(3)], visible_devices(1, 2, "4,GPU-5f2c")
    (['0', '1', '0'], 'GPU-5f2c')
    """
    names = [str(i) for i in range(count)] if inherited is None else [name.strip() for name in inherited.split(",")]
    return names[number % min(count, len(names))]


def device_of_rank(rank: int, device: str, count: int) -> str:
    """Return the device of the worker process of this rank on its host, where it sees `count` CUDA devices.

    >>> [device_of_rank(rank, "cuda", 2) for rank in range(3)], device_of_rank(1, "cuda", 1)
    (['cuda:0', 'cuda:1', 'cuda:0'], 'cuda')
    >>> device_of_rank(1, "cuda:0", 2)
    'cuda:0'
    """
    return f"cuda:{rank % count}" if device == "cuda" and count > 1 else device


def check_client(client: Any) -> None:
    """Refuse what is no client of `dask.distributed`, and one that is asynchronous or not connected."""
    if not isinstance(client, distributed.Client):
        raise TypeError(f"client must be a dask.distributed.Client, got {type(client).__name__}")
    if client.asynchronous:
        raise ValueError("client must not be asynchronous; make it with Client(..., asynchronous=False)")
    if client.status != "running":
        raise ValueError(f"client must be connected to its scheduler, but it is {client.status}")


def versions_here() -> dict[str, str | None]:
    """Return the versions in this process of the packages that the bytes of a result depend on."""
    return _relevant(get_versions([*MUST_AGREE, *SHOULD_AGREE]))


def _relevant(versions: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    """Pick the relevant packages of one process's versions, without builds such as `+cpu`."""
    packages = versions["packages"]
    return {name: str(packages[name]).split("+")[0] for name in (*MUST_AGREE, *SHOULD_AGREE)}


def disagreement(here: dict[str, str | None], there: dict[str, str | None], names: Sequence[str]) -> str:
    """List the versions that differ; empty if none does."""
    return ", ".join(f"{n} {here.get(n)} here, {there.get(n)} there" for n in names if here.get(n) != there.get(n))


def check_versions(client: distributed.Client, here: dict[str, str | None]) -> None:
    """Refuse workers whose versions may give other bytes than those of the client."""
    answer = call_bounded(lambda: client.get_versions(packages=[*MUST_AGREE, *SHOULD_AGREE]))
    # A worker that did not answer compares by itself if it takes part.
    for address, versions in (answer["workers"] if answer else {}).items():
        there = _relevant(versions)
        if wrong := disagreement(here, there, MUST_AGREE):
            raise ValueError(f"workers must have the client's versions, but the one at {address} differs: {wrong}")
        if other := disagreement(here, there, SHOULD_AGREE):
            logger.warning("the worker at %s has other versions, and may round differently: %s", address, other)


def log_dashboard(client: distributed.Client) -> str:
    """Log and return the address of the dashboard."""
    link = str(client.dashboard_link)
    logger.info("dashboard: %s", link)
    return link
