"""The long campaign: every fault at every change of the disk, and many lives of `tests.support.protocol_machine`."""

from __future__ import annotations

import argparse
import collections
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.children import Children, report
from tests.support.crash_child import make_volume
from tests.support.faults import LOUD, SILENT, Wrong, outcome
from tests.support.protocol_machine import Protocol
from tests.support.small_run import TINY, job_in, prediction


def every_fault(children: Children, faults: list[str]) -> int:
    """Each fault at each change of the disk of a small run; the number of wrong ends."""
    wrong = 0
    for fault in faults:
        with tempfile.TemporaryDirectory() as folder:
            make_volume(Path(folder) / "volume.zarr", (16,), (8,))
            job = job_in(Path(folder), **TINY)
            assert children.run(job) == 0
            expected, changes = prediction(job), report(job).changes
            found: collections.Counter[str] = collections.Counter()
            for number in range(changes):
                try:
                    found[outcome(children, job, expected, fault, number)] += 1
                except Wrong as error:
                    found["wrong"] += 1
                    print(error)
            wrong += found["wrong"]
            print(f"{fault:8} {changes} changes: {dict(found)}", flush=True)
    return wrong


def main() -> None:
    """Run the campaign and print its figures; the exit code is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1000, help="lives of the state machine; 0: none")
    parser.add_argument("--steps", type=int, default=8, help="steps of each life")
    parser.add_argument("--faults", nargs="*", choices=[*LOUD, *SILENT], default=[*LOUD, *SILENT])
    arguments = parser.parse_args()
    with Children() as children:
        wrong = every_fault(children, arguments.faults)
        if arguments.examples:
            Protocol.children, Protocol.tally = children, {}
            many = settings(
                max_examples=arguments.examples, stateful_step_count=arguments.steps, deadline=None, database=None,
                suppress_health_check=list(HealthCheck), print_blob=True,
            )  # fmt: skip
            run_state_machine_as_test(Protocol, settings=many)
            print(f"{arguments.examples} lives: {dict(sorted(Protocol.tally.items()))}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
