"""What becomes of a run that meets a fault: absorbed, reported or found; and what to do then gives the same bytes."""

from __future__ import annotations

import dataclasses

import oocpatch
from tests.support.children import Children, report
from tests.support.crash_child import Job
from tests.support.small_run import fresh, prediction

LOUD, SILENT = ("eio", "enospc", "slow"), ("tear", "flip", "stale")
HONEST = {"OSError", "BlockFailed", "CorruptData", "OutputExists", "FileNotFoundError"}
"""Errors that say what happened to the storage."""


class Wrong(AssertionError):
    """A run ended in other bytes without a word, or in an error that says something else."""


def outcome(children: Children, job: Job, expected: dict[str, str], fault: str, number: int) -> str:
    """How a run with a fault ends, and the calls after it: in the expected bytes, or it raises `Wrong`.

    Returns:
        `no fault`: it has fewer changes of the disk; `absorbed`: right at once; `resumed`: an error, and the same call
        again was right; `mended`: `verify` found it, and what it marked was computed anew; `afresh`: it said that
        nothing but starting afresh helps.
    """
    where = f"{fault} at change {number}"
    struck = fresh(job, die_before=number, fault=fault)
    code, end = children.run(struck), report(struck)
    if not end.struck:
        return "no fault"
    how = "absorbed"
    if code:
        if end.error not in HONEST or not end.message:
            raise Wrong(f"{where}: {end.error}: {end.message}")
        how = "resumed"
        code = children.run(job)
        end = report(job)
    if code:
        if end.error not in HONEST:
            raise Wrong(f"{where}, then {end.error}: {end.message}")
        return _afresh(children, job, expected, where)
    try:
        found = oocpatch.verify(job.output, repair=True)
    except (oocpatch.OutputExists, oocpatch.CorruptData):  # what the output says of itself is damaged
        return _afresh(children, job, expected, where)
    if found.passed:
        if prediction(job) != expected:
            raise Wrong(f"{where}: other bytes, and check found nothing")
        return how
    code = children.run(job)
    if code or prediction(job) != expected or not oocpatch.verify(job.output).passed:
        raise Wrong(f"{where}: not mended by repair: {report(job).message}")
    return "mended"


def _afresh(children: Children, job: Job, expected: dict[str, str], where: str) -> str:
    again = dataclasses.replace(job, options={**job.options, "overwrite": True})
    if children.run(again):
        # The group's own metadata is ruined, so that it cannot be told from foreign data: somebody must delete it.
        if report(again).error != "OutputExists":
            raise Wrong(f"{where}, and afresh: {report(again).message}")
        again = fresh(job)
        if children.run(again):
            raise Wrong(f"{where}, and in an empty place: {report(again).message}")
    if prediction(job) != expected or not oocpatch.verify(job.output).passed:
        raise Wrong(f"{where}: starting afresh gave other bytes")
    return "afresh"
