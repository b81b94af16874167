"""One run at a time per output: a lock file or object, put only if absent, with a heartbeat.

It spares people from two runs that do the same work; correctness never depends on it, since every task is idempotent.

`filelock.SoftFileLease` is no replacement for the local half. It tells the lock of another host that is alive from one
that is silent only after it has watched it for the whole lease, so a second call would be refused, a silent lock taken
over, and `status` answered, after 12 seconds instead of at once. Its file has no room for the part of a run that holds
it, by which parts that take turns know a whole run. And it takes a killed process for alive until it was waited for.
"""

from __future__ import annotations

import contextlib
import glob
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
from oocpatch.storage.paths import LocalPath, ObjectPath, StoragePath

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
    lock: _FileLock | _ObjectLock = (
        _ObjectLock(path) if isinstance(path, ObjectPath) else _FileLock(LocalPath(str(path)))
    )
    token = _acquire(lock, output, part)
    _sweep(path)
    stopped = threading.Event()
    heartbeat = threading.Thread(target=_beat, args=(lock, stopped), name="oocpatch-heartbeat", daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        stopped.set()
        heartbeat.join()
        # A store that does not answer must not hide why the run ends: then the lock is one of a dead process.
        with contextlib.suppress(*[] if path.is_local else [ConnectionError]):
            if _read(path)[0].get("token") == token:
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


class _FileLock:
    """A lock that is a file; a heartbeat touches it."""

    def __init__(self, path: LocalPath) -> None:
        self.path = path

    def put(self, owner: Owner) -> bool:
        """Put the lock where none is; return whether that was so."""
        return self.path.put_if_absent(json.dumps(owner).encode())

    def take_over(self, owner: Owner, before: str) -> bool:  # noqa: ARG002 - as of an object
        """Make room where a dead process left its lock; the owner does not have it yet."""
        # Renaming is atomic: of two runs that find a stale lock one gets it, and the other sees a lock that is alive.
        away = self.path.with_name(f"{self.path.name}.{os.getpid()}-{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(away)
            away.unlink()
        return False

    def beat(self) -> None:
        """Show that the owner is alive."""
        os.utime(self.path)


class _ObjectLock:
    """A lock that is an object; a heartbeat puts it anew, with a number, so that its tag is another one."""

    def __init__(self, path: ObjectPath) -> None:
        self.path = path
        self._owner: Owner = {}
        self._beats = 0

    def put(self, owner: Owner) -> bool:
        """Put the lock where none is; return whether that was so."""
        self._owner = owner
        return self._put(None)

    def take_over(self, owner: Owner, before: str) -> bool:
        """Put the lock in place of one that still has this tag; return whether that was so."""
        self._owner = owner
        return bool(before) and self._put(before)

    def beat(self) -> None:
        """Show that the owner is alive, unless another one has the lock by now."""
        state = self.path.state()
        if state is not None and _parse(state.content).get("token") == self._owner.get("token"):
            self._beats += 1
            self._put(state.tag)

    def _put(self, tag: str | None) -> bool:
        return self.path.put_if(json.dumps({**self._owner, "beat": self._beats}).encode(), tag)


def _acquire(lock: _FileLock | _ObjectLock, output: str, part: str) -> str:
    token = uuid.uuid4().hex
    owner = {
        "token": token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "part": part,
    }
    for _ in range(100):
        if lock.put(owner):
            return token
        state = lock.path.state()  # before the owner is looked at: whoever takes over meanwhile changes the tag
        who = holder(lock.path)
        if who is not None:
            raise OutputBusy(f"another run is at work on {output} ({who}); wait for it, or stop it first")
        if lock.take_over(owner, state.tag if state else ""):
            return token
    raise OutputBusy(f"{output} could not be locked: {lock.path} keeps coming back")


def _beat(lock: _FileLock | _ObjectLock, stopped: threading.Event) -> None:
    while not stopped.wait(BEAT):
        with contextlib.suppress(OSError):
            lock.beat()


def _sweep(path: StoragePath) -> None:
    """Delete what processes that died left next to a lock file."""
    if isinstance(path, LocalPath):
        for left in path.parent.glob(f"{glob.escape(path.name)}.*-*"):
            pid = left.name.removeprefix(f"{path.name}.").split("-")[0]
            if pid.isdigit() and not psutil.pid_exists(int(pid)):
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
