"""Memory that a run, or an export, adds over volumes of growing size, against its limit and what the plan promised."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from typing import Any

from benchmarks.measure import MIB, bytes_of, in_fresh_process, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--gib", nargs="+", type=float, default=[1, 4, 16, 64], help="sizes of the volume")
    parser.add_argument("--chunk", type=int, default=64, help="edge of a chunk in voxels")
    parser.add_argument("--patch-overlap", type=int, default=24)
    parser.add_argument("--max-memory", nargs="+", default=["256MiB"])
    parser.add_argument("--export", nargs="+", metavar="SUFFIX", help="export to such files, such as .nii.gz .ome.tif")
    parser.add_argument("--read", action="store_true", help="convert each exported file back to Zarr")


def run(arguments: argparse.Namespace) -> None:
    """Predict over one sparse volume after the other, or export it, and print what each run added."""
    if arguments.export:
        _run_exports(arguments)
        return
    records = []
    for gib in arguments.gib:
        source, target = str(arguments.directory / "sparse.zarr"), str(arguments.directory / "result.zarr")
        shape = _shape(gib, arguments.chunk)
        made = in_fresh_process("make_sparse", "benchmarks.sources", path=source, shape=shape, chunk=arguments.chunk)
        for limit in arguments.max_memory:
            job = {"source": source, "target": target, "patch": arguments.patch_size, "chunk": arguments.chunk}
            job |= {"overlap": arguments.patch_overlap, "compare": False}
            options = {"overlap_mode": arguments.overlap_mode, "max_memory": limit, "workers": arguments.workers}
            record = in_fresh_process("predict", "benchmarks.ours", **job, **options)
            records.append({"shape": shape, "bytes": made["bytes"], "max_memory": bytes_of(limit), **record})
    if arguments.json:
        print(json.dumps(records, indent=1))
        return
    print(table(["volume", "GiB", "limit MiB", "projected MiB", "added MiB", "kept", "blocks", "wall s"], [
        ["x".join(map(str, r["shape"])), f"{r['bytes'] / 1024 / MIB:.2f}", f"{r['max_memory'] / MIB:.0f}",
         f"{r['projected_memory'] / MIB:.0f}", f"{r['peak'] / MIB:.0f}",
         "yes" if r["peak"] <= r["projected_memory"] <= r["max_memory"] else "NO", str(r["blocks"]), f"{r['wall']:.1f}"]
        for r in records
    ]))  # fmt: skip


def _run_exports(arguments: argparse.Namespace) -> None:
    """Export one volume of stored chunks after the other, and print what each export added."""
    records = []
    for gib in arguments.gib:
        source, shape = str(arguments.directory / f"{gib:g}.zarr"), _shape(gib, arguments.chunk)
        made = in_fresh_process("make_repeated", "benchmarks.sources", path=source, shape=shape, chunk=arguments.chunk)
        for suffix, limit in itertools.product(arguments.export, arguments.max_memory):
            job = {"source": source, "target": str(arguments.directory / f"out{suffix}"), "max_memory": limit}
            job |= {"chunk": arguments.chunk, "read": arguments.read}
            record = in_fresh_process("export", "benchmarks.ours", **job)
            records.append({"file": suffix, "bytes": made["bytes"], "max_memory": bytes_of(limit), **record})
    if arguments.json:
        print(json.dumps(records, indent=1))
        return
    print(table(["file", "GiB", "limit MiB", "added MiB", "kept", "file MiB", "wall s", "cpu s",
                 *(["read MiB", "kept", "read s", "read cpu s"] if arguments.read else [])], [
        [r["file"], f"{r['bytes'] / 1024 / MIB:g}", f"{r['max_memory'] / MIB:.0f}", *_kept(r, ""),
         f"{r['size'] / MIB:.0f}", f"{r['wall']:.0f}", f"{r['cpu']:.0f}",
         *([*_kept(r, "read_"), f"{r['read_wall']:.0f}", f"{r['read_cpu']:.0f}"] if arguments.read else [])]
        for r in records
    ]))  # fmt: skip


def _kept(record: dict[str, Any], prefix: str) -> tuple[str, str]:
    """Say what was added, and whether the limit was kept."""
    peak = record[f"{prefix}peak"]
    return f"{peak / MIB:.0f}", "yes" if peak <= record["max_memory"] else "NO"


def _shape(gib: float, chunk: int) -> list[int]:
    """A box of whole chunks, as close to a cube as doubling gets: 1 GiB is 512 x 512 x 1024."""
    voxels = gib * (1 << 30) / 4
    shape = [chunk] * 3
    while math.prod(shape) * 2 <= voxels:
        shape[2 - (shape[::-1].index(min(shape)))] *= 2
    return shape
