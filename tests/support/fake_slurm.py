"""Slurm's commands for a machine without Slurm: `sbatch` really starts the job script, `scancel` really kills it.

`install` puts them into a folder. What they did is in its `log`; a file `refuse` or `hold` there makes `sbatch` take no
jobs, or leave them in the queue.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

KILL_SECONDS = 5.0


class FakeSlurm:
    """The commands, and what became of their jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "jobs").mkdir()
        for name in ("sbatch", "squeue", "scancel"):
            file = folder / "bin" / name
            file.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {folder} {name} "$@"\n')
            file.chmod(0o755)

    @property
    def path(self) -> str:
        """PATH with the commands."""
        return f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def set(self, mode: str) -> None:
        (self.folder / mode).touch()

    def log(self, command: str) -> list[str]:
        """Ids of jobs that a command was called for, in order."""
        file = self.folder / "log"
        lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return [words[1] for words in lines if words[0] == command]

    def script(self, job: str) -> str:
        return (self.folder / f"{job}.sh").read_text()

    def running(self) -> list[int]:
        """Processes of all jobs that were started."""
        return [pid for file in self.folder.glob("*.pid") for pid in group(int(file.read_text()))]

    def start(self, job: str) -> None:
        """Start a job that waits in the queue."""
        subprocess.run([sys.executable, __file__, str(self.folder), "start", job], check=True)

    def kill(self, job: str) -> None:
        """End a job, as Slurm does when its time is up."""
        end(self.folder, job, signal.SIGKILL)


def group(leader: int) -> list[int]:
    """Processes of a process group that are alive."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def end(folder: Path, job: str, number: int) -> None:
    (folder / "jobs" / job).unlink(missing_ok=True)
    file = folder / f"{job}.pid"
    if not file.exists():  # it still waits
        return
    leader, deadline = int(file.read_text()), time.monotonic() + KILL_SECONDS
    while group(leader):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, number if time.monotonic() < deadline else signal.SIGKILL)
        time.sleep(0.02)


def start(folder: Path, job: str) -> None:
    with (folder / f"slurm-{job}.out").open("wb") as out:
        process = subprocess.Popen(
            ["/bin/bash", str(folder / f"{job}.sh")], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    (folder / f"{job}.pid").write_text(str(process.pid))


def sbatch(folder: Path, script: str) -> int:
    if (folder / "refuse").exists():
        sys.stderr.write("sbatch: error: Batch job submission failed: Invalid account\n")
        return 1
    if script == "--test-only":  # of a script from stdin
        return 0
    number = 100
    while True:
        try:
            (folder / "jobs" / str(number)).touch(exist_ok=False)
            (folder / f"{number}.sh").touch(exist_ok=False)
            break
        except FileExistsError:
            number += 1
    shutil.copy(script, folder / f"{number}.sh")  # whoever submits deletes the script at once
    if not (folder / "hold").exists():
        start(folder, str(number))
    print(f"Submitted batch job {number}")
    note(folder, f"sbatch {number}")
    return 0


def squeue(folder: Path) -> int:
    note(folder, "squeue all")
    for file in sorted((folder / "jobs").iterdir()):
        pid = folder / f"{file.name}.pid"
        if not pid.exists() or group(int(pid.read_text())):
            print(file.name)
    return 0


def scancel(folder: Path, job: str) -> int:
    end(folder, job, signal.SIGTERM)
    note(folder, f"scancel {job}")
    return 0


def note(folder: Path, text: str) -> None:
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(log, f"{text}\n".encode())
    os.close(log)


def main(folder: str, command: str, *arguments: str) -> int:
    if command == "squeue":
        return squeue(Path(folder))
    if command == "start":
        start(Path(folder), *arguments)
        return 0
    return {"sbatch": sbatch, "scancel": scancel}[command](Path(folder), arguments[-1])


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
