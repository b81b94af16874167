"""The process that dies: one `predict` in a forked child, killed from outside or at a chosen change of the disk.

Measurements, commands and the processes of a cluster are forked from the same one.

`serve` runs in a process of its own that has imported everything and done nothing, so that a child costs a fork and not
seconds of imports. `tests.support.children` is its other end.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import itertools
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import zarr

import oocpatch

if TYPE_CHECKING:
    import torch

DIED = 99
INTERRUPTED = 130


@dataclass(frozen=True)
class Job:
    """One call of `predict`, `label` or `objects`, and what shall happen to it. Travels as JSON."""

    volume: str
    output: str
    log: str
    """The model appends a line per call: process id, then the first voxel of each patch of the batch."""
    report: str
    """The child writes here how it ended: `Report` as JSON. Absent if it was killed."""
    options: dict[str, Any] = field(default_factory=dict)
    delay: float = 0.0
    """Seconds that each call of the model takes."""
    fail_on: tuple[float, ...] = ()
    """The model raises when a patch starts with one of these voxels."""
    watch: str = ""
    """Changes of the disk are counted below this prefix."""
    die_before: int | None = None
    """Die at once before this change of the disk, counted from 0; an `os.write` is torn: half of it gets through."""
    fault: str = "die"
    """What happens at that change instead, see `ChangeCounter`."""
    file_size_limit: int | None = None
    """Writing a longer file fails, as it does on a full disk."""
    verb: str = "predict"

    def __reduce__(self) -> str:
        """Stand for the process's job, whichever it is: the model is told by it, and stays the same."""
        return "JOB"


@dataclass(frozen=True)
class Report:
    """How a job ended."""

    error: str
    """Class of the exception, empty if none."""
    message: str
    changes: int
    """Changes of the disk below `watch`."""
    struck: bool = False
    """Whether the fault happened."""
    seconds: float = 0.0
    """How long the call took."""
    added: int = 0
    """Bytes that its peak of resident memory added."""


JOB = Job("", "", os.devnull, os.devnull)
"""What the model of this process does. Outside the model, so that all children have the same model."""


def scripted_model(patches: torch.Tensor) -> Any:
    """Depends on the position within the patch: a patch that ends up in the wrong place shows."""
    import torch  # noqa: PLC0415 - see tests.without_torch

    first = patches.reshape(len(patches), -1)[:, 0].tolist()
    log = os.open(JOB.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(log, json.dumps([os.getpid(), *first]).encode() + b"\n")
    os.close(log)
    time.sleep(JOB.delay)
    if set(first) & set(JOB.fail_on):
        raise RuntimeError(f"the model fails on the patch that starts with {first}")
    if JOB.options.get("overlap_mode") == "instances":
        return objects_of(patches)
    ramp = torch.arange(1, patches[0].numel() + 1, dtype=torch.float32).reshape(patches.shape[1:])
    scores = patches * (ramp / ramp.max()) + ramp
    if JOB.options.get("model_id") == "vectors":
        return {"prediction": scores, "vectors": scores.flatten(1)[:, ::3]}
    return scores


def objects_of(patches: torch.Tensor) -> torch.Tensor:
    """Objects of three voxels with a gap after each, numbered from 1 in every patch."""
    import torch  # noqa: PLC0415 - see tests.without_torch

    places = patches.to(torch.int64) - 1
    numbers = places // 4 - places.reshape(len(places), -1).amin(1).reshape(-1, *(1,) * (places.ndim - 1)) // 4 + 1
    return torch.where(places % 4 == 3, 0, numbers)


def make_volume(path: Path, shape: tuple[int, ...], chunks: tuple[int, ...]) -> None:
    """Voxel i (in C order) is `i + 1`: the first voxel of a patch tells its place, and 0 is the planner's probe."""
    data = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    zarr.create_array(path, data=data, chunks=chunks)


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.mkdir": 1,
    "os.truncate": 1,
}
"""Audit events that change the disk, and how many of their arguments are paths."""


