"""Promise: what a model allocates lies in huge pages, unless the user decided otherwise; else runs say so."""

from __future__ import annotations

import logging
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import oocpatch
from oocpatch.engine import buffers

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
VARIABLE = "THP_MEM_ALLOC_ENABLE"
CHILD = """
import oocpatch, torch
from oocpatch.engine import buffers
buffers.gives_huge_pages_on_request = lambda: True
buffers.warn_without_huge_pages()
tensor = torch.ones(8 << 20)
address = tensor.data_ptr() + (4 << 20)
inside = False
for line in open("/proc/self/smaps"):
    fields = line.split()
    if "-" in fields[0] and not fields[0].endswith(":"):
        low, high = (int(n, 16) for n in fields[0].split("-"))
        inside = low <= address < high
    elif inside and fields[0] == "VmFlags:":
        print("hg" in fields)
"""
EARLY = "import torch; torch.nn.Linear(1, 1)"


@pytest.mark.skipif(not THP.exists(), reason="the kernel has no transparent huge pages")
@pytest.mark.parametrize(
    ("before", "value", "asked", "warned"),
    [("", None, "True", False), ("", "0", "False", False), (EARLY, None, "False", True)],
    ids=["default", "switched off", "torch was first"],
)
def test_tensors_ask_for_huge_pages_unless_the_user_says_no(
    before: str, value: str | None, asked: str, warned: bool
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE} | ({} if value is None else {VARIABLE: value})
    command = [sys.executable, "-c", before + CHILD]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == asked
    assert ("import oocpatch first" in done.stderr) == warned


def test_runs_of_large_models_say_once_that_they_do_without_huge_pages(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(buffers, "gives_huge_pages_on_request", lambda: True)
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr(mmap, "PAGESIZE", 1 << 60)  # where no tensor begins
    buffers.warn_without_huge_pages.cache_clear()

    def warnings_after(name: str, channels: int) -> int:
        network = torch.nn.Sequential(torch.nn.Conv3d(1, channels, 1), torch.nn.Conv3d(channels, 1, 1))
        volume = np.zeros((64, 64, 64), np.float32)
        oocpatch.predict(volume, network, tmp_path / name, patch_size=64, progress=False)
        return sum("huge pages" in record.message for record in caplog.records)

    with caplog.at_level(logging.WARNING, "oocpatch"):
        assert [warnings_after(*run) for run in (("a", 1), ("b", 32), ("c", 32))] == [0, 1, 1]
    buffers.warn_without_huge_pages.cache_clear()
