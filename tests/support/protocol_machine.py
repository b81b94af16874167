"""Anything, in any order: crashes, faults, damage, duplicate execution. However it goes, it ends in the right bytes.

After each call that succeeds, `verify` and the bytes agree: right, or found out. At the end the same call, repair and,
at worst, starting afresh lead to the bytes of a run that nothing disturbed.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import oocpatch
from tests.support.children import Children, file_digests, report
from tests.support.crash_child import DIED, Job, make_volume
from tests.support.faults import HONEST
from tests.support.small_run import LAST_TINY_PATCH, TINY, fresh, job_in

CHANGES = 140
"""About as many changes of the disk does the small run make."""
DAMAGES = ("flip", "truncate", "empty", "delete", "zero", "swap", "stale", "copy")


class Protocol(RuleBasedStateMachine):
    """The life of one output. `children` is set by whoever runs it."""

    children: Children
    tally: dict[str, int]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="oocpatch-protocol-"))
        make_volume(self.folder / "volume.zarr", (16,), (8,))
        self.job: Job = job_in(self.folder, **TINY)
        self.older: dict[Path, bytes] = {}

    @initialize(mode=st.sampled_from(["hann", "crop"]))
    def begin(self, mode: str) -> None:
        options = {**TINY, "overlap_mode": mode}
        self.job = Job(**{**vars(self.job), "options": options})
        assert self.run() == 0, report(self.job).message
        self.expected = self.prediction()
        self.remember()
        fresh(self.job)

    def run(self, **changes: Any) -> int:
        return self.children.run(Job(**{**vars(self.job), **changes}))

    def prediction(self) -> dict[str, str]:
        found = file_digests(Path(self.job.output) / "prediction")
        return {name: digest for name, digest in found.items() if not name.endswith(".partial")}

    def files(self) -> list[Path]:
        return sorted(path for path in Path(self.job.watch).rglob("*") if path.is_file())

    def remember(self) -> None:
        """Keep the bytes of files, for stale ones to come back."""
        self.older |= {path: path.read_bytes() for path in self.files()}

    def count(self, what: str) -> None:
        self.tally[what] = self.tally.get(what, 0) + 1

    @rule(number=st.integers(0, CHANGES), fault=st.sampled_from(["die", "eio", "enospc", "tear", "flip", "stale"]))
    def call_with_fault(self, number: int, fault: str) -> None:
        code = self.run(die_before=number, fault=fault)
        self.count(f"fault {fault}")
        if code not in (0, DIED):
            assert report(self.job).error in HONEST, report(self.job)
        self.remember()

    @rule()
    def call_that_fails_on_a_block(self) -> None:
        self.count("failed block")
        if self.run(fail_on=(LAST_TINY_PATCH,)):
            assert report(self.job).error in HONEST, report(self.job)
        self.remember()

    @rule()
    def call(self) -> None:
        self.count("call")
        if self.run():
            assert report(self.job).error in HONEST, report(self.job)
        else:
            self.agree()

    @rule()
    def two_calls_at_once(self) -> None:
        self.count("two at once")
        second = Job(**{**vars(self.job), "report": self.job.report + "2"})
        both = [self.children.start(self.job), self.children.start(second)]
        for pid, job in zip(both, (self.job, second), strict=True):
            if self.children.wait(pid):
                assert report(job).error in HONEST | {"OutputBusy"}, report(job)

    @rule(kind=st.sampled_from(DAMAGES), seed=st.integers(0, 2**16))
    def damage(self, kind: str, seed: int) -> None:
        generator = random.Random(seed)
        files = self.files()
        if not files:
            return
        self.count(f"damage {kind}")
        path = generator.choice(files)
        data, other = path.read_bytes(), generator.choice(files)
        if kind == "flip" and data:
            at = generator.randrange(len(data))
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << generator.randrange(8)]) + data[at + 1 :])
        elif kind == "truncate":
            path.write_bytes(data[: generator.randrange(len(data) + 1)])
        elif kind in ("empty", "zero"):
            path.write_bytes(bytes(len(data) if kind == "zero" else 0))
        elif kind == "delete":
            path.unlink()
        elif kind == "swap":
            path.write_bytes(other.read_bytes())
            other.write_bytes(data)
        elif kind == "stale" and path in self.older:
            path.write_bytes(self.older[path])
        elif kind == "copy":
            path.with_name(f"{path.name}.left.partial").write_bytes(data)

    @rule()
    def repair(self) -> None:
        self.count("repair")
        if Path(self.job.output).exists():
            with contextlib.suppress(oocpatch.OocpatchError, ValueError):
                oocpatch.verify(self.job.output, repair=True)

    def agree(self) -> bool:
        """Whether the output is right; that it is wrong is found."""
        try:
            found = oocpatch.verify(self.job.output)
        except oocpatch.OocpatchError:
            return False
        if found.passed:
            assert found.complete
            assert self.prediction() == self.expected, "other bytes, and check found nothing"
        return found.passed

    def teardown(self) -> None:
        try:
            if hasattr(self, "expected"):
                self.settle()
        finally:
            shutil.rmtree(self.folder)

    def settle(self) -> None:
        """What the messages say: the same call again, repair, afresh, an empty place."""
        for attempt in range(6):
            if self.run() == 0 and self.agree():
                self.count(f"settled after {attempt}")
                return
            message = report(self.job).message
            try:
                oocpatch.verify(self.job.output, repair=True)
                afresh = "start afresh with overwrite=True" in message
            except (oocpatch.OocpatchError, ValueError):
                afresh = True
            if afresh:
                self.count("afresh")
                if self.run(options={**self.job.options, "overwrite": True}):
                    assert report(self.job).error in HONEST, report(self.job)
                    fresh(self.job)
        raise AssertionError(f"never settled: {report(self.job)}")
