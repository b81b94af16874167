"""Random edits of inputs of all formats, between stop and resume and between complete and call again."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import logging
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

from tests.support.children import Children, calls, report
from tests.support.crash_child import Job
from tests.support.edits import (
    FORMATS,
    MODES,
    PATCHES,
    SAME,
    SETTINGS,
    SMALL,
    Input,
    Wrong,
    attributes,
    check_edit,
    contents,
    edits_of,
    new_data,
    require,
    voxel_while_open,
)  # fmt: skip

SURELY_RECORDED = 16
"""Patches after which a run has recorded a block."""


def check_kill(children: Children, folder: Path, form: str, rng: np.random.Generator) -> str:
    """Kill a run with `SIGKILL`, edit, and call again without and with `update`."""
    stored = Input.of(form, folder / "input", new_data(int(rng.integers(1 << 30))))
    options = {name: value for name, value in SETTINGS.items() if name not in ("progress", "model_id")}
    options |= {**stored.format.options, "overlap_mode": str(rng.choice(["crop", "hann"]))}
    (folder / "run").mkdir()
    job = Job(
        str(stored.open()), str(folder / "run/out"), str(folder / "calls"), str(folder / "report"), options, delay=0.03
    )
    pid, stop = children.start(job), int(rng.integers(8, 36))
    while not Path(job.log).exists() or len(calls(job)) < stop:
        time.sleep(0.005)
    require(children.kill(pid) == -9, "the child was killed")
    edits = [edit for edit in edits_of(form) if edit is not voxel_while_open]
    edit = edits[int(rng.integers(len(edits)))]
    edit(stored, rng)
    job = dataclasses.replace(job, delay=0.0)
    fresh = dataclasses.replace(job, output=str(folder / "run/fresh"), log=str(folder / "calls-fresh"))
    again = dataclasses.replace(job, log=str(folder / "calls-again"))
    require(children.run(fresh) == 0, "a fresh run")
    if children.run(again) != 0:
        require(report(again).error == "RunMismatch" and "volume" in report(again).message, report(again).message)
        require(edit not in SAME and not Path(again.log).exists(), "refused for nothing, or computed something")
        again = dataclasses.replace(again, options={**options, "update": True})
        require(children.run(again) == 0, report(again).message)
    computed = len(calls(again)) if Path(again.log).exists() else 0
    ours, expected = (contents(Path(j.output), metadata=edit is not attributes) for j in (job, fresh))
    require(ours == expected, f"after {edit.__name__} the bytes are not those of a fresh run")
    is_small = edit in (*SAME, *SMALL) and form != "zarr one chunk"
    require(computed < PATCHES or not is_small or stop < SURELY_RECORDED, f"{computed} patches computed")
    return f"{edit.__name__}: {'updated' if 'update' in again.options else 'resumed'}, {computed} computed"


def main() -> None:
    """Run the campaign and print its figures; the exit code is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, default=100, help="edits between two calls of one process")
    parser.add_argument("--kills", type=int, default=20, help="edits between a killed process and the next one")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    rng = np.random.default_rng(arguments.seed)
    counts: collections.Counter[str] = collections.Counter()
    seen: collections.Counter[str] = collections.Counter()
    names = list(FORMATS)
    on_disk = [name for name in names if FORMATS[name].open is str]
    with Children() as children:
        for number in range(arguments.edits + arguments.kills):
            form = names[number % len(names)] if number < arguments.edits else on_disk[number % len(on_disk)]
            mode, edits = str(rng.choice(list(MODES))), edits_of(form)
            edit, seed = edits[int(rng.integers(len(edits)))], int(rng.integers(1 << 30))
            stop = int(rng.integers(4, 40)) if rng.random() < 0.5 else None
            killed = number >= arguments.edits
            place = f"{form}, killed" if killed else f"{form}, {mode}, {edit.__name__}, {stop or 'complete'}, {seed}"
            with tempfile.TemporaryDirectory() as folder:
                try:
                    if killed:
                        outcome = check_kill(children, Path(folder), form, rng)
                    else:
                        outcome = check_edit(Path(folder), form, mode, edit, stop=stop, seed=seed)
                    counts["killed" if killed else outcome.split(",")[0]] += 1
                except Exception as error:  # noqa: BLE001 - all are counted
                    outcome = f"WRONG: {error}" if isinstance(error, Wrong) else f"WRONG: {traceback.format_exc()}"
                    counts["wrong"] += 1
            seen[form] += 1
            print(f"{number:4} {place}: {outcome}", flush=True)
    print(f"{sum(counts.values())} edits of {len(seen)} formats: {dict(counts)}")
    raise SystemExit(bool(counts["wrong"]))


if __name__ == "__main__":
    main()
