"""Where a figure was measured: the machine, and the versions of what took part."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import ROOT, answer

PEERS = ("dask", "monai", "torchio", "patchly")
LIBRARIES = (
    "oocpatch", "zarr", "zarrs", "numcodecs", "tensorstore", "numpy", "torch", *PEERS,
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system and Python."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    """What the processor calls itself; several generations may share that name, so its numbers as well."""
    found: dict[str, str] = {}
    if (file := Path("/proc/cpuinfo")).exists():
        for line in file.read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    if "model name" not in found:
        return platform.processor() or platform.machine()
    return f"{found['model name']} (family {found.get('cpu family')}, model {found.get('model')})"


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, Any]:
    """Version of each of some libraries that this environment has."""
    found = {}
    for library in libraries:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that this checkout is at, `+` if files were changed since; empty outside of one."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    answer(versions)
