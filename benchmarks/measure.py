"""Measuring one task in a process of its own: wall time, processor time, and the memory it adds."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
RESULT = "result: "
"""What the line of a task's result begins with."""


@dataclass
class Usage:
    """What a stretch of code used. Filled in when the stretch ends."""

    wall: float = 0.0
    """Seconds."""
    cpu: float = 0.0
    """Seconds of all threads, user and system."""
    peak: int = 0
    """Resident memory at its peak above that at the start, in bytes."""
    read: int | None = None
    """Bytes that were asked of the system, whether its cache or the disk had them; None where nobody counts."""
    written: int | None = None
    """Bytes that were handed to the system."""


class TaskFailed(Exception):
    """A task ended without a result; the message is the last line that it said."""


@contextmanager
def measured() -> Iterator[Usage]:
    """Measure the body of a `with` statement."""
    usage = Usage()
    gc.collect()
    watch = _HighWaterMark() if _HighWaterMark.available() else _Sampler()
    before, moved = psutil.Process().memory_info().rss, _bytes_moved()
    wall, cpu = time.perf_counter(), time.process_time()
    yield usage
    usage.wall, usage.cpu = time.perf_counter() - wall, time.process_time() - cpu
    usage.peak = max(0, watch.peak() - before)
    if moved is not None and (now := _bytes_moved()) is not None:
        usage.read, usage.written = now[0] - moved[0], now[1] - moved[1]


def _bytes_moved() -> tuple[int, int] | None:
    """What this process has read and written so far, by the system's own counters, which not every system has."""
    counters = psutil.Process().io_counters() if hasattr(psutil.Process, "io_counters") else None
    return (counters.read_chars, counters.write_chars) if hasattr(counters, "read_chars") else None


class _HighWaterMark:
    """The kernel's own record of the peak, which misses nothing."""

    RESET = Path("/proc/self/clear_refs")
    STATUS = Path("/proc/self/status")

    def __init__(self) -> None:
        self.RESET.write_text("5")

    @classmethod
    def available(cls) -> bool:
        try:
            cls()
        except OSError:
            return False
        return "VmHWM" in cls.STATUS.read_text()

    def peak(self) -> int:
        line = next(line for line in self.STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


class _Sampler:
    """Resident memory every 5 ms, where the kernel keeps no resettable record."""

    def __init__(self) -> None:
        self._highest = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.005):
            self._highest = max(self._highest, process.memory_info().rss)

    def peak(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._highest


def run_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a verb's options say about a run."""
    names = ("patch_size", "patch_overlap", "overlap_mode", "max_memory", "workers")
    return {name: getattr(arguments, name) for name in names if name in arguments}


def in_fresh_process(
    task: str,
    module: str,
    *,
    python: str | Path = sys.executable,
    timeout: float | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Run a task in a new interpreter; what it returns.

    Args:
        task: name of the function.
        module: where it is.
        python: the interpreter, which may be another environment's.
        timeout: seconds after which the task is ended.
        **arguments: what the function gets; must be JSON.

    Raises:
        TaskFailed: the task ended with an error, was killed, or took too long.
    """
    # What earlier tasks left to be written must not be paid for by the next.
    os.sync()
    everyone = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}  # as oocpatch sets it for itself: torch asks for huge pages
    command = [str(python), "-m", module, task, json.dumps(arguments)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout, env=everyone
        )
    except subprocess.TimeoutExpired as error:
        raise TaskFailed(f"took more than {timeout:.0f} s") from error
    # Libraries may talk on stdout, too.
    line = next((line for line in done.stdout.splitlines() if line.startswith(RESULT)), None)
    if done.returncode or line is None:
        said = done.stderr.strip().splitlines()
        killed = f"was killed by signal {-done.returncode}" if done.returncode < 0 else ""
        raise TaskFailed(killed or (said[-1] if said else f"ended with exit code {done.returncode}"))
    record: dict[str, Any] = json.loads(line.removeprefix(RESULT))
    return record


def answer(*tasks: Callable[..., dict[str, Any]]) -> None:
    """The other end of `in_fresh_process`: run the task that the command line names, and print what it returns."""
    task = {task.__name__: task for task in tasks}[sys.argv[1]]
    tell(task(**json.loads(sys.argv[2])))


def tell(record: dict[str, Any]) -> None:
    """Print a task's result, in time even if the process ends at once."""
    print(RESULT + json.dumps(record), flush=True)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they need to be, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def bytes_of(text: str) -> int:
    """Bytes of a size such as `256MiB`."""
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    return int(float(text[:-3]) * units[text[-3:]]) if text[-3:] in units else int(text)
