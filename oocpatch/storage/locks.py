"""One run at a time per output: a lock file or object, put only if absent, with a heartbeat.

It spares people from two runs that do the same work; correctness never depends on it, since every task is idempotent.
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
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from oocpatch.errors import OutputBusy
from oocpatch.storage.paths import Address, ObjectPath

BEAT, STALE = 3.0, 12.0
"""Seconds between heartbeats, and after which a silent lock of another host is taken over."""

TURN = 0.1
"""Seconds between two looks at a lock that is waited for."""


@contextlib.contextmanager
def locked(path: Address, output: str, part: str = "") -> Iterator[None]:
    """Hold the lock at `path` for a run of `output`, or for one part of it.

    The lock of a dead process on this host is taken over at once, that of another host when it has been silent.

    Raises:
        OutputBusy: when another run holds it.
    """
    lock: _File | _Object = _Object(path) if isinstance(path, ObjectPath) else _File(path)
    token = _acquire(lock, output, part)
    if isinstance(path, Path):
        _sweep(path)
    stopped = threading.Event()
    beat = threading.Thread(target=_beat, args=(lock, stopped), name="oocpatch-heartbeat", daemon=True)
    beat.start()
    try:
        yield
    finally:
        stopped.set()
        beat.join()
        # A store that does not answer must not hide why the run ends: then the lock is one of a dead process.
        with contextlib.suppress(*[ConnectionError] if isinstance(path, ObjectPath) else []):
            if _read(path)[0].get("token") == token:
                path.unlink(missing_ok=True)


def holder(path: Address) -> str | None:
    """Who runs the output at this moment, in words; None: nobody."""
    found, at = _read(path)
    if not found or not _alive(found, at):
        return None
    told = f" for part {found['part']}" if found.get("part") else ""
    return f"process {found.get('pid')} on {found.get('host')}{told}"


def clear_dead(path: Address) -> None:
    """Delete a lock that a dead process left, and what it left next to it."""
    if path.is_file() and holder(path) is None:
        path.unlink(missing_ok=True)
    if isinstance(path, Path):
        _sweep(path)


@contextlib.contextmanager
def locked_in_turn(path: Address, output: str, part: str) -> Iterator[None]:
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
                found, _ = _read(path)
                if found and not found.get("part"):
                    raise
                time.sleep(TURN)
        yield


def _acquire(lock: _File | _Object, output: str, part: str) -> str:
    token = uuid.uuid4().hex
    me = {
        "token": token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "part": part,
    }
    for _ in range(100):
        if lock.put(me):
            return token
        before = lock.seen()
        who = holder(lock.path)
        if who is not None:
            raise OutputBusy(f"another run is at work on {output} ({who}); wait for it, or stop it first")
        if lock.take_over(me, before):
            return token
    raise OutputBusy(f"{output} could not be locked: {lock.path} keeps coming back")


class _File:
    """A lock that is a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, me: dict[str, object]) -> bool:
        """Put the lock where none is; whether that was so."""
        # Written aside and linked: the lock appears whole or not at all.
        aside = _beside(self.path, str(me["token"]))
        aside.write_text(json.dumps(me))
        try:
            os.link(aside, self.path)
        except FileExistsError:
            return False
        finally:
            aside.unlink(missing_ok=True)
        return True

    def seen(self) -> None:
        """Nothing: of two that find a stale lock, the name decides."""

    def take_over(self, me: dict[str, object], before: str | None) -> bool:  # noqa: ARG002 - as of an object
        """Make room where a dead process left its lock; whether `me` has it now."""
        # Renaming is atomic: of two runs that find a stale lock one gets it, and the other sees a lock that is alive.
        away = _beside(self.path, uuid.uuid4().hex)
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(away)
            away.unlink()
        return False

    def beat(self) -> None:
        """Show that the holder is alive."""
        os.utime(self.path)


class _Object:
    """A lock that is an object. A heartbeat puts it anew, with a number, so that its tag is another one."""

    def __init__(self, path: ObjectPath) -> None:
        self.path = path
        self._me: dict[str, object] = {}
        self._beats = 0

    def put(self, me: dict[str, object]) -> bool:
        """Put the lock where none is; whether that was so."""
        self._me = me
        return self._put(None)

    def seen(self) -> str | None:
        """The tag of the lock that is there."""
        found = self.path.state()
        return None if found is None else found[1]

    def take_over(self, me: dict[str, object], before: str | None) -> bool:
        """Put the lock in place of one that has this tag still; whether that was so."""
        self._me = me
        return before is not None and self._put(before)

    def beat(self) -> None:
        """Show that the holder is alive, unless another one has the lock by now."""
        found = self.path.state()
        if found is not None and _parse(found[0]).get("token") == self._me.get("token"):
            self._beats += 1
            self._put(found[1])

    def _put(self, tag: str | None) -> bool:
        return self.path.put_if(json.dumps({**self._me, "beat": self._beats}).encode(), tag)


def _beside(path: Path, token: str) -> Path:
    """A file of this process next to the lock, that anyone can tell is rubbish when the process is dead."""
    return path.with_name(f"{path.name}.{os.getpid()}-{token}")


def _sweep(path: Path) -> None:
    """Delete what processes that died left next to the lock."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*-*"):
        pid = left.name.removeprefix(f"{path.name}.").split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            left.unlink(missing_ok=True)


def _alive(found: dict[str, object], at: float) -> bool:
    if found.get("host") == socket.gethostname():
        try:
            process = psutil.Process(int(str(found.get("pid"))))
            same = abs(process.create_time() - float(str(found.get("started")))) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, ValueError):
            return False
        except psutil.AccessDenied:
            return True
    return time.time() - at < STALE


def _read(path: Address) -> tuple[dict[str, object], float]:
    """What a lock says, and when it was written or touched last; nothing where there is none."""
    if isinstance(path, ObjectPath):
        state = path.state()
        return ({}, 0.0) if state is None else (_parse(state[0]), state[2])
    try:
        return _parse(path.read_bytes()), path.stat().st_mtime
    except FileNotFoundError:
        return {}, 0.0


def _parse(content: bytes) -> dict[str, object]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _beat(lock: _File | _Object, stopped: threading.Event) -> None:
    while not stopped.wait(BEAT):
        with contextlib.suppress(OSError):
            lock.beat()


def beside(output: Address, suffix: str) -> Address:
    """What a run keeps beside its output: the workspace unless told, and with a suffix the lock."""
    return output.with_name(f"{output.name}.oocpatch{suffix}")


def part_lock(output: Address, part: tuple[int, int]) -> Address:
    """The lock of one part of a run."""
    return beside(output, f".lock.part-{part[0]}-of-{part[1]}")


def locks(output: Address) -> list[Address]:
    """The lock of an output, and those of parts of its run."""
    whole = beside(output, ".lock")
    start = f"{whole.name}.part-"
    found: Iterable[Address] = (
        whole.parent.glob(f"{glob.escape(start)}*") if isinstance(whole, Path) else whole.siblings(start)
    )
    parts = (path for path in found if path.name.removeprefix(start).replace("-of-", "").isdigit())
    return [whole, *sorted(parts, key=str)]
