"""What it costs that the disk has the ledger when a block counts as done, and the output when it counts as complete."""

from __future__ import annotations

import argparse
import json

from benchmarks.measure import MIB, in_fresh_process, run_options, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512], help="edges of the volumes in voxels")
    parser.add_argument("--chunk", type=int, default=64, help="edge of a chunk in voxels")
    parser.add_argument("--patch-overlap", type=int, default=48)


def run(arguments: argparse.Namespace) -> None:
    """Predict over one volume after the other, and print how long each run waited for the disk."""
    records = []
    for size in arguments.sizes:
        source, target = str(arguments.directory / "random.zarr"), str(arguments.directory / "result.zarr")
        in_fresh_process("make_random", "benchmarks.sources", path=source, size=size, chunk=arguments.chunk)
        task = {"source": source, "target": target, "options": run_options(arguments)}
        record = in_fresh_process("predict_timing_the_disk", "benchmarks.tasks", **task)
        records.append({"size": size, **record})
    if arguments.json:
        print(json.dumps(records, indent=1))
        return
    print(table(["edge", "files", "MiB", "wall s", "flush s", "fsyncs", "fsync s"], [
        [str(r["size"]), str(r["files"]), f"{r['bytes'] / MIB:.0f}", f"{r['wall']:.2f}", f"{sum(r['flush']):.3f}",
         str(r["fsyncs"]), f"{sum(r['fsync']):.3f}"]
        for r in records
    ]))  # fmt: skip
