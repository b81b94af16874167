"""Training on volumes on disk larger than memory: memory, seeds, and patches per second beside TorchIO."""

from __future__ import annotations

import argparse
import json
import statistics

from benchmarks.measure import MIB, in_fresh_process, table

TASKS = "benchmarks.training_tasks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.set_defaults(patch_size=48)
    parser.add_argument(
        "--gib", type=int, default=20, help="size of all volumes on disk, of which few chunks are stored"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--loader-workers", type=int, default=2, help="processes that read and transform patches")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the comparison with TorchIO")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each of them")


def run(arguments: argparse.Namespace) -> None:
    """Train twice with one seed and once with another, and compare queues of volumes that fit in memory."""
    path, common = str(arguments.directory), {"patch": arguments.patch_size, "workers": arguments.loader_workers}
    in_fresh_process("make_study", TASKS, path=path, gib=arguments.gib)
    runs = [
        in_fresh_process("train", TASKS, path=path, steps=arguments.steps, seed=seed, **common) for seed in (0, 0, 1)
    ]
    rates: dict[str, list[float]] = {"oocpatch, from disk": [], "oocpatch, in memory": [], "TorchIO, in memory": []}
    for _ in range(arguments.rounds):
        for name, values in rates.items():
            library, place = name.split(", ")
            options = {"library": library, "place": place, "seconds": arguments.seconds, **common}
            values.append(in_fresh_process("draw", TASKS, path=path, **options)["rate"])
    if arguments.json:
        print(json.dumps({"runs": runs, "rates": rates}, indent=1))
        return
    first, again, other = runs
    print(
        f"{arguments.gib} GiB on disk, {arguments.steps} steps of 2 patches of {arguments.patch_size}^3, "
        f"{arguments.loader_workers} workers: {first['seconds']:.0f} s\n"
        f"memory of all processes, medians: {first['early'] / MIB:.0f} MiB in the second quarter of the steps, "
        f"{first['late'] / MIB:.0f} MiB in the last; at most {first['peak'] / MIB:.0f} MiB\n"
        f"same seed, same patches: {first['digest'] == again['digest']}; "
        f"another seed, other patches: {first['digest'] != other['digest']}\n"
    )
    rows = [[name, f"{statistics.median(values):.1f}"] for name, values in rates.items()]
    print(table(["queue with transforms", "patches/s"], rows))
