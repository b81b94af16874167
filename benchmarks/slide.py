"""A whole slide: RGB, masked, three classes, argmax; time beside a plain copy, memory, and whether it is right."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

import oocpatch
from benchmarks.measure import MIB, RESULT, in_fresh_process, measured, table
from benchmarks.sources import CHUNK, COLOURS, tile
from benchmarks.tasks import copy


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
    return in_fresh_process(name, "benchmarks.slide", **arguments)


def make_slide(path: str, mask: str, size: int) -> dict[str, Any]:
    """A disc of tissue with nuclei in it; what lies outside is not stored and reads as background."""
    slide = zarr.create_array(
        path, shape=(size, size, 3), chunks=(CHUNK, CHUNK, 3), dtype="uint8", dimension_names=("y", "x", "c"),
        fill_value=int(COLOURS[0, 0]), overwrite=True,
    )  # fmt: skip
    low = -(-size // 32)
    centre, radius = low / 2, low / 4
    y, x = np.ogrid[:low, :low]
    tissue = (y - centre) ** 2 + (x - centre) ** 2 < radius**2
    zarr.create_array(mask, data=tissue, chunks=(CHUNK, CHUNK), dimension_names=("y", "x"), overwrite=True)
    pattern = tile()
    step = CHUNK // 32
    for i in range(0, low, step):
        for j in range(0, low, step):
            if tissue[i : i + step, j : j + step].any():
                box = tuple(slice(a * 32, min(a * 32 + CHUNK, size)) for a in (i, j))
                slide[box] = pattern[tuple(slice(0, s.stop - s.start) for s in box)]
    return {"tissue": float(tissue.mean())}


def copy_slide(source: str, target: str, options: dict[str, Any]) -> dict[str, Any]:
    """The yardstick."""
    del options
    return copy(source, target, 4)


def segment(source: str, target: str, options: dict[str, Any]) -> dict[str, Any]:
    """A network that knows the colours, at two convolutions a pixel."""
    called = [0]
    colours = torch.from_numpy(COLOURS).float()
    scores = torch.nn.Conv2d(3, 3, 1)  # |x - c|^2 is smallest where 2 c x - |c|^2 is largest
    scores.weight.data = 2 * colours[:, :, None, None]
    scores.bias.data = -(colours**2).sum(1)
    scores.register_forward_hook(lambda *_: called.__setitem__(0, called[0] + 1))
    with measured() as usage:
        plan = oocpatch.plan(
            source, scores, target, axes="yxc", postprocess="argmax", overwrite=True, progress=False, **options
        )
        result = plan.run()
    return {
        **vars(usage),
        "patches": plan.patches,
        "called": called[0] - 1,  # the probe
        "uncovered": result.attrs.get("uncovered_voxels", 0),
        "wrong": _wrong(source, Path(target) / "prediction", options["mask"]),
    }


def _wrong(source: str, target: Path, mask: str | None) -> int:
    """Pixels of the tissue whose class is not that of the nearest colour."""
    slide, labels = zarr.open_array(source, mode="r"), zarr.open_array(target, mode="r")
    tissue = None if mask is None else zarr.open_array(mask, mode="r")[...]
    wrong = 0
    for i in range(math.ceil(slide.shape[0] / CHUNK)):
        rows = slice(i * CHUNK, min((i + 1) * CHUNK, slide.shape[0]))
        columns = slice(slide.shape[1] // 2, min(slide.shape[1] // 2 + 4 * CHUNK, slide.shape[1]))
        pixels = np.asarray(slide[rows, columns], np.int32)
        expected = np.argmin(((pixels[:, :, None] - COLOURS.astype(np.int32)) ** 2).sum(-1), axis=-1)
        differs = np.asarray(labels[0, rows, columns]) != expected
        if tissue is not None:
            inside = np.repeat(np.repeat(tissue[rows.start // 32 :, columns.start // 32 :][:17, :66], 32, 0), 32, 1)
            shift = columns.start % 32
            differs &= inside[: differs.shape[0], shift : shift + differs.shape[1]]
        wrong += int(differs.sum())
    return wrong


TASKS = {task.__name__: task for task in (make_slide, copy_slide, segment)}

if __name__ == "__main__":
    print(RESULT + json.dumps(TASKS[sys.argv[1]](**json.loads(sys.argv[2]))))
