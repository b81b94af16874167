"""Worker processes as jobs of Slurm, by dask-jobqueue. The only file that knows `dask_jobqueue`.

```text
 run begins --> sbatch, a job per worker process --> jobs wait in the queue --> workers come --> run ends --> scancel
                    ^                                                             |
                    +------- a job whose worker was lost (its time was up) <------+
```

What the jobs ask for is Dask's own configuration, `jobqueue.slurm`; what the command says goes before.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import dask
import distributed
from distributed.core import Status

from oocpatch.errors import ClusterLost
from oocpatch.execution.dask_cluster import RESUME, SUPPLIES

logger = logging.getLogger("oocpatch")

SUBMIT_SECONDS = 60.0
"""How long `sbatch` may take."""
ASK_SECONDS, ANSWER_SECONDS = 15.0, 10.0
"""How often `squeue` is asked, while there are no workers, and how long it may take."""
GONE_SECONDS = 60.0
"""How long no job may be in the queue, while there are no workers, until nothing more is expected. Dask takes 15 s to
notice that a worker is lost; then its job is submitted again."""

LISTS = frozenset({"job_extra_directives", "job_script_prologue", "worker_extra_args", "job_directives_skip"})
"""Options that are lists; each mention adds a value."""
OURS = frozenset({"scheduler", "name", "config_name", "protocol", "security"})
"""Arguments of dask-jobqueue that are not for the command line."""


@contextlib.contextmanager
def slurm_client(text: str, workers: int) -> Iterator[distributed.Client]:
    """A client of a scheduler in this process; a run of this client submits jobs, and the `with` block cancels them.

    Args:
        text: what jobs ask for, before Dask's configuration, such as `"cores=4,memory=16GB"`.
        workers: number of worker processes.

    Raises:
        ValueError: when dask-jobqueue or Slurm's commands are missing, or the options are wrong.
    """
    options = parsed(text)
    cluster, kind = _dask_jobqueue()
    missing = [name for name in ("sbatch", "scancel") if shutil.which(name) is None]
    if missing:
        raise ValueError(
            f"scheduler slurm submits jobs by {missing[0]}, which is not found here; start the command where Slurm's "
            "commands are, such as on a login node"
        )
    known = _arguments(kind) - OURS
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(f"scheduler slurm takes {', '.join(sorted(known))}; got {', '.join(unknown)}")
    options = _completed(options)
    jobs = Jobs(workers)

    class Job(kind):  # type: ignore[misc, valid-type]  # it is imported late
        """A job that tells how its submission ended. Dask only logs it, with a traceback."""

        async def start(self) -> None:
            try:
                await super().start()
                jobs.submitted.append(str(self.job_id))
            except (OSError, RuntimeError, ValueError) as error:
                jobs.refused.append(_said(error))
                self.status = Status.running

        async def close(self) -> None:
            await super().close()
            self.status = Status.closed

    where = {"dashboard_address": ":0", **dask.config.get("jobqueue.slurm.scheduler-options", {})}
    with (
        cluster(job_cls=Job, scheduler_options=where, **options) as jobs.cluster,
        distributed.Client(jobs.cluster, set_as_default=False) as client,  # type: ignore[no-untyped-call]
    ):
        SUPPLIES[client] = jobs
        yield client


def _dask_jobqueue() -> tuple[Any, Any]:
    """The classes of a cluster and of a job."""
    before = signal.getsignal(signal.SIGINT)
    try:
        from dask_jobqueue.slurm import SLURMCluster, SLURMJob  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ValueError("scheduler slurm needs dask-jobqueue: pip install 'oocpatch[slurm]'") from error
    # It lets Ctrl-C end the process at once, with exit code 0, as soon as it is imported.
    signal.signal(signal.SIGINT, before)
    return SLURMCluster, SLURMJob


def parsed(text: str) -> dict[str, Any]:
    """Options of jobs: values are JSON, else text.

    >>> parsed("cores=4,memory=16GB,job_extra_directives=--gres=gpu:1,nanny=false")
    {'cores': 4, 'memory': '16GB', 'job_extra_directives': ['--gres=gpu:1'], 'nanny': False}
    """
    found: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ValueError(f"scheduler slurm takes NAME=VALUE,..., such as slurm:cores=4,memory=16GB; got {item!r}")
        try:
            read = json.loads(value)
        except ValueError:
            read = value.strip()
        if name in LISTS:
            found.setdefault(name, []).append(str(value))
        else:
            found[name] = read
    return found


def _arguments(job: Any) -> set[str]:
    """Names of the arguments of a class of jobs, and of the class that it extends."""
    found = {name for kind in job.__mro__[:2] for name in inspect.signature(kind.__init__).parameters}
    return found - {"self", "base_class_kwargs"}


def _completed(options: dict[str, Any]) -> dict[str, Any]:
    """Options with our defaults: a process per job, no memory limit of Dask's own.

    Raises:
        ValueError: when nothing says how many cores and how much memory a job has.
    """

    def given(name: str) -> Any:
        return options.get(name, dask.config.get(f"jobqueue.slurm.{name.replace('_', '-')}", None))

    missing = [name for name in ("cores", "memory") if given(name) is None]
    if missing:
        raise ValueError(
            f"scheduler slurm needs {' and '.join(missing)} of a job; give --scheduler slurm:cores=4,memory=16GB, or "
            "set jobqueue.slurm in ~/.config/dask/jobqueue.yaml"
        )
    arguments = list(given("worker_extra_args") or [])
    if "--memory-limit" not in arguments:
        # Slurm bounds what a job takes; a worker that Dask pauses finishes nothing.
        arguments += ["--memory-limit", "0"]
    return {**options, "processes": given("processes") or 1, "worker_extra_args": arguments}


def _said(error: Exception) -> str:
    """What a command said, of Dask's account of how it failed."""
    _, found, said = str(error).partition("stderr:\n")
    return " ".join((said if found else str(error)).split())


