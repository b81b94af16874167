"""A fresh process that runs `oocpatch predict` on a slide once and says how much memory that added."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import tifffile

from oocpatch.cli.main import main
from tests.support.memory_child import PeakSampler


def measured(arguments: list[str]) -> int:
    """Bytes that the command adds to this process."""
    with tempfile.TemporaryDirectory() as folder:
        # Imports on first use and thread pools belong to the process and not to the run.
        small, out = f"{folder}/small.tif", f"{folder}/out.zarr"
        tifffile.imwrite(small, np.ones((96, 96, 3), np.uint8), tile=(32, 32), photometric="rgb", compression="jpeg")
        sizes = {"--patch-size": "48", "--patch-overlap": "8"}
        again = [sizes.get(before, given) for before, given in zip([None, *arguments], arguments, strict=False)]
        run([*again[:1], small, out, *again[3:], "--block-shape", "48"])
    before = psutil.Process().memory_info().rss
    with PeakSampler() as sampler:
        run(arguments)
    return sampler.peak - before


def run(arguments: list[str]) -> None:
    """The command; what it would end with ends this process."""
    if code := main(arguments, standalone_mode=False):
        sys.exit(int(code))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({"added": measured(sys.argv[2:])}))
