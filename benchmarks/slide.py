"""A whole slide: RGB, masked, three classes, argmax; time beside a plain copy, memory, and whether it is right.

With `--vectors` an encoder gives a vector per patch of the tissue: patches per second, and those of the encoder alone.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.measure import MIB, in_fresh_process, run_options, table
from benchmarks.sources import CHUNK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--size", type=int, default=60000, help="edge of the slide in pixels")
    parser.add_argument("--patch-overlap", type=int, default=128)
    parser.add_argument("--max-memory", default="768MiB")
    parser.add_argument("--vectors", action="store_true", help="a vector per patch of 224^2, without overlap")
    parser.add_argument("--light", action="store_true", help="five convolutions in place of a ResNet-50")
    parser.add_argument("--batch-size", type=int, default=32, help="patches per call of the encoder")
    parser.set_defaults(patch_size=512)


def run(arguments: argparse.Namespace) -> None:
    """Make a slide, copy it, segment it inside its tissue mask and without one."""
    names = ("slide.zarr", "mask.zarr", "copy_slide.zarr", "segment.zarr")
    here = {name: str(arguments.directory / name) for name in names}
    made = _task("make_slide", path=here["slide.zarr"], mask=here["mask.zarr"], size=arguments.size)
    if arguments.vectors:
        _encode(arguments, here)
        return
    job = {"source": here["slide.zarr"], "patch": arguments.patch_size, "overlap": arguments.patch_overlap}
    job |= {"target": here["copy_slide.zarr"], "chunk": CHUNK, "model": "two", "compare": False}
    options = {**run_options(arguments), "mask": here["mask.zarr"]}
    records = {
        "slide": made,
        "copy, 4 threads": in_fresh_process("zarr_python", "benchmarks.copies", threads=4, **job),
        "oocpatch, mask": _task("segment", source=here["slide.zarr"], target=here["segment.zarr"], options=options),
    }
    if arguments.json:
        print(json.dumps(records, indent=1))
        return
    print(f"{arguments.size}^2 RGB, {made['tissue']:.0%} of it tissue, patches {arguments.patch_size}^2\n")
    rows = [
        [name, f"{record['wall']:.1f}", f"{record['cpu']:.1f}", f"{record['peak'] / MIB:.0f}",
         *(str(record.get(key, "-")) for key in ("patches", "called", "wrong"))]
        for name, record in list(records.items())[1:]
    ]  # fmt: skip
    print(table(["", "wall s", "CPU s", "peak MiB", "patches", "computed", "wrong pixels"], rows))


def _encode(arguments: argparse.Namespace, here: dict[str, str]) -> None:
    """Encode the patches of the tissue, and some from memory before and after it, in processes of their own."""
    options = {"max_memory": arguments.max_memory, "workers": arguments.workers, "mask": here["mask.zarr"]}
    options |= {"batch_size": arguments.batch_size}
    alone = {"light": arguments.light, "batch_sizes": sorted({4, 8, arguments.batch_size}), "patches": 256}
    before = _task("encoder_alone", **alone)
    record = _task(
        "encode", source=here["slide.zarr"], target=here["segment.zarr"], light=arguments.light, options=options
    )
    after = _task("encoder_alone", **alone)
    wall, cpu = ((before[kind] + after[kind]) / 2 for kind in ("wall", "cpu"))
    record |= {"rate": record["patches"] / record["wall"], "bare": 1 / wall, "before": before, "after": after}
    record["cpu share"] = cpu * record["patches"] / record["cpu"]
    if arguments.json:
        print(json.dumps(record, indent=1))
        return
    share, peak, planned = record["rate"] / record["bare"], record["peak"] / MIB, record["planned"] / MIB
    print(f"{record['patches']:,} patches of 224^2: {record['rate']:.1f} per second, {peak:.0f} MiB of {planned:.0f}")
    ways = " and ".join(f"{way['calls']} at a time with {way['batch']} patches" for way in (before, after))
    print(f"the encoder alone: {record['bare']:.1f} per second, {ways}; the run has {share:.1%} of it")
    print(f"{record['cpu share']:.1%} of the run's CPU time is the encoder's")


def _task(name: str, **arguments: Any) -> dict[str, Any]:
    return in_fresh_process(name, "benchmarks.slide_tasks", **arguments)
