"""A call for a fresh process that converts a volume once and says how much memory that added."""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import numpy as np
import psutil

import oocpatch
from tests.support.memory_child import PeakSampler


def main(volume: str, output: str, options: dict[str, Any]) -> None:
    """Print `{"added"}` in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        # Imports on first use and thread pools belong to the process and not to the conversion.
        oocpatch.convert(np.ones((32, 32, 32), np.uint16), f"{folder}/out.zarr", chunks=16, shards=32, progress=False)
        oocpatch.Volume(volume).source.load((slice(0, 1), slice(0, 1), slice(0, 1)))
    before = psutil.Process().memory_info().rss
    with PeakSampler() as sampler:
        oocpatch.convert(volume, output, progress=False, **options)
    sys.stdout.write(json.dumps({"added": sampler.peak - before}))
