"""Processes that run a loop over an aggregator: one says how much memory it added, others are there to be killed."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from oocpatch import PatchAggregator, PatchGrid, PatchLocation
from oocpatch.aggregation import aggregator as module
from tests.support.aggregation import values_at
from tests.support.memory_child import PeakSampler


def loop(shape: tuple[int, ...], patch: int, overlap: int, seed: int | None) -> list[PatchLocation]:
    """The patches of a grid, in its order or shuffled."""
    size, shared = (patch,) * len(shape), (overlap,) * len(shape)
    locations = list(PatchGrid.of(shape, size, shared))
    if seed is not None:
        random.Random(seed).shuffle(locations)
    return locations


def main(store: str, options: dict[str, Any]) -> None:
    """Do the loop whose log is named, else measure one."""
    if "log" in options:
        killed(store, options)
    else:
        measured(store, options)


def measured(store: str, options: dict[str, Any]) -> None:
    """Print `{"added", "files"}`: bytes at the peak, and the most tiles that had files in the workspace at a time."""
    shape, patch, overlap = tuple(options["shape"]), options["patch"], options["overlap"]
    tensor = torch.ones(1, 1, *[patch] * len(shape))
    with tempfile.TemporaryDirectory() as warm_up:
        # Imports on first use, thread pools and the like belong to the process and not to the loop.
        small = PatchAggregator((64,) * len(shape), options["mode"], 8, store=f"{warm_up}/out", output_chunks=32)
        for location in loop((64,) * len(shape), 32, 8, None):
            small.add_batch(tensor[(..., *[slice(32)] * len(shape))], [location])
        small.get_array()
    before = psutil.Process().memory_info().rss
    files = 0
    with PeakSampler() as sampler:
        aggregator = PatchAggregator(
            shape,
            options["mode"],
            overlap if options["known"] else 0,
            store=store,
            max_memory=options["max_memory"],
        )
        for i, location in enumerate(loop(shape, patch, overlap, options["seed"])):
            aggregator.add_batch(tensor, [location])
            if i % 16 == 0:
                files = max(files, len(list(Path(f"{store}.oocpatch").glob("*/tiles/*"))))
        array = aggregator.get_array()
    probes = [array[(0, *(slice(int(f * (n - 8)), int(f * (n - 8)) + 8) for n in shape))] for f in (0, 0.5, 1)]
    answer = {
        "added": sampler.peak - before,
        "files": files,
        "lowest": float(np.min(probes)),
        "highest": float(np.max(probes)),
    }
    sys.stdout.write(json.dumps(answer))


def killed(store: str, options: dict[str, Any]) -> None:
    """Add all patches that are not done, and finish; say on stdout when the first one is about to be added."""
    module.COMMIT_SECONDS = options["commit_seconds"]
    shape = tuple(options["shape"])
    aggregator = PatchAggregator(
        shape,
        options["mode"],
        options["overlap"],
        store=store,
        max_memory=options["max_memory"],
        output_chunks=options["chunks"],
    )
    done = Path(options["log"])
    known = {tuple(start) for start in json.loads(done.read_text())} if done.exists() else set()
    locations = loop(shape, options["patch"], options["overlap"], options["seed"])
    lost = [loc.index for loc in locations if loc.index in known and loc not in aggregator.done]
    if lost:
        raise AssertionError(f"lost {lost}")
    print("ready", flush=True)
    for location in locations:
        if options["skip"] and location in aggregator.done:
            continue
        values = values_at(location.index, location.size, 2, "float32")
        aggregator.add_batch(torch.from_numpy(values)[None], [location])
        time.sleep(options["pause"])
        aside = done.with_suffix(".new")
        aside.write_text(json.dumps([loc.index for loc in locations if loc in aggregator.done]))
        aside.replace(done)
    aggregator.get_array()
