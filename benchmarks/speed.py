"""Wall time of the identity network over a random cube, against a plain copy of the same chunks."""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from benchmarks.measure import MIB, in_fresh_process, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--size", type=int, default=512, help="edge of the cube in voxels")
    parser.add_argument("--chunk", type=int, default=64, help="edge of a chunk in voxels")
    parser.add_argument("--patch-overlap", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-memory", nargs="+", default=["256MiB", "1GiB"])
    parser.add_argument("--copy-threads", nargs="+", type=int, default=[2, 4])


def run(arguments: argparse.Namespace) -> None:
    """Measure all contenders in turn, round by round, and print the medians."""
    source, target = str(arguments.directory / "random.zarr"), str(arguments.directory / "result.zarr")
    in_fresh_process("make_random", "benchmarks.sources", path=source, size=arguments.size, chunk=arguments.chunk)
    job = {"source": source, "target": target, "patch": arguments.patch_size, "overlap": arguments.patch_overlap}
    contenders: dict[str, tuple[str, str, dict[str, Any]]] = {
        f"copy, {threads} threads": ("zarr_python", "benchmarks.copies", {"threads": threads})
        for threads in arguments.copy_threads
    }
    for limit in arguments.max_memory:
        options = {"max_memory": limit, "overlap_mode": arguments.overlap_mode, "workers": arguments.workers}
        contenders[f"oocpatch, {limit}"] = ("predict", "benchmarks.ours", options)
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, (task, module, options) in contenders.items():
            records[name].append(in_fresh_process(task, module, chunk=arguments.chunk, **job, **options))
    summary = {name: _summary(rounds) for name, rounds in records.items()}
    best = min(entry["wall"] for name, entry in summary.items() if name.startswith("copy"))
    for entry in summary.values():
        entry["ratio"] = entry["wall"] / best
    if arguments.json:
        print(json.dumps({"size": arguments.size, "summary": summary, "rounds": records}, indent=1))
        return
    print(f"{arguments.size}^3 float32, chunks {arguments.chunk}^3, patches {arguments.patch_size}^3, overlap "
          f"{arguments.patch_overlap}, {arguments.overlap_mode}; medians of {arguments.rounds} rounds\n")  # fmt: skip
    rows = [[name, *_cells(entry)] for name, entry in summary.items()]
    print(table(["", "wall s", "range", "CPU s", "peak MiB", "projected", "max error", "x copy"], rows))


def _cells(entry: dict[str, float]) -> list[str]:
    return [
        f"{entry['wall']:.2f}",
        f"{entry['fastest']:.2f}-{entry['slowest']:.2f}",
        f"{entry['cpu']:.2f}",
        f"{entry['peak'] / MIB:.0f}",
        f"{entry['projected_memory'] / MIB:.0f}" if entry["projected_memory"] else "-",
        f"{entry['error']:.1e}",
        f"{entry['ratio']:.2f}",
    ]


def _summary(rounds: list[dict[str, Any]]) -> dict[str, float]:
    walls = [record["wall"] for record in rounds]
    return {
        "wall": statistics.median(walls),
        "fastest": min(walls),
        "slowest": max(walls),
        "cpu": statistics.median(record["cpu"] for record in rounds),
        "peak": max(record["peak"] for record in rounds),
        "projected_memory": rounds[0].get("projected_memory", 0),
        "error": max(record["error"] for record in rounds),
    }
