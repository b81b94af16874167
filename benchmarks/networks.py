"""Memory of published architectures: promised and added, and the time and memory of their plans."""

from __future__ import annotations

import argparse
import json

from benchmarks.architectures import ARCHITECTURES
from benchmarks.measure import MIB, in_fresh_process, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--networks", nargs="+", default=list(ARCHITECTURES), metavar="WORD", help="words of names")
    parser.add_argument("--max-memory", nargs="+", help="instead of the limits of each network")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--batch-size", type=int, default=1)


def run(arguments: argparse.Namespace) -> None:
    """Plan and run one network after the other, each in a fresh process, and print what it added."""
    records = []
    for name, architecture in ARCHITECTURES.items():
        if not any(word.lower() in name.lower() for word in arguments.networks):
            continue
        for limit in arguments.max_memory or architecture.limits:
            options = {"threads": arguments.threads, "batch_size": arguments.batch_size, "max_memory": limit}
            task = {"name": name, "directory": str(arguments.directory), **options}
            record = in_fresh_process("run_network", "benchmarks.network_tasks", **task)
            records.append({"network": name, "max_memory": limit, **record})
    if arguments.json:
        print(json.dumps(records, indent=1))
        return
    print(table(["network", "limit", "planned MiB", "added MiB", "planned / added", "plan s", "plan MiB", "run s"], [
        [r["network"], r["max_memory"], *(
            ["refused", "", ""] if "refused" in r else
            [f"{r['projected'] / MIB:.0f}", f"{r['peak'] / MIB:.0f}", f"{r['projected'] / r['peak']:.2f}"]
        ), f"{r['planning']:.2f}", f"{r['planning_peak'] / MIB:.0f}", f"{r.get('wall', 0):.1f}"]
        for r in records
    ]))  # fmt: skip
    for record in records:
        if "refused" in record:
            print(f"{record['network']}, {record['max_memory']}: {record['refused']}")
