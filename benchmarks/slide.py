"""A whole slide: RGB, masked, three classes, argmax; time beside a plain copy, memory, and whether it is right."""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.measure import MIB, in_fresh_process, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--size", type=int, default=60000, help="edge of the slide in pixels")
    parser.add_argument("--patch-overlap", type=int, default=128)
    parser.add_argument("--max-memory", default="768MiB")
    parser.set_defaults(patch_size=512)


def run(arguments: argparse.Namespace) -> None:
    """Make a slide, copy it, segment it inside its tissue mask and without one."""
    names = ("slide.zarr", "mask.zarr", "copy_slide.zarr", "segment.zarr")
    here = {name: str(arguments.directory / name) for name in names}
    made = _task("make_slide", path=here["slide.zarr"], mask=here["mask.zarr"], size=arguments.size)
    rows, records = [], {"slide": made}
    for name, task, mask in (("copy, 4 threads", "copy_slide", None), ("oocpatch, mask", "segment", here["mask.zarr"])):
        options = {
            "patch_size": arguments.patch_size,
            "patch_overlap": arguments.patch_overlap,
            "overlap_mode": arguments.overlap_mode,
            "max_memory": arguments.max_memory,
            "workers": arguments.workers,
            "mask": mask,
        }
        record = _task(task, source=here["slide.zarr"], target=here[f"{task}.zarr"], options=options)
        records[name] = record
        counts = [str(record.get(key, "-")) for key in ("patches", "called", "wrong")]
        rows.append([name, f"{record['wall']:.1f}", f"{record['cpu']:.1f}", f"{record['peak'] / MIB:.0f}", *counts])
    if arguments.json:
        print(json.dumps(records, indent=1))
        return
    print(f"{arguments.size}^2 RGB, {made['tissue']:.0%} of it tissue, patches {arguments.patch_size}^2\n")
    print(table(["", "wall s", "CPU s", "peak MiB", "patches", "computed", "wrong pixels"], rows))


def _task(name: str, **arguments: Any) -> dict[str, Any]:
    return in_fresh_process(name, "benchmarks.slide_tasks", **arguments)
