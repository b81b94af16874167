"""Promises on dying: whenever and wherever a process is killed, the next call ends in the same bytes.

Real processes are really killed. What a run did is read from the log that its model keeps: a line per call.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from oocpatch.storage.journal import read_journal
from oocpatch.storage.paths import LocalPath
from tests.support.children import Children, calls, file_digests, report
from tests.support.crash_child import DIED, INTERRUPTED, Job, make_volume
from tests.support.small_run import (
    LAST_TINY_PATCH,
    MOST_IN_BLOCK,
    all_patches,
    block_of,
    die_and_resume,
    fresh,
    job_in,
    patch_calls,
    prediction,
    resampling_job,
    undisturbed,
)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_killed_at_random_times_ends_in_the_same_bytes_and_redoes_no_finished_block(
    workers: int, children: Children, job: Job
) -> None:
    job = dataclasses.replace(job, options={**job.options, "workers": workers}, delay=0.004)
    began = time.monotonic()
    expected = undisturbed(children, job)
    duration = time.monotonic() - began
    patches, in_block = len(all_patches()), Counter(map(block_of, all_patches()))
    assert (patches, len(in_block)) == (49, 16)
    generator = random.Random(workers)
    kills = attempts = 0
    while kills < 5:
        job, killed_here, code = fresh(job), 0, None
        while code != 0:
            attempts += 1
            assert attempts < 300, "the run makes no progress between kills"
            pid = children.start(job)
            code = children.poll(pid, generator.uniform(0, duration))
            if code is None:
                code = children.kill(pid)
                killed_here += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL), report(job).message
        kills += killed_here
        assert prediction(job) == expected
        log = patch_calls(job)
        # A kill costs what was in flight: a block per worker, and one whose record was on its way.
        lost = killed_here * (workers + 1) * MOST_IN_BLOCK
        assert patches <= len(log) <= patches + lost
        assert_finished_blocks_stay_finished(log, in_block, workers)


def test_a_kill_costs_no_more_patches_than_the_plan_says(children: Children, tmp_path: Path) -> None:
    """Blocks as they are planned for a function, whose work cannot be counted."""
    make_volume(tmp_path / "volume.zarr", (64, 64), (8, 8))
    job = job_in(tmp_path, patch_size=8, patch_overlap=4, output_chunks=8)
    expected = undisturbed(children, job)
    job, kills = dataclasses.replace(fresh(job), delay=0.004), 0
    for calls_before in (60, 112, 190, 250):
        pid = running(children, job, after=calls_before)
        kills += children.kill(pid) == -signal.SIGKILL
    assert kills >= 3
    assert children.run(job) == 0
    assert prediction(job) == expected
    assert 225 < len(patch_calls(job)) <= 225 + kills * 32


def assert_finished_blocks_stay_finished(
    log: list[tuple[int, float]], in_block: Counter[tuple[int, ...]], workers: int
) -> None:
    """No process computes a block that an earlier one had finished, but for those in flight when it was killed.

    In flight are the blocks that a process computed last: one per worker, and one whose record was on its way.
    """
    finished: set[tuple[int, ...]] = set()
    for pid in dict.fromkeys(pid for pid, _ in log):
        computed = [block_of(first) for other, first in log if other == pid]
        assert not finished & set(computed)
        done = [block for block, count in Counter(computed).items() if count == in_block[block]]
        last_patch = {block: len(computed) - computed[::-1].index(block) for block in done}
        finished |= set(sorted(done, key=last_patch.__getitem__)[: -(workers + 1)])


@pytest.mark.parametrize("mode", ["hann", "crop"])
def test_a_run_that_dies_at_any_change_of_the_disk_ends_in_the_same_bytes(
    mode: str, children: Children, tiny: Job
) -> None:
    tiny = dataclasses.replace(tiny, options={**tiny.options, "overlap_mode": mode})
    assert children.run(tiny) == 0
    expected, changes = prediction(tiny), report(tiny).changes
    assert changes > 10, "the output alone has five files, each made and renamed"
    for number in range(0, changes, 11 if mode == "crop" else 7):  # the same changes; the campaign does all
        die_and_resume(children, tiny, expected, number)


def test_a_run_with_vectors_that_dies_at_any_change_of_the_disk_ends_in_the_same_bytes(
    children: Children, tiny: Job
) -> None:
    job = dataclasses.replace(tiny, options={**tiny.options, "model_id": "vectors"})
    assert children.run(job) == 0, report(job).message
    expected, changes = prediction(job), report(job).changes
    assert {name.split("/")[0] for name in expected} == {"prediction", "vectors", "starts"}
    for number in range(0, changes, 23):  # the campaign does all
        die_and_resume(children, job, expected, number)


def test_a_run_that_dies_anywhere_in_its_pyramid_ends_in_the_same_bytes(children: Children, tmp_path: Path) -> None:
    make_volume(tmp_path / "volume.zarr", (12, 9), (12, 9))
    job = job_in(tmp_path, patch_size=12, output_chunks=(6, 9), output_format="ome-zarr", workers=1)
    assert children.run(job) == 0
    output = Path(job.output)
    levels = sorted(path.name for path in output.glob("scale*"))
    assert levels == ["scale0", "scale1"]
    expected = [file_digests(output / level) for level in levels]
    assert all(len(digests) > 4 for digests in expected)
    changes = report(job).changes
    died_after = set()
    for number in range(changes * 2 // 3, changes, 5):  # before that, it is a run like any other
        dying = fresh(job, die_before=number)
        died = children.run(dying) == DIED
        assert died or report(dying).changes <= number
        died_after |= {level for level in levels if file_digests(output / level) == expected[levels.index(level)]}
        assert children.run(job) == 0, f"after change {number}: {report(job).message}"
        assert [file_digests(output / level) for level in levels] == expected, f"after change {number}"
        assert not list(Path(job.watch).glob("out?*")), f"something was left behind after change {number}"
    assert died_after == set(levels)


def test_a_pyramid_goes_on_where_it_was(children: Children, tmp_path: Path) -> None:
    """A level that is done is not made again: what is missing of it stays missing."""
    make_volume(tmp_path / "volume.zarr", (12, 9), (12, 9))
    job = job_in(tmp_path, patch_size=12, output_chunks=(6, 9), output_format="ome-zarr", workers=1)
    assert children.run(job) == 0
    for number in range(report(job).changes - 1, 0, -1):
        assert children.run(fresh(job, die_before=number)) == DIED
        if any(read_journal(LocalPath(path)) for path in Path(job.watch).glob("out.oocpatch/*/pyramids")):
            break
    chunk = Path(job.output) / "scale1" / "image" / "c" / "0" / "0"
    chunk.unlink()
    assert children.run(job) == 0
    assert not chunk.exists()


def test_a_resumed_run_that_dies_at_any_change_of_the_disk_ends_in_the_same_bytes(
    children: Children, tiny: Job
) -> None:
    """Dies twice: while it computes the second block, then anywhere in the run that continues."""
    expected = undisturbed(children, tiny)
    first_death = fresh(tiny, fail_on=(LAST_TINY_PATCH,))
    assert children.run(first_death) == 1
    snapshot = Path(tiny.watch).with_name("snapshot")
    shutil.copytree(tiny.watch, snapshot)
    assert children.run(tiny) == 0
    changes = report(tiny).changes
    assert changes > 3
    for number in range(0, changes, 5):
        fresh(tiny)
        shutil.copytree(snapshot, tiny.watch, dirs_exist_ok=True)
        dying = dataclasses.replace(tiny, die_before=number)
        assert children.run(dying) == DIED or report(dying).changes <= number
        assert children.run(tiny) == 0, f"after change {number}: {report(tiny).message}"
        assert prediction(tiny) == expected, f"after change {number}"


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_cleanly_and_what_is_finished_stays_finished(workers: int, children: Children, job: Job) -> None:
    job = dataclasses.replace(job, options={**job.options, "workers": workers}, delay=0.04)
    expected = undisturbed(children, job)
    pid = children.start(job)
    while len(patch_calls(job)) < 30:
        time.sleep(0.005)
    began = time.monotonic()
    assert children.kill(pid, signal.SIGINT) == INTERRUPTED
    assert time.monotonic() - began < 5
    assert not Path(job.output + ".oocpatch.lock").exists()
    before = patch_calls(job)
    assert children.run(job) == 0
    assert prediction(job) == expected
    again = Counter(first for _, first in patch_calls(job))
    assert len(patch_calls(job)) - len(before) <= 49 - 30 + (workers + 1) * MOST_IN_BLOCK
    assert set(again) == set(all_patches())


def running(children: Children, job: Job, after: int) -> int:
    """Process id of a child that has called its model `after` times and goes on."""
    pid = children.start(job)
    while len(calls(job)) < after:
        assert children.poll(pid) is None, report(job)
        time.sleep(0.005)
    return pid


def test_a_second_run_on_the_same_output_is_refused_while_the_first_one_runs(children: Children, job: Job) -> None:
    expected = undisturbed(children, job)
    slow = dataclasses.replace(job, delay=0.03)
    first = running(children, slow, after=5)
    second = dataclasses.replace(job, report=job.report + "2", log=job.log + "2")
    assert children.run(second) == 1
    assert report(second).error == "OutputBusy"
    assert job.output in report(second).message
    assert str(first) in report(second).message
    assert not patch_calls(second)
    assert children.wait(first) == 0
    assert prediction(job) == expected


def test_a_run_with_overwrite_does_not_destroy_one_that_is_running(children: Children, job: Job) -> None:
    expected = undisturbed(children, job)
    first = running(children, dataclasses.replace(job, delay=0.03), after=5)
    second = dataclasses.replace(job, report=job.report + "2", log=job.log + "2")
    second = dataclasses.replace(second, options={**job.options, "overwrite": True})
    assert children.run(second) == 1
    assert report(second).error == "OutputBusy"
    assert children.wait(first) == 0
    assert prediction(job) == expected


def test_the_lock_of_a_killed_process_is_taken_over_at_once(children: Children, job: Job) -> None:
    expected = undisturbed(children, job)
    assert children.kill(running(children, dataclasses.replace(job, delay=0.03), after=20)) == -signal.SIGKILL
    began = time.monotonic()
    assert children.run(job) == 0
    assert time.monotonic() - began < 5
    assert prediction(job) == expected


def test_the_second_of_two_runs_takes_over_when_the_first_is_killed(children: Children, job: Job) -> None:
    expected = undisturbed(children, job)
    first = running(children, dataclasses.replace(job, delay=0.03), after=20)
    second = dataclasses.replace(job, report=job.report + "2")
    assert children.run(second) == 1
    assert report(second).error == "OutputBusy"
    assert children.kill(first) == -signal.SIGKILL
    assert children.run(second) == 0
    assert prediction(job) == expected


def test_of_many_runs_that_find_a_dead_lock_exactly_one_goes_on(children: Children, job: Job) -> None:
    expected = undisturbed(children, job)
    slow = dataclasses.replace(job, delay=0.01)
    for _ in range(2):
        assert children.kill(running(children, slow, after=10)) == -signal.SIGKILL
        before = len(calls(slow))
        rivals = [dataclasses.replace(slow, report=f"{job.report}{number}") for number in range(5)]
        ends = [children.wait(pid) for pid in [children.start(rival) for rival in rivals]]
        assert sorted(ends) == [0, 1, 1, 1, 1]
        assert {report(rival).error for rival, end in zip(rivals, ends, strict=True) if end} == {"OutputBusy"}
        assert len({pid for pid, _ in calls(slow)[before:]}) == 1
        assert prediction(job) == expected
        fresh(job)


def test_the_marker_of_completion_is_written_last(children: Children, job: Job) -> None:
    """At any kill, the output either says that it is incomplete or has the final bytes."""
    job = dataclasses.replace(job, delay=0.002)
    began = time.monotonic()
    expected = undisturbed(children, job)
    duration = time.monotonic() - began
    generator = random.Random(11)
    incomplete = 0
    for _ in range(8):
        pid = children.start(job)
        if children.poll(pid, generator.uniform(0.2, 0.9) * duration) is None:
            children.kill(pid)
        metadata = Path(job.output) / "zarr.json"
        if not metadata.exists():
            continue
        if json.loads(metadata.read_text())["attributes"].get("oocpatch", {}).get("complete"):
            assert prediction(job) == expected
            job = fresh(job)
        else:
            incomplete += 1
    assert incomplete


def test_a_run_whose_scores_are_resampled_ends_in_the_same_bytes_wherever_it_is_killed(
    children: Children, tmp_path: Path
) -> None:
    """Kills at changes of the disk that are spread over the run of the scores, and that of the output."""
    job = resampling_job(tmp_path)
    expected = undisturbed(children, job)
    assert len(expected) > 1
    assert children.run(fresh(job)) == 0
    changes = report(job).changes
    for number in range(3, changes, changes // 5):
        die_and_resume(children, job, expected, number)
