"""A call for a fresh process that draws from a large map, and says what it drew and how much memory that added."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import psutil

import oocpatch
from oocpatch.sampling.random_streams import stream
from tests.support.memory_child import PeakSampler


def sampler_of(path: Path | np.ndarray, kind: str, patch: int) -> oocpatch.WeightedSampler:
    subject = oocpatch.Subject(map=path)
    if kind == "weighted":
        return oocpatch.WeightedSampler(subject, patch, "map")
    return oocpatch.LabelSampler(subject, patch, "map")


def main(path: str, kind: str) -> None:
    """Print `{"corners", "added"}`."""
    sampler_of(np.ones((8, 8, 8)), kind, 2).prepare()  # imports and thread pools belong to the process
    sampler = sampler_of(Path(path), kind, 64)
    before = psutil.Process().memory_info().rss
    with PeakSampler() as peak:
        corners = Counter(sampler.draw(sampler.subject, stream(0, i))[0] for i in range(400))
    sys.stdout.write(json.dumps({"corners": list(corners.items()), "added": peak.peak - before}))