class ChangeCounter:
    """Counts the changes that this process makes to files below a prefix, and dies before a chosen one.

    Python announces opening for writing, creating, renaming and removing as audit events, whoever does it: Zarr's
    store, the ledger, the lock. Only `os.write` is not announced. Between two changes nothing happens that a later
    process could see, so dying before each change is dying after each one, too.

    Other faults than `die`: `eio`: the change fails once, as on a bad disk; `enospc`: it and all later ones fail, as on
    a full disk; `slow`: it takes a quarter of a second; and what a disk does in silence: `tear`: half of the file gets
    its name; `flip`: a bit of it is another; `stale`: it has the bytes of the file that was there before, or none.
    """

    def __init__(self, prefix: str, die_before: int | None, fault: str = "die") -> None:
        self.prefix = prefix
        self.die_before = die_before
        self.fault = fault
        self.full = False
        self.struck = False
        self.numbers = itertools.count()
        self.changes = 0
        self.real_write = os.write

    def install(self) -> None:
        os.write = self._write
        sys.addaudithook(self._hook)

    def _count(self) -> bool:
        """Count a change; whether the process dies at it."""
        number = next(self.numbers)
        self.changes = number + 1
        return number == self.die_before or self.full

    def _strike(self, event: str, paths: tuple[Any, ...]) -> None:
        """Let the fault happen to a change that is about to be made."""
        self.struck = True
        if self.fault == "die":
            os._exit(DIED)
        elif self.fault == "eio":
            raise OSError(errno.EIO, "Input/output error (injected)")
        elif self.fault == "enospc":
            self.full = True
            # What frees room works on a full disk, too.
            if event not in ("os.remove", "os.rmdir", "os.truncate"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif self.fault == "slow":
            time.sleep(0.25)
        elif event == "os.rename" and Path(paths[0]).is_file():
            self._spoil(Path(paths[0]), Path(paths[1]))

    def _spoil(self, file: Path, target: Path) -> None:
        """Change a file that is about to get its name."""
        data = bytearray(file.read_bytes())
        if self.fault == "tear":
            data = data[: len(data) // 2]
        elif self.fault == "flip" and data:
            data[len(data) // 2] ^= 4
        elif self.fault == "stale":
            data = bytearray(target.read_bytes()) if target.is_file() else bytearray()
        self.die_before = None  # what follows is not counted
        file.write_bytes(data)

    def _inside(self, path: object, directory: object = -1) -> bool:
        if isinstance(path, int):
            return self._inside(str(Path(f"/proc/self/fd/{path}").readlink()))
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        name = os.fsdecode(path)
        if isinstance(directory, int) and directory >= 0 and not name.startswith("/"):
            name = str(Path(f"/proc/self/fd/{directory}").readlink() / name)
        return name.startswith(self.prefix)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & WRITING if isinstance(flags, int) else mode and set(mode) & set("wax+")
            changes = bool(writes) and not isinstance(path, int) and self._inside(path)
        elif event in CHANGES:
            paths, directory = arguments[: CHANGES[event]], arguments[-1] if CHANGES[event] == 1 else -1
            changes = any(self._inside(path, directory) for path in paths)
            # Making a directory that exists changes nothing, and stores do it for every chunk.
            changes = changes and not (event == "os.mkdir" and Path(os.fsdecode(paths[0])).is_dir())
        else:
            return
        if changes and self._count():
            self._strike(event, arguments)

    def _write(self, descriptor: int, data: Any) -> int:
        if self._inside(descriptor) and self._count():
            if self.fault in ("die", "enospc", "tear", "stale", "flip"):
                self.real_write(descriptor, bytes(data)[: len(bytes(data)) // 2])
            if self.fault in ("tear", "stale", "flip"):
                self.struck = True
                return len(data)  # and says that it is all there
            self._strike("os.write", ())
        return self.real_write(descriptor, data)


def perform(job: Job) -> NoReturn:
    """Do the job in this process and leave it with 0, 1 for an error, or `INTERRUPTED`."""
    global JOB  # noqa: PLW0603 - one job per process
    JOB = job
    counter = ChangeCounter(job.watch or "\0", job.die_before, job.fault)
    counter.install()
    if job.file_size_limit is not None:
        # The signal would kill; ignored, the write fails with an error as it does on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_size_limit, resource.RLIM_INFINITY))
    code, error, message, trace = 0, "", "", ""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        # JSON knows no tuples.
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in job.options.items()}
        if job.verb != "predict":
            getattr(oocpatch, job.verb)(job.volume, job.output, progress=False, **options)
        else:
            oocpatch.predict(job.volume, scripted_model, job.output, progress=False, **options)
    except KeyboardInterrupt:
        code, error = INTERRUPTED, "KeyboardInterrupt"
    except Exception as problem:  # noqa: BLE001 - the parent judges which errors are right
        code, error, message, trace = 1, type(problem).__name__, str(problem), traceback.format_exc()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sys.stderr.write(trace)
    seconds, added = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    end = Report(error, message, counter.changes, counter.struck, seconds, added * 1024)
    Path(job.report).write_text(json.dumps(vars(end)))
    sys.stderr.flush()
    os._exit(code)


def import_what_a_run_imports() -> None:
    """Import what a run imports on the way: a child runs and says what, since running here would leave threads."""
    receiver, sender = os.pipe()
    if not os.fork():
        with tempfile.TemporaryDirectory() as root:
            settings = {"patch_size": 8, "output_chunks": 4, "progress": False, "output_format": "ome-zarr"}
            oocpatch.predict(np.zeros((8, 8), np.float32), scripted_model, f"{root}/out", **settings)
            oocpatch.label(np.eye(8, dtype=bool), f"{root}/labels", block_shape=4, progress=False)
            oocpatch.objects(np.eye(8, dtype=bool), f"{root}/table.csv", progress=False)
        with os.fdopen(sender, "w") as pipe:
            json.dump(list(sys.modules), pipe)
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as pipe:
        names = json.load(pipe)
    os.wait()
    for name in names:
        # A forked process does without zarrs if its parent has loaded it; children shall load and use it.
        if name.partition(".")[0] == "zarrs":
            continue
        # Some names in there are not modules that can be imported by name, such as those of lazy namespaces.
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def call(module: str, arguments: list[Any], folder: str, outputs: list[str]) -> NoReturn:
    """Leave this process with what `module.main(*arguments)` ends with; two files, or one, take what it prints."""
    os.chdir(folder)
    for descriptor, path in zip((1, 2), outputs, strict=True):
        redirect(path, descriptor)
    code: Any = 1
    try:
        importlib.import_module(module).main(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 - a forked child must not go back to where its parent was
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def serve() -> None:
    """Say `ready`, then answer each line of stdin, a verb and its arguments as JSON.

    `start`, `call` and `role` begin a child and are answered with its pid; the first argument is its environment for
    object stores. `wait` is answered with the exit code of a child, or `running` when it has not ended in time.
    """
    import_what_a_run_imports()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        answer = reap(*arguments) if verb == "wait" else str(fork(verb, *arguments))
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def fork(verb: str, environment: dict[str, str], *arguments: Any) -> int:
    """Process id of a new child that does a job, calls a function, or plays a role in a cluster."""
    role = importlib.import_module("tests.support.cluster_child").perform if verb == "role" else None
    pid = os.fork()
    if pid:
        return pid
    os.close(0)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(environment)
    if verb == "start":
        job = Job(**arguments[0])
        redirect(job.report + ".stderr", 1, 2, fresh=True)
        perform(job)
    elif role is not None:
        redirect(arguments[0], 1, 2)
        role(*arguments[1:])
    call(*arguments)


def redirect(path: str, *descriptors: int, fresh: bool = False) -> None:
    """Let descriptors of this process write to a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if fresh else os.O_APPEND))
    for descriptor in descriptors:
        os.dup2(file, descriptor)


def reap(pid: int, seconds: float) -> str:
    """Exit code of a child (minus the signal if it was killed), or `running` when it has not ended in time."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return str(os.waitstatus_to_exitcode(status))
        if time.monotonic() > deadline:
            return "running"
        time.sleep(0.002)
