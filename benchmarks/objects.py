"""Labels of connected components beside a copy of the same volume, and of a sparse volume with very many objects."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.measure import MIB, in_fresh_process, table
from benchmarks.peers import python_of

MODULE, PEER_MODULE = "benchmarks.objects_tasks", "benchmarks.object_peer_tasks"
KINDS = {"scores": "scores, float32", "mask": "mask, uint8", "labels": "labels, uint32, per class"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--size", type=int, default=512, help="edge of the volume in voxels; 0: none")
    parser.add_argument("--chunk", type=int, default=64, help="edge of its chunks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sparse", type=int, default=0, help="edge of a sparse volume; 0: none; 2560: 64 GiB of float32"
    )
    parser.add_argument("--objects", type=int, default=10_000_000, help="objects in it")
    parser.add_argument("--max-memory", default="1GiB")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="what `peers --make-environment` made; else no peers")


def run(arguments: argparse.Namespace) -> None:
    """Copy and label volumes in turn; then label a sparse one."""
    folder, results = str(arguments.directory), {}
    for kind in KINDS if arguments.size else ():
        job: dict[str, Any] = {"folder": folder, "kind": kind, "workers": arguments.workers or 2}
        in_fresh_process("make", MODULE, folder=folder, kind=kind, size=arguments.size, chunk=arguments.chunk)
        threshold = {"threshold": 0.8 if kind == "scores" else None}
        contenders: dict[str, tuple[str, dict[str, Any]]] = {"label": (MODULE, {})}
        if arguments.peers is not None and kind != "labels":  # it has no classes
            python = python_of(arguments.peers, "objects").absolute()
            contenders["dask_image"] = (PEER_MODULE, {"python": python, **threshold})
        rounds: list[dict[str, float]] = []
        for _ in range(arguments.rounds):
            copied = in_fresh_process("copy", MODULE, **job)
            figures = {"copy": copied["wall"], "copy cpu": copied["cpu"]}
            for name, (module, more) in contenders.items():
                used = in_fresh_process(name, module, **job, **more)
                figures |= {name: used["wall"] / copied["wall"], f"{name} cpu": used["cpu"] / copied["cpu"]}
            rounds.append(figures)
        results[kind] = {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}
    if arguments.sparse:
        in_fresh_process("make_sparse", MODULE, folder=folder, size=arguments.sparse, count=arguments.objects)
        limit = {"max_memory": arguments.max_memory, "workers": arguments.workers or 2}
        results["sparse"] = in_fresh_process("label_sparse", MODULE, folder=folder, **limit)
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    rows = [
        [
            KINDS[kind],
            f"{figures['copy']:.2f}",
            f"{figures['label']:.2f}",
            f"{figures['label cpu']:.2f}",
            f"{figures['dask_image']:.2f}" if "dask_image" in figures else "",
        ]
        for kind, figures in results.items()
        if kind in KINDS
    ]
    if rows:
        print(table(["volume", "copy s", "label, times the copy", "in CPU time", "dask-image"], rows))
    if sparse := results.get("sparse"):
        print(table(["objects", "wall s", "cpu s", "added MiB"], [
            [f"{sparse['objects']:,}", f"{sparse['wall']:.0f}", f"{sparse['cpu']:.0f}", f"{sparse['peak'] / MIB:.0f}"]
        ]))  # fmt: skip
