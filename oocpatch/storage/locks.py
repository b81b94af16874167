"""One run at a time per output: a lock file or object, put only if absent, with a heartbeat.

It spares people from two runs that do the same work; correctness never depends on it, since every task is idempotent.

`filelock.SoftFileLease` is no replacement for the local half: it watches the lock of another host for the whole lease
before it takes it over or refuses, 12 seconds instead of none; its file has no room for the part of a run that holds
it, by which parts know a whole run; and it takes a killed process for alive until it was waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import psutil

from oocpatch.errors import OutputBusy
from oocpatch.storage.storage_path import FileState, StoragePath

BEAT, STALE = 3.0, 12.0
"""Seconds between heartbeats, and after which a silent lock of another host is taken over."""

TURN = 0.1
"""Seconds between two looks at a lock that is waited for."""

Owner = dict[str, Any]


@contextlib.contextmanager
def locked(path: StoragePath, output: str, part: str = "") -> Iterator[None]:
    """Hold the lock at `path` for a run of `output`, or for one part of it.

    The lock of a dead process on this host is taken over at once, that of another host when it has been silent.

    Raises:
        OutputBusy: when another run holds it.
    """
    lock = _Lock(path, part)
    lock.acquire(output)
    _sweep(path)
    stopped = threading.Event()
    heartbeat = threading.Thread(target=lock.beat, args=(stopped,), name="oocpatch-heartbeat", daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        stopped.set()
        heartbeat.join()
        # A store that does not answer must not hide why the run ends: then the lock is one of a dead process.
        with contextlib.suppress(*[] if path.is_local else [ConnectionError]):
            if lock.is_ours(path.state()):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked_in_turn(path: StoragePath, output: str, part: str) -> Iterator[None]:
    """Hold the lock at `path` for a part of a run of `output`; other parts have it for a while, and are waited for.

    Raises:
        OutputBusy: when a whole run holds it.
    """
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(path, output, part))
                break
            except OutputBusy:
                owner, _ = _read(path)
                if owner and not owner.get("part"):
                    raise
                time.sleep(TURN)
        yield


def holder(path: StoragePath) -> str | None:
    """Describe the process that holds a lock at this moment; None: nobody does."""
    owner, modified = _read(path)
    if not owner or not _is_alive(owner, modified):
        return None
    part = f" for part {owner['part']}" if owner.get("part") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{part}"


def clear_dead(path: StoragePath) -> None:
    """Delete a lock that a dead process left, and what it left next to it."""
    if path.is_file() and holder(path) is None:
        path.unlink(missing_ok=True)
    _sweep(path)


def beside(output: StoragePath, suffix: str) -> StoragePath:
    """Return the path of what a run has beside its output: the workspace by default, and with a suffix the lock."""
    return output.with_name(f"{output.name}.oocpatch{suffix}")


def part_lock(output: StoragePath, part: tuple[int, int]) -> StoragePath:
    """Return the lock of one part of a run."""
    return beside(output, f".lock.part-{part[0]}-of-{part[1]}")


def locks(output: StoragePath) -> list[StoragePath]:
    """List the lock of an output, and those of parts of its run."""
    whole = beside(output, ".lock")
    start = f"{whole.name}.part-"
    parts = whole.list_siblings(start)
    return [whole, *(p for p in parts if p.name.removeprefix(start).replace("-of-", "").isdigit())]


class _Lock:
    """A lock that this process takes; a heartbeat touches the file, or puts the object anew, with another number."""

    def __init__(self, path: StoragePath, part: str) -> None:
        self._path = path
        self._beats = 0
        self._owner: Owner = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "part": part,
        }

    def acquire(self, output: str) -> None:
        """Put the lock where there is none, or in place of one that a dead process left."""
        for _ in range(100):
            if self._path.put_if_absent(self._content()):
                return
            state = self._path.state()  # before the owner is looked at: whoever takes over meanwhile changes the tag
            process = holder(self._path)
            if process is not None:
                raise OutputBusy(f"another run is at work on {output} ({process}); wait for it, or stop it first")
            if state is not None and self._path.put_if(self._content(), state.tag):
                return
        raise OutputBusy(f"{output} could not be locked: {self._path} keeps coming back")

    def is_ours(self, state: FileState | None) -> bool:
        """Return whether a lock is this one."""
        return state is not None and _parse(state.content).get("token") == self._owner["token"]

    def beat(self, stopped: threading.Event) -> None:
        """Show that the owner is alive, until it has stopped, and unless another one has the lock by now."""
        while not stopped.wait(BEAT):
            with contextlib.suppress(OSError):
                state = self._path.state()
                if state is not None and self.is_ours(state):
                    self._beats += 1
                    self._path.renew(self._content(), state.tag)

    def _content(self) -> bytes:
        return json.dumps({**self._owner, **({"beat": self._beats} if self._beats else {})}).encode()


def _sweep(path: StoragePath) -> None:
    """Delete what processes that died left next to a lock file."""
    if path.is_local:
        for left in path.list_siblings(f"{path.name}."):
            pid, dash, _ = left.name.removeprefix(f"{path.name}.").partition("-")
            if dash and pid.isdigit() and not psutil.pid_exists(int(pid)):
                left.unlink(missing_ok=True)


def _is_alive(owner: Owner, modified: float) -> bool:
    if owner.get("host") == socket.gethostname():
        try:
            process = psutil.Process(int(str(owner.get("pid"))))
            same = abs(process.create_time() - float(str(owner.get("started")))) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, ValueError):
            return False
        except psutil.AccessDenied:
            return True
    return time.time() - modified < STALE


def _read(path: StoragePath) -> tuple[Owner, float]:
    """Return the owner of a lock, and when it was written or touched last; nothing where there is none."""
    state = path.state()
    return ({}, 0.0) if state is None else (_parse(state.content), state.modified)


def _parse(content: bytes) -> Owner:
    try:
        owner = json.loads(content)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}
