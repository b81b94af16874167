"""What all tests share: Hypothesis profiles, runs to stop, commands, the markers of tests that run on demand."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is loaded: its threads would spin while they wait for work, and take the cores from other tests. With
# three workers on two cores that was half of the CPU time of a test that trains a network; values stay the same.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.support")  # their asserts hold under `python -O`, too

from oocpatch.cli.main import main  # noqa: E402 - rewritten
from tests.support.children import Children  # noqa: E402 - rewritten
from tests.support.crash_child import Job, make_volume  # noqa: E402 - rewritten
from tests.support.small_run import TINY, job_in, small_run  # noqa: E402 - rewritten

# Directories that tests make by themselves lie where pytest's do.
tempfile.tempdir = os.environ.get("PYTEST_DEBUG_TEMPROOT") or None

# A shell starts background jobs with Ctrl-C ignored. Children inherit that, and tests interrupt their children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same commit gives the same verdict, on any machine and however busy it is: no deadline, no random seed.
# `--hypothesis-profile=explore` looks for new counterexamples instead.
_QUIET = [HealthCheck.too_slow]
settings.register_profile("promise", deadline=None, derandomize=True, print_blob=True, suppress_health_check=_QUIET)
settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=_QUIET)
settings.load_profile("promise")


ON_DEMAND = {
    "real_data": (
        os.environ.get("OOCPATCH_REAL_DATA") == "1",
        "downloads published data; set OOCPATCH_REAL_DATA=1 to run it",
    ),
    "compiler": (
        os.environ.get("OOCPATCH_COMPILER") == "1",
        "compiles with torch's own compiler, for a minute; set OOCPATCH_COMPILER=1 to run it",
    ),
    "readers": (
        bool(os.environ.get("OOCPATCH_READERS")),
        "runs other programs; set OOCPATCH_READERS to the Python of an environment that has them",
    ),
}
"""By marker: whether it was asked for, and what to say if not."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what downloads, or needs other programs, unless it was asked for."""
    for item in items:
        for marker, (asked, reason) in ON_DEMAND.items():
            if item.get_closest_marker(marker) and not asked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def children() -> Iterator[Children]:
    """Processes to run jobs in, and to kill."""
    with Children() as running:
        yield running


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """The run over two axes, with nothing done yet."""
    return small_run(tmp_path)


@pytest.fixture
def tiny(tmp_path: Path) -> Job:
    """Two blocks on one axis with a seam between them: every kind of write, as few as possible."""
    make_volume(tmp_path / "volume.zarr", (16,), (8,))
    return job_in(tmp_path, **TINY)


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Exit code, stdout and stderr of `oocpatch` with these arguments."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["oocpatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capfd.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run
