"""Many small volumes, from Python and from the command line, beside the network alone on the same patches."""

from __future__ import annotations

import argparse
import json

from benchmarks.measure import in_fresh_process, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--volumes", type=int, default=500, help="number of volumes of 64^3 voxels")
    parser.add_argument("--networks", nargs="+", default=["layers", "unet"], help="see benchmarks.models.network")
    parser.add_argument("--patch-overlap", type=int, default=16)
    parser.set_defaults(patch_size=32)


def run(arguments: argparse.Namespace) -> None:
    """Make the volumes, predict over them in each way, and print the time for each volume."""
    folder = str(arguments.directory)
    in_fresh_process("make_volumes", "benchmarks.many_tasks", folder=folder, count=arguments.volumes)
    records = []
    for model in arguments.networks:
        job = {"folder": folder, "model": model, "patch": arguments.patch_size, "overlap": arguments.patch_overlap}
        for task in ("one_call", "side_by_side", "python", "command_line"):
            record = in_fresh_process(task, "benchmarks.many_tasks", **job)
            records.append({"network": model, "who": task.replace("_", " "), "volumes": arguments.volumes, **record})
    if arguments.json:
        print(json.dumps(records, indent=1))
        return
    rows = []
    for r in records:
        alone = [a for a in records if a["network"] == r["network"]][:2]
        times = [f"{r[kind] / min(a[kind] for a in alone):.2f}" for kind in ("wall", "cpu")]
        rows.append([r["network"], r["who"], *(f"{1e3 * r[k] / r['volumes']:.0f}" for k in ("wall", "cpu")), *times])
    print(table(["network", "", "wall ms", "CPU ms", "times alone", "times its CPU"], rows))
