"""A call for a fresh process that runs `label` once and says how much memory the run added."""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import numpy as np
import psutil

import oocpatch
from oocpatch.configuration.label_plan import label_config
from oocpatch.configuration.make_plan import make_plan
from tests.support.memory_child import PeakSampler


def main(volume: str, output: str, options: dict[str, Any]) -> None:
    """Print `{"added", "projected", "blocks", "objects"}`, the first two in bytes."""
    with tempfile.TemporaryDirectory() as warm_up:
        # Imports on first use, thread pools and the like belong to the process and not to the run.
        oocpatch.label(np.eye(64, dtype=bool), f"{warm_up}/out", block_shape=32, output_chunks=32, progress=False)
    rule = {"threshold": None, "connectivity": 1, "per_class": False, "min_size": 0}
    plan = make_plan(label_config(volume, output, **rule, **options))
    before = psutil.Process().memory_info().rss
    with PeakSampler() as sampler:
        labels = oocpatch.label(volume, output, progress=False, **options)
    answer = {
        "added": sampler.peak - before,
        "projected": plan.projected_memory,
        "blocks": plan.blocks,
        "objects": labels.attrs["objects"],
    }
    sys.stdout.write(json.dumps(answer))
