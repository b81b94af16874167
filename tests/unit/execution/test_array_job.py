"""Promises on parts: a run shared out to calls that know nothing of each other gives the bytes of one call."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import oocpatch
from tests.support.children import Children, report
from tests.support.crash_child import Job, make_volume
from tests.support.small_run import (
    MIDDLE,
    MOST_IN_BLOCK,
    TINY,
    all_patches,
    fresh,
    interrupted,
    job_in,
    patch_calls,
    prediction,
    restore,
    undisturbed,
)


def part_of(job: Job, number: int, count: int = 3) -> Job:
    """The call of one part; it reports by itself."""
    options = {**job.options, "part": [number, count]}
    return dataclasses.replace(job, options=options, report=f"{job.report}-{number}-of-{count}")


def finished(job: Job, expected: dict[str, str]) -> None:
    assert prediction(job) == expected
    assert not list(Path(job.watch).glob("out?*")), "workspace and locks are gone after success"
    assert oocpatch.status(job.output).state == "complete"


def test_parts_in_any_order_give_the_bytes_of_one_call_and_compute_nothing_twice(children: Children, job: Job) -> None:
    expected = undisturbed(children, job)
    for order in [(3, 2, 1), (2, 3, 1)]:
        fresh(job)
        for place, number in enumerate(order):
            assert children.run(part_of(job, number)) == 0, report(part_of(job, number))
            state = oocpatch.status(job.output)
            assert state.state == ("complete" if place == 2 else "incomplete")
        finished(job, expected)
        computed = [first for _, first in patch_calls(job)]
        assert sorted(computed) == sorted(all_patches())
        shares = Counter(pid for pid, _ in patch_calls(job))
        assert sorted(shares.values()) == [14, 17, 18], "each part computes its share"
        assert children.run(part_of(job, 2)) == 0, "a part of a complete run returns at once"
        assert len(patch_calls(job)) == len(computed)


def test_parts_at_the_same_time_give_the_bytes_of_one_call(children: Children, job: Job) -> None:
    expected = undisturbed(children, job)
    for delay in (0.0, 0.01):
        slow = fresh(job, delay=delay)
        parts = [part_of(slow, number, 4) for number in range(1, 5)]
        pids = [children.start(part) for part in parts]
        assert [children.wait(pid) for pid in pids] == [0] * 4, [report(part) for part in parts]
        finished(job, expected)
        assert Counter(Counter(first for _, first in patch_calls(job)).values()) == {1: 49}


def test_parts_killed_at_random_times_and_run_again_end_in_the_same_bytes(children: Children, job: Job) -> None:
    job = dataclasses.replace(job, delay=0.004)
    began = time.monotonic()
    expected = undisturbed(children, job)
    duration = time.monotonic() - began
    generator = random.Random(5)
    kills = 0
    while kills < 6:
        fresh(job)
        killed_here = 0
        left = {number: children.start(part_of(job, number)) for number in (1, 2, 3)}
        while left:
            number = generator.choice(sorted(left))
            code = children.poll(left[number], generator.uniform(0, duration / 2))
            if code is None:
                code = children.kill(left[number])
            if code == -signal.SIGKILL:
                killed_here += 1
                assert killed_here < 60, "parts make no progress between kills"
                left[number] = children.start(part_of(job, number))
            else:
                assert code == 0, report(part_of(job, number))
                del left[number]
        kills += killed_here
        finished(job, expected)
        computed = len(patch_calls(job))
        assert 49 <= computed <= 49 + killed_here * 2 * MOST_IN_BLOCK


def test_more_parts_than_blocks_are_no_fault(children: Children, tmp_path: Path) -> None:
    make_volume(tmp_path / "volume.zarr", (16,), (8,))
    tiny = job_in(tmp_path, **TINY)
    expected = undisturbed(children, tiny)
    for number in (5, 4, 3, 2, 1):
        assert children.run(part_of(tiny, number, 5)) == 0
    finished(tiny, expected)


def test_a_whole_run_goes_on_where_parts_stopped_and_parts_where_a_whole_run_stopped(
    children: Children, job: Job
) -> None:
    expected = undisturbed(children, job)
    assert children.run(part_of(job, 2)) == 0
    before = len(patch_calls(job))
    assert before
    assert children.run(job) == 0
    finished(job, expected)
    assert len(patch_calls(job)) == 49
    snapshot = interrupted(children, job)
    restore(job, snapshot)
    before = len(patch_calls(job))
    for number in (1, 2, 3):
        assert children.run(part_of(job, number)) == 0
    finished(job, expected)
    assert len(patch_calls(job)) - before <= MOST_IN_BLOCK


def test_a_part_whose_block_fails_is_run_again(children: Children, job: Job) -> None:
    expected = undisturbed(children, job)
    broken = fresh(job, fail_on=(MIDDLE,))
    codes = [children.run(part_of(broken, number)) for number in (1, 2, 3)]
    assert sorted(codes) == [0, 0, 1]
    (number,) = [n for n, code in zip((1, 2, 3), codes, strict=True) if code]
    assert report(part_of(job, number)).error == "BlockFailed"
    assert len(oocpatch.status(job.output).failed) == 1
    assert children.run(part_of(job, number)) == 0
    finished(job, expected)


def test_a_damaged_partial_of_another_part_is_repaired(children: Children, job: Job) -> None:
    expected = undisturbed(children, job)
    assert children.run(part_of(job, 1)) == 0
    assert children.run(part_of(job, 2)) == 0
    pieces = list(Path(f"{job.output}.oocpatch").glob("*/blocks/*/*/0/*/c.*"))
    assert pieces
    for path in pieces:
        path.write_bytes(bytes(path.stat().st_size))
    assert children.run(part_of(job, 3)) == 0
    finished(job, expected)


def test_the_same_part_twice_a_whole_run_and_other_divisions_are_refused_while_a_part_runs(
    children: Children, job: Job
) -> None:
    expected = undisturbed(children, job)
    slow = dataclasses.replace(job, delay=0.15)
    first = children.start(part_of(slow, 1))
    while not patch_calls(job):
        time.sleep(0.005)
    assert oocpatch.status(job.output).state == "running"
    for rival in (part_of(job, 1), job, part_of(job, 1, 4)):
        other = dataclasses.replace(rival, report=rival.report + "-rival", log=job.log + "-rival")
        assert children.run(other) == 1
        assert report(other).error == "OutputBusy"
        assert str(first) in report(other).message
        assert "part 1/3" in report(other).message
    assert children.wait(first) == 0
    assert children.run(part_of(job, 2)) == 0
    assert children.run(part_of(job, 3)) == 0
    finished(job, expected)


def test_an_incomplete_result_says_so(tmp_path: Path) -> None:
    arguments = {"patch_size": 8, "patch_overlap": 4, "block_shape": 8, "output_chunks": 8, "output_fill": -1}
    volume = np.ones((32, 8), np.float32)

    def predict(part: tuple[int, int]) -> object:
        return oocpatch.predict(volume, double, tmp_path / "out", part=part, progress=False, **arguments)

    assert predict((1, 2)).attrs["complete"] is False
    assert json.loads(oocpatch.status(tmp_path / "out").to_json())["predict_done"] == 2
    result = predict((2, 2))
    assert "complete" not in result.attrs
    np.testing.assert_allclose(result.values, 2, rtol=1e-6)


def double(patches: object) -> object:
    return patches * 2


@pytest.mark.parametrize(
    ("part", "error", "words"),
    [
        ((4, 3), ValueError, r"i from 1 to n, got \(4, 3\)"),
        ((0, 3), ValueError, "at least 1"),
        ("1/3", TypeError, "two numbers"),
        (3, TypeError, "two numbers"),
    ],
    ids=str,
)
def test_what_is_no_part_is_refused(part: object, error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        oocpatch.predict(np.zeros((8, 8)), double, tmp_path / "out", patch_size=4, part=part)


def test_a_part_does_not_start_afresh(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="overwrite must be False with part"):
        oocpatch.predict(np.zeros((8, 8)), double, tmp_path / "out", patch_size=4, part=(1, 2), overwrite=True)
