"""Tables of objects beside a copy of the same labels, and their memory where a sparse volume has very many objects."""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from benchmarks.measure import MIB, in_fresh_process, table

MODULE = "benchmarks.object_tables_tasks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--size", type=int, default=512, help="edge of the volume of touching cells in voxels")
    parser.add_argument("--chunk", type=int, default=64, help="edge of its chunks")
    parser.add_argument("--cell", type=int, default=12, help="edge of a cell")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sparse", type=int, default=0, help="edge of a sparse volume; 0: none; 2560: 64 GiB of uint32"
    )
    parser.add_argument("--objects", type=int, default=10_000_000, help="objects in it")
    parser.add_argument("--max-memory", default="1GiB")


def run(arguments: argparse.Namespace) -> None:
    """Copy labels and make tables of them in turn; then make one of a sparse volume."""
    folder = arguments.directory
    results: dict[str, Any] = {}
    if arguments.rounds:
        size = {"size": arguments.size, "chunk": arguments.chunk, "cell": arguments.cell}
        in_fresh_process("make_cells", MODULE, folder=str(folder), **size)
        job = {"folder": str(folder), "workers": arguments.workers or 2}
        rounds: list[dict[str, float]] = []
        for _ in range(arguments.rounds):
            times = {"copy": in_fresh_process("copy", MODULE, **job)["wall"]}
            for name in ("shape", "axes", "intensity"):
                times[name] = in_fresh_process("make_table", MODULE, kind=name, **job)["wall"] / times["copy"]
            rounds.append(times)
        results["times a copy"] = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    if arguments.sparse:
        sparse = {"folder": str(folder), "size": arguments.sparse, "count": arguments.objects}
        in_fresh_process("make_sparse", MODULE, **sparse)
        limit = {"max_memory": arguments.max_memory, "workers": arguments.workers or 2}
        results["sparse"] = in_fresh_process("make_sparse_table", MODULE, folder=str(folder), **limit)
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    if times := results.get("times a copy"):
        names = {"shape": "area, bbox, centroid", "axes": "with principal axes", "intensity": "with an image of uint16"}
        rows = [[names[n], f"{times[n]:.2f}"] for n in names]
        print(table(["table", "times a copy"], [*rows, ["the copy", f"{times['copy']:.2f} s"]]))
    if sparse := results.get("sparse"):
        print(table(["objects", "wall s", "cpu s", "added MiB"], [
            [f"{sparse['objects']:,}", f"{sparse['wall']:.0f}", f"{sparse['cpu']:.0f}", f"{sparse['peak'] / MIB:.0f}"]
        ]))  # fmt: skip
