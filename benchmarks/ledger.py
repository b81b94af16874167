"""The driver at a million empty blocks, and the plan of 10^15 voxels; time and memory of each step."""

from __future__ import annotations

import argparse
import json

from benchmarks.measure import MIB, in_fresh_process, table

STEPS = ("plan_huge", "plan_blocks", "drive", "read_progress", "keep", "tell_status")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--edge", type=int, default=100, help="blocks along each of three axes")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)


def run(arguments: argparse.Namespace) -> None:
    """Do each step in a process of its own, over the ledger that the second one wrote, and print what it took."""
    records = []
    for step in arguments.steps:
        made = in_fresh_process(
            step, "benchmarks.ledger_tasks", directory=str(arguments.directory), edge=arguments.edge
        )
        records.append({"step": step, "blocks": arguments.edge**3, **made})  # or those that it tells itself
    if arguments.json:
        print(json.dumps(records, indent=1))
        return
    print(table(["step", "blocks", "wall s", "cpu s", "added MiB", "result"], [
        [r["step"], f"{r['blocks']:,}", f"{r['wall']:.1f}", f"{r['cpu']:.1f}", f"{r['peak'] / MIB:.0f}", r["result"]]
        for r in records
    ]))  # fmt: skip
