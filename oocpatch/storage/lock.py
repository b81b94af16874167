"""One run at a time per output: a lock file, put only if absent, with a heartbeat.

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
from collections.abc import Iterator
from pathlib import Path

import psutil

from oocpatch.errors import OutputBusy

BEAT, STALE = 3.0, 12.0
"""Seconds between heartbeats, and after which a silent lock of another host is taken over."""

TURN = 0.1
"""Seconds between two looks at a lock that is waited for."""


@contextlib.contextmanager
def locked(path: Path, output: str, part: str = "") -> Iterator[None]:
    """Hold the lock at `path` for a run of `output`, or for one part of it.

    The lock of a dead process on this host is taken over at once, that of another host when it has been silent.

    Raises:
        OutputBusy: when another run holds it.
    """
    token = _acquire(path, output, part)
    _sweep(path)
    stopped = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, stopped), name="oocpatch-heartbeat", daemon=True)
    beat.start()
    try:
        yield
    finally:
        stopped.set()
        beat.join()
        if _read(path).get("token") == token:
            path.unlink(missing_ok=True)


def holder(path: Path) -> str | None:
    """Who runs the output at this moment, in words; None: nobody."""
    found = _read(path)
    if not found or not _alive(path, found):
        return None
    told = f" for part {found['part']}" if found.get("part") else ""
    return f"process {found.get('pid')} on {found.get('host')}{told}"


def clear_dead(path: Path) -> None:
    """Delete a lock that a dead process left, and what it left next to it."""
    if path.exists() and holder(path) is None:
        path.unlink(missing_ok=True)
    _sweep(path)


@contextlib.contextmanager
def locked_in_turn(path: Path, output: str, part: str) -> Iterator[None]:
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
                found = _read(path)
                if found and not found.get("part"):
                    raise
                time.sleep(TURN)
        yield


def _acquire(path: Path, output: str, part: str) -> str:
    token = uuid.uuid4().hex
    me = {
        "token": token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "part": part,
    }
    # Written aside and linked: the lock appears whole or not at all.
    aside = _beside(path, token)
    aside.write_text(json.dumps(me))
    try:
        for _ in range(100):
            try:
                os.link(aside, path)
            except FileExistsError:
                _clear_stale(path, output)
            else:
                return token
    finally:
        aside.unlink(missing_ok=True)
    raise OutputBusy(f"{output} could not be locked: {path} keeps coming back")


def _clear_stale(path: Path, output: str) -> None:
    who = holder(path)
    if who is not None:
        raise OutputBusy(f"another run is at work on {output} ({who}); wait for it, or stop it first")
    # Renaming is atomic: of two runs that find a stale lock one gets it, and the other sees a lock that is alive.
    away = _beside(path, uuid.uuid4().hex)
    with contextlib.suppress(FileNotFoundError):
        path.rename(away)
        away.unlink()


def _beside(path: Path, token: str) -> Path:
    """A file of this process next to the lock, that anyone can tell is rubbish when the process is dead."""
    return path.with_name(f"{path.name}.{os.getpid()}-{token}")


def _sweep(path: Path) -> None:
    """Delete what processes that died left next to the lock."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*-*"):
        pid = left.name.removeprefix(f"{path.name}.").split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            left.unlink(missing_ok=True)


def _alive(path: Path, found: dict[str, object]) -> bool:
    if found.get("host") == socket.gethostname():
        try:
            process = psutil.Process(int(str(found.get("pid"))))
            same = abs(process.create_time() - float(str(found.get("started")))) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, ValueError):
            return False
        except psutil.AccessDenied:
            return True
    try:
        return time.time() - path.stat().st_mtime < STALE
    except FileNotFoundError:
        return False


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _beat(path: Path, stopped: threading.Event) -> None:
    while not stopped.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)