class Jobs:
    """The jobs of a client: submitted when a run begins, and again when a worker is lost.

    Args:
        workers: number of worker processes.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.cluster: Any = None
        self.submitted: list[str] = []
        self.refused: list[str] = []
        self._seen_at = self._asked_at = time.monotonic()
        self._told = 0

    def ask(self) -> None:
        """Submit the jobs.

        Raises:
            ClusterLost: when Slurm takes none of them.
        """
        before = len(self.submitted)
        self.cluster.scale(self.workers)
        # the jobs of an earlier run of the same client are still there
        wanted = len(self.cluster.worker_spec)
        deadline = time.monotonic() + SUBMIT_SECONDS
        while len(self.submitted) + len(self.refused) < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        if not self.submitted:
            why = self.refused[-1] if self.refused else f"it did not answer for {SUBMIT_SECONDS:.0f} s"
            raise ClusterLost(f"Slurm takes no job: {why}; {RESUME}")
        self._seen_at = self._asked_at = time.monotonic()
        logger.info("submitted %d jobs: %s", len(self.submitted) - before, " ".join(self.submitted[before:]))
        self._tell()

    def keep(self, processes: int) -> str | None:
        """Submit jobs again whose worker was lost; why no worker will come any more, if that is so.

        Args:
            processes: how many worker processes there are.
        """
        self.cluster.scale(self.workers)
        self._tell()
        now = time.monotonic()
        if processes:
            self._seen_at = now
        elif now - self._asked_at >= ASK_SECONDS:
            self._asked_at = now
            if self._queued():
                self._seen_at = now
            if now - self._seen_at >= GONE_SECONDS:
                return (
                    f"no worker is left, and no job in the queue ({', '.join(self.submitted[-3:])} have ended; what "
                    "they printed is where Slurm put it, such as slurm-ID.out)"
                )
        return None

    def _tell(self) -> None:
        for why in self.refused[self._told :]:
            logger.warning("Slurm did not take a job: %s", why)
        self._told = len(self.refused)

    def _queued(self) -> bool:
        """Whether a job waits or runs, as far as Slurm tells."""
        command = ["squeue", "--noheader", "--format=%A", f"--user={os.getuid()}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True)  # noqa: S603
        except (OSError, subprocess.SubprocessError):
            return True  # nobody knows
        return bool(set(done.stdout.split()) & set(self.submitted))
