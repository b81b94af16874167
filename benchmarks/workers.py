"""The use of many workers: runs followed on a virtual clock, and real processes with a model that only waits."""

from __future__ import annotations

import argparse
import json
import statistics

from benchmarks.measure import MIB, in_fresh_process, table

SIMULATED = ("256:4", "512:16", "1024:64", "2048:128")
"""Edge of the volume and number of workers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--simulate", nargs="*", default=SIMULATED, metavar="EDGE:WORKERS")
    parser.add_argument("--edge", type=int, default=256, help="edge of the volume of real processes")
    parser.add_argument("--processes", nargs="*", type=int, default=(1, 4), help="numbers of real processes to compare")
    parser.add_argument("--seconds", type=float, default=0.05, help="that a patch takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.set_defaults(patch_size=64)


def run(arguments: argparse.Namespace) -> None:
    """Follow each run in virtual time; then compare real processes in interleaved rounds."""
    common = {"directory": str(arguments.directory), "patch": arguments.patch_size, "seconds": arguments.seconds}
    simulated = [
        in_fresh_process("simulate", "benchmarks.workers_tasks", edge=edge, workers=workers, **common)
        for edge, workers in (map(int, asked.split(":")) for asked in arguments.simulate)
    ]
    real = [
        in_fresh_process("compute", "benchmarks.workers_tasks", edge=arguments.edge, processes=processes, **common)
        for _ in range(arguments.rounds)
        for processes in arguments.processes
    ]
    if arguments.json:
        print(json.dumps({"simulated": simulated, "real": real}, indent=1))
        return
    print(table(["edge", "workers", "blocks", "patches", "busy", "speed-up", "planned idle",
                 "driver s", "MiB", "ledger MiB"], [
        [
            str(r["edge"]), str(r["workers"]), f"{r['blocks']:,}", f"{r['patches']:,}",
            f"{r['busy']:.1%}", f"{r['busy'] * r['workers']:.2f}", f"{r['planned_idle']:.1%}",
            f"{r['driver_cpu']:.1f}", f"{r['driver_memory'] / MIB:.0f}", f"{r['ledger'] / MIB:.1f}",
        ]
        for r in simulated
    ]))  # fmt: skip
    if not real:
        return
    first = statistics.median(r["wall"] for r in real if r["processes"] == arguments.processes[0])
    rows = []
    for processes in arguments.processes:
        walls = [r["wall"] for r in real if r["processes"] == processes]
        median = statistics.median(walls)
        rows.append([str(arguments.edge), str(processes), f"{median:.1f}", f"{first / median:.2f}"])
    print(table(["edge", "processes", "wall s", "speed-up"], rows))
    print(f"bytes: {'identical' if len({r['digest'] for r in real}) == 1 else 'DIFFERENT'}")
