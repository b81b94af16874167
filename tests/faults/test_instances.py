"""Promises on faults of models of objects: killed at any time, or on a cluster, they end in the same bytes."""

from __future__ import annotations

import dataclasses

from tests.support.children import Children, report
from tests.support.crash_child import Job
from tests.support.small_run import die_and_resume, prediction


def test_a_run_that_dies_at_any_change_of_the_disk_ends_in_the_same_bytes(children: Children, tiny: Job) -> None:
    job = dataclasses.replace(tiny, options={**tiny.options, "overlap_mode": "instances"})
    assert children.run(job) == 0, report(job).message
    expected, changes = prediction(job), report(job).changes
    assert changes > 30, "objects and tables of two blocks, ids, and the output"
    for number in range(0, changes, 19):  # the campaign does all
        die_and_resume(children, job, expected, number)
