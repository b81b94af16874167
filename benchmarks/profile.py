"""Where the time of one run goes: functions of the main thread, and what each thread was doing."""

from __future__ import annotations

import argparse
import collections
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.measure import in_fresh_process, run_options, table

TASKS = "benchmarks.tasks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--size", type=int, default=512, help="edge of the cube in voxels")
    parser.add_argument("--chunk", type=int, default=64, help="edge of a chunk in voxels")
    parser.add_argument("--patch-overlap", type=int, default=48)
    parser.add_argument("--max-memory", default="1GiB")
    parser.add_argument("--top", type=int, default=25, help="how many functions to list")
    parser.add_argument("--native", action="store_true", help="py-spy: look into C and C++ as well")


def run(arguments: argparse.Namespace) -> None:
    """Run once under cProfile and once under a sampler, and print both."""
    source, target = str(arguments.directory / "random.zarr"), str(arguments.directory / "result.zarr")
    in_fresh_process("make_random", "benchmarks.sources", path=source, size=arguments.size, chunk=arguments.chunk)
    options = run_options(arguments)
    profiled = in_fresh_process(
        "predict_under_profile", TASKS, source=source, target=target, options=options, top=arguments.top
    )
    threads = _threads(arguments, source=source, target=target, options=options)
    if arguments.json:
        print(json.dumps({**profiled, "threads": threads}, indent=1))
        return
    print(f"main thread, {profiled['wall']:.2f} s under cProfile\n")
    print(table(["function", "calls", "own s", "with callees s"], [
        [row["function"], str(row["calls"]), f"{row['own']:.3f}", f"{row['with_callees']:.3f}"]
        for row in profiled["functions"]
    ]))  # fmt: skip
    for name, places in threads.items():
        total = sum(places.values())
        print(f"\n{name}: {total} samples")
        for place, samples in list(places.items())[:10]:
            print(f"  {samples / total:5.1%}  {place}")


def _threads(arguments: argparse.Namespace, **task: Any) -> dict[str, dict[str, int]]:
    """Samples per thread and innermost function, the most frequent first."""
    stacks = arguments.directory / "stacks.txt"
    if shutil.which("py-spy") is not None:
        spied = in_fresh_process("predict_under_py_spy", TASKS, stacks=str(stacks), native=arguments.native, **task)
        if spied["attached"]:
            return _read_stacks(stacks)
    record = in_fresh_process("predict_under_sampler", TASKS, **task)
    return {name: _sorted(places) for name, places in record["threads"].items()}


def _read_stacks(file: Path) -> dict[str, dict[str, int]]:
    """Read py-spy's raw format: `thread;outer;...;inner count` per line."""
    threads: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for line in file.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [frame for frame in stack.split(";") if not frame.startswith("process ")]
        threads[frames[0]][frames[-1]] += int(count)
    ordered = sorted(threads.items(), key=lambda item: -sum(item[1].values()))
    return {name: _sorted(places) for name, places in ordered}


def _sorted(places: dict[str, int]) -> dict[str, int]:
    return dict(sorted(places.items(), key=lambda item: -item[1]))
