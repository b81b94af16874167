"""Measuring one task in a process of its own: wall time, processor time, and the memory it adds."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
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


@contextmanager
def measured() -> Iterator[Usage]:
    """Measure the body of a `with` statement."""
    usage = Usage()
    gc.collect()
    watch = _HighWaterMark() if _HighWaterMark.available() else _Sampler()
    before = psutil.Process().memory_info().rss
    wall, cpu = time.perf_counter(), time.process_time()
    yield usage
    usage.wall, usage.cpu = time.perf_counter() - wall, time.process_time() - cpu
    usage.peak = max(0, watch.peak() - before)


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


def in_fresh_process(task: str, module: str = "benchmarks.tasks", **arguments: Any) -> dict[str, Any]:
    """Run a task in a new interpreter; what it returns.

    Args:
        task: name of the function.
        module: where it is.
        **arguments: what the function gets; must be JSON.
    """
    # What earlier tasks left to be written must not be paid for by the next.
    os.sync()
    command = [sys.executable, "-m", module, task, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{task} {arguments} ended with exit code {done.returncode}")
    # Libraries may talk on stdout, too.
    line = next(line for line in done.stdout.splitlines() if line.startswith(RESULT))
    record: dict[str, Any] = json.loads(line.removeprefix(RESULT))
    return record


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
