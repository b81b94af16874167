"""Promises on the order of tasks, on a clock that stands still while the driver works."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from oocpatch.engine.stages import TaskResult
from oocpatch.execution.scheduler import Run, Task
from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.grid import PatchGrid
from oocpatch.storage.paths import LocalPath
from oocpatch.workspace.ledger import NO_PARTIALS, Ledger, PartialsRef
from oocpatch.workspace.run_progress import RunProgress


class Clock:
    """An executor on a clock of its own, on which predict tasks take four seconds and normalize tasks one."""

    def __init__(self, predicting: int, normalize_slots: int) -> None:
        self.max_in_flight, self.normalize_slots = predicting + normalize_slots, normalize_slots
        self.now, self.predicting = 0, predicting
        self.under_way: dict[Future[TaskResult], tuple[int, Task]] = {}
        self.idle_slots: list[tuple[int, int]] = []

    def submit(self, task: Task) -> Future[TaskResult]:
        future: Future[TaskResult] = Future()
        self.under_way[future] = self.now + (4 if task.stage == "predict" else 1), task
        assert sum(t.stage == "predict" for _, t in self.under_way.values()) <= self.predicting
        return future

    def wait(self, pending: Collection[Future[TaskResult]], **_: Any) -> tuple[list[Future[TaskResult]], None]:
        stages = [task.stage for _, task in self.under_way.values()]
        self.idle_slots.append((self.now, self.predicting - stages.count("predict")))
        self.now = min(end for end, _ in self.under_way.values())
        done = [future for future, (end, _) in self.under_way.items() if end == self.now]
        for future in done:
            task = self.under_way.pop(future)[1]
            ref = PartialsRef(task.index + 1, "0") if task.stage == "predict" else NO_PARTIALS
            future.set_result(TaskResult(ref))
        return done, None

    def stop(self) -> None:
        raise AssertionError("the run does not stop before its end")


@pytest.mark.parametrize("normalize_slots", [0, 1])
def test_a_device_does_not_wait_for_normalize_tasks_while_there_are_blocks_to_predict(
    normalize_slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a slot of their own; without one they come first, in the place of predict tasks."""
    blocks = BlockGrid.of(PatchGrid.of((320,), (4,), (2,)), core=(4,), unit=(4,), sweep=0, crop=False)
    every, clock = range(blocks.num_blocks), Clock(2, normalize_slots)
    monkeypatch.setattr("oocpatch.execution.scheduler.wait", clock.wait)
    with contextlib.closing(Ledger(LocalPath(tmp_path / "ledger"))) as ledger:
        progress = RunProgress(blocks.num_blocks)
        Run(blocks, progress, ledger, lambda _: None, to_predict=every, to_normalize=every).execute(clock)
    assert len(progress.partials) == 80
    assert len(progress.normalized) == blocks.num_open == 79
    predicting = [slots for now, slots in clock.idle_slots if now < 156]
    assert (sum(predicting) == 0) == bool(normalize_slots)
