"""A 3-D U-Net over a volume on disk, against the same network on the same batches that lie on the device already."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from typing import Any

from benchmarks.measure import MIB, in_fresh_process, run_options, table

TARGET = 0.95
"""Share of the bare network's throughput that was aimed at."""

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "autocast": {"autocast": True},
    "channels last": {"autocast": True, "channels_last": True},
    "compiled": {"autocast": True, "channels_last": True, "compile": "default"},
    "graphs": {"autocast": True, "channels_last": True, "compile": "reduce-overhead"},
}
"""What the network alone and `predict` are both told."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--side", type=int, default=1024, help="edge of the volume in voxels")
    parser.add_argument("--chunk", type=int, default=64, help="edge of a chunk in voxels")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="of the volume")
    parser.add_argument("--width", type=int, default=32, help="channels of the network's first level")
    parser.add_argument("--patch-overlap", type=int, default=48)
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-memory", default="8GiB", help="in main memory")
    parser.add_argument("--rounds", type=int, default=3)


def run(arguments: argparse.Namespace) -> None:
    """Make a volume, run both in turn for each variant, and print what share of the throughput is left."""
    names = ("volume.zarr", "labels.zarr")
    source, target = (str(arguments.directory / name) for name in names)
    _task("make_volume", path=source, side=arguments.side, chunk=arguments.chunk, dtype=arguments.dtype)
    job = {"source": source, "width": arguments.width, "device": arguments.device}
    job |= {"patch": arguments.patch_size, "overlap": arguments.patch_overlap}
    options = run_options(arguments)
    options = {name: options[name] for name in ("max_memory", "workers", "overlap_mode")}
    records: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for round_, variant, batch in itertools.product(range(arguments.rounds), arguments.variants, arguments.batch_size):
        settings = {**job, **VARIANTS[variant], "batch": batch}
        pair = {"bare": _task("bare", **settings), "ours": _task("ours", target=target, options=options, **settings)}
        pair["share"] = pair["ours"]["throughput"] / pair["bare"]["throughput"]
        records.setdefault((variant, batch), []).append(pair)
        print(f"round {round_ + 1}: {variant}, batches of {batch}: {pair['share']:.1%}", file=sys.stderr)
    if arguments.json:
        rounds = [{"variant": v, "batch_size": b, "rounds": pairs} for (v, b), pairs in records.items()]
        print(json.dumps({"side": arguments.side, "target": TARGET, "variants": rounds}, indent=1))
        return
    first = next(iter(records.values()))[0]["ours"]
    print(f"{first['device']}, {first['parameters'] / 1e6:.1f} M parameters, {arguments.side}^3 {arguments.dtype}, "
          f"{first['patches']} patches of {arguments.patch_size}^3, overlap {arguments.patch_overlap}; medians of "
          f"{arguments.rounds} rounds, aimed at {TARGET:.0%}\n")  # fmt: skip
    head = ["", "batch", "alone, patches/s", "oocpatch", "share", "range", "met", "device MiB", "planned",
            "memory MiB", "planned", "warm-up s", "other labels"]  # fmt: skip
    print(table(head, [[name, str(batch), *_cells(pairs)] for (name, batch), pairs in records.items()]))


def _cells(pairs: list[dict[str, Any]]) -> list[str]:
    shares = [pair["share"] for pair in pairs]
    bare, ours = ([pair[who]["throughput"] for pair in pairs] for who in ("bare", "ours"))
    runs = [pair["ours"] for pair in pairs]
    share = statistics.median(shares)
    return [
        f"{statistics.median(bare):.2f}",
        f"{statistics.median(ours):.2f}",
        f"{share:.1%}",
        f"{min(shares):.1%}-{max(shares):.1%}",
        "yes" if share >= TARGET else "no",
        f"{max(run['device_peak'] for run in runs) / MIB:.0f}" if runs[0]["device_peak"] else "-",
        f"{runs[0]['projected_device_memory'] / MIB:.0f}",
        f"{max(run['peak'] for run in runs) / MIB:.0f}",
        f"{runs[0]['projected_memory'] / MIB:.0f}",
        f"{statistics.median(run['warm_up'] for run in runs):.1f}",
        f"{max(run['unlike'] for run in runs):.1e}",
    ]


def _task(name: str, **arguments: Any) -> dict[str, Any]:
    return in_fresh_process(name, "benchmarks.gpu_tasks", **arguments)
