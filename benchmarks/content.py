"""What it costs to notice changes of the input: the stamps during a run, and the comparison when it is called again."""

from __future__ import annotations

import argparse
import json

from benchmarks.measure import MIB, in_fresh_process, run_options, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--size", type=int, default=512, help="edge of the volume in voxels")
    parser.add_argument("--chunk", type=int, default=64, help="edge of its chunks")
    parser.add_argument("--patch-overlap", type=int, default=48)
    parser.add_argument("--files", type=int, default=100, help="tiny chunks along each of three axes, to be compared")


def run(arguments: argparse.Namespace) -> None:
    """Predict over a volume, counting the seconds of stamps; then compare a volume of very many tiny chunks."""
    source, target = str(arguments.directory / "random.zarr"), str(arguments.directory / "result.zarr")
    in_fresh_process("make_random", "benchmarks.sources", path=source, size=arguments.size, chunk=arguments.chunk)
    task = {"source": source, "target": target, "options": run_options(arguments)}
    stamps = in_fresh_process("predict_timing_stamps", "benchmarks.tasks", **task)
    folder = str(arguments.directory / "tiny")
    compared = in_fresh_process("compare_tiny_chunks", "benchmarks.tasks", folder=folder, edge=arguments.files)
    if arguments.json:
        print(json.dumps({"stamps": stamps, "compared": compared}, indent=1))
        return
    print(table(["stamps of", "run cpu s", "stamps cpu s", "share", "ledger MiB"], [
        [f"{arguments.size}^3", f"{stamps['cpu']:.2f}", f"{stamps['stamps']:.3f}",
         f"{stamps['stamps'] / stamps['cpu']:.2%}", f"{stamps['ledger'] / MIB:.2f}"]
    ]))  # fmt: skip
    print(table(["compared", "wall s", "cpu s", "added MiB", "ledger MiB"], [
        [f"{compared['chunks']:,} chunks", f"{compared['wall']:.1f}", f"{compared['cpu']:.1f}",
         f"{compared['peak'] / MIB:.0f}", f"{compared['ledger'] / MIB:.2f}"]
    ]))  # fmt: skip
