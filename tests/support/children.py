"""Starting, killing and questioning child processes from a test; the other end is `tests.support.crash_child`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.crash_child import Job, Report

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0
"""Seconds after which a child counts as hanging."""


class Children:
    """A process that has imported everything and forks children, as it is told line by line."""

    def __init__(self) -> None:
        # Without `python -O`, under which zarr 3.1.6 opens no group within a group: an assert of its own has an effect.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONOPTIMIZE"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", "from tests.support import crash_child; crash_child.serve()"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        )
        self._alive: set[int] = set()
        assert self._server.stdout is not None
        answer = self._server.stdout.readline().strip()  # not within an assert, which python -O leaves out
        assert answer == "ready"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in list(self._alive):
            self.kill(pid)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(PATIENCE)
        self._server.stdout.close()

    def _ask(self, *question: Any) -> str:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(question, default=str) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline().strip()
        assert answer, "the process that forks the children has died"
        return answer

    def fork(self, verb: str, *arguments: Any) -> int:
        """Process id of a child; the variables that lead to an object store are those of this process now."""
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        pid = int(self._ask(verb, environment, *arguments))
        self._alive.add(pid)
        return pid

    def start(self, job: Job) -> int:
        """Process id of a child that does `job`."""
        Path(job.report).unlink(missing_ok=True)
        return self.fork("start", dataclasses.asdict(job))

    def call(self, module: str, *arguments: Any, folder: Path = ROOT, merged: bool = False) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of `module.main(*arguments)` in a child; all in stdout if they are merged."""
        with tempfile.TemporaryDirectory() as aside:
            outputs = [Path(aside, name) for name in ("stdout", "stdout" if merged else "stderr")]
            code = self.wait(self.fork("call", module, arguments, folder, outputs), 500)
            stdout, stderr = (path.read_text() for path in outputs)
        return code, stdout, "" if merged else stderr

    def measure(self, module: str, *arguments: Any) -> dict[str, Any]:
        """The JSON that `module.main(*arguments)` prints in a child: no memory that was freed before is used again."""
        code, stdout, stderr = self.call(module, *arguments)
        assert code == 0, stderr
        answer: dict[str, Any] = json.loads(stdout)
        return answer

    def poll(self, pid: int, seconds: float = 0.0) -> int | None:
        """Exit code of a child, minus the signal if it was killed; None if it still runs after `seconds`."""
        answer = self._ask("wait", pid, seconds)
        if answer == "running":
            return None
        self._alive.discard(pid)
        return int(answer)

    def wait(self, pid: int, seconds: float = PATIENCE) -> int:
        """Exit code of a child that is about to end."""
        code = self.poll(pid, seconds)
        if code is None:
            self.kill(pid)
            raise AssertionError(f"a child still ran after {seconds:.0f} s and was killed")
        return code

    def kill(self, pid: int, number: int = signal.SIGKILL) -> int:
        """Send a signal and wait for the end. A child that has ended already is still there to be waited for."""
        os.kill(pid, number)
        return self.wait(pid)

    def run(self, job: Job) -> int:
        """Exit code of a child that does `job`, undisturbed."""
        return self.wait(self.start(job))


def report(job: Job) -> Report:
    """How the last child with this job ended."""
    return Report(**json.loads(Path(job.report).read_text()))


def calls(job: Job) -> list[tuple[int, tuple[float, ...]]]:
    """The model's calls in order: process id and first voxel of each patch."""
    path = Path(job.log)
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(values[0]), tuple(values[1:])) for values in map(json.loads, lines)]


def file_digests(root: Path) -> dict[str, str]:
    """Digest of every file below `root`: metadata, chunks, and anything that should not be there."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextlib.contextmanager
def unchanged(root: Path) -> Iterator[None]:
    """No file below `root` is added, removed or changed inside the `with` block."""
    before = file_digests(root)
    yield
    assert file_digests(root) == before
