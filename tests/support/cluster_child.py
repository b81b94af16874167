"""The processes of a small cluster: scheduler, workers, and a client. `tests.support.clusters` is the other end."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import dask
import dask.array
import distributed
import distributed.scheduler
import torch
import zarr

import oocpatch
import oocpatch.execution.worker

MODEL = "tests.support.cluster_child:scripted"


def scripted(patches: torch.Tensor, control: str) -> torch.Tensor:
    """Depends on the place within the patch; logs its calls; does what a file says: wait, die, fail, lack memory."""
    first = patches.reshape(len(patches), -1)[:, 0].tolist()
    settings = json.loads(Path(control).read_text())
    log = os.open(f"{control}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(log, json.dumps([os.getpid(), *first]).encode() + b"\n")
    os.close(log)
    time.sleep(settings.get("delay", 0.0))
    if set(first) & set(settings.get("fatal", ())):
        os.kill(os.getpid(), signal.SIGKILL)
    if len(patches) > settings.get("room", len(patches)):
        raise MemoryError
    if set(first) & set(settings.get("failing", ())):
        raise ConnectionResetError("the storage hiccups")
    ramp = torch.arange(1, patches[0].numel() + 1, dtype=torch.float32).reshape(patches.shape[1:])
    return patches * (ramp / ramp.max()) + ramp


CONFIG = {
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.scheduler.worker-ttl": "3s",
    "distributed.comm.timeouts.connect": "5s",
    "distributed.admin.log-format": "%(message)s",
}


def tell(report: str, text: str) -> None:
    """Write a file that is there whole or not at all."""
    Path(f"{report}.new").write_text(text)
    Path(f"{report}.new").rename(report)


async def run_scheduler(report: str, host: str = "127.0.0.1") -> None:
    async with distributed.Scheduler(host=host, port=0, dashboard=False) as scheduler:
        tell(report, scheduler.address)
        await scheduler.finished()


async def run_worker(address: str, threads: int, host: str = "127.0.0.1") -> None:
    async with distributed.Worker(address, nthreads=threads, host=host, dashboard=False) as worker:
        await worker.finished()


def run_client(report: str, address: str, arguments: dict[str, Any]) -> None:
    """A call of `predict`, with a client if there is an address. The volume `dask:PATH` is a dask array of a Zarr."""
    volume = arguments["volume"]
    if volume.startswith("dask:"):
        arguments = {
            **arguments,
            "volume": dask.array.from_array(zarr.open_array(volume.removeprefix("dask:"))),
            "axes": "yx",
        }
    try:
        if address:
            with distributed.Client(address, set_as_default=False) as client:
                oocpatch.predict(client=client, progress=False, **arguments)
        else:
            oocpatch.predict(progress=False, **arguments)
    except oocpatch.OocpatchError as error:
        tell(report, f"{type(error).__name__}: {error}")
    else:
        tell(report, "done")


def go_to(folder: str, host: int) -> None:
    """Work in another directory and, if there is one, on the host whose namespaces a process holds."""
    os.chdir(folder)
    for kind in ("uts", "net") if host else ():
        with Path(f"/proc/{host}/ns/{kind}").open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"cannot go to the {kind} namespace of {host}")


def perform(role: str, arguments: list[Any], place: tuple[str, int] | None) -> NoReturn:
    if place is not None:
        go_to(*place)
    dask.config.set(CONFIG)
    # A worker counts as lost after ten intervals: 1 s, not 5.
    distributed.scheduler.heartbeat_interval = lambda _: 0.1
    try:
        if role == "scheduler":
            asyncio.run(run_scheduler(*arguments))
        elif role == "worker":
            asyncio.run(run_worker(*arguments))
        else:
            run_client(*arguments)
    except BaseException:  # noqa: BLE001 - a forked child must not go back to where its parent was
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
