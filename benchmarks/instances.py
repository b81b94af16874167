"""Objects of a model joined over patches: touching convex cells, which no object may split or merge."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.measure import MIB, TaskFailed, in_fresh_process, table
from benchmarks.peers import python_of

TASKS, PEER_TASKS = "benchmarks.instances_tasks", "benchmarks.object_peer_tasks"
PEERS: dict[str, tuple[str, dict[str, str]]] = {
    "patchworks, by touching": ("patchworks", {"stitch": "touch"}),
    "patchworks, by overlap": ("patchworks", {"stitch": "iou"}),
    "cellpose.distributed": ("cellpose", {}),
}
"""Task and options of each."""

CASES = {"2d": ([4096, 4096], 20_000, 256, 64), "3d": ([512, 512, 512], 10_000, 96, 40)}
"""Shape, number of cells, patch and overlap, which is longer than a cell."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--shrink", type=int, default=1, help="divide the sides of the volumes")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="what `peers --make-environment` made; else no peers")


def run(arguments: argparse.Namespace) -> None:
    """Join cells whose boundaries are right, and cells whose boundaries are a voxel wrong in every patch."""
    results = []
    for name in arguments.cases:
        shape, cells, patch, overlap = CASES[name]
        shape = [n // arguments.shrink for n in shape]
        path = str(arguments.directory / f"{name}.zarr")
        in_fresh_process(
            "make_cells", TASKS, path=path, shape=shape, cells=cells // arguments.shrink ** len(shape), chunk=128
        )
        for perturbed in (False, True):
            options = {"patch": patch, "overlap": overlap, "perturbed": perturbed, "workers": arguments.workers or 2}
            options |= {"path": path, "output": str(arguments.directory / f"{name}-joined.zarr")}
            facts = {"shape": shape, "perturbed": perturbed}
            results.append({**facts, "by": "oocpatch", **in_fresh_process("join", TASKS, **options)})
            for peer, (task, more) in PEERS.items() if arguments.peers is not None else ():
                options["output"] = str(arguments.directory / f"{name}-{task}-{len(results)}.zarr")
                python = python_of(arguments.peers, "objects").absolute()
                try:
                    joined = in_fresh_process(task, PEER_TASKS, python=python, **options, **more)
                except TaskFailed as failure:
                    joined = {"failure": str(failure)}
                results.append({**facts, "by": peer, **joined})
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    names = ["cells", "split", "merged"]
    rows = [
        [
            " x ".join(map(str, r["shape"])),
            "a voxel wrong" if r["perturbed"] else "right",
            r["by"],
            *([r["failure"], *[""] * 4] if "failure" in r else [f"{r[n]:,}" for n in names]),
            *([] if "failure" in r else [f"{r['wall']:.1f} s", f"{r['peak'] / MIB:.0f} MiB"]),
        ]
        for r in results
    ]
    print(table(["volume", "boundaries", "by", *names, "time", "memory"], rows))
