"""Objects of a model joined over patches: touching convex cells, which no object may split or merge."""

from __future__ import annotations

import argparse
import json

from benchmarks.measure import MIB, in_fresh_process, table

TASKS = "benchmarks.instances_tasks"

CASES = {"2d": ([4096, 4096], 20_000, 256, 64), "3d": ([512, 512, 512], 10_000, 96, 40)}
"""Shape, number of cells, patch and overlap, which is longer than a cell."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--shrink", type=int, default=1, help="divide the sides of the volumes")


def run(arguments: argparse.Namespace) -> None:
    """Join cells whose boundaries are right, and cells whose boundaries are a voxel wrong in every patch."""
    results = []
    for name in arguments.cases:
        shape, cells, patch, overlap = CASES[name]
        shape = [n // arguments.shrink for n in shape]
        path, output = str(arguments.directory / f"{name}.zarr"), str(arguments.directory / f"{name}-joined.zarr")
        in_fresh_process(
            "make_cells", TASKS, path=path, shape=shape, cells=cells // arguments.shrink ** len(shape), chunk=128
        )
        for perturbed in (False, True):
            options = {"patch": patch, "overlap": overlap, "perturbed": perturbed, "workers": arguments.workers}
            joined = in_fresh_process("join", TASKS, path=path, output=output, **options)
            results.append({"shape": shape, "perturbed": perturbed, **joined})
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    rows = [
        [
            " x ".join(map(str, r["shape"])),
            "a voxel wrong" if r["perturbed"] else "right",
            f"{r['cells']:,}",
            f"{r['objects']:,}",
            f"{r['split']:,}",
            f"{r['merged']:,}",
            f"{r['wall']:.1f} s",
            f"{r['peak'] / MIB:.0f} MiB",
        ]
        for r in results
    ]
    print(table(["volume", "boundaries", "cells", "objects", "split", "merged", "time", "memory"], rows))
