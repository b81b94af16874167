"""Patches per second of samplers and the queue, against TorchIO with the data in memory, and a plain read from Zarr."""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from benchmarks.measure import MIB, in_fresh_process, table

TASKS = "benchmarks.sampling_tasks"
CONTENDERS: dict[str, dict[str, Any]] = {
    "plain zarr-python read": {"kind": "plain"},
    "GridSampler": {"kind": "grid"},
    "UniformSampler": {"kind": "uniform"},
    "WeightedSampler": {"kind": "weighted"},
    "LabelSampler": {"kind": "label"},
    "Queue": {"kind": "queue"},
    "Queue, 2 threads": {"kind": "queue", "threads": 2},
    "Queue, 2 threads, regions of 8": {"kind": "queue", "threads": 2, "together": 8},
    "GridSampler, in memory": {"kind": "grid", "place": "memory"},
    "UniformSampler, in memory": {"kind": "uniform", "place": "memory"},
    "WeightedSampler, in memory": {"kind": "weighted", "place": "memory"},
    "LabelSampler, in memory": {"kind": "label", "place": "memory"},
    "Queue, in memory": {"kind": "queue", "place": "memory"},
    "TorchIO GridSampler, in memory": {"kind": "grid", "place": "torchio"},
    "TorchIO UniformSampler, in memory": {"kind": "uniform", "place": "torchio"},
    "TorchIO WeightedSampler, in memory": {"kind": "weighted", "place": "torchio"},
    "TorchIO LabelSampler, in memory": {"kind": "label", "place": "torchio"},
    "TorchIO Queue, in memory": {"kind": "queue", "place": "torchio"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--size", type=int, default=256, help="edge of the cube in voxels")
    parser.add_argument("--chunk", type=int, default=64, help="edge of a chunk in voxels")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each contender draws")
    parser.add_argument("--rounds", type=int, default=3)


def run(arguments: argparse.Namespace) -> None:
    """Measure all contenders in turn, round by round, and print the medians."""
    path = str(arguments.directory / "study.zarr")
    in_fresh_process("make_study", TASKS, path=path, size=arguments.size, chunk=arguments.chunk)
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(arguments.rounds):
        for name, options in CONTENDERS.items():
            common = {"path": path, "patch": arguments.patch_size, "seconds": arguments.seconds}
            records[name].append(in_fresh_process("sample", TASKS, **common, **options))
    amplified = in_fresh_process("amplification", TASKS, path=path, patch=arguments.patch_size)["amplification"]
    if arguments.json:
        print(json.dumps({"amplification": amplified, "rounds": records}, indent=1))
        return
    print(f"{arguments.size}^3, float32 and uint8, chunks {arguments.chunk}^3, patches {arguments.patch_size}^3; "
          f"medians of {arguments.rounds} rounds\n")  # fmt: skip
    rows = [
        [
            name,
            f"{_median(rounds, 'rate'):.1f}",
            f"{min(r['rate'] for r in rounds):.1f}-{max(r['rate'] for r in rounds):.1f}",
            f"{_median(rounds, 'first'):.2f}",
            f"{_median(rounds, 'peak') / MIB:.0f}",
        ]
        for name, rounds in records.items()
    ]
    print(table(["", "patches/s", "range", "first s", "added MiB"], rows))
    print("\n" + table(["patches drawn together", "chunk bytes read per patch byte"],
                       [[together, f"{factor:.1f}"] for together, factor in amplified.items()]))  # fmt: skip


def _median(rounds: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(r[key] for r in rounds))
