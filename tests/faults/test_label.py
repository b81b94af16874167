"""Promises on faults of `label` and `objects`: killed, damaged or on a cluster, they end in the same bytes."""

from __future__ import annotations

import itertools
import random
import re
import shutil
from pathlib import Path

import pytest
import xarray

import oocpatch
from oocpatch.storage.paths import LocalPath
from oocpatch.workspace.ledger import read_ledger
from tests.faults.test_damage import DAMAGES
from tests.support.children import Children, report
from tests.support.crash_child import Job, make_volume
from tests.support.small_run import TINY, die_and_resume, fresh, job_in, labelling_job, prediction, table_job


@pytest.fixture
def tiny(tmp_path: Path) -> Job:
    return labelling_job(tmp_path)


def test_a_run_that_dies_at_any_change_of_the_disk_ends_in_the_same_bytes(children: Children, tiny: Job) -> None:
    assert children.run(tiny) == 0
    expected, changes = prediction(tiny), report(tiny).changes
    assert changes > 30, "tables of two blocks, ids of both, and the output"
    for number in range(0, changes, 10):  # the campaign does all, of a larger run
        die_and_resume(children, tiny, expected, number)


def test_a_prediction_that_is_labelled_and_dies_at_any_change_of_the_disk_ends_in_the_same_bytes(
    children: Children, tmp_path: Path
) -> None:
    """In the run of the classes, in that of the labels, and between them."""
    make_volume(tmp_path / "volume.zarr", (16,), (8,))
    job = job_in(tmp_path, **TINY, postprocess="threshold:7.5")
    assert children.run(job) == 0
    labels = oocpatch.label(f"{job.output}/prediction", tmp_path / "labels", progress=False)
    job = fresh(job, options={**TINY, "postprocess": "label:7.5"})
    assert children.run(job) == 0
    expected, changes = prediction(job), report(job).changes
    assert xarray.open_zarr(job.output)["labels"].values.tolist() == labels.values.tolist()
    for number in range(3, changes, 19):
        die_and_resume(children, job, expected, number)


def test_a_table_that_dies_at_any_change_of_the_disk_ends_in_the_same_bytes(children: Children, tmp_path: Path) -> None:
    """At some changes while blocks are measured, and at each while the table is completed."""
    job = table_job(tmp_path)
    assert children.run(job) == 0
    expected, changes = prediction(job), report(job).changes
    assert expected["table"].splitlines()[1:3] == ["1,48,3,6,0,16,4.0,7.5", "2,48,6,9,0,16,7.0,7.5"]
    for number in (*range(1, changes - 9, 9), *range(changes - 9, changes)):
        die_and_resume(children, job, expected, number)


def merged(children: Children, job: Job) -> Path:
    """Leave a run that died after the merge; return a copy of all that it left on disk."""
    assert children.run(job) == 0
    for number in range(report(job).changes, 0, -1):
        children.run(fresh(job, die_before=number))
        ledgers = list(Path(job.watch).glob("out.oocpatch/*/ledger"))
        kinds = [record.kind for path in ledgers for record in read_ledger(LocalPath(path))]
        if kinds.count("merge") and kinds.count("normalize") < 2:
            break
    snapshot = Path(job.watch).with_name("snapshot")
    shutil.copytree(job.watch, snapshot)
    return snapshot


def test_damage_of_tables_and_ids_is_repaired_to_the_same_bytes(children: Children, tiny: Job) -> None:
    """Each kind of damage to every second kind of file: tables, ids, plan and ledger; the next one to the others."""
    assert children.run(tiny) == 0
    expected = prediction(tiny)
    snapshot, generator = merged(children, fresh(tiny)), random.Random(2)
    workspace = Path(tiny.output + ".oocpatch")
    files = [path.relative_to(workspace) for path in workspace.rglob("*") if path.is_file()]
    kinds = {re.sub(r"\d+", "#", "/".join(name.parts[1:])): name for name in sorted(files)}
    assert {"blocks/#/#/table", "merged/#/#.#.#", "ledger", "plan.json"} <= set(kinds)
    wrong = []
    for number, damage in enumerate(DAMAGES):
        for kind, name in itertools.islice(kinds.items(), number % 2, None, 2):
            fresh(tiny)
            shutil.copytree(snapshot, tiny.watch, dirs_exist_ok=True)
            damage(workspace / name, generator)
            ended = children.run(tiny)
            if (ended or prediction(tiny) != expected) and not report(tiny).error.startswith("Corrupt"):
                wrong.append((damage.__name__, kind, report(tiny).message))
    assert not wrong


def test_ids_in_the_place_of_others_are_never_taken(children: Children, tmp_path: Path) -> None:
    job = labelling_job(tmp_path)
    assert children.run(job) == 0
    expected = prediction(job)
    merged(children, fresh(job))
    first, second = sorted(Path(job.output + ".oocpatch").rglob("merged/*/*"))[:2]
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    assert children.run(job) == 0
    assert prediction(job) == expected
