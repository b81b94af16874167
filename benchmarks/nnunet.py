"""A U-Net of nnU-Net beside nnU-Net's own predictor: time in turns, memory, and a scan with many labels under a limit.

Both have the same environment, threads and huge pages; the network calls are those of half-overlapping patches.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.measure import MIB, TaskFailed, in_fresh_process, table
from benchmarks.peers import python_of

MODULE = "benchmarks.nnunet_tasks"
LIMITED = {"patch": 32, "width": 8}
"""Patch size and width of the network over the scan with many labels, a small one, since scores are what counts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--peers", type=Path, metavar="DIR", required=True, help="from `peers --make-environment`")
    parser.add_argument("--side", type=int, default=128, help="edge of the scan in voxels; 0: no times")
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--width", type=int, default=24, help="channels of the first of four stages")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mirroring", choices=("on", "off", "both"), default="both")
    parser.add_argument("--max-memory", default="1GiB", help="of oocpatch, where times are compared")
    parser.add_argument("--limit", default="270MiB", help="what both may add over the scan with many labels")
    parser.add_argument("--limit-side", type=int, default=192, help="edge of that scan; 0: none")
    parser.add_argument("--limit-classes", type=int, default=40, help="its labels: 1080 MiB of scores in float32")
    parser.set_defaults(patch_size=64)


def run(arguments: argparse.Namespace) -> None:
    """Take turns with and without mirroring; then let both predict under a limit of memory."""
    results: dict[str, Any] = {}
    mirroring = {"on": [True], "off": [False], "both": [False, True]}[arguments.mirroring]
    for mirrored in mirroring if arguments.side else ():
        made = _task(arguments, "make", side=arguments.side, classes=arguments.classes, **_network(arguments))
        job = {"mirroring": mirrored, "threads": arguments.threads, "limit": None}
        rounds = []
        for _ in range(arguments.rounds):
            theirs = _task(arguments, "theirs", **job)
            ours = _task(arguments, "ours", max_memory=arguments.max_memory, **job)
            rounds.append({"theirs": theirs, "ours": ours})
        results[f"mirroring {'on' if mirrored else 'off'}"] = {**made, "rounds": rounds}
    if arguments.limit_side:
        side, classes = arguments.limit_side, arguments.limit_classes
        _task(arguments, "make", side=side, classes=classes, **LIMITED)
        job = {"mirroring": False, "threads": arguments.threads}
        under = results["limit"] = {"scores": 4 * classes * side**3}
        under["nnU-Net, no limit"] = _task(arguments, "theirs", **job, limit=None)
        for who, name, more in (("oocpatch", "ours", {"max_memory": arguments.limit}), ("nnU-Net", "theirs", {})):
            try:
                under[who] = _task(arguments, name, **job, limit=arguments.limit, **more)
            except TaskFailed as failure:
                under[who] = str(failure)
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    _print(results, arguments)


def _network(arguments: argparse.Namespace) -> dict[str, int]:
    return {"patch": arguments.patch_size, "width": arguments.width}


def _task(arguments: argparse.Namespace, name: str, **more: Any) -> dict[str, Any]:
    python = python_of(arguments.peers, "nnunet").absolute()
    return in_fresh_process(name, MODULE, python=python, folder=str(arguments.directory.absolute()), **more)


def _print(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    under, rows = results.pop("limit", None), []
    for name, record in results.items():
        for who, label in (("theirs", "nnU-Net"), ("ours", "oocpatch")):
            runs = [turn[who] for turn in record["rounds"]]
            cells = [statistics.median(run[key] for run in runs) for key in ("wall", "cpu")]
            planned = f" of {runs[0]['projected'] / MIB:.0f}" if "projected" in runs[0] else ""
            ratios = [[turn[who][key] / turn["theirs"][key] for turn in record["rounds"]] for key in ("wall", "cpu")]
            rows.append([
                f"{name}, {label}", *(f"{seconds:.1f}" for seconds in cells),
                *(f"{statistics.median(ratio):.2f}" for ratio in ratios),
                f"{max(run['peak'] for run in runs) / MIB:.0f}{planned}",
                f"{runs[0]['differ']:.3%}" if "differ" in runs[0] else "",
            ])  # fmt: skip
        print(f"{arguments.side}^3, {arguments.classes} labels, {record['parameters'] / 1e6:.1f} million parameters, "
              f"{record['rounds'][0]['ours']['patches']} patches of {arguments.patch_size}^3")  # fmt: skip
    if rows:
        print(table(["", "wall s", "CPU s", "wall / theirs", "CPU / theirs", "added MiB", "labels differ"], rows))
    if under:
        print(f"{arguments.limit_side}^3, {under.pop('scores') / MIB:.0f} MiB of scores, at most {arguments.limit}:")
        for who, record in under.items():
            if isinstance(record, str):
                print(f"  {who}: {record}")
                continue
            planned = f" of {record['projected'] / MIB:.0f} planned" if "projected" in record else ""
            print(f"  {who}: done in {record['wall']:.0f} s, added {record['peak'] / MIB:.0f} MiB{planned}")
